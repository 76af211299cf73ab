"""ggml's RPC protocol, as far as its messages must be understood to be passed on and checked.

Pure: no sockets (relay.py) and no ggml (rpc.py). A request is a command (u8), a size (u64) and as
many bytes; an answer, where there is one, a size and as many bytes. All is packed and
little-endian. Source: ggml-rpc.cpp of the ggml that the pinned ggml-python has.
"""

from __future__ import annotations

import itertools
import struct
from dataclasses import dataclass
from enum import IntEnum

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from gemloom.errors import MalformedError

PROTOCOL = (4, 0, 1)  # the last number changes with ggml's list of operations: all must be equal
HEAD = struct.Struct("<BQ")  # command and size of a request
SIZE = struct.Struct("<Q")  # of an answer
_MOST_DEVICES = 16  # of one worker
_CAPABILITIES = bytes(24)  # none: whoever has some would leave TCP for RDMA, past the relay
_VERSION = struct.Struct("<3Bx24s")
_SOURCES = 10  # of a tensor
_FIELDS = {  # of one tensor's description, in order, and their bytes: ggml's rpc_tensor
    "id": 8, "type": 4, "buffer": 8, "ne": 16, "nb": 16, "op": 4, "op_params": 64, "flags": 4,
    "src": 8 * _SOURCES, "view_src": 8, "view_offs": 8, "data": 8, "name": 64, "padding": 4,
}  # fmt: skip
_STARTS = dict(zip(_FIELDS, itertools.accumulate(_FIELDS.values(), initial=0), strict=False))
_TENSOR = sum(_FIELDS.values())
_SIZES = struct.Struct("<8I")
_MOST = 1 << 48  # bytes; more than any memory, and few enough for sums of them
_CPU_ALIGNMENT = 32  # bytes; ggml's TENSOR_ALIGNMENT
_NO_LIMIT = (1 << 64) - 1  # bytes of one buffer
_MOST_SIZES = 4096  # of tensors that are remembered, each with a kilobyte that it is known by
_SMALLEST_LIMIT = 1 << 20  # of a buffer's size: ggml spreads a graph over 16 buffers at most
_NO_BUFFER = bytes(16)  # an answer to ALLOC_BUFFER
_names = itertools.count(1)  # of buffers, for all workers


class Command(IntEnum):
    """What a request asks for."""

    ALLOC_BUFFER = 0
    GET_ALIGNMENT = 1
    GET_MAX_SIZE = 2
    BUFFER_GET_BASE = 3
    FREE_BUFFER = 4
    BUFFER_CLEAR = 5
    SET_TENSOR = 6
    SET_TENSOR_HASH = 7
    GET_TENSOR = 8
    COPY_TENSOR = 9
    GRAPH_COMPUTE = 10
    GET_DEVICE_MEMORY = 11
    INIT_TENSOR = 12
    GET_ALLOC_SIZE = 13
    HELLO = 14
    DEVICE_COUNT = 15
    GRAPH_RECOMPUTE = 16


_ANSWERS = {  # bytes; commands that are not here get no answer, GET_TENSOR as many as it asks for
    Command.ALLOC_BUFFER: 16, Command.GET_ALIGNMENT: 8, Command.GET_MAX_SIZE: 8,
    Command.BUFFER_GET_BASE: 8, Command.FREE_BUFFER: 0, Command.BUFFER_CLEAR: 0,
    Command.SET_TENSOR_HASH: 1, Command.COPY_TENSOR: 1, Command.GET_DEVICE_MEMORY: 16,
    Command.INIT_TENSOR: 0, Command.GET_ALLOC_SIZE: 8, Command.HELLO: 28, Command.DEVICE_COUNT: 4,
}  # fmt: skip
_TENSORS = {  # where the descriptions of tensors are in a request, and how many
    Command.SET_TENSOR: (0, 1), Command.SET_TENSOR_HASH: (0, 1), Command.GET_TENSOR: (0, 1),
    Command.COPY_TENSOR: (0, 2), Command.INIT_TENSOR: (0, 1),
    Command.GET_ALLOC_SIZE: (4, 1 + _SOURCES),  # those of GRAPH_COMPUTE come after its nodes
}  # fmt: skip


