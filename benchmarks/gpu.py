"""Gemloom on a GPU, beside the CPU for rightness and beside llama.cpp's CUDA build for speed.

    python benchmarks/gpu.py --fetch DIR             where there is an index: under 64 MiB
    python benchmarks/gpu.py --from DIR              on the machine with the GPU, no network
    python benchmarks/gpu.py --from DIR --only PART ...
    python benchmarks/gpu.py --device cpu --tiny     the whole course in a minute, on any machine

The parts: build (ggml-python for the chip at hand), bandwidth (what the device's memory does at
most), parity (small models of every structure), peer (llama.cpp for that chip), e2b, e4b, 26b
(parity and speed of each). Each may be a command of its own; what a part found is kept in
``results/NAME.json`` (a dry run's, and one's with ``--out``, among the models) and not measured
again unless ``--again``. A build that was stopped goes on. Without ``--from`` the ggml-python that
is installed is measured, and llama.cpp only with ``--peer``. Until the build is done nothing but
Python's own library is needed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import gpu_build

HERE = Path(__file__).parent
MODELS = {"e2b": "e2b-q4_k_m", "e4b": "e4b-q4_k_m", "26b": "26b-cut"}
PARTS = ("build", "bandwidth", "parity", "peer", *MODELS)
ALL_LAYERS = 999
Found = dict[str, Any]
FULL: Found = {
    "prompts": [128, 512, 2048, 8192], "chunks": [512, 2048], "depths": [0, 2048, 8192],
    "sequences": [1, 8], "decode": 64, "repetitions": 3,
}  # fmt: skip
TINY: Found = {
    "prompts": [8, 24], "chunks": [16, 32], "depths": [0, 24], "sequences": [1, 2], "decode": 4,
    "repetitions": 1,
}  # fmt: skip
CELLS = ["f16", "q8_0"]
SMALL: Found = {
    "structures": ["e2b", "e4b", "12b", "26b"], "sequences": 8,
    "types": [  # of the weights and of the K/V cells
        ("f32", "f16"), ("f32", "q8_0"), ("f32", "f32"), ("q4_k", "f16"), ("q6_k", "f16"),
        ("q4_0", "f16"), ("q8_0", "f16"), ("q4_k", "q8_0"),
    ],
}  # fmt: skip
TINY_SMALL: Found = {
    "structures": ["e2b"], "sequences": 2, "types": [("f32", "f16"), ("q4_k", "q8_0")],
}  # fmt: skip
# Mean errors of the worst row of logits, in deviations, that are no rounding; logits that have
# nothing to do with each other are at 1.1. With quantized weights the inputs of each product are
# rounded to 8 bits too, by each backend in blocks of its own, and the 35 layers of an E2B of random
# weights make more of it than the few of the small models: our kernels and ggml's, on one CPU, are
# 0.06 apart there and 0.20 here. A mistake in the structure shows in f32.
WORST_F32, WORST_QUANTIZED, WORST_REAL = 0.03, 0.25, 0.45
# What must run on the device, or it is not the device that was compared.
NEEDED = {
    "attention", "flash_attn_ext", "layers", "matrices", "mul_mat", "mul_mat_id", "rms_norm",
    "set_rows",
}  # fmt: skip


def measure(options: argparse.Namespace) -> Path:
    """All parts that ``options`` name; gives where the figures are.

    GemloomError, OSError where something fails; what was found before is kept.
    """
    from rich.console import Console
    from sides import Side, run

    def ask(script: str, python: str, job: Found) -> Found:
        given = {"device": options.device, "threads": options.threads}
        with Console(stderr=True).status(f"{script}: {job.get('model', '')} {job['task']}"):
            return run(Side(script, python, script), given | job).answer

    ours = lambda job: ask("gpu_ours.py", sys.executable, job)  # noqa: E731
    beside = lambda job: ask("gpu_parity.py", sys.executable, job)  # noqa: E731
    peer = lambda job: ask("peer.py", options.peer, job)  # noqa: E731
    folder = options.cache if options.tiny or options.out else HERE / "results"
    path = folder / f"{options.name}.json"
    result = _begin(path, options, ours)
    parts = result["parts"]
    for part in options.only:
        if part == "build" or (part in parts and not options.again):
            continue
        if part == "peer":
            _build(options, "llama-cpp-python")
            continue
        if part == "bandwidth":
            size = 1 << 20 if options.tiny else 1 << 30
            parts[part] = ours({"task": "bandwidth", "bytes": size, "repetitions": 5})
        elif part == "parity":
            parts[part] = beside({"task": "small", **(TINY_SMALL if options.tiny else SMALL)})
        else:
            _need_peer(options)
            parts[part] = _model(part, options, ours, peer if options.peer else None)
            parts[part]["parity"] = _parity(part, options, beside)
        _save(path, result)
        if options.out:
            _publish(options.out / options.name, result)
    return path


def _begin(path: Path, options: argparse.Namespace, ours: Any) -> Found:
    """What was found before on this device, or the head of a new result."""
    from machine import describe

    device = ours({"task": "device"})
    if path.is_file():
        before: Found = json.loads(path.read_text(encoding="utf-8"))
        if before["device"]["description"] == device["description"]:
            return before
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe(options.threads), "device": device, "parts": {},
    }  # fmt: skip


def _save(path: Path, result: Found) -> None:
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def _publish(path: Path, result: Found) -> None:
    """The figures and the tables so far, as two files in the folder of ``--out``."""
    _save(path.with_name(path.name + ".json"), result)
    path.with_name(path.name + ".md").write_text(tables(result) + "\n", encoding="utf-8")


def _model(part: str, options: argparse.Namespace, ours: Any, peer: Any) -> Found:
    """Both sides on one model, and the bytes that a step has to read."""
    import work

    plan = TINY if options.tiny else FULL
    file = _file(part, options)
    deepest = max(*plan["prompts"], *plan["depths"])
    context = -(-(deepest + plan["decode"] + 2) // 256) * 256
    job = {**plan, "model": str(file), "context": context, "layers": ALL_LAYERS}
    model = work.of(file)
    return {
        "plan": plan,
        "gemloom": ours({"task": "speed", **job}),
        "llama.cpp": peer({"task": "device", **job}) if peer else None,
        "bytes": {
            f"{n} at {depth}": model.stepped(depth, n)
            for n in plan["sequences"]
            for depth in plan["depths"]
        },
    }


def _parity(part: str, options: argparse.Namespace, beside: Any) -> Found:
    """The same model beside the CPU, with cells of each type."""
    plan = TINY if options.tiny else FULL
    job = {"model": str(_file(part, options)), "chunk": plan["chunks"][0], "types": CELLS}
    found: Found = beside({"task": "real", "sequences": max(plan["sequences"]), **job})
    return found


def _file(part: str, options: argparse.Namespace) -> Path:
    """The model's file, written if need be and in the page cache."""
    import synthetic
    from machine import warm

    kind = "tiny-" if options.tiny else ""
    path = options.cache / f"{kind}{MODELS[part]}-{synthetic.VERSION}.gguf"
    if not path.is_file():
        options.cache.mkdir(parents=True, exist_ok=True)
        print(f"writing {path}", file=sys.stderr)
        (synthetic.make_tiny if options.tiny else synthetic.make)(MODELS[part], path)
    warm(path)
    return path


