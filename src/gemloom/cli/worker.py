"""``gemloom worker``: lends this machine's devices to a model that is loaded on another."""

import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from typing import Annotated, TextIO

import typer

from gemloom.cli.terminal import note, one_line, size
from gemloom.errors import OptionError


def worker(
    listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="IPv4 address; port 0 takes a free one.")
    ] = "127.0.0.1:50052",
    device: Annotated[
        str, typer.Option(help="What to lend: auto (GPUs, else the CPU), cpu, cuda0,cuda1 ...")
    ] = "auto",
    threads: Annotated[
        int | None,
        typer.Option(
            "--threads", "-t", min=1, max=512, help="Of the CPU. [default: one a core]",
            show_default=False,
        ),
    ] = None,
) -> None:  # fmt: skip
    """Lend this machine's devices to a model on another one.

    There, the device rpc:HOST:PORT is this one, for one model at a time. Nothing
    is encrypted and nobody is asked who they are: whoever reaches the port may
    use the machine, and see what is computed. So only this machine can, unless
    --listen says otherwise; between machines use a tunnel (ssh -L, WireGuard).
    Both sides need the same version of ggml-python. A GPU that lacks an operation
    of the model ends the worker: gemloom doctor MODEL tells. Ctrl-C or SIGTERM
    ends it at once.

    \b
    Examples:
      gemloom worker
      gemloom worker --device cuda0 --listen 10.8.0.2:50052
      gemloom chat big.gguf --device rpc:10.8.0.2:50052,cpu
    """
    from gemloom.ggml import backends, rpc
    from gemloom.system.limits import threads_for

    host, port = _free_address(listen)
    lent = backends.lendable([name.strip().lower() for name in device.split(",")])
    if not ip_address(host).is_loopback:
        note(f"anyone who reaches {host}:{port} can use this machine: there is no authentication")
    for info, _ in lent:
        if info.kind != "cpu":
            note(
                f"{info.name.lower()}: an operation that it lacks ends this worker; "
                "gemloom doctor MODEL shows whether it lacks any"
            )
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)  # nothing else ends what runs inside ggml
    with _quiet_ggml() as out:
        thread = rpc.serve([pointer for _, pointer in lent], host, port, threads_for(threads))
        for info, _ in lent:
            what = f"{info.name.lower()} ({info.description}, {size(info.total)})"
            out.write(f"lending {one_line(what)}\n")
        out.write(f"at rpc:{host}:{port}\n")
        out.flush()
        thread.join()


def _free_address(listen: str) -> tuple[str, int]:
    """Host and port of what was asked for, as numbers. OptionError, AddressError."""
    from gemloom.server.errors import AddressError

    host, colon, port = listen.rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise OptionError(f"--listen {listen!r} is not HOST:PORT")
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, int(port)))
            found: tuple[str, int] = probe.getsockname()
            return found
    except OSError as error:
        reason = f"{listen}: {error.strerror}"
        raise AddressError(f"{reason}; try another --listen") from None


@contextmanager
def _quiet_ggml() -> Iterator[TextIO]:
    """What ggml prints of its own accord goes nowhere; gives the stdout there was."""
    sys.stdout.flush()
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8") as out:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        yield out
