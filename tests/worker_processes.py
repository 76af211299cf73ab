"""Workers on the loopback for tests: processes of ``gemloom worker``, and how to fake one."""

import re
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import ggml
import pytest

from command_line import ENVIRONMENT, command

needs_rpc = pytest.mark.skipif(
    not ggml.GGML_USE_RPC, reason="this build of ggml has no RPC (make builds one that has)"
)


class Worker:
    """A process that lends its CPU, with one thread; ``device`` is its name for a model."""

    def __init__(self, port: int = 0, host: str = "127.0.0.1") -> None:
        self.process = subprocess.Popen(
            command("worker", "--listen", f"{host}:{port}", "--device", "cpu", "-t", "1"),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT,
        )  # fmt: skip
        assert self.process.stdout
        self.said = self.process.stdout.readline() + self.process.stdout.readline()
        found = re.search(r"rpc:[0-9.]+:(\d+)", self.said)
        assert found, self.process.communicate()
        self.device, self.port = found[0], int(found[1])

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@contextmanager
def worker(port: int = 0, host: str = "127.0.0.1") -> Iterator[Worker]:
    started = Worker(port, host)
    try:
        yield started
    finally:
        started.kill()


def closed_port() -> int:
    """One that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
