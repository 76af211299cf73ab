"""Which class is the forward pass of which architecture: one line for each.

What its files say is in ``facts.py``, which needs no native library.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

import numpy as np

from gemloom.compute.kv import KV, Rows
from gemloom.errors import OptionError
from gemloom.ggml.device import Tensor
from gemloom.ggml.graph import Graph
from gemloom.models.config import Config, LayerSpec
from gemloom.models.gemma3 import Gemma3
from gemloom.models.gemma4 import Gemma4
from gemloom.models.layout import Layout
from gemloom.weights.weights import Tensors


class Forward(Protocol):
    """A forward pass over the tensors of one model."""

    def forward(self, g: Graph, rows: Rows, wanted: Rows | None, kv: KV) -> Tensor | None:
        """Logits [n_vocab, wanted rows]; None if no row's are wanted. K/V of all are written."""

    def rope(self, g: Graph, spec: LayerSpec, positions: Tensor, x: Tensor) -> Tensor:
        """Rotate x [hd, heads, T] as a layer does: cells move to other positions by it."""

    def finish(self, logits: np.ndarray) -> np.ndarray:
        """What is left to do with logits, in place, once they are read back."""


class Architecture(Protocol):
    """What makes a forward pass; a class is one."""

    def __call__(self, config: Config, weights: Tensors) -> Forward:
        """The forward pass over these tensors."""

    def layout(self, config: Config, there: Collection[str]) -> Layout:
        """The tensors it wants; ``there`` are the file's, where it has a choice."""


ARCHITECTURES: dict[str, Architecture] = {"gemma3": Gemma3, "gemma4": Gemma4}


def check_own(config: Config, own: object) -> None:
    """OptionError unless ``own`` is a class whose forward pass can take this model's place."""
    known = ARCHITECTURES[config.architecture]
    assert isinstance(known, type)
    if not (isinstance(own, type) and issubclass(own, known)):
        path = f"{known.__module__}.{known.__name__}"
        raise OptionError(f"architecture must be a subclass of {path} for this file, is {own!r}")