# --- showing ------------------------------------------------------------------


def tables(result: Found) -> str:
    """What was found, in Markdown."""
    device, parts = result["device"], result["parts"]
    lines = [f"{device['description']} ({device['name']}), ggml {device['ggml']}, {result['when']}"]
    best = parts.get("bandwidth", {}).get("bytes")
    if best:
        lines += ["", f"Memory: {best / 1e9:,.0f} GB/s read and written, measured"]
    if compared := _compared(parts):
        lines += ["", *_parity_table(compared)]
    models = [part for part in MODELS if part in parts]
    if models:
        columns = (
            "model|test|Gemloom, tok/s|llama.cpp, tok/s|ratio|of memory|outside ggml|launching"
        )
        lines += ["", f"| {columns.replace('|', ' | ')} |", "|---|---" + "|--:" * 6 + "|"]
        lines += [row for part in models for row in _speed_rows(part, parts[part], best)]
    for part in models:
        if lacking := parts[part]["gemloom"]["fallbacks"]:
            lines += ["", f"{part}: on the CPU, as the device lacks them: {lacking}"]
    return "\n".join(lines)


def _compared(parts: Found) -> Found:
    """Every comparison with the CPU: of small models, and of those that were measured."""
    found = dict(parts.get("parity", {}))
    for part, file in MODELS.items():
        each = parts.get(part, {}).get("parity", {})
        found |= {f"{file}, {cells}": errors for cells, errors in each.items()}
    return found


def _parity_table(found: Found) -> list[str]:
    columns = (
        "logits beside the CPU's|mean error, deviations|worst row's|largest|same best|"
        "same greedy tokens|not on the device"
    )
    head = [f"| {columns.replace('|', ' | ')} |", "|---" + "|--:" * 6 + "|"]
    return head + [
        f"| {name} | {each['mean']:.5f} | {each['worst']:.5f} | {each['max']:.4f} "
        f"| {each['same']:.0%} | {'' if each['greedy'] is None else each['greedy']} "
        f"| {', '.join(f'{n} {what}' for what, n in each['lacking'].items())} |"
        for name, each in found.items()
    ]


