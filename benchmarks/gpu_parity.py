"""Logits of a device beside those of the CPU, in a process of its own; run by gpu.py.

    python gpu_parity.py '{"task": "small", "device": "cuda0", ...}'

Two kinds of models: small ones with the heads of the real ones, whose sizes and groups choose the
device's attention kernels, in many types of weights; and those whose speed is measured. The CPU
computes with ggml's kernels. Prints one JSON object.

Each computes a prompt past the window and past the end of the ring of its sliding cells, in chunks
and then a single row as a decoding request does; and a step of several requests, a row each. The
prompt is one of a whole number of chunks, so that reading wrapped cells is in it.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import gemloom
from gemloom import testing
from gemloom.compute.batch import Chunk

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import work

import tiny

Job = dict[str, Any]
Source = bytes | str
FIRST, LAST, GREEDY = 48, 49, 24  # rows of the prompt that are compared; tokens picked
# Query heads, K/V heads on sliding and on full layers of the released models; the pattern of
# layers is the shortest with what is peculiar about each.
HEADS = {
    "e2b": (8, 1, 1, "ssfssf"), "e4b": (8, 2, 2, "ssfssf"),
    "12b": (16, 8, 1, "ssf"), "26b": (16, 8, 2, "ssf"),
}  # fmt: skip


def small(job: Job) -> Job:
    """A model of each structure with weights and cells of each pair of types."""
    found = {}
    for name in job["structures"]:
        made = variant(name)
        for kind, cells in job["types"]:
            data = tiny.gguf_bytes(made, types=None if kind == "f32" else kind)
            run = job | {"cells": cells, "window": made.window, "chunk": made.window}
            found[f"{name} {kind}, {cells} cells"] = _beside(data, run, greedy=True)
    return found


def variant(name: str) -> tiny.Variant:
    """A small model with heads of 256 and 512, grouped as in the real one.

    Its ring is 256 cells: what reads fewer at once takes other kernels than real models do.
    """
    n_head, n_kv, n_kv_full, pattern = HEADS[name]
    before = tiny.VARIANTS[name].wide()
    return replace(
        before, pattern=pattern, n_shared=3 if before.n_shared else 0, n_head=n_head, n_kv=n_kv,
        n_kv_full=n_kv_full, head_dim=256, head_dim_full=512, window=128,
    )  # fmt: skip


def real(job: Job) -> Job:
    """The model of a file with cells of each type."""
    run = job | {"window": work.of(Path(job["model"])).config.window}
    return {
        f"{cells} cells": _beside(job["model"], run | {"cells": cells}) for cells in job["types"]
    }


def _beside(source: Source, job: Job, *, greedy: bool = False) -> Job:
    """Errors in deviations of the CPU's logits, and what the device lacked.

    ``worst`` is the mean error of the worst row; ``same`` the share of rows with the same largest
    logit; ``greedy`` how many tokens of GREEDY are the same before the first that is not.
    """
    with _loaded(source, "cpu", "ggml", job) as model:
        wanted = _logits(model, job)[0]
        said = _greedy(model, job) if greedy else []
    with _loaded(source, job["device"], "auto", job) as model:
        got, lacking = _logits(model, job)
        alike = _alike(said, _greedy(model, job)) if greedy else None
        lacking |= Counter(model.fallbacks)
        lacking += Counter(_left_on_host(model, job["device"]))
    error = np.abs(got - wanted) / wanted.std()
    return {
        "mean": float(error.mean()), "worst": float(error.mean(axis=1).max()),
        "max": float(error.max()), "greedy": alike, "lacking": dict(lacking),
        "same": float((got.argmax(axis=1) == wanted.argmax(axis=1)).mean()),
    }  # fmt: skip


@contextmanager
def _loaded(source: Source, device: str, kernels: str, job: Job) -> Iterator[gemloom.Model]:
    context = -(-(_length(job) + GREEDY) // 256) * 256
    options = {"threads": job["threads"], "chunk": job["chunk"], "kv_type": job["cells"]}
    options |= {"context": context, "slots": job["sequences"], "kernels": kernels}
    with gemloom.load(source, device=device, **options) as model:
        yield model


def _length(job: Job) -> int:
    """Tokens past the ring of window and chunk: whole chunks and one."""
    chunk: int = job["chunk"]
    return (job["window"] + 2 * chunk) // chunk * chunk + 1


def _ids(model: gemloom.Model, n: int, seed: int = 0) -> list[int]:
    return [int(i) for i in np.random.RandomState(seed).randint(model.config.n_vocab, size=n)]


def _logits(model: gemloom.Model, job: Job) -> tuple[np.ndarray, Counter[str]]:
    """Of rows of one long prompt, and of a row of each of several requests; what was lacking."""
    ids = _ids(model, n := _length(job))
    rows = sorted({*range(min(FIRST, n)), *range(max(0, n - LAST), n)})
    alone = model.logits(ids, rows=rows)
    lacking = Counter(model.fallbacks)
    prompts = [_ids(model, 4 + i, 1 + i) for i in range(job["sequences"])]
    _step(model, [Chunk(slot=i, start=0, tokens=p[:-1]) for i, p in enumerate(prompts)])
    together = _step(
        model,
        [Chunk(slot=i, start=len(p) - 1, tokens=p[-1:], wanted=[0]) for i, p in enumerate(prompts)],
    )
    return np.concatenate([alone, together]), lacking | Counter(model.fallbacks)


def _step(model: gemloom.Model, batch: list[Chunk]) -> np.ndarray:
    return testing.run(model, batch).logits


def _greedy(model: gemloom.Model, job: Job) -> list[int]:
    bias = dict.fromkeys(model.tokenizer.eog, -100.0)
    ids = _ids(model, job["chunk"], 99)
    return model.generate(ids, temperature=0, max_tokens=GREEDY, logit_bias=bias).tokens


def _alike(a: list[int], b: list[int]) -> int:
    different = [i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y]
    return different[0] if different else len(a)


def _left_on_host(model: gemloom.Model, device: str) -> dict[str, int]:
    """What was never meant to run on the device."""
    placement = model.placement
    if device == "cpu":
        return {}
    found = {"layers": placement.layers.count(placement.host), "matrices": len(placement.kept)}
    return {name: n for name, n in found.items() if n}


if __name__ == "__main__":
    wanted = json.loads(sys.argv[1])
    try:
        answer = {"small": small, "real": real}[wanted["task"]](wanted)
    except gemloom.GemloomError as error:
        sys.exit(f"error: {error}")
    print(json.dumps(answer))
