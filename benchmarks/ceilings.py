"""What this machine can do at most, measured: the limits that speeds are held against.

    python benchmarks/ceilings.py [--threads N] [--seconds S] [--json]

Bytes read from memory, float32 multiply-adds, and multiply-adds of the int8 dot product
instruction (where there is one), with all threads. ``ceilings.c`` does it, compiled here for this
processor. On a machine that others share, the best of many short rounds is the ceiling, and how
far the median lies below it says how much was shared.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from gemloom.errors import GemloomError, OptionError
from gemloom.system.limits import usable_cores

SOURCE = Path(__file__).with_suffix(".c")
KINDS = {"read": "GB/s", "f32": "G multiply-adds/s", "int8": "G multiply-adds/s"}
_NO_INT8 = 3  # exit status

Ceilings = dict[str, dict[str, float | str]]


def measure(threads: int, seconds: float = 3.0) -> Ceilings:
    """Per kind its unit, its best and its median rate (10^9 a second), over ``seconds`` each.

    A kind that this processor has no instruction for is left out. GemloomError without a compiler.
    """
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "ceilings"
        _compile(program)
        found = {kind: _run(program, kind, threads, seconds) for kind in KINDS}
    return {
        kind: {"unit": KINDS[kind], "best": max(rates) / 1e9, "median": median(rates) / 1e9}
        for kind, rates in found.items()
        if rates
    }


def _compile(program: Path) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        raise GemloomError("a C compiler, cc, is needed to measure what the machine can do")
    command = [compiler, "-O3", "-march=native", "-pthread", str(SOURCE), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise GemloomError(f"{SOURCE.name} does not compile here: {_last(done.stderr)}")


def _run(program: Path, kind: str, threads: int, seconds: float) -> list[float]:
    command = [str(program), kind, str(threads), str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == _NO_INT8:
        return []
    if done.returncode:
        raise GemloomError(f"measuring {kind} failed: exit status {done.returncode}")
    return [float(line) for line in done.stdout.split()]


def _last(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what this machine can do at most.")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--seconds", type=float, default=3.0, help="for each of the three")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    try:
        if not 1 <= options.threads <= 512 or not 0 < options.seconds <= 600:
            raise OptionError("threads must be from 1 to 512, seconds more than 0 and at most 600")
        found = measure(options.threads, options.seconds)
    except (GemloomError, OSError) as error:
        sys.exit(f"error: {error}")
    if options.json:
        print(json.dumps(found, indent=1))
        return
    for kind, rate in found.items():
        print(f"{kind:5} best {rate['best']:8.1f}  median {rate['median']:8.1f}  {rate['unit']}")


if __name__ == "__main__":
    main()
