"""What goes to the terminal and comes from it: text, notes, tables, JSON, a spinner.

Text of a model or of a file is other people's: on its way to a terminal it loses everything
that a terminal would obey.
"""

import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, Protocol

from gemloom.errors import OptionError, RequestError

if TYPE_CHECKING:
    from rich.table import Table

    from gemloom.engine.generation import Usage

_SPINNER_AFTER = 1.0  # seconds
_BETWEEN = 2  # blanks behind a column of a table
_FOLDED = 12  # letters of a line that a name is folded to, at least
_CONTROLS = {code: None for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


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


def end_line(text: str) -> None:
    """End the line of what was shown, unless it has ended."""
    if not text.endswith("\n"):
        show("\n")


def show_thought(text: str) -> None:
    """Write a piece of a model's thought to a terminal, dim; nowhere else."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.text import Text

        Console(soft_wrap=True).print(Text(clean(text), style="dim"), end="")


def fail(text: str) -> None:
    """Write the one line of an error to stderr."""
    sys.stderr.write(f"gemloom: {one_line(text)}\n")


def note(text: str) -> None:
    """Write one line to stderr; dim on a terminal."""
    if not sys.stderr.isatty():
        sys.stderr.write(f"{one_line(text)}\n")
        return
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True, soft_wrap=True).print(Text(one_line(text), style="dim"))


def render(item: "Table", *, aside: bool = False) -> None:
    """Write a table to stdout, or ``aside`` to stderr; no colours if that is no terminal.

    Nothing of it is cut: names are folded, numbers are not, and where there is no room for all
    beside each other each cell gets a line. rich itself ends the process where the reader has
    gone, so the text is written here.
    """
    from rich.console import Console

    target = sys.stderr if aside else sys.stdout
    console = Console(file=target, highlight=False, markup=False, emoji=False)
    for column in item.columns:
        longest = max((_unbroken(str(cell)) for cell in column.cells), default=0)
        least = longest if column.justify == "right" else min(longest, _FOLDED)
        column.min_width = max(column.min_width or 1, least)
    widths = [(column.min_width or 1) + _BETWEEN for column in item.columns]
    with console.capture() as text:
        console.print(item if sum(widths) <= console.width else _upright(item))
    lines = text.get().splitlines(keepends=True)
    if not console.is_terminal:  # blanks to the width of the table are of no use to programs
        lines = [f"{line.rstrip()}\n" for line in lines]
    target.write("".join(lines))
    target.flush()


def _unbroken(cell: str) -> int:
    """Letters that a number takes where its error is put on a line of its own."""
    number, mark, error = cell.partition(" ± ")
    return max(len(number), len(mark + error) - 1)


def _upright(item: "Table") -> "Table":
    """The same table with a cell on each line, behind its header."""
    made = table("", "")
    made.show_header = False
    made.caption, made.caption_justify = item.caption, item.caption_justify
    headers = [" ".join(str(column.header).split()) for column in item.columns]
    apart = any("\n" in str(column.header) for column in item.columns)  # from what is above
    for number, cells in enumerate(zip(*(column.cells for column in item.columns), strict=True)):
        if number or apart:
            made.add_row("", "")
        for header, cell in zip(headers, map(str, cells), strict=True):
            if cell:
                made.add_row(header, cell)
    return made


def table(*columns: str) -> "Table":
    """An empty table; a column whose name begins with > has numbers, aligned to the right."""
    from rich.table import Table

    padding = (0, _BETWEEN, 0, 0)
    # Not without its last padding: rich then takes the last column to be wider than it is.
    made = Table(box=None, padding=padding, header_style="bold")
    for name in columns:
        right, name = name.startswith(">"), name.lstrip(">")
        longest = max(map(len, name.split()), default=0)  # a header is broken between words only
        justify: Literal["left", "right"] = "right" if right else "left"
        made.add_column(name, justify=justify, overflow="fold", min_width=longest)
    return made


def print_json(value: Any) -> None:
    """Write one line of JSON to stdout."""
    sys.stdout.write(f"{json.dumps(value)}\n")


def size(n: int) -> str:
    """Bytes for people: "235.2 MiB"."""
    amount, unit = float(n), 0
    while amount >= 1024 and unit < len(_UNITS) - 1:
        amount, unit = amount / 1024, unit + 1
    return f"{amount:,.1f} {_UNITS[unit]}" if unit else f"{n} B"


_ENDED = {
    "stop": "",
    "length": "; limit reached",
    "repetition": "; ended, as it repeats itself (--repetition-limit 0 lets it)",
}


def speed(usage: "Usage", end: str) -> str:
    """Tokens and tokens a second of a request, and how it ended if not by itself, on a line."""
    ended = _ENDED.get(end, f"; {end}")
    cached = f" ({usage.cached_tokens:,} cached)" if usage.cached_tokens else ""
    prompt, answer = _rate(usage.prompt_tokens_per_second), _rate(usage.tokens_per_second)
    return (
        f"prompt {usage.prompt_tokens:,} tokens{cached}{prompt}; "
        f"generated {usage.completion_tokens:,}{answer}{ended}"
    )


def _rate(tokens_per_second: float) -> str:
    """Nothing where nothing was timed: the first token of an answer is not."""
    return f", {tokens_per_second:,.1f} tok/s" if tokens_per_second else ""


def utf8(what: str, text: str) -> str:
    """An argument that is a text. OptionError where its bytes were no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise OptionError(f"{what}: character {error.start + 1:,} is not UTF-8") from None
    return text


def read_stdin() -> str:
    """All of stdin, without the newline at its end. RequestError if it is not UTF-8."""
    return _decode("stdin", sys.stdin.buffer.read()).removesuffix("\n").removesuffix("\r")


def read_text(path: str) -> str:
    """A text file as it is; - is stdin. RequestError if it cannot be read or is not UTF-8."""
    if path == "-":
        return _decode("stdin", sys.stdin.buffer.read())
    try:
        with open(path, "rb") as file:
            return _decode(path, file.read())
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror or error}") from None


