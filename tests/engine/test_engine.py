"""Many requests at once: each as if it were alone, with one end, in nobody's way."""

import asyncio
import os
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from random import Random
from typing import Any

import numpy as np
import pytest

import gemloom
from conftest import Load, endless, paced, prompt
from engine_checks import idle, watch_batches
from gemloom.errors import EngineError, GemloomError, OutOfMemoryError, QueueFullError
from gemloom.ggml.graph import Graph
from gemloom.testing import engine_of, parts_of
from tiny import VARIANTS

variants = pytest.mark.parametrize("variant", VARIANTS)


# --- as if alone --------------------------------------------------------------


@variants
def test_each_request_is_as_if_it_were_alone(load: Load, variant: str) -> None:
    """Twelve requests over three slots, sampled and greedy, with and without shared prefixes."""
    prompts = [prompt(10 + 7 * i, seed=i % 4) for i in range(12)]
    options = [
        {"seed": i, "max_tokens": 12, "temperature": i % 3, "logprobs": 0} for i in range(12)
    ]
    model = load(variant, slots=3, chunk=32, budget=8)
    runs = [model.stream(ids, **given) for ids, given in zip(prompts, options, strict=True)]
    together = [run.completion() for run in runs]
    quiet = load(variant, slots=1, chunk=32)
    for ids, given, done in zip(prompts, options, together, strict=True):
        alone = quiet.generate(ids, **given)
        assert done.tokens == alone.tokens
        assert np.allclose(
            [p.logprob for p in done.pieces], [p.logprob for p in alone.pieces], atol=2e-3
        )


def test_several_threads(load: Load) -> None:
    model = load(slots=4)

    def ask(i: int) -> list[int]:
        return model.generate(prompt(20, seed=i), seed=i, max_tokens=15).tokens

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(ask, range(16)))
    assert together == [ask(i) for i in range(16)]


def test_asyncio(load: Load) -> None:
    """``await`` for the whole, ``async for`` for the pieces, and cancelling a task."""
    model = load(slots=2)
    options = {"max_tokens": 10, "seed": 1}

    async def pieces(ids: list[int]) -> list[int]:
        return [piece.token async for piece in model.stream(ids, **options)]

    async def cancelled() -> None:
        with paced(model, 1):
            task = asyncio.ensure_future(pieces_of(model.stream(prompt(5), **endless(model))))
            await asyncio.sleep(0)  # it begins to wait
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    async def main() -> list[list[int]]:
        whole = await model.stream(prompt(9), **options)
        parts = await asyncio.gather(*(pieces(prompt(9, seed=i)) for i in range(6)))
        await cancelled()
        return [whole.tokens, *parts]

    got = asyncio.run(main())
    idle(model)
    alone = [prompt(9), *(prompt(9, seed=i) for i in range(6))]
    assert got == [model.generate(ids, **options).tokens for ids in alone]


async def pieces_of(run: gemloom.Run) -> list[gemloom.Piece]:
    return [piece async for piece in run]


# --- the queue ----------------------------------------------------------------


