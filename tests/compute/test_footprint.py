"""The plan is what a process takes at its peak; a load over a limit ends with an error."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gemloom
import tiny
from gemloom.cli.doctor import examine
from gemloom.errors import OutOfMemoryError
from gemloom.system import limits

MIB = 1 << 20
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
RUN = """
import runpy, sys
sys.argv = ["gemloom", "run", sys.argv[1], "The capital of", "-n", "4"]
try:
    runpy.run_module("gemloom", run_name="__main__")
finally:
    sys.stdout.write(open("/proc/self/status").read())
"""
LOAD = """
import resource, sys
import gemloom
from gemloom import errors
from gemloom.system import limits
size = limits._fields(open("/proc/self/status").read().replace(":", " "))["VmSize"] * 1024
resource.setrlimit(resource.RLIMIT_AS, (size + (400 << 20),) * 2)
try:
    gemloom.load(sys.argv[1], context=8192, slots=256, threads=1)
except errors.OutOfMemoryError as error:
    print(error)
"""


def child(code: str, *arguments: str) -> str:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def peak(model: str) -> int:
    """Bytes that ``gemloom run`` had at most, pages of files among them."""
    found = re.search(r"^VmHWM:\s+(\d+) kB$", child(RUN, model), re.MULTILINE)
    assert found
    return int(found[1]) * 1024


def planned(model: str) -> dict[str, int]:
    command = [sys.executable, "-m", "gemloom", "inspect", model, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    memory: dict[str, int] = json.loads(done.stdout)["memory"]
    return memory


def check_plan(model: str) -> None:
    """Within a fifth; pages of the model's file may be there or not."""
    plan, taken = planned(model), peak(model)
    assert 0.8 * plan["total"] <= taken <= 1.2 * plan["total"] + plan["mapped"]


@linux
@pytest.mark.parametrize("variant", ["e2b", "gemma3"])
def test_the_plan_holds_for_small_models(tmp_path: Path, variant: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(tiny.gguf_bytes(tiny.VARIANTS[variant]))
    check_plan(str(path))


@linux
@pytest.mark.real
def test_the_plan_holds_for_the_built_in_model() -> None:
    check_plan("gemma-3-270m")


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A control group with 100 MiB, of which 60 are in use."""
    files = {
        "proc/self/cgroup": "0::/box\n",
        "proc/self/mountinfo": "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
        "sys/fs/cgroup/box/memory.max": str(100 * MIB),
        "sys/fs/cgroup/box/memory.current": str(90 * MIB),
        "sys/fs/cgroup/box/memory.stat": f"inactive_file {30 * MIB}\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    real = limits.memory
    monkeypatch.setattr(limits, "memory", lambda root=None: real(tmp_path))


@pytest.mark.usefixtures("group")
def test_what_does_not_fit_in_a_control_group_is_refused() -> None:
    data = tiny.gguf_bytes(tiny.VARIANTS["e2b"])
    with pytest.raises(OutOfMemoryError) as raised:
        gemloom.load(data, context=8192, slots=64, threads=1)
    message = str(raised.value)
    assert re.match(r"no memory for the model: cpu needs [\d,]+ MiB \(\d+ of weights", message)
    assert "40 of 100 (the control group) can be used; take a smaller context" in message
    assert "\n" not in message
    with gemloom.load(data, context=64, threads=1) as model:
        assert model.generate("a", max_tokens=2).usage.completion_tokens


@pytest.mark.usefixtures("group")
def test_a_context_nobody_asked_for_is_cut_to_the_limit() -> None:
    data = tiny.gguf_bytes(tiny.VARIANTS["e2b"])
    with gemloom.load(data, slots=64, threads=1) as model:
        assert model.context < 8192
        assert model.placement.table[-1].needed <= 40 * MIB


@pytest.mark.usefixtures("group")
def test_doctor_tells_what_this_process_may_have() -> None:
    [host] = [device for device in examine()["devices"] if device["kind"] == "cpu"]
    assert (host["free"], host["total"]) == (40 * MIB, 100 * MIB)


@linux
def test_the_address_space_is_a_limit_too(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(tiny.gguf_bytes(tiny.VARIANTS["e2b"]))
    told = child(LOAD, str(path))
    assert re.match(r"no memory for the model: .* of [\d,]+ \(the address space", told)