def _decode(name: str, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise RequestError(f"{name}: byte {error.start:,} is not UTF-8") from None


@contextmanager
def bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, of bytes, if it takes over a second; on a terminal only.

    The block gets a function to call with all that is done so far.
    """
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn())
    times = (DownloadColumn(binary_units=True), TimeRemainingColumn())
    progress = Progress(*columns, *times, console=Console(stderr=True), transient=True)
    task = progress.add_task(one_line(what), total=total)
    timer = threading.Timer(_SPINNER_AFTER, progress.start)
    timer.start()
    try:
        yield lambda done: progress.update(task, completed=done)
    finally:
        timer.cancel()
        timer.join()
        progress.stop()


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


class Show(Protocol):
    """Moves a bar."""

    def __call__(self, done: int, of: int, words: str = "") -> None:
        """So many are done, of so many; a few words beside it."""


@contextmanager
def progress(what: str, then: str = "") -> Iterator[Show]:
    """As ``waiting``, with a bar once the function it gives was told how much is done.

    When all of it is done, ``then`` says what the block still does, if it does more.
    """
    if not sys.stderr.isatty():
        yield lambda done, of, words="": None
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress

    bar = Progress(console=Console(stderr=True), transient=True)
    task = bar.add_task(escape(one_line(what)), total=None)

    def show(done: int, of: int, words: str = "") -> None:
        nonlocal task
        if then and done >= of:  # a full bar would say that it is over
            bar.remove_task(task)
            task = bar.add_task(escape(one_line(f"{what}: {then}")), total=None)
            return
        text = escape(one_line(f"{what}: {words}" if words else what))
        bar.update(task, completed=done, total=of, description=text)
        if words:  # there is something to be read
            bar.start()

    timer = threading.Timer(_SPINNER_AFTER, bar.start)
    timer.start()
    try:
        yield show
    finally:
        timer.cancel()
        timer.join()
        bar.stop()
