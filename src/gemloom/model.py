"""The public face: generate, stream, chat, look inside. Loading one is in ``loading.py``.

Threads and coroutines may share a model: each request gets a slot of its own, and one thread
(``engine.py``) computes for all of them together.
"""

from __future__ import annotations

import weakref
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, replace
from difflib import get_close_matches
from functools import cached_property, partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, overload

import numpy as np

from gemloom.adapters.info import Named
from gemloom.adapters.registry import Adapters
from gemloom.adapters.request_adapters import marks
from gemloom.compute.batch import Chunk
from gemloom.compute.cells import Cells
from gemloom.compute.fitting import place
from gemloom.compute.kv import KV
from gemloom.compute.kv_store import KVStore
from gemloom.compute.placement import Placement
from gemloom.compute.program import Program
from gemloom.compute.slots import Slot
from gemloom.compute.want import ALL, Output, Want
from gemloom.engine import saved_state as state
from gemloom.engine.engine import Engine, Stats
from gemloom.engine.generation import ChatCompletion, ChatRun, Completion, Inbox, Run
from gemloom.engine.request import Request
from gemloom.errors import OptionError, RequestError
from gemloom.files import gguf
from gemloom.ggml.graph import SUMS
from gemloom.ggml.memory import trim_memory
from gemloom.ggml.rpc import speaking
from gemloom.kernels.library import fastest
from gemloom.kernels.packing import Progress
from gemloom.models.config import Config, Kind, from_gguf
from gemloom.models.registry import ARCHITECTURES, Architecture, check_own
from gemloom.options import Options
from gemloom.sampling.params import SamplingParams, check_vocabulary
from gemloom.sampling.params import from_options as sampling_params
from gemloom.text.bounds import Constraint
from gemloom.text.chat import Message
from gemloom.text.compose import Composed, Composer, chat_options
from gemloom.text.no_vocabulary import read_tokenizer
from gemloom.text.prompts import integers, prompt_ids
from gemloom.weights.weights import Weights

if TYPE_CHECKING:
    from gemloom.text.constraint import Grammars

LOGITS_BYTES = 64 << 20  # of one step, where many rows' logits are wanted