def _speed_rows(part: str, found: Found, best: float | None) -> list[str]:
    ours, peer, plan = found["gemloom"], found["llama.cpp"], found["plan"]
    rows = []
    for chunk, prompts in ours["prompt"].items():
        for n, seconds in prompts.items():
            other = peer and peer["prompt"][chunk][n]
            rows.append(_row(part, f"prompt {n} by {chunk}", int(n), seconds, other))
    for kind, more in (("decode", ""), ("whole", ", all logits read")):
        for name, each in ours.get(kind, {}).items():
            tokens = plan["decode"] * int(name.split()[0])
            other = peer and kind == "decode" and peer["decode"][name]
            step = found["bytes"][name] * plan["decode"] / median(each["seconds"])
            spent = each["milliseconds"]
            shares = (
                f"{step / best:.0%}" if best else "", f"{each['outside']:.1%}",
                f"{spent['launch'] / sum(spent.values()):.1%}",
            )  # fmt: skip
            test = f"decode {name}{more}"
            rows.append(_row(part, test, tokens, each["seconds"], other, shares))
    return rows


def _row(
    part: str, test: str, tokens: int, ours: list[float], peer: list[float] | None,
    shares: tuple[str, ...] = ("", "", ""),
) -> str:  # fmt: skip
    speed = tokens / median(ours)
    other = ratio = ""
    if peer:
        other, ratio = f"{tokens / median(peer):,.1f}", f"{median(peer) / median(ours):.2f}"
    return f"| {part} | {test} | {speed:,.1f} | {other} | {ratio} | {' | '.join(shares)} |"


def wrong(result: Found) -> list[str]:
    """The comparisons whose error is no rounding, or of which the device lacked too much."""
    return [
        name
        for name, each in _compared(result["parts"]).items()
        if not each["worst"] < _bound(name) or not NEEDED.isdisjoint(each["lacking"])
    ]


def _bound(name: str) -> float:
    if name.split(",")[0] in MODELS.values():
        return WORST_REAL
    return WORST_F32 if " f32," in name else WORST_QUANTIZED


# --- the command ----------------------------------------------------------------


def prepare(options: argparse.Namespace) -> None:
    """Build ggml-python if asked to; have it imported here and in the processes that measure."""
    folder = options.folder
    if "build" in options.only:
        _build(options, "ggml-python")
    if folder and not gpu_build.built(folder, "ggml-python"):
        raise gpu_build.BuildError(f"{folder} is not built: run with --only build first")
    paths = [str(gpu_build.site(folder).resolve())] if folder else []
    paths.append(str(HERE.parent / "src"))
    sys.path[:0] = paths
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, before] if before else paths)


def _build(options: argparse.Namespace, name: str) -> None:
    if options.folder:
        cuda = options.device != "cpu"
        gpu_build.build(
            options.folder, name, cuda=cuda, architectures=options.arch, jobs=options.jobs
        )


def _need_peer(options: argparse.Namespace) -> None:
    """Have ``options.peer`` name the interpreter that imports what was built."""
    if options.folder and not options.peer:
        if not gpu_build.built(options.folder, "llama-cpp-python"):
            raise gpu_build.BuildError("llama.cpp is not built: run with --only peer first")
        options.peer = sys.executable


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Gemloom on a GPU, beside llama.cpp.", epilog=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "--fetch", type=Path, metavar="DIR", help="fill DIR with what a build needs"
    )
    parser.add_argument(
        "--python",
        default=".".join(platform.python_version_tuple()[:2]),
        help="of the machine with the GPU, for --fetch",
    )
    parser.add_argument("--machine", default=platform.machine(), help="its processor, for --fetch")
    parser.add_argument(
        "--from", dest="folder", type=Path, metavar="DIR", help="as --fetch filled it"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=PARTS,
        default=list(PARTS),
        metavar="PART",
        help=", ".join(PARTS),
    )
    parser.add_argument("--device", default="cuda0", help="as gemloom names it (cuda0)")
    parser.add_argument("--arch", help="CUDA architectures to build for (the machine's own)")
    parser.add_argument(
        "--jobs", type=int, default=len(os.sched_getaffinity(0)),
        help="compilers that run at once (one a usable core)",
    )  # fmt: skip
    parser.add_argument("--peer", metavar="PYTHON", help="of an environment with llama-cpp-python")
    parser.add_argument("--tiny", action="store_true", help="tiny models and prompts: a dry run")
    parser.add_argument("--again", action="store_true", help="measure what was measured before")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--cache", type=Path, default=HERE / ".cache", help="for the models")
    parser.add_argument("--name", default="gpu", help="of the JSON file (gpu)")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="for the figures and the tables after each part"
    )
    return parser.parse_args()


def main() -> None:
    options = read_options()
    try:
        if options.fetch:
            size = gpu_build.fetch(options.fetch, options.python, options.machine)
            print(f"{options.fetch}: {size / 2**20:.0f} MiB")
            return
        prepare(options)
        if options.only == ["build"]:
            return
        result = _run(options)
    except (gpu_build.BuildError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    print(tables(result))
    if failed := wrong(result):
        sys.exit(f"error: not what the CPU computes, or not on the device: {'; '.join(failed)}")


def _run(options: argparse.Namespace) -> Found:
    from gemloom.errors import GemloomError

    try:
        path = measure(options)
    except GemloomError as error:
        sys.exit(f"error: {error}")
    print(path, file=sys.stderr)
    result: Found = json.loads(path.read_text(encoding="utf-8"))
    return result


if __name__ == "__main__":
    main()
