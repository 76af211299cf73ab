"""From what the command line names to an open file or model."""

import os
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from gemloom.cli.options import LoadOptions
from gemloom.cli.progress import bar
from gemloom.cli.terminal import waiting

if TYPE_CHECKING:
    from gemloom.gguf import GGUF
    from gemloom.model import Model


def default_model() -> str:
    """The name of the built-in model."""
    from gemloom.builtin import DEFAULT_MODEL

    return DEFAULT_MODEL


def names_model(text: str) -> bool:
    """Whether a lone argument is meant as a model, not as a prompt."""
    from gemloom.urls import is_url

    known = text.startswith("hf:") or text.endswith((".gguf", ".gguf.sealed")) or is_url(text)
    return known or text == default_model() or os.path.exists(text)


def open_file(name: str) -> "GGUF":
    """The header of a model file; no weights are read."""
    from gemloom import gguf, source

    return gguf.read(source.resolve(name))


def open_model(name: str, load: LoadOptions) -> "Model":
    """The model, with a spinner if it takes long, or a bar where bytes have to come."""
    from gemloom import gguf, source
    from gemloom.model import Model
    from gemloom.options import Options

    options = Options(**load.given())  # wrong ones are told before a file is fetched
    file = gguf.read(source.resolve(name, key=load.key_file, forward=True))
    with _loading(file):
        return Model(file, options)


def _loading(file: "GGUF") -> AbstractContextManager[None]:
    from gemloom.blob import Blocks, Stream

    blobs = {info.blob for info in file.tensors.values()}
    coming = [blob for blob in blobs if isinstance(blob, Blocks | Stream)]
    if not coming:
        return waiting(f"loading {file.name}")
    known = all(isinstance(blob, Blocks) for blob in coming)
    total = sum(blob.size for blob in coming) if known else None
    return bar(f"loading {file.name}", total, lambda: sum(blob.fetched for blob in coming))
