"""One measurement of Gemloom on a device, in a process of its own; run by gpu.py.

    python gpu_ours.py '{"task": "speed", "device": "cuda0", "model": "...", ...}'

Prints one JSON object.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from contextlib import closing
from statistics import median
from threading import Event, Thread
from time import perf_counter
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType

import gemloom
from gemloom.errors import DeviceError
from gemloom.ggml.arena import Arena
from gemloom.ggml.backends import devices, ggml_version
from gemloom.ggml.device import Device
from gemloom.ggml.graph import Graph
from gemloom.testing import engine_of, parts_of
from gemloom.tools.bench import COMPUTING, bench

Job = dict[str, Any]


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


def speed(job: Job) -> Job:
    """Seconds of prompts in chunks of each size, and of decoding by several requests at each depth.

    Decoding is in chunks of the first size. Where the device finds the largest logits itself, it
    is also measured at the first depth with all of them read instead.
    """
    chunks = {str(chunk): _speed(job, chunk, i == 0) for i, chunk in enumerate(job["chunks"])}
    first = chunks[str(job["chunks"][0])]
    return {"prompt": {name: found.pop("prompt") for name, found in chunks.items()}} | first


def _speed(job: Job, chunk: int, decoding: bool) -> Job:
    """All with one size of chunks, and what the model loaded with it tells."""
    options = {"threads": job["threads"], "context": job["context"], "chunk": chunk}
    options |= {"slots": max(job["sequences"]), "kv_type": "f16"}
    start = perf_counter()
    with gemloom.load(job["model"], device=job["device"], **options) as model:
        loaded = perf_counter() - start
        timings = bench(model, job["prompts"], [], [], job["repetitions"]).timings
        found: Job = {"prompt": {t.tokens: t.seconds for t in timings}}
        lacking = Counter(model.fallbacks)
        if decoding:
            found |= _decoding(model, job)
        return found | {
            "load": loaded, "memory": model.memory(), "ranks": parts_of(model).program.ranks,
            "fallbacks": dict(lacking | Counter(model.fallbacks)), "backends": model.backends,
        }  # fmt: skip


def _decoding(model: gemloom.Model, job: Job) -> Job:
    """``decode`` by name, and ``whole`` as that with all logits read, where that is other."""
    runner, counts = parts_of(model).program, job["sequences"]
    each = {f"{n} at {depth}": (n, depth) for depth in job["depths"] for n in counts}
    found = {"decode": {name: _together(model, *one, job) for name, one in each.items()}}
    if runner.ranks:
        runner.ranks = False
        depth = job["depths"][0]
        found["whole"] = {f"{n} at {depth}": _together(model, n, depth, job) for n in counts}
        runner.ranks = True
    return found


def _together(model: gemloom.Model, n: int, depth: int, job: Job) -> Job:
    """Seconds that n requests take to decode side by side, and where the time of a step goes.

    Their prompts are computed first and found in the cells, and none starts before all have come:
    every step is of n rows. Milliseconds of one by phase, the median: of a run less one that ends
    with the first tokens. ``other`` is what no phase accounts for, ``outside`` the share of the
    phases that are not in ggml.
    """
    prompts = [
        np.random.RandomState(1_000 * depth + i)
        .randint(model.config.n_vocab, size=max(1, depth))
        .tolist()
        for i in range(n)
    ]
    tokens, seconds, phases = job["decode"], [], []
    _run(model, prompts, 1)
    for _ in range(job["repetitions"]):
        _, first = _run(model, prompts, 1)
        took, spent = _run(model, prompts, tokens + 1)
        seconds.append(took)
        phases.append({name: 1e3 * max(0.0, spent[name] - first[name]) / tokens for name in spent})
    middle = {name: median(each[name] for each in phases) for name in phases[0]}
    outside = 1 - sum(middle[name] for name in COMPUTING) / sum(middle.values())
    return {"seconds": seconds, "milliseconds": middle, "outside": outside}


def _run(
    model: gemloom.Model, prompts: list[list[int]], tokens: int
) -> tuple[float, dict[str, float]]:
    """Seconds from the first tokens to the last, and those of the whole run by phase."""
    bias = dict.fromkeys(model.tokenizer.eog, -100.0)
    gate = Event()
    holding = Thread(target=engine_of(model).call, args=(gate.wait,))
    holding.start()
    try:
        each = enumerate(prompts)
        runs = [model.stream(p, max_tokens=tokens, seed=i, logit_bias=bias) for i, p in each]
        before, start = model.times, perf_counter()
    finally:
        gate.set()
        holding.join()
    took = min(run.completion().usage.decode_seconds for run in runs)
    whole = perf_counter() - start
    spent = {name: after - before[name] for name, after in model.times.items()}
    for name in ("sample", "text"):
        spent[name] = sum(run.times[name] for run in runs)
    return took, spent | {"other": max(0.0, whole - sum(spent.values()))}


if __name__ == "__main__":
    wanted = json.loads(sys.argv[1])
    try:
        tasks = {"device": device, "bandwidth": bandwidth, "speed": speed}
        answer = tasks[wanted["task"]](wanted)
    except gemloom.GemloomError as error:
        sys.exit(f"error: {error}")
    print(json.dumps(answer))
