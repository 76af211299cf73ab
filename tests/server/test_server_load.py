"""64 clients, 2,000 requests: every one ends once, nothing leaks, and each answer is its own."""

import asyncio
import gc
import json
import resource
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest

from conftest import Load, until
from gemloom.ggml.memory import trim_memory
from http_serving import serving

CLIENTS, REQUESTS = 64, 2_000
PROMPTS = [f"{word} {n}" for word in ("the", "quick", "brown", "fox") for n in range(10)]


def body(i: int) -> dict[str, Any]:
    return {"prompt": PROMPTS[i % len(PROMPTS)], "max_tokens": 1 + i % 5, "seed": 7}


def resident() -> int:
    """Bytes of this process in memory, without what it could give back."""
    gc.collect()
    trim_memory()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


async def whole(client: httpx.AsyncClient, i: int) -> str:
    answer = await client.post("/v1/completions", json=body(i))
    if answer.status_code == 429:
        return "refused"
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


async def streamed(client: httpx.AsyncClient, i: int, hang_up: bool) -> str:
    text = ""
    async with client.stream("POST", "/v1/completions", json={**body(i), "stream": True}) as answer:
        if answer.status_code == 429:
            return "refused"
        assert answer.status_code == 200
        async for line in answer.aiter_lines():
            if hang_up:
                return "hung up"
            if line.startswith("data: {"):
                choices = json.loads(line.removeprefix("data: "))["choices"]
                text += choices[0]["text"] if choices else ""
    assert line.strip() in ("data: [DONE]", "")
    return text


async def client(url: str, numbers: list[int], expected: dict[int, str]) -> Counter[str]:
    ends: Counter[str] = Counter()
    random = Random(numbers[0])
    async with httpx.AsyncClient(base_url=url, timeout=120, trust_env=False) as connection:
        for i in numbers:
            kind = random.choice(["whole", "stream", "stream", "hang up", "cancel"])
            if kind == "cancel":
                task = asyncio.create_task(whole(connection, i))
                await asyncio.sleep(random.random() / 50)
                task.cancel()
                await asyncio.wait([task])
                ends["cancelled"] += 1
                continue
            run = (
                whole(connection, i)
                if kind == "whole"
                else streamed(connection, i, kind == "hang up")
            )
            end = await run
            if end not in ("refused", "hung up"):
                assert end == expected[i % (5 * len(PROMPTS))]
                end = "answered"
            ends[end] += 1
    return ends


@pytest.mark.slow
def test_two_thousand_requests(load: Load) -> None:
    model = load(slots=8, queue=CLIENTS, threads=1)
    cycle = range(5 * len(PROMPTS))  # prompts and lengths come round again
    alone = {i: model.generate(body(i)["prompt"], max_tokens=1 + i % 5, seed=7).text for i in cycle}

    async def everybody(url: str, count: int) -> Counter[str]:
        shares = [list(range(n, count, CLIENTS)) for n in range(CLIENTS)]
        ends = await asyncio.gather(*(client(url, share, alone) for share in shares))
        return sum(ends, Counter())

    with serving(model) as url:
        asyncio.run(everybody(url, REQUESTS // 2))  # what grows with use has grown
        before = resident()
        ends = asyncio.run(everybody(url, REQUESTS))
        until(lambda: not model.stats().running and not model.stats().waiting)
        assert resident() - before < 32 << 20
    assert sum(ends.values()) == REQUESTS
    assert ends["answered"] > REQUESTS / 2
    assert model.stats().slots_busy == 0
    assert model.stats().error is None
