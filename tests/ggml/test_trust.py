"""Kernels are proven in a child process before they are used; what dies, hangs or errs is not."""

import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as Type

from command_line import ENVIRONMENT, fine
from conftest import Load, prompt
from gemloom.cli.doctor import _kernels
from gemloom.errors import DeviceError
from gemloom.ggml import proof, trust
from gemloom.ggml.backends import accelerator
from gemloom.ggml.device import Device
from gemloom.ggml.repacking import Repacking, offered
from gemloom.ggml.trust import Verdicts
from gemloom.kernels import library
from gemloom.kernels import proof as own_proof
from gemloom.kernels.library import supported

# What the child runs in place of the real kernels: the rest of it and the faults are real.
FAULTY = """
import os, signal, sys
from gemloom.kernels import proving

def die(name):
    os.kill(os.getpid(), getattr(signal, name))

def fast():
    {listed}
    yield "Q4_0", lambda: True
    yield "Q4_K", lambda: {fast}
    yield "Q8_0", lambda: True

def right():
    yield "Q4_0", lambda: True

def subjects():
    yield "plain", lambda: iter([("Q4_0", lambda: {plain})])
    yield "GOOD", right
    yield "FAST", fast
    yield "LAST", right

proving.proof.subjects, proving.own.subjects = subjects, lambda: ()
proving.main(sys.argv[1:])
"""
# A child that needs no imports, which take most of its time.
QUIET = """
print("plain", "plain Q4_0", "plain Q4_0\t", "FAST", "FAST Q4_0\t", "FAST Q4_K\t{fast}", sep="\\n")
print("end")
"""
HANGING = """
import sys, time
print("plain", "plain Q4_0\t", sep="\\n")
if sys.argv[1:] != ["FAST"]:
    print("FAST", "FAST Q4_0", sep="\\n", flush=True)
    time.sleep(600)
print("end")
"""


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache folder of its own, and a process that knows nothing yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(trust, "_known", None)
    return tmp_path / "cache" / "gemloom" / "kernels"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The subjects that each child started was to leave out."""
    children: list[list[str]] = []
    run = trust._run

    def noted(without: list[str]) -> Any:
        children.append(list(without))
        return run(without)

    monkeypatch.setattr(trust, "_run", noted)
    return children


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """``faulty(fast="die('SIGILL')")``: what some kernels do from now on."""

    def make(script: str = FAULTY, **does: str) -> None:
        file = tmp_path / "faulty.py"
        file.write_text(script.format(**{"plain": "True", "fast": "True", "listed": ""} | does))
        monkeypatch.setattr(trust, "_command", lambda: [sys.executable, str(file)])

    return make


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``known({"CPU_REPACK Q4_0": "wrong"})``: what was found here before."""

    def make(found: dict[str, str]) -> None:
        monkeypatch.setattr(trust, "_known", Verdicts(found))

    return make


# -- the real kernels --------------------------------------------------------------------


@pytest.mark.parametrize("module", [proof, own_proof])
def test_all_kernels_of_this_machine_are_right(module: Any) -> None:
    for subject, cases in module.subjects():
        for kind, agrees in cases() if cases else ():
            assert agrees(), f"{subject} {kind}"


def test_the_child_tries_all_that_is_there(cache: Path, started: list[list[str]]) -> None:
    found = trust.verdicts()
    assert started == [[]]
    assert not found.left_out and not found.problem
    assert found.proven("plain")
    assert all(found.proven(each.name) for each in supported())
    assert all(found.proven(name) for name in offered(Device("cpu").cpu) if name != "AMX")
    if faster := accelerator():
        assert found.proven(faster[0])


def test_noise_is_not_taken_for_a_right_result() -> None:
    plain = proof.normal(6, 32)
    assert proof.agree(plain + 0.01 * proof.normal(6, 33)[:, :32], plain)
    wrong = plain.copy()
    wrong[3, 7] += 1
    for result in (wrong, plain[::-1], 0 * plain, plain + np.nan, 1.5 * plain):
        assert not proof.agree(result, plain)


def test_a_wrong_product_of_a_layout_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    real = proof._product

    def off(device: Device, buffer_type: Any, kind: Type, shape: tuple[int, ...], rows: int) -> Any:
        result = real(device, None, kind, shape, rows)
        return np.roll(result, 1, axis=-1) if buffer_type and rows > 1 else result

    device = proof.plain_device()
    assert proof._repacks(device, None, Type.Q4_0, [(512, 32)])
    monkeypatch.setattr(proof, "_product", off)
    assert not proof._repacks(device, "a layout", Type.Q4_0, [(512, 32)])
    device.close()


