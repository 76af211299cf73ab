"""Every architecture fact, resolved once from a file's metadata and tensor names.

Nothing after this file computes a per-layer fact again. A key that is missing or
contradicts another is a ConfigError that names it; nothing of the architecture is
guessed from a file's or a model's name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from math import sqrt
from typing import NoReturn

import numpy as np

from gemloom.errors import ConfigError, TensorError
from gemloom.files.gguf import GGUF, Metadata, StringArray

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


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding: pair (i, i + n_dims/2) turns by position * scale * base^(-2i/n_dims)."""

    n_dims: int
    base: float
    scale: float = 1.0
    factors: bool = False  # the angles are divided by the tensor rope_freqs.weight


@dataclass(frozen=True, slots=True)
class Experts:
    """The mixture-of-experts half of a feed-forward layer."""

    count: int
    used: int
    n_ff: int


class Kind(Enum):
    """How far back a layer attends."""

    FULL = "full"  # to every position before
    SLIDING = "sliding"  # to the last Config.window positions, its own among them


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """Everything the graph needs to know of one layer."""

    index: int
    kind: Kind
    head_dim: int
    n_head: int
    n_kv: int
    n_ff: int
    rope: Rope
    kv_owner: int  # the layer whose K/V this one reads; its own index where it has its own
    has_v: bool = True  # False: V is made from the K projection
    experts: Experts | None = None

    @property
    def sliding(self) -> bool:
        """Whether it attends to a window only."""
        return self.kind is Kind.SLIDING

    @property
    def owns_kv(self) -> bool:
        """Whether this layer computes and stores K/V of its own."""
        return self.kv_owner == self.index


@dataclass(frozen=True, slots=True)
class Config:
    """One model's architecture."""

    architecture: str
    n_embd: int
    n_vocab: int
    n_context: int  # positions the model was trained for
    window: int  # positions a sliding layer sees, the current one among them
    eps: float
    embed_scale: float
    attn_scale: float
    softcap: float | None  # logits are softcap * tanh(logits / softcap)
    n_per_layer: int  # width of the per-layer inputs; 0: none
    layers: tuple[LayerSpec, ...]

    @property
    def n_layer(self) -> int:
        """Number of layers."""
        return len(self.layers)

    @property
    def last_owner(self) -> int:
        """The last layer with K/V of its own: after it only rows whose logits are wanted go on."""
        return max(spec.kv_owner for spec in self.layers)


def from_gguf(file: GGUF) -> Config:
    """The Config of a file. ConfigError or TensorError where its keys do not make one."""
    architecture = file.metadata.string("general.architecture")
    builder = _BUILDERS.get(architecture)
    if builder is None:
        known = ", ".join(sorted(_BUILDERS))
        raise ConfigError(
            f"{file.name}: the architecture {architecture!r} is not supported; {known} are"
        )
    config = builder(file, _Keys(file.metadata, architecture))
    _check(file.name, config)
    return config


class _Keys:
    """Metadata of one architecture: keys without their prefix, per-layer forms spread out."""

    def __init__(self, metadata: Metadata, architecture: str) -> None:
        self.metadata, self.prefix = metadata, architecture
        self.n_layer = self.count("block_count", limit=MOST_LAYERS)

    def full(self, key: str) -> str:
        """The key as the file has it: with its prefix, and under its other name if it has that."""
        names = [f"{self.prefix}.{name}" for name in (key, *_OTHER_NAMES.get(key, ()))]
        return next((name for name in names if name in self.metadata), names[0])

    def has(self, key: str) -> bool:
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
        raise ConfigError(f"{self.metadata.name}: {self.full(key)}: {why}")

    def head_dim(self, kind: str = "", default: int | None = None) -> int:
        """The size of a head, of K and V alike: two keys, which must agree if both are there."""
        key, other = f"attention.key_length{kind}", f"attention.value_length{kind}"
        first = self.count(key, self.count(other, default) if self.has(other) else default)
        second = self.count(other, first)
        if first != second:
            self.refuse(other, f"{second} differs from {self.full(key)}, {first}")
        return first


