"""OpenAI's messages and tools as templates read them, and no special token out of any of it."""

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny_vocab
from gemloom.errors import OptionError, RequestError
from gemloom.text.chat import encode_chat, render
from gemloom.text.conversation import prepare, reasoning_budget, starts_reasoning, variables
from gemloom.text.markup import is_bare
from gemloom.text.router import Router, ToolCall
from gemloom.text.tokenizer import Tokenizer
from gemloom.text.tools import MAX_NAME, MAX_TOOLS, check_tools
from vocabularies import gemma4_metadata, metadata

# In the markup of Gemma 4: one model turn from a question to its answer, tool results inside it.
TEMPLATE = """\
{%- macro value(given) -%}
    {%- if given is none -%}null
    {%- elif given is string -%}<|"|>{{ given }}<|"|>
    {%- elif given is boolean -%}{{ 'true' if given else 'false' }}
    {%- elif given is mapping -%}{{ '{' }}{{ fields(given) }}{{ '}' }}
    {%- elif given is sequence -%}[
        {%- for item in given %}{{ value(item) }}{{ ',' if not loop.last }}{% endfor -%}]
    {%- else -%}{{ given }}
    {%- endif -%}
{%- endmacro -%}
{%- macro fields(given) -%}
    {%- for key, item in given | dictsort -%}
        {{ key }}:{{ value(item) }}{{ ',' if not loop.last }}
    {%- endfor -%}
{%- endmacro -%}
{%- set turn = namespace(open=false) -%}
{{ bos_token }}
{%- if tools or enable_thinking -%}
    <|turn>system{{ '\\n' }}
    {%- if enable_thinking -%}<|think|>{{ '\\n' }}{%- endif -%}
    {%- for tool in tools or [] -%}
        <|tool>declaration:{{ tool.function.name }}{{ '{' }}{{ fields({
            'description': tool.function.description, 'parameters': tool.function.parameters
        }) }}{{ '}' }}<tool|>
    {%- endfor -%}
    <turn|>{{ '\\n' }}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role == 'tool' -%}
        {%- set text = message.content if message.content is string
            else message.content | map(attribute='text') | join -%}
        <|tool_response>response:{{ message.name }}{{ '{' }}{{ fields({'value': text}) }}{{ '}' }}
        {{- '<tool_response|>' }}
    {%- else -%}
        {%- if turn.open and message.role != 'assistant' -%}
            <turn|>{{ '\\n' }}
            {%- set turn.open = false -%}
        {%- endif -%}
        {%- if not turn.open -%}
            <|turn>{{ 'model' if message.role == 'assistant' else message.role }}{{ '\\n' }}
        {%- endif -%}
        {%- set turn.open = message.role == 'assistant' -%}
        {%- if message.get('reasoning') -%}
            <|channel>thought{{ '\\n' + message.reasoning_content + '\\n' }}<channel|>
        {%- endif -%}
        {%- for call in message.tool_calls or [] -%}
            <|tool_call>call:{{ call.function.name }}{{ '{' }}{{ fields(call.function.arguments) }}
            {{- '}' }}<tool_call|>
        {%- endfor -%}
        {%- if message.content is string -%}
            {{ message.content.split('<channel|>')[-1] | trim }}
        {%- else -%}
            {%- for part in message.content if part.type == 'text' -%}{{ part.text }}{%- endfor -%}
        {%- endif -%}
        {%- if not turn.open -%}<turn|>{{ '\\n' }}{%- endif -%}
    {%- endif -%}
{%- endfor -%}
{%- if not turn.open -%}<|turn>model{{ '\\n' }}
{%- elif enable_thinking -%}<|channel>thought{{ '\\n' }}
{%- endif -%}
"""
MARKUP = (*tiny_vocab.SPECIAL, *tiny_vocab.GEMMA4_CONTROL, *tiny_vocab.GEMMA4_USER)
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tells the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def tokenizer() -> Tokenizer:
    return Tokenizer(
        metadata({**tiny_vocab.metadata("gemma4"), "tokenizer.chat_template": TEMPLATE})
    )


GEMMA = tokenizer()


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def calling(arguments: Any, name: str = "get_weather", call_id: str = "c1", **more: Any) -> Any:
    function = {"name": name, "arguments": arguments}
    call = {"id": call_id, "type": "function", "function": function}
    return {"role": "assistant", "content": None, "tool_calls": [call], **more}