# -- faults ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "name", "kernel"),
    [
        ("fast", "SIGSEGV", "FAST Q4_K"),
        ("fast", "SIGILL", "FAST Q4_K"),
        ("listed", "SIGABRT", "FAST"),
    ],
)
def test_one_that_ends_its_process_is_left_out_with_all_of_its_subject(
    cache: Path, started: list[list[str]], faulty: Callable[..., None],
    where: str, name: str, kernel: str,
) -> None:  # fmt: skip
    faulty(**{where: f"die('{name}')"})
    found = trust.verdicts()
    assert started == [[], ["FAST"]]
    assert found.left_out == {"FAST": f"{kernel} ended its process ({name})"}
    assert not any(found.proven(f"FAST{kind}") for kind in ("", " Q4_0", " Q4_K", " Q8_0"))
    assert found.proven("GOOD Q4_0") and found.proven("LAST")


def test_one_that_errs_is_left_out_alone(
    cache: Path, started: list[list[str]], faulty: Callable[..., None]
) -> None:
    faulty(fast="False")
    found = trust.verdicts()
    assert len(started) == 1
    assert found.left_out == {"FAST Q4_K": "gives other results than it should"}
    assert found.proven("FAST Q4_0") and found.proven("FAST Q8_0")
    assert found.refuted("FAST") and not found.proven("FAST")
    assert not found.proven("FAST Q4") and not found.refuted("FAS")


