"""One request's state (Request), what one step computes (Batch), and what comes out (Piece).

Nothing here touches a tensor: logits come in as numpy rows, or as candidates of them.
"""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass
from time import perf_counter
from typing import Protocol

from gemloom.adapters.request_adapters import Active
from gemloom.compute.batch import Chunk
from gemloom.compute.slots import Slot
from gemloom.errors import GemloomError
from gemloom.sampling.candidates import Candidates, sample, suffice
from gemloom.sampling.params import NEVER, Floats, History, SamplingParams, generator
from gemloom.text.bounds import Constraint
from gemloom.text.repetition import Repetition
from gemloom.text.stopping import StopMatcher, Stops
from gemloom.text.tokenizer import StreamDecoder, Tokenizer


@dataclass(frozen=True, slots=True)
class Piece:
    """One generated token and the text it brought, which may be empty."""

    text: str
    token: int
    logprob: float | None = None  # natural
    top_logprobs: tuple[tuple[int, float], ...] = ()  # (id, logprob), most likely first
    finish_reason: str | None = None  # "stop", "length" or "repetition" on the last piece


class Held(Protocol):
    """The adapters of a request, kept for it until it ends."""

    @property
    def active(self) -> tuple[Active, ...]:
        """What they do."""

    def release(self) -> None:
        """Let go of them; never waits, and a second call does nothing."""


Sink = abc.Callable[[Piece | GemloomError | None], None]


class Request:
    """A request under way: its tokens, how many are in the cells, how the next is picked.

    ``sink`` gets what comes of it, in the thread that computes: each Piece, and at the end a
    GemloomError if it failed or None if it was cancelled; it must neither block nor raise.
    ``held`` are its adapters, which whoever ends it releases. ``stops`` finds its stop strings;
    None looks for those of ``params`` in all of its text. ``boundaries`` are positions of the
    prompt at which another one may part from it. RequestError for stop strings where there is no
    vocabulary.

    ``times`` are the seconds so far spent on picking tokens (sample) and on their text (text);
    ``started``, ``first`` and ``last`` when a slot was found, and when the first and the latest
    token came (``perf_counter``, 0 before).
    """

    def __init__(
        self,
        prompt: abc.Sequence[int],
        params: SamplingParams,
        tokenizer: Tokenizer,
        sink: Sink,
        *,
        constraint: Constraint | None = None,
        stops: Stops | None = None,
        held: Held | None = None,
    ) -> None:
        if params.stop:
            tokenizer.needs_text("a stop string")
        self.tokens, self.n_prompt = list(prompt), len(prompt)
        self.params, self.sink, self.constraint = params, sink, constraint
        self.adapters = held.active if held else ()
        self._held = held
        self.slot: Slot | None = None
        self.n_cached, self.n_generated, self.n_done = 0, 0, 0
        self.finish_reason: str | None = None
        self.cancelled = self.ended = False
        self.after: Request | None = None  # it waits until that one has ended
        self.shifted = False  # whether positions have been dropped from the cells
        self.few = suffice(params)  # whether candidates may do in place of whole rows
        self.times = {"sample": 0.0, "text": 0.0}
        self.started = self.first = self.last = 0.0
        self.boundaries = _boundaries(prompt, tokenizer.turn)
        self._tokenizer, self._decoder = tokenizer, StreamDecoder(tokenizer)
        self._stops = StopMatcher(params.stop) if stops is None else stops
        self._history, self._rng = History(set(prompt)), generator(params.seed)
        self._repetition = Repetition(self._repetition_limit, tokenizer.decode)

    @property
    def _repetition_limit(self) -> int:
        """0, which is off, where every end is barred: that asks for all the tokens there are."""
        bias, ends = self.params.logit_bias, self._tokenizer.eog
        unending = ends and all(bias.get(token) == NEVER for token in ends)
        return 0 if unending else self.params.repetition_limit

    def begin(self, slot: Slot, n_cached: int) -> None:
        """Take note of the slot it computes in, whose cells hold its first tokens already."""
        self.slot, self.n_cached, self.n_done = slot, n_cached, n_cached
        self.started = perf_counter()

    @property
    def pending(self) -> int:
        """Tokens whose K/V are not in the cells yet."""
        return len(self.tokens) - self.n_done

    @property
    def decoding(self) -> bool:
        """Whether only its newest token is left to compute."""
        return self.pending == 1

    def next_chunk(self, size: int) -> Chunk:
        """At most ``size`` of the tokens not yet computed; logits for the last one only."""
        assert self.slot
        tokens = self.tokens[self.n_done : self.n_done + size]
        last = self.n_done + len(tokens) == len(self.tokens)
        wanted = (len(tokens) - 1,) if last else ()
        return Chunk(
            slot=self.slot.index,
            start=self.n_done,
            tokens=tokens,
            wanted=wanted,
            adapters=self.adapters,
        )

    def release(self) -> None:
        """Let go of its adapters: it has ended."""
        if self._held:
            self._held.release()

    def forget(self, keep: int, drop: int) -> None:
        """Take note that the ``drop`` positions after the first ``keep`` have left the cells."""
        del self.tokens[keep : keep + drop]
        self.n_done -= drop
        self.adapters = tuple(a.moved(keep, drop) for a in self.adapters)
        self.shifted = True

    def accept(self, logits: Floats | Candidates) -> Piece:
        """Pick the next token from logits float32 [n_vocab], and say what it brought."""
        start = perf_counter()
        allowed = self.constraint.mask() if self.constraint else None
        suppress = tuple(self._tokenizer.suppress)
        if allowed is not None:
            self._repetition.clear()  # a grammar may allow nothing else
        picked = sample(logits, self.params, self._history, self._rng, suppress, allowed)
        self.tokens.append(picked.token)
        self.n_generated += 1
        self._history.add(picked.token)
        if self.constraint:
            self.constraint.accept(picked.token)
        chosen = perf_counter()
        text = self._text(picked.token)
        self.last = perf_counter()
        self.first = self.first or self.last
        self.times["sample"] += chosen - start
        self.times["text"] += self.last - chosen
        return Piece(text, picked.token, picked.logprob, picked.top, self.finish_reason)

    def _text(self, token: int) -> str:
        """Text that may be shown after ``token``; sets the reason if it is the last."""
        if token in self._tokenizer.eog:
            self.finish_reason = "stop"
            return self._rest()
        text, stopped = self._stops.push(self._decoder.push(token))
        complete = self.constraint is not None and self.constraint.finished
        full, repeats = self.n_generated == self.params.max_tokens, self._repetition.push(token)
        if not stopped and (complete or full or repeats):
            self.finish_reason = "repetition" if repeats and not full else "length"
            text += self._rest()
            stopped = complete or self._stops.matched is not None
        if stopped:
            self.finish_reason = "stop"
        return text

    def _rest(self) -> str:
        """What decoder and stop matcher hold back."""
        text, stopped = self._stops.push(self._decoder.flush())
        return text if stopped else text + self._stops.flush()


def _boundaries(prompt: abc.Sequence[int], turn: int | None) -> frozenset[int]:
    """Where another prompt is likely to part from this one.

    Of a chat these are the ends of its first turn (a shared system prompt), of what comes before
    the last message (edited) and of what comes before the answer (the next turn, which may not
    have the thoughts of this one); of a plain text its end (asked again).
    """
    starts = [i for i, token in enumerate(prompt) if token == turn and i > 1]
    return frozenset([*starts[:1], *starts[-2:]] or [len(prompt) - 1])
