"""A file without a vocabulary takes ids and gives ids; what needs text is refused in one line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gemloom
import tiny
from command_line import call, fine, write
from conftest import Load, prompt
from gemloom.errors import RequestError, TokenizerError

Edit = Callable[[dict[str, Any], Any], None]
KEY = "tokenizer.ggml."
PROMPT = prompt(9)
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 8}


def nothing(keys: dict[str, Any], _: Any) -> None:
    """No key of a tokenizer at all."""
    for key in [key for key in keys if key.startswith("tokenizer.")]:
        del keys[key]


def said(keys: dict[str, Any], _: Any) -> None:
    """As llama.cpp's converter marks it, with the ends that may be named still."""
    nothing(keys, _)
    keys[KEY + "model"] = "no_vocab"
    keys[KEY + "eos_token_id"] = 1


def of(edit: Edit, variant: str = "e2b") -> gemloom.Model:
    data = tiny.gguf_bytes(tiny.VARIANTS[variant], edit=edit)
    return gemloom.load(data, threads=1, context=64, kv_type="f32")


@pytest.mark.parametrize("edit", [nothing, said])
@pytest.mark.parametrize("variant", ["e2b", "gemma3"])
def test_ids_go_in_and_come_out_as_with_a_vocabulary(load: Load, variant: str, edit: Edit) -> None:
    whole = load(variant, context=64)
    bias = {"logit_bias": dict.fromkeys(whole.tokenizer.eog, -100)}
    with of(edit, variant) as model:
        wanted, got = (m.generate(PROMPT, **GREEDY, **bias) for m in (whole, model))
        assert got.tokens == wanted.tokens
        assert got.text == ""
        assert (got.finish_reason, got.usage.completion_tokens) == ("length", 8)
        np.testing.assert_array_equal(model.logits(PROMPT), whole.logits(PROMPT))
        np.testing.assert_array_equal(model.embed(PROMPT), whole.embed(PROMPT))
        assert model.trace(PROMPT, ["output_norm"])["output_norm"].shape[0] == len(PROMPT)


def test_pieces_have_a_token_and_no_text() -> None:
    with of(nothing) as model:
        pieces = list(model.stream(PROMPT, **GREEDY, logprobs=2))
        assert [piece.text for piece in pieces] == [""] * len(pieces)
        assert [piece.token for piece in pieces] == model.generate(PROMPT, **GREEDY).tokens
        assert len(pieces[0].top_logprobs) == 2


def test_it_ends_where_the_file_says() -> None:
    with of(said) as model:
        assert model.tokenizer.eog == {1}
        done = model.generate(PROMPT, logit_bias={1: 100}, max_tokens=9)
        assert (done.tokens, done.finish_reason) == ([1], "stop")
    with of(nothing) as model:
        assert model.tokenizer.eog == frozenset()


def test_an_id_outside_the_table_is_refused() -> None:
    with of(nothing) as model, pytest.raises(RequestError, match="not a token id of this model"):
        model.generate([tiny.VARIANTS["e2b"].n_vocab])


CHAT = [{"role": "user", "content": "a"}]
TEXT: dict[str, Callable[[gemloom.Model], Any]] = {
    "generate": lambda model: model.generate("a"),
    "stream": lambda model: model.stream("a"),
    "stop": lambda model: model.stream(PROMPT, stop="a"),
    "chat": lambda model: model.chat(CHAT),
    "prompt": lambda model: model.chat_prompt(CHAT),
    "embed": lambda model: model.embed("a"),
    "tokenize": lambda model: model.tokenize("a"),
    "detokenize": lambda model: model.detokenize([2]),
    "grammars": lambda model: model.grammars,
}


def test_all_that_needs_text_is_refused() -> None:
    with of(nothing) as model:
        for name, use in TEXT.items():
            with pytest.raises(RequestError, match="has no vocabulary: ") as caught:
                use(model)
            assert "\n" not in str(caught.value), name
        assert model.stats().running == 0
        assert model.generate(PROMPT, **GREEDY).tokens


@pytest.mark.parametrize(
    "command", [("serve", "--port", "0"), ("chat", "hello"), ("run", "hello"), ("tokenize", "a")]
)
def test_commands_refuse_it_in_one_line(tmp_path: Path, command: tuple[str, ...]) -> None:
    path = write(tmp_path, edit=nothing)
    name, *rest = command
    result = call(name, path, *rest)
    assert result.exit_code == 1
    assert "has no vocabulary" in " ".join(result.stderr.split())
    assert "Traceback" not in result.output


def test_inspect_says_so(tmp_path: Path) -> None:
    path = write(tmp_path, edit=said)
    text = " ".join(fine("inspect", path).stdout.split())
    assert "has no vocabulary: it takes and gives token ids only" in text
    assert fine("bench", path, "--prompt", "8", "--generate", "4", "--threads", "1").stdout


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("eos_token_id", 10**6, "eos_token_id is 1,000,000, but there are"),
        ("eot_token_id", "one", "eot_token_id must be integers"),
        ("model", "gemma4", "tokenizer.ggml.tokens is missing"),
    ],
)
def test_a_vocabulary_that_is_broken_is_not_absent(key: str, value: Any, words: str) -> None:
    def edit(keys: dict[str, Any], _: Any) -> None:
        said(keys, _)
        keys[KEY + key] = value

    with pytest.raises(TokenizerError, match=words):
        of(edit)