def test_one_that_hangs_is_left_out(
    cache: Path,
    started: list[list[str]],
    faulty: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    faulty(HANGING)
    monkeypatch.setattr(trust, "_LIMIT", 3)  # seconds, of which the child needs some hundredths
    found = trust.verdicts()
    assert found.left_out == {"FAST": "FAST Q4_0 hung: no result in 3 s"}
    assert found.proven("plain")
    assert started == [[], ["FAST"]]


@pytest.mark.parametrize("plain", ["die('SIGILL')", "False"])
def test_a_ggml_whose_plain_kernels_are_wrong_is_told_and_not_used(
    cache: Path, started: list[list[str]], faulty: Callable[..., None], load: Load, plain: str
) -> None:
    faulty(plain=plain)
    with pytest.raises(DeviceError, match=r"ggml does not run on this CPU: plain.* pip install"):
        trust.proven("GOOD Q4_0")
    with pytest.raises(DeviceError, match="ggml does not run"):
        trust.refuted("avx2")
    if supported():
        with pytest.raises(DeviceError, match="ggml does not run"):
            load("e2b")
    assert len(started) == 1


@pytest.mark.parametrize(
    ("fast", "problem"),
    [("die('SIGKILL')", "status -9"), ("1 / 0", "ZeroDivisionError"), ("exit(0)", "status 0")],
)
def test_what_may_be_nobodys_fault_is_not_remembered(
    cache: Path, faulty: Callable[..., None], fast: str, problem: str,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    faulty(fast=fast)
    found = trust.verdicts()
    assert problem in found.problem and problem in caplog.text
    assert not found.proven("GOOD Q4_0") and not found.refuted("FAST")
    assert not cache.exists()


@pytest.mark.parametrize("executable", ["", None, "/opt/host/program"])
def test_without_a_python_nothing_of_ggmls_is_trusted(
    cache: Path, monkeypatch: pytest.MonkeyPatch, executable: str | None
) -> None:
    monkeypatch.setattr(sys, "executable", executable)
    found = trust.verdicts()
    assert "sys.executable" in found.problem
    assert not found.proven("CPU_REPACK Q4_0")
    assert library.fastest() is next(iter(supported()), None)  # ours need no proof, but no refuting


def test_a_frozen_program_is_not_started_again(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    assert "sys.executable" in trust.verdicts().problem


def test_a_child_starts_no_child(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEMLOOM_PROVING", "1")
    assert trust.verdicts().problem


# -- the memory --------------------------------------------------------------------------


def anew() -> Verdicts:
    """What a process that starts now knows."""
    trust._known = None
    return trust.verdicts()


def test_a_later_start_reads_what_was_found(
    cache: Path, started: list[list[str]], faulty: Callable[..., None]
) -> None:
    faulty(QUIET, fast="errs")
    first = trust.verdicts()
    assert len(list(cache.iterdir())) == 1
    assert anew() == first == trust.verdicts()
    assert first.file == str(next(cache.iterdir()))
    assert len(started) == 1
    faulty(QUIET, fast="")
    assert trust.verdicts(again=True).left_out == {} == anew().left_out
    assert len(started) == 2


def test_another_machine_or_build_is_proven_apart(
    cache: Path,
    started: list[list[str]],
    faulty: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    faulty(QUIET, fast="")
    trust.verdicts()
    machine = trust._machine()
    assert {"cpu", "libraries", "ggml_python", "gemloom"} <= set(machine)
    for other in ({"gemloom": "0"}, {"ggml_python": "0"}, {"cpu": {}}, {"libraries": []}):
        monkeypatch.setattr(trust, "_machine", lambda other=other: machine | other)
        anew()
        anew()
    assert len(started) == 5
    assert len(list(cache.iterdir())) == 5
    monkeypatch.setattr(trust, "_machine", lambda: machine)
    anew()
    assert len(started) == 5


@pytest.mark.parametrize(
    "damage",
    [b"", b"{", b"[]", b"\xff", b'{"machine": 1}', b'{"found": {}}', b"null", b"[" * 100_000],
)
def test_a_damaged_file_is_proven_again(
    cache: Path, started: list[list[str]], faulty: Callable[..., None], damage: bytes
) -> None:
    faulty(QUIET, fast="")
    file = Path(trust.verdicts().file)
    whole = file.read_bytes()
    file.write_bytes(damage)
    assert anew().proven("FAST Q4_0")
    assert len(started) == 2
    assert file.read_bytes() == whole
    for found in ([], {"FAST": 1}):
        file.write_text(json.dumps({"machine": trust._machine(), "found": found}))
        assert anew().proven("FAST Q4_0")


@pytest.mark.parametrize("home", ["a file", "none"])
def test_a_cache_that_cannot_be_written_costs_a_proof_each_time(
    cache: Path, started: list[list[str]], faulty: Callable[..., None], home: str,
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    caplog.set_level(logging.INFO)
    (tmp_path / "a file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / home) if home != "none" else "")
    if home == "none":
        monkeypatch.setattr(Path, "home", homeless)
    faulty(QUIET, fast="")
    for _ in range(2):
        found = anew()
        assert found.proven("FAST Q4_0") and not found.file and not found.problem
    assert len(started) == 2
    assert "cannot be kept" in caplog.text


def test_threads_that_ask_at_once_start_one_child(
    cache: Path, started: list[list[str]], faulty: Callable[..., None]
) -> None:
    faulty(QUIET, fast="")
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: trust.verdicts(), range(4)))
    assert len(started) == 1
    assert all(one is found[0] for one in found)


def test_processes_that_prove_at_once_leave_one_whole_file(cache: Path) -> None:
    ask = "from gemloom.ggml import trust; print(trust.verdicts().file)"
    environment = ENVIRONMENT | {"XDG_CACHE_HOME": str(cache.parents[1])}
    children = [
        subprocess.Popen([sys.executable, "-c", ask], env=environment, stdout=subprocess.PIPE)
        for _ in range(3)
    ]
    files = {child.communicate(timeout=120)[0].decode().strip() for child in children}
    assert files == {str(file) for file in cache.iterdir()}
    assert len(files) == 1
    assert json.loads(Path(files.pop()).read_text())["found"]


def test_the_child_is_this_python_with_this_package_from_any_folder(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A folder of a program may hold modules of the names that the child imports."""
    for name in ("numpy.py", "ggml.py", "gguf.py", "signal.py"):
        (tmp_path / name).write_text("raise SystemExit('not this one')")
    monkeypatch.chdir(tmp_path)
    assert not trust.verdicts().problem


# -- who asks ----------------------------------------------------------------------------


QUANTIZED = {"types": "q4_0"}
IDS = prompt(20)


def test_a_layout_that_was_not_proven_is_not_used(load: Load, known: Callable[..., None]) -> None:
    plain = load("e2b", kernels="plain", forms=QUANTIZED).logits(IDS)
    for found in ({}, {"CPU_REPACK": "hung"}, {"CPU_REPACK Q4_0": "errs"}):
        known(found)
        model = load("e2b", kernels="ggml", forms=QUANTIZED)
        assert not model.memory()["repacked"]
        assert np.array_equal(model.logits(IDS), plain)


def test_a_layout_that_was_proven_is_used(load: Load, known: Callable[..., None]) -> None:
    if "CPU_REPACK" not in offered(Device("cpu").cpu):
        pytest.skip("ggml has no layout of its own here")
    known({"CPU_REPACK Q4_0": "", "CPU_REPACK Q4_K": "errs"})
    assert load("e2b", kernels="ggml", forms=QUANTIZED).memory()["repacked"]


@pytest.mark.skipif(not supported(), reason="no kernels of our own were built")
def test_kernels_of_ours_that_are_wrong_make_room_for_the_next(
    load: Load, known: Callable[..., None]
) -> None:
    names = [each.name for each in supported()]
    for count in range(len(names)):
        known({f"{name} Q4_0": "errs" for name in names[:count]} | {names[count]: ""})
        assert library.fastest() is supported()[count]
    known(dict.fromkeys(names, "ended its process"))
    assert library.fastest() is None
    assert not load("e2b", forms=QUANTIZED).memory()["packed"]


def test_a_model_that_uses_nothing_beside_plain_kernels_asks_nothing(
    cache: Path, started: list[list[str]], load: Load
) -> None:
    if accelerator():
        pytest.skip("a library beside the CPU is used with plain kernels too")
    load("e2b", kernels="plain", forms=QUANTIZED).logits(IDS)
    assert not started


def test_a_library_beside_the_cpu_is_opened_where_it_is_trusted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpu = Device("cpu").cpu  # any device of ggml's will do
    monkeypatch.setattr("gemloom.ggml.backends.accelerator", lambda: ("BLAS", cpu))
    for trusted in (True, False):
        device = Device("cpu", trusts=lambda name, trusted=trusted: trusted and name == "BLAS")
        assert len(device.backends) == 1 + trusted
        device.close()


# -- AMX ---------------------------------------------------------------------------------


@pytest.fixture
def with_amx(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A ggml that offers AMX first, as on such a CPU; plain memory under the name serves."""
    device = Device("cpu")
    types = {"AMX": device.buffer_type(0), **offered(device.cpu), "OTHER": device.buffer_type(0)}
    monkeypatch.setattr("gemloom.ggml.repacking.offered", lambda _: types)
    monkeypatch.setattr(proof, "offered", lambda _: types)
    yield types
    device.close()


def test_amx_is_never_used_whatever_was_found(
    with_amx: dict[str, Any], known: Callable[..., None]
) -> None:
    known({"AMX": "", "AMX Q4_0": "", "OTHER Q4_0": ""})
    device = Device("cpu")
    found = Repacking(device).buffer_type(Type.Q4_0, (512, 32))
    assert found == with_amx["OTHER"]
    known({"AMX": "", "AMX Q4_0": ""})
    assert Repacking(device).buffer_type(Type.Q4_0, (512, 32)) is None
    device.close()


def test_amx_is_never_tried(with_amx: dict[str, Any]) -> None:
    subjects = dict(proof.subjects())
    assert subjects["AMX"] is None
    assert subjects["OTHER"]


def test_doctor_names_what_is_left_out(cache: Path, faulty: Callable[..., None]) -> None:
    faulty(QUIET, fast="errs")
    facts = json.loads(fine("doctor", "--json").stdout)
    assert facts["left_out"] == {"FAST Q4_K": "errs"}
    assert facts["proof"] == {"file": str(next(cache.iterdir())), "problem": None}
    (line,) = (line for line in fine("doctor").stdout.splitlines() if line.startswith("left out"))
    assert line.split(maxsplit=2)[2] == "FAST Q4_K: errs"


def test_doctor_tries_again(cache: Path, faulty: Callable[..., None]) -> None:
    """So what was left out by a mishap is back."""
    for fast in ("errs", ""):
        faulty(QUIET, fast=fast)
        facts = json.loads(fine("doctor", "--json").stdout)
        assert bool(facts["left_out"]) == bool(fast)
    faulty("raise ZeroDivisionError")
    text = " ".join(fine("doctor").stdout.split())
    assert "not proven ZeroDivisionError" in text
    assert "left out FAST" not in text


def test_doctor_names_the_kernels_that_are_used() -> None:
    names = ["first", "second", "third"]
    assert _kernels(names, {"second Q4_0": "errs"}) == "first (it runs third too)"
    assert _kernels(names, {"first": "hung"}) == "second (it runs third too)"
    assert _kernels(names, dict.fromkeys(names, "hung")).startswith("none: all")
    assert _kernels([], {}).startswith("none: not built")
