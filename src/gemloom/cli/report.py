"""What ``gemloom inspect`` tells: the facts of a file as plain values, and tables of them."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from gemloom.cli.terminal import one_line, size, table
from gemloom.compute.fitting import estimate
from gemloom.compute.kv_shape import cell_bytes, slot_cells
from gemloom.errors import WeightsError
from gemloom.files.gguf import GGUF, Metadata, StringArray, TensorInfo
from gemloom.models.config import Config, Kind
from gemloom.models.network import Network
from gemloom.options import Options
from gemloom.text import template, vocabulary
from gemloom.tools.quantization.parts import PARTS, part
from gemloom.weights.weights import planned_bytes

if TYPE_CHECKING:
    from rich.table import Table

Facts = dict[str, Any]

_TOKENIZER = "tokenizer.ggml."
_TOKEN_TYPES = ("undefined", "normal", "unknown", "control", "user-defined", "unused", "byte")
_PROGRAM = 90 << 20  # bytes of Python and libraries, half of them pages of files; measured
_BAR = 16  # characters of a whole bar


def describe(file: GGUF, options: Options, list_tensors: bool = False) -> Facts:
    """Everything about a file that can be told without its weights; JSON can hold it.

    Raises ConfigError for an architecture that is not supported, OptionError for a context that
    the model has not.
    """
    network = Network.of(file)
    config = network.config
    metadata = file.metadata
    facts: Facts = {
        "file": file.name,
        "name": _text(metadata, "general.name"),
        "license": _text(metadata, "general.license.name") or _text(metadata, "general.license"),
        "config": _config(config),
        "tokenizer": _tokenizer(metadata, config.n_vocab),
        "chat_template": bool(template.named(metadata)),
        "notes": _notes(metadata, config.n_vocab),
        "tensors": _tensors(file),
        "memory": plan(file, network, options),
    }
    if list_tensors:
        facts["tensors"]["list"] = [
            {"name": t.name, "type": t.type.name, "shape": t.shape, "bytes": t.nbytes}
            for t in file.tensors.values()
        ]
    return facts


def plan(file: GGUF, network: Network, options: Options) -> Facts:
    """The memory that a process with this model will take on the CPU, in bytes by kind.

    ``weights`` and ``per_layer_table`` are what the tensors have. ``copied`` is memory that they
    get, packed or not, ``mapped`` pages of files. ``total`` is what has to be there at the peak.
    """
    config, taken = network.config, estimate(file, network, options)
    weights, table = planned_bytes(file, network.layout)
    context = options.context_for(config)
    cells, kv_type = slot_cells(config, context, options.chunk), options.kv_type or "f16"
    full, sliding = (
        options.slots * cells.of(kind) * cell_bytes(config, kv_type, kind) for kind in Kind
    )
    return {
        "context": context,
        "kv_type": kv_type,
        "cells_full": cells.full,
        "cells_sliding": cells.sliding,
        "weights": weights,
        "per_layer_table": table,
        "kv_full": full,
        "kv_sliding": sliding,
        "copied": taken.copied,
        "mapped": taken.mapped,
        "compute": taken.compute,
        "tokenizer": taken.tokenizer,
        "program": _PROGRAM,
        "total": _PROGRAM + taken.tokenizer + taken.copied + taken.compute + full + sliding,
    }


def _notes(metadata: Metadata, rows: int) -> list[str]:
    """What is wrong with the vocabulary or a template, or contradicts itself there."""
    if vocabulary.is_absent(metadata):
        return [f"{metadata.name} has no vocabulary: it takes and gives token ids only"]
    try:
        templates = template.named(metadata).values()
        for source in templates:
            template.check(source, metadata.name)
        found = vocabulary.read(metadata, " ".join(templates))
        return list(found.fitted(metadata.name, rows).notes)
    except WeightsError as error:
        return [str(error)]


def _config(config: Config) -> Facts:
    facts = asdict(config)
    facts["layers"] = [
        {"index": layer["index"], "sliding": layer.pop("kind") is Kind.SLIDING} | layer
        for layer in facts["layers"]
    ]
    return facts


def _text(metadata: Metadata, key: str) -> str | None:
    value = metadata.get(key)
    return value if isinstance(value, str) else None


def _tokenizer(metadata: Metadata, size: int) -> Facts:
    types = metadata.get(f"{_TOKENIZER}token_type")
    merges = metadata.get(f"{_TOKENIZER}merges")
    counts = Counter(types.tolist() if isinstance(types, np.ndarray) else [])
    return {
        "kind": _text(metadata, f"{_TOKENIZER}model"),
        "size": size,
        "merges": len(merges) if isinstance(merges, StringArray) else 0,
        "types": {name: counts[n] for n, name in enumerate(_TOKEN_TYPES) if counts[n]},
        "special": dict(_special_tokens(metadata)),
    }


def _special_tokens(metadata: Metadata) -> Iterator[tuple[str, Facts]]:
    """The tokens that keys such as tokenizer.ggml.bos_token_id speak of."""
    texts = metadata.get(f"{_TOKENIZER}tokens")
    for key, value in metadata.items():
        name = key.removeprefix(_TOKENIZER).removesuffix("_token_id")
        if key == f"{_TOKENIZER}{name}_token_id" and isinstance(value, int):
            known = isinstance(texts, StringArray) and 0 <= value < len(texts)
            yield name, {"id": value, "text": texts[value] if known else None}  # type: ignore[index]


def _tensors(file: GGUF) -> Facts:
    tensors = list(file.tensors.values())
    types = _grouped(tensors, "type", lambda tensor: tensor.type.name)
    types.sort(key=lambda kind: kind["bytes"], reverse=True)
    parts = _grouped(tensors, "part", lambda tensor: part(tensor.name))
    parts.sort(key=lambda group: PARTS.index(group["part"]))
    return {**_sums(tensors), "types": types, "parts": parts}


def _grouped(
    tensors: Sequence[TensorInfo], label: str, name: Callable[[TensorInfo], str]
) -> list[Facts]:
    groups = groupby(sorted(tensors, key=name), key=name)
    return [{label: key, **_sums(list(group))} for key, group in groups]


def _sums(tensors: Sequence[TensorInfo]) -> Facts:
    weights, size = sum(prod(t.shape) for t in tensors), sum(t.nbytes for t in tensors)
    bits = round(8 * size / weights, 3) if weights else 0
    return {"count": len(tensors), "weights": weights, "bytes": size, "bits": bits}


# -- for people ------------------------------------------------------------------------------


def tables(facts: Facts) -> Iterator["Table"]:
    """The facts as rich tables of at most 80 columns."""
    about = table("", "")
    about.show_header = False
    for label, value in _lines(facts):
        about.add_row(label, one_line(value))
    yield about
    yield _sums_table("type", facts["tensors"]["types"], facts["tensors"])
    yield _sums_table("part", facts["tensors"]["parts"], facts["tensors"])
    yield _memory_table(facts["memory"])
    if "list" in facts["tensors"]:
        yield _tensor_table(facts["tensors"]["list"])


def _lines(facts: Facts) -> Iterator[tuple[str, str]]:
    config = facts["config"]
    layers = config["layers"]
    yield "file", facts["file"]
    yield "name", facts["name"] or "not said"
    yield "licence", facts["license"] or "not said"
    yield "architecture", config["architecture"]
    yield "context", f"{config['n_context']:,} tokens, window {config['window']:,}"
    yield "embedding", f"{config['n_embd']:,}"
    if config["n_per_layer"]:
        yield "per-layer inputs", f"{config['n_per_layer']:,} a layer"
    yield "layers", str(len(layers))
    for kind, sliding in (("sliding", True), ("full", False)):
        if chosen := [layer for layer in layers if layer["sliding"] == sliding]:
            yield f"  {kind}", ranges(layer["index"] for layer in chosen)
            yield "", _heads(chosen)
    yield "K/V", _sharing(layers)
    yield "feed-forward", _spread(layers, "n_ff")
    if experts := layers[0]["experts"]:
        yield "experts", f"{experts['used']} of {experts['count']}, {experts['n_ff']:,} wide"
    tokenizer = facts["tokenizer"]
    merges = f", {tokenizer['merges']:,} merges" if tokenizer["merges"] else ""
    yield "tokenizer", f"{tokenizer['kind'] or 'not said'}, {tokenizer['size']:,} tokens{merges}"
    yield "", ", ".join(f"{count:,} {name}" for name, count in tokenizer["types"].items())
    for name, token in tokenizer["special"].items():
        yield f"  {name}", f"{token['id']:,} {token['text'] or ''}"
    yield "chat template", "yes" if facts["chat_template"] else "no (a base model)"
    for note in facts["notes"]:
        yield "note", note


def ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers with runs joined: "0-4, 6-10, 12"."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _heads(layers: Sequence[Facts]) -> str:
    kinds = dict.fromkeys((x["n_head"], x["n_kv"], x["head_dim"]) for x in layers)
    return "; ".join(f"{head} heads of {dim}, {kv} for K/V" for head, kv, dim in kinds)


def _sharing(layers: Sequence[Facts]) -> str:
    readers: dict[int, list[int]] = {}
    for layer in layers:
        if layer["kv_owner"] != layer["index"]:
            readers.setdefault(layer["kv_owner"], []).append(layer["index"])
    if not readers:
        return "every layer has its own"
    return "; ".join(f"{ranges(who)} read those of {owner}" for owner, who in readers.items())


def _spread(layers: Sequence[Facts], key: str) -> str:
    values: dict[int, list[int]] = {}
    for layer in layers:
        values.setdefault(layer[key], []).append(layer["index"])
    if len(values) == 1:
        return f"{next(iter(values)):,}"
    return "; ".join(f"{value:,} in {ranges(where)}" for value, where in values.items())


def _sums_table(label: str, groups: Sequence[Facts], tensors: Facts) -> "Table":
    """Tensors by type or part, with a bar for their share of the bytes."""
    made = table(f"\n{label}", ">\ntensors", ">\nweights", ">\nsize", ">bits a\nweight", "")
    for group in [*groups, {**tensors, label: "all"}]:
        share = group["bytes"] / tensors["bytes"] if tensors["bytes"] else 0
        made.add_row(
            group[label],
            f"{group['count']:,}",
            f"{group['weights']:,}",
            size(group["bytes"]),
            f"{group['bits']:.2f}",
            "" if group[label] == "all" else "█" * round(_BAR * share),
        )
    return made


def _memory_table(memory: Facts) -> "Table":
    made = table("\nmemory", ">\nsize", f"\nfor {memory['context']:,} tokens")
    cells = f"{{:,}} cells a layer, {memory['kv_type']}"
    made.add_row("weights", size(memory["copied"]), "packed or copied")
    made.add_row("K/V, full layers", size(memory["kv_full"]), cells.format(memory["cells_full"]))
    made.add_row(
        "K/V, sliding layers", size(memory["kv_sliding"]), cells.format(memory["cells_sliding"])
    )
    made.add_row("intermediate results", size(memory["compute"]), "at most")
    made.add_row("tokenizer", size(memory["tokenizer"]), "while it is built")
    made.add_row("Python and libraries", size(memory["program"]))
    made.add_row("all", size(memory["total"]), "at the peak")
    made.add_row("pages of files", size(memory["mapped"]), "beside it, given up where it is short")
    return made


def _tensor_table(tensors: Sequence[Facts]) -> "Table":
    made = table("\ntensor", "\ntype", "\nshape", ">\nsize")
    for tensor in tensors:
        shape = " x ".join(str(n) for n in tensor["shape"])
        made.add_row(one_line(tensor["name"]), tensor["type"], shape, size(tensor["bytes"]))
    return made
