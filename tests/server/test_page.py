"""The chat page in a real browser, with a server whose answers are scripted: no model is needed."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from selenium.webdriver.common.keys import Keys

from page_server import DONE, DROP, Step, answer, delta, end, event, text, thought

if TYPE_CHECKING:
    from page_browser import Page

pytest_plugins = ["page_browser"]  # imports it first, so that its asserts explain themselves


# -- asking and answering ----------------------------------------------------------------------


def test_answers_appear_before_they_end_with_speed_and_usage(page: Page) -> None:
    more, last = threading.Event(), threading.Event()
    page.server.script = lambda _: [more, text("First "), last, text("second."), *end()]
    page.ask("hello")
    page.until(lambda: page.find(".waiting").is_displayed())
    assert page.text("#status") == "Answering"
    more.set()
    page.until(lambda: page.shown() == ["hello", "First"])
    assert not page.find(".waiting").is_displayed() and page.find("#stop").is_displayed()
    assert page.text("#status") == "Answering"  # readers hear an answer once, when it is whole
    threading.Timer(0.2, last.set).start()  # what comes at once is no measure of speed
    page.answered()
    assert page.shown() == ["hello", "First second."]
    assert page.text("#status") == "Assistant: First second."
    speed, count, prompt, wait = page.text(".summary").split(" · ")
    assert 0 < float(speed.removesuffix(" tokens/s")) < 39 / 0.2 and count == "40 tokens"
    assert prompt == "prompt 1,200 tokens, 1,100 cached" and wait.startswith("first after ")
    sent = page.server.requests[0]
    assert sent["stream"] is True and sent["stream_options"] == {"include_usage": True}
    assert sent["model"] == "gemma-4-e2b" and page.sent() == [("user", "hello")]


@pytest.mark.parametrize("how", ["button", "escape"])
def test_stop_ends_the_request_and_keeps_what_came(page: Page, how: str) -> None:
    page.server.script = lambda _: [text("Some"), threading.Event()]
    page.ask("hello")
    page.until(lambda: page.shown() == ["hello", "Some"])
    page.click("#stop") if how == "button" else page.type(Keys.ESCAPE)
    page.answered()
    assert page.server.hung_up.wait(60)
    assert page.shown() == ["hello", "Some"] and page.text(".summary") == "stopped"
    assert not page.find(".error").is_displayed()
    page.server.script = lambda _: answer("More.")
    page.type("go on", Keys.ENTER)  # the focus is where one goes on
    page.answered(2)
    assert page.sent() == [("user", "hello"), ("assistant", "Some"), ("user", "go on")]


def test_regenerate_asks_the_same_again(page: Page) -> None:
    page.talk("one", "two")
    assert len([b for b in page.all(".regenerate") if b.is_displayed()]) == 1  # of the last alone
    page.server.script = lambda _: answer("No.")
    page.all(".regenerate")[-1].click()
    page.until(lambda: len(page.server.requests) == 3)
    page.answered(2)
    assert page.server.requests[2] == page.server.requests[1]
    assert page.shown() == ["one", "Yes.", "two", "No."]


def test_an_edited_question_replaces_what_followed(page: Page) -> None:
    page.talk("one", "two")
    page.click(".user .edit")
    page.type(Keys.END, " more", Keys.SHIFT + Keys.ENTER + Keys.NULL, "lines", Keys.ENTER)
    page.until(lambda: len(page.server.requests) == 3)
    page.answered(1)
    assert page.sent() == [("user", "one more\nlines")]
    assert page.shown() == ["one more\nlines", "Yes."]


def test_an_edited_answer_stays_where_it_is(page: Page) -> None:
    page.talk("one", "two")
    page.click(".assistant .edit")
    page.type(Keys.ESCAPE)
    assert page.shown()[1] == "Yes." and not page.all(".editor")
    page.click(".assistant .edit")
    page.type(Keys.END, " Or *no*.", Keys.CONTROL + Keys.ENTER)
    page.until(lambda: page.shown() == ["one", "Yes. Or no.", "two", "Yes."])
    assert len(page.server.requests) == 2
    page.talk("three")
    assert page.sent()[1] == ("assistant", "Yes. Or *no*.")


def test_thinking_is_folded_and_not_sent_back(page: Page) -> None:
    gate = threading.Event()
    page.server.script = lambda _: [thought("Let me **see**."), gate, text("Four."), *end()]
    page.click("#thinking")
    page.ask("2+2?")
    label = "Thinking for [1-9] s"  # it goes on without tokens
    page.until(lambda: page.shown() and re.match(label, page.text(".thinking summary")))
    gate.set()
    page.answered()
    assert page.text(".thinking summary").startswith("Thought for")
    assert not page.find(".thinking .body").is_displayed() and page.shown()[-1] == "Four."
    page.click(".thinking summary")
    page.until(lambda: page.text(".thinking .body") == "Let me see.")
    assert page.server.requests[0]["chat_template_kwargs"] == {"enable_thinking": True}
    page.click("#thinking")
    page.talk("and?")
    assert page.server.requests[1]["chat_template_kwargs"] == {"enable_thinking": False}
    assert page.sent()[1] == ("assistant", "Four.")


def test_tool_calls_are_readable(page: Page) -> None:
    parts = [
        {"name": "weather", "arguments": ""},
        {"arguments": '{"city": "Par'},
        {"arguments": 'is"}'},
    ]
    calls = [delta(tool_calls=[{"index": 0, "function": part}]) for part in parts]
    page.server.script = lambda _: [*calls, *end(reason="tool_calls")]
    page.talk("weather?")
    assert page.text(".call figcaption").split() == ["Tool", "call:", "weather"]
    assert json.loads(page.text(".call pre")) == {"city": "Paris"}


# -- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "line"),
    [
        ([event({"error": {"message": "the engine stopped"}})], "the engine stopped"),
        ([DROP], "The connection was lost before the answer ended."),
        ([], "The connection was lost before the answer ended."),
        ([b"data: {nonsense\n\n", DONE], "The server sent what is not JSON: {nonsense"),
    ],
)
def test_failures_in_a_stream_are_shown_and_tried_again(
    page: Page, steps: list[Step], line: str
) -> None:
    page.expected = ("ERR_INCOMPLETE_CHUNKED_ENCODING",)
    seen = threading.Event()
    page.server.script = lambda _: [text("Half"), seen, *steps]
    page.ask("hello")
    page.until(lambda: page.shown() == ["hello", "Half"])
    seen.set()
    page.answered()
    assert page.text(".error span") == line and page.shown() == ["hello", "Half"]
    page.driver.refresh()
    page.until(lambda: page.all(".error") and page.text(".error span") == line)
    page.server.script = lambda _: answer("Whole.")
    page.click(".error button")
    page.until(lambda: page.shown() == ["hello", "Whole."])
    assert page.server.requests[0] == page.server.requests[1]


def test_refusals_are_shown(page: Page) -> None:
    page.expected = ("503", "429")
    page.server.refusal = (503, "the engine has failed")
    page.talk("hello")
    assert page.text(".error span") == "the engine has failed"
    page.server.refusal = (429, "too many wait")
    page.click(".error button")
    page.until(lambda: page.text(".error span") == "too many wait")
    page.server.refusal = None
    page.click(".error button")
    page.until(lambda: page.shown() == ["hello", "Yes."])


def test_a_server_that_is_gone_is_told(page: Page) -> None:
    page.js("window.fetch = () => Promise.reject(new TypeError('Failed to fetch'))")
    page.talk("hello")
    assert page.text(".error span") == "The server cannot be reached."


def test_a_key_is_asked_for_and_kept_for_the_tab_alone(page: Page) -> None:
    page.expected = ("401",)
    page.server.key = "sesame"
    page.driver.refresh()
    page.ask("hello")
    page.until(lambda: page.find("#key").is_displayed())
    assert page.text(".error span") == "no valid API key was given"
    page.type("wrong", Keys.ENTER)
    page.until(lambda: page.text("#key-reason") == "The server refused this key.")
    page.find("#key-input").clear()
    page.find("#key-input").send_keys("sesame", Keys.ENTER)
    page.until(lambda: page.shown() == ["hello", "Yes."])
    assert page.text("#model") == "gemma-4-e2b"
    assert "sesame" not in page.js("return JSON.stringify(localStorage)")
    page.driver.refresh()
    page.talk("again")
    assert page.shown()[-1] == "Yes." and page.server.keys[-1] == "Bearer sesame"


# -- what is kept ------------------------------------------------------------------------------


def test_conversations_survive_a_reload(page: Page) -> None:
    page.server.script = lambda _: [thought("Hm."), *answer("**Yes.**")]
    page.talk("first chat")
    page.click("#new")
    page.server.script = lambda _: [text("Half an"), threading.Event()]
    page.ask("second chat")
    page.until(lambda: page.shown() == ["second chat", "Half an"])
    page.driver.refresh()  # in the middle of an answer
    page.until(lambda: page.shown() == ["second chat", "Half an"])
    assert page.titles() == ["second chat", "first chat"]
    page.all("#list .open")[1].click()
    assert page.shown() == ["first chat", "Yes."] and page.all(".body strong")
    assert page.text(".thinking summary").startswith("Thought for") and "1,100 cached" in page.text(
        ".summary"
    )


def test_conversations_are_renamed_exported_and_deleted(page: Page, downloads: Path) -> None:
    page.talk("one")
    page.click("#list .rename")
    page.type(Keys.CONTROL + "a" + Keys.NULL, "My/chat", Keys.ENTER)
    page.until(lambda: page.titles() == ["My/chat"] and page.text("h1") == "My/chat")
    page.click("#list .export")
    file = downloads / "My-chat.json"
    page.until(file.exists)
    exported = page.until(lambda: json.loads(file.read_text() or "null"))
    assert exported["title"] == "My/chat"
    assert [m["content"] for m in exported["messages"]] == ["one", "Yes."]
    page.click("#list .delete")
    page.click("#confirm .close")
    assert page.titles() == ["My/chat"]
    page.click("#list .delete")
    assert page.text("#confirm-text") == "My/chat"
    page.click("#confirm-yes")
    assert page.titles() == [] and page.find("#empty").is_displayed()
    page.driver.refresh()
    assert page.titles() == []


def test_two_conversations_answer_at_once(page: Page) -> None:
    gate = threading.Event()
    page.server.script = lambda _: [text("Slow"), gate, text(" one."), *end()]
    page.ask("slow")
    page.until(lambda: page.shown() == ["slow", "Slow"])
    page.click("#new")
    page.server.script = lambda _: answer("Fast one.")
    page.talk("fast")
    assert page.shown() == ["fast", "Fast one."] and len(page.all("#list .dot")) == 1
    gate.set()
    page.until(lambda: not page.all("#list .dot"))
    assert page.shown() == ["fast", "Fast one."]
    next(b for b in page.all("#list .open") if b.text == "slow").click()
    assert page.shown() == ["slow", "Slow one."]


def test_a_broken_or_full_store_does_no_harm(page: Page) -> None:
    page.talk("good")
    stored = {
        "chat.bad": '{"messages": [{"role": "user"}]}',
        "chat.cut": '{"messag',
        "settings": '{"temperature": "hot", "top_k": -1, "seed": 5}',
    }
    for name, value in stored.items():
        page.js("localStorage[`gemloom.v1.${arguments[0]}`] = arguments[1]", name, value)
    page.driver.refresh()
    page.until(
        lambda: page.text("#notice-text").startswith("2 stored conversation(s) cannot be read")
    )
    assert page.titles() == ["good"] and page.shown() == ["good", "Yes."]
    page.js("const free = 'x'.repeat(1000); let n = 0;"
            "try { for (;;) localStorage['fill' + n++] = free.repeat(200); } catch {}"
            "try { for (;;) localStorage['fill' + n++] = free; } catch {}")  # fmt: skip
    page.ask("x" * 1500)
    page.answered(2)
    assert page.text("#notice-text").startswith("The browser has no room")
    assert page.shown()[-1] == "Yes." and page.server.requests[-1]["seed"] == 5
    assert not {"temperature", "top_k"} & page.server.requests[-1].keys()


def test_what_another_tab_says_appears_here(page: Page) -> None:
    page.talk("good")
    first = page.driver.current_window_handle
    page.driver.switch_to.new_window("tab")
    page.driver.get(page.server.url)
    page.talk("from the other")
    page.driver.close()
    page.driver.switch_to.window(first)
    page.until(lambda: sorted(page.titles()) == ["from the other", "good"])
    assert page.shown() == ["good", "Yes."]


# -- settings ----------------------------------------------------------------------------------


def test_settings_are_sent_kept_and_reset(page: Page) -> None:
    page.talk("plain")
    assert page.server.requests[0].keys() == {
        "model", "messages", "stream", "stream_options", "chat_template_kwargs",
    }  # fmt: skip
    given = {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.05,
        "max_completion_tokens": 99,
        "seed": 0,
    }
    page.click("#open-settings")
    page.find("#system").send_keys("Be brief.")
    for name, value in given.items():
        page.find(f"#set-{name}").send_keys(str(value))
    page.click("#settings .close")
    page.driver.refresh()
    page.talk("asked")
    assert {name: page.server.requests[1][name] for name in given} == given
    assert page.sent()[0] == ("system", "Be brief.")
    page.click("#open-settings")
    page.find("#set-top_p").send_keys("5")  # 0.95
    page.find("#set-temperature").clear()
    page.find("#set-temperature").send_keys("3")
    assert page.find("#set-temperature").get_attribute("aria-invalid") == "true"
    page.type(Keys.ESCAPE)
    page.talk("again")
    assert (
        page.server.requests[2]["top_p"] == 0.95 and page.server.requests[2]["temperature"] == 0.7
    )
    page.click("#open-settings")
    page.click("#reset")
    page.click("#settings .close")
    page.talk("plain again")
    assert page.server.requests[3].keys() == page.server.requests[0].keys()
    assert page.sent()[0] == ("user", "plain")


def test_the_theme_follows_the_system_until_it_is_chosen(page: Page) -> None:
    ground = "return getComputedStyle(document.body).backgroundColor"
    seen = {}
    for scheme in ("light", "dark"):
        page.emulate(scheme)
        seen[scheme] = page.js(ground)
    assert seen["light"] != seen["dark"]
    page.click("#theme")
    assert page.js(ground) == seen["light"]
    page.driver.refresh()
    assert page.js(ground) == seen["light"]
    assert page.find("#theme").accessible_name == "Theme: light"
    page.click("#theme")
    page.emulate("light")
    assert page.js(ground) == seen["dark"]


def test_examples_start_a_conversation(page: Page) -> None:
    examples = page.all(".example")
    assert len(examples) == 3
    question = examples[1].text
    examples[1].click()
    page.answered()
    assert page.sent() == [("user", question)] and not page.find("#empty").is_displayed()
