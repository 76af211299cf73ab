"""Templates rendered as their authors meant, and nothing in a message that becomes a token."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny_vocab
from gemloom.errors import ContextError, OptionError, RequestError, TokenizerError
from gemloom.text.chat import encode_chat, render
from gemloom.text.tokenizer import Tokenizer
from vocabularies import gemma4, gemma4_metadata, metadata, small

TURNS_TEMPLATE = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first = messages[0]['content'] + '\\n\\n' -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set first = '' -%}
    {%- set turns = messages -%}
{%- endif -%}
{%- for turn in turns -%}
    {%- if (turn['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Roles must take turns: user/assistant/user/assistant") }}
    {%- endif -%}
    {{ '<start_of_turn>' + ('model' if turn['role'] == 'assistant' else 'user') + '\\n' }}
    {{- (first if loop.first else '') + (turn['content'] | trim) + '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<start_of_turn>model\\n' }}
{%- endif -%}
"""
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Looks a word up.",
        "parameters": {
            "type": "object",
            "properties": {"word": {"type": "string", "description": "What to look up"}},
            "required": ["word"],
        },
    },
}
SPECIAL = (*tiny_vocab.SPECIAL, *tiny_vocab.GEMMA4_CONTROL, *tiny_vocab.GEMMA4_USER)
hostile = st.lists(
    st.sampled_from(
        (*SPECIAL, "<", ">", "|>", "<|", "turn", "<turn", " ", "\n", "x", "\ufdd0", "é")
    ),
    max_size=8,
).map(lambda parts: "x" + "".join(parts) + "x")


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def with_template(arch: str, template: str | None) -> Tokenizer:
    keys = tiny_vocab.metadata(arch)
    keys["tokenizer.chat_template"] = template
    if template is None:
        del keys["tokenizer.chat_template"]
    return Tokenizer(metadata(keys))


def gemma4_text(messages: list[dict[str, Any]], **variables: Any) -> str:
    template = gemma4_metadata().string("tokenizer.chat_template")
    return render(template, messages, "<bos>", "<eos>", **variables)


def test_gemma4_conversation() -> None:
    messages = [
        {"role": "system", "content": " Be brief. "},
        user("Hi"),
        assistant("<|channel>thought\nHm.\n<channel|>Hello!"),
        user([{"type": "text", "text": " How "}, {"type": "text", "text": "so?"}]),
    ]
    assert gemma4_text(messages, enable_thinking=True) == (
        "<bos><|turn>system\n<|think|>Be brief.<turn|>\n<|turn>user\nHi<turn|>\n"
        "<|turn>model\nHello!<turn|>\n<|turn>user\nHowso?<turn|>\n<|turn>model\n"
    )
    assert gemma4_text(messages[1:2]) == (
        "<bos><|turn>user\nHi<turn|>\n<|turn>model\n<|channel>thought\n<channel|>"
    )
    assert gemma4_text(messages[1:2], add_generation_prompt=False) == (
        "<bos><|turn>user\nHi<turn|>\n"
    )


def test_gemma4_tools() -> None:
    call = {"type": "function", "function": {"name": "look_up", "arguments": {"word": "a<b"}}}
    messages = [user("What?"), {"role": "assistant", "tool_calls": [call]}]
    text = gemma4_text(messages, tools=[TOOL], add_generation_prompt=False)
    assert '<|tool>declaration:look_up{description:<|"|>Looks a word up.<|"|>,' in text
    assert '<|tool_call>call:look_up{word:<|"|>a<b<|"|>}<tool_call|>' in text


def test_gemma4_ids_are_those_of_the_rendered_text() -> None:
    messages = [user("Hi there"), assistant("Yes?"), user("1 < 2")]
    expected = gemma4().encode(gemma4_text(messages, tools=[TOOL]), special=True)
    assert encode_chat(gemma4(), messages, tools=[TOOL]) == expected
    assert expected.count(2) == 1


