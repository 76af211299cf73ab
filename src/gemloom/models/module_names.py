"""What transformers calls the tensors of an architecture, beside GGUF's names. No bytes in here.

Checkpoints and adapters name them alike. Wrappers before a name do not matter:
``tensor_names.inner``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleNames:
    """One architecture's: transformers' name -> GGUF's, below ``layers.N.`` and ``blk.N.``.

    A module's matrix is its ``weight``, and GGUF's name ends with ``.weight`` as well: neither
    has it here. What is no matrix, which no adapter changes, has its full names.
    """

    outside: Mapping[str, str]  # modules outside the layers
    modules: Mapping[str, str]  # of a layer
    stacked: Mapping[str, str]  # of a layer: matrices that are parameters of their module
    others_outside: Mapping[str, str]
    others: Mapping[str, str]  # of a layer

    def matrix(self, module: str, *, in_layer: bool) -> str | None:
        """GGUF's name of a module's or parameter's matrix, without ``.weight``."""
        return self._matrices(in_layer).get(module)

    def module(self, matrix: str, *, in_layer: bool) -> str | None:
        """The module or parameter of a matrix of GGUF's."""
        named = self._matrices(in_layer).items()
        return next((module for module, gguf in named if gguf == matrix), None)

    def _matrices(self, in_layer: bool) -> dict[str, str]:
        return {**self.modules, **self.stacked} if in_layer else dict(self.outside)

    def tensors(self, *, in_layer: bool) -> dict[str, str]:
        """All of a checkpoint's tensors there, by full names below the layer."""
        modules, stacked, others = (
            (self.modules, self.stacked, self.others)
            if in_layer
            else (self.outside, {}, self.others_outside)
        )
        named = {f"{module}.weight": f"{gguf}.weight" for module, gguf in modules.items()}
        return named | {name: f"{gguf}.weight" for name, gguf in stacked.items()} | dict(others)

    def __or__(self, more: ModuleNames) -> ModuleNames:
        """Both."""
        return replace(
            self,
            outside={**self.outside, **more.outside},
            modules={**self.modules, **more.modules},
            stacked={**self.stacked, **more.stacked},
            others_outside={**self.others_outside, **more.others_outside},
            others={**self.others, **more.others},
        )


# Of every Gemma since the third.
DECODER = ModuleNames(
    outside={"embed_tokens": "token_embd", "lm_head": "output"},
    modules={
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    },
    stacked={},
    others_outside={"norm.weight": "output_norm.weight"},
    others={
        "input_layernorm.weight": "attn_norm.weight",
        "self_attn.q_norm.weight": "attn_q_norm.weight",
        "self_attn.k_norm.weight": "attn_k_norm.weight",
        "post_attention_layernorm.weight": "post_attention_norm.weight",
        "pre_feedforward_layernorm.weight": "ffn_norm.weight",
        "post_feedforward_layernorm.weight": "post_ffw_norm.weight",
    },
)
