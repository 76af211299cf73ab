"""A worker that dies, stalls or says what it must not: never an abort, never a hang."""

import json
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import ggml
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from command_line import ENVIRONMENT
from gemloom.errors import DeviceError
from gemloom.ggml import relay, wire
from gemloom.ggml.rpc import Worker, parse_address
from gemloom.ggml.wire import Command, Facts, Ledger
from worker_processes import closed_port, needs_rpc

HERE = Path(__file__).parents[1]
SSH = b"SSH-2.0-OpenSSH_9.2p1\r\n"


class Child:
    """A process that tries workers, one case after another; ggml may abort it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, HERE / "fake_worker.py"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT,
        )  # fmt: skip

    def outcome(self, command: Command, number: int, answer: bytes | None) -> str:
        assert self._process.stdin
        assert self._process.stdout
        case = [command.name, number, None if answer is None else answer.hex()]
        self._process.stdin.write(json.dumps(case) + "\n")
        self._process.stdin.flush()
        said = self._process.stdout.readline()
        assert said, f"the process ended with {self._process.wait()}"
        return said.strip()

    def end(self) -> None:
        self._process.communicate()
        assert self._process.returncode == 0


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    started = Child()
    yield started
    started.end()


def words(*values: int) -> bytes:
    """An answer of 64-bit numbers, with its size."""
    return struct.pack(f"<{1 + len(values)}Q", 8 * len(values), *values)


COUNT = struct.Struct("<QI")
GONE, NONSENSE = "it closed the connection", "it answered what no worker of ggml does"
TABLE: list[tuple[Command, int, bytes | None, str]] = [
    (Command.HELLO, 9, b"", "fine: 1"),
    (Command.HELLO, 0, None, f"cannot be used: {GONE}"),
    (Command.HELLO, 0, b"\x1c", "does not answer: is it busy with another model, or off?"),
    (Command.HELLO, 0, SSH, f"DeviceError: the worker W cannot be used: {NONSENSE}"),
    (Command.HELLO, 0, b"HTTP/1.1 400 Bad Request\r\n\r\n", NONSENSE),
    (
        Command.HELLO,
        0,
        struct.pack("<Q3B25x", 28, 3, 0, 0),
        "speaks version 3.0.0 of ggml's RPC",
    ),
    (Command.HELLO, 0, struct.pack("<Q3B25x", 28, 4, 0, 2), "and not 4.0.1"),
    (Command.HELLO, 0, struct.pack("<Q3B", 3, 3, 0, 0), NONSENSE),
    (Command.DEVICE_COUNT, 0, COUNT.pack(4, 0), "it says it has 0 devices"),
    (Command.DEVICE_COUNT, 0, COUNT.pack(4, 17), "it says it has 17 devices"),
    (Command.DEVICE_COUNT, 0, COUNT.pack(4, 2**32 - 1), "it says it has 4294967295 devices"),
    (Command.GET_ALIGNMENT, 0, words(0), "addresses at multiples of 0"),
    (Command.GET_ALIGNMENT, 0, words(48), "addresses at multiples of 48"),
    (Command.GET_ALIGNMENT, 0, words(2**63), "addresses at multiples of 9223372036854775808"),
    (Command.GET_MAX_SIZE, 0, words(0), "impossible things of its memory"),
    (Command.GET_DEVICE_MEMORY, 0, words(2, 1), "impossible things of its memory"),
    (Command.GET_DEVICE_MEMORY, 0, words(0, 2**64 - 1), "impossible things of its memory"),
    (Command.GET_DEVICE_MEMORY, 1, words(2, 1), "LostError: the worker W was lost: it says"),
    (
        Command.GET_DEVICE_MEMORY,
        1,
        words(1, 2**30),
        "OutOfMemoryError: no memory for a test on rpc:W",
    ),
    (Command.ALLOC_BUFFER, 0, words(0, 0), "DeviceError: no memory on the worker W"),
    (Command.ALLOC_BUFFER, 0, None, f"LostError: the worker W was lost: {GONE}"),
    (Command.ALLOC_BUFFER, 1, words(0, 0), "OutOfMemoryError: no memory for a test"),
    (Command.ALLOC_BUFFER, 1, None, f"LostError: the worker W was lost: {GONE}"),
    (
        Command.ALLOC_BUFFER,
        1,
        words(4096, 8),
        "LostError: the worker W was lost: it gave 8 bytes",
    ),
    (
        Command.ALLOC_BUFFER,
        1,
        words(4096, 2**64 - 1),
        "it gave 18,446,744,073,709,551,615 bytes",
    ),
    (
        Command.ALLOC_BUFFER,
        2,
        words(0, 0),
        "OutOfMemoryError: no memory on rpc:W for the inputs",
    ),
    (
        Command.ALLOC_BUFFER,
        3,
        words(0, 0),
        "OutOfMemoryError: no memory on rpc:W for intermediate results",
    ),
    (Command.ALLOC_BUFFER, 2, None, f"LostError: the worker W was lost: {GONE}"),
    (Command.ALLOC_BUFFER, 3, None, f"LostError: the worker W was lost: {GONE}"),
    (Command.BUFFER_GET_BASE, 0, words(0), "it said a buffer begins at 0x0"),
    (Command.BUFFER_GET_BASE, 0, words(2**20 + 32), "it said a buffer begins at 0x100020"),
    (
        Command.BUFFER_GET_BASE,
        0,
        words(2**64 - 64),
        "it said a buffer begins at 0xffffffffffffffc0",
    ),
    (Command.BUFFER_GET_BASE, 1, None, GONE),
    (Command.GET_ALLOC_SIZE, 0, words(17), "it asked for 17 bytes for a tensor"),
    (Command.GET_ALLOC_SIZE, 0, words(2**63), "it asked for 9,223,372,036,854,775,808 bytes"),
    (Command.GET_ALLOC_SIZE, 0, None, GONE),
    (Command.BUFFER_CLEAR, 0, words(7), NONSENSE),
    (Command.BUFFER_CLEAR, 0, None, GONE),
    (Command.INIT_TENSOR, 0, words(7), NONSENSE),
    (Command.GET_TENSOR, 0, None, f"LostError: the worker W was lost: {GONE}"),
    (Command.GET_TENSOR, 1, words(7), NONSENSE),
    (Command.GET_TENSOR, 1, struct.pack("<Q60x", 128), "it did not answer in 0.15 seconds"),
    (Command.GET_TENSOR, 1, struct.pack("<Q140x", 128), "LostError"),
    (Command.FREE_BUFFER, 0, words(7), "fine: 1"),  # nobody wants anything of it any more
    (Command.FREE_BUFFER, 0, None, "fine: 1"),
]


@needs_rpc
@pytest.mark.parametrize(("command", "number", "answer", "told"), TABLE)
def test_wrong_answers_are_errors(
    child: Child, command: Command, number: int, answer: bytes | None, told: str
) -> None:
    assert told in child.outcome(command, number, answer)


NUMBERS = st.sampled_from([0, 1, 31, 2**20, 2**31, 2**32, 2**47, 2**48, 2**62, 2**63, 2**64 - 1])
SOME = st.lists(NUMBERS, max_size=3).map(lambda values: words(*values))


@needs_rpc
@settings(max_examples=60, deadline=None)
@given(
    command=st.sampled_from(Command),
    number=st.integers(0, 4),
    answer=st.none() | st.binary(max_size=40) | SOME,
)
def test_no_answer_ends_the_process(
    child: Child, command: Command, number: int, answer: bytes | None
) -> None:
    said = child.outcome(command, number, answer)
    assert said.startswith(("fine: ", "DeviceError: ", "LostError: ", "OutOfMemoryError: ")), said


@needs_rpc
def test_the_protocol_is_that_of_this_ggml() -> None:
    """Its third number stands for ggml's list of operations: a worker's must be the same."""
    assert wire.PROTOCOL == (4, 0, 1)
    assert ggml.GGML_OP_COUNT == 97


def test_an_answer_must_come_whole_in_time() -> None:
    """One that comes byte by byte is given up as well, not waited for part by part."""
    ours, theirs = socket.socketpair()
    passing = relay.Relay(ours, [Facts(32, 1 << 30, 1, 1)], patience=0.3)
    ended = threading.Event()

    def drip() -> None:
        theirs.recv(1 << 16)
        with suppress(OSError):
            theirs.sendall(struct.pack("<Q", 100))
            while not ended.wait(0.05):
                theirs.sendall(b"x")

    dripping = threading.Thread(target=drip)
    dripping.start()
    with theirs, socket.create_connection(("127.0.0.1", passing.port)) as client:
        request = bytes(296) + struct.pack("<2Q", 0, 100)
        client.sendall(struct.pack("<BQ", Command.GET_TENSOR, len(request)) + request)
        asked, answer = time.monotonic(), b""
        while len(answer) < 108:
            answer += client.recv(108)
        assert time.monotonic() - asked < 1
        assert passing.lost == "it did not answer in 0.3 seconds"
        assert passing.stalled
        assert not answer[-50:].strip(b"\0")
        ended.set()
        passing.close()
    dripping.join()


def test_what_is_remembered_has_a_bound() -> None:
    """Every new length of a prompt asks for the sizes of other tensors."""
    ledger, answer = Ledger([Facts(32, 1 << 30, 1, 1)]), struct.pack("<Q", 1 << 20)
    for i in range(1, 10_000):
        request = bytearray(4 + 11 * 296)
        struct.pack_into("<4I", request, 4 + 20, i, 1, 1, 1)
        assert ledger.known(Command.GET_ALLOC_SIZE, bytes(request)) is None
        assert ledger.checked(Command.GET_ALLOC_SIZE, bytes(request), answer) == answer
        assert ledger.known(Command.GET_ALLOC_SIZE, bytes(request)) == answer
    assert len(ledger._sizes) < 5000


@needs_rpc
def test_no_worker_is_told_at_once() -> None:
    port = closed_port()
    with pytest.raises(DeviceError, match=f"no worker at 127.0.0.1:{port}: Connection refused"):
        Worker("127.0.0.1", port)
    with pytest.raises(DeviceError, match=r"no worker at no-such-host.invalid:1: "):
        Worker("no-such-host.invalid", 1)


def test_addresses() -> None:
    assert parse_address("10.0.0.5:1234") == ("10.0.0.5", 1234)
    assert parse_address("[::1]:1234") == ("::1", 1234)
    assert parse_address("box") == ("box", 50052)
    for wrong in ("", ":1", "box:", "box:x", "box:0", "box:65536", "box:-1", "box:٣"):
        with pytest.raises(DeviceError, match="is not an address of a worker: it is HOST:PORT"):
            parse_address(wrong)