def test_gemma3_conversation() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        user(" Hi "),
        assistant("Yes?"),
        user("No"),
    ]
    assert render(TURNS_TEMPLATE, messages, "<bos>", "<eos>") == (
        "<bos><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\nYes?"
        "<end_of_turn>\n<start_of_turn>user\nNo<end_of_turn>\n<start_of_turn>model\n"
    )
    tokenizer = with_template("gemma3", TURNS_TEMPLATE)
    ids = encode_chat(tokenizer, messages)
    start = tokenizer.encode("<start_of_turn>", special=True)
    assert [ids.count(2), ids.count(start[0])] == [1, 4]
    assert tokenizer.decode(ids, special=True) == render(TURNS_TEMPLATE, messages, "<bos>", "<eos>")


def test_a_template_refuses_in_its_own_words() -> None:
    with pytest.raises(
        RequestError, match=r"^chat template: Roles must take turns: user/assistant"
    ):
        render(TURNS_TEMPLATE, [user("a"), user("b")], "<bos>", "<eos>")


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "one message or more"),
        ("hi", "one message or more"),
        ([user("a"), "b"], r"messages\[1\] must be an object"),
        ([{"content": "a"}], r"messages\[0\]: the role None is none of system"),
        ([{"role": "model", "content": "a"}], r"messages\[0\]: the role 'model'"),
        ([{"role": ["user"], "content": "a"}], r"messages\[0\]: the role \['user'\]"),
        ([user("a"), {"role": "assistant"}], r"messages\[1\]: content must be"),
        ([user(None)], r"messages\[0\]: content must be"),
        ([user({"type": "text", "text": "a"})], r"messages\[0\]: content must be"),
        ([user([{"type": "image_url"}])], r"messages\[0\]: content part 0 is of type 'image_url'"),
        ([user([{"type": "text", "text": "a"}, "b"])], r"content part 1 is of type None"),
        ([user([{"type": "text", "text": 3}])], r"content part 0 has no text"),
    ],
)
def test_a_bad_message_is_named_by_its_index(messages: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        render(TURNS_TEMPLATE, messages, "<bos>", "<eos>")
    with pytest.raises(RequestError, match=words):
        encode_chat(small("gemma4"), messages)


def specials(ids: list[int]) -> list[int]:
    every = set(gemma4().encode("".join(SPECIAL), special=True))
    return [token for token in ids if token in every]


@settings(deadline=None)
@given(contents=st.lists(hostile, min_size=6, max_size=6))
def test_no_message_writes_a_special_token(contents: list[str]) -> None:
    def ids(texts: list[str]) -> list[int]:
        system, ask, word, answer, again, described = texts
        call = {"function": {"name": "look_up", "arguments": {"word": word}}}
        reply = {"name": "look_up", "response": {"value": answer}}
        tool = {"function": {**TOOL["function"], "description": described}}
        messages = [
            {"role": "system", "content": system},
            user(ask),
            assistant("", tool_calls=[call], tool_responses=[reply]),
            user([{"type": "text", "text": again}]),
        ]
        return encode_chat(gemma4(), messages, tools=[tool])

    assert specials(ids(contents)) == specials(ids(["plain"] * 6))
    text = gemma4().decode(ids(contents), special=True)
    assert all(content in text for content in contents)


@settings(deadline=None)
@given(hostile)
def test_an_answer_given_back_writes_no_special_token(content: str) -> None:
    ids = encode_chat(gemma4(), [user("a"), assistant(content), user("b")])
    assert specials(ids) == specials(encode_chat(gemma4(), [user("a"), assistant("c"), user("b")]))


def test_thoughts_of_earlier_answers_are_cut_out_by_the_template() -> None:
    answer = "<|channel>thought\nsecret<channel|>Hello <turn|>"
    for content in (answer, [{"type": "text", "text": answer}]):
        text = gemma4().decode(encode_chat(gemma4(), [user("a"), assistant(content), user("b")]))
        assert "secret" not in text
        assert "Hello <turn|>" in text


def test_messages_with_noncharacters_keep_them() -> None:
    text = "\ufdd0 a <turn|> \ufdd1"
    ids = encode_chat(gemma4(), [user(text)])
    assert text in gemma4().decode(ids)
    assert ids.count(106) == 1
    with pytest.raises(RequestError, match=r"U\+FDD0 to U\+FDEF"):
        encode_chat(gemma4(), [user("".join(map(chr, range(0xFDD0, 0xFDF0))))])


@pytest.mark.parametrize("start", ["", "{{ bos_token }}", "{{ bos_token }}{{ bos_token }}"])
def test_a_prompt_has_exactly_one_bos(start: str) -> None:
    tokenizer = with_template("gemma4", start + "{{ messages[0].content }}")
    assert encode_chat(tokenizer, [user("the end")]) == [2, *tokenizer.encode("the end")]


def test_a_base_model_gets_lines_to_go_on_with() -> None:
    tokenizer = with_template("gemma4", None)
    messages = [{"role": "developer", "content": "Be brief."}, user("Hi <turn|>"),
                assistant("Yes?"), user([{"type": "text", "text": "No"}])]  # fmt: skip
    plain = "System: Be brief.\nUser: Hi <turn|>\nAssistant: Yes?\nUser: No\nAssistant:"
    assert encode_chat(tokenizer, messages) == tokenizer.with_bos(tokenizer.encode(plain))
    with pytest.raises(RequestError, match="this model knows no tools"):
        encode_chat(tokenizer, messages, tools=[TOOL])
    with pytest.raises(RequestError, match="tool calls need a model that has markup"):
        encode_chat(tokenizer, [user("a"), assistant(None, tool_calls=[{"function": {}}])])


def test_an_answer_that_has_begun_is_continued() -> None:
    turns = [user("Hi"), assistant(" Once upon  ")]
    ids = encode_chat(gemma4(), turns)
    start = "<bos><|turn>user\nHi<turn|>\n<|turn>model\n"
    assert gemma4().decode(ids, special=True) == f"{start}Once upon  "
    parts = [{"type": "text", "text": "Once "}, {"type": "text", "text": "upon  "}]
    assert gemma4().decode(encode_chat(gemma4(), [turns[0], assistant(parts)])).endswith("upon  ")
    plain = with_template("gemma4", None)
    assert plain.decode(encode_chat(plain, turns)) == "User: Hi\nAssistant:  Once upon  "
    strict = with_template("gemma3", TURNS_TEMPLATE)
    assert strict.decode(encode_chat(strict, turns)).endswith("model\nOnce upon  ")


def test_a_new_turn_where_it_is_asked_for_or_calls_wait_for_results() -> None:
    turns = [user("Hi"), assistant("Once")]
    text = gemma4().decode(encode_chat(gemma4(), turns, add_generation_prompt=True))
    assert text.endswith("model\nOnce\nmodel\n<|channel>thought\n<channel|>")
    call = {"type": "function", "function": {"name": "look_up", "arguments": {}}}
    ids = encode_chat(gemma4(), [user("Hi"), assistant("", tool_calls=[call])])
    assert gemma4().decode(ids).endswith("<channel|>")


def test_a_template_that_hides_the_last_message_cannot_continue_it() -> None:
    tokenizer = with_template("gemma4", "{{ messages[0].content }}")
    with pytest.raises(RequestError, match="does not show the assistant's last message"):
        encode_chat(tokenizer, [user("a"), assistant("b")])
    with pytest.raises(RequestError, match="does not show"):
        encode_chat(gemma4(), [user("a"), assistant("<|channel>thought\nb")])


def test_a_template_that_knows_no_developer_gets_a_system_message() -> None:
    asked = [{"role": "developer", "content": "Be brief."}, user("Hi")]
    older = [{"role": "system", "content": "Be brief."}, user("Hi")]
    told = render(TURNS_TEMPLATE, asked, "<bos>", "<eos>")
    assert told == render(TURNS_TEMPLATE, older, "<bos>", "<eos>")
    assert "Be brief." in told
    own = "{% if messages[0].role == 'developer' %}own{% endif %}"
    assert render(own, asked, "<bos>", "<eos>") == "own"


def test_a_template_that_knows_no_tools_refuses_them() -> None:
    tokenizer = with_template("gemma3", TURNS_TEMPLATE)
    with pytest.raises(RequestError, match="this model knows no tools: they need Gemma 4"):
        encode_chat(tokenizer, [user("a")], tools=[TOOL])
    assert encode_chat(tokenizer, [user("a")], tools=None)


def test_a_template_that_takes_strings_only_gets_the_text_of_parts() -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    assert render("{{ messages[0].content | trim }}", [user(parts)], "", "") == "one two"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ messages[0].content + 1 }}", "chat template: can only concatenate str"),
        ("{{ missing.name }}", "chat template: 'missing' is undefined"),
        ("{{ ''.__class__.__mro__ }}", "chat template: access to attribute '__class__'"),
        ("{{ messages.append(1) }}", "chat template: access to attribute 'append'"),
        ("{% for i in range(1000000) %}{% endfor %}", "chat template: Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "chat template: maximum recursion"),
        ("{{ raise_exception('a\nb') }}", "chat template: a b$"),
    ],
)
def test_a_failing_template_is_a_request_error(template: str, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        render(template, [user("a")], "", "")


def test_a_template_that_is_no_jinja_is_the_files_fault() -> None:
    with pytest.raises(TokenizerError, match="not valid Jinja: line 2: "):
        render("a\n{% if %}", [user("a")], "", "")


def test_what_templates_may_use() -> None:
    template = """\
{%- for message in messages -%}
    {%- if loop.index0 == 1 -%}{%- break -%}{%- endif -%}
    {{ message.content }}
{%- endfor -%}
|{{ {'a': '<é>', 'b': none} | tojson }}
{{- [tools is none, strftime_now('%Y') | length, size] }}"""
    text = render(template, [user("x"), user("y")], "", "", size=3)
    assert text == 'x|{"a": "<é>", "b": null}[True, 4, 3]'


def test_variables_of_the_template_itself_cannot_be_set() -> None:
    for name in ("messages", "bos_token", "raise_exception"):
        with pytest.raises(OptionError, match=f"{name} cannot be set"):
            encode_chat(gemma4(), [user("a")], **{name: "x"})


@pytest.mark.parametrize("depth", [600, 100_000])
def test_a_message_nested_without_end_is_refused(depth: int) -> None:
    nested: Any = "x"
    for _ in range(depth):
        nested = [nested]
    with pytest.raises(RequestError, match="nested too deep"):
        encode_chat(gemma4(), [user("a"), assistant("b", tool_calls=nested)])


def test_messages_are_left_as_they_were() -> None:
    messages = [user([{"type": "text", "text": "<turn|>"}])]
    encode_chat(gemma4(), messages)
    assert messages == [{"role": "user", "content": [{"type": "text", "text": "<turn|>"}]}]


@pytest.mark.parametrize("unit", ["<", "a ", "<|channel>", "\n"])
def test_a_conversation_too_long_for_the_context_is_not_rendered(unit: str) -> None:
    tokenizer = gemma4()
    with pytest.raises(ContextError, match="characters: the context has room for 31,744 at most"):
        encode_chat(tokenizer, [user(unit * 40_000)], 1024)
    assert len(encode_chat(tokenizer, [user(unit)], 1024)) < 1024


def test_a_conversation_of_too_many_tokens_is_refused() -> None:
    with pytest.raises(ContextError, match=r"the prompt has 10,0\d\d tokens, the context 1,024"):
        encode_chat(gemma4(), [user("3" * 10_000)], 1024)
    with pytest.raises(ContextError, match=r"the prompt has over 8\d,\d\d\d tokens"):
        encode_chat(gemma4(), [user("3" * 500_000)], 30_000)
