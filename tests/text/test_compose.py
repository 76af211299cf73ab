"""What a chat asks for is what its answer is held to, for the Python API as for the server."""

import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import gemloom
import tiny
from chat_requests import BEGUN, FORM, HI, LISTEN, TOOLS
from gemloom.engine.generation import ChatCompletion
from gemloom.errors import OptionError, RequestError
from gemloom.text.chat import PLAIN_STOP
from gemloom.text.router import Content

CALL = "<|tool_call>call:look{n:1,ok:true}<tool_call|>"


@pytest.fixture(scope="module")
def model() -> Iterator[gemloom.Model]:
    data = tiny.gguf_bytes(tiny.VARIANTS["e2b"])
    with gemloom.load(data, kv_type="f32", context=512, slots=2, threads=1) as model:
        yield model


class Forced:
    """A constraint that lets through these tokens, one after another."""

    finished = False

    def __init__(self, tokens: list[int], n_vocab: int) -> None:
        self._masks = []
        for token in tokens:
            self._masks.append(np.zeros(n_vocab, np.bool_))
            self._masks[-1][token] = True

    def prepare(self) -> None:
        pass

    def mask(self) -> Any:
        return self._masks[0]

    def accept(self, token: int) -> None:
        self._masks = self._masks[1:]
        self.finished = not self._masks


def saying(model: gemloom.Model, text: str, **options: Any) -> ChatCompletion:
    """An answer of exactly this text, read whole and as a stream."""
    ids = model.tokenize(text, special=True)
    answers = []
    for _ in range(2):
        forced = Forced(ids, model.config.n_vocab)
        answers.append(model.chat(HI, constraint=forced, stream=True, **options))
    whole, stream = answers[0].completion(), answers[1]
    parts = list(stream)
    texts = [part.text for part in parts if isinstance(part, Content)]
    assert "".join(texts) == whole.message["content"]
    assert stream.finish_reason == whole.finish_reason
    return whole


# -- stop strings and markup ---------------------------------------------------------------------


def test_a_stop_string_acts_on_visible_text_alone(model: gemloom.Model) -> None:
    thought = "<|channel>thought\nthe\n\nworld\n<channel|>"
    done = saying(model, f"{thought}hello\n\nagain", stop="\n\n")
    assert done.message["reasoning_content"] == "the\n\nworld"
    assert (done.message["content"], done.finish_reason) == ("hello", "stop")
    done = saying(model, f"{CALL}hello ok there", stop=["ok", "look"])
    assert [call["function"]["name"] for call in done.message["tool_calls"]] == ["look"]
    assert (done.message["content"], done.finish_reason) == ("hello ", "tool_calls")
    done = saying(model, f"{thought}{CALL}", stop=["the", "n:1"])
    assert done.message["content"] == ""
    assert len(done.message["tool_calls"]) == 1


def test_a_stop_ends_the_run_itself(model: gemloom.Model) -> None:
    ids = model.tokenize("hello world and more", special=True)
    run = model.chat(HI, constraint=Forced(ids, model.config.n_vocab), stop="wor", stream=True)
    assert run.completion().message["content"] == "hello "
    assert run.usage.completion_tokens < len(ids)


def test_markup_never_reaches_the_content(model: gemloom.Model) -> None:
    for text, content in (
        ("hello<|tool_call>call:look{n:1,ok", "hello"),
        (f"{CALL}<tool_call|>there", "there"),
        ('a<channel|>b<tool_response|>c<|"|>d', "abcd"),
        ("<|tool_call>so it is", "so it is"),
    ):
        assert saying(model, text).message["content"] == content
    ids = model.tokenize("hello<|tool_call>call:look{n:1,ok:tr", special=True)
    forced = Forced([*ids, 0], model.config.n_vocab)
    cut = model.chat(HI, constraint=forced, max_tokens=len(ids))
    assert (cut.message["content"], cut.finish_reason) == ("hello", "length")


# -- tools ---------------------------------------------------------------------------------------


