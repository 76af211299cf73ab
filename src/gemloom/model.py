"""The public face: load a model, generate, stream, chat, look inside.

Several threads may use one model, each request in a slot of its own; the arithmetic is
done one step at a time under a lock.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from difflib import get_close_matches
from types import TracebackType
from typing import Any, Literal, Self, overload

import numpy as np

from gemloom import chat, gguf, source, state
from gemloom.cache import KV_TYPES, KVCache
from gemloom.config import Config, from_gguf
from gemloom.errors import ClosedError, ContextError, OptionError, RequestError
from gemloom.generation import ChatCompletion, Completion, Run
from gemloom.ggml.device import Device
from gemloom.models import ARCHITECTURES
from gemloom.runner import Runner
from gemloom.sampling import check_vocabulary, from_options
from gemloom.sequence import Chunk, Piece
from gemloom.sequence import Sequence as Request
from gemloom.slots import Slot, Slots
from gemloom.tokenizer import Tokenizer
from gemloom.weights import Weights

LOGITS_BYTES = 64 << 20  # of one step, where many rows' logits are wanted


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How a model is loaded. OptionError for a value outside its range."""

    device: str = "auto"  # "auto" or "cpu"
    threads: int | None = None  # None: one a usable core
    context: int | None = None  # positions a sequence may fill; None: 8,192 or what the model can
    slots: int = 1  # sequences that may be under way at once, each with K/V cells of its own
    kv_type: str = "f16"  # of the K/V cells: "f32", "f16" or "q8_0"
    mmap: bool = True  # use the file's bytes in place; False copies them into memory
    chunk: int = 512  # most rows of one prefill step
    repack: bool = True  # copy matrices into the layout this CPU multiplies fastest
    keep: int | None = None  # shift the context when it is full, keeping so many first tokens

    def __post_init__(self) -> None:
        for name, low, high in (
            ("threads", 1, 512), ("context", 1, 2**24), ("slots", 1, 256),
            ("chunk", 1, 8192), ("keep", 0, 2**24),
        ):  # fmt: skip
            value = getattr(self, name)
            optional = name in ("threads", "context", "keep")
            if value is None and optional:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise OptionError(f"{name} must be an integer from {low} to {high}, is {value!r}")
        if self.kv_type not in KV_TYPES:
            raise OptionError(f"kv_type must be one of {', '.join(KV_TYPES)}, is {self.kv_type!r}")

    def context_for(self, config: Config) -> int:
        """Positions a sequence may fill in this model. OptionError where it cannot have so many."""
        trained = config.n_context
        context = self.context or min(8192, trained)
        if context > trained:
            raise OptionError(f"context {context:,} is more than the model's {trained:,}")
        if self.keep is not None and context - self.keep <= config.window:
            raise OptionError(
                f"keep {self.keep:,} leaves less than a window of {config.window:,} "
                f"in a context of {context:,} to shift"
            )
        return context


def load(weights: Any = source.DEFAULT_MODEL, **options: Any) -> Model:
    """Load a model.

    ``weights`` is a path, "hf:owner/repo[:file]", a built-in name, bytes or another buffer, a
    list of paths or buffers that make up one file, or a binary file object. ``options`` are the
    fields of ``Options``. Raises SourceError, FormatError, ConfigError, TensorError or
    TokenizerError for a file that cannot be used, OptionError, DeviceError.
    """
    known = [option.name for option in fields(Options)]
    for name in options:
        if name not in known:
            near = get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}"
            raise OptionError(f"unknown option {name!r}{hint}")
    return Model(gguf.read(source.resolve(weights)), Options(**options))


