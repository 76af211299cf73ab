"""What each source of a model costs: seconds to load it, and memory while it is loaded.

    python benchmarks/sources.py [--model GGUF] [--repetitions N] [--threads N]

Every load is in a process of its own, from a file in the page cache or a server on this machine,
so no disk and no network is measured, only the way the bytes take. Writes a table and
``results/NAME.json``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import socket
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

HERE = Path(__file__).parent
PART = 8 << 20  # bytes of the parts of iterators
MIB = 2**20
CONTEXT = 512

Job = dict[str, Any]


# -- one load, in a process of its own -----------------------------------------


def _parts(path: str) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while part := file.read(PART):
            yield part


async def _awaited(path: str) -> AsyncIterator[bytes]:
    for part in _parts(path):
        await asyncio.sleep(0)
        yield part


def _pipe(path: str) -> Any:
    """What comes out of a pipe that another thread fills."""
    reader, writer = os.pipe()

    def fill() -> None:
        with open(writer, "wb") as file:
            for part in _parts(path):
                file.write(part)

    threading.Thread(target=fill).start()
    return open(reader, "rb")


GIVEN: dict[str, Callable[[str], Any]] = {
    "path": str,
    "bytes": lambda path: Path(path).read_bytes(),
    "parts": lambda path: list(_parts(path)),
    "iterator": _parts,
    "async": _awaited,
    "pipe": _pipe,
}


def load(job: Job) -> dict[str, Any]:
    """Load, compute one token, tell the seconds and the model's own memory."""
    from machine import anonymous

    import gemloom

    options = {"key": job.get("key"), "context": CONTEXT, "threads": job["threads"]}
    options |= job["options"]
    begin, used = perf_counter(), process_time()
    given = GIVEN[job["given"]](job["source"])
    if job["given"] == "async":
        model = asyncio.run(gemloom.load_async(given, **options))
    else:
        model = gemloom.load(given, **options)
    took = {"seconds": perf_counter() - begin, "processor": process_time() - used}
    with model:
        getattr(given, "close", lambda: None)()
        del given
        logits = model.logits([2], rows="last")
        own = {"after": anonymous(os.getpid()), "copied": model.memory()["copied"]}
        return {**took, "check": float(logits.sum()), **own}


# -- all of them ---------------------------------------------------------------


def jobs(path: Path, sealed: Path, key: str, ranges: str, plain: str) -> dict[str, Job]:
    """What is measured, by name."""
    name = path.name

    def job(given: str, source: object, **more: Any) -> Job:
        return {"given": given, "source": str(source), "options": {}, **more}

    return {
        "path, mapped, plain kernels": job("path", path, options={"kernels": "plain"}),
        "path, mapped": job("path", path),
        "path, copied": job("path", path, options={"mmap": False}),
        "bytes": job("bytes", path),
        "list of parts": job("parts", path),
        "iterator of parts": job("iterator", path),
        "asynchronous iterator of parts": job("async", path),
        "pipe": job("pipe", path),
        "URL, by ranges": job("path", f"{ranges}/{name}"),
        "URL, server without ranges": job("path", f"{plain}/{name}"),
        "sealed path": job("path", sealed, key=key),
        "sealed, iterator of parts": job("iterator", sealed, key=key),
        "sealed, URL by ranges": job("path", f"{ranges}/{sealed.name}", key=key),
    }