def _gemma4(file: GGUF, keys: _Keys) -> Config:
    sliding = keys.pattern("attention.sliding_window_pattern")
    owners = _kv_owners(keys, sliding)
    n_head = keys.per_layer("attention.head_count")
    n_kv = keys.per_layer("attention.head_count_kv", n_head)
    n_ff = keys.per_layer("feed_forward_length")
    full_dim, swa_dim = keys.head_dim(default=_usual_dim(keys, n_head)), keys.head_dim("_swa")
    full_rope = Rope(
        keys.count("rope.dimension_count", full_dim),
        keys.positive("rope.freq_base", FULL_BASE),
        scale=_linear_scale(keys),
        factors=True,
    )
    swa_rope = Rope(
        keys.count("rope.dimension_count_swa", swa_dim),
        keys.positive("rope.freq_base_swa", SLIDING_BASE),
    )
    k_is_v = _k_is_v(file, sliding, owners)
    experts = _experts(keys)
    layers = tuple(
        LayerSpec(
            index=i,
            kind=Kind.SLIDING if sliding[i] else Kind.FULL,
            head_dim=swa_dim if sliding[i] else full_dim,
            n_head=n_head[i],
            n_kv=n_kv[i],
            n_ff=n_ff[i],
            rope=swa_rope if sliding[i] else full_rope,
            kv_owner=owners[i],
            has_v=sliding[i] or not k_is_v,
            experts=experts,
        )
        for i in range(keys.n_layer)
    )
    # The scale is folded into the weights of attn_q_norm and attn_k_norm.
    return _config(
        file, keys, layers,
        window=keys.count("attention.sliding_window"),
        attn_scale=1.0,
        softcap=_softcap(keys, 30.0),
    )  # fmt: skip


def _gemma3(file: GGUF, keys: _Keys) -> Config:
    # A file without a window has no sliding layer; with one, every sixth is full by architecture.
    window = keys.integer("attention.sliding_window", 0)
    pattern = "attention.sliding_window_pattern"
    sliding = keys.pattern(pattern, 6) if window else [False] * keys.n_layer
    n_head = keys.per_layer("attention.head_count")
    n_kv = keys.per_layer("attention.head_count_kv", n_head)
    n_ff = keys.per_layer("feed_forward_length")
    head_dim = keys.head_dim(default=_usual_dim(keys, n_head))
    n_dims = keys.count("rope.dimension_count", head_dim)
    full_rope = Rope(n_dims, keys.positive("rope.freq_base", FULL_BASE), scale=_linear_scale(keys))
    swa_rope = Rope(n_dims, keys.positive("rope.freq_base_swa", SLIDING_BASE))
    layers = tuple(
        LayerSpec(
            index=i,
            kind=Kind.SLIDING if sliding[i] else Kind.FULL,
            head_dim=head_dim,
            n_head=n_head[i],
            n_kv=n_kv[i],
            n_ff=n_ff[i],
            rope=swa_rope if sliding[i] else full_rope,
            kv_owner=i,
        )
        for i in range(keys.n_layer)
    )
    # The 27B, the one with 62 layers, scales by width per head; no key says so.
    scaled = keys.count("embedding_length") / n_head[0] if keys.n_layer == 62 else head_dim
    return _config(
        file, keys, layers,
        window=max(window, 1),
        attn_scale=scaled**-0.5,
        softcap=_softcap(keys, 0.0),
    )  # fmt: skip


_BUILDERS: dict[str, Callable[[GGUF, _Keys], Config]] = {"gemma3": _gemma3, "gemma4": _gemma4}


def _config(
    file: GGUF,
    keys: _Keys,
    layers: tuple[LayerSpec, ...],
    *,
    window: int,
    attn_scale: float,
    softcap: float | None,
) -> Config:
    """What is read in the same way for both architectures."""
    n_embd = keys.count("embedding_length")
    per_layer = "embedding_length_per_layer_input"
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
        n_per_layer=keys.integer(per_layer) if keys.prefix == "gemma4" else 0,
        layers=layers,
    )


def _usual_dim(keys: _Keys, n_head: Sequence[int]) -> int:
    """The size of a head in a file that gives none."""
    return keys.count("embedding_length") // n_head[0]


def _softcap(keys: _Keys, default: float) -> float | None:
    """The bound of the logits; 0 in a file means that there is none."""
    key = "final_logit_softcapping"
    value = keys.metadata.number(keys.full(key), default)
    return keys.positive(key, default) if value else None


