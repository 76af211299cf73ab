"""Quantizing beside llama.cpp: the same file, threads and types in turns; are the bytes the same?

    python benchmarks/quantizing.py --peer .venv-peer/bin/python

The source is Gemma 3 270M in F16, made of the demo's weights. The peer is a Python with
llama-cpp-python (`make bench` sets one up), whose llama_model_quantize is what llama-quantize
calls. Timed is each side's call, from an open process to a file that is there; ours is synced to
the disk and read back too. Each round runs both, and who goes first changes.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from gemloom import gguf, quantize, source
from gemloom.ggml.device import usable_cores
from gemloom.quantize import Wanted
from gemloom.recipes import recipe

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
    started = time.perf_counter()
    failed = L.llama_model_quantize(path.encode(), out.encode(), ctypes.byref(params))
    print(-1 if failed else time.perf_counter() - started, flush=True)
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
    print(f"{args.threads} threads, median of {args.rounds} rounds (fastest)")
    print("| type | gemloom, s | llama.cpp, s | ratio | bytes |\n|---|---|---|---|---|")
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
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 1):
        for side in (0, 1) if number % 2 else (1, 0):
            taken = runs[side]()
            if number:  # the first round fills the page cache and ggml's tables
                times[side].append(taken)
    middle = [statistics.median(side) for side in times]
    cells = [f"{m:.2f} ({min(side):.2f})" for m, side in zip(middle, times, strict=True)]
    same = "same" if outs[0].read_bytes() == outs[1].read_bytes() else "other"
    return f"| {kind} | {cells[0]} | {cells[1]} | {middle[0] / middle[1]:.2f} | {same} |"


def ours(path: str, out: Path, kind: str, threads: int) -> float:
    """Seconds that gemloom takes."""
    started = time.perf_counter()
    plan = quantize.plan(gguf.read(source.resolve(path)), Wanted(recipe(kind), requantize=True))
    quantize.write(plan, out, threads)
    return time.perf_counter() - started


def theirs(peer: subprocess.Popen[str], path: Path, out: Path, kind: str, threads: int) -> float:
    """Seconds that llama.cpp takes."""
    assert peer.stdin is not None
    assert peer.stdout is not None
    peer.stdin.write(f"{path}|{out}|{int(recipe(kind).file_type)}|{threads}\n")
    peer.stdin.flush()
    taken = float(peer.stdout.readline())
    assert taken > 0, f"llama.cpp cannot make {kind}"
    return taken


if __name__ == "__main__":
    main()
