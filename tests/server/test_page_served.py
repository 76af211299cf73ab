"""The chat page with Gemloom's own server and a tiny model behind it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import httpx
import pytest
from selenium.webdriver.common.keys import Keys

import gemloom
import tiny
from conftest import paced, until
from http_serving import cancelled, serving
from page_server import PAGE, POLICY

if TYPE_CHECKING:
    from page_browser import Page

pytest_plugins = ["page_browser"]


@pytest.fixture(scope="module")
def model() -> Iterator[gemloom.Model]:
    data = tiny.gguf_bytes(tiny.VARIANTS["e2b"])
    with gemloom.load(data, kv_type="f32", context=512, slots=2, threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def url(model: gemloom.Model) -> Iterator[str]:
    with serving(model) as url:
        yield url


def test_every_file_is_served_under_the_policy(url: str) -> None:
    for file in PAGE.iterdir():
        found = httpx.get(f"{url}/{file.name.removesuffix('index.html')}", trust_env=False)
        assert found.content == file.read_bytes()
        assert set(POLICY.split("; ")) <= set(found.headers["Content-Security-Policy"].split("; "))


def test_a_conversation(page: Page, url: str, model: gemloom.Model) -> None:
    page.driver.get(url)
    page.until(lambda: page.text("#model") == "tiny")
    choose(page, max_completion_tokens="20", seed="1")
    page.talk("hello", "again")
    assert not any(error.is_displayed() for error in page.all(".error"))
    first, second = (line.text for line in page.all(".summary"))
    assert "20 tokens" in first and ", 0 cached" not in second
    choose(page, max_completion_tokens="0")  # 200
    steps = model.stats().steps + 20
    with paced(model, 20):
        page.ask("more")
        page.until(lambda: len(page.shown()) == 6 and page.shown()[5])
        until(lambda: model.stats().steps == steps)
        assert not cancelled(model)
        page.type(Keys.ESCAPE)
        until(lambda: cancelled(model))
    until(lambda: model.stats().running == 0)
    assert model.stats().steps == steps


def choose(page: Page, **settings: str) -> None:
    """Types into the settings, after what is there."""
    page.click("#open-settings")
    for name, value in settings.items():
        page.find(f"#set-{name}").send_keys(value)
    page.type(Keys.ESCAPE)
