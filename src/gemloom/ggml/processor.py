"""What the system tells of the processor."""

from __future__ import annotations

from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")


def first_cpu() -> dict[str, str]:
    """What the kernel tells of the first CPU, by its own names; empty on systems but Linux."""
    found: dict[str, str] = {}
    if _CPUINFO.exists():
        with _CPUINFO.open(encoding="utf-8", errors="replace") as file:
            for line in file:  # not all of it: the kernel makes a page for each of many CPUs
                name, colon, value = line.partition(":")
                if not colon:
                    break
                found[name.strip()] = value.strip()
    return found


def flags() -> set[str]:
    """The kernel's names of what the first CPU can do; empty on other systems than Linux."""
    cpu = first_cpu()
    return set((cpu.get("flags") or cpu.get("Features") or "").split())
