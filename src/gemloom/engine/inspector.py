"""Computes what a model thinks of given ids: logits, intermediates, embeddings, products' inputs.

Each call takes a slot of its own and computes between the steps of the running requests. Ids are
checked already.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterator, Sequence
from difflib import get_close_matches
from functools import partial
from typing import Literal

import numpy as np

from gemloom.adapters.info import Named
from gemloom.adapters.registry import Adapters
from gemloom.adapters.request_adapters import marks
from gemloom.compute.batch import Chunk
from gemloom.compute.program import Program
from gemloom.compute.slots import Slot
from gemloom.compute.want import ALL, Output, Want
from gemloom.engine.engine import Engine
from gemloom.errors import OptionError
from gemloom.ggml.graph import SUMS
from gemloom.text.prompts import integers

LOGITS_BYTES = 64 << 20  # of one step, where many rows' logits are wanted


class Inspector:
    """Looks inside one model; any thread may call. ``Model`` says what the methods give."""

    def __init__(self, engine: Engine, program: Program, adapters: Adapters) -> None:
        self._engine, self._program, self._adapters = engine, program, adapters
        self._config = program.config

    def logits(
        self,
        ids: Sequence[int],
        rows: Literal["all", "last"] | Sequence[int],
        adapters: Named | None,
    ) -> np.ndarray:
        """Logits after each of ``rows``, in their order."""
        named = {"all": list(range(len(ids))), "last": [len(ids) - 1]}
        wanted = named.get(rows, []) if isinstance(rows, str) else integers("rows", rows)
        chosen = sorted(set(wanted))
        parts = list(self.logits_in_parts(ids, chosen, adapters))
        order = {row: i for i, row in enumerate(chosen)}
        return np.concatenate(parts)[[order[row] for row in wanted]]

    def logits_in_parts(
        self, ids: Sequence[int], rows: Sequence[int], adapters: Named | None
    ) -> Iterator[np.ndarray]:
        """As ``logits``, for ascending ``rows``, at most LOGITS_BYTES at a time."""
        if not rows or rows[0] < 0 or rows[-1] >= len(ids):
            raise OptionError(f'rows must be "all", "last" or from 0 to {len(ids) - 1}')
        for output in self._pass(ids, rows, ALL, adapters):
            if len(output.logits):
                yield output.logits

    def trace(
        self, ids: Sequence[int], taps: Sequence[str], adapters: Named | None
    ) -> dict[str, np.ndarray]:
        """Intermediates for every position, by name."""
        names = self.tap_names()
        for tap in taps:
            if tap not in names:
                near = ", ".join(get_close_matches(str(tap), names, 3))
                raise OptionError(f"no intermediate is named {tap!r}; near: {near or 'none'}")
        want = Want(taps=frozenset(taps))
        parts = [out.tapped for out in self._pass(ids, range(len(ids)), want, adapters)]
        return {tap: np.concatenate([part[tap] for part in parts]) for tap in taps}

    def tap_names(self) -> list[str]:
        """Every name that ``trace`` takes, in the order of computing."""
        return self._engine.call(self._program.names)

    def embed(self, ids: Sequence[int], adapters: Named | None) -> np.ndarray:
        """Mean of the last hidden states, of length 1."""
        total = np.zeros(self._config.n_embd, np.float64)
        want = Want("none", hidden=True)
        for output in self._pass(ids, range(len(ids)), want, adapters):
            assert output.hidden is not None
            total += output.hidden.sum(axis=0)
        return (total / max(float(np.linalg.norm(total)), 1e-12)).astype(np.float32)

    def input_squares(
        self, ids: Sequence[int], matrices: Collection[str]
    ) -> Iterator[dict[str, np.ndarray]]:
        """For each step the squared inputs of ``matrices``, summed over the step's rows."""
        want = Want("none", taps=frozenset(name + SUMS for name in matrices))
        for output in self._pass(ids, range(len(ids)), want, None):
            yield dict(output.tapped)

    def _pass(
        self, ids: Sequence[int], wanted: Sequence[int], want: Want, adapters: Named | None
    ) -> Iterator[Output]:
        """Run ids from position 0 in a slot of its own; give what each step has of ``want``.

        ``wanted`` are rows, ascending. A step ends before its logits exceed LOGITS_BYTES.
        """
        most = max(1, LOGITS_BYTES // 4 // self._config.n_vocab)
        most = len(ids) if want.logits == "none" else most
        with self._adapters.lease(adapters, ids) as active, self._engine.held_slot() as slot:
            while (start := len(slot.tokens)) < len(ids):
                first, stop = bisect_left(wanted, start), start + self._engine.allowance
                if first + most < len(wanted):
                    stop = min(stop, wanted[first + most])
                rows = [row - start for row in wanted[first : bisect_left(wanted, stop)]]
                chunk = Chunk(
                    slot=slot.index,
                    start=start,
                    tokens=ids[start:stop],
                    wanted=rows,
                    adapters=active,
                )
                yield self._engine.call(partial(self._compute, slot, chunk, want))

    def _compute(self, slot: Slot, chunk: Chunk, want: Want) -> Output:
        output = self._program.run([chunk], want)
        self._engine.cells.extend(slot, chunk.tokens, marks(chunk.adapters))
        return output
