"""The devices that this build of ggml has: listing them and finding them by name.

Not here: computing on them (``device.py``).
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import ggml

from gemloom.errors import DeviceError
from gemloom.ggml import rpc

_log = logging.getLogger("gemloom.ggml")
_KINDS = {
    ggml.GGML_BACKEND_DEVICE_TYPE_CPU: "cpu",
    ggml.GGML_BACKEND_DEVICE_TYPE_ACCEL: "accel",
}
_INSTALL = "docs/devices.md says how to install ggml for others"
HOST = "cpu"


@ggml.ggml_log_callback
def _on_log(level: int, text: bytes, _data: Any) -> None:
    _log.debug("%s", text.decode("utf-8", "replace").rstrip())


ggml.ggml_log_set(_on_log, None)


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """One device that this build of ggml knows."""

    name: str
    description: str
    kind: str  # "cpu", "accel" (a library beside the CPU, such as BLAS) or "gpu"
    free: int  # bytes
    total: int  # bytes


@dataclass(frozen=True, slots=True)
class Found:
    """A device to compute on besides the CPU, not opened yet."""

    name: str  # under which users ask for it
    pointer: Any  # ggml's device
    buffer_type: Any  # in which its tensors lie
    worker: rpc.Worker | None = None  # its owner; closed after everything on the device
    like: Any = None  # for a worker: a local device with the same capabilities

    @property
    def judge(self) -> Any:
        """The device to ask for supported operations; None if unknown.

        ggml claims that RPC devices support everything.
        """
        return self.like if self.worker else self.pointer

    @property
    def info(self) -> DeviceInfo:
        """What ggml reports about it now."""
        return _info(self.pointer)


def _info(device: Any) -> DeviceInfo:
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    ggml.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
    return DeviceInfo(
        ggml.ggml_backend_dev_name(device).decode(),
        ggml.ggml_backend_dev_description(device).decode(),
        _KINDS.get(ggml.ggml_backend_dev_type(device), "gpu"),
        free.value,
        total.value,
    )


def _pointers() -> list[Any]:
    return [ggml.ggml_backend_dev_get(i) for i in range(ggml.ggml_backend_dev_count())]


def devices() -> list[DeviceInfo]:
    """Every device that ggml has on this machine."""
    return [_info(pointer) for pointer in _pointers()]


def listed() -> dict[str, Found]:
    """The devices that ``choose`` can give, by name: ggml's name in lower case."""
    found = {}
    for pointer in _pointers():
        if ggml.ggml_backend_dev_type(pointer) not in _KINDS:
            name = ggml.ggml_backend_dev_name(pointer).decode().lower()
            found[name] = Found(name, pointer, ggml.ggml_backend_dev_buffer_type(pointer))
    return found


def accelerator() -> tuple[str, Any] | None:
    """The library beside the CPU in this build, such as BLAS: its name and ggml's pointer."""
    pointer = ggml.ggml_backend_dev_by_type(ggml.GGML_BACKEND_DEVICE_TYPE_ACCEL)
    if not pointer:
        return None
    return ggml.ggml_backend_dev_name(pointer).decode().replace(" ", "_"), pointer


def choose(names: Sequence[str]) -> list[Found]:
    """The devices of these names, in their order, without the CPU; empty if there is only the CPU.

    "auto" means the GPUs of the first backend that has any: another may show the same GPUs.
    DeviceError for an unknown name.
    """
    there = listed()
    if list(names) == ["auto"]:
        return _all_of_one_kind(there)
    found: list[Found] = []
    with ExitStack() as stack:
        for name in names:
            if name.startswith(rpc.PREFIX):
                worker = rpc.Worker(*rpc.parse_address(name.removeprefix(rpc.PREFIX)))
                stack.callback(worker.close)
                found += _remote(name, worker)
            elif name != HOST:
                found.append(_named(name, there))
        stack.pop_all()
    return found


def lendable(names: Sequence[str]) -> list[tuple[DeviceInfo, Any]]:
    """The devices that a worker lends, with ggml's pointers: as ``choose``, plus the CPU.

    "auto" means the CPU if there is no GPU. Raises DeviceError.
    """
    rpc.check_built()
    found = [(found.info, found.pointer) for found in choose(names)]
    if HOST in names or not found:
        cpu = ggml.ggml_backend_dev_by_type(ggml.GGML_BACKEND_DEVICE_TYPE_CPU)
        found.append((_info(cpu), cpu))
    return found


def _all_of_one_kind(there: dict[str, Found]) -> list[Found]:
    kinds = {name: _registry(found.pointer) for name, found in there.items()}
    first = next(iter(kinds.values()), None)
    return [found for name, found in there.items() if kinds[name] == first]


def _registry(device: Any) -> str:
    return str(ggml.ggml_backend_reg_name(ggml.ggml_backend_dev_backend_reg(device)).decode())


def _named(name: str, there: dict[str, Found]) -> Found:
    if name not in there:
        here = ", ".join(["cpu", *there])
        raise DeviceError(f"there is no device {name!r}; here: {here}; {_INSTALL}")
    return there[name]


def _remote(name: str, worker: rpc.Worker) -> list[Found]:
    several = len(worker.devices) > 1
    cpu = ggml.ggml_backend_dev_by_type(ggml.GGML_BACKEND_DEVICE_TYPE_CPU)
    return [
        Found(
            f"{name}#{i}" if several else name,
            pointer,
            ggml.ggml_backend_dev_buffer_type(pointer),
            worker,
            cpu if facts.of_cpu else None,
        )
        for i, (pointer, facts) in enumerate(zip(worker.devices, worker.facts, strict=True))
    ]


def start(device: Any, name: str) -> Any:
    """Open a device. DeviceError if its driver does not start."""
    backend = ggml.ggml_backend_dev_init(device, None)
    if not backend:
        raise DeviceError(
            f"the device {name} did not start: its driver failed; "
            f"gemloom doctor lists what there is, device cpu does without it"
        )
    return backend


def cpu_features() -> dict[str, bool]:
    """The instruction sets that this build of ggml's CPU backend uses."""
    prefix = "ggml_cpu_has_"
    names = (
        "sse3 ssse3 avx avx_vnni avx2 f16c fma bmi2 avx512 avx512_vbmi avx512_vnni avx512_bf16 "
        "amx_int8 neon arm_fma fp16_va dotprod matmul_int8 sve sme riscv_v vsx llamafile"
    )
    return {name: bool(getattr(ggml, prefix + name)()) for name in names.split()}


def ggml_version() -> str:
    """The version of the ggml library itself."""
    return str(ggml.ggml_version().decode())
