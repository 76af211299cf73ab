"""Quantizing beside llama.cpp: the same file, threads and types in turns; are the bytes the same?

    python benchmarks/quantizing.py --peer .venv-peer/bin/python

The source is Gemma 3 270M in F16, made of the demo's weights. The peer is a Python with
llama-cpp-python (`make bench` sets one up), whose llama_model_quantize is what llama-quantize
calls. Timed is each side's call, from an open process to a file that is there; ours is synced to
the disk and read back too. CPU is that of all threads, which a loaded machine changes less. Each
round runs both, and who goes first changes.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from gemloom.files import gguf, source
from gemloom.system.limits import usable_cores
from gemloom.tools.quantization import quantize
from gemloom.tools.quantization.quantize import Wanted
from gemloom.tools.quantization.recipes import recipe

KINDS = ("Q8_0", "Q4_0", "Q6_K", "Q4_K_M", "Q5_K_M", "Q3_K_M", "Q2_K", "IQ4_XS", "TQ2_0")
PEER = """
import ctypes, sys, time
from llama_cpp import llama_cpp as L
quiet = L.llama_log_callback(lambda level, text, data: None)
L.llama_log_set(quiet, None)
for line in sys.stdin:
    path, out, file_type, threads = line.split("|")
    params = L.llama_model_quantize_default_params()
    params.ftype, params.nthread = int(file_type), int(threads)
    wall, cpu = time.perf_counter(), time.process_time()
    failed = L.llama_model_quantize(path.encode(), out.encode(), ctypes.byref(params))
    print(-failed or time.perf_counter() - wall, time.process_time() - cpu, flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", required=True, help="a Python with llama-cpp-python")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("kinds", nargs="*", default=KINDS)
    args = parser.parse_args()
    peer = subprocess.Popen(
        [args.peer, "-c", PEER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    print(f"{args.threads} threads, medians of {args.rounds} rounds, seconds")
    print("| type | gemloom | llama.cpp | ratio | gemloom, CPU | llama.cpp, CPU | ratio | bytes |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "f16.gguf")
        ours("gemma-3-270m", path, "F16", args.threads)
        for kind in args.kinds:
            print(compare(peer, path, kind, args.rounds, args.threads), flush=True)
    peer.terminate()


def compare(peer: subprocess.Popen[str], path: Path, kind: str, rounds: int, threads: int) -> str:
    """A row of the table."""
    outs = path.with_name("ours.gguf"), path.with_name("theirs.gguf")
    runs = (
        lambda: ours(str(path), outs[0], kind, threads),
        lambda: theirs(peer, path, outs[1], kind, threads),
    )
    wall: tuple[list[float], list[float]] = ([], [])
    cpu: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 1):
        for side in (0, 1) if number % 2 else (1, 0):
            taken = runs[side]()
            if number:  # the first round fills the page cache and ggml's tables
                wall[side].append(taken[0])
                cpu[side].append(taken[1])
    same = "same" if outs[0].read_bytes() == outs[1].read_bytes() else "other"
    return f"| {kind} | {_cells(wall)} | {_cells(cpu)} | {same} |"


def _cells(times: tuple[list[float], list[float]]) -> str:
    middle = [statistics.median(side) for side in times]
    return f"{middle[0]:.2f} | {middle[1]:.2f} | {middle[0] / middle[1]:.2f}"


def ours(path: str, out: Path, kind: str, threads: int) -> tuple[float, float]:
    """Seconds that gemloom takes, and those of all its threads."""
    wall, cpu = time.perf_counter(), time.process_time()
    plan = quantize.plan(gguf.read(source.resolve(path)), Wanted(recipe(kind), requantize=True))
    quantize.write(plan, out, threads)
    return time.perf_counter() - wall, time.process_time() - cpu


def theirs(
    peer: subprocess.Popen[str], path: Path, out: Path, kind: str, threads: int
) -> tuple[float, float]:
    """The same of llama.cpp."""
    assert peer.stdin is not None
    assert peer.stdout is not None
    peer.stdin.write(f"{path}|{out}|{int(recipe(kind).file_type)}|{threads}\n")
    peer.stdin.flush()
    wall, cpu = (float(text) for text in peer.stdout.readline().split())
    assert wall > 0, f"llama.cpp cannot make {kind}"
    return wall, cpu


if __name__ == "__main__":
    main()
