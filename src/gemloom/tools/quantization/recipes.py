"""Which tensor gets which type: every quantization by name, as rules in order, the first that fits.

The mixes under llama.cpp's names choose what its quantizer chooses for Gemma (checked tensor by
tensor against it). Not the quantizer: nothing here reads or writes a tensor.

Why the embeddings are Q6_K where the rest has 2 to 5 bits: Gemma's table is the head as well, and
what a type costs there docs/quality.md shows, as for the per-layer table of E2B and E4B.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gguf.constants import GGML_QUANT_SIZES, LlamaFileType
from gguf.constants import GGMLQuantizationType as Type

from gemloom.errors import OptionError
from gemloom.models.tensor_names import HEAD, PER_LAYER_TABLE, TABLE


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a matrix is in the model: all that a rule can ask about."""

    part: str  # one of PARTS, "head" or "other"
    row: int  # values in a row
    layer: int  # -1 for what belongs to none
    n_layer: int
    nth: int  # its number among those of its part, in the order of the layers
    count: int  # how many those are
    heads_per_kv: int  # query heads that share one K/V head, in the first layer
    n_expert: int
    experts: bool  # one matrix an expert
    has_imatrix: bool


Condition = Callable[[Place], bool]


@dataclass(frozen=True, slots=True)
class Rule:
    """Matrices of ``part`` for which all of ``when`` hold get ``type``."""

    part: str  # "" for any
    type: Type
    when: tuple[Condition, ...] = ()

    def fits(self, place: Place) -> bool:
        """Whether this rule is for that matrix."""
        return self.part in ("", place.part) and all(holds(place) for holds in self.when)


@dataclass(frozen=True, slots=True)
class Recipe:
    """A quantization by name: its rules, and the type of whatever they leave."""

    name: str
    type: Type
    file_type: LlamaFileType  # what general.file_type says
    rules: tuple[Rule, ...] = ()
    needs_imatrix: frozenset[Type] = frozenset()  # besides NEEDS_IMATRIX

    def choose(self, place: Place) -> Type:
        """The type of a matrix, before its rows are looked at."""
        return next((rule.type for rule in self.rules if rule.fits(place)), self.type)


# Parts are told by what the name contains, the first that fits.
PARTS = (
    ("attn_qkv.weight", "attn_v"),  # as sensitive as V, which is in it
    ("attn_v.weight", "attn_v"),
    ("attn_k.weight", "attn_k"),
    ("attn_q.weight", "attn_q"),
    ("attn_output.weight", "attn_output"),
    ("ffn_up", "ffn_up"),
    ("ffn_gate", "ffn_gate"),
    ("ffn_down", "ffn_down"),
)
EMBEDDINGS = (TABLE, PER_LAYER_TABLE)
# Kept as they are: small, and every token's way depends on them.
KEPT = ("_norm.weight", "ffn_gate_inp.weight", "per_layer_model_proj", "altup", "laurel")

# What these types make without an importance matrix is of no use.
NEEDS_IMATRIX = frozenset(
    Type[name] for name in ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS")
)
# Where a row is no whole number of blocks; where it is none of these either, F16.
FALLBACKS: dict[Type, Type] = {
    Type[name]: Type[other]
    for other, names in {
        "Q4_0": "Q1_0 NVFP4 Q2_K Q3_K TQ1_0 TQ2_0",
        "IQ4_NL": "IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S IQ4_XS",
        "Q5_0": "Q4_K",
        "Q5_1": "Q5_K",
        "Q8_0": "Q6_K",
    }.items()
    for name in names.split()
}


def part_of(name: str, tied: bool) -> str:
    """The part a matrix belongs to; embeddings that are the head as well (``tied``) are "head"."""
    if name == HEAD or (tied and name in EMBEDDINGS):
        return "head"
    if name in EMBEDDINGS:
        return "embedding"
    return next((part for piece, part in PARTS if piece in name), "other")


def fitting(kind: Type, row: int) -> Type:
    """``kind``, or the type that stands in for it where ``row`` is no whole number of blocks."""
    for candidate in (kind, FALLBACKS.get(kind, Type.F16), Type.F16):
        if row % GGML_QUANT_SIZES[candidate][0] == 0:
            return candidate
    raise AssertionError(kind)


# -- conditions ------------------------------------------------------------------------------


def spread(p: Place) -> bool:
    """The first and the last eighth, and every third of those between."""
    eighth = p.count // 8
    return p.nth < eighth or p.nth >= 7 * p.count // 8 or (p.nth - eighth) % 3 == 2


