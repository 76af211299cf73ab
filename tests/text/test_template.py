"""A template has what transformers offers it; one that no chat can be made with is told at load."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import gemloom
import tiny
import tiny_vocab
from gemloom.errors import TokenizerError
from gemloom.text.chat import encode_chat, render
from gemloom.text.template import check, named
from gemloom.text.tokenizer import Tokenizer
from vocabularies import gemma4_metadata, metadata

KEY = "tokenizer.chat_template"
TALK = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
]
GENERATION = """\
{%- for message in messages -%}
    {%- if message.role == 'assistant' -%}
        [{% generation %}{{ message.content }}{% endgeneration %}]
    {%- else -%}
        {{ message.content }}
    {%- endif -%}
{%- endfor -%}
"""


def text(template: str, **variables: Any) -> str:
    return render(template, TALK, "<bos>", "<eos>", **variables)


def test_generation_renders_what_is_in_it() -> None:
    assert text(GENERATION) == "a[b]c"
    plain = GENERATION.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    assert text(plain) == text(GENERATION)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% for m in messages %}{% generation %}{{ loop.index }}{% endgeneration %}{% endfor %}",
         "123"),
        ("{% for m in messages %}{%- generation -%} {{ m.content }} {%- endgeneration -%}"
         "{% endfor %}", "abc"),
        ("{% for m in messages %}{% generation %}{% if loop.first %}{% continue %}{% endif %}"
         "{{ m.content }}{% endgeneration %}{% endfor %}", "bc"),
        ("{% for m in messages %}{% generation %}{% if loop.index == 2 %}{% break %}{% endif %}"
         "{{ m.content }}{% endgeneration %}{% endfor %}", "a"),
        ("{% generation %}{% for m in messages %}{% generation %}{{ m.content }}"
         "{% endgeneration %}{% endfor %}{% endgeneration %}", "abc"),
        ("{% macro say(x) %}{% generation %}<{{ x }}>{% endgeneration %}{% endmacro %}"
         "{{ say('y') }}", "<y>"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% generation %}"
         "{% set ns.n = ns.n + 1 %}{% endgeneration %}{% endfor %}{{ ns.n }}", "3"),
        ("{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}", "21"),
        ("{% generation %}\n  {% if true %}\n  x\n  {% endif %}\n{% endgeneration %}\ny", "  x\ny"),
        ("{% generation %}{% endgeneration %}{{ generation is defined }}", "False"),
    ],
)  # fmt: skip
def test_generation_anywhere(template: str, expected: str) -> None:
    """As the tag of transformers: a scope of its own that adds nothing."""
    assert text(template) == expected


@given(
    value=st.dictionaries(st.text(max_size=4), st.integers() | st.text(max_size=4), max_size=3),
    ascii_only=st.booleans(),
    indent=st.sampled_from((None, 0, 2)),
    separators=st.sampled_from((None, (",", ":"))),
    sort=st.booleans(),
)
def test_tojson_with_all_its_options(
    value: dict[str, Any], ascii_only: bool, indent: int | None, separators: Any, sort: bool
) -> None:
    template = "{{ x | tojson(ensure_ascii=a, indent=i, separators=s, sort_keys=k) }}"
    given_options = {"a": ascii_only, "i": indent, "s": separators, "k": sort}
    expected = json.dumps(
        value, ensure_ascii=ascii_only, indent=indent, separators=separators, sort_keys=sort
    )
    assert text(template, x=value, **given_options) == expected
    assert text("{{ x | tojson(indent=i) }}", x=value, i=indent) == json.dumps(
        value, ensure_ascii=False, indent=indent
    )


# -- at load ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("a\n{% if %}", "not valid Jinja: line 2: "),
        ("{% generation %}", "not valid Jinja: line 1: Unexpected end of template"),
        ("{% training %}x{% endtraining %}", "line 1: Encountered unknown tag 'training'"),
        ("{{ messages | no_such_filter }}", "line 1: No filter named 'no_such_filter'"),
        ("{{ no_such_function(messages) }}", "'no_such_function' is undefined"),
        ("{{ messages.append(1) }}", "access to attribute 'append'"),
        ("{% for i in range(1000000) %}{% endfor %}", "Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion"),
    ],
)
@pytest.mark.parametrize("key", [KEY, f"{KEY}.tool_use"])
def test_a_template_that_no_chat_can_be_made_with_fails_at_load(
    key: str, template: str, words: str
) -> None:
    def edit(keys: dict[str, Any], _: Any) -> None:
        keys[key] = template

    data = tiny.gguf_bytes(tiny.VARIANTS["e2b"], edit=edit)
    with pytest.raises(TokenizerError, match=r"chat template") as caught:
        gemloom.load(data, threads=1, context=64)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('only with tools') }}",
        "{{ messages[1].content }}",  # a system message is needed
        "{{ messages[0].content[0].text }}",  # content in parts alone
        "{% if messages[0].role != 'system' %}{{ undefined.name }}{% endif %}",
        tiny_vocab.GEMMA3_TEMPLATE,
        tiny_vocab.GEMMA4_TEMPLATE,
        GENERATION,
        "",
    ],
)
def test_a_template_that_takes_some_chats_is_taken(template: str) -> None:
    check(template, "x.gguf")


def test_the_real_one_is_taken() -> None:
    check(gemma4_metadata().string(KEY), "x.gguf")


# -- several ---------------------------------------------------------------------------------


def tokenizer(**templates: str) -> Tokenizer:
    keys = tiny_vocab.metadata("gemma4")
    del keys[KEY]
    keys |= {KEY if name == "plain" else f"{KEY}.{name}": t for name, t in templates.items()}
    return Tokenizer(metadata(keys))


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    ("templates", "chat", "with_tools"),
    [
        ({"plain": "1"}, "1", "1"),
        ({"default": "2"}, "2", "2"),
        ({"plain": "1", "default": "2"}, "1", "1"),
        ({"plain": "1", "tool_use": "{{ tools[0].function.name }}"}, "1", "f"),
        ({"default": "2", "tool_use": "3", "rag": "4"}, "2", "3"),
        ({"tool_use": "3"}, "3", "3"),
        ({"rag": "4", "other": "5"}, "5", "5"),
        ({"plain": "", "default": "2"}, "2", "2"),
    ],
)
def test_named_templates(templates: dict[str, str], chat: str, with_tools: str) -> None:
    """The one for tools is taken where there are tools, as transformers does."""
    made = tokenizer(**templates)
    for options, expected in (({}, chat), ({"tools": [TOOL]}, with_tools)):
        ids = encode_chat(made, TALK, **options)
        assert made.decode(ids[1:]) == expected


def test_a_named_template_that_is_no_text_is_named() -> None:
    with pytest.raises(TokenizerError, match=r"chat_template\.rag must be a string"):
        tokenizer(rag=3)  # type: ignore[arg-type]


def test_names_of_templates() -> None:
    keys = {f"{KEY}s": ["tool_use"], f"{KEY}.tool_use": "b", KEY: "a", "other": "c"}
    assert named(metadata(keys)) == {"default": "a", "tool_use": "b"}
    assert named(metadata({})) == {}