def result(content: Any, call_id: str = "c1") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": content}


def rendered(messages: list[dict[str, Any]], **given: Any) -> str:
    return render(TEMPLATE, prepare(messages), "<bos>", "<eos>", **given)


def prompt(messages: list[dict[str, Any]], **given: Any) -> str:
    """The prompt's text by way of its ids, in which a guard would show."""
    return GEMMA.decode(encode_chat(GEMMA, prepare(messages), **given), special=True)


def test_a_conversation_with_tools() -> None:
    messages = [
        user("Paris?"),
        calling('{"city": "Paris", "days": 2}', reasoning_content="Look it up."),
        result("sunny"),
    ]
    expected = (
        '<bos><|turn>system\n<|think|>\n<|tool>declaration:get_weather{description:<|"|>Tells the'
        ' weather.<|"|>,parameters:{properties:{city:{type:<|"|>string<|"|>}},type:<|"|>object<|"|>'
        "}}<tool|><turn|>\n<|turn>user\nParis?<turn|>\n<|turn>model\n"
        "<|channel>thought\nLook it up.\n<channel|>"
        '<|tool_call>call:get_weather{city:<|"|>Paris<|"|>,days:2}<tool_call|>'
        '<|tool_response>response:get_weather{value:<|"|>sunny<|"|>}<tool_response|>'
        "<|channel>thought\n"
    )
    given = {"tools": check_tools([WEATHER]), **variables(reasoning_effort="high")}
    assert rendered(messages, **given) == prompt(messages, **given) == expected
    assert starts_reasoning(expected)


def test_a_call_goes_out_as_it_came_in() -> None:
    arguments = {"city": 'The "<|turn>" of {a,b}', "n": [1, -1.5e3, None, True], "o": {"p": {}}}
    text = rendered([user("a"), calling(json.dumps(arguments))])
    router = Router()
    [call] = [part for part in router.push(text) + router.flush() if isinstance(part, ToolCall)]
    assert (call.name, json.loads(call.arguments)) == ("get_weather", arguments)


PIECES = (*MARKUP, "<", ">", "|>", "<|", "turn", "{", "}", '"', "\n", " ", "\ufdd0", "é")
hostile = st.lists(st.sampled_from(PIECES)).map(lambda parts: "x" + "".join(parts) + "x")


def without_thought(text: str) -> str:
    return text.replace("<|channel>", "").replace("<channel|>", "")