def names(done: ChatCompletion) -> list[str]:
    for call in done.message.get("tool_calls", []):
        assert set(json.loads(call["function"]["arguments"])) == {"ok", "n"}
    return [call["function"]["name"] for call in done.message.get("tool_calls", [])]


def test_tools_are_held_to_their_grammar(model: gemloom.Model) -> None:
    bias = {model.tokenizer.id_of("<|tool_call>"): 100}
    how: dict[str, Any] = {"tools": TOOLS, "max_tokens": 120, "logit_bias": bias}
    assert len(names(model.chat(HI, tool_choice="required", seed=1, **how))) >= 2
    assert names(model.chat(HI, tool_choice=LISTEN, seed=1, **how)) == ["listen"]
    assert names(model.chat(HI, seed=1, **how))  # auto
    assert names(model.chat(HI, tool_choice="none", seed=1, **how)) == []
    assert names(model.chat(HI, max_tokens=20, logit_bias=bias, seed=1)) == []


@pytest.mark.parametrize("choice", ["auto", "required", LISTEN])
@pytest.mark.parametrize("form", [None, FORM])
def test_at_most_one_call_without_parallel_calls(
    model: gemloom.Model, choice: Any, form: Any
) -> None:
    bias = {model.tokenizer.id_of("<|tool_call>"): 100}
    for seed in range(3):
        done = model.chat(
            HI, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False, logit_bias=bias,
            response_format=form, seed=seed, max_tokens=200,
        )  # fmt: skip
        assert len(names(done)) == 1
        assert (done.message["content"], done.finish_reason) == ("", "tool_calls")


@pytest.mark.parametrize("thinking", [False, True])
def test_with_a_form_an_answer_is_calls_or_the_form(model: gemloom.Model, thinking: bool) -> None:
    call = model.tokenizer.id_of("<|tool_call>")
    begin = model.tokenizer.id_of("<|channel>")
    kinds = set()
    for seed in range(12):
        done = model.chat(
            HI, tools=TOOLS, response_format=FORM, seed=seed, max_tokens=300,
            logit_bias={call: 12 if seed % 2 else -2, begin: 100 if thinking else -100},
            variables={"enable_thinking": thinking}, thinking_budget=5,
        )  # fmt: skip
        assert bool(done.message.get("reasoning_content")) == thinking
        called = bool(names(done))
        kinds.add(called)
        assert done.finish_reason in (("tool_calls", "length") if called else ("stop",))
        if called:
            assert done.message["content"] == ""
        else:
            assert set(json.loads(done.message["content"])) == {"ok", "n"}
    assert kinds == {True, False}


def test_a_form_bounds_nothing_where_a_call_is_required(model: gemloom.Model) -> None:
    how: dict[str, Any] = {"tools": TOOLS, "response_format": FORM, "seed": 1, "max_tokens": 300}
    assert names(model.chat(HI, tool_choice="required", **how))
    assert names(model.chat(HI, tool_choice=LISTEN, **how)) == ["listen"]
    done = model.chat(HI, tool_choice="none", **how)
    assert names(done) == []
    assert set(json.loads(done.message["content"])) == {"ok", "n"}


def test_a_form_after_a_thought_may_look_like_markup(model: gemloom.Model) -> None:
    pattern = r"x<\|channel>[a-z]{3}<\|tool_call>"
    done = model.chat(
        HI, form=lambda grammars: grammars.regex(pattern), seed=1, max_tokens=60,
        logit_bias={model.tokenizer.id_of("<|channel>"): 100},
        variables={"enable_thinking": True}, thinking_budget=4,
    )  # fmt: skip
    assert done.message["reasoning_content"]
    assert re.fullmatch(pattern, done.message["content"])