@contextmanager
def _with_ranges(folder: Path) -> Iterator[str]:
    """A server of the files of a folder that knows ranges."""
    import uvicorn
    from starlette.applications import Starlette
    from starlette.routing import Mount
    from starlette.staticfiles import StaticFiles

    app = Starlette(routes=[Mount("/", StaticFiles(directory=folder))])
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, args=[[listener]])
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def _without_ranges(folder: Path) -> Iterator[str]:
    """Python's own server, which sends a file whole."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=folder)) as server:
        server.handle_error = lambda *_: None  # type: ignore[method-assign]  # who asks for ranges leaves
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def measure(options: argparse.Namespace) -> Path:
    """All sources; returns the JSON file written."""
    from compare import err, slug, terminal
    from machine import describe, warm

    machine = describe(options.threads)
    if machine["load"] > 0.5:
        err.print(f"this machine is not idle: its load is {machine['load']:.1f}")
    options.cache.mkdir(parents=True, exist_ok=True)
    path = _whole(options.model, options.cache)
    sealed, key = _sealed(path)
    with ExitStack() as stack:
        ranges = stack.enter_context(_with_ranges(options.cache))
        plain = stack.enter_context(_without_ranges(options.cache))
        wanted = jobs(path, sealed, key, ranges, plain)
        warm(path), warm(sealed)
        found = {name: _measured(name, job, options) for name, job in wanted.items()}
    out = HERE / "results" / f"{options.name or 'sources-' + slug(machine)}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    told = {"machine": machine, "model": path.name, "bytes": path.stat().st_size, "part": PART}
    out.write_text(json.dumps(told | {"sources": found}, indent=1) + "\n", encoding="utf-8")
    terminal().print(table(found))
    return out


def _whole(model: str, folder: Path) -> Path:
    """The model as one file in ``folder``, which servers give."""
    from gemloom.files import source

    (blob,) = source.resolve(model)
    path = folder / (re.sub(r"\.gguf$", "", Path(blob.name).name) + ".gguf")
    if not path.is_file() or path.stat().st_size != blob.size:
        with path.open("wb") as file:
            for piece in blob.pieces(0, blob.size):
                file.write(piece)
    return path


def _sealed(path: Path) -> tuple[Path, str]:
    """The same sealed, and the key for it, which is made for this run."""
    import base64

    from gemloom.files import sealed, source

    raw, out = os.urandom(sealed.KEY_BYTES), path.with_name(f"{path.name}.sealed")
    sealed.seal(source.resolve(path)[0], out, sealed.Key(raw), lambda done: None)
    return out, base64.b64encode(raw).decode()


def _measured(name: str, job: Job, options: argparse.Namespace) -> dict[str, Any]:
    from compare import err
    from sides import Side, run

    side = Side(name, sys.executable, Path(__file__).name)
    runs = []
    for number in range(options.repetitions):
        with err.status(f"{name}: {number + 1} of {options.repetitions}"):
            runs.append(run(side, job | {"threads": options.threads}))
    return {
        "seconds": [done.answer["seconds"] for done in runs],
        "processor": [done.answer["processor"] for done in runs],
        "peak": [done.peak for done in runs],
        "after": [done.answer["after"] for done in runs],
        "copied": runs[0].answer["copied"],
        "check": runs[0].answer["check"],
    }


def table(found: dict[str, dict[str, Any]]) -> Any:
    """What was found, for people."""
    from rich.table import Table

    made = Table(title="Sources", title_justify="left")
    made.add_column("source")
    for title in ("load, s", "processor, s", "peak, MiB", "loaded, MiB", "weights of it, MiB"):
        made.add_column(title, justify="right")
    for name, one in found.items():
        sizes = [median(one["peak"]), median(one["after"]), one["copied"]]
        times = [min(one["seconds"]), min(one["processor"])]
        cells = [*(f"{time:.2f}" for time in times), *(f"{size / MIB:,.0f}" for size in sizes)]
        made.add_row(name, *cells)
    return made


def main() -> None:
    if len(sys.argv) == 2 and sys.argv[1].startswith("{"):
        print(json.dumps(load(json.loads(sys.argv[1]))))
        return
    from gemloom.errors import GemloomError
    from gemloom.system.limits import usable_cores

    parser = argparse.ArgumentParser(description="Time and memory of each source of a model.")
    parser.add_argument("--model", default="gemma-3-270m", help="a GGUF, or a built-in name")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--cache", type=Path, default=HERE / ".cache", help="for the files")
    parser.add_argument("--name", help="of the JSON file; the processor's by default")
    try:
        print(measure(parser.parse_args()))
    except (GemloomError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
