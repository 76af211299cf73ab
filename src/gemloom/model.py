"""The public face: load a model, generate, stream, chat, look inside.

Several threads may use one model, each request in a slot of its own; the arithmetic is
done one step at a time under a lock.
"""

from __future__ import annotations

import reprlib
import threading
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from difflib import get_close_matches
from operator import index
from types import TracebackType
from typing import Any, Literal, Self, overload

import numpy as np

from gemloom import chat, gguf, state
from gemloom.cache import KVCache
from gemloom.config import Config, from_gguf
from gemloom.errors import ClosedError, ContextError, OptionError, RequestError
from gemloom.generation import ChatCompletion, Completion, Run
from gemloom.ggml.device import Device
from gemloom.models import ARCHITECTURES
from gemloom.options import Options, from_options
from gemloom.runner import Runner, node_budget
from gemloom.sampling import check_vocabulary
from gemloom.sampling import from_options as sampling_params
from gemloom.sequence import Chunk, Piece
from gemloom.sequence import Sequence as Request
from gemloom.slots import Slot, Slots
from gemloom.source import DEFAULT_MODEL, resolve
from gemloom.tokenizer import Tokenizer
from gemloom.weights import Weights

LOGITS_BYTES = 64 << 20  # of one step, where many rows' logits are wanted
MAX_TAPS = 40  # more than a layer has
MAX_NODES = 1 << 17  # of one graph; ggml's scheduler reserves some kilobytes for each


def load(source: Any = DEFAULT_MODEL, **options: Any) -> Model:
    """Load a model.

    ``source`` is a path, "hf:owner/repo[:file]", a built-in name, bytes or another buffer, a
    list of paths or buffers that make up one file, or a binary file object. ``options`` are the
    fields of ``Options``. Raises SourceError, FormatError, ConfigError, TensorError or
    TokenizerError for a file that cannot be used, OptionError, DeviceError.
    """
    return Model(gguf.read(resolve(source)), from_options(options))