def test_a_budget_bounds_thoughts(model: gemloom.Model) -> None:
    bias = {model.tokenizer.id_of("<|channel>"): 100, model.tokenizer.id_of("<channel|>"): -100}
    done = model.chat(
        HI, variables={"enable_thinking": True}, thinking_budget=3, logit_bias=bias, max_tokens=5
    )
    assert len(model.tokenize(done.message.get("reasoning_content", ""))) <= 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tool_choice": "required"}, "no tools to choose from"),
        ({"tool_choice": LISTEN}, "no tools to choose from"),
        ({"tools": TOOLS, "tool_choice": "look"}, "tool_choice must be none, auto, required or"),
        ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "an object must be"),
        ({"tools": TOOLS, "tool_choice": {**LISTEN, "function": {"name": "x"}}}, "no tool to call"),
        ({"response_format": FORM, "form": lambda grammars: None}, "only one of them"),
        ({"response_format": FORM, "constraint": Forced([1], 9)}, "only one of them"),
        ({"tools": TOOLS, "tool_choice": "auto", "constraint": Forced([1], 9)}, "only one of them"),
        ({"thinking_budget": -1}, "thinking budget must be 0 or more"),
        ({"thinking_budget": "3"}, "thinking_budget must be an integer"),
        ({"tools": TOOLS, "parallel_tool_calls": "no"}, "must be true or false, is 'no'"),
        ({"tool_chioce": "auto"}, "is not a sampling option"),
    ],
)
def test_what_does_not_go_together(model: gemloom.Model, options: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        model.chat(HI, **options)
    assert "\n" not in str(caught.value)


# -- continued answers ---------------------------------------------------------------------------


def prompt_text(model: gemloom.Model, messages: list[Any], **options: Any) -> str:
    return model.detokenize(model.chat_prompt(messages, **options), special=True)


def test_the_last_message_is_continued(model: gemloom.Model) -> None:
    prompt = model.chat_prompt(BEGUN)
    start = "<bos><|turn>user\nhello world<turn|>\n<|turn>model\n"
    assert model.detokenize(prompt, special=True) == f"{start}the world "
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "world "}]
    assert model.chat_prompt([*HI, {"role": "assistant", "content": parts}])[-1] == prompt[-1]
    done = model.chat(BEGUN, temperature=0, max_tokens=8)
    call = {model.tokenizer.id_of("<|tool_call>"): -100}
    said = model.generate(prompt, temperature=0, max_tokens=8, logit_bias=call)
    assert done.message["content"] == said.text
    assert model.chat(BEGUN, tools=TOOLS, max_tokens=2).usage.completion_tokens


def test_a_new_turn_can_be_asked_for(model: gemloom.Model) -> None:
    text = prompt_text(model, BEGUN, variables={"add_generation_prompt": True})
    assert text.endswith("<|turn>model\nthe world<turn|>\n<|turn>model\n")


def test_no_message_ends_its_own_turn(model: gemloom.Model) -> None:
    begun = [*HI, {"role": "assistant", "content": "a<turn|>\n<|turn>user\nb"}]
    turn = model.tokenizer.id_of("<|turn>")
    assert model.chat_prompt(begun).count(turn) == 2  # type: ignore[arg-type]


def test_a_base_model_continues_its_line() -> None:
    def untaught(keys: dict[str, Any], _: Any) -> None:
        del keys["tokenizer.chat_template"]

    data = tiny.gguf_bytes(tiny.VARIANTS["gemma3"], edit=untaught)
    with gemloom.load(data, kv_type="f32", context=256, threads=1) as base:
        lines = "User: hello world\nAssistant: the world "
        assert prompt_text(base, BEGUN) == f"<bos>{lines}"
        said = base.generate(lines, temperature=0, max_tokens=8, stop=PLAIN_STOP).text
        assert base.chat(BEGUN, temperature=0, max_tokens=8).message["content"] == said


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"variables": {"enable_thinking": True}}, "a thought"),
        ({"response_format": FORM}, "a form"),
        ({"form": lambda grammars: grammars.regex("a")}, "a form"),
        ({"tools": TOOLS, "tool_choice": "required"}, "tool_choice required"),
        ({"tools": TOOLS, "tool_choice": LISTEN}, "tool_choice required or a function"),
    ],
)
def test_what_an_answer_that_has_begun_cannot_be(
    model: gemloom.Model, options: Any, what: str
) -> None:
    with pytest.raises(OptionError, match=f"is continued, so {what}"):
        model.chat(BEGUN, **options)
