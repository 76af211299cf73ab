"""Gemma 4: the forward pass, top to bottom. Names are the file's tensor names.

Shapes are in ggml order, fastest first: T rows, D = n_embd, KV key/value heads, hd = head_dim,
P = n_per_layer. The arithmetic is that of the released checkpoints (transformers'
modeling_gemma4.py); every fact that differs between layers is in their LayerSpec.
"""

from __future__ import annotations

from math import sqrt

from gemloom.compute.kv import KV, Rows
from gemloom.compute.linear import expert_linear, linear, table_rows
from gemloom.ggml.device import Tensor
from gemloom.ggml.graph import Graph
from gemloom.models.config import LayerSpec
from gemloom.models.gemma4_facts import PROJECTION, PROJECTION_NORM, layout
from gemloom.models.layers import Block, Decoder
from gemloom.models.tensor_names import PER_LAYER_TABLE


class Gemma4(Decoder):
    """E2B, E4B, 12B, 26B-A4B, 31B and any other size with the same keys."""

    layout = staticmethod(layout)

    def forward(self, g: Graph, rows: Rows, wanted: Rows | None, kv: KV) -> Tensor | None:
        """Logits [n_vocab, wanted rows]; None if no row's are wanted.

        K/V of all ``rows`` are written. Once the last layer with K/V of its own has done so, only
        the wanted rows go on.
        """
        n_layer, last = self.config.n_layer, self.config.last_owner
        embedded = x = self.embed(g, rows)
        per_layer = self._per_layer_inputs(g, rows, x, 0, n_layer if wanted is rows else last)
        for spec, w in self.layers(g):
            h = self.norm(g, w["attn_norm"], x)
            if spec.owns_kv:
                kv.write(g, spec, rows, *self._keys_values(g, spec, w, rows, h))
            if spec.index == last and wanted is not rows:
                if wanted is None:
                    return None
                x, h, embedded = (g.get_rows(t, wanted.of_step) for t in (x, h, embedded))
                rows = wanted
                per_layer |= self._per_layer_inputs(g, rows, embedded, last, n_layer)
            a = self.attention(g, spec, w, rows, h, kv)
            x = self.add_normed(g, x, w["post_attention_norm"], a)
            x = self.named(g, spec, "attn_out", x)
            f = self._experts(g, spec, w, rows, x) if spec.experts else self.mlp(g, w, rows, x)
            x = self.add_normed(g, x, w["post_ffw_norm"], f)
            x = self._inject(g, spec, w, rows, x, per_layer)
            x = self.named(g, spec, "out", x)
        return self.logits(g, rows, x)

    def _keys_values(
        self, g: Graph, spec: LayerSpec, w: Block, rows: Rows, h: Tensor
    ) -> tuple[Tensor, Tensor]:
        """K, normed and rotated, and V, normed without weight; [hd, KV, T] both."""
        k = self.project(g, spec, w, rows, "k", h)
        v = self.project(g, spec, w, rows, "v", h) if spec.has_v else k
        k = self.rope(g, spec, rows.positions, self.norm(g, w["attn_k_norm"], k))
        return k, g.rms_norm(v, self.config.eps)

    def _inject(
        self, g: Graph, spec: LayerSpec, w: Block, rows: Rows, x: Tensor,
        per_layer: dict[int, Tensor],
    ) -> Tensor:  # fmt: skip
        """Add the layer's own input, gated by the stream x [D, T], and scale the layer's output."""
        scale = w.get("layer_output_scale")
        if self.config.n_per_layer:
            gate = linear(g, w["inp_gate"], x, rows.deltas)
            y = linear(g, w["proj"], g.gelu_mul(gate, per_layer[spec.index]), rows.deltas)
            return self.add_normed(g, x, w["post_norm"], y, scale)
        return g.mul(x, scale) if scale else x

    def _per_layer_inputs(
        self, g: Graph, rows: Rows, embedded: Tensor, first: int, stop: int
    ) -> dict[int, Tensor]:
        """For each layer from first to stop its own input [P, T]: made where the layer runs."""
        if not self.config.n_per_layer:
            return {}
        made: dict[int, Tensor] = {}
        for there, start, end in self.placement.runs(first, stop):
            with g.on(there):
                made |= self._inputs_of(g, rows, embedded, start, end)
        return made

    def _inputs_of(
        self, g: Graph, rows: Rows, embedded: Tensor, first: int, stop: int
    ) -> dict[int, Tensor]:
        """The inputs of layers on one device: table rows and a projection, mixed."""
        p, n = self.config.n_per_layer, stop - first
        table, part = self.weights[PER_LAYER_TABLE], (first * p, stop * p)
        with g.on(self.placement.host):
            t = table_rows(g, table, rows.tokens, rows.deltas, part)
            g.expand(t)  # with all else of the host, before the devices take over
        t = g.scale(t, sqrt(p))  # [P * n, T]
        projection = self.weights.on(PROJECTION, g.place)
        y = linear(g, projection, embedded, rows.deltas, part)
        y = g.scale(y, self.config.n_embd**-0.5)
        y = g.reshape(y, p, n, rows.count)
        y = self.norm(g, self.weights.on(PROJECTION_NORM, g.place), y)
        mixed = g.scale(g.add(y, g.reshape(t, p, n, rows.count)), sqrt(0.5))  # [P, n, T]
        by_layer = g.cont(g.swap(mixed))  # [P, T, n]
        slices = (g.slice(by_layer, 2, i, i + 1) for i in range(n))
        return {first + i: g.reshape(s, p, rows.count) for i, s in enumerate(slices)}

    def _experts(self, g: Graph, spec: LayerSpec, w: Block, rows: Rows, x: Tensor) -> Tensor:
        """The dense MLP and the chosen experts side by side, each with a norm of its own."""
        assert spec.experts
        dense = self.norm(g, w["post_ffw_norm_1"], self.mlp(g, w, rows, x))
        ids, shares = self._route(g, spec, w, rows, x)
        m = g.reshape(self.norm(g, w["pre_ffw_norm_2"], x), x.shape[0], 1, x.shape[1])
        y = g.mul(self._expert_mlp(g, spec, w, rows, m, ids), shares)  # [D, used, T]
        total = g.cont(g.slice(y, 1, 0, 1))
        for i in range(1, spec.experts.used):
            total = g.add(total, g.slice(y, 1, i, i + 1))
        return g.add(dense, self.norm(g, w["post_ffw_norm_2"], g.reshape(total, *x.shape)))

    def _route(
        self, g: Graph, spec: LayerSpec, w: Block, rows: Rows, x: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Which experts each row uses, i32 [used, T], and the share of each, [1, used, T].

        The router reads the stream x [D, T] itself, normed without weight.
        """
        assert spec.experts
        n, used, count = spec.experts.count, spec.experts.used, rows.count
        r = g.scale(g.rms_norm(x, self.config.eps), self.config.n_embd**-0.5)
        r = g.mul(r, w["ffn_gate_inp.scale"])
        p = g.soft_max(linear(g, w["ffn_gate_inp"], r, rows.deltas))  # [n_expert, T]
        ids = g.top_k(p, used)
        shares = g.reshape(g.get_experts(g.reshape(p, 1, n, count), ids), used, count)
        shares = g.div(shares, g.sum_rows(shares))
        each = g.reshape(g.cont(ids), used * count)
        scales = g.get_rows(g.reshape(w["ffn_down_exps.scale"], 1, n), each)  # [1, used * T]
        return ids, g.reshape(g.mul(shares, g.reshape(scales, used, count)), 1, used, count)

    def _expert_mlp(
        self, g: Graph, spec: LayerSpec, w: Block, rows: Rows, m: Tensor, ids: Tensor
    ) -> Tensor:
        """The chosen experts on m [D, 1, T]: [D, used, T]."""
        assert spec.experts

        def each(name: str, x: Tensor) -> Tensor:
            return expert_linear(g, w[name], x, ids, rows.deltas)

        if "ffn_gate_up_exps" in w:
            both, n_ff = each("ffn_gate_up_exps", m), spec.experts.n_ff
            gate, up = g.slice(both, 0, 0, n_ff), g.slice(both, 0, n_ff, 2 * n_ff)
        else:
            gate, up = each("ffn_gate_exps", m), each("ffn_up_exps", m)
        return each("ffn_down_exps", g.gelu_mul(gate, up))
