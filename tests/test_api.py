"""What the Python API takes and tells: parameters, names, suggestions, documentation."""

import inspect
import json
import re
from dataclasses import fields
from typing import Any

import pydantic
import pytest

import gemloom
from conftest import Load
from gemloom.errors import OptionError, RequestError
from gemloom.sampling import params as sampling
from gemloom.server.dialects.openai_completions import CompletionRequest
from gemloom.server.errors import FieldError
from gemloom.server.parsing import parse
from random_lora import random_lora

HI = [{"role": "user", "content": "hello"}]


@pytest.fixture
def model(load: Load) -> gemloom.Model:
    return load("e2b")


def test_params_are_taken_as_one(model: gemloom.Model) -> None:
    params = gemloom.SamplingParams(seed=4, max_tokens=9, temperature=2)
    named: dict[str, Any] = {"seed": 4, "max_tokens": 9, "temperature": 2}
    for prompt in ("hello", [2, 5, 6]):
        whole = model.generate(prompt, **named)
        assert model.generate(prompt, params).tokens == whole.tokens
        assert model.stream(prompt, params=params).completion().tokens == whole.tokens
    assert model.chat(HI, params).text == model.chat(HI, **named).text
    run = model.chat(HI, params, stream=True)
    assert run.completion().text == model.chat(HI, params=params).message["content"]
    assert len(model.generate("hello", params, max_tokens=2).tokens) == 2  # what is named counts
    for wrong in ({"seed": 4}, "hot", 3):
        with pytest.raises(OptionError, match="params must be SamplingParams, not"):
            model.generate("hello", wrong)  # type: ignore[arg-type]


def test_a_base_models_chat_keeps_the_stops_of_its_params(load: Load) -> None:
    def untaught(keys: dict[str, Any], _: Any) -> None:
        del keys["tokenizer.chat_template"]

    base = load("gemma3", forms={"edit": untaught})
    params = gemloom.SamplingParams(temperature=0, max_tokens=12)
    text = base.chat(HI, params).text
    assert len(text) > 4
    cut = gemloom.SamplingParams(temperature=0, max_tokens=12, stop=(text[3],))
    assert base.chat(HI, cut).text == text[: text.index(text[3])]
    assert base.chat(HI, cut, stop=["zzz"]).text == text


@pytest.mark.parametrize("several", [["a", "b"], ("a",), [[2, 3], [2]]])
def test_several_prompts_are_told_how(model: gemloom.Model, several: Any) -> None:
    with pytest.raises(RequestError, match=r"slots=N, start stream\(\) for each"):
        model.generate(several)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("temprature", "is not a sampling option; did you mean temperature"),
        ("repeat_penalty", "did you mean repetition_penalty"),
        ("sampling", "; there are temperature, top_k"),
        ("stream", "; there are temperature, top_k"),
    ],
)
def test_only_what_is_near_is_suggested(model: gemloom.Model, given: str, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        model.generate("a", **{given: True})


def test_the_server_suggests_too() -> None:
    with pytest.raises(FieldError, match=r"is not a field of this request; did you mean repet"):
        parse(CompletionRequest, b'{"prompt": "a", "repetition_penality": 1}')
    with pytest.raises(FieldError, match=r"'qqq' is not a field of this request$"):
        parse(CompletionRequest, b'{"prompt": "a", "qqq": 1}')


def test_adapters_may_be_names(model: gemloom.Model) -> None:
    model.adapters.load("a1", random_lora(model))
    how: dict[str, Any] = {"temperature": 0, "max_tokens": 6}
    mapped = model.generate("hello", adapters={"a1": None}, **how)
    assert model.generate("hello", adapters=["a1"], **how).tokens == mapped.tokens
    assert (
        model.logits([2, 5], adapters=("a1",)) == model.logits([2, 5], adapters={"a1": 1})
    ).all()
    for wrong in ("a1", [1], 3):
        with pytest.raises(OptionError, match=r"adapters must be \[name, ...\] or \{name: scale\}"):
            model.generate("a", adapters=wrong)


class City(pydantic.BaseModel):
    name: bool
    size: int


def test_a_schema_may_be_json_or_a_class(model: gemloom.Model) -> None:
    schema = City.model_json_schema()
    said = [
        model.generate("a", constraint=model.grammars.json_schema(form), seed=2, max_tokens=60).text
        for form in (schema, json.dumps(schema), City)
    ]
    assert said[0] == said[1] == said[2]
    assert said[0].lstrip().startswith("{")
    for wrong, words in (("{", "not valid JSON"), ("3", "an object, not int"), (3, "not int")):
        with pytest.raises(RequestError, match=words):
            model.grammars.json_schema(wrong)  # type: ignore[arg-type]


def test_a_model_tells_what_it_is(load: Load) -> None:
    model = load("e2b", slots=3)
    assert repr(model) == f"<gemloom.Model {model.name}: gemma4, context 256, slots 3>"
    said = inspect.getdoc(gemloom.Model) or ""
    shown = {name for name in vars(model) if not name.startswith("_")} - {"grammars"}
    assert shown
    for name in shown:
        assert f"``{name}``" in said
    model.close()
    assert repr(model).endswith("gemma4, closed>")


def told(kind: Any) -> dict[str, str]:
    """What a class's docstring says of each field."""
    parts = re.split(r"^(\w+): ", inspect.getdoc(kind) or "", flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], (" ".join(text.split()) for text in parts[1::2]), strict=True))


@pytest.mark.parametrize("kind", [gemloom.Options, gemloom.SamplingParams])
def test_every_field_is_documented(kind: Any) -> None:
    assert list(told(kind)) == [field.name for field in fields(kind)]


def test_the_ranges_told_are_those_checked() -> None:
    said = told(gemloom.SamplingParams)
    for name, (low, high) in {**sampling._NUMBERS, **sampling._INTEGERS}.items():
        assert f"from {low}" in said[name], name
        if name not in (
            "top_k",
            "max_tokens",
            "seed",
            "repetition_limit",
        ):  # the largest integers there are
            assert re.search(rf"to {high}\b", said[name]), name
    assert f"up to {sampling.MAX_STOPS} of up to {sampling.MAX_STOP_LENGTH:,}" in said["stop"]
    said = told(gemloom.Options)
    for option, low, high in (
        ("threads", 1, 512), ("slots", 1, 256), ("chunk", 1, 8192), ("budget", 1, 8192),
    ):  # fmt: skip
        assert f"from {low} to {high:,}" in said[option]
        for outside in (low - 1, high + 1):
            with pytest.raises(OptionError, match=option):
                gemloom.Options(**{option: outside})
