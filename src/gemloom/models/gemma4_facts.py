"""Gemma 4's files: the Config that their keys make, their tensors, and those of checkpoints.

The forward pass is in ``gemma4.py``.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from gemloom.errors import TensorError
from gemloom.files.gguf import GGUF
from gemloom.models.config import Config, Experts, Kind, LayerSpec, Rope
from gemloom.models.keys import (
    FULL_BASE,
    SLIDING_BASE,
    ArchitectureKeys,
    linear_scale,
    make_config,
    softcap,
    usual_dim,
)
from gemloom.models.layout import Layout, Role, Shapes, layer_shapes, model_tensors, sliced_names
from gemloom.models.module_names import DECODER, ModuleNames
from gemloom.models.tensor_names import PER_LAYER_TABLE, kv_names

PROJECTION, PROJECTION_NORM = "per_layer_model_proj.weight", "per_layer_proj_norm.weight"
_PER_LAYER_ROLES = {
    PER_LAYER_TABLE: Role.PER_LAYER_TABLE,
    PROJECTION: Role.SHARED,
    PROJECTION_NORM: Role.SHARED,
}
NAMES = DECODER | ModuleNames(
    outside={
        "embed_tokens_per_layer": "per_layer_token_embd",
        "per_layer_model_projection": "per_layer_model_proj",
    },
    modules={
        "per_layer_input_gate": "inp_gate",
        "per_layer_projection": "proj",
        "router.proj": "ffn_gate_inp",
    },
    stacked={
        "experts.gate_up_proj": "ffn_gate_up_exps",
        "experts.down_proj": "ffn_down_exps",
    },
    others_outside={"per_layer_projection_norm.weight": "per_layer_proj_norm.weight"},
    others={
        "layer_scalar": "layer_output_scale.weight",
        "post_per_layer_input_norm.weight": "post_norm.weight",
        "router.scale": "ffn_gate_inp.scale",
        "router.per_expert_scale": "ffn_down_exps.scale",
        "pre_feedforward_layernorm_2.weight": "pre_ffw_norm_2.weight",
        "post_feedforward_layernorm_1.weight": "post_ffw_norm_1.weight",
        "post_feedforward_layernorm_2.weight": "post_ffw_norm_2.weight",
    },
)


def config(file: GGUF, keys: ArchitectureKeys) -> Config:
    """The Config that a file's keys make."""
    sliding = keys.pattern("attention.sliding_window_pattern")
    owners = _kv_owners(keys, sliding)
    n_head = keys.per_layer("attention.head_count")
    n_kv = keys.per_layer("attention.head_count_kv", n_head)
    n_ff = keys.per_layer("feed_forward_length")
    full_dim, swa_dim = keys.head_dim(default=usual_dim(keys, n_head)), keys.head_dim("_swa")
    full_rope = Rope(
        keys.count("rope.dimension_count", full_dim),
        keys.positive("rope.freq_base", FULL_BASE),
        scale=linear_scale(keys),
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
    return make_config(
        file, keys, layers,
        window=keys.count("attention.sliding_window"),
        attn_scale=1.0,
        softcap=softcap(keys, 30.0),
        n_per_layer=keys.integer("embedding_length_per_layer_input"),
    )  # fmt: skip


def _kv_owners(keys: ArchitectureKeys, sliding: Sequence[bool]) -> list[int]:
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


def _experts(keys: ArchitectureKeys) -> Experts | None:
    if not keys.integer("expert_count", 0):
        return None
    count, used = keys.count("expert_count"), keys.count("expert_used_count")
    if used > count:
        keys.refuse("expert_used_count", f"{used} of {count} experts cannot be used")
    return Experts(count, used, keys.count("expert_feed_forward_length"))


def layout(config: Config, there: Collection[str]) -> Layout:
    """The tensors of this architecture; ``there`` are the file's, where it has a choice."""
    shapes, roles = model_tensors(config, there)
    ignored: set[str] = set()
    if config.n_per_layer:
        shapes |= _per_layer_shapes(config)
        roles |= _PER_LAYER_ROLES
    for spec in config.layers:
        shapes |= layer_shapes(config, spec, there) | _block_shapes(config, spec, there)
        if not spec.owns_kv:  # some converters keep these, which nothing reads
            ignored |= kv_names(spec.index)
    return Layout(
        required=shapes,
        roles=roles,
        ignored=frozenset(ignored),
        sliced=sliced_names(shapes) | {PER_LAYER_TABLE, PROJECTION},
        per_layer=config.n_per_layer,
    )


def _per_layer_shapes(config: Config) -> Shapes:
    """What the per-layer inputs are made of."""
    n = config.n_per_layer * config.n_layer
    return {
        PER_LAYER_TABLE: (n, config.n_vocab),
        PROJECTION: (config.n_embd, n),
        PROJECTION_NORM: (config.n_per_layer,),
    }


def _block_shapes(config: Config, spec: LayerSpec, there: Collection[str]) -> Shapes:
    """What a Gemma 4 layer has beyond attention and dense feed-forward."""
    d, p, blk = config.n_embd, config.n_per_layer, f"blk.{spec.index}"
    shapes: Shapes = {}
    if f"{blk}.layer_output_scale.weight" in there:
        shapes["layer_output_scale.weight"] = (1,)
    if p:
        shapes |= {"inp_gate.weight": (d, p), "proj.weight": (p, d), "post_norm.weight": (d,)}
    if e := spec.experts:
        shapes |= {
            "ffn_gate_inp.weight": (d, e.count), "ffn_gate_inp.scale": (d,),
            "pre_ffw_norm_2.weight": (d,), "post_ffw_norm_1.weight": (d,),
            "post_ffw_norm_2.weight": (d,), "ffn_down_exps.weight": (e.n_ff, d, e.count),
            "ffn_down_exps.scale": (e.count,),
        }  # fmt: skip
        if f"{blk}.ffn_gate_exps.weight" in there:
            shapes |= {f"ffn_{x}_exps.weight": (d, e.n_ff, e.count) for x in ("gate", "up")}
        else:
            shapes["ffn_gate_up_exps.weight"] = (d, 2 * e.n_ff, e.count)
    return {f"{blk}.{name}": shape for name, shape in shapes.items()}
