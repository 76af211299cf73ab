"""Who can use the chat page: by keyboard, with a screen reader, in either theme, on a phone."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest
from selenium.webdriver.common.keys import Keys

from page_server import delta, end, event, text, thought

if TYPE_CHECKING:
    from page_browser import Page

pytest_plugins = ["page_browser"]  # imports it first, so that its asserts explain themselves


def walk(page: Page, key: str, end: str) -> list[str]:
    """Goes from control to control until the one with this id; their ids, or else names."""
    reached = []
    while end not in reached and len(reached) < 50:
        page.type(key + Keys.NULL)
        active = page.focused()
        reached.append(active.get_attribute("id") or active.accessible_name)
        outline = page.js("return getComputedStyle(arguments[0]).outlineStyle", active)
        assert outline != "none" or reached[-1] == "input"  # the frame around it shows that
    return reached


def test_all_is_reached_by_keyboard(page: Page) -> None:
    assert page.focused().get_attribute("id") == "input"
    page.type("line", Keys.SHIFT + Keys.ENTER + Keys.NULL, "two", Keys.ENTER)
    page.answered()
    assert page.sent() == [("user", "line\ntwo")]
    reached = walk(page, Keys.SHIFT + Keys.TAB, "skip")[::-1] + walk(page, Keys.TAB, "send")
    expected = {"new", "Rename line", "Delete line", "theme", "open-settings", "scroll"}
    expected |= {"Copy message", "Edit message", "Regenerate", "input", "thinking", "send"}
    assert expected <= set(reached)
    page.find("#skip").send_keys(Keys.ENTER)
    assert page.focused().get_attribute("id") == "input"


def everything(page: Page) -> None:
    """A conversation that shows every part of the page."""
    page.server.script = lambda _: [
        thought("Hm."),
        text("# Head\n\n> q [link](https://a.b)\n\n`c`\n\n```py\nx\n```\n\n| a |\n|---|\n| 1 |\n"),
        delta(tool_calls=[{"index": 0, "function": {"name": "f", "arguments": "{}"}}]),
        event({"error": {"message": "broken"}}),
    ]
    page.talk("hello")
    page.click(".thinking summary")


def nameless(page: Page, within: str = "") -> list[str]:
    """Controls that a screen reader could not name."""
    kinds = "button, input, textarea, a, summary, pre, [tabindex], [role=log], [role=group]"
    found = page.all(", ".join(within + kind for kind in kinds.split(", ")))
    shown = [control for control in found if control.is_displayed()]
    assert shown
    return [c.get_attribute("outerHTML") for c in shown if not c.accessible_name]


def test_controls_have_names_and_parts_have_roles(page: Page) -> None:
    everything(page)
    assert nameless(page) == []
    roles = {"#messages": "log", "#status": "status", "main": "main", "#sidebar": "complementary"}
    roles |= {"nav": "navigation", "article": "article", "#list": "list", "details": "group"}
    assert {css: page.find(css).aria_role for css in roles} == roles
    page.click("#open-settings")
    assert nameless(page, "#settings ") == [] and page.find("#settings").aria_role == "dialog"
    assert page.find("#settings").accessible_name == "Settings"
    ids = page.js("return [...document.querySelectorAll('[id]')].map((node) => node.id)")
    assert len(ids) == len(set(ids))
    assert page.find("html").get_attribute("lang") == "en"
    assert page.find("#messages").get_attribute("aria-live") == "off"


CONTRAST = """
const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
const parse = (colour) => {
  canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data];
};
const light = (c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
const luminance = ([r, g, b]) => 0.2126 * light(r) + 0.7152 * light(g) + 0.0722 * light(b);
const ground = (node) => {
  for (; node; node = node.parentElement) {
    const colour = parse(getComputedStyle(node).backgroundColor);
    if (colour[3] === 255) return colour;
  }
};
const bad = [], said = [];
const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walk.nextNode()) {
  const node = walk.currentNode.parentElement, words = walk.currentNode.data.trim();
  if (!words || !node.checkVisibility({ opacityProperty: true })) continue;
  said.push(words);
  const colours = [parse(getComputedStyle(node).color), ground(node)];
  const [a, b] = colours.map(luminance).sort((x, y) => y - x);
  const ratio = (a + 0.05) / (b + 0.05);
  if (ratio < 4.5) bad.push(`${words.slice(0, 30)}: ${ratio.toFixed(2)}`);
}
return [bad, said];
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_both_themes(page: Page, scheme: str) -> None:
    page.emulate(scheme)
    bad, said = page.js(CONTRAST)
    assert bad == [] and "What shall we work on?" in said
    page.click("#thinking")
    everything(page)
    page.click("#open-settings")
    page.find("#set-top_p").send_keys("5")
    bad, said = page.js(CONTRAST)
    assert bad == [] and {"Hm.", "link", "py", "Tool call:", "broken", "Top p"} <= set(said)


def test_a_phone_has_room_for_it(page: Page) -> None:
    page.emulate("light", 360, 640)
    everything(page)
    wide = "const page = document.documentElement, box = document.querySelector('#scroll');"
    wide += "return Math.max(page.scrollWidth, box.scrollWidth)"
    assert page.js(wide) == 360
    assert not page.find("#new").is_displayed()
    page.click("#menu")
    page.until(lambda: page.find("#new").is_displayed())
    page.type(Keys.ESCAPE)
    page.until(lambda: not page.find("#new").is_displayed())
    send = page.find("#send").rect
    assert send["x"] + send["width"] <= 360 and send["y"] + send["height"] <= 640
    page.click("#open-settings")
    assert page.js(wide) == 360


def test_scrolling_follows_until_the_reader_scrolls_up(page: Page) -> None:
    gates = [threading.Event() for _ in range(3)]
    lines = "".join(f"line {n}\n\n" for n in range(40))
    page.server.script = lambda _: [part for gate in gates for part in (text(lines), gate)] + end()
    rest = "const box = document.querySelector('#scroll');"
    rest += "return box.scrollHeight - box.scrollTop - box.clientHeight"
    page.ask("long")
    page.until(lambda: len(page.all(".assistant p")) >= 40)
    assert page.js(rest) < 2
    gates[0].set()
    page.until(lambda: len(page.all(".assistant .body p")) == 80)
    assert page.js(rest) < 2
    page.js("document.querySelector('#scroll').scrollBy(0, -300)")
    page.until(lambda: page.find("#latest").is_displayed())
    place = page.js("return document.querySelector('#scroll').scrollTop")
    gates[1].set()
    page.until(lambda: len(page.all(".assistant .body p")) == 120)
    assert page.js("return document.querySelector('#scroll').scrollTop") == place
    page.click("#latest")
    assert page.js(rest) < 2
    gates[2].set()
    page.answered()
    assert page.js(rest) < 2 and not page.find("#latest").is_displayed()
