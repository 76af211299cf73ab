"""The largest logits of a row that stays on its device, and picking a token from them alone.

A row of Gemma's is 262,144 logits, a mebibyte; most requests look at the 64 largest. A device
that ranks them itself sends a few hundred bytes instead. The token is the one that
``sampling.sample`` picks from the whole row, always: where the candidates do not decide, the row
is read after all.

They decide where as many of them as a request looks at lie above every logit that was not
sent, since what a request asks for can only have lowered those. Equal logits rank by id here as
there; where one that was not sent may equal the last one looked at, the candidates do not decide.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from gemloom.sampling import params as sampling
from gemloom.sampling.params import Floats, History, Ids, Sampled, SamplingParams

COUNT = 128  # of a row: the 64 that requests look at by default, and room for barred ones


@dataclass(frozen=True, slots=True)
class Candidates:
    """The largest logits of one row: ``values`` float32 of the tokens ``ids``, which ascend.

    No other token's logit is above ``floor``. ``read`` gives the whole row, float32 [vocab], until
    the next step is computed.
    """

    ids: Ids
    values: Floats
    floor: float
    read: Callable[[], Floats]


def candidates(ids: Ids, values: Floats, n_vocab: int, read: Callable[[], Floats]) -> Candidates:
    """What a device found, in any order; ``values`` are soft-capped as the row would be.

    The soft-cap was taken after ranking and its last bits need not ascend, so that the floor lies
    a millionth above the least of them.
    """
    order = np.argsort(ids)
    least = float(values.min())
    floor = least + abs(least) * 2**-20 if ids.size < n_vocab else -np.inf
    return Candidates(ids[order], values[order], floor, read)


def suffice(params: SamplingParams) -> bool:
    """Whether candidates may decide what such a request picks: it looks at few logits, and what
    it asks for raises none."""
    lowers = (
        all(bias <= 0 for bias in params.logit_bias.values())
        and params.repetition_penalty >= 1
        and params.presence_penalty >= 0
        and params.frequency_penalty >= 0
    )
    return lowers and params.logprobs is None and 0 < _looked_at(params) < COUNT


def sample(
    row: Floats | Candidates,
    params: SamplingParams,
    history: History,
    rng: np.random.Generator,
    suppress: Sequence[int] = (),
    allowed: NDArray[np.bool_] | None = None,
) -> Sampled:
    """As ``sampling.sample``, to the token, of a whole row or of its candidates."""
    if isinstance(row, Candidates):
        if suffice(params):
            token = _among(row, params, history, rng, suppress, allowed)
            if token is not None:
                return Sampled(token)
        row = row.read()
    return sampling.sample(row, params, history, rng, suppress, allowed)


def _looked_at(params: SamplingParams) -> int:
    """How many of the largest logits decide; 0 for all."""
    return params.top_k if params.temperature > 0 else 1


def _among(
    row: Candidates,
    params: SamplingParams,
    history: History,
    rng: np.random.Generator,
    suppress: Sequence[int],
    allowed: NDArray[np.bool_] | None,
) -> int | None:
    """The token, or None, and no number drawn, where the candidates do not decide.

    They are sampled from as if they were the vocabulary: token i is the i-th of them.
    """
    ids = row.ids.tolist()
    if params.logit_bias:
        there = {i: params.logit_bias[t] for i, t in enumerate(ids) if t in params.logit_bias}
        params = replace(params, logit_bias=there)
    barred = [i for i, t in enumerate(ids) if t in suppress] if suppress else ()
    few = None if allowed is None else allowed[row.ids]
    past = _narrowed(history, ids) if _penalizes(params) else History()
    values = sampling.adjusted(sampling.suppressed(row.values, barred), params, past, few)
    if np.count_nonzero(values > row.floor) < _looked_at(params):
        return None
    return int(ids[sampling.choose(values, params, rng)])


def _penalizes(params: SamplingParams) -> bool:
    """Whether what was said before matters."""
    penalties = params.presence_penalty or params.frequency_penalty
    return bool(penalties) or params.repetition_penalty != 1


def _narrowed(history: History, ids: list[int]) -> History:
    seen = {i for i, token in enumerate(ids) if token in history.seen}
    generated = {i: n for i, token in enumerate(ids) if (n := history.generated.get(token))}
    return History(seen, Counter(generated))
