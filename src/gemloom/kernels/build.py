"""Compile ``native/`` into one library: run when the package is built, or by hand.

    python src/gemloom/kernels/build.py [FOLDER]

Every instruction set that the compiler knows is compiled in, whatever processor compiles it: the
choice is made where it runs. Imports nothing of the package, which is not there yet.
"""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
NAME = "_native.dylib" if sys.platform == "darwin" else "_native.so"
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden"]
_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
_AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni"]
_X86 = {
    "AVX512_VNNI": [*_AVX2, *_AVX512, "-mprefer-vector-width=512"],
    "AVX_VNNI": [*_AVX2, "-mavxvnni"],
    "AVX2": _AVX2,
}
SETS = {  # of instructions, by processor: the flags that kernels.cpp is compiled with
    "x86_64": _X86,
    "AMD64": _X86,
    "aarch64": {"NEON_DOTPROD": ["-march=armv8.2-a+dotprod"]},
    "arm64": {"NEON_DOTPROD": ["-march=armv8.2-a+dotprod"]},
}


def build(
    folder: Path, *, machine: str = platform.machine(), extra: tuple[str, ...] = ()
) -> Path | None:
    """The library in ``folder``; None where there is no instruction set or compiler for it.

    ``CXX`` names the compiler; ``extra`` are flags for all of it, such as a sanitizer's.
    """
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        objects = _compile_all([*compiler, *FLAGS, *extra], SETS.get(machine, {}), Path(scratch))
        if not objects:
            return None
        made = Path(scratch) / NAME
        _run([*compiler, *extra, "-shared", "-o", str(made), *map(str, objects)])
        return made.replace(folder / NAME)  # whole or not at all


def _compile_all(compiler: list[str], sets: dict[str, list[str]], scratch: Path) -> list[Path]:
    def one(name: str, source: str, flags: list[str]) -> Path | None:
        made = scratch / f"{name}.o"
        command = [*compiler, *flags, "-c", str(HERE / "native" / source), "-o", str(made)]
        return made if _run(command) else None

    with ThreadPoolExecutor() as pool:
        tried = {name: pool.submit(one, name, "kernels.cpp", sets[name]) for name in sets}
        known = {name: made for name, job in tried.items() if (made := job.result())}
        if not known:
            return []
        have = [f"-DHAVE_{name}" for name in known]
        rest = [pool.submit(one, name, f"{name}.cpp", have) for name in ("library", "pack")]
        others = [made for job in rest if (made := job.result())]
    return [*known.values(), *others] if len(others) == len(rest) else []


def _run(command: list[str]) -> bool:
    """Whether the compiler did it; what it says otherwise goes on to the error output."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)  # noqa: S603  (ours)
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr)  # noqa: T201
        return False
    if done.returncode:
        print(done.stderr, file=sys.stderr)  # noqa: T201
    return not done.returncode


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE
    sys.exit(0 if build(target) else "the kernels were not built; ggml's are used instead")
