"""The tensors that an architecture wants of a file, and what each of them is for.

Pure: names and shapes. What the Gemma decoders share is declared here too. Shapes are in ggml
order, fastest first.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import Enum

from gemloom.models.config import Config, LayerSpec
from gemloom.models.tensor_names import HEAD, ROPE_FREQS, TABLE, layer_of

Shapes = dict[str, tuple[int, ...]]


class Role(Enum):
    """What a tensor is for, and so which devices need it."""

    TABLE = "table"  # token embeddings: rows are read; multiplied whole where there is no HEAD
    PER_LAYER_TABLE = "per-layer table"  # rows are read
    HEAD = "head"  # makes logits
    FINAL = "final"  # runs where the head does
    SHARED = "shared"  # every device with a layer needs it
    LAYER = "layer"  # of one layer

    @property
    def by_row(self) -> bool:
        """Whether a step reads some rows of it, so that it stays on the host."""
        return self in (Role.TABLE, Role.PER_LAYER_TABLE)


Roles = Mapping[str, Role]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The tensors an architecture wants: name -> shape, and how it uses some."""

    required: Mapping[str, tuple[int, ...]]
    roles: Roles  # of those outside the layers
    ignored: frozenset[str] = frozenset()  # a file may have them, and nothing reads them
    sliced: frozenset[str] = frozenset()  # not only multiplied whole: read by row or in slices
    per_layer: int = 0  # values of the per-layer table that one layer reads

    def __post_init__(self) -> None:
        """Every tensor has one role."""
        outside = {name for name in self.required if layer_of(name) is None}
        assert outside == self.roles.keys(), outside ^ self.roles.keys()

    def role(self, name: str) -> Role:
        """What one of the required tensors is for."""
        return self.roles.get(name, Role.LAYER)

    @property
    def tied(self) -> bool:
        """Whether the table of the token embeddings is the head as well."""
        return is_tied(self.roles)

    @property
    def head(self) -> str:
        """The matrix that makes logits."""
        return head_of(self.roles)


def is_tied(roles: Roles) -> bool:
    """Whether the table of the token embeddings is the head as well: there is no other."""
    return Role.HEAD not in roles.values()


def head_of(roles: Roles) -> str:
    """The matrix that makes logits."""
    wanted = Role.TABLE if is_tied(roles) else Role.HEAD
    return next(name for name, role in roles.items() if role is wanted)


def model_tensors(config: Config, there: Collection[str]) -> tuple[Shapes, dict[str, Role]]:
    """The tensors outside the layers, with their roles. ``there`` are the names in the file."""
    d, v = config.n_embd, config.n_vocab
    shapes: Shapes = {TABLE: (d, v), "output_norm.weight": (d,)}
    roles = {TABLE: Role.TABLE, "output_norm.weight": Role.FINAL}
    if HEAD in there:  # else the embedding table is the head as well
        shapes[HEAD], roles[HEAD] = (d, v), Role.HEAD
    for spec in config.layers:
        if spec.rope.factors:
            shapes[ROPE_FREQS], roles[ROPE_FREQS] = (spec.rope.n_dims // 2,), Role.SHARED
    return shapes, roles


def sliced_names(shapes: Shapes) -> frozenset[str]:
    """The tensors that are read by row, or in slices, and not only multiplied whole."""
    return frozenset(n for n in shapes if n == TABLE or n.endswith("attn_qkv.weight"))


def layer_shapes(config: Config, spec: LayerSpec, there: Collection[str]) -> Shapes:
    """Attention, dense feed-forward and norms of one layer, by their full names."""
    d, q, k = config.n_embd, spec.n_head * spec.head_dim, spec.n_kv * spec.head_dim
    shapes: Shapes = {
        "attn_norm": (d,), "attn_q_norm": (spec.head_dim,), "attn_output": (q, d),
        "post_attention_norm": (d,), "ffn_norm": (d,), "ffn_gate": (d, spec.n_ff),
        "ffn_up": (d, spec.n_ff), "ffn_down": (spec.n_ff, d), "post_ffw_norm": (d,),
    }  # fmt: skip
    if f"blk.{spec.index}.attn_qkv.weight" in there:
        shapes["attn_qkv"] = (d, q + 2 * k)
    else:
        shapes["attn_q"] = (d, q)
        if spec.owns_kv:
            shapes |= {"attn_k": (d, k)} | ({"attn_v": (d, k)} if spec.has_v else {})
    if spec.owns_kv:
        shapes["attn_k_norm"] = (spec.head_dim,)
    return {f"blk.{spec.index}.{name}.weight": shape for name, shape in shapes.items()}
