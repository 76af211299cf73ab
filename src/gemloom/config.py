"""Every architecture fact, resolved once from a file's metadata and tensor names.

Nothing after this file computes a per-layer fact again. A key that is missing or
contradicts another is a ConfigError that names it; nothing of the architecture is
guessed from a file's or a model's name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np

from gemloom.errors import ConfigError, TensorError
from gemloom.files.gguf import GGUF, Metadata, StringArray

MOST_LAYERS = 512  # of a model, the files of which are not to be trusted


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


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """Everything the graph needs to know of one layer."""

    index: int
    sliding: bool  # attends to the last Config.window positions only
    head_dim: int
    n_head: int
    n_kv: int
    n_ff: int
    rope: Rope
    kv_owner: int  # the layer whose K/V this one reads; its own index where it has its own
    has_v: bool = True  # False: V is made from the K projection
    experts: Experts | None = None

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
        self.n_layer = self.count("block_count", MOST_LAYERS)

    def has(self, key: str) -> bool:
        return f"{self.prefix}.{key}" in self.metadata

    def integer(self, key: str, default: int | None = None) -> int:
        return self.metadata.integer(f"{self.prefix}.{key}", default)

    def number(self, key: str, default: float | None = None) -> float:
        return self.metadata.number(f"{self.prefix}.{key}", default)

    def count(self, key: str, limit: int = 2**24) -> int:
        """A size: from 1 to ``limit``."""
        value = self.integer(key)
        if not 1 <= value <= limit:
            self.refuse(key, f"{value:,} is not between 1 and {limit:,}")
        return value

    def positive(self, key: str, default: float | None = None) -> float:
        value = self.number(key, default)
        if value <= 0:
            self.refuse(key, f"{value} is not positive")
        return value

    def per_layer(self, key: str) -> list[int]:
        """One size a layer, from one number for all or an array."""
        value = self.metadata.get(f"{self.prefix}.{key}")
        if not isinstance(value, np.ndarray):
            return [self.count(key)] * self.n_layer
        if value.shape != (self.n_layer,) or value.dtype.kind not in "iu" or value.min() < 1:
            self.refuse(key, f"needs {self.n_layer} positive integers, one a layer")
        return [int(n) for n in value]

    def pattern(self, key: str) -> list[bool]:
        """Which layers slide, from an array of booleans, one a layer."""
        value = self.metadata.array(f"{self.prefix}.{key}")
        if value.shape != (self.n_layer,) or value.dtype != np.bool_:
            self.refuse(key, f"needs {self.n_layer} booleans, one a layer")
        return [bool(flag) for flag in value]

    def refuse(self, key: str, why: str) -> None:
        raise ConfigError(f"{self.metadata.name}: {self.prefix}.{key}: {why}")

    def same(self, key: str, other: str) -> int:
        """A size that two keys must agree on."""
        first, second = self.count(key), self.count(other)
        if first != second:
            self.refuse(other, f"{second} differs from {self.prefix}.{key}, {first}")
        return first


def _gemma4(file: GGUF, keys: _Keys) -> Config:
    sliding = keys.pattern("attention.sliding_window_pattern")
    owners = _kv_owners(keys, sliding)
    n_head, n_kv = keys.count("attention.head_count"), keys.per_layer("attention.head_count_kv")
    n_ff = keys.per_layer("feed_forward_length")
    full_dim = keys.same("attention.key_length", "attention.value_length")
    swa_dim = keys.same("attention.key_length_swa", "attention.value_length_swa")
    full_rope = Rope(
        keys.count("rope.dimension_count"), keys.positive("rope.freq_base"), factors=True
    )
    swa_rope = Rope(
        keys.count("rope.dimension_count_swa"), keys.positive("rope.freq_base_swa", 10_000.0)
    )
    k_is_v = _k_is_v(file, sliding, owners)
    experts = _experts(keys)
    layers = tuple(
        LayerSpec(
            index=i,
            sliding=sliding[i],
            head_dim=swa_dim if sliding[i] else full_dim,
            n_head=n_head,
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
    return _config(file, keys, layers, 1.0, keys.integer("embedding_length_per_layer_input"))


def _gemma3(file: GGUF, keys: _Keys) -> Config:
    pattern = "attention.sliding_window_pattern"
    # Every sixth layer is full by architecture; the files of this family carry no pattern.
    sliding = keys.pattern(pattern) if keys.has(pattern) else _every_sixth_full(keys.n_layer)
    n_head, n_kv = keys.count("attention.head_count"), keys.per_layer("attention.head_count_kv")
    n_ff = keys.per_layer("feed_forward_length")
    head_dim = keys.same("attention.key_length", "attention.value_length")
    full_rope = Rope(head_dim, keys.positive("rope.freq_base"), scale=_linear_scale(keys))
    swa_rope = Rope(head_dim, keys.positive("rope.freq_base_swa", 10_000.0))
    layers = tuple(
        LayerSpec(
            index=i,
            sliding=sliding[i],
            head_dim=head_dim,
            n_head=n_head,
            n_kv=n_kv[i],
            n_ff=n_ff[i],
            rope=swa_rope if sliding[i] else full_rope,
            kv_owner=i,
        )
        for i in range(keys.n_layer)
    )
    # The 27B, the one with 62 layers, scales by width per head; no key says so.
    scaled = keys.count("embedding_length") / n_head if keys.n_layer == 62 else head_dim
    return _config(file, keys, layers, scaled**-0.5, 0)


_BUILDERS: dict[str, Callable[[GGUF, _Keys], Config]] = {"gemma3": _gemma3, "gemma4": _gemma4}


def _config(
    file: GGUF, keys: _Keys, layers: tuple[LayerSpec, ...], attn_scale: float, n_per_layer: int
) -> Config:
    """What is read in the same way for both architectures."""
    n_embd = keys.count("embedding_length")
    softcap = "final_logit_softcapping"
    return Config(
        architecture=keys.prefix,
        n_embd=n_embd,
        n_vocab=_n_vocab(file.metadata),
        n_context=keys.count("context_length"),
        window=keys.count("attention.sliding_window"),
        eps=keys.positive("attention.layer_norm_rms_epsilon"),
        embed_scale=sqrt(n_embd),
        attn_scale=attn_scale,
        softcap=keys.positive(softcap) if keys.has(softcap) else None,
        n_per_layer=n_per_layer,
        layers=layers,
    )


def _every_sixth_full(n_layer: int) -> list[bool]:
    return [i % 6 != 5 for i in range(n_layer)]


def _linear_scale(keys: _Keys) -> float:
    """1/factor of linear position scaling, which Gemma 3 has on full layers from 4B up."""
    kind = keys.metadata.string(f"{keys.prefix}.rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        keys.refuse("rope.scaling.type", f"{kind!r} is not supported; none and linear are")
    return 1.0 / keys.positive("rope.scaling.factor", 1.0) if kind == "linear" else 1.0


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


def _n_vocab(metadata: Metadata) -> int:
    tokens = metadata.strings("tokenizer.ggml.tokens")
    assert isinstance(tokens, StringArray)
    if not len(tokens):
        raise ConfigError(f"{metadata.name}: tokenizer.ggml.tokens is empty")
    return len(tokens)


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
