"""One measurement of Gemloom in a process of its own; run by compare.py and scale.py.

    python ours.py '{"model": "...", "threads": 2, "task": "speed", ...}'

Everything goes through ``Model.stream`` as a caller would: sampling and text are in the times.
Prints one JSON object.
"""

import json
import sys
from time import perf_counter

IMPORTING = perf_counter()
import numpy as np  # noqa: E402

import gemloom  # noqa: E402
from gemloom.engine.generation import Run  # noqa: E402

IMPORTED = perf_counter()


def _open(job: dict) -> gemloom.Model:
    packed = job.get("packed", "off")
    return gemloom.load(job["model"], threads=job["threads"], context=job["context"], packed=packed)


def _stream(
    model: gemloom.Model, n: int, generate: int, seed: int, adapters: dict | None = None
) -> Run:
    """``n`` random tokens, then exactly ``generate``."""
    ids = np.random.RandomState(seed).randint(model.config.n_vocab, size=n).tolist()
    bias = dict.fromkeys(model.tokenizer.eog, -100.0)
    return model.stream(ids, max_tokens=generate, seed=seed, logit_bias=bias, adapters=adapters)


def _first(run: Run, known: int = 0) -> float:
    """Seconds until the first token; so many of the prompt may have been in the cells."""
    begin = perf_counter()
    next(run)
    assert run.usage.cached_tokens <= known, "two prompts began alike"
    return perf_counter() - begin


def speed(job: dict) -> dict:
    """Seconds of each prompt, and of decoding at each depth."""
    prompts, decodes, memory = {}, {}, {}
    with _open(job) as model:
        _first(_stream(model, 32, 1, seed=0))  # wakes the threads, brings the weights into memory
        for n in sorted({*job["prompts"], *job["depths"]}):
            count = job["decode"] + 1 if n in job["depths"] else 1
            with _stream(model, max(n, 1), count, seed=n + 1) as run:
                prompts[n] = _first(run)
                if n in job["depths"]:
                    list(run)
                    decodes[n] = run.usage.decode_seconds  # by the engine's clock: it runs ahead
        memory = model.memory()
    return {
        "prompt": {n: prompts[n] for n in job["prompts"]}, "decode": decodes, "memory": memory
    }  # fmt: skip


def start(job: dict) -> dict:
    """Seconds to load, and then to the first token after a prompt of one."""
    begin = perf_counter()
    with _open(job) as model:
        loaded = perf_counter()
        with _stream(model, 1, 1, seed=1) as run:
            first = _first(run)
        with _stream(model, job["prompt"], 2, seed=2) as run:
            list(run)  # so that whatever grows with use has grown
    return {"import": IMPORTED - IMPORTING, "load": loaded - begin, "first": first}


def adapters(job: dict) -> dict:
    """Seconds with and without adapters, by turns; of a switch; of loading one."""
    names = [f"a{i}" for i in range(job["requests"])]
    both: dict = {"base": None, "adapter": {names[0]: 1.0}}
    loads = []
    prompts, decodes = {name: [] for name in both}, {name: [] for name in both}
    many: dict = {"base": [None], "one": [both["adapter"]], "eight": [{n: 1.0} for n in names]}
    together, switch = {name: [] for name in many}, {"same": [], "other": []}
    options = {"threads": job["threads"], "context": job["context"], "slots": job["requests"]}
    with gemloom.load(job["model"], **options) as model:
        for name in names:
            begin = perf_counter()
            model.adapters.load(name, job["adapter"])
            loads.append(perf_counter() - begin)
        seed = 0
        for turn in range(job["rounds"] + 1):  # the first wakes threads and weights
            for name in sorted(both, reverse=turn % 2 == 0):
                seed += 1
                run = _stream(model, job["prompt"], job["decode"] + 1, seed, both[name])
                prompts[name].append(_first(run, known=2))
                list(run)
                decodes[name].append(run.usage.decode_seconds)
            for name in sorted(many, reverse=turn % 2 == 0):
                seed += job["requests"]
                together[name].append(_together(model, job, seed, many[name]))
            for name in ("same", "other", "other", "same") * 4 if turn else ():
                seed += 1
                switch[name].append(_switch(model, seed, names[:2], other=name == "other"))
    for seconds in (*prompts.values(), *decodes.values(), *together.values()):
        del seconds[0]
    return {
        "load": loads, "prompt": prompts, "decode": decodes, "together": together,
        "switch": switch,
    }  # fmt: skip


def _together(model: gemloom.Model, job: dict, seed: int, chosen: list) -> float:
    """Seconds for a number of requests to decode side by side, once all of them do."""
    runs = [
        _stream(model, 16, job["decode"] + 1, seed - i, chosen[i % len(chosen)])
        for i in range(job["requests"])
    ]
    for run in runs:
        list(run)
    return min(run.usage.decode_seconds for run in runs)  # of the one that began last


def _switch(model: gemloom.Model, seed: int, names: list[str], *, other: bool) -> float:
    """Seconds to the first token, after a request with the same adapter or another one."""
    before, now = names if other else (names[1], names[1])
    list(_stream(model, 16, 4, 2 * seed + 1_000_000, {before: 1.0}))
    run = _stream(model, 16, 1, 2 * seed + 1_000_001, {now: 1.0})
    return _first(run, known=2)


def version(job: dict) -> dict:
    """What is measured."""
    from importlib.metadata import version as of

    from gemloom.ggml.backends import cpu_features, ggml_version
    from gemloom.ggml.device import Device

    device = Device()
    try:
        names = device.names
    finally:
        device.close()
    return {
        "gemloom": gemloom.__version__,
        "ggml-python": of("ggml-python"),
        "ggml": ggml_version(),
        "backends": names,
        "features": [name for name, there in cpu_features().items() if there],
    }


if __name__ == "__main__":
    wanted = json.loads(sys.argv[1])
    try:
        tasks = {"speed": speed, "start": start, "adapters": adapters, "version": version}
        answer = tasks[wanted["task"]](wanted)
    except gemloom.GemloomError as error:
        sys.exit(f"error: {error}")
    print(json.dumps(answer))
