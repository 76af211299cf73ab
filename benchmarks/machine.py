"""What the benchmarks ran on, and whether there is room for what they want to run."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any


def describe(threads: int) -> dict[str, Any]:
    """Processor, cores, memory and system; nothing that tells one such machine from another."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "memory": meminfo("MemTotal"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "load": os.getloadavg()[0],  # what else was running when the run began
    }


def processor() -> str:
    """The processor's name."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    names = re.findall(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return names[0].strip() if names else platform.machine()


def meminfo(key: str) -> int | None:
    """A line of /proc/meminfo, in bytes; None where there is none."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(rf"^{key}:\s+(\d+) kB$", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def anonymous(pid: int) -> int:
    """Bytes of a process's own memory, mapped files not counted; 0 where nobody can say."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    sizes = re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+) kB$", text, re.MULTILINE)
    return sum(int(size) for size in sizes) * 1024


def warm(path: Path) -> None:
    """Read a file once, so that its pages are in memory before anything is timed."""
    piece = bytearray(16 << 20)
    with path.open("rb", buffering=0) as file:
        while file.readinto(piece):
            pass
