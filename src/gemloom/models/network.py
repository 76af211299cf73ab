"""The network of a file: its facts, its forward pass and its tensors, looked up in one place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from gemloom.files.gguf import GGUF
from gemloom.models.config import Config
from gemloom.models.facts import from_gguf
from gemloom.models.layout import Layout
from gemloom.models.registry import ARCHITECTURES, Architecture, check_own


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """What a file holds, told from its header; no weights."""

    config: Config
    architecture: Architecture  # the class of the forward pass
    layout: Layout

    @classmethod
    def of(cls, file: GGUF, own: Architecture | None = None) -> Self:
        """The network of a file, with ``own`` in place of its architecture's forward pass.

        Raises ConfigError or TensorError where the file's keys make none, OptionError where
        ``own`` cannot take that place.
        """
        config = from_gguf(file)
        if own is not None:
            check_own(config, own)
        architecture = own or ARCHITECTURES[config.architecture]
        layout = architecture.layout(config, file.tensors)
        return cls(config=config, architecture=architecture, layout=layout)
