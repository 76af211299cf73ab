"""Makes docs/chat.png: the chat page with a scripted conversation.

python tests/page_screenshot.py
"""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from page_browser import Page, start
from page_server import PageServer, Step, end, text, thought

PICTURE = Path(__file__).parents[1] / "docs" / "chat.png"
TITLES = ("A letter to the landlord", "Names for a sailing boat", "Why bread rises")
QUESTION = "Which sorting algorithm should I use for a list that is almost sorted?"
ANSWER = """\
**Insertion sort**, or a library sort that notices runs, such as Python's.

| algorithm | almost sorted | worst case |
|---|---|---|
| insertion sort | *n* | *n*² |
| Timsort | *n* | *n* log *n* |
| quicksort | *n* log *n* | *n*² |

In Python, `list.sort` is all you need:

```python
readings.sort(key=lambda reading: reading.time)
```
"""


def spoken(_: object) -> Iterator[Step]:
    """The answer word by word, as fast as a small model says it."""
    words = ANSWER.split(" ")
    time.sleep(0.3)
    for part in [thought("So: few inversions. ")] * 30 + [text(f"{word} ") for word in words]:
        yield part
        time.sleep(0.07)
    yield from end(prompt=26, completion=len(words) + 30, cached=4)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, PageServer() as server:
        driver = start(Path(folder))
        try:
            page = Page(driver, server)
            page.emulate("light")
            driver.get(server.url)
            for title in reversed(TITLES):
                page.talk(title)
                page.click("#new")
            server.script = spoken
            page.click("#thinking")
            page.talk(QUESTION)
            page.until(lambda: page.text(".summary"))
            driver.get_screenshot_as_file(str(PICTURE))
        finally:
            driver.quit()


if __name__ == "__main__":
    main()