def told(text: str, key: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A conversation with ``text`` wherever a caller or a tool can put one, and its variables."""
    tool = {"name": "f", "description": text, "parameters": {
        "type": "object", "properties": {key: {"type": "string", "enum": [text]}},
    }}  # fmt: skip
    messages = [
        {"role": "developer", "content": text},
        {**user([{"type": "input_text", "text": text}]), "name": text},
        calling(
            json.dumps({key: text, "more": [{key: text}]}),
            name=text,
            call_id=text,
            reasoning=text,
        ),
        result([{"type": "text", "text": text}], call_id=text),
        calling({"a": text}),
        result(text),
        {"role": "assistant", "content": without_thought(text), "reasoning_content": text},
        user(text),
    ]
    return messages, {"tools": [{"type": "function", "function": tool}], "more": text}


def specials(ids: list[int]) -> list[int]:
    every = set(GEMMA.encode("".join(MARKUP), special=True))
    return [token for token in ids if token in every]


@settings(deadline=None)
@given(hostile, hostile)
def test_no_text_writes_a_special_token(text: str, key: str) -> None:
    def ids(text: str, key: str) -> list[int]:
        messages, given = told(text, key)
        return encode_chat(GEMMA, prepare(messages), **given)

    alike = "word" if is_bare(key) else "wo:rd"
    assert specials(ids(text, key)) == specials(ids("plain", alike))
    often = GEMMA.decode(ids("plain", "word")).count("plain")
    assert GEMMA.decode(ids(text, key)).count(text) >= often - (without_thought(text) != text)


@pytest.mark.parametrize("marker", ["<turn|>", "<|tool_call>", "<|channel>thought\n", '<|"|>'])
def test_a_result_and_an_argument_stay_letters(marker: str) -> None:
    def ids(text: str) -> list[int]:
        messages = [user("a"), calling(json.dumps({"city": text})), result(text)]
        return encode_chat(GEMMA, prepare(messages))

    assert specials(ids(f"a{marker}b")) == specials(ids("ab"))
    assert f'{{city:<|"|>a{marker}b<|"|>}}' in GEMMA.decode(ids(f"a{marker}b"), special=True)
    letters = GEMMA.encode(f"a{marker}b")
    joined = ids(f"a{marker}b")
    found = [at for at in range(len(joined)) if joined[at : at + len(letters)] == letters]
    assert len(found) == 2


def test_the_first_gemma_4_template_gets_results_in_the_message_with_the_calls() -> None:
    template = gemma4_metadata().string("tokenizer.chat_template")
    two = calling('{"city": "Paris"}')
    two["tool_calls"].append({**calling("", name="now", call_id="c2")["tool_calls"][0]})
    messages = [
        user("Paris?"), two, result("sunny"), result([{"type": "text", "text": "noon"}], "c2"),
    ]  # fmt: skip
    turn = (
        "<bos><|turn>user\nParis?<turn|>\n<|turn>model\n"
        '<|tool_call>call:get_weather{city:<|"|>Paris<|"|>}<tool_call|><|tool_call>call:now{}<tool_call|>'
        '<|tool_response>response:get_weather{value:<|"|>sunny<|"|>}<tool_response|>'
        '<|tool_response>response:now{value:<|"|>noon<|"|>}<tool_response|>'
    )
    empty = "<|channel>thought\n<channel|>"
    assert render(template, prepare(messages), "<bos>", "<eos>") == turn + empty
    answered = [*messages, {"role": "assistant", "content": "Sunny."}, user("And now?")]
    assert render(template, prepare(answered), "<bos>", "<eos>") == (
        f"{turn}Sunny.<turn|>\n<|turn>user\nAnd now?<turn|>\n<|turn>model\n{empty}"
    )


def test_a_template_with_a_role_for_tools_keeps_their_messages() -> None:
    template = "{% for m in messages %}{{ m.role }} {{ m.name }} {{ m.content }};{% endfor %}"
    for more in ("", "{# tool_responses, or the tool_call_id of a message #}"):
        text = render(template + more, prepare([user("a"), calling("{}"), result("b")]), "", "")
        assert text == "user  a;assistant  ;tool get_weather b;"


def test_what_is_given_stays_as_it_was() -> None:
    messages = [
        user([{"type": "input_text", "text": "a"}]),
        calling('{"city": "Paris"}', reasoning="b"),
        result([{"type": "output_text", "text": "c"}]),
    ]
    tools = [copy.deepcopy(WEATHER)]
    before = copy.deepcopy((messages, tools))
    ready, declared = prepare(messages), check_tools(tools)
    ready[1]["tool_calls"][0]["function"]["arguments"]["city"] = "Rome"
    ready[0]["content"][0]["text"] = declared[0]["function"]["name"] = "changed"
    assert (messages, tools) == before


@pytest.mark.parametrize("given", [None, "", "{}", " {} ", {}])
def test_no_arguments(given: Any) -> None:
    [_, message] = prepare([user("a"), calling(given)])
    assert message["tool_calls"][0]["function"]["arguments"] == {}


def test_parts_are_text_and_a_thought_has_both_names() -> None:
    parts = [{"type": kind, "text": kind} for kind in ("text", "input_text", "output_text")]
    [first, second, third, last] = prepare(
        [
            user(parts),
            {"role": "assistant", "content": None, "reasoning": "a"},
            {"role": "assistant", "content": "b", "reasoning_content": "c", "reasoning": None},
            {**user("d"), "reasoning": "e"},
        ]
    )
    assert first["content"] == [{**part, "type": "text"} for part in parts]
    assert second == {
        "role": "assistant", "content": "", "reasoning": "a", "reasoning_content": "a",
    }  # fmt: skip
    assert (third["reasoning"], third["reasoning_content"]) == ("c", "c")
    assert "reasoning" not in last


@pytest.mark.parametrize("content", [None, [], ""])
def test_an_answer_or_a_result_without_content_is_empty_text(content: Any) -> None:
    bare = {"role": "assistant"}
    history = [user("a"), calling("{}"), result(content), {**bare, "content": content}, user("b")]
    ready = prepare(history)
    assert [message["content"] for message in ready] == ["a", "", "", "", "b"]
    without = [{k: v for k, v in m.items() if v is not content} for m in history]
    if content is None:
        assert [message["content"] for message in prepare(without)] == ["a", "", "", "", "b"]
    assert prompt(history) == prompt(prepare(history))


def test_an_answer_after_results_is_continued() -> None:
    template = gemma4_metadata().string("tokenizer.chat_template")
    begun = {"role": "assistant", "content": "It is "}
    messages = [user("Paris?"), calling('{"city": "Paris"}'), result("sunny"), begun]
    own = Tokenizer(
        metadata({**tiny_vocab.metadata("gemma4"), "tokenizer.chat_template": template})
    )
    for tokenizer in (GEMMA, own):
        text = tokenizer.decode(encode_chat(tokenizer, prepare(messages)), special=True)
        assert text.endswith('{value:<|"|>sunny<|"|>}<tool_response|>It is ')


def test_a_result_is_found_by_id_or_else_by_name() -> None:
    two = calling("{}", name="f", call_id="c1")
    two["tool_calls"] += calling("{}", name="g", call_id="c2")["tool_calls"]
    by_name = {"role": "tool", "name": "f", "content": "d"}
    ready = prepare([two, result("a", "c2"), result("b", "c1"), by_name])
    assert [message["name"] for message in ready[1:]] == ["g", "f", "f"]


DEEP = '{"a":' + "[" * 100_000 + "]" * 100_000 + "}"


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        (None, "one message or more"),
        ([], "one message or more"),
        ("a", "one message or more"),
        ([user("a"), 3], r"messages\[1\] must be an object"),
        ([{"role": "robot", "content": "a"}], r"messages\[0\]: the role 'robot'"),
        ([user(None)], r"messages\[0\]: content must be"),
        ([user([{"type": "image_url"}])], r"content part 0 is of type 'image_url'"),
        ([user([{"type": "input_text"}])], r"content part 0 has no text"),
        ([calling("[1]")], r"tool_calls\[0\]\.function\.arguments is not a JSON object"),
        ([calling("{a:1}")], r"messages\[0\]: tool_calls\[0\]\.function\.arguments"),
        ([calling('{"a": NaN}')], r"messages\[0\]: tool_calls\[0\]\.function\.arguments"),
        ([calling(DEEP)], r"messages\[0\]: tool_calls\[0\]\.function\.arguments"),
        ([calling(3)], r"messages\[0\]: tool_calls\[0\]\.function\.arguments"),
        ([calling("{}", name=None)], r"messages\[0\]: tool_calls\[0\] has no function with a name"),
        ([{**calling("{}"), "tool_calls": [3]}], r"tool_calls\[0\] has no function"),
        ([{**calling("{}"), "tool_calls": {"a": 1}}], r"tool_calls must be a list"),
        ([{**calling("{}"), "role": "user"}], r"messages\[0\]: only an assistant's message"),
        ([{**calling("{}"), "reasoning": 3}], r"messages\[0\]: reasoning must be a string"),
        ([user("a"), result("b")], r"messages\[1\]: .* no call with the id 'c1'"),
        ([calling("{}"), result("b", "c2")], r"messages\[1\]: .* no call with the id 'c2'"),
        ([calling("{}"), user("a"), result("b")], r"messages\[2\]: .* no call with the id 'c1'"),
        ([calling("{}"), {"role": "tool", "content": "b"}], r"messages\[1\]: .* the id None"),
        ([{"role": "system", "content": None}], r"messages\[0\]: content must be"),
        ([calling("{}"), result(3)], r"messages\[1\]: content must be"),
        ([{"role": "assistant", "content": 0}], r"messages\[0\]: content must be"),
    ],
)
def test_a_bad_message_is_named_by_its_index(messages: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        prepare(messages)


def test_variables() -> None:
    assert variables() == {}
    for effort in ("none", "minimal"):
        assert variables(reasoning_effort=effort) == {"enable_thinking": False}
    for effort in ("low", "medium", "high", "xhigh", "max"):
        assert variables(reasoning_effort=effort) == {"enable_thinking": True}
    for effort in ("auto", "default"):  # the template's own way
        assert variables(reasoning_effort=effort) == {}
    own = {"enable_thinking": False, "style": "x"}
    assert variables(reasoning_effort="low", chat_template_kwargs=own) == own
    assert variables(enable_thinking=True, reasoning_effort="none", chat_template_kwargs=own) == {
        "enable_thinking": True, "style": "x",
    }  # fmt: skip
    assert own == {"enable_thinking": False, "style": "x"}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"reasoning_effort": "much"}, "reasoning_effort is 'much': take one of none, minimal"),
        ({"reasoning_effort": ["low"]}, "reasoning_effort is"),
        ({"enable_thinking": "false"}, "enable_thinking is 'false': take true or false"),
        ({"chat_template_kwargs": {"enable_thinking": 1}}, "enable_thinking is 1"),
        ({"chat_template_kwargs": {"tools": []}}, "cannot set tools"),
        ({"chat_template_kwargs": [1]}, "must be an object"),
        ({"chat_template_kwargs": {1: 2}}, "must be an object"),
    ],
)
def test_bad_variables(given: Any, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        variables(**given)


def test_reasoning_budget() -> None:
    efforts = [None, "none", "low", "medium", "high"]
    assert [reasoning_budget(effort) for effort in efforts] == [None, None, 256, 1024, None]
    with pytest.raises(OptionError, match="'lots'"):
        reasoning_budget("lots")


def function(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **fields}}


def test_tools_as_templates_want_them() -> None:
    assert check_tools([]) == []
    assert check_tools([WEATHER]) == [WEATHER]
    bare = [function(), function(name="g.h-1_", parameters=None, description=None)]
    assert [tool["function"] for tool in check_tools(bare)] == [
        {"name": "f", "description": ""}, {"name": "g.h-1_", "description": ""},
    ]  # fmt: skip
    template = gemma4_metadata().string("tokenizer.chat_template")
    text = render(template, [user("a")], "", "", tools=check_tools(bare))
    assert '<|tool>declaration:f{description:<|"|><|"|>}<tool|>' in text
    assert len(check_tools([function(name=f"f{i}") for i in range(MAX_TOOLS)])) == MAX_TOOLS


@pytest.mark.parametrize(
    ("tools", "words"),
    [
        ("f", "tools must be a list"),
        ([function(), 3], r"tools\[1\] is not a tool"),
        ([{"type": "function"}], r"tools\[0\] is not a tool"),
        ([{"function": {"name": "f"}}], r"tools\[0\] is not a tool"),
        ([{**function(), "type": "web_search"}], r"tools\[0\] is not a tool"),
        ([function(name=None)], r"tools\[0\]: the name None is not"),
        ([function(name="a b")], r"tools\[0\]: the name 'a b' is not"),
        ([function(name="f\n")], r"tools\[0\]: the name"),
        ([function(name="é")], r"tools\[0\]: the name"),
        ([function(name="a" * (MAX_NAME + 1))], r"tools\[0\]: the name"),
        ([function(), function()], r"tools\[1\]: the name 'f' is taken"),
        ([function(description=3)], r"tools\[0\]: the description"),
        ([function(parameters=[1])], r"tools\[0\]: the parameters"),
        ([function(parameters={"type": "string"})], r"tools\[0\]: the parameters"),
        ([function(parameters={"properties": {}})], r"tools\[0\]: the parameters"),
        ([function(parameters={"type": "object", "properties": 3})], r"tools\[0\]: the properties"),
        ([function(name=f"f{i}") for i in range(MAX_TOOLS + 1)], "1,025 tools: at most 1,024"),
    ],
)
def test_a_bad_tool_is_named_by_its_index(tools: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        check_tools(tools)


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        ("", False),
        ("<|turn>model\n", False),
        ("<|turn>model\n<|channel>thought\n<channel|>", False),
        ("<|turn>model\n<|channel>thought\n", True),
        ("<|turn>model\n<|channel>thought\nso far", True),
        ("<|turn>user\nwhat is <|channel>?<turn|>\n<|turn>model\n", False),
        ("<|tool_response>response:f{value:<|channel>thought\n}<tool_response|>", False),
        ("<|channel>thought\na\n<channel|><|tool_response>", False),
        ("<|tool_call>call:f{a:<|channel>}<tool_call|><|tool_response>", False),
    ],
)
def test_starts_reasoning(text: str, inside: bool) -> None:
    assert starts_reasoning(text) is inside