def spread_layers(p: Place) -> bool:
    """As ``spread``, of the layers."""
    eighth = p.n_layer // 8
    return p.layer < eighth or p.layer >= 7 * p.n_layer // 8 or (p.layer - eighth) % 3 == 2


def first_2(p: Place) -> bool:
    """The first two of their part."""
    return p.nth < 2


def first_4(p: Place) -> bool:
    """The first four of their part."""
    return p.nth < 4


def first_16th(p: Place) -> bool:
    """In the first sixteenth of the layers."""
    return p.layer < p.n_layer // 16


def first_8th(p: Place) -> bool:
    """In the first eighth of the layers."""
    return p.layer < p.n_layer // 8


def first_8th_counted(p: Place) -> bool:
    """The first of their part, as many as an eighth of the layers."""
    return p.nth < p.n_layer // 8


def middle(p: Place) -> bool:
    """In no outer eighth of the layers."""
    return p.n_layer // 8 <= p.layer < 7 * p.n_layer // 8


def shared(p: Place) -> bool:
    """Four or more query heads share a K/V head, whose matrices are small then."""
    return p.heads_per_kv >= 4


def shared_or_experts(p: Place) -> bool:
    """As ``shared``, or attention is small beside four or more experts."""
    return shared(p) or p.n_expert >= 4


def experts(p: Place) -> bool:
    """One matrix an expert."""
    return p.experts


def imatrix(p: Place) -> bool:
    """There is an importance matrix."""
    return p.has_imatrix


def no_imatrix(p: Place) -> bool:
    """There is no importance matrix."""
    return not p.has_imatrix


def ragged(p: Place) -> bool:
    """Rows are no whole number of the large blocks."""
    return p.row % 256 != 0


# -- the recipes -----------------------------------------------------------------------------


def _rule(part: str, kind: str, *when: Condition) -> Rule:
    return Rule(part, Type[kind], when)


def _low(name: str, kind: str, file_type: int, more: str, *others: Rule) -> Recipe:
    """One of 1 to 3 bits: ``more`` is what its more sensitive matrices get."""
    rules = (
        _rule("head", "Q8_0", ragged),
        _rule("head", "Q5_K"),
        _rule("embedding", more),
        _rule("attn_v", "Q4_K", shared_or_experts),
        _rule("attn_v", more),
        _rule("ffn_down", more, first_8th_counted),
        *others,
    )
    return Recipe(name, Type[kind], LlamaFileType(file_type), rules)


def _mix(name: str, kind: str, file_type: int, *rules: Rule, head: str = "Q6_K") -> Recipe:
    return Recipe(name, Type[kind], LlamaFileType(file_type), (_rule("head", head), *rules))


