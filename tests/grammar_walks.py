"""Random walks through a grammar's masks, for the tests of ``text/constraint.py``."""

import random
from functools import cache

import numpy as np

from gemloom.text.constraint import Grammars
from vocabularies import small

EXTRA = 13  # ids of the model past the tokenizer's


@cache
def grammars(arch="gemma4"):
    return Grammars(small(arch), small(arch).size + EXTRA)


def one(text, arch="gemma4"):
    """The id of a special token."""
    (token,) = small(arch).encode(text, special=True)
    return token


@cache
def exits(arch):
    """Tokens that bring a walk to its end, the quickest first."""
    tokenizer = small(arch)
    marks = ["<channel|>", '<|"|>', "<tool_call|>"] if arch == "gemma4" else []
    return [*sorted(tokenizer.eog), *map(one, marks), *(tokenizer.encode(c)[0] for c in '"}],:')]


@cache
def specials(arch="gemma4"):
    """Ids that stand for no text."""
    tokenizer = small(arch)
    texts = (tokenizer.token(i).decode(errors="replace") for i in range(tokenizer.size))
    return {
        i
        for i, text in enumerate(texts)
        if tokenizer.encode(text, special=True) == [i] != tokenizer.encode(text)
    }


def walk(constraint, seed, free=40, arch="gemma4"):
    """The ids of a walk, drawn uniformly ``free`` times, then with a pull towards the end."""
    tokenizer, rng, ids = small(arch), random.Random(seed), []
    while not constraint.finished:
        assert len(ids) < 3000, "the walk does not end"
        constraint.prepare()
        mask = constraint.mask()
        if mask is None:
            mask = np.arange(tokenizer.size + EXTRA) < tokenizer.size
        assert mask.dtype == np.bool_ and mask.shape == (tokenizer.size + EXTRA,)
        allowed = np.flatnonzero(mask).tolist()
        assert allowed and allowed[-1] < tokenizer.size
        pull = [token for token in exits(arch) if mask[token]] if len(ids) >= free else []
        token = pull[0] if pull else rng.choice(allowed)
        if token in tokenizer.eog:
            return ids
        constraint.accept(token)
        ids.append(token)
    return ids


def text(ids, arch="gemma4"):
    return small(arch).decode(ids, special=True)