class Model:
    """A loaded model. Made by ``gemloom.load()``; free with ``close()`` or ``with``.

    Attributes: ``name`` (the file's), ``config`` (what the file says of the architecture),
    ``tokenizer``, ``options`` (as it was loaded), ``context`` (positions a sequence may fill),
    ``kv_type`` (of the K/V cells), ``placement`` (what lies on which device), ``adapters`` (the
    LoRA adapters that requests can name), ``fingerprint`` (tells its saved state from others').
    """

    def __init__(
        self,
        file: gguf.GGUF,
        options: Options,
        progress: Progress | None = None,
        planned: Callable[[Placement], None] | None = None,
        architecture: Architecture | None = None,
    ) -> None:
        """``progress`` is told how many bytes of the weights are packed, and of how many.

        ``planned`` is told where everything will go, before anything is loaded. ``architecture``
        is as in ``load``.
        """
        self.name = file.name
        self.options = options
        self.config: Config = from_gguf(file)
        options.context_for(self.config)  # told before any device is opened
        if architecture is not None:
            check_own(self.config, architecture)
        with speaking(options.devices), ThreadPoolExecutor(1) as aside, ExitStack() as stack:
            tokenizer = aside.submit(read_tokenizer, file.metadata, self.config.n_vocab)
            own = fastest() if options.kernels == "auto" else None
            kind = architecture or ARCHITECTURES[self.config.architecture]
            layout = kind.layout(self.config, file.tensors)
            self._device, self.placement = place(file, self.config, layout, options, own)
            stack.callback(self._device.close)
            self.context, self.kv_type = astuple(self.placement.choice)
            if planned:
                planned(self.placement)
            self._weights = Weights(self._device, file, layout, options, self.placement, progress)
            stack.callback(self._weights.close)
            self._store = KVStore(
                self._device, self.config, options.slots, options.chunk, self.placement
            )
            stack.callback(self._store.close)
            kv = KV(self._store)
            self._program = Program(self._device, self.config, self._weights, kv, architecture)
            stack.callback(self._program.close)
            self._program.reserve()
            self.tokenizer = tokenizer.result()
            self.fingerprint = state.fingerprint(file, self.config, self._weights.first_bytes)
            self._program.check()
            self._start_engine(layout.required, stack.pop_all())
        trim_memory()  # the tokenizer was made from much that is not needed any more

    def _start_engine(self, shapes: Mapping[str, tuple[int, ...]], free: ExitStack) -> None:
        """Have requests computed. ``free`` is closed with the engine, or if it does not start."""
        with ExitStack() as stack:
            stack.enter_context(free)
            cells = self._cells = Cells(self._store, self.options.snapshots << 20)
            self._engine = Engine(self._program, cells, self.options, self.context, free.close)
            stack.callback(self._engine.close)
            self.adapters = Adapters(
                self._device, self.placement, self.config, shapes, self._engine,
                self._program.discard,
            )  # fmt: skip
            free.callback(self.adapters.close)
            self._close = weakref.finalize(self, self._engine.close)
            stack.pop_all()

    # -- text --------------------------------------------------------------------------------

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        """Ids of ``text``, with no BOS. ``special`` reads strings like ``<bos>`` as the tokens."""
        return self.tokenizer.encode(text, special)

    def detokenize(self, ids: Sequence[int], special: bool = False) -> str:
        """Text of ``ids``; ``special`` shows control tokens.

        Gemma 3's ``<start_of_image>`` is none: files have it as text, and so has llama.cpp.
        """
        return self.tokenizer.decode(integers("ids", ids), special)

    # -- generation --------------------------------------------------------------------------

    def generate(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None, **sampling: Any
    ) -> Completion:
        """Complete a prompt: text, which gets one BOS, or ids, which are used as they are.

        How tokens are picked say ``params``, or the fields of ``SamplingParams`` by name, or both:
        then those given by name count. ``constraint`` and ``adapters`` are as in ``stream``.
        Raises RequestError, OptionError, ContextError, UnknownAdapterError.
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
        """As ``generate``, piece by piece, with ``for``, ``async for`` or ``await`` for the whole.

        It starts at once, or waits for a slot in the order of coming; ``after`` another run it has
        the turn of that, however many wait. ``constraint`` bounds what may be said. ``adapters``
        are names of loaded ones, or by name their scales (None for an adapter's own); it keeps the
        versions of now. Raises QueueFullError, UnknownAdapterError, EngineError, ClosedError too.
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

        The prompt is made by the file's own template. A base model has none: it gets lines that
        begin with "User:" and "Assistant:". A last message that is an assistant's is continued:
        the answer is the text after it.

        ``params`` and ``options`` are those of ``stream``, and the fields of
        ``gemloom.text.compose.ChatOptions``: tools and which may be called, the form of the answer,
        thoughts, the template's variables. A ``stop`` acts on the text alone, not on thoughts and
        calls. With ``stream`` the parts come as they are said: text, thoughts and tool calls.
        Raises RequestError for messages or tools that the template does not take, and for options
        that do not go together; ContextError.
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
        """Start an answer that ``composer`` has prepared. Raises what ``stream`` raises.

        The pieces' text has the markup of thoughts and calls; ``composed.splitter`` reads it.
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
            run = Run(request, inbox, self._engine.cancel, self)  # so that none is left alone
            self._engine.submit(request, after.request if after else None)
        except BaseException:
            lease.release()
            raise
        return run

    @cached_property
    def composer(self) -> Composer:
        """Makes prompts and bounds of chats, for ``chat`` and the server alike."""
        return Composer(self.tokenizer, lambda: self.grammars, self.config.n_vocab, self.context)

    @cached_property
    def grammars(self) -> Grammars:
        """Makes constraints: of a JSON schema, a regex, a Lark grammar or tools."""
        from gemloom.text.constraint import Grammars  # llguidance takes a while to load

        return Grammars(self.tokenizer, self.config.n_vocab)

    def chat_prompt(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The prompt that ``chat`` makes of a conversation, as ids. Raises as ``chat``."""
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

        ``adapters`` as in ``stream``, here and in what follows.
        """
        ids = self._ids(ids)
        named = {"all": list(range(len(ids))), "last": [len(ids) - 1]}
        wanted = named.get(rows, []) if isinstance(rows, str) else integers("rows", rows)
        chosen = sorted(set(wanted))
        parts = list(self.logits_in_parts(ids, chosen, adapters))
        order = {row: i for i, row in enumerate(chosen)}
        return np.concatenate(parts)[[order[row] for row in wanted]]

    def logits_in_parts(
        self, ids: Sequence[int], rows: Sequence[int], adapters: Named | None = None
    ) -> Iterator[np.ndarray]:
        """As ``logits``, for ascending ``rows``, some of them at a time: never over 64 MiB."""
        ids = self._ids(ids)
        if not rows or rows[0] < 0 or rows[-1] >= len(ids):
            raise OptionError(f'rows must be "all", "last" or from 0 to {len(ids) - 1}')
        for output in self._pass(ids, rows, adapters=adapters):
            if len(output.logits):
                yield output.logits

    def trace(
        self, ids: Sequence[int], taps: Sequence[str], adapters: Named | None = None
    ) -> dict[str, np.ndarray]:
        """Named intermediates for every position: float32 [len(ids), ...], slowest first.

        ``tap_names()`` lists the names. OptionError for an unknown one.
        """
        names = self.tap_names()
        for tap in taps:
            if tap not in names:
                near = ", ".join(get_close_matches(str(tap), names, 3))
                raise OptionError(f"no intermediate is named {tap!r}; near: {near or 'none'}")
        ids = self._ids(ids)
        want = Want(taps=frozenset(taps))
        parts = [out.tapped for out in self._pass(ids, range(len(ids)), want, adapters=adapters)]
        return {tap: np.concatenate([part[tap] for part in parts]) for tap in taps}

    def tap_names(self) -> list[str]:
        """Every intermediate that ``trace`` can give, in the order they are computed."""
        return self._engine.call(self._program.names)

    def embed(self, text: str | Sequence[int], adapters: Named | None = None) -> np.ndarray:
        """Mean of the last hidden states of a text or of ids, of length 1: float32 [n_embd]."""
        ids = self._ids(text)
        total = np.zeros(self.config.n_embd, np.float64)
        want = Want("none", hidden=True)
        for output in self._pass(ids, range(len(ids)), want, adapters=adapters):
            assert output.hidden is not None
            total += output.hidden.sum(axis=0)
        return (total / max(float(np.linalg.norm(total)), 1e-12)).astype(np.float32)

    def input_squares(self, ids: Sequence[int]) -> Iterator[dict[str, np.ndarray]]:
        """Step by step what every matrix is multiplied with: squares, summed over a step's rows.

        By tensor name and ``SUMS``: float32 [1, k]. Of experts [n_expert, k], and by name and
        ``IDS`` which of them each row met.
        """
        ids = self._ids(ids)
        want = Want("none", taps=frozenset(name + SUMS for name in self._weights.matrices))
        for output in self._pass(ids, range(len(ids)), want):
            yield dict(output.tapped)

    def _pass(
        self,
        ids: Sequence[int],
        wanted: Sequence[int],
        want: Want = ALL,
        *,
        adapters: Named | None = None,
    ) -> Iterator[Output]:
        """Run ids from nothing in a slot of its own, and give what each step has of ``want``.

        ``wanted`` are rows, ascending. A step ends before its logits are over LOGITS_BYTES.
        """
        most = max(1, LOGITS_BYTES // 4 // self.config.n_vocab)
        most = len(ids) if want.logits == "none" else most
        with self.adapters.lease(adapters, ids) as active, self._held_slot() as slot:
            while (start := len(slot.tokens)) < len(ids):
                first, stop = bisect_left(wanted, start), start + self._engine.allowance
                if first + most < len(wanted):
                    stop = min(stop, wanted[first + most])
                rows = [row - start for row in wanted[first : bisect_left(wanted, stop)]]
                chunk = Chunk(slot.index, start, ids[start:stop], rows, active)
                yield self._engine.call(partial(self._compute, slot, chunk, want))

    def _compute(self, slot: Slot, chunk: Chunk, want: Want) -> Output:
        output = self._program.run([chunk], want)
        self._cells.extend(slot, chunk.tokens, marks(chunk.adapters))
        return output

    @contextmanager
    def _held_slot(self) -> Iterator[Slot]:
        slot = self._engine.hold()
        try:
            yield slot
        except BaseException:
            self._engine.release(slot, forget=True)  # what a failed step wrote is not reused
            raise
        else:
            self._engine.release(slot)

    @property
    def times(self) -> dict[str, float]:
        """Seconds since it was loaded by phase of a step, as ``Program.times``."""
        return dict(self._program.times)

    @property
    def backends(self) -> list[str]:
        """What it computes on, preferred first."""
        return self._device.names

    @property
    def fallbacks(self) -> dict[str, int]:
        """Operations of the last step that a device lacks, and how many ran on the CPU instead."""
        return self._program.fallbacks

    @property
    def threads(self) -> int:
        """Threads it computes with."""
        return self._device.threads

    def memory(self) -> dict[str, int]:
        """Bytes by kind; ``mapped`` are pages of the file, and of that of packed weights."""
        return {
            "weights": self._weights.bytes,
            "per_layer_table": self._weights.per_layer_bytes,
            "kv_full": self._store.nbytes(Kind.FULL),
            "kv_sliding": self._store.nbytes(Kind.SLIDING),
            "adapters": self.adapters.nbytes,
            "compute": self._device.compute_bytes,
            "mapped": self._weights.bytes_mapped,
            "copied": self._weights.bytes_copied,
            "on_devices": self._weights.bytes_on_devices,
            "repacked": self._weights.bytes_repacked,
            "packed": self._weights.bytes_packed,
        }

    def stats(self) -> Stats:
        """What is running and waiting, and counts since the model was loaded."""
        return self._engine.stats()

    def reset(self) -> None:
        """Forget what was computed: kept graphs, prefixes in the cells and snapshots of windows.

        For when the forward pass was changed under a loaded model. RequestError while requests run.
        """
        self._engine.call(self._reset)

    def _reset(self) -> None:
        if self._cells.busy:
            raise RequestError("requests are under way: a model is reset between them")
        self._cells.forget()
        self._program.forget()

    # -- state -------------------------------------------------------------------------------

    def save_state(self) -> bytes:
        """The tokens and K/V of the request that ended last. RequestError if none is held."""
        return self._engine.call(
            lambda: state.save(self.fingerprint, self._cells, self._cells.latest())
        )

    def load_state(self, data: bytes) -> int:
        """Put saved state into a slot, where the next prompt that begins with it finds it.

        Returns how many tokens it has. StateError, and nothing changed, if it is damaged or of
        another model.
        """
        saved = state.parse(self.fingerprint, self._cells, data)
        with self._held_slot() as slot:
            self._engine.call(lambda: self._cells.restore(slot, saved))
        return len(saved.tokens)

    # -- end ---------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether it has been closed."""
        return not self._close.alive

    def __repr__(self) -> str:
        kind, slots = self.config.architecture, self.options.slots
        state = f"context {self.context:,}, slots {slots}"
        return f"<gemloom.Model {self.name}: {kind}, {'closed' if self.closed else state}>"

    def close(self) -> None:
        """Free everything. What is under way ends with ClosedError; a second call does nothing."""
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
