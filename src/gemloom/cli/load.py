"""From what the command line names to an open file or model."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from gemloom.cli.device_options import plan_table
from gemloom.cli.options import LoadOptions
from gemloom.cli.progress import bar
from gemloom.cli.terminal import note, one_line, progress, read_stdin, render, utf8, waiting
from gemloom.errors import OptionError

if TYPE_CHECKING:
    from gemloom.adapters.info import AdapterInfo
    from gemloom.compute.placement import Placement
    from gemloom.files.gguf import GGUF
    from gemloom.model import Model

_THEN = "reading the vocabulary"  # the one thing that takes longer than weights may take


def default_model() -> str:
    """The name of the built-in model."""
    from gemloom.files.builtin import DEFAULT_MODEL

    return DEFAULT_MODEL


def names_model(text: str) -> bool:
    """Whether a lone argument is meant as a model, not as a prompt."""
    from gemloom.files.names import is_url

    known = text.startswith("hf:") or text.endswith((".gguf", ".gguf.sealed")) or is_url(text)
    return known or text == default_model() or os.path.exists(text)


def model_and_text(first: str | None, second: str | None) -> tuple[str, str]:
    """[MODEL] [TEXT] told apart: a lone argument that names no model is the text.

    A text that is missing, or -, is read from stdin. OptionError where nobody would write there.
    """
    if second is None and first is not None and not names_model(first):
        first, second = None, first
    if second is None and sys.stdin.isatty():
        raise OptionError("there is no text; give one, or - to type it")
    text = read_stdin() if second in (None, "-") else second
    assert text is not None
    return first or default_model(), utf8("the text", text)


def open_file(name: str, key: Path | None = None) -> "GGUF":
    """The header of a model file, sealed with ``key`` or not; no weights are read."""
    from gemloom.files import gguf, source

    return gguf.read(source.resolve(name, key=key))


def adapter_file(text: str) -> tuple[str, float]:
    """PATH[@SCALE] taken apart; the scale is 1 where what follows the last @ is no number.

    A file or folder that has that name, with an @ in it, is meant by it.
    """
    path, _, scale = text.rpartition("@")
    try:
        return (path, float(scale)) if path and not os.path.exists(text) else (text, 1.0)
    except ValueError:
        return text, 1.0


def load_adapters(model: "Model", given: list[str]) -> dict[str, float]:
    """Load PATH[@SCALE]s, and tell what they change. Gives the adapters a request is to name."""
    from gemloom.files.names import shown

    scales = {}
    for number, text in enumerate(given, 1):
        path, scale = adapter_file(text)
        with waiting(f"loading {shown(path)}"):
            info = model.adapters.load(f"adapter-{number}", path, scale)
        note(summary(shown(path), info))
        scales[info.name] = scale
    return scales


def summary(path: str, info: "AdapterInfo") -> str:
    """One line about an adapter that was loaded."""
    ignored = f", {len(info.ignored)} ignored" if info.ignored else ""
    return (
        f"{one_line(path)}: {info.matrices} matrices changed{ignored}, rank {info.rank}, "
        f"scale {info.scale:g}"
    )


def open_model(name: str, load: LoadOptions) -> "Model":
    """The model, with a bar if it takes long: of the bytes that come, or of what is packed."""
    from gemloom.files import gguf, source
    from gemloom.loading.build import build_model
    from gemloom.options import Options

    options = Options(**load.given())  # wrong ones are told before a file is fetched
    file = gguf.read(source.resolve(name, key=load.key_file, forward=True))

    def planned(placement: "Placement") -> None:
        _tell(placement)
        _tell_unused(load, placement)

    if (coming := _coming(file)) is not None:
        with stoppable(), coming:
            return build_model(file, options, planned=planned)
    with progress(_loading(file), then=_THEN) as show, stoppable():
        return build_model(file, options, progress=show, planned=planned)


@contextmanager
def stoppable() -> Iterator[None]:
    """At a terminal the first Ctrl-C says that it was heard, as a step may have to end first.

    A second one does not wait for that.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        signal.signal(signal.SIGINT, lambda *_: os._exit(128 + signal.SIGINT))
        if sys.stderr.isatty():
            os.write(2, b"\r\nstopping; Ctrl-C again ends it at once\r\n")
        raise KeyboardInterrupt

    before, ended = signal.getsignal(signal.SIGINT), threading.Event()
    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, stop)
    # While workers get their weights, signals are kept from this thread: another has to take them.
    taker = threading.Thread(target=ended.wait, daemon=True)
    taker.start()
    try:
        yield
    finally:
        ended.set()
        signal.signal(signal.SIGINT, before)


def _loading(file: "GGUF") -> str:
    """The title of a bar, which has no room for folders."""
    return f"loading {os.path.basename(file.name)}"


def _tell(placement: "Placement") -> None:
    """Print what goes where, if there is a choice."""
    if not placement.on_host:
        render(plan_table(placement), aside=True)


def _tell_unused(load: LoadOptions, placement: "Placement") -> None:
    """Say which options do nothing without a device to put layers on."""
    for flag, given in (("--gpu-layers", load.gpu_layers), ("--tensor-split", load.tensor_split)):
        if given and placement.on_host:
            note(f"{flag} does nothing: all is on the CPU (gemloom doctor lists the devices)")


def _coming(file: "GGUF") -> AbstractContextManager[None] | None:
    """A bar for bytes that come from elsewhere; None where all are there."""
    from gemloom.files.blob import Blocks, Stream

    blobs = {info.blob for info in file.tensors.values()}
    coming = [blob for blob in blobs if isinstance(blob, Blocks | Stream)]
    if not coming:
        return None
    known = all(isinstance(blob, Blocks) for blob in coming)
    total = sum(blob.size for blob in coming) if known else None
    return bar(_loading(file), total, lambda: sum(blob.fetched for blob in coming), _THEN)
