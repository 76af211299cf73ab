"""A request with many runs is one request in the queue: its own runs wait for one another."""

import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

import gemloom
import tiny
from conftest import paced, until
from http_serving import endless, events, http, serving

COMPLETIONS = "/v1/completions"
MANY = [f"{word} {n}" for word in ("the", "quick", "brown", "fox") for n in range(32)]


@pytest.fixture(scope="module")
def model() -> Iterator[gemloom.Model]:
    data = tiny.gguf_bytes(tiny.VARIANTS["e2b"])
    with gemloom.load(data, kv_type="f32", context=128, slots=1, queue=1, threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def url(model: gemloom.Model) -> Iterator[str]:
    with serving(model) as url:
        yield url


@pytest.fixture(autouse=True)
def nothing_left(model: gemloom.Model) -> Iterator[None]:
    yield
    until(lambda: not (model.stats().running or model.stats().waiting or model.stats().slots_busy))


def long(model: gemloom.Model) -> dict[str, Any]:
    return {"prompt": MANY, "logit_bias": endless(model), "max_tokens": 100, "stream": True}


def test_as_many_prompts_as_are_allowed_on_one_slot(url: str, model: gemloom.Model) -> None:
    with http(url) as client:
        body = {"prompt": MANY, "max_tokens": 2, "seed": 3}
        answer = client.post(COMPLETIONS, json=body)
        assert answer.status_code == 200, answer.text
        said = [choice["text"] for choice in answer.json()["choices"]]
        alone = [model.generate(text, max_tokens=2, seed=3).text for text in MANY]
        assert said == alone
        answer = client.post(COMPLETIONS, json={**body, "prompt": MANY[:8], "n": 16})
        said = [choice["text"] for choice in answer.json()["choices"]]
        assert len(said) == 128
        assert said[::16] == alone[:8]
        body = {"messages": [{"role": "user", "content": "a"}], "n": 16, "max_tokens": 2}
        assert client.post("/v1/chat/completions", json=body).status_code == 200


def test_others_have_their_turn_in_between(url: str, model: gemloom.Model) -> None:
    with http(url) as client, client.stream("POST", COMPLETIONS, json=long(model)) as many:
        coming = events(many.iter_lines())
        next(coming)
        answer = client.post(COMPLETIONS, json={"prompt": "a", "max_tokens": 2})
        assert answer.status_code == 200
        assert model.stats().waiting > 50  # of the many


def test_the_limit_holds_for_other_requests(url: str, model: gemloom.Model) -> None:
    answers: list[int] = []

    def ask(client: httpx.Client) -> None:
        body = {"prompt": ["a", "b"], "max_tokens": 2}
        answers.append(client.post(COMPLETIONS, json=body).status_code)

    with http(url) as client:
        other = threading.Thread(target=ask, args=[client])
        with paced(model, 1), client.stream("POST", COMPLETIONS, json=long(model)) as many:
            next(events(many.iter_lines()))
            other.start()
            until(lambda: model.stats().waiting == 127 + 2)  # there is room for it, whole
            refused = client.post(COMPLETIONS, json={"prompt": "a"})
            assert refused.status_code == 429
            assert refused.json()["error"]["code"] == "queue_full"
            assert model.stats().waiting == 127 + 2
        other.join()
    assert answers == [200]


def test_none_is_left_when_the_client_leaves(url: str, model: gemloom.Model) -> None:
    with http(url) as client, client.stream("POST", COMPLETIONS, json=long(model)) as many:
        coming = events(many.iter_lines())
        while next(coming)["choices"][0]["index"] < 2:  # the third has begun
            pass
    steps = model.stats().steps
    until(lambda: not model.stats().waiting)
    assert model.stats().steps < steps + 100  # and no other one after it


def test_none_is_left_after_the_deadline(model: gemloom.Model) -> None:
    with serving(model, timeout=0.5) as url, http(url) as client:
        answer = client.post(COMPLETIONS, json={**long(model), "stream": False})
        assert answer.status_code == 408
        until(lambda: not model.stats().waiting)


def test_a_wrong_prompt_among_many_is_told_before_anything_runs(
    url: str, model: gemloom.Model
) -> None:
    with http(url) as client:
        before = model.stats().generated_tokens
        with paced(model):
            answer = client.post(COMPLETIONS, json={**long(model), "prompt": [*MANY[:99], ""]})
            assert answer.status_code == 400
        until(lambda: not model.stats().waiting)
        assert model.stats().generated_tokens == before
