"""The chat page in a headless Chromium: fixtures for the tests of the page (a pytest plugin).

After every test the browser's console must be empty: no error, and nothing that the page's
Content-Security-Policy had to block.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

from page_server import PageServer


class Page:
    """The page in the browser, and the server it talks to."""

    def __init__(self, driver: Any, server: PageServer) -> None:
        self.driver, self.server = driver, server
        self.expected: tuple[str, ...] = ()  # what the console may say

    def all(self, css: str) -> list[WebElement]:
        return self.driver.find_elements("css selector", css)

    def find(self, css: str) -> WebElement:
        return self.driver.find_element("css selector", css)

    def text(self, css: str) -> str:
        return self.find(css).text

    def click(self, css: str) -> None:
        self.find(css).click()

    def js(self, script: str, *values: Any) -> Any:
        return self.driver.execute_script(script, *values)

    def until(self, condition: Callable[[], Any], seconds: float = 60) -> Any:
        return WebDriverWait(self.driver, seconds, 0.02).until(lambda _: condition())

    def type(self, *keys: str) -> None:
        self.driver.switch_to.active_element.send_keys(*keys)

    def focused(self) -> WebElement:
        return self.driver.switch_to.active_element

    def ask(self, question: str) -> None:
        self.find("#input").send_keys(question, Keys.ENTER)

    def answered(self, count: int = 1) -> None:
        """Waits for the end of the last of so many answers."""
        idle = "!document.querySelector('.busy')"
        self.until(
            lambda: (
                self.js(f"return {idle} && document.querySelectorAll('.assistant').length") == count
            )
        )

    def talk(self, *questions: str) -> None:
        """Asks one after another, each when the last is answered."""
        for question in questions:
            count = len(self.all(".assistant"))
            self.ask(question)
            self.answered(count + 1)

    def sent(self) -> list[tuple[str, str]]:
        """The messages of the last request."""
        messages = self.server.requests[-1]["messages"]
        return [(message["role"], message["content"]) for message in messages]

    def shown(self) -> list[str]:
        """The text of each message."""
        return [body.text for body in self.all(".message > .body")]

    def titles(self) -> list[str]:
        """The list of conversations."""
        return [name.text for name in self.all("#list .name")]

    def module(self, name: str, expression: str, *values: Any) -> Any:
        """An expression on ``m``, a module of the page; ``box`` is an element, ``a`` the values."""
        script = (
            "const a = [...arguments], box = document.createElement('div');"
            f"return import(new URL('{name}.js', document.baseURI)).then((m) => {expression});"
        )
        return self.js(script, *values)

    def emulate(self, scheme: str, width: int = 1200, height: int = 800) -> None:
        """A light or dark system, and a screen of this size."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def start(folder: Path) -> Any:
    """A browser that saves downloads in ``folder``. Skips the test where there is none."""
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not browser or not driver:
        pytest.skip("needs a browser and its driver (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in (
        "headless=new",
        "disable-dev-shm-usage",
        "disable-gpu",
        "window-size=1200,800",
    ):
        options.add_argument(f"--{argument}")
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")  # it does not start for root with one
    options.add_experimental_option("prefs", {"download.default_directory": str(folder)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options, webdriver.ChromeService(driver))


@pytest.fixture(scope="session")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="session")
def driver(downloads: Path) -> Iterator[Any]:
    driver = start(downloads)
    yield driver
    driver.quit()


@pytest.fixture
def page(driver: Any) -> Iterator[Page]:
    """A page of an origin that the browser has never seen: nothing is stored."""
    with PageServer() as server:
        page = Page(driver, server)
        page.emulate("light")
        driver.get(server.url)
        page.until(lambda: page.text("#model"))
        yield page
        said = [entry["message"] for entry in driver.get_log("browser")]
        driver.get("about:blank")
    assert [line for line in said if not any(part in line for part in page.expected)] == []
