"""Where the time of one step goes, by operation.

    python benchmarks/operations.py MODEL [--rows 512] [--past 0] [--threads N]

``--rows`` tokens are computed after ``--past`` others, as a prompt's chunk is; ``--rows 1`` is a
decoded token. ggml reports each node as it ends, which costs a little: the sum is held against
the same step without it.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from time import perf_counter
from typing import Any

import ggml
import numpy as np
from rich.console import Console
from rich.table import Table

import gemloom
from gemloom import testing
from gemloom.compute.batch import Chunk
from gemloom.errors import GemloomError
from gemloom.testing import parts_of

CHUNK = 512
I8, BF16 = 24, 30  # ggml's numbers of the types
SHOWN = 26  # operations


def describe_own(x: Any) -> tuple[str, float]:
    """A node of our own kernels: told apart by what it reads."""
    args = [arg.contents for arg in x.src if arg]
    rows = x.ne[1] * x.ne[2] * x.ne[3]
    if x.type == I8:
        return f"to 8 bits, {args[0].ne[0]} x {rows}", 0.0
    if args[0].type == I8:
        k = args[1].src[0].contents.ne[0]
        return f"product, packed, {k} x {x.ne[0]}, {rows} rows", float(k) * x.ne[0] * rows
    if args[0].type == BF16:
        k = args[0].ne[0]
        return f"product, bf16, {k} x {x.ne[0]}, {rows} rows", float(k) * x.ne[0] * rows
    if len(args) == 4:
        cells = args[1].ne[1]
        return f"attention, own, head of {x.ne[0]}, {cells} cells, {x.ne[2]} rows", 0.0
    return "norm or gelu, own", 0.0


def describe(node: Any) -> tuple[str, float]:
    """What a node does, operations of one kind and shape together, and its multiply-adds."""
    name = ggml.ggml_op_desc(node).decode()
    x = node.contents
    if name.startswith("MUL_MAT"):
        w = x.src[0].contents
        kind = ggml.ggml_type_name(w.type).decode()
        work = float(w.ne[0]) * x.ne[0] * x.ne[1] * x.ne[2] * x.ne[3]
        return f"product, {kind}, {w.ne[0]} x {w.ne[1]}, {x.ne[1]} rows", work
    if name == "CUSTOM":
        return describe_own(x)
    if name.startswith("FLASH"):
        q, k = x.src[0].contents, x.src[1].contents
        return f"attention, head of {q.ne[0]}, {k.ne[1]} cells, {q.ne[1]} rows", 0.0
    return name.lower(), 0.0


def profile(model: gemloom.Model, run: Any) -> tuple[Counter[str], Counter[str]]:
    """Seconds and multiply-adds of each kind of operation in one run."""
    seconds: Counter[str] = Counter()
    work: Counter[str] = Counter()
    begun = 0.0

    @ggml.ggml_backend_sched_eval_callback
    def watch(node: Any, asking: bool, _: Any) -> bool:
        nonlocal begun
        if not asking:
            key, amount = describe(node)
            seconds[key] += perf_counter() - begun
            work[key] += amount  # type: ignore[assignment]
        begun = perf_counter()
        return True

    scheduler = parts_of(model).device.scheduler
    ggml.ggml_backend_sched_set_eval_callback(scheduler, watch, None)
    try:
        run()
    finally:
        nothing = ggml.ggml_backend_sched_eval_callback(0)
        ggml.ggml_backend_sched_set_eval_callback(scheduler, nothing, None)
    return seconds, work


def measure(options: argparse.Namespace) -> Table:
    """One step, plain and watched."""
    ids = np.random.RandomState(0).randint(1000, 20_000, options.past + options.rows).tolist()
    context = -(-(len(ids) + 1) // 256) * 256
    with gemloom.load(options.model, context=context, threads=options.threads) as model:

        def step(start: int, stop: int) -> Any:
            wanted = [stop - start - 1] if stop == len(ids) else []
            chunk = Chunk(slot=0, start=start, tokens=ids[start:stop], wanted=wanted)
            return testing.run(model, [chunk]).logits

        for start in range(0, options.past, CHUNK):
            step(start, min(start + CHUNK, options.past))
        last = (options.past, len(ids))
        step(*last)  # builds the graph, wakes the threads
        begin = perf_counter()
        step(*last)
        plain = perf_counter() - begin
        seconds, work = profile(model, lambda: step(*last))
    return _table(plain, seconds, work)


def _table(plain: float, seconds: Counter[str], work: Counter[str]) -> Table:
    total = sum(seconds.values())
    title = f"one step: {1e3 * plain:,.1f} ms; by operation {1e3 * total:,.1f} ms"
    table = Table("operation", "ms", "share", "G multiply-adds/s", title=title)
    for key, spent in seconds.most_common(SHOWN):
        rate = f"{work[key] / spent / 1e9:,.0f}" if work[key] else ""
        table.add_row(key, f"{1e3 * spent:,.1f}", f"{spent / total:.1%}", rate)
    rest = sum(spent for _, spent in seconds.most_common()[SHOWN:])
    table.add_row("all else", f"{1e3 * rest:,.1f}", f"{rest / total:.1%}", "")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--past", type=int, default=0)
    parser.add_argument("--threads", type=int)
    try:
        Console().print(measure(parser.parse_args()))
    except (GemloomError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
