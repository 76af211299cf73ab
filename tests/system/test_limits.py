"""Limits: the smallest of all that count is found, and no file of the system can raise."""

import logging
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemloom.system import limits
from gemloom.system.limits import Memory, memory, threads_for, usable_cores

MIB = 1 << 20
V2 = "30 23 0:26 {root} /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw\n"
V1 = "35 31 0:32 {root} /sys/fs/cgroup/{name} rw,relatime - cgroup cgroup rw,{name}\n"
HOME = "sys/fs/cgroup"
anywhere = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50
)


def put(root: Path, files: dict[str, str | bytes]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())


@pytest.fixture
def cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Affinity with eight cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)


@pytest.fixture
def unlimited(monkeypatch: pytest.MonkeyPatch) -> None:
    """No ulimit, whoever runs the tests."""
    infinite = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    monkeypatch.setattr(resource, "getrlimit", lambda what: infinite)


def second(root: Path, path: str, below: dict[str, str], mounted: str = "/") -> None:
    """A hierarchy of version 2 whose process is in the group ``path``."""
    put(root, {"proc/self/cgroup": f"0::{path}\n", "proc/self/mountinfo": V2.format(root=mounted)})
    put(root, {f"{HOME}/{name}": text for name, text in below.items()})


# -- cores -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("100000 100000\n", 1), ("150000 100000\n", 1), ("199999 100000\n", 1),
        ("200000 100000\n", 2), ("1000 100000\n", 1), ("25000 10000\n", 2), ("300000\n", 3),
        ("max 100000\n", 8), ("max\n", 8), ("", 8), ("-1 100000", 8), ("nonsense 5", 8),
        ("9999999999999 100000\n", 8), ("100000 0", 1), ("\x00\n", 8),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("cores")
def test_a_quota_is_rounded_down_and_at_least_one(tmp_path: Path, text: str, expected: int) -> None:
    second(tmp_path, "/a", {"a/cpu.max": text})
    assert usable_cores(tmp_path) == expected


@pytest.mark.usefixtures("cores")
def test_version_1(tmp_path: Path) -> None:
    put(tmp_path, {
        "proc/self/cgroup": "4:memory:/m\n2:cpu,cpuacct:/x/y\n1:name=systemd:/\n",
        "proc/self/mountinfo": V1.format(root="/", name="cpuacct,cpu"),
        f"{HOME}/cpuacct,cpu/x/y/cpu.cfs_quota_us": "-1\n",
        f"{HOME}/cpuacct,cpu/x/y/cpu.cfs_period_us": "100000\n",
        f"{HOME}/cpuacct,cpu/x/cpu.cfs_quota_us": "350000\n",
        f"{HOME}/cpuacct,cpu/x/cpu.cfs_period_us": "100000\n",
    })  # fmt: skip
    assert usable_cores(tmp_path) == 3


@pytest.mark.usefixtures("cores")
def test_both_versions_at_once(tmp_path: Path) -> None:
    put(tmp_path, {
        "proc/self/cgroup": "2:cpu:/x\n0::/y\n",
        "proc/self/mountinfo": V1.format(root="/", name="cpu")
        + V2.format(root="/").replace("/sys/fs/cgroup ", "/sys/fs/cgroup/unified "),
        f"{HOME}/cpu/x/cpu.cfs_quota_us": "500000",
        f"{HOME}/unified/y/cpu.max": "200000 100000",
    })  # fmt: skip
    assert usable_cores(tmp_path) == 2


@pytest.mark.usefixtures("cores")
@pytest.mark.parametrize(
    ("path", "mounted"),
    [("/", "/"), ("/docker/abc", "/docker/abc"), ("/../..", "/"), ("/elsewhere", "/docker/abc")],
)
def test_a_container_sees_its_own_group_where_the_hierarchy_is_mounted(
    tmp_path: Path, path: str, mounted: str
) -> None:
    second(tmp_path, path, {"cpu.max": "200000 100000"}, mounted)
    assert usable_cores(tmp_path) == 2


