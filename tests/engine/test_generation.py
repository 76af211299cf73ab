"""What a caller holds while a request runs, and after: put together whoever read it before."""

import asyncio
from typing import Any

import pytest

import gemloom
from conftest import Load
from gemloom.engine.request import Request
from gemloom.errors import RequestError

HOW: dict[str, Any] = {"max_tokens": 12, "seed": 3}
HI = [{"role": "user", "content": "hello world"}]


@pytest.fixture
def model(load: Load) -> gemloom.Model:
    return load("e2b")


@pytest.mark.parametrize("read", [0, 1, 5, 12])
def test_the_whole_is_there_whatever_was_read_before(model: gemloom.Model, read: int) -> None:
    whole = model.generate("hello", **HOW)
    run = model.stream("hello", **HOW)
    before = [piece for piece, _ in zip(run, range(read), strict=False)]
    for _ in range(2):
        done = run.completion()
        assert (done.text, done.tokens, done.pieces) == (whole.text, whole.tokens, whole.pieces)
        assert done.finish_reason == whole.finish_reason
    assert done.pieces[:read] == before[:read]
    assert done.usage.completion_tokens == len(done.tokens)


@pytest.mark.parametrize("read", [0, 2, 100])
def test_the_whole_answer_too(model: gemloom.Model, read: int) -> None:
    whole = model.chat(HI, **HOW)
    run = model.chat(HI, stream=True, **HOW)
    for _, _ in zip(range(read), run, strict=False):
        pass
    for _ in range(2):
        done = run.completion()
        assert (done.message, done.finish_reason) == (whole.message, whole.finish_reason)


def test_and_in_a_coroutine(model: gemloom.Model) -> None:
    whole, answer = model.generate("hello", **HOW), model.chat(HI, **HOW)

    async def read() -> None:
        run = model.stream("hello", **HOW)
        assert await anext(run) == whole.pieces[0]
        assert (await run).pieces == (await run).pieces == whole.pieces
        chat = model.chat(HI, stream=True, **HOW)
        async for _ in chat:
            pass
        assert (await chat).message == answer.message

    asyncio.run(read())


def test_what_was_closed_gives_what_was_read(model: gemloom.Model) -> None:
    run = model.stream("hello", **HOW)
    first = next(run)
    run.close()
    done = run.completion()
    assert (done.pieces, done.finish_reason) == ([first], None)


def test_an_error_is_told_each_time(model: gemloom.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    accept = Request.accept

    def failing(self: Request, logits: Any) -> Any:
        if self.n_generated == 2:
            raise RequestError("no more")
        return accept(self, logits)

    monkeypatch.setattr(Request, "accept", failing)
    for run in (model.stream("hello", **HOW), model.chat(HI, stream=True, **HOW)):
        for _ in range(2):
            with pytest.raises(RequestError, match="no more"):
                run.completion()
