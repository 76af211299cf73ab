"""``gemloom serve``: the OpenAI-compatible server, until a signal ends it."""

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from gemloom.cli.load import adapter_file, default_model, open_model, summary
from gemloom.cli.options import ManyOptions, with_options
from gemloom.cli.terminal import note, one_line, waiting
from gemloom.errors import OptionError

if TYPE_CHECKING:
    from fastapi import FastAPI

    from gemloom.server.adapters import AdapterFile
    from gemloom.server.service import Settings

_KEYS_VARIABLE = "GEMLOOM_API_KEYS"
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_ACCESS, _LIMITS, _ADAPTERS = "Access", "Limits", "Adapters"  # headings of --help
_AFTER_STOP = 5  # seconds that clients get to read that their requests were ended


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """What a command line says of the server itself."""

    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8080
    name: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Name of the model in requests; repeatable, the first is shown."
        ),
    ] = None
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            rich_help_panel=_ACCESS,
            metavar="KEY",
            help="An API key; requests must have one of them; repeatable.",
        ),
    ] = None
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=_ACCESS,
            metavar="FILE",
            help="A file of keys, one a line; # begins a comment.",
        ),
    ] = None
    cors: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN",
            rich_help_panel=_ACCESS,
            help="Let pages of this site in; repeatable; * for all.",
        ),
    ] = None
    max_body: Annotated[
        int, typer.Option(min=1, metavar="MIB", rich_help_panel=_LIMITS, help="Largest request.")
    ] = 32
    timeout: Annotated[
        float,
        typer.Option(
            min=0, metavar="SECONDS", rich_help_panel=_LIMITS, help="Longest request; 0: no limit."
        ),
    ] = 600
    drain: Annotated[
        float,
        typer.Option(
            min=0,
            metavar="SECONDS",
            rich_help_panel=_LIMITS,
            help="Time for running requests when the server stops.",
        ),
    ] = 30
    strict: Annotated[
        bool,
        typer.Option(
            "--strict",
            rich_help_panel=_ACCESS,
            help="Refuse requests with unknown fields.",
        ),
    ] = False
    slot_state: Annotated[
        bool,
        typer.Option(
            "--slot-state",
            rich_help_panel=_ACCESS,
            help="Let clients save and restore K/V state.",
        ),
    ] = False

    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATH[@SCALE]",
            rich_help_panel=_ADAPTERS,
            help="A LoRA that requests may name; repeatable.",
        ),
    ] = None
    adapter_upload: Annotated[
        bool,
        typer.Option(
            "--adapter-upload",
            rich_help_panel=_ADAPTERS,
            help="Let clients with an API key upload LoRAs.",
        ),
    ] = False
    max_adapter: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="MIB",
            rich_help_panel=_ADAPTERS,
            help="Largest LoRA that may be uploaded.",
        ),
    ] = 1024

    def settings(self, source: str) -> "Settings":
        """As the server takes them, for the model of ``source``.

        OptionError where there are no keys but should be some, or for a bad adapter.
        """
        from gemloom.files.names import model_id
        from gemloom.server.service import Settings

        names = self.name or [model_id(source)]
        keys = _keys(self.api_key or [], self.api_key_file)
        if self.adapter_upload and not keys:
            raise OptionError("--adapter-upload needs an --api-key")
        return Settings(
            name=names[0],
            aliases=tuple(names[1:]),
            api_keys=keys,
            cors=tuple(self.cors or []),
            max_body=self.max_body << 20,
            timeout=self.timeout or None,
            strict=self.strict,
            slot_state=self.slot_state,
            adapters=_adapters(self.adapter or []),
            adapter_upload=self.adapter_upload,
            max_adapter=self.max_adapter << 20,
        )


