"""Random LoRA adapters for tiny models, and the models they make when merged by numpy."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

import gemloom
import tiny
from gemloom.adapters.factors import Lora, Pair

Kinds = Callable[[str], bool]  # of a tensor's name: whether it is changed
HEAD, TABLE = "output.weight", "token_embd.weight"
SIZE = {TABLE: 0.02, HEAD: 0.02, "per_layer_token_embd.weight": 1.0}  # of a change, beside the rest


def random_lora(
    model: gemloom.Model, seed: int = 1, kinds: Kinds = lambda name: True, rank: int = 4,
    invocation: tuple[int, ...] = (),
) -> Lora:  # fmt: skip
    """An adapter with a random pair for each matrix of the model that ``kinds`` wants.

    The head has one of its own, also where it is the embedding table.
    """
    rng = np.random.RandomState(seed)
    pairs = {}
    shapes = matrices(model)
    for name, (k, m, *experts) in {HEAD: shapes[TABLE], **shapes}.items():
        a = rng.standard_normal((*experts, rank, k)) * k**-0.5
        b = rng.standard_normal((*experts, m, rank)) * rank**-0.5 * SIZE.get(name, 0.5)
        if kinds(name):
            pairs[name] = Pair(a.astype(np.float32), b.astype(np.float32), 0.5)
    return Lora(f"random {seed}", None, pairs, invocation)


def matrices(model: gemloom.Model) -> dict[str, tuple[int, ...]]:
    """The shapes of a model's matrices, in ggml order."""
    shapes = model.adapters._shapes
    return {name: shape for name, shape in shapes.items() if len(shape) > 1}


def merged(variant: str, scales: Mapping[str, tuple[Lora, float]], **forms: Any) -> bytes:
    """A tiny model with W + s B A for W, for each adapter and scale, in f32.

    Its head is a matrix of its own, so that an adapter can change the one or the other.
    """

    def edit(keys: tiny.Metadata, weights: tiny.Tensors) -> None:
        weights.setdefault(HEAD, weights[TABLE])
        for lora, scale in scales.values():
            for name, pair in lora.pairs.items():
                change = np.float32(scale * pair.scale) * (pair.b @ pair.a)
                weights[name] = weights[name] + change

    return tiny.gguf_bytes(tiny.VARIANTS[variant], edit=edit, **forms)