@pytest.mark.usefixtures("cores")
def test_a_mount_point_with_a_blank(tmp_path: Path) -> None:
    mount = V2.format(root="/").replace("/sys/fs/cgroup", r"/my\040groups")
    put(tmp_path, {"proc/self/cgroup": "0::/a\n", "proc/self/mountinfo": mount})
    put(tmp_path, {"my groups/a/cpu.max": "100000 100000"})
    assert usable_cores(tmp_path) == 1


def test_affinity_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5}, raising=False)
    second(tmp_path, "/", {"cpu.max": "700000 100000"})
    assert usable_cores(tmp_path) == 2


@pytest.mark.usefixtures("cores")
@given(quotas=st.lists(st.none() | st.integers(1, 1_000_000), min_size=1, max_size=5))
@anywhere
def test_the_smallest_quota_around_the_process_counts(
    tmp_path_factory: pytest.TempPathFactory, quotas: list[int | None]
) -> None:
    root = tmp_path_factory.mktemp("groups")
    names = [f"g{depth}" for depth in range(len(quotas))]
    texts = {
        f"{'/'.join(names[:depth])}/cpu.max": f"{'max' if quota is None else quota} 100000\n"
        for depth, quota in enumerate(quotas, 1)
    }
    second(root, "/" + "/".join(names), {**texts, "beside/cpu.max": "1 100000"})
    wanted = min([quota / 100_000 for quota in quotas if quota is not None], default=8)
    assert usable_cores(root) == max(1, min(8, int(wanted)))


# -- memory ----------------------------------------------------------------------------------


def gib(free: int) -> str:
    return (
        f"MemTotal: {16 << 20} kB\nMemFree: 5 kB\nMemAvailable: {free << 20} kB\nSwapFree: 9 kB\n"
    )


@pytest.mark.usefixtures("unlimited")
def test_the_machine_alone(tmp_path: Path) -> None:
    put(tmp_path, {"proc/meminfo": gib(3)})
    assert memory(tmp_path) == Memory(3 << 30, 16 << 30, "this machine")
    assert memory(tmp_path / "nothing") is None


@pytest.mark.usefixtures("unlimited")
def test_cached_files_of_a_group_are_free_and_swap_is_not(tmp_path: Path) -> None:
    stat = (
        f"anon {100 * MIB}\nfile {300 * MIB}\ninactive_file {200 * MIB}\nactive_file {90 * MIB}\n"
    )
    put(tmp_path, {"proc/meminfo": gib(3)})
    second(tmp_path, "/a", {
        "a/memory.max": str(700 * MIB), "a/memory.current": str(410 * MIB),
        "a/memory.swap.max": "max", "a/memory.high": "max", "a/memory.stat": stat,
    })  # fmt: skip
    assert memory(tmp_path) == Memory(580 * MIB, 700 * MIB, "the control group")
    put(tmp_path, {f"{HOME}/a/memory.high": str(500 * MIB)})
    assert memory(tmp_path) == Memory(380 * MIB, 500 * MIB, "the control group")


@pytest.mark.usefixtures("unlimited")
def test_version_1_has_a_huge_number_where_there_is_no_limit(tmp_path: Path) -> None:
    put(tmp_path, {
        "proc/meminfo": gib(3),
        "proc/self/cgroup": "4:memory:/a/b\n",
        "proc/self/mountinfo": V1.format(root="/", name="memory"),
        f"{HOME}/memory/a/b/memory.limit_in_bytes": "9223372036854771712\n",
        f"{HOME}/memory/a/b/memory.usage_in_bytes": "123456789\n",
    })  # fmt: skip
    assert memory(tmp_path) == Memory(3 << 30, 16 << 30, "this machine")
    put(tmp_path, {
        f"{HOME}/memory/a/memory.limit_in_bytes": str(800 * MIB),
        f"{HOME}/memory/a/memory.usage_in_bytes": str(700 * MIB),
        f"{HOME}/memory/a/memory.stat": f"inactive_file 1\ntotal_inactive_file {50 * MIB}\n",
    })  # fmt: skip
    assert memory(tmp_path) == Memory(150 * MIB, 800 * MIB, "the control group")


