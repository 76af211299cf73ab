"""A thread between ggml's RPC client and a worker, which keeps the client from ever failing.

ggml ends the process where a worker is gone or answers nonsense. So its client is connected to
this thread, which passes every byte on for as long as the worker is well, and answers by itself
when it is not: with zeros of the right size. ``lost`` says then that nothing computed since is
worth anything; whoever uses results must look at it before.

Pure sockets and threads: what the bytes mean is in wire.py, ggml's side of it in rpc.py.
"""

from __future__ import annotations

import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress

from gemloom.ggml import wire
from gemloom.ggml.wire import HEAD, SIZE, Command, Facts, Ledger, MalformedError

GREETING = 5.0  # seconds a worker has to take a connection, and to answer each first question
PATIENCE = 120.0  # seconds for any answer: those to a long prompt's step come when it is computed
_UNREACHABLE = 10  # seconds without a sign of life from the worker's machine
_PART = 1 << 20  # bytes that are passed on at once
_SMALL = 1 << 16  # bytes; of a tensor's, its description is among so many
_ZEROS = memoryview(bytes(_PART))


def greet(address: tuple[str, int]) -> tuple[socket.socket, list[Facts]]:
    """Connect to a worker, and ask it what it has.

    Raises OSError where there is none, MalformedError for one that cannot be used.
    """
    with ExitStack() as stack:
        worker = stack.enter_context(socket.create_connection(address, GREETING))
        _watch(worker)
        wire.check_version(_ask(worker, Command.HELLO, wire.hello()))
        count = wire.device_count(_ask(worker, Command.DEVICE_COUNT))
        facts = [_facts(worker, index) for index in range(count)]
        stack.pop_all()
    return worker, facts


def _facts(worker: socket.socket, index: int) -> Facts:
    about = index.to_bytes(4, "little")
    kinds = (Command.GET_ALIGNMENT, Command.GET_MAX_SIZE, Command.GET_DEVICE_MEMORY)
    return wire.device_facts(*(_ask(worker, kind, about) for kind in kinds))


def _ask(worker: socket.socket, command: Command, request: bytes = b"") -> bytes:
    """The answer to a small request. OSError, MalformedError."""
    worker.sendall(HEAD.pack(command, len(request)) + request)
    size = wire.answer_size(command, request)
    assert size is not None
    return _answer(worker, size, GREETING)


def _answer(worker: socket.socket, size: int, seconds: float) -> bytes:
    """An answer that has to have ``size`` bytes. OSError, MalformedError."""
    end = time.monotonic() + seconds
    _expect(worker, size, end)
    return _exactly(worker, size, end)


def _expect(worker: socket.socket, size: int, end: float) -> None:
    (said,) = SIZE.unpack(_exactly(worker, SIZE.size, end))
    if said != size:
        raise MalformedError("it answered what no worker of ggml does")


def _exactly(worker: socket.socket, size: int, end: float) -> bytes:
    """``size`` bytes that come before ``end``, by the monotonic clock. OSError."""
    data = bytearray()
    while len(data) < size:
        worker.settimeout(max(0.001, end - time.monotonic()))
        part = worker.recv(size - len(data))
        if not part:
            raise MalformedError("it closed the connection")
        data += part
    return bytes(data)


def _watch(worker: socket.socket) -> None:
    """Have the system notice a machine that is off or out of reach, and send what is small now."""
    worker.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    keep_alive(worker)
    if sys.platform == "linux":  # the same for what was sent and is not acknowledged
        worker.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNREACHABLE * 1000)


