"""One request's state (Sequence), what one step computes (Batch), and what comes out (Piece).

Nothing here touches a tensor: logits come in as numpy rows.
"""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from gemloom.sampling import History, SamplingParams, generator, sample
from gemloom.slots import Slot
from gemloom.stopping import StopMatcher
from gemloom.tokenizer import StreamDecoder, Tokenizer


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tokens of the sequence in ``slot``, the first at position ``start``.

    ``wanted`` are the rows of this chunk whose logits somebody wants, ascending.
    """

    slot: int
    start: int
    tokens: abc.Sequence[int]
    wanted: abc.Sequence[int] = ()

    @property
    def end(self) -> int:
        """One past the last position."""
        return self.start + len(self.tokens)


Batch = abc.Sequence[Chunk]


@dataclass(frozen=True, slots=True)
class Piece:
    """One generated token and the text it brought, which may be empty."""

    text: str
    token: int
    logprob: float | None = None  # natural
    top_logprobs: tuple[tuple[int, float], ...] = ()  # (id, logprob), most likely first
    finish_reason: str | None = None  # "stop" or "length" on the last piece


class Sequence:
    """A request under way: its tokens, how many are in the cells, how the next is picked.

    ``limit`` bounds the tokens it may generate, besides what its params say. ``times`` are the
    seconds so far spent on picking tokens (sample) and on their text (text).
    """

    def __init__(
        self,
        prompt: abc.Sequence[int],
        params: SamplingParams,
        tokenizer: Tokenizer,
        slot: Slot,
        limit: int | None,
    ) -> None:
        self.tokens = list(prompt)
        self.params, self.slot = params, slot
        self.n_prompt, self.n_cached, self.n_generated = len(prompt), len(slot.tokens), 0
        self.finish_reason: str | None = None
        self.times = {"sample": 0.0, "text": 0.0}
        self.shifted = False  # whether positions have been dropped from the cells
        limits = [n for n in (limit, params.max_tokens) if n is not None]
        self._limit = min(limits, default=None)
        self._tokenizer = tokenizer
        self._decoder, self._stops = StreamDecoder(tokenizer), StopMatcher(params.stop)
        self._history, self._rng = History(set(prompt)), generator(params.seed)

    @property
    def n_done(self) -> int:
        """Tokens whose K/V are in the cells."""
        return len(self.slot.tokens)

    def next_chunk(self, size: int) -> Chunk:
        """At most ``size`` of the tokens not yet computed; logits for the last one only."""
        tokens = self.tokens[self.n_done : self.n_done + size]
        last = self.n_done + len(tokens) == len(self.tokens)
        return Chunk(self.slot.index, self.n_done, tokens, (len(tokens) - 1,) if last else ())

    def advance(self, chunk: Chunk) -> None:
        """Take note that a chunk's K/V are in the cells."""
        self.slot.tokens.extend(chunk.tokens)

    def forget(self, keep: int, drop: int) -> None:
        """Take note that the ``drop`` positions after the first ``keep`` have left the cells."""
        del self.tokens[keep : keep + drop]
        del self.slot.tokens[keep : keep + drop]
        self.shifted = True

    def accept(self, logits: np.ndarray) -> Piece:
        """Pick the next token from logits float32 [n_vocab], and say what it brought."""
        start = perf_counter()
        picked = sample(
            logits, self.params, self._history, self._rng, tuple(self._tokenizer.suppress)
        )
        self.tokens.append(picked.token)
        self.n_generated += 1
        self._history.add(picked.token)
        chosen = perf_counter()
        text = self._text(picked.token)
        self.times["sample"] += chosen - start
        self.times["text"] += perf_counter() - chosen
        return Piece(text, picked.token, picked.logprob, picked.top, self.finish_reason)

    def _text(self, token: int) -> str:
        """Text that may be shown after ``token``; sets the reason if it is the last."""
        if token in self._tokenizer.eog:
            self.finish_reason = "stop"
            return self._rest()
        text, stopped = self._stops.push(self._decoder.push(token))
        if not stopped and self.n_generated == self._limit:
            self.finish_reason = "length"
            text += self._rest()
            stopped = self._stops.matched is not None
        if stopped:
            self.finish_reason = "stop"
        return text

    def _rest(self) -> str:
        """What decoder and stop matcher hold back."""
        text, stopped = self._stops.push(self._decoder.flush())
        return text if stopped else text + self._stops.flush()