_ALL = (
    Recipe("F32", Type.F32, LlamaFileType.ALL_F32),
    Recipe("F16", Type.F16, LlamaFileType.MOSTLY_F16),
    Recipe("BF16", Type.BF16, LlamaFileType.MOSTLY_BF16),
    _mix("Q8_0", "Q8_0", 7, head="Q8_0"),
    _mix("Q6_K", "Q6_K", 18),
    _mix(
        "Q5_K_M", "Q5_K", 17,
        _rule("attn_v", "Q6_K", spread),
        _rule("ffn_down", "Q6_K", spread_layers),
    ),
    _mix("Q5_K_S", "Q5_K", 16),
    _mix("Q5_1", "Q5_1", 9),
    _mix("Q5_0", "Q5_0", 8, _rule("ffn_down", "Q5_1", imatrix, first_8th)),
    _mix(
        "Q4_K_M", "Q4_K", 15,
        _rule("attn_v", "Q6_K", spread),
        _rule("ffn_down", "Q6_K", spread_layers),
    ),
    _mix(
        "Q4_K_S", "Q4_K", 14,
        _rule("attn_v", "Q5_K", first_4),
        _rule("ffn_down", "Q5_K", first_8th),
    ),
    _mix("Q4_1", "Q4_1", 3),
    _mix("Q4_0", "Q4_0", 2, _rule("ffn_down", "Q4_1", imatrix, first_8th)),
    # What Gemma's checkpoints of quantization-aware training were trained for, with any imatrix.
    _mix("QAT_Q4_0", "Q4_0", 2),
    _mix(
        "IQ4_NL", "IQ4_NL", 25,
        _rule("attn_v", "Q5_K", shared),
        _rule("ffn_down", "Q5_K", first_8th, no_imatrix),
    ),
    _mix(
        "IQ4_XS", "IQ4_XS", 30,
        _rule("attn_v", "Q5_K", shared),
        _rule("ffn_down", "Q5_K", first_8th, no_imatrix),
    ),
    _mix("MXFP4", "MXFP4", 38),
    # As gpt-oss has it: experts alone, everything else Q8_0.
    _mix("MXFP4_MOE", "Q8_0", 38, _rule("", "MXFP4", experts), head="Q8_0"),
    _mix("NVFP4", "NVFP4", 39),
    _mix(
        "Q3_K_L", "Q3_K", 13,
        _rule("attn_v", "Q5_K"),
        _rule("ffn_down", "Q5_K"),
        _rule("attn_output", "Q5_K"),
    ),
    _mix(
        "Q3_K_M", "Q3_K", 12,
        _rule("attn_v", "Q5_K", first_2),
        _rule("attn_v", "Q4_K"),
        _rule("ffn_down", "Q5_K", first_16th),
        _rule("ffn_down", "Q4_K"),
        _rule("attn_output", "Q4_K"),
    ),
    _mix("Q3_K_S", "Q3_K", 11),
    _mix(
        "IQ3_M", "IQ3_S", 27,
        _rule("attn_v", "Q4_K"),
        _rule("ffn_down", "Q4_K", first_8th),
        _rule("attn_output", "Q4_K"),
    ),
    _mix("IQ3_S", "IQ3_S", 26, _rule("attn_v", "Q4_K", shared)),
    _mix(
        "IQ3_XS", "IQ3_S", 22,
        _rule("attn_v", "Q4_K", shared),
        _rule("attn_k", "IQ3_XXS"),
        _rule("attn_q", "IQ3_XXS"),
        _rule("ffn_gate", "IQ3_XXS", middle),
        _rule("ffn_up", "IQ3_XXS", middle),
    ),
    Recipe(
        "IQ3_XXS", Type.IQ3_XXS, LlamaFileType.MOSTLY_IQ3_XXS,
        (
            _rule("head", "Q8_0", ragged),
            _rule("head", "Q5_K"),
            _rule("embedding", "IQ3_S"),
            _rule("attn_v", "Q4_K", shared),
            _rule("attn_v", "IQ3_S", no_imatrix),
            _rule("attn_k", "IQ2_S"),
            _rule("attn_q", "IQ2_S"),
            _rule("ffn_down", "Q4_K", no_imatrix, first_8th),
            _rule("ffn_down", "Q3_K", no_imatrix),
            _rule("attn_output", "IQ3_S"),
        ),
    ),
    _mix(
        "Q2_K", "Q2_K", 10,
        _rule("attn_v", "Q4_K", shared),
        _rule("attn_v", "Q3_K"),
        _rule("ffn_down", "Q3_K"),
        _rule("attn_output", "Q3_K"),
    ),
    Recipe(
        "Q2_K_S", Type.Q2_K, LlamaFileType.MOSTLY_Q2_K_S,
        (
            _rule("head", "Q6_K"),
            _rule("attn_v", "Q4_K", shared),
            _rule("ffn_down", "Q4_K", first_8th),
        ),
        needs_imatrix=frozenset({Type.Q2_K}),
    ),
    _low("IQ2_M", "IQ2_S", 29, "IQ3_S", _rule("attn_output", "IQ3_S")),
    _low("IQ2_S", "IQ2_XS", 28, "IQ3_S", _rule("attn_output", "IQ3_S")),
    _low("IQ2_XS", "IQ2_XS", 20, "Q2_K"),
    _low("IQ2_XXS", "IQ2_XXS", 19, "Q2_K"),
    _low("IQ1_M", "IQ1_M", 31, "Q2_K", _rule("attn_output", "IQ2_XXS")),
    _low("IQ1_S", "IQ1_S", 24, "Q2_K", _rule("attn_output", "IQ2_XXS")),
    _mix("TQ2_0", "TQ2_0", 37, _rule("embedding", "Q4_K")),
    _mix("TQ1_0", "TQ1_0", 36, _rule("embedding", "Q4_K")),
    _mix("Q1_0", "Q1_0", 40),
)  # fmt: skip
RECIPES = {recipe.name: recipe for recipe in _ALL}
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}


def recipe(name: str) -> Recipe:
    """The recipe of that name, in letters of any case. OptionError with all names otherwise."""
    upper = name.upper()
    found = RECIPES.get(ALIASES.get(upper, upper))
    if found is None:
        raise OptionError(f"no quantization is called {name!r}; there are {', '.join(RECIPES)}")
    return found
