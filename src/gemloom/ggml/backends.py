"""The devices that this build of ggml has: listing them, finding those that are asked for.

Not what is done with them: see ``device.py``.
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

    name: str  # as it is asked for
    pointer: Any  # ggml's device
    buffer_type: Any  # in which its tensors lie
    worker: rpc.Worker | None = None  # whose it is; to be closed after all that lies there
    like: Any = None  # ggml's device here that can do what it can, if it is a worker's

    @property
    def judge(self) -> Any:
        """Whom to ask what it can do; None where nobody knows: ggml says that workers can all."""
        return self.like if self.worker else self.pointer

    @property
    def info(self) -> DeviceInfo:
        """What ggml tells of it now."""
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
    """Every device ggml has here."""
    return [_info(pointer) for pointer in _pointers()]


def listed() -> dict[str, Found]:
    """Those that ``choose`` can give, by the names they are asked for: ggml's in lower case."""
    found = {}
    for pointer in _pointers():
        if ggml.ggml_backend_dev_type(pointer) not in _KINDS:
            name = ggml.ggml_backend_dev_name(pointer).decode().lower()
            found[name] = Found(name, pointer, ggml.ggml_backend_dev_buffer_type(pointer))
    return found


def accelerator() -> tuple[str, Any] | None:
    """The library beside the CPU that this build has, such as BLAS: its name, ggml's pointer."""
    pointer = ggml.ggml_backend_dev_by_type(ggml.GGML_BACKEND_DEVICE_TYPE_ACCEL)
    if not pointer:
        return None
    return ggml.ggml_backend_dev_name(pointer).decode().replace(" ", "_"), pointer


def choose(names: Sequence[str]) -> list[Found]:
    """The devices of these names, in their order, without the CPU; none where it is all there is.

    "auto" are the GPUs of the first backend that has some: another may show the same ones.
    DeviceError for a name that is not there.
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
    """The devices that a worker is to lend, and ggml's pointers: as ``choose``, with the CPU.

    "auto" is the CPU where there is no GPU. DeviceError.
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
    """Open a device. DeviceError where its driver does not start."""
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
