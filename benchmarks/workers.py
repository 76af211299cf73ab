"""What workers cost: speed on the loopback, what the relay adds, and what crosses the network.

    python benchmarks/workers.py MODEL [--workers 2] [--prompt 256] [--decode 32] [--threads 1]
                                       [--tensor-split 2,10] [--direct]

Starts the workers, and computes the same alone (with ggml's plain kernels, which workers have)
and with them; with --direct also with ggml's client connected to them without the relay, which
ends the process where layers of one worker read what lies on another. All of it shares one
machine, so that is no speed of several; bytes and messages are what they are anywhere.
Prints a table.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from time import perf_counter, thread_time
from typing import Any

import ggml
import numpy as np
from rich.console import Console
from rich.table import Table

import gemloom
from gemloom.ggml import relay, rpc


@dataclass
class Traffic:
    """What went over the connections to all workers."""

    out: int = 0  # bytes
    back: int = 0
    messages: int = 0
    waits: int = 0  # messages that had to be answered before the next
    cpu: float = 0.0  # seconds that the relay took of a core

    def __sub__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.out - other.out, self.back - other.back,
            self.messages - other.messages, self.waits - other.waits, self.cpu - other.cpu,
        )  # fmt: skip


@dataclass
class Result:
    """Of one way to compute; seconds."""

    load: float
    prompt: float
    decode: float
    load_traffic: Traffic = field(default_factory=Traffic)
    prompt_traffic: Traffic = field(default_factory=Traffic)
    decode_traffic: Traffic = field(default_factory=Traffic)


TRAFFIC = Traffic()


class Counted(relay.Relay):
    """Counts what it passes on."""

    def _send(self, data: Any) -> None:
        TRAFFIC.out += len(data)
        super()._send(data)

    def _pass_on(self, client: Any) -> bool:
        TRAFFIC.messages += 1
        begin = thread_time()
        try:
            return super()._pass_on(client)
        finally:
            TRAFFIC.cpu += thread_time() - begin

    def _checked(self, command: int, request: bytes, size: int) -> bytes:
        TRAFFIC.waits += 1
        TRAFFIC.back += size + 8
        return super()._checked(command, request, size)

    def _pass_back(self, client: Any, left: int) -> None:
        TRAFFIC.waits += 1
        TRAFFIC.back += left + 8
        super()._pass_back(client, left)


class Direct(rpc.Worker):
    """ggml's own client, which ends the process if anything goes wrong. One device only."""

    def __init__(self, host: str, port: int) -> None:
        self.name = f"{host}:{port}"
        endpoint = f"{self.name} direct #{next(rpc._serial)}".encode()
        registry = ggml.ggml_backend_rpc_add_server(endpoint)
        self._held = ggml.ggml_backend_buft_alloc_buffer(
            ggml.ggml_backend_rpc_buffer_type(endpoint, 0), 1
        )
        self.devices = [ggml.ggml_backend_reg_dev_get(registry, 0)]

    def check(self) -> None: ...

    def close(self) -> None:
        ggml.ggml_backend_buffer_free(self._held)


def snapshot() -> Traffic:
    return TRAFFIC - Traffic()


def measure(args: argparse.Namespace, **options: Any) -> Result:
    """Load, a prompt, and decoding after it."""
    begin, before = perf_counter(), snapshot()
    with gemloom.load(args.model, threads=args.threads, context=1024, **options) as model:
        load, loaded = perf_counter() - begin, snapshot()
        ids = np.random.RandomState(0).randint(model.config.n_vocab, size=args.prompt).tolist()
        bias = dict.fromkeys(model.tokenizer.eog, -100.0)
        begin = perf_counter()
        with model.stream(ids, max_tokens=args.decode + 1, seed=1, logit_bias=bias) as run:
            next(run)
            prompt, asked = perf_counter() - begin, snapshot()
            list(run)
            decode = run.usage.decode_seconds
        decoded = snapshot()
    return Result(load, prompt, decode, loaded - before, asked - loaded, decoded - asked)


@contextmanager
def workers(count: int, threads: int) -> Iterator[list[str]]:
    """The devices of so many workers on the loopback."""
    command = [sys.executable, "-m", "gemloom", "worker", "--listen", "127.0.0.1:0"]
    command += ["--device", "cpu", "--threads", str(threads)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(count)]
    try:
        yield [_address(worker) for worker in started]
    finally:
        for worker in started:
            worker.kill()
            worker.communicate()


def _address(worker: subprocess.Popen[str]) -> str:
    assert worker.stdout
    for line in worker.stdout:
        if line.startswith("at "):
            return line.removeprefix("at ").strip()
    raise SystemExit("a worker did not start")


def results(args: argparse.Namespace) -> dict[str, Result]:
    """Of each way, by its name."""
    found = {"alone": measure(args, device="cpu", kernels="plain")}
    with workers(args.workers, args.threads) as devices, ExitStack() as patched:
        ways: list[tuple[str, str, type]] = [("with workers", "Relay", Counted)]
        if args.direct:
            ways.append(("without the relay", "Worker", Direct))
        for name, owner, kind in ways:
            before = getattr(rpc, owner)
            patched.callback(setattr, rpc, owner, before)
            setattr(rpc, owner, kind)
            found[name] = measure(args, device=devices, tensor_split=args.tensor_split)
    return found


def table(args: argparse.Namespace, found: dict[str, Result]) -> Table:
    """Speeds of all."""
    shown = Table(title=f"{args.workers} workers on the loopback, {args.threads} thread(s) each")
    for column in ("", "load, s", f"prompt {args.prompt}, tok/s", "decode, tok/s"):
        shown.add_column(column, justify="left" if not column else "right")
    for name, each in found.items():
        prompt, decode = args.prompt / each.prompt, args.decode / each.decode
        shown.add_row(name, f"{each.load:.1f}", f"{prompt:.1f}", f"{decode:.2f}")
    return shown


def traffic_table(args: argparse.Namespace, counted: Result) -> Table:
    """What went over the connections, and what the relay took of a core for it."""
    shown = Table()
    for column in ("", "kB out", "kB back", "messages", "waited for", "relay, ms"):
        shown.add_column(column, justify="left" if not column else "right")
    for name, traffic, n in (
        ("load, in all", counted.load_traffic, 1),
        ("prompt, a token", counted.prompt_traffic, args.prompt),
        ("decode, a token", counted.decode_traffic, args.decode),
    ):
        shown.add_row(
            name, f"{traffic.out / n / 1e3:,.1f}", f"{traffic.back / n / 1e3:,.1f}",
            f"{traffic.messages / n:,.1f}", f"{traffic.waits / n:,.1f}",
            f"{1e3 * traffic.cpu / n:,.2f}",
        )  # fmt: skip
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    for name, value in (("workers", 2), ("prompt", 256), ("decode", 32), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--tensor-split", type=lambda text: [float(n) for n in text.split(",")])
    parser.add_argument("--direct", action="store_true")
    args = parser.parse_args()
    found = results(args)
    Console().print(table(args, found), traffic_table(args, found["with workers"]))


if __name__ == "__main__":
    main()
