"""What the Gemma decoders have in common.

Not a forward pass: those are in the files named after their architecture. Nor the tensors that
they want of a file: ``layout.py``.
Shapes are in ggml order: T rows, D = n_embd, H query heads, KV key/value heads, hd = head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gemloom.compute.kv import KV, Rows
from gemloom.compute.linear import linear, table_rows
from gemloom.ggml.device import Tensor
from gemloom.ggml.graph import Graph
from gemloom.models.config import Config, LayerSpec
from gemloom.models.tensor_names import HEAD, ROPE_FREQS, TABLE
from gemloom.weights.weights import Tensors

Block = dict[str, Tensor]  # one layer's tensors, by name without "blk.N." and ".weight"


class Decoder:
    """Base of the architectures: the pieces whose arithmetic is the same in all of them."""

    def __init__(self, config: Config, weights: Tensors) -> None:
        self.config, self.weights = config, weights
        self.placement = weights.placement
        self.blk = [weights.block(spec.index) for spec in config.layers]

    def layers(self, g: Graph) -> Iterator[tuple[LayerSpec, Block]]:
        """Each layer's facts and tensors in turn; what is made meanwhile runs where they lie."""
        for spec, block in zip(self.config.layers, self.blk, strict=True):
            g.at(self.placement.layers[spec.index])
            yield spec, block

    def embed(self, g: Graph, rows: Rows) -> Tensor:
        """Token embeddings, scaled: [D, T]."""
        with g.on(self.placement.host):
            x = table_rows(g, self.weights[TABLE], rows.tokens, rows.deltas)
            g.expand(x)
        g.at(self.placement.layers[0])
        return g.name(g.scale(x, self.config.embed_scale), "embd")

    def norm(self, g: Graph, weight: Tensor, x: Tensor) -> Tensor:
        """RMS norm over the first dimension, named as its weight."""
        return g.name(g.rms_norm(x, self.config.eps, weight), weight.name.removesuffix(".weight"))

    def add_normed(
        self, g: Graph, x: Tensor, weight: Tensor, y: Tensor, scale: Tensor | None = None
    ) -> Tensor:
        """(x + norm(y)) * scale, how each half of a layer ends; in one node where there is one."""
        name = weight.name.removesuffix(".weight")
        if g.kernels and not g.tapping(name):
            return g.add_norm(x, y, self.config.eps, weight, scale)
        x = g.add(x, self.norm(g, weight, y))
        return g.mul(x, scale) if scale else x

    def project(
        self, g: Graph, spec: LayerSpec, w: Block, rows: Rows, which: str, h: Tensor
    ) -> Tensor:
        """h [D, T] -> q, k or v [hd, heads, T], from its own matrix or rows of the fused one."""
        q, k = spec.n_head * spec.head_dim, spec.n_kv * spec.head_dim
        start, stop = {"q": (0, q), "k": (q, q + k), "v": (q + k, q + 2 * k)}[which]
        name = f"blk.{spec.index}.attn_{which}"
        if "attn_qkv" in w:
            y = g.name(linear(g, w["attn_qkv"], h, rows.deltas, (start, stop)), name)
        else:
            y = linear(g, w[f"attn_{which}"], h, rows.deltas)
        return g.reshape(y, spec.head_dim, (stop - start) // spec.head_dim, h.shape[1])

    def query(self, g: Graph, spec: LayerSpec, w: Block, rows: Rows, h: Tensor) -> Tensor:
        """Queries [hd, H, T]: projected, normed per head, rotated."""
        q = self.norm(g, w["attn_q_norm"], self.project(g, spec, w, rows, "q", h))
        return self.rope(g, spec, rows.positions, q)

    def rope(self, g: Graph, spec: LayerSpec, positions: Tensor, x: Tensor) -> Tensor:
        """Rotate x [hd, heads, T] as this layer does."""
        rope = spec.rope
        factors = self.weights.on(ROPE_FREQS, g.place) if rope.factors else None
        return g.rope(x, positions, rope.n_dims, rope.base, rope.scale, factors)

    def attention(
        self, g: Graph, spec: LayerSpec, w: Block, rows: Rows, h: Tensor, kv: KV
    ) -> Tensor:
        """The attention half of a layer: [D, T] -> [D, T]; K/V are in the cache already."""
        q = self.query(g, spec, w, rows, h)
        o = kv.attend(g, spec, rows, q, self.config.attn_scale)  # [hd * H, T]
        return linear(g, w["attn_output"], self.named(g, spec, "attn_kqv", o), rows.deltas)

    def mlp(self, g: Graph, w: Block, rows: Rows, x: Tensor) -> Tensor:
        """down(gelu(gate x) * up x), of the normed x: [D, T] -> [D, T]."""
        m = self.norm(g, w["ffn_norm"], x)
        gate, up = (linear(g, w[name], m, rows.deltas) for name in ("ffn_gate", "ffn_up"))
        return linear(g, w["ffn_down"], g.gelu_mul(gate, up), rows.deltas)

    def logits(self, g: Graph, rows: Rows, x: Tensor) -> Tensor:
        """x [D, T] -> [n_vocab, T], still to go through ``finish``."""
        g.at(self.placement.head)
        h = self.norm(g, self.weights["output_norm.weight"], x)
        head = self.weights.on(self.weights.head, g.place)
        return g.name(linear(g, head, h, rows.deltas, name=HEAD), "logits")

    def finish(self, logits: np.ndarray) -> np.ndarray:
        """The last operation, cap * tanh(logits / cap), in place on what was read back.

        ggml's tanh is scalar and runs on one thread: 2.7 ms a row of 262,144, numpy's 0.1.
        """
        if cap := self.config.softcap:
            logits *= np.float32(1 / cap)
            np.tanh(logits, out=logits)
            logits *= np.float32(cap)
        return logits

    def named(self, g: Graph, spec: LayerSpec, name: str, x: Tensor) -> Tensor:
        """Give an intermediate of a layer its name; what is returned goes on in its place.

        The names are attn_kqv [hd * H, T], attn_out and out [D, T]. A subclass may change them.
        """
        return g.name(x, f"blk.{spec.index}.{name}")
