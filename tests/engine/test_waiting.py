"""Who waits has its turn in the order of coming; a run after another has it when that has ended."""

import threading
from concurrent.futures import Future

import pytest
from hypothesis import given
from hypothesis import strategies as st

import gemloom
import vocabularies
from conftest import Load, paced, prompt
from engine_checks import idle
from gemloom.compute.slots import Slot
from gemloom.engine.request import Request
from gemloom.engine.waiting import Waiting
from gemloom.errors import ClosedError, QueueFullError
from gemloom.sampling.params import GEMMA_DEFAULTS
from http_serving import endless


def bias(model: gemloom.Model) -> dict[int, float]:
    return {int(token): value for token, value in endless(model).items()}


def sequence() -> Request:
    return Request([2], GEMMA_DEFAULTS, vocabularies.small("gemma4"), lambda _: None)


@given(st.lists(st.tuples(st.sampled_from(["new", "after", "end"]), st.integers(0, 9))))
def test_all_who_wait_have_a_turn_once_nobody_is_before_them(acts: list[tuple[str, int]]) -> None:
    waiting, held = Waiting(threading.RLock()), Future[Slot]()
    there: list[Request] = []
    waiting.add(held)
    for act, number in acts:
        if act == "end" and there:
            ended = there.pop(number % len(there))
            waiting.remove(ended)
            waiting.follow(ended)
            continue
        before = there[number % len(there)] if act == "after" and there else None
        there.append(sequence())
        waiting.add(there[-1], before)
    assert len(waiting) == len(there) + 1
    ready = waiting.ready()
    assert ready[0] is held
    assert set(ready[1:]) == {one for one in there if one.after is None}
    assert all(one.after in there for one in there if one.after)
    while there:
        for one in [one for one in there if one.after is None]:  # never empty: no circle
            there.remove(one)
            waiting.remove(one)
            waiting.follow(one)
    waiting.remove(held)
    assert not waiting.all()


def test_a_run_after_another_is_not_refused_and_starts_at_its_end(load: Load) -> None:
    model = load(slots=1, queue=1)
    with paced(model, 1):
        first = model.stream(prompt(5), max_tokens=3, logit_bias=bias(model))
        next(first)
        other = model.stream(prompt(6), max_tokens=3)
        with pytest.raises(QueueFullError):
            model.stream(prompt(5))
        runs = [first]
        for n in range(5):
            runs.append(model.stream(prompt(5, seed=n), max_tokens=3, after=runs[-1]))
        assert model.stats().waiting == 6
    done = [run.completion() for run in (*runs, other)]
    assert all(one.finish_reason for one in done)
    began = [run.request.started for run in runs]
    assert began == sorted(began)
    assert began[0] < other.request.started < began[1]  # those that wait already come first
    late = model.stream(prompt(5), max_tokens=3, seed=1, after=first)  # one that has ended
    assert late.completion().tokens == model.generate(prompt(5), max_tokens=3, seed=1).tokens
    idle(model)


def test_one_that_has_no_turn_yet_ends_when_it_is_cancelled(load: Load) -> None:
    model = load(slots=1, queue=1)
    first = model.stream(prompt(5), logit_bias=bias(model))
    second = model.stream(prompt(5), after=first)
    third = model.stream(prompt(5), max_tokens=2, after=second)
    second.cancel()
    assert list(second) == []  # though the first goes on
    first.cancel()
    assert third.completion().finish_reason
    idle(model)


def test_all_end_with_the_model(load: Load) -> None:
    model = load(slots=1, queue=1)
    with paced(model, 1):
        first = model.stream(prompt(5), logit_bias=bias(model))
        second = model.stream(prompt(5), after=first)
        next(first)
        threading.Thread(target=model.close).start()
    for run in (first, second):
        with pytest.raises(ClosedError):
            run.completion()
