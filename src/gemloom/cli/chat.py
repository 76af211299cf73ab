"""``gemloom chat``: a conversation at the terminal. What is said is in ``text/conversation.py``."""

import importlib.util
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemloom.cli.load import (
    default_model,
    load_adapters,
    model_and_text,
    names_model,
    open_model,
)
from gemloom.cli.options import AdapterOptions, LoadOptions, SamplingOptions, with_options
from gemloom.cli.terminal import end_line, fail, note, show, show_thought, speed, utf8
from gemloom.errors import ContextError, GemloomError, RequestError

if TYPE_CHECKING:
    from gemloom.cli.chat_history import SavedChat
    from gemloom.engine.generation import ChatRun

_HELP = """\
/reset      forget the conversation
/save FILE  write the conversation as JSON
/load FILE  go on with a conversation that was saved
/exit       leave, as does Ctrl-D
Ctrl-C stops an answer. A line that ends with \\ goes on in the next one.
To begin a message with /, put a space before it."""


@with_options
def chat(
    first: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A file, a URL, hf:owner/repo, a built-in name.",
            show_default=False,
        ),
    ] = None,
    second: Annotated[
        str | None,
        typer.Argument(
            metavar="MESSAGE",
            help="Answer this and end; - reads it from stdin.",
            show_default=False,
        ),
    ] = None,
    *,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="The system prompt.")] = None,
    sampling: SamplingOptions,
    adapters: AdapterOptions,
    load: LoadOptions,
) -> None:
    """Talk with a model; without MODEL, with the built-in one.

    The conversation is made into a prompt by the template in the file. A base
    model has none: it is given lines that begin with "User:" and "Assistant:".
    /help lists what else can be typed. Ctrl-C stops an answer, Ctrl-D ends.
    With a MESSAGE that is answered, and nothing else; a single argument is the
    MODEL if it names one, as for gemloom run.

    \b
    Examples:
      gemloom chat gemma-it.gguf
      gemloom chat gemma-it.gguf "Why is the sky blue?"
      gemloom chat gemma-it.gguf --system "Answer in one sentence." --seed 1
      gemloom chat hf:owner/repo:Q4_K_M --context 16384 --kv-type q8_0
    """
    from gemloom.cli.chat_history import SavedChat
    from gemloom.sampling.params import from_options

    params = sampling.given()
    from_options(params)  # wrong ones are told before the model has been loaded
    name, message = _model_and_message(first, second)
    utf8("--system", system or "")
    with open_model(name, load) as opened:
        opened.tokenizer.needs_text("a chat")
        params["adapters"] = load_adapters(opened, adapters.adapter or [])
        conversation = SavedChat(opened, params, system)
        if opened.tokenizer.chat_template is None:
            note(f"{opened.name} is a base model, without chat template: plain User/Assistant text")
        if message is not None:
            _answer_once(conversation, message)
            return
        if sys.stdin.isatty():
            note("/help lists the commands, Ctrl-D ends")
        _talk(conversation)


def _model_and_message(first: str | None, second: str | None) -> tuple[str, str | None]:
    if second is None and (first is None or names_model(first)):
        return first or default_model(), None
    return model_and_text(first, second)


def _answer_once(conversation: "SavedChat", message: str) -> None:
    """Answer one message; whatever goes wrong is an error of the command."""
    with conversation.ask(message) as request:
        _, reason = _show_answer(request)
    note(speed(request.usage, reason))


def _talk(conversation: "SavedChat") -> None:
    if importlib.util.find_spec("readline"):
        import readline  # noqa: F401  (gives input() line editing)
    while (message := _read_message()) is not None:
        if message.startswith("/"):
            if not _obey(conversation, message):
                return
        elif message.strip():
            _answer(conversation, message.strip())


def _read_message() -> str | None:
    """What the user typed, of one line or several; None at the end."""
    first, more = ("> ", "... ") if sys.stdin.isatty() else ("", "")
    try:
        text = input(first)
        while text.endswith("\\"):
            text = f"{text[:-1]}\n{input(more)}"
    except (EOFError, KeyboardInterrupt):
        if sys.stdin.isatty():
            show("\n")
        return None
    return text


def _obey(conversation: "SavedChat", line: str) -> bool:
    """Do what a /command says; False if that is to leave."""
    name, _, argument = line.rstrip().partition(" ")
    file = argument.strip()
    with_file: dict[str, Callable[[Path], str]] = {
        "/save": conversation.save,
        "/load": conversation.load,
    }
    alone: dict[str, Callable[[], str]] = {"/reset": conversation.reset, "/help": lambda: _HELP}
    if name == "/exit" and not file:
        return False
    try:
        if name in with_file and file:
            show(f"{with_file[name](Path(file).expanduser())}\n")
        elif name in alone and not file:
            show(f"{alone[name]()}\n")
        elif name in with_file:
            fail(f"{name} needs the name of a file")
        else:
            fail(f"no such command: {line.strip()}; /help lists them")
    except RequestError as error:
        fail(str(error))
    return True


def _answer(conversation: "SavedChat", message: str) -> None:
    try:
        with conversation.ask(message) as request:
            with _stopped_by_ctrl_c(request):
                text, reason = _show_answer(request)
            conversation.keep(message, text)
            note(speed(request.usage, reason))
    except ContextError as error:
        fail(f"{error}; /reset forgets the conversation")
    except RequestError as error:
        fail(str(error))


def _show_answer(request: "ChatRun") -> tuple[str, str]:
    """The answer, shown as it comes, and how it ended. A thought is shown, but is no part of it."""
    from gemloom.text.router import Content, Reasoning

    text, thought = "", False
    try:
        for part in request:
            if isinstance(part, Reasoning):
                show_thought(part.text)
                thought = True
            elif isinstance(part, Content):
                if thought:
                    show_thought("\n")
                    thought = False
                shown = part.text if text else part.text.lstrip()
                show(shown)
                text += shown
    except GemloomError:
        end_line(text or "\n")
        raise
    show("\n")
    return text.rstrip(), request.finish_reason or "stopped"


@contextmanager
def _stopped_by_ctrl_c(request: "ChatRun") -> Iterator[None]:
    """While the block runs, Ctrl-C ends the request in good order, between two steps."""
    previous = signal.signal(signal.SIGINT, lambda *_: request.cancel())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
