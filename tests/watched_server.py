"""A server in a process of its own that tells how long it stood still and how much memory it took.

``Watched`` is the test's side; run as a script, this file is the server's.
"""

import asyncio
import gc
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TICK = 0.005  # seconds


class Gaps:
    """The longest time that one who wants to run every TICK has not run.

    It is the wall time, or the CPU time of this process if that is less: while a busy machine runs
    other processes, nobody in this one is to blame.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget the longest gap."""
        self.longest, self._last = 0.0, (time.perf_counter(), time.process_time())

    def tick(self) -> None:
        """It has run."""
        now = (time.perf_counter(), time.process_time())
        gap = min(b - a for a, b in zip(self._last, now, strict=True))
        self.longest, self._last = max(self.longest, gap), now


def memory(name: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at the most since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


def main(model_path: str, options: str) -> None:
    """Serve until stdin ends; each line on it is answered with what was watched since the last."""
    import uvicorn

    import gemloom
    from gemloom.ggml.memory import trim_memory
    from gemloom.server.app import create_app
    from gemloom.server.connections import config
    from gemloom.server.service import Settings

    model = gemloom.load(model_path, context=1024, slots=2, threads=1, kv_type="f32")
    app = create_app(model, Settings(name="tiny", **json.loads(options)))
    listener = socket.create_server(("127.0.0.1", 0))
    thread, loop = Gaps(), Gaps()

    class Server(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            self.ticking = asyncio.create_task(tick_loop())

    async def tick_loop() -> None:
        while True:
            await asyncio.sleep(TICK)
            loop.tick()

    def tick_thread() -> None:
        while True:
            time.sleep(TICK)
            thread.tick()

    def answer() -> None:
        print(listener.getsockname()[1], flush=True)
        before = memory("VmRSS")
        for _ in sys.stdin:
            told = {"thread": thread.longest, "loop": loop.longest}
            print(json.dumps(told | {"peak": memory("VmHWM") - before}), flush=True)
            gc.collect()
            trim_memory()  # else what one request took would hide what the next takes
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
            before = memory("VmRSS")
            thread.reset()
            loop.reset()
        os._exit(0)

    for work in (tick_thread, answer):
        threading.Thread(target=work, daemon=True).start()
    Server(config(app, log_level="critical")).run([listener])


class Watched:
    """The test's side: where the server listens, and what it says of itself."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        assert process.stdout
        self.port = int(process.stdout.readline())
        self.report()

    def report(self) -> dict[str, float]:
        """The longest gaps in seconds and the peak of memory in bytes, since the last report."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        told: dict[str, float] = json.loads(self._process.stdout.readline())
        return told


@contextmanager
def watched(model: Path, **settings: Any) -> Iterator[Watched]:
    """A server of the model for as long as the block runs."""
    process = subprocess.Popen(
        [sys.executable, __file__, str(model), json.dumps(settings)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield Watched(process)
    finally:
        process.kill()
        process.communicate()


if __name__ == "__main__":
    main(*sys.argv[1:])
