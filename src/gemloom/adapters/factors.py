"""What a LoRA adapter is, whatever file it came from; no tensor of ggml and no file in here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, slots=True)
class Pair:
    """The change of one matrix: W + scale * B A (Hu et al. 2021, arXiv:2106.09685).

    Of W [k, m] (ggml order) a is float [r, k] and b float [m, r] as numpy has them, slowest first;
    of an expert matrix [k, m, n_expert] they are [n_expert, r, k] and [n_expert, m, r].
    """

    a: np.ndarray
    b: np.ndarray
    scale: float  # alpha / r, or alpha / sqrt(r) for rsLoRA

    @property
    def rank(self) -> int:
        """Columns of b."""
        return int(self.b.shape[-1])


@dataclass(frozen=True, slots=True)
class Lora:
    """An adapter as its file has it, under the GGUF names of the matrices it changes."""

    name: str  # of the file, for messages
    architecture: str | None  # of the base, where the file tells: "gemma3", "gemma4"
    pairs: Mapping[str, Pair]  # by tensor: "blk.0.attn_q.weight"
    invocation: tuple[int, ...] = ()  # aLoRA: it acts from where these tokens begin
    ignored: Mapping[str, str] = field(
        default_factory=dict
    )  # tensors of the file not in pairs: why