class Model:
    """A loaded model. Made by ``load()``; free with ``close()`` or ``with``."""

    def __init__(self, file: gguf.GGUF, options: Options) -> None:
        self.name = file.name
        self.options = options
        self.config: Config = from_gguf(file)
        self.context = options.context_for(self.config)
        self.tokenizer = Tokenizer(file.metadata)
        self._lock = threading.RLock()
        with ExitStack() as stack:
            self._device = Device(options.device, options.threads)
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
            self._resources = stack.pop_all()
        self._slots = Slots(options.slots, self.config.window, self._kv.cells.sliding)
        self._fingerprint = state.fingerprint(file)
        self.closed = False

    # -- text --------------------------------------------------------------------------------

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        """Ids of ``text``, with no BOS. ``special`` reads strings like ``<bos>`` as the tokens."""
        return self.tokenizer.encode(text, special)

    def detokenize(self, ids: Sequence[int], special: bool = False) -> str:
        """Text of ``ids``; ``special`` shows control tokens."""
        return self.tokenizer.decode(ids, special)

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
        self, messages: Sequence[chat.Message], *, stream: Literal[False] = False, **sampling: Any
    ) -> ChatCompletion: ...
    @overload
    def chat(
        self, messages: Sequence[chat.Message], *, stream: Literal[True], **sampling: Any
    ) -> Run: ...
    def chat(
        self, messages: Sequence[chat.Message], *, stream: bool = False, **sampling: Any
    ) -> ChatCompletion | Run:
        """Answer a conversation: ``[{"role": "user", "content": "..."}, ...]``.

        The prompt is made by the file's own template; RequestError if it has none. With
        ``stream`` the pieces come one by one.
        """
        prompt = chat.encode_chat(self.tokenizer, messages)
        if stream:
            return self._start(prompt, sampling)
        done = self.generate(prompt, **sampling)
        message = {"role": "assistant", "content": done.text}
        return ChatCompletion(message, done.finish_reason, done.usage)

    def _start(self, prompt: str | Sequence[int], sampling: dict[str, Any]) -> Run:
        params = from_options(sampling)
        check_vocabulary(params, self.config.n_vocab)
        ids = self._ids(prompt)
        limit = None if self.options.keep is not None else self.context - len(ids) + 1
        with self._lock:
            self._check_open()
            slot = self._slots.acquire(ids)
            request = Request(ids, params, self.tokenizer, slot, limit)
        return Run(request, self._step, self._finish)

    def _ids(self, prompt: str | Sequence[int]) -> list[int]:
        """Prompt as checked ids."""
        if isinstance(prompt, str):
            ids = self.tokenizer.with_bos(self.tokenizer.encode(prompt)) if prompt else []
        else:
            ids = [int(token) for token in prompt]
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
        with self._lock:
            self._check_open()
            if request.n_done >= self.context:
                self._shift(request)
            chunk = request.next_chunk(min(self.options.chunk, self.context - request.n_done))
            logits = self._runner.run([chunk])
            request.advance(chunk)
        return request.accept(logits[0]) if len(logits) else None

    def _shift(self, request: Request) -> None:
        """Drop the older half of what comes after the first ``keep`` tokens."""
        keep, n = self.options.keep or 0, request.n_done
        drop = (n - keep) // 2
        if n > self._kv.cells.sliding:  # the ring has lost the kept tokens: none may be seen in it
            drop = min(drop, n - keep - self.config.window + 1)
        self._runner.shift(request.slot.index, keep, drop, n)
        request.forget(keep, drop)

    def _finish(self, request: Request) -> None:
        with self._lock:
            if request.shifted:  # cells such as no prompt of these tokens would give
                request.slot.tokens.clear()
            self._slots.release(request.slot)

    # -- looking inside ----------------------------------------------------------------------

    def logits(
        self, ids: Sequence[int], rows: Literal["all", "last"] | Sequence[int] = "all"
    ) -> np.ndarray:
        """Logits after each of ``rows`` (positions in ``ids``): float32 [rows, n_vocab]."""
        ids = self._ids(list(ids))
        wanted = range(len(ids)) if rows == "all" else [len(ids) - 1] if rows == "last" else rows
        chosen = sorted({int(row) for row in wanted})
        if not chosen or chosen[0] < 0 or chosen[-1] >= len(ids):
            raise OptionError(f"rows must be from 0 to {len(ids) - 1}")
        parts = [logits for logits, _ in self._pass(ids, chosen)]
        order = {row: i for i, row in enumerate(chosen)}
        return np.concatenate(parts)[[order[int(row)] for row in wanted]]

    def trace(self, ids: Sequence[int], taps: Sequence[str]) -> dict[str, np.ndarray]:
        """Named intermediates for every position: float32 [len(ids), ...], slowest first.

        ``tap_names()`` lists the names. OptionError for an unknown one.
        """
        names = self.tap_names()
        for tap in taps:
            if tap not in names:
                near = ", ".join(get_close_matches(tap, names, 3))
                raise OptionError(f"no intermediate is named {tap!r}; near: {near or 'none'}")
        ids = self._ids(list(ids))
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
                with self._lock:
                    self._check_open()
                    logits = self._runner.run([Chunk(slot.index, start, tokens, rows)], taps)
                    values = self._runner.tapped() if taps else {}
                slot.tokens.extend(tokens)
                yield logits, values

    @contextmanager
    def _held_slot(self) -> Iterator[Slot]:
        with self._lock:
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
        """What the slot used last holds: its tokens and their K/V."""
        with self._lock:
            self._check_open()
            slot = self._slots.latest()
            return state.save(self._fingerprint, self._kv, slot)

    def load_state(self, data: bytes) -> int:
        """Put saved state into a slot, where the next prompt that begins with it finds it.

        Returns how many tokens it has. StateError, and nothing changed, if it is damaged or of
        another model.
        """
        with self._lock:
            self._check_open()
            slot = self._slots.acquire([])
            try:
                return state.load(self._fingerprint, self._kv, slot, data)
            finally:
                self._slots.release(slot)

    # -- end ---------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self.closed:
            raise ClosedError("the model is closed")

    def close(self) -> None:
        """Free everything. What is under way ends with ClosedError; a second call does nothing."""
        with self._lock:
            if not self.closed:
                self.closed = True
                self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