def test_streams_go_on_while_a_long_prompt_comes_in(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(slots=3, chunk=64, budget=16)
    batches = watch_batches(model, monkeypatch)
    with paced(model) as allowed:
        streams = [
            model.stream(prompt(4, seed=i), max_tokens=60, seed=i, **endless(model))
            for i in range(2)
        ]
        allowed.release(2)
        for stream in streams:
            next(stream)
        long = model.stream(prompt(200, seed=9), max_tokens=1)
    long.completion()
    later = [b for b in batches if any(len(c.tokens) > 1 and c.end > 20 for c in b)]
    mixed = [b for b in later if len(b) > 1]
    assert len(mixed) > 3
    for batch in mixed:
        assert sum(len(chunk.tokens) for chunk in batch) <= 16
        assert sum(len(chunk.tokens) == 1 for chunk in batch) >= len(batch) - 1
    for stream in streams:
        stream.close()


def test_first_come_first_served(load: Load) -> None:
    model = load(slots=1)
    runs = [model.stream(prompt(5, seed=i), max_tokens=20, **endless(model)) for i in range(8)]
    for run in reversed(runs):
        run.completion()
    began = [run._request.first for run in runs]
    assert began == sorted(began)


def test_a_full_queue_refuses(load: Load) -> None:
    model = load(slots=1, queue=2)
    with paced(model, 1):
        first = model.stream(prompt(5), **endless(model))
        next(first)
        waiting = [model.stream(prompt(5), max_tokens=2) for _ in range(2)]
        with pytest.raises(QueueFullError, match="2 requests are waiting") as refused:
            model.stream(prompt(5))
        assert refused.value.status == 429
        first.close()
    assert all(len(run.completion().tokens) in (1, 2) for run in waiting)
    idle(model)


def test_a_waiting_request_can_be_cancelled(load: Load) -> None:
    model = load(slots=1)
    with paced(model, 1):
        first, second = (model.stream(prompt(5), **endless(model)) for _ in range(2))
        next(first)
        second.cancel()
    assert list(second) == []
    first.close()
    idle(model)


# --- load ---------------------------------------------------------------------


def taken(model: gemloom.Model, ids: list[int], n: int) -> gemloom.Run:
    """A request that is tried again where the queue is full."""
    while True:
        with suppress(QueueFullError):
            return model.stream(ids, max_tokens=n, seed=0)
        time.sleep(0.01)


def test_every_request_ends_once_and_no_slot_is_lost(load: Load) -> None:
    """64 clients, 640 requests: read to the end, cancelled, dropped; tried again when refused."""
    model = load(slots=4, queue=32)
    ends: Counter[str] = Counter()
    lock = threading.Lock()

    def request(random: Random) -> str:
        n, kind = random.randrange(1, 12), random.choice(["read", "read", "cancel", "drop"])
        run = taken(model, prompt(random.randrange(1, 30), seed=random.randrange(5)), n)
        if kind == "drop":
            return "dropped"
        if kind == "cancel":
            threading.Timer(random.random() / 50, run.cancel).start()
        pieces = list(run)
        if pieces and pieces[-1].finish_reason:
            return "answered"
        assert kind == "cancel"
        return "cancelled"

    def client(seed: int) -> None:
        random = Random(seed)
        for _ in range(10):
            end = request(random)
            with lock:
                ends[end] += 1

    threads = [threading.Thread(target=client, args=(i,)) for i in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(ends.values()) == 640
    assert ends["answered"] > 250  # those that were to be read
    idle(model)
    fresh = load(slots=1).generate(prompt(20), temperature=0, max_tokens=8).tokens
    assert model.generate(prompt(20), temperature=0, max_tokens=8).tokens == fresh


# --- faults -------------------------------------------------------------------


@pytest.mark.parametrize("fault", [RuntimeError("boom"), MemoryError(), KeyboardInterrupt()])
def test_a_failed_step_ends_everything_loudly(
    load: Load, monkeypatch: pytest.MonkeyPatch, fault: BaseException
) -> None:
    model = load(slots=2)

    def fail(*_: Any) -> None:
        raise fault

    with paced(model, 1):
        runs = [model.stream(prompt(5, seed=i), max_tokens=200, **endless(model)) for i in range(4)]
        next(runs[0])
        monkeypatch.setattr(Graph, "compute", fail)
    for run in runs:
        with pytest.raises(EngineError, match=type(fault).__name__ if not str(fault) else "boom"):
            list(run)
    monkeypatch.undo()
    with pytest.raises(EngineError, match="the model must be loaded again"):
        model.generate(prompt(5))
    assert model.stats().error
    assert model.stats().slots_busy == 0
    model.close()


@pytest.mark.parametrize("where", ["_wait", "_end_all"])
def test_what_escapes_from_the_loop_ends_everything_too(
    load: Load, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """A bug of ours outside of any step: nobody waits for ever, and health knows."""
    model = load(slots=1)
    engine, freed = engine_of(model), threading.Event()
    free, right = engine._free, getattr(engine, where)
    runs = [model.stream(prompt(5, seed=i), max_tokens=200, **endless(model)) for i in range(3)]
    next(runs[0])

    def fail_once(*args: Any) -> None:
        monkeypatch.setattr(engine, where, right)
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(engine, "_free", lambda: (free(), freed.set()))
    monkeypatch.setattr(engine, where, fail_once)
    if where == "_end_all":
        monkeypatch.setattr(parts_of(model).store, "mark", None)  # which fails a step
    for run in runs:
        with pytest.raises(EngineError, match="a bug"):
            list(run)
    assert freed.wait(10)
    assert "a bug" in str(model.stats().error)
    with pytest.raises(EngineError, match="a bug; the model must be loaded again"):
        model.generate(prompt(5))
    model.close()


class Broken:
    """A constraint that fails, or leaves nothing to say."""

    finished = False

    def __init__(self, mask: Any) -> None:
        self._mask = mask

    def prepare(self) -> None:
        if isinstance(self._mask, BrokenPipeError):
            raise self._mask

    def accept(self, token: int) -> None: ...

    def mask(self) -> Any:
        if isinstance(self._mask, Exception):
            raise self._mask
        return self._mask


def test_what_fails_in_one_request_ends_it_alone(load: Load) -> None:
    model = load(slots=3)
    well = model.stream(prompt(8), max_tokens=40, seed=1, **endless(model))
    masks: Sequence[Any] = [
        ValueError("no mask"), BrokenPipeError("no mask"), np.zeros(model.config.n_vocab, bool)
    ]  # fmt: skip
    for mask in masks:
        with pytest.raises(GemloomError, match=r"no mask|nothing to choose"):
            model.generate(prompt(5), constraint=Broken(mask))
    alone = load().generate(prompt(8), max_tokens=40, seed=1, **endless(model)).tokens
    assert well.completion().tokens == alone
    assert model.generate(prompt(5), max_tokens=2).tokens
    idle(model)


def test_no_memory_beside_a_grammar_that_fails_ends_two_requests_and_no_engine(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(slots=2)
    run = parts_of(model).program.run

    def full(*args: Any) -> Any:
        monkeypatch.setattr(parts_of(model).program, "run", run)
        raise OutOfMemoryError("no memory on cpu")

    with paced(model):
        fails = model.stream(prompt(5), constraint=Broken(BrokenPipeError("no mask")))
        well = model.stream(prompt(6), max_tokens=4)
        monkeypatch.setattr(parts_of(model).program, "run", full)
    with pytest.raises(GemloomError, match="no mask"):
        fails.completion()
    with pytest.raises(OutOfMemoryError, match="no memory on cpu"):
        well.completion()
    assert model.generate(prompt(5), max_tokens=2).tokens
    idle(model)


def test_a_constraint_bounds_every_token(load: Load) -> None:
    model = load()
    allowed = np.zeros(model.config.n_vocab, bool)
    allowed[[300, 301, 302]] = True
    done = model.generate(prompt(5), constraint=Broken(allowed), max_tokens=20, temperature=5)
    assert set(done.tokens) <= {300, 301, 302}
    assert len(done.tokens) == 20


# --- prefixes -----------------------------------------------------------------

TURN, END = "<|turn>", "<turn|>"


def chat(model: gemloom.Model, *texts: str) -> list[int]:
    """System, user, model, user, ...: a conversation, and the beginning of the next answer."""
    roles = ["system", *["user", "model"] * len(texts)]
    turns = [f"{TURN}{role}\n{text}{END}\n" for role, text in zip(roles, texts, strict=False)]
    text = "".join(turns) + f"{TURN}model\n"
    return model.tokenizer.with_bos(model.tokenize(text, special=True))


def shared(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(a))


LONG = "the quick brown fox jumps over the lazy dog and runs away "
SYSTEM, USER = 2 * LONG, 3 * LONG


@pytest.mark.parametrize("variant", [v for v in VARIANTS if "gemma3" not in v])
@pytest.mark.parametrize("slots", [1, 2])
def test_a_chat_costs_only_its_new_tokens(load: Load, variant: str, slots: int) -> None:
    """Next turn, edited last message, answer made again; rings of 32 cells, wrapped many times."""
    model = load(variant, slots=slots, chunk=16, context=512)
    greedy = {"temperature": 0, "max_tokens": 60, **endless(model)}
    first = chat(model, SYSTEM, USER)
    answer = model.generate(first, **greedy)
    start = len(chat(model, SYSTEM)) - 3  # where the first user turn begins, but for its role
    cases = {
        "again": (first, len(first) - 3),
        "next turn, thoughts cut": (chat(model, SYSTEM, USER, "brown fox", "why"), len(first) - 3),
        "edited": (chat(model, SYSTEM, "dog" + USER), start),
    }
    for name, (ids, least) in cases.items():
        warm = model.generate(ids, **greedy)
        cold = load(variant, chunk=16, context=512).generate(ids, **greedy)
        assert warm.tokens == cold.tokens, name
        assert least <= warm.usage.cached_tokens <= least + 5, name
        model.generate(first, **greedy)
    assert answer.tokens == model.generate(first, **greedy).tokens
    grown = first + answer.tokens
    assert model.generate([*grown, 300], **greedy).usage.cached_tokens >= len(grown) - 1


def test_a_busy_slot_lends_its_prefix(load: Load) -> None:
    """A shared system prompt is computed once, though its first user is still being answered."""
    model = load(slots=3, chunk=16, context=512)
    first = chat(model, SYSTEM, USER)
    one = model.stream(first, temperature=0, max_tokens=100, **endless(model))
    for _ in range(40):
        next(one)
    other = chat(model, SYSTEM, "why")
    warm = model.generate(other, temperature=0, max_tokens=20)
    assert shared(first, other) - 5 <= warm.usage.cached_tokens <= shared(first, other)
    cold = load(chunk=16, context=512)
    assert warm.tokens == cold.generate(other, temperature=0, max_tokens=20).tokens
    alone = cold.generate(first, temperature=0, max_tokens=100, **endless(model)).tokens
    assert alone == one.completion().tokens


def test_without_snapshots_an_edit_begins_anew(load: Load) -> None:
    model = load(chunk=16, context=512, snapshots=0)
    model.generate(chat(model, SYSTEM, USER), max_tokens=60, **endless(model))
    edited = model.generate(chat(model, SYSTEM, "dog" + USER), max_tokens=2)
    assert edited.usage.cached_tokens == 0
    assert model.stats().snapshot_bytes == 0


def test_a_copied_window_is_no_better_than_its_source(load: Load) -> None:
    """A slot cut back to the border of what its ring holds, copied, and asked for one less."""
    ids = prompt(200)
    model = load("gemma3", slots=2, chunk=128)
    model.generate(ids, temperature=0, max_tokens=2)
    for cut in range(50, 60):
        for ending in ([7], [11]):
            short = [*ids[: cut - len(ending)], *ending, 12]
            warm = model.generate(short, temperature=0, max_tokens=4, logprobs=0)
            cold = load("gemma3").generate(short, temperature=0, max_tokens=4, logprobs=0)
            assert warm.tokens == cold.tokens
            logprobs = [[p.logprob for p in done.pieces] for done in (warm, cold)]
            assert np.allclose(*logprobs, atol=2e-3)
        model.generate(ids, temperature=0, max_tokens=2)


def test_looking_inside_does_not_starve_a_stream(load: Load) -> None:
    """Two threads that embed without end take turns with the steps."""
    model = load(slots=3)
    stop = threading.Event()

    def embed() -> None:
        while not stop.is_set():
            model.embed(prompt(6))

    threads = [threading.Thread(target=embed) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        done = model.generate(prompt(5), max_tokens=100, **endless(model))
        assert len(done.tokens) == 100
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    idle(model)


def test_a_request_that_cannot_be_admitted_ends(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load()

    def fail(*request: object) -> None:
        raise MemoryError

    monkeypatch.setattr(engine_of(model).cells, "acquire", fail)
    with pytest.raises(EngineError, match="MemoryError"):
        model.generate(prompt(5))
    with pytest.raises(EngineError):
        model.logits(prompt(5))


def test_numbers_can_be_read_after_the_end(load: Load) -> None:
    model = load()
    model.close()
    assert model.backends
    assert model.memory()["compute"] > 0
    assert model.stats().running == 0


def test_a_fork_has_no_engine(load: Load) -> None:
    model = load()
    if child := os.fork():
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert model.generate(prompt(5), max_tokens=2).tokens
        return
    try:
        model.generate(prompt(5))
    except EngineError:
        os._exit(7)
    os._exit(1)
