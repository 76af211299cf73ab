"""The native operations under sanitizers: nothing beyond memory, nothing undefined, no race."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import pytest

from gemloom.kernels.build import SETS
from gemloom.kernels.library import supported
from native_driver import all_cases, compiled, run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),  # the compiler takes a minute of one idle core
    pytest.mark.skipif(not supported(), reason="no kernels of our own were built"),
]
SANITIZERS = {  # without what the address sanitizer sees as well and takes the compiler minutes
    "memory": (
        "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all",
        "-fno-sanitize=null,object-size,pointer-overflow,vptr",
    ),
    "threads": ("-O1", "-fsanitize=thread"),
}  # fmt: skip
# Checks of addresses as calls, which gcc compiles three times as fast.
AS_CALLS = ("--param", "asan-instrumentation-with-call-threshold=0")


@pytest.fixture(scope="module", params=SANITIZERS)
def driver(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The driver made with one sanitizer."""
    folder, flags = tmp_path_factory.mktemp("driver"), SANITIZERS[request.param]
    if not works(folder, flags):
        pytest.skip(f"the compiler has no {flags[1]} that runs here")
    if works(folder, AS_CALLS):
        flags += AS_CALLS
    made = compiled(folder, platform.machine(), flags=flags)
    assert made
    return made


def works(folder: Path, flags: tuple[str, ...]) -> bool:
    """Whether the compiler has such sanitizers, and the system runs what it makes."""
    source, made = folder / "probe.cpp", folder / "probe"
    source.write_text("int main() { return 0; }\n")
    try:
        command = ["c++", *flags, str(source), "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True)
        subprocess.run([str(made)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


def test_sanitized(driver: Path, tmp_path: Path) -> None:
    cases = list(all_cases())
    for kernels in range(len(supported())):
        results = run([str(driver)], tmp_path, kernels, cases)
        assert results
        for case, result in zip(cases, results, strict=True):
            case.check(result)
    assert run([str(driver)], tmp_path, len(supported()), cases[:1]) is None


@pytest.mark.parametrize("driver", ["memory"], indirect=True)
def test_a_sanitizer_would_tell(driver: Path, tmp_path: Path) -> None:
    """The same driver stops where a tensor is shorter than its shape says."""
    case = next(case for case in all_cases() if case.operation == "gelu_mul")
    whole, last = case.encoded(0), case.sources[-1].nbytes
    short = whole[: -last - 8] + (last - 4).to_bytes(8, "little") + whole[-last:-4]
    (tmp_path / "cases").write_bytes(short)
    done = subprocess.run(
        [str(driver), str(tmp_path / "cases"), str(tmp_path / "results")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode
    assert "heap-buffer-overflow" in done.stderr


@pytest.mark.skipif(platform.machine() not in SETS, reason="no instruction set of this processor")
def test_nothing_is_left_to_the_linker(tmp_path: Path) -> None:
    """No weak symbol in what is compiled for one instruction set: the linker might take a new
    processor's code for what an old one runs. Unoptimized, where least is inlined."""
    native = Path(__file__).parents[2] / "src" / "gemloom" / "kernels" / "native"
    for name, flags in SETS[platform.machine()].items():
        made = tmp_path / f"{name}.o"
        command = ["c++", "-std=c++17", "-O0", "-fno-exceptions", *flags, "-c"]
        done = subprocess.run(
            [*command, str(native / "kernels.cpp"), "-o", str(made)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            continue  # a set that this compiler does not know is not built either
        listed = subprocess.run(["nm", str(made)], capture_output=True, text=True, check=True)
        symbols = [line.split()[-2:] for line in listed.stdout.splitlines()]
        assert [symbol for symbol in symbols if symbol[0] in "WVwvu"] == []
