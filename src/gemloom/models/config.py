"""What the rest needs to know of a model's architecture, as plain values.

They are resolved once, from a file's metadata and tensor names (``facts.py``). Nothing computes
a per-layer fact again.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from gemloom.errors import ConfigError


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


@dataclass(frozen=True, slots=True, kw_only=True)
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


def check(name: str, config: Config) -> None:
    """ConfigError for what ggml would abort on, or what would compute nonsense."""
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
