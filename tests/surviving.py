"""Damaged files, read in a child process so that a crash is seen as a signal.

Any reader of files is tested so: ``assert_survives("module:function", data, folder)``.
"""

from __future__ import annotations

import faulthandler
import importlib
import os
import random
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gemloom.errors import GemloomError

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="needs alarm() and RLIMIT_AS")

# -- damage ---------------------------------------------------------------------------

_INTEGERS = [0, 1, -1, 127, 128, 2**15, 2**31 - 1, 2**31, -(2**31), 2**32 - 1, 2**40]
_INTEGERS += [2**62, 2**63 - 1, -(2**63), 2**64 - 1, 2**64 - 8]


def _bit_flip(data: bytearray, at: int, rng: random.Random) -> None:
    data[at] ^= 1 << rng.randrange(8)


def _byte_set(data: bytearray, at: int, rng: random.Random) -> None:
    data[at] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])


def _integer_set(data: bytearray, at: int, rng: random.Random) -> None:
    size = rng.choice([2, 4, 8])
    value = rng.choice(_INTEGERS) % 2 ** (8 * size)
    data[at : at + size] = value.to_bytes(size, "little")[: len(data) - at]


def _truncate(data: bytearray, at: int, rng: random.Random) -> None:
    del data[at:]


def _swap(data: bytearray, at: int, rng: random.Random) -> None:
    size, other = rng.randrange(1, 64), rng.randrange(len(data))
    first, second = bytes(data[at : at + size]), bytes(data[other : other + size])
    data[other : other + len(first)] = first
    data[at : at + len(second)] = second


def _insert(data: bytearray, at: int, rng: random.Random) -> None:
    data[at:at] = rng.randbytes(rng.randrange(1, 17))


def _delete(data: bytearray, at: int, rng: random.Random) -> None:
    del data[at : at + rng.randrange(1, 17)]


def _blow_up(data: bytearray, at: int, rng: random.Random) -> None:
    """Another value for the next thing that looks like a count or length: 8 bytes, small."""
    for place in range(at, len(data) - 8):
        if 0 < struct.unpack_from("<Q", data, place)[0] < 1 << 20:
            value = rng.choice([*_INTEGERS, len(data), rng.randrange(1 << 20)]) % 2**64
            struct.pack_into("<Q", data, place, value)
            return


_DAMAGES: list[Callable[[bytearray, int, random.Random], None]] = [
    _bit_flip, _byte_set, _integer_set, _truncate, _swap, _insert, _delete, _blow_up, _blow_up,
]  # fmt: skip


def damaged(data: bytes, case: int) -> bytes:
    """The file with one to three damages in its first 16 KiB, the same for the same case."""
    rng, out = random.Random(case), bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 3])):
        if out:
            rng.choice(_DAMAGES)(out, rng.randrange(min(len(out), 1 << 14)), rng)
    return bytes(out)


# -- the child process ----------------------------------------------------------------


def main(target: str, file: str, cases: int, seconds: int, megabytes: int) -> None:
    """Give ``target`` every damaged file; print the number of each case before it."""
    import resource

    module, _, function = target.partition(":")
    call = getattr(importlib.import_module(module), function)
    data = Path(file).read_bytes()
    call(data)  # the sound file is read, and all imports are done before the limit is set
    faulthandler.enable()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = used + (megabytes << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    refused = 0
    for case in range(cases):
        print("case", case, flush=True)
        signal.setitimer(signal.ITIMER_PROF, seconds)  # of its own time, whatever else runs
        signal.alarm(20 * seconds)
        try:
            call(damaged(data, case))
        except GemloomError as error:
            refused += 1
            _check_message(str(error))
    print(f"refused {refused}", flush=True)


def _check_message(message: str) -> None:
    assert "\n" not in message
    assert len(message) < 1000, message[:1000]


def assert_survives(
    target: str,
    data: bytes,
    folder: Path,
    *,
    cases: int = 1000,
    seconds: int = 10,
    megabytes: int = 256,
) -> int:
    """How many of the damaged files ``target(bytes)`` refused; fails for anything else it did."""
    file = folder / "sound.gguf"
    file.write_bytes(data)
    arguments = [target, str(file), str(cases), str(seconds), str(megabytes)]
    child = subprocess.run(
        [sys.executable, "-W", "error", __file__, *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
        errors="replace",
    )
    last = (child.stdout.splitlines() or ["no case"])[-1]
    assert child.returncode == 0, f"{last}: ended with {child.returncode}\n{child.stderr[-2000:]}"
    return int(last.removeprefix("refused "))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
