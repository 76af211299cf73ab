"""A worker that is none: it speaks the protocol, and says at one point what the test wants.

Run as a program it is what ``test_relay.py`` starts as a process of its own, since ggml ends the
process where something is wrong: it prints each case, and how that ended.
"""

import json
import socket
import struct
import sys
import threading
from collections.abc import Callable
from contextlib import closing, suppress

import numpy as np
from gguf.constants import GGMLQuantizationType

from gemloom.errors import DeviceError
from gemloom.ggml import relay
from gemloom.ggml.arena import Arena
from gemloom.ggml.device import Device
from gemloom.ggml.graph import F32, Graph
from gemloom.ggml.wire import PROTOCOL, Command

Twist = Callable[[Command, bytes], bytes | None]  # of an answer with its size; None: hang up
MIB = 1 << 20


def honest(command: Command, answer: bytes) -> bytes:
    return answer


class FakeWorker:
    """Takes connections in a thread; ``twist`` makes of each answer what is sent."""

    def __init__(self, twist: Twist = honest) -> None:
        self._twist, self._buffers = twist, 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.asked: list[Command] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                with connection, suppress(ConnectionError):
                    self._attend(connection)

    def _attend(self, connection: socket.socket) -> None:
        with connection.makefile("rb") as requests:
            while head := requests.read(9):
                command, size = struct.unpack("<BQ", head)
                self._answer(connection, Command(command), requests.read(size))

    def _answer(self, connection: socket.socket, command: Command, request: bytes) -> None:
        self.asked.append(command)
        answer = self._honest(command, request)
        if answer is not None:
            said = self._twist(command, struct.pack("<Q", len(answer)) + answer)
            if said is None:
                raise ConnectionError
            connection.sendall(said)

    def _honest(self, command: Command, request: bytes) -> bytes | None:
        if command == Command.ALLOC_BUFFER:
            self._buffers += 1
            return struct.pack("<QQ", self._buffers << 12, *struct.unpack("<Q", request[4:]))
        if command == Command.BUFFER_GET_BASE:
            return struct.pack("<Q", struct.unpack("<Q", request)[0] << 24)
        if command == Command.GET_TENSOR:
            return b"\x01" * struct.unpack("<Q", request[-8:])[0]
        return {
            Command.HELLO: struct.pack("<4B24x", *PROTOCOL, 0),
            Command.DEVICE_COUNT: struct.pack("<I", 1),
            Command.GET_ALIGNMENT: struct.pack("<Q", 64),
            Command.GET_MAX_SIZE: struct.pack("<Q", 2**64 - 1),
            Command.GET_DEVICE_MEMORY: struct.pack("<QQ", 512 * MIB, 1024 * MIB),
            Command.GET_ALLOC_SIZE: struct.pack("<Q", MIB),
            Command.FREE_BUFFER: b"", Command.BUFFER_CLEAR: b"", Command.INIT_TENSOR: b"",
            Command.SET_TENSOR_HASH: b"\x00", Command.COPY_TENSOR: b"\x00",
        }.get(command)  # fmt: skip


def compute(port: int) -> np.ndarray:
    """Something of everything: buffers, a product, results; raises what is raised."""
    device = Device([f"rpc:127.0.0.1:{port}"], threads=1)
    with closing(device), closing(Arena(device, 2, where=0)) as arena:
        kind = GGMLQuantizationType.Q4_0  # its size is asked for
        w, cells = arena.tensor("w", kind, (64, 32)), arena.tensor("cells", F32, (64, 8))
        arena.allocate("a test")
        w.write(bytes(w.nbytes))
        cells.write(bytes(cells.nbytes))
        with closing(Graph(device, 16)) as g:
            g.at(0)
            x = g.input("x", F32, 64, 1)
            y = g.output(g.mul_mat(w, x))
            g.allocate()
            for _ in range(3):
                x.write(bytes(x.nbytes))
                g.compute()
                result = y.numpy()
        device.check()
        return result


def outcome(twist: Twist) -> str:
    """How a computation with such a worker ends."""
    with closing(FakeWorker(twist)) as worker:
        try:
            told = f"fine: {compute(worker.port).view(np.uint8).max()}"
        except DeviceError as error:
            told = f"{type(error).__name__}: {error}".replace(f"127.0.0.1:{worker.port}", "W")
    for thread in threading.enumerate():
        if thread.name.startswith("gemloom"):
            thread.join(1)
            assert not thread.is_alive()
    return told


def at(command: Command, number: int, answer: bytes | None) -> Twist:
    """Answer the ``number``th such request with these bytes; None: hang up."""
    seen = 0

    def twist(asked: Command, right: bytes) -> bytes | None:
        nonlocal seen
        seen += asked == command
        return answer if asked == command and seen == number + 1 else right

    return twist


def main() -> None:
    """Cases as lines of JSON on stdin: a command, a number, an answer in hex or null."""
    relay.GREETING, relay.PATIENCE = 0.3, 0.15
    for line in sys.stdin:
        name, number, answer = json.loads(line)
        twist = at(Command[name], number, None if answer is None else bytes.fromhex(answer))
        print(outcome(twist), flush=True)


if __name__ == "__main__":
    main()
