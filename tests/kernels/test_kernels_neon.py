"""The kernels for ARM: cross-compiled, and run by an emulator where both are installed.

apt-get install g++-aarch64-linux-gnu qemu-user
make test-neon
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from gemloom.kernels.library import supported
from native_driver import all_cases, compiled, run

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
SYSTEM = "/usr/aarch64-linux-gnu"  # where Debian puts the libraries of the other processor

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not supported(), reason="no kernels of our own were built"),
    pytest.mark.skipif(
        not (shutil.which(COMPILER) and shutil.which(EMULATOR)),
        reason=f"{COMPILER} and {EMULATOR} are not both installed",
    ),
]


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The driver made for ARM."""
    made = compiled(tmp_path_factory.mktemp("neon"), "aarch64", COMPILER)
    assert made
    return made


def test_neon(driver: Path, tmp_path: Path) -> None:
    """Every case, held against numpy."""
    cases = list(all_cases())
    results = run([EMULATOR, "-L", SYSTEM, str(driver)], tmp_path, 0, cases)
    assert results
    for case, result in zip(cases, results, strict=True):
        case.check(result)
    assert run([EMULATOR, "-L", SYSTEM, str(driver)], tmp_path, 1, cases[:1]) is None


def test_an_old_processor_is_told_apart(driver: Path, tmp_path: Path) -> None:
    """The Cortex-A72 has no dot products: no kernels, and no illegal instruction."""
    old = [EMULATOR, "-cpu", "cortex-a72", "-L", SYSTEM, str(driver)]
    assert run(old, tmp_path, 0, list(all_cases())[:1]) is None


def test_results_are_the_cases_own() -> None:
    """A case refuses a result that is off by little."""
    case = next(case for case in all_cases() if case.operation == "product")
    right = case.expected.astype(np.float32)
    case.check(right.tobytes())
    with pytest.raises(AssertionError):
        case.check((right * np.float32(1.001)).tobytes())
