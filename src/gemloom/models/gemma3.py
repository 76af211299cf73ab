"""Gemma 3: the forward pass, top to bottom. Names are the file's tensor names.

Shapes are in ggml order, fastest first: T rows, KV key/value heads, hd = head_dim. The
arithmetic is that of transformers' modeling_gemma3.py, with norm weights as GGUF holds
them (1 already added).
"""

from __future__ import annotations

from gemloom.compute.kv import KV, Rows
from gemloom.ggml.device import Tensor
from gemloom.ggml.graph import Graph
from gemloom.models.config import LayerSpec
from gemloom.models.gemma3_facts import layout
from gemloom.models.layers import Block, Decoder


class Gemma3(Decoder):
    """The text models from 270M to 27B."""

    layout = staticmethod(layout)

    def forward(self, g: Graph, rows: Rows, wanted: Rows | None, kv: KV) -> Tensor | None:
        """Logits [n_vocab, wanted rows]; None if no row's are wanted.

        K/V of all ``rows`` are written; in the last layer only the wanted rows go on.
        """
        x = self.embed(g, rows)
        for spec, w in self.layers(g):
            h = self.norm(g, w["attn_norm"], x)
            kv.write(g, spec, rows, *self._keys_values(g, spec, w, rows, h))
            if spec.index == self.config.last_owner and wanted is not rows:
                if wanted is None:
                    return None
                x, h = (g.get_rows(t, wanted.of_step) for t in (x, h))
                rows = wanted
            a = self.attention(g, spec, w, rows, h, kv)
            x = self.add_normed(g, x, w["post_attention_norm"], a)
            x = self.named(g, spec, "attn_out", x)
            x = self.add_normed(g, x, w["post_ffw_norm"], self.mlp(g, w, rows, x))
            x = self.named(g, spec, "out", x)
        return self.logits(g, rows, x)

    def _keys_values(
        self, g: Graph, spec: LayerSpec, w: Block, rows: Rows, h: Tensor
    ) -> tuple[Tensor, Tensor]:
        """K, normed and rotated, and V; [hd, KV, T] both."""
        k = self.norm(g, w["attn_k_norm"], self.project(g, spec, w, rows, "k", h))
        return self.rope(g, spec, rows.positions, k), self.project(g, spec, w, rows, "v", h)