@pytest.mark.usefixtures("unlimited")
@given(
    groups=st.lists(
        st.tuples(st.integers(0, 1 << 62), st.integers(0, 1 << 62), st.integers(0, 1 << 62)),
        max_size=4,
    )
)
@anywhere
def test_free_is_never_more_than_any_group_has_left(
    tmp_path_factory: pytest.TempPathFactory, groups: list[tuple[int, int, int]]
) -> None:
    root = tmp_path_factory.mktemp("groups")
    put(root, {"proc/meminfo": gib(4)})
    path, lefts = "", [4 << 30]
    for limit, used, cached in groups:
        path += "/g"
        second(root, path, {
            f"{path}/memory.max": str(limit), f"{path}/memory.current": str(used),
            f"{path}/memory.stat": f"inactive_file {cached}\n",
        })  # fmt: skip
        if limit < 1 << 60:
            lefts.append(max(0, limit - max(0, used - cached)))
    found = memory(root)
    assert found and found.free == min(lefts)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_the_address_space_is_a_limit() -> None:
    code = (
        "import resource; from gemloom.system import limits;"
        "resource.setrlimit(resource.RLIMIT_AS, (300 << 20, 300 << 20));"
        "print(limits.memory())"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "the address space" in told.stdout and f"limit={300 * MIB}" in told.stdout


# -- anything --------------------------------------------------------------------------------

LINES = st.sampled_from([
    "0::/a", "0::", ":", "", "4:memory,cpu:/a/../..", "0::/a\x00b", "4:cpu:relative", "max",
    V2.format(root="/"), V1.format(root="/", name="cpu"), V2.format(root=r"/\777\09"),
    V1.format(root="nowhere", name="memory"), "30 23 - cgroup2", "100000 0", "-1", "1e9", "٣",
    "99999999999999999999999", "inactive_file", "inactive_file max", "MemAvailable: kB",
    "VmSize: 1 2 3",
])  # fmt: skip
TEXTS = st.lists(LINES | st.text(max_size=20), max_size=4).map("\n".join)
NAMES = [
    "proc/self/cgroup", "proc/self/mountinfo", "proc/meminfo", "proc/self/status",
    *(f"{HOME}/{group}{name}" for group in ("", "a/", "cpu/", "cpu/a/", "memory/") for name in (
        "cpu.max", "cpu.cfs_quota_us", "cpu.cfs_period_us", "memory.max", "memory.high",
        "memory.current", "memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat",
    )),
]  # fmt: skip


@given(
    files=st.dictionaries(st.sampled_from(NAMES), TEXTS.map(str.encode) | st.binary(max_size=30))
)
@anywhere
def test_no_file_raises(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, str | bytes]
) -> None:
    root = tmp_path_factory.mktemp("any")
    put(root, {"proc/self/cgroup": "0::/a\n4:cpu,memory:/a\n"})
    put(root, {"proc/self/mountinfo": V2.format(root="/") + V1.format(root="/", name="cpu")})
    put(root, files)
    assert usable_cores(root) >= 1
    found = memory(root)
    assert found is None or found.free >= 0


def test_folders_in_place_of_files(tmp_path: Path) -> None:
    second(tmp_path, "/", {})
    for name in ("cpu.max", "memory.max", "memory.stat"):
        (tmp_path / HOME / name).mkdir(parents=True)
    (tmp_path / "proc/meminfo").mkdir()
    assert usable_cores(tmp_path) >= 1
    memory(tmp_path)


# -- threads ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("cores")
def test_what_is_asked_for_counts_and_one_line_tells(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    second(tmp_path, "/", {"cpu.max": "200000 100000"})
    limits._warn_of_threads.cache_clear()
    with caplog.at_level(logging.WARNING, "gemloom"):
        assert threads_for(None, tmp_path) == threads_for(2, tmp_path) == 2
        assert threads_for(1, tmp_path) == 1
        assert not caplog.records
        assert threads_for(5, tmp_path) == threads_for(5, tmp_path) == 5
    [line] = caplog.messages
    assert "5 threads" in line and "2 cores" in line