class Model:
    """A loaded model. Made by ``load()``; free with ``close()`` or ``with``."""

    def __init__(self, file: gguf.GGUF, options: Options) -> None:
        self.name = file.name
        self.options = options
        self.config: Config = from_gguf(file)
        self.context = options.context_for(self.config)
        self.tokenizer = Tokenizer(file.metadata)
        budget = node_budget(self.config, options.slots, MAX_TAPS * self.config.n_layer)
        if budget > MAX_NODES:
            n_layer = self.config.n_layer
            raise OptionError(f"slots {options.slots} are too many for {n_layer} layers")
        with ExitStack() as stack:
            self._device = Device(options.device, options.threads, budget)
            stack.callback(self._device.close)
            layout = ARCHITECTURES[self.config.architecture].layout(self.config, file.tensors)
            self._weights = Weights(
                self._device, file, layout, in_place=options.mmap, repack=options.repack
            )
            stack.callback(self._weights.close)
            self._kv = KVCache(
                self._device, self.config, options.slots, self.context, options.chunk,
                options.kv_type,
            )  # fmt: skip
            stack.callback(self._kv.close)
            self._runner = Runner(self._device, self.config, self._weights, self._kv)
            stack.callback(self._runner.close)
            self._runner.reserve()
            self._free = weakref.finalize(self, stack.pop_all().close)
        self._slots = Slots(options.slots, self.config.window, self._kv.cells.sliding)
        self._fingerprint = state.fingerprint(file, self.config)
        self._lock, self._computing_now = threading.RLock(), False
        self._ended: deque[Request] = deque()  # requests whose slots are to be given back
        self.closed = False

    # -- text --------------------------------------------------------------------------------

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        """Ids of ``text``, with no BOS. ``special`` reads strings like ``<bos>`` as the tokens."""
        return self.tokenizer.encode(text, special)

    def detokenize(self, ids: Sequence[int], special: bool = False) -> str:
        """Text of ``ids``; ``special`` shows control tokens."""
        return self.tokenizer.decode(_integers("ids", ids), special)

    # -- generation --------------------------------------------------------------------------

    def generate(self, prompt: str | Sequence[int], **sampling: Any) -> Completion:
        """Complete a prompt: text, which gets one BOS, or ids, which are used as they are.

        ``sampling`` are the fields of ``SamplingParams``. Raises RequestError, OptionError,
        ContextError.
        """
        return self._start(prompt, sampling).completion()

    def stream(self, prompt: str | Sequence[int], **sampling: Any) -> Run:
        """As ``generate``, piece by piece. Close the iterator to stop early."""
        return self._start(prompt, sampling)

    @overload
    def chat(
        self, messages: Sequence[chat.Message], *, stream: Literal[False] = False, **options: Any
    ) -> ChatCompletion: ...
    @overload
    def chat(
        self, messages: Sequence[chat.Message], *, stream: Literal[True], **options: Any
    ) -> Run: ...
    def chat(
        self,
        messages: Sequence[chat.Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        stream: bool = False,
        **sampling: Any,
    ) -> ChatCompletion | Run:
        """Answer a conversation: ``[{"role": "user", "content": "..."}, ...]``.

        The prompt is made by the file's own template, which gets ``tools`` and ``variables``
        (``{"enable_thinking": True}``); RequestError if it has none. With ``stream`` the pieces
        come one by one. The text is the model's own, thoughts and tool calls in it as it wrote
        them.
        """
        given = dict(variables or {}) | ({"tools": list(tools)} if tools else {})
        prompt = chat.encode_chat(self.tokenizer, messages, **given)
        if stream:
            return self._start(prompt, sampling)
        done = self.generate(prompt, **sampling)
        message = {"role": "assistant", "content": done.text}
        return ChatCompletion(message, done.finish_reason, done.usage)

    def _start(self, prompt: str | Sequence[int], sampling: dict[str, Any]) -> Run:
        params = sampling_params(sampling)
        check_vocabulary(params, self.config.n_vocab)
        ids = self._ids(prompt)
        limit = None if self.options.keep is not None else self.context - len(ids) + 1
        with self._lock:
            self._tidy()
            self._check_open()
            slot = self._slots.acquire(ids)
            request = Request(ids, params, self.tokenizer, slot, limit)
        return Run(request, self._step, self._finish)

    def _ids(self, prompt: str | Sequence[int]) -> list[int]:
        """Prompt as checked ids."""
        if isinstance(prompt, str):
            ids = self.tokenizer.with_bos(self.tokenizer.encode(prompt)) if prompt else []
        else:
            ids = _integers("the prompt", prompt)
        if not ids:
            raise RequestError("the prompt is empty")
        for token in ids:
            if not 0 <= token < self.config.n_vocab:
                raise OptionError(f"{token} is no token id of this model")
        if len(ids) > self.context:
            raise ContextError(f"the prompt has {len(ids):,} tokens, the context {self.context:,}")
        return ids

    def _step(self, request: Request) -> Piece | None:
        """Compute the next chunk of a request; a piece, if it made a token."""
        with self._computing(request.slot):
            if request.n_done >= self.context:
                self._shift(request)
            chunk = request.next_chunk(min(self.options.chunk, self.context - request.n_done))
            logits = self._runner.run([chunk])
            request.advance(chunk)
        return request.accept(logits[0]) if len(logits) else None

    @contextmanager
    def _computing(self, slot: Slot) -> Iterator[None]:
        """One step at a time. Cells that a step which fails has half written are not reused."""
        with self._lock:
            self._tidy()
            self._check_open()
            self._computing_now = True
            try:
                yield
            except BaseException:
                slot.tokens.clear()
                raise
            finally:
                self._computing_now = False
                if self.closed:  # by a signal handler, in the middle of the step
                    self._free()

    def _shift(self, request: Request) -> None:
        """Drop the older half of what comes after the first ``keep`` tokens."""
        keep, n = self.options.keep or 0, request.n_done
        drop = (n - keep) // 2
        if n > self._kv.cells.sliding:  # the ring has lost the kept tokens: none may be seen in it
            drop = min(drop, n - keep - self.config.window + 1)
        self._runner.shift(request.slot.index, keep, drop, n)
        request.forget(keep, drop)

    def _finish(self, request: Request) -> None:
        """Give a request's slot back. Never waits: a garbage collector may call it anywhere."""
        self._ended.append(request)
        if self._lock.acquire(blocking=False):
            try:
                self._tidy()
            finally:
                self._lock.release()

    def _tidy(self) -> None:
        while self._ended:
            request = self._ended.popleft()
            if request.shifted:  # cells such as no prompt of these tokens would give
                request.slot.tokens.clear()
            self._slots.release(request.slot)

    # -- looking inside ----------------------------------------------------------------------

    def logits(
        self, ids: Sequence[int], rows: Literal["all", "last"] | Sequence[int] = "all"
    ) -> np.ndarray:
        """Logits after each of ``rows`` (positions in ``ids``): float32 [rows, n_vocab]."""
        ids = self._ids(ids)
        named = {"all": list(range(len(ids))), "last": [len(ids) - 1]}
        wanted = named.get(rows, []) if isinstance(rows, str) else _integers("rows", rows)
        chosen = sorted(set(wanted))
        if not chosen or chosen[0] < 0 or chosen[-1] >= len(ids):
            raise OptionError(f'rows must be "all", "last" or from 0 to {len(ids) - 1}')
        parts = [logits for logits, _ in self._pass(ids, chosen)]
        order = {row: i for i, row in enumerate(chosen)}
        return np.concatenate(parts)[[order[row] for row in wanted]]

    def trace(self, ids: Sequence[int], taps: Sequence[str]) -> dict[str, np.ndarray]:
        """Named intermediates for every position: float32 [len(ids), ...], slowest first.

        ``tap_names()`` lists the names. OptionError for an unknown one.
        """
        names = self.tap_names()
        for tap in taps:
            if tap not in names:
                near = ", ".join(get_close_matches(str(tap), names, 3))
                raise OptionError(f"no intermediate is named {tap!r}; near: {near or 'none'}")
        ids = self._ids(ids)
        parts = [values for _, values in self._pass(ids, range(len(ids)), taps)]
        return {tap: np.concatenate([part[tap] for part in parts]) for tap in taps}

    def tap_names(self) -> list[str]:
        """Every intermediate that ``trace`` can give, in the order they are computed."""
        with self._lock:
            self._check_open()
            return self._runner.names()

    def _pass(
        self, ids: Sequence[int], wanted: Sequence[int], taps: Sequence[str] = ()
    ) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
        """Run ids from nothing in a slot of its own: per step its wanted logits and its taps."""
        size = self.options.chunk
        if len(wanted) > 1:
            size = min(size, max(1, LOGITS_BYTES // 4 // self.config.n_vocab))
        with self._held_slot() as slot:
            for start in range(0, len(ids), size):
                tokens = ids[start : start + size]
                rows = [row - start for row in wanted if start <= row < start + len(tokens)]
                with self._computing(slot):
                    logits = self._runner.run([Chunk(slot.index, start, tokens, rows)], taps)
                    values = self._runner.tapped() if taps else {}
                slot.tokens.extend(tokens)
                yield logits, values

    @contextmanager
    def _held_slot(self) -> Iterator[Slot]:
        with self._lock:
            self._tidy()
            self._check_open()
            slot = self._slots.acquire([])
        try:
            yield slot
        finally:
            with self._lock:
                self._slots.release(slot)

    @property
    def times(self) -> dict[str, float]:
        """Seconds since it was loaded by phase of a step: build, input, compute, read."""
        return dict(self._runner.times)

    @property
    def backends(self) -> list[str]:
        """What it computes on, preferred first."""
        return self._device.names

    @property
    def threads(self) -> int:
        """Threads it computes with."""
        return self._device.threads

    def memory(self) -> dict[str, int]:
        """Bytes by kind; ``mapped`` of the weights are pages of the file itself."""
        return {
            "weights": self._weights.bytes,
            "per_layer_table": self._weights.per_layer_bytes,
            "kv_full": self._kv.nbytes(sliding=False),
            "kv_sliding": self._kv.nbytes(sliding=True),
            "compute": self._device.compute_bytes,
            "mapped": self._weights.bytes_mapped,
            "copied": self._weights.bytes_copied,
            "repacked": self._weights.bytes_repacked,
        }

    # -- state -------------------------------------------------------------------------------

    def save_state(self) -> bytes:
        """The tokens and K/V of the request that ended last. RequestError if none is held."""
        with self._lock:
            self._tidy()
            self._check_open()
            return state.save(self._fingerprint, self._kv, self._slots.latest())

    def load_state(self, data: bytes) -> int:
        """Put saved state into a slot, where the next prompt that begins with it finds it.

        Returns how many tokens it has. StateError, and nothing changed, if it is damaged or of
        another model.
        """
        with self._lock:
            self._tidy()
            self._check_open()
            tokens, cells = state.parse(self._fingerprint, self._kv, data)
            with self._held_slot() as slot:
                state.restore(self._kv, slot, tokens, cells)
            return len(tokens)

    # -- end ---------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self.closed:
            raise ClosedError("the model is closed")

    def close(self) -> None:
        """Free everything. What is under way ends with ClosedError; a second call does nothing."""
        with self._lock:
            self.closed = True
            if not self._computing_now:
                self._free()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _integers(what: str, values: Any) -> list[int]:
    """Any sequence of integers as a list. OptionError for anything else, bytes among it."""
    try:
        if not isinstance(values, str | bytes | bytearray | memoryview):
            return [index(value) for value in values]
        raise TypeError  # noqa: TRY301  (a string of bytes is no list of ids)
    except TypeError:
        raise OptionError(f"{what} must be integers, not {reprlib.repr(values)}") from None