def keep_alive(connection: socket.socket) -> None:
    """Have the system ask the other machine for a sign of life while nothing is sent."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    idle = "TCP_KEEPALIVE" if sys.platform == "darwin" else "TCP_KEEPIDLE"
    for name, value in ((idle, _UNREACHABLE // 2), ("TCP_KEEPINTVL", 1), ("TCP_KEEPCNT", 5)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


class Relay:
    """Passes on what ggml's client and a worker that was greeted say to each other.

    The client connects to ``port`` of the loopback, some times one after another; after
    ``settle()`` its connection is the last, and its end ends all. ``lost`` is why the worker is
    not there any more, or "".
    """

    def __init__(self, worker: socket.socket, devices: list[Facts]) -> None:
        self.lost = ""
        self._worker, self._ledger = worker, Ledger(devices)
        self._settled = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(0.2)  # closing it does not wake who waits on every system
        self.port: int = self._listener.getsockname()[1]
        self._part = memoryview(bytearray(_PART))
        self._thread = threading.Thread(target=self._serve, name="gemloom-worker", daemon=True)
        self._thread.start()

    def settle(self) -> None:
        """Take no further connection: nobody else on this machine shall find the worker here."""
        self._settled = True
        self._listener.close()

    def close(self) -> None:
        """Let go of the worker at once; the client, if it is still there, finds it gone."""
        self.settle()
        self._lose(MalformedError("it was let go of"))

    # -- the thread --------------------------------------------------------------------------

    def _serve(self) -> None:
        if hasattr(signal, "pthread_sigmask"):  # whoever waits for ggml leaves signals to us
            signal.pthread_sigmask(signal.SIG_UNBLOCK, signal.valid_signals())
        with self._worker:
            while not self._settled:
                try:
                    client, _ = self._listener.accept()
                except OSError:  # nobody came yet, or it was closed
                    continue
                with client:
                    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    self._attend(client)

    def _attend(self, client: socket.socket) -> None:
        """Pass on the client's requests until it goes."""
        with selectors.DefaultSelector() as waiting:
            waiting.register(client, selectors.EVENT_READ)
            waiting.register(self._worker, selectors.EVENT_READ)
            watched = True
            while True:
                if watched and self.lost:
                    waiting.unregister(self._worker)
                    watched = False
                ready = {key.fileobj for key, _ in waiting.select()}
                if self._worker in ready:
                    self._notice()
                elif not self._pass_on(client):
                    return

    def _notice(self) -> None:
        """The worker says something unasked: most likely that it is gone."""
        try:
            self._worker.settimeout(0)
            unasked = self._worker.recv(1)
        except OSError as error:
            self._lose(error)
        else:
            what = "it answered unasked" if unasked else "it closed the connection"
            self._lose(MalformedError(what))

    def _lose(self, error: OSError | MalformedError) -> None:
        if isinstance(error, TimeoutError) and not error.errno:
            reason = f"it did not answer in {PATIENCE:g} seconds"
        else:
            reason = getattr(error, "strerror", None) or str(error)
        self.lost = self.lost or reason[0].lower() + reason[1:]
        with suppress(OSError):  # if it only stalls, it is free for others
            self._worker.shutdown(socket.SHUT_RDWR)

    def _pass_on(self, client: socket.socket) -> bool:
        """One request and its answer; False where there is none any more."""
        head = bytearray(HEAD.size)
        if not _fill(client, memoryview(head)):
            return False
        command, size = HEAD.unpack(head)
        begin = bytearray(min(size, _SMALL) if command == Command.SET_TENSOR else size)
        _fill(client, memoryview(begin))
        request = bytes(begin)
        answer = self._ledger.known(command, request)
        if answer is None:
            self._send(head + self._ledger.translated(command, request))
            for part in self._rest(client, size - len(request)):
                self._send(part)
            length = wire.answer_size(command, request)
            if length is None:
                return True
            if command == Command.GET_TENSOR:
                self._pass_back(client, length)
                return True
            answer = self._checked(command, request, length)
        client.sendall(SIZE.pack(len(answer)) + answer)
        return True

    def _rest(self, client: socket.socket, left: int) -> Iterator[memoryview]:
        """``left`` bytes from the client, part by part."""
        while left:
            count = client.recv_into(self._part[: min(left, _PART)])
            if not count:
                raise ConnectionError("the client went in the middle of a request")
            left -= count
            yield self._part[:count]

    def _send(self, data: bytes | bytearray | memoryview) -> None:
        """To the worker, if it is there."""
        if self.lost:
            return
        try:
            self._worker.settimeout(PATIENCE)
            self._worker.sendall(data)
        except OSError as error:
            self._lose(error)

    def _checked(self, command: int, request: bytes, size: int) -> bytes:
        """The worker's answer of so many bytes, or what stands in for it."""
        if not self.lost:
            try:
                answer = _answer(self._worker, size, PATIENCE)
                return self._ledger.checked(command, request, answer)
            except (OSError, MalformedError) as error:
                self._lose(error)
        return self._ledger.stand_in(command, request)

    def _pass_back(self, client: socket.socket, left: int) -> None:
        """A tensor of so many bytes from the worker to the client; zeros where none come."""
        if not self.lost:
            try:
                _expect(self._worker, left, time.monotonic() + PATIENCE)
            except (OSError, MalformedError) as error:
                self._lose(error)
        client.sendall(SIZE.pack(left))
        while left:
            part = self._receive(min(left, _PART))
            client.sendall(part)
            left -= len(part)

    def _receive(self, most: int) -> memoryview:
        """What comes from the worker of the next ``most`` bytes; all of them, zeros, if it went."""
        if not self.lost:
            try:
                self._worker.settimeout(PATIENCE)
                if count := self._worker.recv_into(self._part[:most]):
                    return self._part[:count]
                self._lose(MalformedError("it closed the connection"))
            except OSError as error:
                self._lose(error)
        return _ZEROS[:most]


def _fill(client: socket.socket, view: memoryview) -> bool:
    """Fill the view; False where the client has gone."""
    while view:
        count = client.recv_into(view)
        if not count:
            return False
        view = view[count:]
    return True