@with_options
def serve(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A file, a URL, hf:owner/repo, a built-in name.",
            show_default=False,
        ),
    ] = None,
    *,
    server: ServerOptions,
    load: ManyOptions,
) -> None:
    """Serve a model to many clients, in OpenAI's API.

    Without MODEL, the built-in one. Clients of OpenAI's API work as they are,
    with http://HOST:PORT/v1 as their base URL; a chat page is at /. Only this
    machine can reach it, unless --host says otherwise; give it --api-key then.
    Keys may be in GEMLOOM_API_KEYS too, separated by commas. Ctrl-C or SIGTERM
    lets requests under way finish; a second one ends at once.

    \b
    Examples:
      gemloom serve gemma-it.gguf
      gemloom serve gemma-it.gguf --slots 8 --context 16384 --name gemma
      gemloom serve gemma-it.gguf --host 0.0.0.0 --api-key-file keys.txt
      gemloom serve it.gguf --adapter style=style.gguf --adapter law=law.gguf@0.8
    """
    source = model or default_model()
    settings = server.settings(source)
    listener = _listen(server.host, server.port)  # one in use is told before the model is loaded
    settings = replace(settings, hosts=_own_names(server.host, listener))
    if not settings.hosts and not settings.api_keys:
        note(f"other machines can reach {_address(listener)}, and need no key: give --api-key")
    with listener, open_model(source, load) as opened:
        from gemloom.files.source import is_pipe
        from gemloom.loading import load as load_again
        from gemloom.server.app import create_app

        again = partial(load_again, source, key=load.key_file, **load.given())
        once = is_pipe(source)  # then it cannot be loaded again
        with waiting("loading adapters and grammars"):
            app = create_app(opened, settings, None if once else again)
        if opened.tokenizer.chat_template is None:
            note(f"{opened.name} is a base model, without chat template: chats go to it as plain "
                 "User/Assistant text, as /v1/completions would send it")  # fmt: skip
        for info in opened.adapters.list():
            note(summary(info.name, info))
        with closing(app.state.service):
            _run(app, listener, settings, server.drain)


def _adapters(given: list[str]) -> "dict[str, AdapterFile]":
    """NAME=PATH[@SCALE]s by name. OptionError for one that is not so, or a name given twice."""
    from gemloom.adapters.names import check_name, check_scale
    from gemloom.files.names import is_url, shown
    from gemloom.server.adapters import AdapterFile

    found = {}
    for text in given:
        name, equals, file = text.partition("=")
        if not equals or not file or is_url(name):
            raise OptionError(f"--adapter {shown(text)!r} is not NAME=PATH[@SCALE]")
        check_name(name)
        if name in found:
            raise OptionError(f"--adapter: two adapters are named {name}")
        path, scale = adapter_file(file)
        found[name] = AdapterFile(path, check_scale(name, scale))
    return found


def _keys(given: list[str], file: Path | None) -> tuple[str, ...]:
    """All keys there are. OptionError where something that is to have some has none."""
    found = list(given)
    variable = os.environ.get(_KEYS_VARIABLE)
    if variable is not None:
        found += _some(variable.split(","), _KEYS_VARIABLE)
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise OptionError(f"--api-key-file {file}: {error}") from None
        found += _some([line.partition("#")[0] for line in lines], str(file))
    return tuple(_some(found, "--api-key")) if found else ()


def _some(keys: list[str], where: str) -> list[str]:
    stripped = [key.strip() for key in keys]
    found = [key for key in stripped if key]
    if not found:
        raise OptionError(f"{where} has no API key: nobody could use the server")
    return found


def _listen(host: str, port: int) -> socket.socket:
    """A socket bound to the address. AddressError in one line where it cannot be."""
    from gemloom.server.errors import AddressError

    with ExitStack() as stack:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            family, kind, protocol, _, address = found[0]
            listener = stack.enter_context(socket.socket(family, kind, protocol))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError as error:
            reason = f"{host}:{port}: {error.strerror}"
            raise AddressError(f"{reason}; try another --host or --port") from None
        stack.pop_all()
    return listener


def _own_names(host: str, listener: socket.socket) -> tuple[str, ...]:
    """The names of a server that only this machine reaches; none for any other."""
    from gemloom.server.guard import LOOPBACK_NAMES

    if not ip_address(listener.getsockname()[0]).is_loopback:
        return ()
    return tuple(dict.fromkeys((*LOOPBACK_NAMES, host.lower())))


def _run(app: "FastAPI", listener: socket.socket, settings: "Settings", drain: float) -> None:
    """Serve until a signal comes and the requests under way have ended."""
    import uvicorn

    from gemloom.server.connections import config

    class Server(uvicorn.Server):
        """uvicorn's, but the first signal drains, and the system's own way of the second ends.

        While it drains it still listens: /health says that it is stopping, and so do refusals.
        """

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            typer.echo(f"{one_line(settings.name)} is served at {_address(listener)}")

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            service = app.state.service
            service.stopping = True
            if service.under_way and drain:
                several = f"{service.under_way} request" + "s" * (service.under_way > 1)
                note(f"waiting for {several}, up to {drain:g} s; a second signal ends at once")
            await service.idle(drain)
            service.stop()
            await super().shutdown(sockets)

        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            if threading.current_thread() is threading.main_thread():
                for number in _SIGNALS:
                    signal.signal(number, self.handle_exit)
            yield

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            self.should_exit = True
            for number in _SIGNALS:
                signal.signal(number, signal.SIG_DFL)

    Server(config(app, log_level="warning", timeout_graceful_shutdown=_AFTER_STOP)).run([listener])


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
