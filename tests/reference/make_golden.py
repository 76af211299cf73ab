"""Write ``tests/data/golden/{variant}.npz``: what transformers computes for each tiny model.

Each file holds ``seed`` of the weights, ``ids`` [tokens] i32, three windows long, and
``logits`` [tokens, vocabulary] f32. Run it after a change to ``tiny.py``; the same
machine writes the same bytes again.
"""

import hf
import numpy as np
import torch

from golden import GOLDEN
from tiny import VARIANTS, Variant

SEED = 0
PROMPT_SEED = 79  # no two experts nearly tie on this prompt, so rounding cannot swap them
WINDOWS = 3


def prompt(variant: Variant) -> np.ndarray:
    """<bos> and then any tokens, [tokens] i32."""
    ids = np.random.RandomState(PROMPT_SEED).randint(variant.n_vocab, size=WINDOWS * variant.window)
    ids[0] = 2
    return ids.astype(np.int32)


def main() -> None:
    torch.set_num_threads(1)  # the order of the sums must not depend on the machine's load
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for name, variant in VARIANTS.items():
        ids = prompt(variant)
        logits = hf.logits(variant, SEED, ids.tolist())
        np.savez_compressed(GOLDEN / name, seed=SEED, ids=ids, logits=logits)


if __name__ == "__main__":
    main()
