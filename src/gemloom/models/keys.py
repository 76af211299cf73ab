"""A file's metadata as the architectures read it: sizes that are checked, keys of other names.

A key that is missing or contradicts another is a ConfigError that names it; nothing of the
architecture is guessed from a file's or a model's name.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import NoReturn

import numpy as np

from gemloom.errors import ConfigError, TensorError
from gemloom.files.gguf import GGUF, Metadata, StringArray
from gemloom.models.config import Config, LayerSpec
from gemloom.models.tensor_names import TABLE

MOST_LAYERS = 512  # of a model, the files of which are not to be trusted
MOST = 2**24  # of any size
LARGEST = 1e12  # of any number
MOST_APART = 1 / 20  # of the tokens: how far rows of embeddings and tokens may differ
# Of rope.freq_base where a file gives none: those of all released models.
FULL_BASE, SLIDING_BASE = 1e6, 1e4
EPS = float(np.float32(1e-6))  # as a file would have it
_OTHER_NAMES = {  # by which Ollama, or older converters, know a key
    "rope.freq_base": ("rope.global.freq_base",),
    "rope.freq_base_swa": ("rope.local.freq_base",),
    "rope.scaling.factor": ("rope.scale_linear",),
}


class ArchitectureKeys:
    """Metadata of one architecture: keys without their prefix, per-layer forms spread out."""

    def __init__(self, metadata: Metadata, architecture: str) -> None:
        self.metadata, self.prefix = metadata, architecture
        self.n_layer = self.count("block_count", limit=MOST_LAYERS)

    def full(self, key: str) -> str:
        """The key as the file has it: with its prefix, and under its other name if it has that."""
        names = [f"{self.prefix}.{name}" for name in (key, *_OTHER_NAMES.get(key, ()))]
        return next((name for name in names if name in self.metadata), names[0])

    def has(self, key: str) -> bool:
        """Whether the file has it."""
        return self.full(key) in self.metadata

    def integer(self, key: str, default: int | None = None) -> int:
        """A size that may be 0."""
        value = self.metadata.integer(self.full(key), default)
        if value > MOST:
            self.refuse(key, f"{value:,} is over {MOST:,}")
        return value

    def count(self, key: str, default: int | None = None, limit: int = MOST) -> int:
        """A size: from 1 to ``limit``."""
        value = self.metadata.integer(self.full(key), default)
        if not 1 <= value <= limit:
            self.refuse(key, f"{value:,} is not between 1 and {limit:,}")
        return value

    def positive(self, key: str, default: float | None = None, limit: float = LARGEST) -> float:
        """A number above 0, and at most ``limit``."""
        value = self.metadata.number(self.full(key), default)
        if value <= 0:
            self.refuse(key, f"{value} is not positive")
        if value > limit:
            self.refuse(key, f"{value} is over {limit:g}")
        return value

    def per_layer(self, key: str, default: Sequence[int] = ()) -> list[int]:
        """One size a layer, from one number for all or an array."""
        if default and not self.has(key):
            return list(default)
        value = self.metadata.get(self.full(key))
        if not isinstance(value, np.ndarray) or value.size == 1:
            return [self.count(key)] * self.n_layer
        values = self.metadata.integers(self.full(key))
        if len(values) != self.n_layer or not all(1 <= value <= MOST for value in values):
            self.refuse(key, f"needs {self.n_layer} positive integers, one a layer")
        return values

    def pattern(self, key: str, default: int | None = None) -> list[bool]:
        """Which layers slide: an array of booleans, one a layer, or of 1 and 0.

        A boolean is for all layers. One number n means that every nth layer is full; 0 means
        that none is.
        """
        value = self.metadata.get(self.full(key), default)
        if isinstance(value, bool):
            return [value] * self.n_layer
        if not isinstance(value, np.ndarray) or value.size == 1:
            period = self.integer(key, default)
            return [not period or i % period < period - 1 for i in range(self.n_layer)]
        flags = self.metadata.integers(self.full(key))
        if len(flags) != self.n_layer or not set(flags) <= {0, 1}:
            self.refuse(key, f"needs {self.n_layer} booleans, one a layer")
        return [bool(flag) for flag in flags]

    def refuse(self, key: str, why: str) -> NoReturn:
        """ConfigError that names the key."""
        raise ConfigError(f"{self.metadata.name}: {self.full(key)}: {why}")

    def head_dim(self, kind: str = "", default: int | None = None) -> int:
        """The size of a head, of K and V alike: two keys, which must agree if both are there."""
        key, other = f"attention.key_length{kind}", f"attention.value_length{kind}"
        first = self.count(key, self.count(other, default) if self.has(other) else default)
        second = self.count(other, first)
        if first != second:
            self.refuse(other, f"{second} differs from {self.full(key)}, {first}")
        return first


def make_config(
    file: GGUF,
    keys: ArchitectureKeys,
    layers: tuple[LayerSpec, ...],
    *,
    window: int,
    attn_scale: float,
    softcap: float | None,
    n_per_layer: int = 0,
) -> Config:
    """A Config; what all architectures read in the same way is read here."""
    n_embd = keys.count("embedding_length")
    return Config(
        architecture=keys.prefix,
        n_embd=n_embd,
        n_vocab=_n_vocab(file, keys),
        n_context=keys.count("context_length"),
        window=window,
        eps=keys.positive("attention.layer_norm_rms_epsilon", EPS, limit=1.0),
        embed_scale=sqrt(n_embd),
        attn_scale=attn_scale,
        softcap=softcap,
        n_per_layer=n_per_layer,
        layers=layers,
    )


def usual_dim(keys: ArchitectureKeys, n_head: Sequence[int]) -> int:
    """The size of a head in a file that gives none."""
    return keys.count("embedding_length") // n_head[0]


def softcap(keys: ArchitectureKeys, default: float) -> float | None:
    """The bound of the logits; 0 in a file means that there is none."""
    key = "final_logit_softcapping"
    value = keys.metadata.number(keys.full(key), default)
    return keys.positive(key, default) if value else None


def linear_scale(keys: ArchitectureKeys) -> float:
    """1/factor of linear position scaling. A factor without a type is linear."""
    factor = "rope.scaling.factor"
    key = "rope.scaling.type"
    kind = keys.metadata.string(keys.full(key), "linear" if keys.has(factor) else "none")
    if kind not in ("", "none", "default", "linear"):
        keys.refuse(key, f"{kind!r} is not supported; none and linear are")
    return 1.0 / keys.positive(factor, 1.0) if kind == "linear" else 1.0


def _n_vocab(file: GGUF, keys: ArchitectureKeys) -> int:
    """Rows of the embedding table: a vocabulary may have a few more tokens, or fewer, or none."""
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    count = len(tokens) if isinstance(tokens, StringArray) else 0
    table = file.tensors.get(TABLE)
    if table is not None and len(table.shape) > 1:
        rows = table.shape[1]
        if count and abs(rows - count) > count * MOST_APART:
            raise TensorError(
                f"{file.name}: the tensor {TABLE} has {rows:,} rows for {count:,} tokens"
            )
        return rows
    if not count and not keys.has("vocab_size"):
        raise ConfigError(f"{file.name}: tokenizer.ggml.tokens is empty or missing")
    return count or keys.count("vocab_size")
