"""What is read back of a step, and what comes: plain values between the engine and a program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from gemloom.sampling.candidates import Candidates
from gemloom.sampling.params import Floats


@dataclass(frozen=True, slots=True)
class Want:
    """What of the wanted rows of a step is read back.

    ``logits``: all of a row's, the largest (where a device finds them), or none, and then none are
    computed. ``hidden``: what goes into the head, after ``output_norm``. ``taps`` are names of
    intermediates.
    """

    logits: Literal["all", "largest", "none"] = "all"
    hidden: bool = False
    taps: frozenset[str] = frozenset()


ALL = Want()  # every logit of each wanted row


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """What a step gave: of each wanted row in the order of the batch, and of each tap.

    ``rows`` are logits float32 [n_vocab] or candidates of them; ``hidden`` is float32 [n_embd, n],
    slowest first.
    """

    rows: Sequence[Floats | Candidates] | np.ndarray = ()
    hidden: np.ndarray | None = None
    tapped: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def logits(self) -> np.ndarray:
        """All logits, float32 [rows, n_vocab]; of a step that wanted them."""
        assert isinstance(self.rows, np.ndarray)
        return self.rows
