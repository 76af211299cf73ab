"""Devices of other machines: ggml's RPC backend, made safe by a relay; and the worker's side of it.

A worker computes for one model at a time. Nothing on the way is encrypted, and whoever reaches a
worker may use it: docs/workers.md says how to tunnel it.
"""

from __future__ import annotations

import itertools
import os
import socket
import stat
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import ggml

from gemloom.errors import DeviceError, LostError, MalformedError
from gemloom.ggml import relay
from gemloom.ggml.relay import Relay, greet, keep_alive
from gemloom.system.signals import undisturbed

PREFIX = "rpc:"
DEFAULT_PORT = 50052  # that of ggml's own server
_INSTALL = (
    'CMAKE_ARGS="-DGGML_RPC=ON" pip install --force-reinstall --no-deps --no-cache-dir '
    f"--no-binary ggml-python ggml-python=={ggml.__version__}"
)
_MOST_PATIENCE = 3600.0  # seconds
_serial = itertools.count()
_patience: dict[str, float] = {}  # seconds for an answer, of workers that once took longer


def check_built() -> None:
    """DeviceError where this build of ggml has no RPC."""
    if not ggml.GGML_USE_RPC:
        raise DeviceError(f"this build of ggml has no RPC, which workers need: {_INSTALL}")


def speaking(names: Iterable[str]) -> AbstractContextManager[None]:
    """Around what speaks to workers among devices of these names, in a caller's own thread."""
    return undisturbed() if any(name.startswith(PREFIX) for name in names) else nullcontext()


def parse_address(text: str) -> tuple[str, int]:
    """Host and port of "HOST:PORT", "[IPV6]:PORT" or "HOST". DeviceError for anything else."""
    host, colon, port = text.rpartition(":")
    if not colon or host.count("[") != host.count("]"):
        host, port = text, str(DEFAULT_PORT)
    host = host.strip("[]")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise DeviceError(f"{text!r} is not an address of a worker: it is HOST:PORT")
    return host, int(port)


class Worker:
    """A connection to a worker, with the devices it has. Free it after all that lies there.

    ``devices`` are ggml's, ``facts`` what each says of itself. They and everything on them stay
    safe to use when the worker is lost, and ``check()`` raises LostError then: before that, no
    result is to be believed.
    Raises DeviceError where there is no worker, or none that can be used.
    """

    def __init__(self, host: str, port: int) -> None:
        check_built()
        self.name = f"{host}:{port}"
        try:
            connection, facts = greet((host, port))
        except TimeoutError:
            raise DeviceError(
                f"the worker {self.name} does not answer: is it busy with another model, or off?"
            ) from None
        except OSError as error:
            raise DeviceError(
                f"no worker at {self.name}: {error.strerror or error}; gemloom worker starts one"
            ) from None
        except MalformedError as error:
            raise DeviceError(f"the worker {self.name} cannot be used: {error}") from None
        self._relay = Relay(connection, facts, _patience.get(self.name, relay.PATIENCE))
        self.facts = facts  # of each device
        self._held: Any = None
        try:
            with undisturbed():
                self.devices = self._open(len(facts))
            self.check()
        except BaseException:
            self.close()
            raise

    def _open(self, count: int) -> list[Any]:
        """ggml's devices, and a buffer whose connection stays for all that comes."""
        # ggml remembers an address for good: what follows the port is for it alone, as a name
        endpoint = f"127.0.0.1:{self._relay.port} for {self.name} #{next(_serial)}".encode()
        registry = ggml.ggml_backend_rpc_add_server(endpoint)
        if not registry:
            self.check()
            raise DeviceError(f"the worker {self.name} cannot be used: ggml did not connect")
        types = [ggml.ggml_backend_rpc_buffer_type(endpoint, index) for index in range(count)]
        self._held = ggml.ggml_backend_buft_alloc_buffer(types[0], 1)
        if not self._held:
            self.check()
            raise DeviceError(f"no memory on the worker {self.name}")
        self._relay.settle()
        return [ggml.ggml_backend_reg_dev_get(registry, index) for index in range(count)]

    def check(self) -> None:
        """LostError where the worker has gone."""
        if self._relay.lost:
            stalled = f"; loaded again, it gets {self._next:g}" if self._relay.stalled else ""
            raise LostError(f"the worker {self.name} was lost: {self._relay.lost}{stalled}")

    @property
    def _next(self) -> float:
        """Seconds for an answer when it is connected to again, after it took too long for one.

        Nobody can tell one that stalls from one that has much to compute: its system answers for
        both.
        """
        return min(2 * self._relay.patience, _MOST_PATIENCE)

    def abandon(self) -> None:
        """Let go of it at once, from any thread: who waits for it gets zeros, and ``check`` tells.

        It must be closed all the same.
        """
        self._relay.close()

    def close(self) -> None:
        """Let go of it, so that it can work for somebody else; never waits for one that is gone."""
        if self._held:
            with undisturbed():
                ggml.ggml_backend_buffer_free(self._held)
            self._held = None
        if self._relay.stalled:
            _patience[self.name] = self._next
        self._relay.close()


def serve(devices: Sequence[Any], host: str, port: int, threads: int) -> threading.Thread:
    """Begin to work for whoever comes to an IPv4 address; gives the thread that does.

    It ends only with the process. DeviceError where the address cannot be had.
    """
    pointers = (ggml.ggml_backend_dev_t_ctypes * len(devices))(*devices)
    arguments = (f"{host}:{port}".encode(), None, threads, len(devices), pointers)
    thread = threading.Thread(
        target=ggml.ggml_backend_rpc_start_server, args=arguments, daemon=True
    )
    thread.start()
    while thread.is_alive():
        if _keep_alive_listener(port):
            return thread
        time.sleep(0.01)
    raise DeviceError(f"ggml cannot listen on {host}:{port}")


def _keep_alive_listener(port: int) -> bool:
    """Set what connections that are taken inherit; False where nothing listens on the port yet.

    ggml serves one connection at a time, and would wait for ever for a client that was switched
    off.
    """
    for descriptor in map(int, os.listdir("/dev/fd")):
        with suppress(OSError):  # closed meanwhile: the one that was listed with
            if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                with socket.socket(fileno=os.dup(descriptor)) as found:
                    listens = found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
                    if listens and found.getsockname()[1] == port:
                        keep_alive(found)
                        return True
    return False