def _fields(first: str, last: str) -> slice:
    """The bytes of a tensor's description from one field to another."""
    return slice(_STARTS[first], _STARTS[last] + _FIELDS[last])


_TYPE, _EXTENT = _fields("type", "type"), _fields("ne", "nb")  # sizes and strides
_FORM = _fields("ne", "op_params")  # and the operation
_BUFFER, _DATA = _STARTS["buffer"], _STARTS["data"]


@dataclass(frozen=True, slots=True)
class Facts:
    """What a device of a worker says of itself; all in bytes."""

    alignment: int  # of addresses
    max_size: int  # of one buffer
    free: int
    total: int

    @property
    def of_cpu(self) -> bool:
        """Whether it is a CPU: of ggml's devices that alone has both of these."""
        return self.alignment == _CPU_ALIGNMENT and self.max_size == _NO_LIMIT


def answer_size(command: int, request: bytes) -> int | None:
    """Bytes of the answer to a request; None where there is none."""
    if command == Command.GET_TENSOR:
        return _u64(request, len(request) - SIZE.size)
    return _ANSWERS.get(Command(command))


def hello() -> bytes:
    """What a connection begins with, as a request without its head."""
    return _CAPABILITIES


def check_version(answer: bytes) -> None:
    """MalformedError unless a worker speaks the protocol of this ggml."""
    theirs, ours = tuple(answer[:3]), PROTOCOL
    if theirs != ours:
        said, wanted = (".".join(map(str, version)) for version in (theirs, ours))
        raise MalformedError(
            f"it speaks version {said} of ggml's RPC and not {wanted}: "
            "run the same ggml-python on both sides"
        )


def device_count(answer: bytes) -> int:
    """How many devices a worker has. MalformedError where it cannot be."""
    count = int.from_bytes(answer, "little")
    if not 1 <= count <= _MOST_DEVICES:
        raise MalformedError(f"it says it has {count} devices")
    return count


def device_facts(alignment: bytes, max_size: bytes, memory: bytes) -> Facts:
    """The answers about one device. MalformedError where they cannot be true."""
    free, total = struct.unpack("<QQ", memory)
    facts = Facts(SIZE.unpack(alignment)[0], SIZE.unpack(max_size)[0], free, total)
    power = facts.alignment and not facts.alignment & (facts.alignment - 1)
    if not power or facts.alignment > 1 << 16:
        raise MalformedError(f"it asks for addresses at multiples of {facts.alignment}")
    if facts.max_size < _SMALLEST_LIMIT or total > _MOST or free > total:
        raise MalformedError("it says impossible things of its memory")
    return facts


