"""One measurement of Gemloom on a device, in a process of its own; run by gpu.py.

    python gpu_ours.py '{"task": "speed", "device": "cuda0", "model": "...", ...}'

Prints one JSON object.
"""

from __future__ import annotations

import json
import sys
from contextlib import closing
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType

import gemloom
from gemloom.bench import bench
from gemloom.errors import DeviceError
from gemloom.ggml.arena import Arena
from gemloom.ggml.backends import devices, ggml_version
from gemloom.ggml.device import Device
from gemloom.ggml.graph import Graph

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import tiny

Job = dict[str, Any]
PROMPT, GREEDY = 80, 24  # tokens of a parity check


def device(job: Job) -> Job:
    """What ggml tells of the device."""
    found = [info for info in devices() if info.name.lower() == job["device"]]
    if not found:
        there = ", ".join(info.name.lower() for info in devices())
        raise DeviceError(f"{job['device']}: ggml has {there} here")
    info = found[0]
    return {"name": info.name, "description": info.description, "ggml": ggml_version()} | {
        "free": info.free, "total": info.total,
    }  # fmt: skip


def bandwidth(job: Job) -> Job:
    """Bytes a second that the device reads and writes, scaling numbers in its memory: the best."""
    steps, count = 8, job["bytes"] // 4
    with (
        closing(Device(job["device"], job["threads"])) as there,
        closing(Arena(there, 1, where=0)) as arena,
    ):
        x = arena.tensor("x", GGMLQuantizationType.F32, (count,))
        arena.allocate("what is copied")
        with closing(Graph(there, 32)) as g:
            g.at(0)
            y = x
            for _ in range(steps):
                y = g.scale(y, 1.0)
            g.output(y)
            g.allocate()
            seconds = []
            for _ in range(job["repetitions"] + 1):  # the first makes memory and kernels ready
                start = perf_counter()
                g.compute()
                seconds.append(perf_counter() - start)
    return {"bytes": 2 * steps * 4 * count / min(seconds[1:])}


def parity(job: Job) -> Job:
    """Tiny models of each structure and type on the device and on the CPU with ggml's kernels.

    The error of logits is in deviations of the CPU's; ``greedy`` is how many tokens are the same
    before the first that is not, of GREEDY.
    """
    found = {}
    for name in job["structures"]:
        for kind in job["types"]:
            made = tiny.VARIANTS[name].wide()
            data = tiny.gguf_bytes(made, types=None if kind == "f32" else kind)
            ids = [2, *np.random.RandomState(0).randint(300, size=PROMPT - 1).tolist()]
            logits, tokens = [], []
            for where, kernels in (("cpu", "ggml"), (job["device"], "auto")):
                options = {"threads": job["threads"], "kernels": kernels, "context": 256}
                with gemloom.load(data, device=where, **options) as model:
                    logits.append(model.logits(ids))
                    tokens.append(_greedy(model, ids))
            error = np.abs(logits[1] - logits[0]) / logits[0].std()
            found[f"{name} {kind}"] = {
                "mean": float(error.mean()), "max": float(error.max()),
                "greedy": _alike(*tokens),
            }  # fmt: skip
    return found


def _greedy(model: gemloom.Model, ids: list[int]) -> list[int]:
    bias = dict.fromkeys(model.tokenizer.eog, -100.0)
    return model.generate(ids, temperature=0, max_tokens=GREEDY, logit_bias=bias).tokens


def _alike(a: list[int], b: list[int]) -> int:
    different = [i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y]
    return different[0] if different else len(a)


def speed(job: Job) -> Job:
    """Seconds of prompts, and of decoding by one request and by several, at each depth."""
    most = max(job["sequences"])
    options = {"threads": job["threads"], "context": job["context"], "slots": most}
    start = perf_counter()
    with gemloom.load(job["model"], device=job["device"], kv_type="f16", **options) as model:
        loaded = perf_counter() - start
        report = bench(model, job["prompts"], [job["decode"]], job["depths"], job["repetitions"])
        singles = {f"1 at {t.depth}": t for t in report.timings if t.kind == "decode"}
        decode = {name: t.seconds for name, t in singles.items()}
        outside = {name: t.python_share for name, t in singles.items()}
        for n in job["sequences"]:
            for depth in job["depths"] if n > 1 else ():
                seconds, share = _together(model, n, depth, job)
                decode[f"{n} at {depth}"], outside[f"{n} at {depth}"] = seconds, share
        return {
            "prompt": {t.tokens: t.seconds for t in report.timings if t.kind == "prompt"},
            "decode": decode, "outside": outside, "load": loaded,
            "milliseconds": {name: t.phases for name, t in singles.items()},
            "memory": model.memory(), "fallbacks": dict(model.fallbacks),
            "ranks": model._runner.ranks, "backends": model.backends,
        }  # fmt: skip


def _together(model: gemloom.Model, n: int, depth: int, job: Job) -> tuple[list[float], float]:
    """Seconds that n requests take to decode side by side, and the share outside ggml.

    Their prompts are computed first, so that all begin in the same step; timed is the one that
    began last.
    """
    prompts = [
        np.random.RandomState(1_000 * depth + i)
        .randint(model.config.n_vocab, size=max(1, depth))
        .tolist()
        for i in range(n)
    ]
    bias = dict.fromkeys(model.tokenizer.eog, -100.0)

    def runs(tokens: int) -> list[gemloom.generation.Run]:
        each = enumerate(prompts)
        return [model.stream(p, max_tokens=tokens, seed=i, logit_bias=bias) for i, p in each]

    for run in runs(1):
        run.completion()
    seconds, shares = [], []
    for _ in range(job["repetitions"]):
        before, start = model.times, perf_counter()
        done = [run.completion().usage.decode_seconds for run in runs(job["decode"] + 1)]
        spent = perf_counter() - start
        seconds.append(min(done))
        shares.append(1 - (model.times["compute"] - before["compute"]) / spent)
    return seconds, median(shares)


if __name__ == "__main__":
    wanted = json.loads(sys.argv[1])
    try:
        tasks = {"device": device, "bandwidth": bandwidth, "parity": parity, "speed": speed}
        answer = tasks[wanted["task"]](wanted)
    except gemloom.GemloomError as error:
        sys.exit(f"error: {error}")
    print(json.dumps(answer))