def _linear_scale(keys: _Keys) -> float:
    """1/factor of linear position scaling, which Gemma 3 has on full layers from 4B up.

    A factor without a type is linear.
    """
    factor = "rope.scaling.factor"
    if keys.prefix == "gemma3" and _says_nothing_of_rope(keys):
        return 1 / 8 if keys.count("context_length") >= 131_072 else 1.0
    key = "rope.scaling.type"
    kind = keys.metadata.string(keys.full(key), "linear" if keys.has(factor) else "none")
    if kind not in ("", "none", "default", "linear"):
        keys.refuse(key, f"{kind!r} is not supported; none and linear are")
    return 1.0 / keys.positive(factor, 1.0) if kind == "linear" else 1.0


def _says_nothing_of_rope(keys: _Keys) -> bool:
    """Whether a file leaves it all to the reader, as Ollama's of Gemma 3 4B, 12B and 27B do."""
    return not any(key.startswith(f"{keys.prefix}.rope.") for key in keys.metadata)


def _kv_owners(keys: _Keys, sliding: Sequence[bool]) -> list[int]:
    """For each layer the one whose K/V it reads.

    The last ``shared_kv_layers`` layers have none; each reads that of the last layer of its own
    kind (sliding or full) before them.
    """
    shared = keys.integer("attention.shared_kv_layers", 0)
    first_shared = keys.n_layer - shared
    last_of_kind = {kind: i for i, kind in enumerate(sliding[: max(first_shared, 0)])}
    if missing := {kind for kind in sliding if kind not in last_of_kind}:
        name = "sliding" if True in missing else "full"
        keys.refuse("attention.shared_kv_layers", f"{shared} leaves no {name} layer with K/V")
    return [i if i < first_shared else last_of_kind[kind] for i, kind in enumerate(sliding)]


def _k_is_v(file: GGUF, sliding: Sequence[bool], owners: Sequence[int]) -> bool:
    """Whether full layers make V from K: no key says so, attn_v is absent from all of them."""
    full = [i for i, owner in enumerate(owners) if owner == i and not sliding[i]]
    absent = [i for i in full if not _has_v(file, i)]
    if absent and len(absent) < len(full):
        raise TensorError(f"{file.name}: the tensor blk.{absent[0]}.attn_v.weight is missing")
    return bool(absent)


def _has_v(file: GGUF, layer: int) -> bool:
    return any(f"blk.{layer}.{name}.weight" in file.tensors for name in ("attn_v", "attn_qkv"))


def _experts(keys: _Keys) -> Experts | None:
    if not keys.integer("expert_count", 0):
        return None
    count, used = keys.count("expert_count"), keys.count("expert_used_count")
    if used > count:
        keys.refuse("expert_used_count", f"{used} of {count} experts cannot be used")
    return Experts(count, used, keys.count("expert_feed_forward_length"))


def _n_vocab(file: GGUF, keys: _Keys) -> int:
    """Rows of the embedding table: a vocabulary may have a few more tokens, or fewer, or none."""
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    count = len(tokens) if isinstance(tokens, StringArray) else 0
    table = file.tensors.get("token_embd.weight")
    if table is not None and len(table.shape) > 1:
        rows = table.shape[1]
        if count and abs(rows - count) > count * MOST_APART:
            raise TensorError(
                f"{file.name}: the tensor token_embd.weight has {rows:,} rows for {count:,} tokens"
            )
        return rows
    if not count and not keys.has("vocab_size"):
        raise ConfigError(f"{file.name}: tokenizer.ggml.tokens is empty or missing")
    return count or keys.count("vocab_size")


def _check(name: str, config: Config) -> None:
    """What ggml would abort on, or what would compute nonsense."""
    for spec in config.layers:
        where = f"{name}: layer {spec.index}"
        if spec.n_head % spec.n_kv:
            raise ConfigError(f"{where}: {spec.n_head} heads cannot share {spec.n_kv} K/V heads")
        owner = config.layers[spec.kv_owner]
        if (spec.n_kv, spec.head_dim) != (owner.n_kv, owner.head_dim):
            raise ConfigError(f"{where} cannot read the K/V of layer {owner.index}: other shape")
        if spec.rope.n_dims % 2 or spec.rope.n_dims > spec.head_dim:
            raise ConfigError(
                f"{where}: {spec.rope.n_dims} of {spec.head_dim} dimensions to rotate"
            )
        if spec.head_dim % 32 or spec.head_dim > 1024:
            raise ConfigError(
                f"{where}: a head of {spec.head_dim} is not supported; multiples of 32 are"
            )