class Ledger:
    """What a relay knows of a worker: answers that need no asking, and what others must be.

    Buffers have names of its own for ggml, which no other worker's have: where a graph is spread,
    its parts mention tensors of other workers, of which a worker must not be told.
    """

    def __init__(self, devices: list[Facts]) -> None:
        self._devices = devices
        self._buffers: dict[int, tuple[int, int]] = {}  # our name -> the worker's, its device
        self._sizes: dict[bytes, bytes] = {}  # the form of a tensor -> the answer to GET_ALLOC_SIZE

    def known(self, command: int, request: bytes) -> bytes | None:
        """The answer to a request where the worker need not be asked (again)."""
        if command == Command.HELLO:
            return _VERSION.pack(*PROTOCOL, _CAPABILITIES)
        if command == Command.DEVICE_COUNT:
            return struct.pack("<I", len(self._devices))
        if command == Command.GET_ALIGNMENT:
            return SIZE.pack(self._device(request).alignment)
        if command == Command.GET_MAX_SIZE:
            return SIZE.pack(self._device(request).max_size)
        if command == Command.GET_ALLOC_SIZE:
            return self._sizes.get(_form(request))
        return None

    def translated(self, command: int, request: bytes) -> bytearray:
        """A request, or its beginning, as the worker is to get it."""
        told = bytearray(request)
        if command in (
            Command.BUFFER_GET_BASE,
            Command.FREE_BUFFER,
            Command.BUFFER_CLEAR,
        ):
            SIZE.pack_into(told, 0, self._buffers[_u64(request)][0])
        if command == Command.FREE_BUFFER:
            del self._buffers[_u64(request)]
        if command == Command.GRAPH_COMPUTE:
            nodes = int.from_bytes(request[4:8], "little")
            start, stop = 12 + 8 * nodes, len(request)
        else:
            start, count = _TENSORS.get(Command(command), (0, 0))
            stop = start + count * _TENSOR
        for at in range(start, stop, _TENSOR):
            buffer, _ = self._buffers.get(_u64(told, at + _BUFFER), (0, 0))
            SIZE.pack_into(told, at + _BUFFER, buffer)
            if not buffer:
                SIZE.pack_into(told, at + _DATA, 0)
        return told

    def checked(self, command: int, request: bytes, answer: bytes) -> bytes:
        """What ggml is to get for a worker's answer of the right size.

        MalformedError for one that cannot be.
        """
        if command == Command.ALLOC_BUFFER:
            return self._new_buffer(request, answer)
        if command == Command.BUFFER_GET_BASE:
            _, device = self._buffers[_u64(request)]
            base = _u64(answer)
            if not base or base % self._devices[device].alignment or base >= 1 << 62:
                raise MalformedError(f"it said a buffer begins at {base:#x}")
        elif command == Command.GET_ALLOC_SIZE:
            size = _u64(answer)
            if not _nbytes(request) <= size <= _MOST:
                raise MalformedError(f"it asked for {size:,} bytes for a tensor")
            if len(self._sizes) == _MOST_SIZES:
                self._sizes.clear()
            self._sizes[_form(request)] = answer  # it is asked for at each graph, and again
        elif command == Command.GET_DEVICE_MEMORY:
            free, total = struct.unpack("<QQ", answer)
            if free > total or total > _MOST:
                raise MalformedError("it says impossible things of its memory")
        return answer

    def _new_buffer(self, request: bytes, answer: bytes) -> bytes:
        device, wanted = struct.unpack("<IQ", request)
        theirs, size = struct.unpack("<QQ", answer)
        if not theirs:
            return _NO_BUFFER
        if not wanted <= size <= _MOST:
            raise MalformedError(f"it gave {size:,} bytes for {wanted:,}")
        ours = next(_names)
        self._buffers[ours] = theirs, device
        return struct.pack("<QQ", ours, size)

    def stand_in(self, command: int, request: bytes) -> bytes:
        """What ggml can go on with where the worker is gone; GET_TENSOR's zeros are not here."""
        if command == Command.BUFFER_GET_BASE:
            return SIZE.pack(_MOST)
        if command == Command.GET_ALLOC_SIZE:
            return SIZE.pack(_nbytes(request))
        return bytes(_ANSWERS[Command(command)])

    def _device(self, request: bytes) -> Facts:
        return self._devices[int.from_bytes(request, "little")]


def _u64(data: bytes | bytearray, at: int = 0) -> int:
    value: int = SIZE.unpack_from(data, at)[0]
    return value


def _form(request: bytes) -> bytes:
    """All that the size of a tensor depends on, of a GET_ALLOC_SIZE: device, it and its sources."""
    parts = [request[:4]]
    for start in range(4, 4 + (1 + _SOURCES) * _TENSOR, _TENSOR):
        tensor = request[start : start + _TENSOR]
        parts += tensor[_TYPE], tensor[_FORM]
    return b"".join(parts)


def _nbytes(request: bytes) -> int:
    """Bytes of the tensor of a GET_ALLOC_SIZE from the first to the last, as ggml counts them."""
    tensor = request[4 : 4 + _TENSOR]
    kind = GGMLQuantizationType(struct.unpack("<I", tensor[_TYPE])[0])
    sizes = _SIZES.unpack(tensor[_EXTENT])
    lengths, strides = sizes[:4], sizes[4:]
    block, width = GGML_QUANT_SIZES[kind]
    first = width if block == 1 else lengths[0] * strides[0] // block
    start = 0 if block == 1 else 1
    rest = zip(lengths[start:], strides[start:], strict=True)
    return first + sum((n - 1) * stride for n, stride in rest) if all(lengths) else 0
