"""From what the command line names to an open file or model."""

import os
from typing import TYPE_CHECKING

from gemloom.cli.options import LoadOptions
from gemloom.cli.terminal import progress

if TYPE_CHECKING:
    from gemloom.gguf import GGUF
    from gemloom.model import Model


def default_model() -> str:
    """The name of the built-in model."""
    from gemloom.builtin import DEFAULT_MODEL

    return DEFAULT_MODEL


def names_model(text: str) -> bool:
    """Whether a lone argument is meant as a model, not as a prompt."""
    known = text.startswith("hf:") or text.endswith(".gguf") or text == default_model()
    return known or os.path.exists(text)


def open_file(name: str) -> "GGUF":
    """The header of a model file; no weights are read."""
    from gemloom import gguf, source

    return gguf.read(source.resolve(name))


def open_model(name: str, load: LoadOptions) -> "Model":
    """The model, with a bar if it takes long."""
    from gemloom.model import Model
    from gemloom.options import Options

    options = Options(**load.given())  # wrong ones are told before a file is fetched
    file = open_file(name)
    with progress(f"loading {name}") as advance:
        return Model(file, options, advance)
