"""The ``gemloom`` command: one file a group of commands, and here what all have in common.

Exit status: 0; 1 for a failure, 2 for wrong usage, 130 for Ctrl-C, 143 for SIGTERM while
something is written, 141 where the reader of stdout has gone. An error is one line on stderr,
with a traceback only under --debug.
What a command needs is imported inside it, so that --help is quick.
"""

import errno
import os
import re
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Annotated, Any, cast

import typer
from typer.core import TyperCommand, TyperGroup
from typer.exceptions import TyperException

from gemloom import __version__
from gemloom.cli import adapter as adapting
from gemloom.cli.bench import bench
from gemloom.cli.chat import chat
from gemloom.cli.convert import convert
from gemloom.cli.doctor import doctor
from gemloom.cli.imatrix import imatrix
from gemloom.cli.inspect import inspect, tokenize
from gemloom.cli.logs import as_notes
from gemloom.cli.output import Terminated
from gemloom.cli.perplexity import compare, perplexity
from gemloom.cli.quantize import quantize
from gemloom.cli.run import run
from gemloom.cli.seal import seal, unseal
from gemloom.cli.serve import serve
from gemloom.cli.terminal import fail
from gemloom.cli.worker import worker
from gemloom.errors import ContextError, EngineError, GemloomError, LostError, OptionError

_FAILED, _WRONG_USAGE = 1, 2
_INTERRUPTED, _NO_READER, _TERMINATED = 128 + 2, 128 + 13, 128 + 15


class Commands(TyperGroup):
    """All commands; whatever goes wrong in one ends in a line on stderr and an exit status."""

    def make_context(self, *args: Any, **more: Any) -> Any:
        """As typer's, which prints --help and --version here."""
        with _told(None):
            return super().make_context(*args, **more)

    def invoke(self, ctx: Any) -> None:
        """Run the command; typer.Exit for whatever went wrong."""
        with _told(ctx):
            super().invoke(ctx)
            sys.stdout.flush()  # a reader that has gone, a full disk: now, not at exit


class CliCommand(TyperCommand):
    """One command."""

    def invoke(self, ctx: Any) -> None:
        """Run it, with the library's log as notes where it is not a log of its own."""
        plain = ctx.info_name == "serve" or ctx.find_root().params["debug"]
        try:
            with nullcontext() if plain else as_notes():
                super().invoke(ctx)
        except OptionError as error:
            raise OptionError(self._in_flags(str(error))) from error

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """As typer's: MODEL and not {MODEL} for what has to be there, OUT once behind a list."""
        pieces = [re.sub(r"[{}]", "", piece) for piece in super().collect_usage_pieces(ctx)]
        return [re.sub(r"(\.\.\. .*)\.\.\.$", r"\1", piece) for piece in pieces]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Arguments, and options under their headings, those that have none first."""
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for parameter in self.get_params(ctx):
            panel = getattr(parameter, "rich_help_panel", None)
            kind = "Arguments" if parameter.param_type_name == "argument" else "Options"
            if record := parameter.get_help_record(ctx):
                line = (re.sub(r"<list\[(\w+)\]>|<(int) range>", r"<\1\2>", record[0]), record[1])
                sections.setdefault(panel or kind, []).append(line)
        for name, lines in sections.items():
            if lines:
                with formatter.section(name):
                    formatter.write_dl(lines)

    def _in_flags(self, message: str) -> str:
        """What the library says of its options, with their names here."""
        for option in self.params:
            flag = next((name for name in option.opts if name.startswith("--")), None)
            name = str(option.name)
            anywhere = "_" in name  # the others are words that any sentence may have
            if flag and (anywhere or message.startswith(name)):
                message = re.sub(rf"(?<![-\w]){name}\b", flag, message, count=not anywhere)
        return message


@contextmanager
def _told(ctx: Any) -> Iterator[None]:
    try:
        yield
    except (typer.Exit, TyperException):
        raise
    except BrokenPipeError:
        _drop_stdout()
        raise typer.Exit(_NO_READER) from None
    except KeyboardInterrupt as error:
        if sys.stderr.isatty():
            sys.stderr.write("\n")
        raise typer.Exit(_status(error)) from error
    except Exception as error:
        if isinstance(error, OSError):
            _drop_stdout()  # it may be what failed
        if ctx and ctx.params["debug"]:
            traceback.print_exc()
        fail(_explain(error))
        raise typer.Exit(_WRONG_USAGE if isinstance(error, OptionError) else _FAILED) from error


def _status(error: KeyboardInterrupt) -> int:
    return _TERMINATED if isinstance(error, Terminated) else _INTERRUPTED


def _explain(error: Exception) -> str:
    if isinstance(error, EngineError) and error.__cause__:
        error = cast(Exception, error.__cause__)  # there is no model to be loaded again by hand
    if isinstance(error, ContextError):
        return f"{error}: shorten the prompt, or give a larger --context"
    if isinstance(error, LostError):
        return f"{error}; once it is back, run the command again"
    if isinstance(error, GemloomError):
        return str(error)
    if isinstance(error, OSError) and error.errno == errno.EBADF and sys.__stdout__ is None:
        return "stdout is closed, and what was to be printed is lost"
    if isinstance(error, OSError):
        return f"{error.filename or 'stdout'}: {error.strerror or error}"
    return f"internal error: {type(error).__name__}: {error} (gemloom --debug shows where)"


def _drop_stdout() -> None:
    """Let what is still buffered for a reader that has gone go nowhere, without a complaint."""
    with open(os.devnull, "wb") as nowhere, suppress(OSError):  # OSError: it is no file
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


app = typer.Typer(
    name="gemloom",
    cls=Commands,
    rich_markup_mode=None,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"gemloom {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback on errors.")] = False,
) -> None:
    """Gemma 4 and Gemma 3 on your own machine.

    \b
    Examples:
      gemloom run "The eight planets of the Solar System are Mercury," -n 14
      gemloom chat gemma-it.gguf
      gemloom serve gemma-it.gguf
      gemloom inspect gemma.gguf
      gemloom COMMAND --help
    """


for _command in (
    run, chat, serve, worker, inspect, tokenize, doctor, bench,
    convert, quantize, imatrix, perplexity, compare, seal, unseal,
):  # fmt: skip
    app.command(cls=CliCommand)(_command)
_adapter = typer.Typer(
    help="LoRA adapters: inspect, convert, merge, extract.",
    rich_markup_mode=None,
    no_args_is_help=True,
)
for _command in adapting.COMMANDS:
    _adapter.command(cls=CliCommand)(_command)
app.add_typer(_adapter, name="adapter")


def main() -> None:
    """Run the command line of this process, and end it."""
    _open_streams()
    command = typer.main.get_command(app)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # what __main__.py set ends here
    command(prog_name="gemloom")


def _open_streams() -> None:
    """Whatever was closed by those who started this process is opened; stdout so that it fails."""
    for name, mode, flags in (
        ("stdin", "r", os.O_RDONLY),
        ("stdout", "w", os.O_RDONLY),  # else what is printed would be lost, and nobody told
        ("stderr", "w", os.O_WRONLY),
    ):
        if getattr(sys, name) is None:
            file = open(os.open(os.devnull, flags), mode, encoding="utf-8")  # noqa: SIM115
            setattr(sys, name, file)
        getattr(sys, name).reconfigure(errors="replace")  # letters that its encoding has not
