"""What goes to the terminal and comes from it: text, notes, tables, JSON, a spinner.

Text of a model or a file is other people's: on its way to a terminal it loses everything that
a terminal would obey.
"""

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from gemloom.errors import RequestError

if TYPE_CHECKING:
    from rich.console import RenderableType

_SPINNER_AFTER = 1.0  # seconds
_CONTROLS = {code: None for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


def clean(text: str) -> str:
    """``text`` without control characters (C0, DEL, C1), but for newline and tab."""
    return text.translate(_CONTROLS)


def one_line(text: str) -> str:
    """``text`` on one line, without control characters."""
    return clean(text.replace("\n", " "))


def show(text: str) -> None:
    """Write a piece of a model's text to stdout at once; cleaned if that is a terminal."""
    sys.stdout.write(clean(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def note(text: str) -> None:
    """One line to stderr; dim on a terminal."""
    if not sys.stderr.isatty():
        sys.stderr.write(f"{one_line(text)}\n")
        return
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True, soft_wrap=True).print(Text(one_line(text), style="dim"))


def render(item: "RenderableType") -> None:
    """A rich table or text to stdout, without colours if that is no terminal."""
    from rich.console import Console

    Console(file=sys.stdout, highlight=False).print(item)


def print_json(value: Any) -> None:
    """One line of JSON to stdout."""
    sys.stdout.write(f"{json.dumps(value)}\n")


def read_stdin() -> str:
    """All of stdin as text, without the newline at its end. RequestError if it is not UTF-8."""
    data = sys.stdin.buffer.read()
    try:
        return data.decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise RequestError(f"stdin: byte {error.start:,} is not UTF-8") from None


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """A spinner on stderr while the block runs, if that takes over a second; on a terminal only."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.text import Text

    status = Console(stderr=True).status(Text(one_line(what)))
    timer = threading.Timer(_SPINNER_AFTER, status.start)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        status.stop()
