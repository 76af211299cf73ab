"""The public face of a loaded model: generate, stream, chat, look inside.

Threads and coroutines may share a model. Each request gets a slot of its own, and one thread
(``engine/engine.py``) computes for all of them. Not here: loading (``loading/build.py``).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, overload

import numpy as np

from gemloom.engine import saved_state as state
from gemloom.engine.generation import ChatCompletion, ChatRun, Completion, Inbox, Run
from gemloom.engine.inspector import Inspector
from gemloom.engine.request import Request
from gemloom.sampling.params import SamplingParams, check_vocabulary
from gemloom.sampling.params import from_options as sampling_params
from gemloom.text.compose import Composed, Composer, chat_options
from gemloom.text.prompts import integers, prompt_ids

if TYPE_CHECKING:
    from gemloom.adapters.info import Named
    from gemloom.adapters.registry import Adapters
    from gemloom.engine.engine import Engine, Stats
    from gemloom.loading.parts import Parts
    from gemloom.text.bounds import Constraint
    from gemloom.text.chat import Message
    from gemloom.text.constraint import Grammars


class Model:
    """A loaded model. ``gemloom.load()`` makes it; ``close()`` or ``with`` frees it.

    Attributes: ``name`` (the file's), ``config`` (the file's facts about the architecture),
    ``tokenizer``, ``options`` (it was loaded with these), ``context`` (positions per sequence),
    ``kv_type`` (of the K/V cells), ``placement`` (which device holds what), ``adapters`` (the
    LoRA adapters that requests can name), ``fingerprint`` (saved state fits only this one).
    """

    def __init__(self, parts: Parts, engine: Engine, adapters: Adapters) -> None:
        """Only ``loading/build.py`` makes one. Closing the model closes ``engine``."""
        self.name, self.options, self.config = parts.name, parts.options, parts.config
        self.tokenizer, self.fingerprint = parts.tokenizer, parts.fingerprint
        self.placement, self.adapters = parts.placement, adapters
        self.context, self.kv_type = parts.placement.choice.context, parts.placement.choice.kv_type
        self._parts, self._engine = parts, engine
        self._inspector = Inspector(engine, parts.program, adapters)
        self._close = weakref.finalize(self, engine.close)

    # -- text --------------------------------------------------------------------------------

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        """Ids of ``text``, without BOS. ``special`` makes strings like ``<bos>`` control tokens."""
        return self.tokenizer.encode(text, special)

    def detokenize(self, ids: Sequence[int], special: bool = False) -> str:
        """Text of ``ids``; ``special`` shows control tokens.

        The file's token types decide which tokens are control tokens. Gemma 3's
        ``<start_of_image>`` is text there, as it is in llama.cpp.
        """
        return self.tokenizer.decode(integers("ids", ids), special)

    # -- generation --------------------------------------------------------------------------

    def generate(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None, **sampling: Any
    ) -> Completion:
        """Complete a prompt: text, which gets one BOS, or ids, which are used as they are.

        Pass sampling settings as ``params``, as keyword arguments, or both; keyword arguments
        win. ``constraint`` and ``adapters`` are as in ``stream``. Raises RequestError,
        OptionError, ContextError, UnknownAdapterError.
        """
        return self.stream(prompt, params, **sampling).completion()

    def stream(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        constraint: Constraint | None = None,
        adapters: Named | None = None,
        after: Run | None = None,
        **sampling: Any,
    ) -> Run:
        """As ``generate``, piece by piece: ``for`` or ``async for``, or ``await`` the whole answer.

        It starts at once, or waits for a slot: first come, first served. ``after`` names a run to
        wait for first; the queue is never too full then. ``constraint`` bounds the text.
        ``adapters``: names of loaded adapters, or a dict of name to scale (None for the default).
        The request keeps the versions that the names mean now. Raises as ``generate``, and
        QueueFullError, EngineError, ClosedError.
        """
        chosen = sampling_params(sampling, params)
        return self.answer(Composed(prompt, chosen, constraint), adapters, after)

    @overload
    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        stream: Literal[False] = False,
        **options: Any,
    ) -> ChatCompletion: ...
    @overload
    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        stream: Literal[True],
        **options: Any,
    ) -> ChatRun: ...
    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        stream: bool = False,
        **options: Any,
    ) -> ChatCompletion | ChatRun:
        """Answer a conversation: ``[{"role": "user", "content": "..."}, ...]``.

        The file's own template makes the prompt. A base model has none: it gets lines that begin
        with "User:" and "Assistant:". If the last message is the assistant's, the answer
        continues it.

        ``params`` and ``options`` are those of ``stream``, plus the fields of
        ``gemloom.text.compose.ChatOptions``: tools, tool choice, the form of the answer, thoughts,
        the template's variables. ``stop`` acts on the text, not on thoughts or calls. ``stream``
        gives text, thoughts and tool calls while the model writes them. Raises as ``stream``, and
        RequestError if the template refuses messages or tools, or if options contradict.
        """
        asked, sampling = chat_options(options)
        adapters = sampling.pop("adapters", None)
        chosen = sampling_params(sampling, params)
        [composed] = self.composer.compose(messages, asked, chosen)
        run = ChatRun(self.answer(composed, adapters), composed.splitter)
        return run if stream else run.completion()

    def answer(
        self, composed: Composed, adapters: Named | None = None, after: Run | None = None
    ) -> Run:
        """Start an answer that ``composer`` has prepared. Raises as ``stream``.

        The text of its pieces contains the markup of thoughts and calls. ``composed.splitter``
        reads that.
        """
        check_vocabulary(composed.params, self.config.n_vocab)
        ids = self._ids(composed.prompt)
        params, lease = composed.params, self.adapters.lease(adapters, ids)
        if self.options.keep is None:
            room = self.context - len(ids) + 1
            params = replace(params, max_tokens=min(room, params.max_tokens or room))
        inbox = Inbox()
        try:
            request = Request(
                ids, params, self.tokenizer, inbox.put,
                constraint=composed.constraint, stops=composed.stops, held=lease,
            )  # fmt: skip
            run = Run(request, inbox, self._engine.cancel, self)  # a run keeps its model alive
            self._engine.submit(request, after.request if after else None)
        except BaseException:
            lease.release()
            raise
        return run

    @cached_property
    def composer(self) -> Composer:
        """Makes the prompts and bounds of chats, for ``chat`` and the server."""
        return Composer(self.tokenizer, lambda: self.grammars, self.config.n_vocab, self.context)

    @cached_property
    def grammars(self) -> Grammars:
        """Makes constraints from a JSON schema, a regex, a Lark grammar or tools."""
        from gemloom.text.constraint import Grammars  # llguidance takes a while to load

        return Grammars(self.tokenizer, self.config.n_vocab)

    def chat_prompt(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The ids of the prompt that ``chat`` makes from a conversation. Raises as ``chat``."""
        return self.composer.prompt(messages, tools, variables or {})

    def _ids(self, prompt: str | Sequence[int]) -> list[int]:
        return prompt_ids(prompt, self.tokenizer, self.config.n_vocab, self.context)

    # -- looking inside ----------------------------------------------------------------------

    def logits(
        self,
        ids: Sequence[int],
        rows: Literal["all", "last"] | Sequence[int] = "all",
        adapters: Named | None = None,
    ) -> np.ndarray:
        """Logits after each of ``rows`` (positions in ``ids``): float32 [rows, n_vocab].

        ``adapters`` are as in ``stream``, here and in the methods below.
        """
        return self._inspector.logits(self._ids(ids), rows, adapters)

    def logits_in_parts(
        self, ids: Sequence[int], rows: Sequence[int], adapters: Named | None = None
    ) -> Iterator[np.ndarray]:
        """As ``logits``, for ascending ``rows``, in several arrays of at most 64 MiB."""
        yield from self._inspector.logits_in_parts(self._ids(ids), rows, adapters)

    def trace(
        self, ids: Sequence[int], taps: Sequence[str], adapters: Named | None = None
    ) -> dict[str, np.ndarray]:
        """Named intermediates for every position: float32 [len(ids), ...], slowest first.

        ``tap_names()`` lists the names. OptionError for an unknown one.
        """
        return self._inspector.trace(self._ids(ids), taps, adapters)

    def tap_names(self) -> list[str]:
        """Every intermediate that ``trace`` can give, in the order of computing."""
        return self._inspector.tap_names()

    def embed(self, text: str | Sequence[int], adapters: Named | None = None) -> np.ndarray:
        """Mean of the last hidden states of a text or of ids, of length 1: float32 [n_embd]."""
        return self._inspector.embed(self._ids(text), adapters)

    def input_squares(self, ids: Sequence[int]) -> Iterator[dict[str, np.ndarray]]:
        """For each step and each matrix, the squared inputs, summed over the step's rows.

        By tensor name and ``SUMS``: float32 [1, k]. Experts have [n_expert, k]; name and ``IDS``
        then give the experts of each row.
        """
        yield from self._inspector.input_squares(self._ids(ids), self._parts.weights.matrices)

    @property
    def times(self) -> dict[str, float]:
        """Seconds since loading, by phase of a step, as ``Program.times``."""
        return dict(self._parts.program.times)

    @property
    def backends(self) -> list[str]:
        """The devices it computes on, preferred first."""
        return self._parts.device.names

    @property
    def fallbacks(self) -> dict[str, int]:
        """Operations that the last step ran on the CPU because a device lacks them, with counts."""
        return self._parts.program.fallbacks

    @property
    def threads(self) -> int:
        """How many threads compute."""
        return self._parts.device.threads

    def memory(self) -> dict[str, int]:
        """Bytes by kind. ``mapped`` are pages of the file and of the file of packed weights."""
        return self._parts.memory(self.adapters.nbytes)

    def stats(self) -> Stats:
        """Running and waiting requests, and counts since loading."""
        return self._engine.stats()

    def reset(self) -> None:
        """Forget all results: kept graphs, prefixes in the cells and snapshots of windows.

        Use it after changing the forward pass of a loaded model. RequestError while requests run.
        """
        self._engine.reset()

    # -- state -------------------------------------------------------------------------------

    def save_state(self) -> bytes:
        """The tokens and K/V of the request that ended last. RequestError if none is held."""
        cells = self._engine.cells
        return self._engine.call(lambda: state.save(self.fingerprint, cells, cells.latest()))

    def load_state(self, data: bytes) -> int:
        """Put saved state into a slot. The next prompt that begins with its tokens reuses it.

        Returns its number of tokens. Damaged state, or that of another model, is a StateError
        and changes nothing.
        """
        cells = self._engine.cells
        saved = state.parse(self.fingerprint, cells, data)
        with self._engine.held_slot() as slot:
            self._engine.call(lambda: cells.restore(slot, saved))
        return len(saved.tokens)

    # -- end ---------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether it is closed."""
        return not self._close.alive

    def __repr__(self) -> str:
        kind, slots = self.config.architecture, self.options.slots
        state = f"context {self.context:,}, slots {slots}"
        return f"<gemloom.Model {self.name}: {kind}, {'closed' if self.closed else state}>"

    def close(self) -> None:
        """Free everything. Running requests end with ClosedError. A second call does nothing."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
