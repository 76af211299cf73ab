"""What each type and each mix of types costs the real Gemma 3 270M, in predictions of a text.

    python benchmarks/quality.py [--windows N] [--groups G ...] [--cache FOLDER]
    python benchmarks/quality.py --show        # the tables of docs/quality.md, nothing measured

Writes ``results/quality.json`` after every case, and goes on where it stopped; draws
``docs/quality.png``. What is compared with what, and why, is in docs/quality.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

from compare import err
from gguf.constants import GGMLQuantizationType as Type
from machine import describe
from quality_models import bits, make_base, round_matrices
from quality_tables import show

import gemloom
from gemloom.errors import GemloomError
from gemloom.files import gguf, source
from gemloom.files.gguf import GGUF
from gemloom.ggml import quants
from gemloom.system.limits import usable_cores
from gemloom.tools.quantization import imatrix, imatrix_file, quantize, recipes
from gemloom.tools.quantization.imatrix_file import ImportanceMatrix
from gemloom.tools.quantization.perplexity import Comparison, Cut, Recorded, compare

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "quality.json"
MODEL = "gemma-3-270m"
HEAD = "token_embd.weight"  # the embeddings, and the head as well
CALIBRATION = 32  # windows of the importance matrix
_OF_THE_HEAD = "Q8_0 Q6_K Q5_1 Q5_K Q5_0 Q4_K Q4_0 IQ4_NL Q3_K Q2_K TQ2_0"
_BOTH_WAYS = "Q4_K Q4_0 IQ4_XS Q3_K IQ3_S Q2_K"  # without importances and with them
EMBEDDINGS = {Type[name] for name in _OF_THE_HEAD.split()}
WITH_IMPORTANCES = {Type[name] for name in _BOTH_WAYS.split()}
_BOOK = HERE / "data" / "alice.txt"
_CUT = "CHAPTER VII."  # measured is what comes before, calibrated on what comes after


@dataclass(frozen=True, slots=True)
class Case:
    """One model to measure."""

    group: str  # "files", "types" or "embeddings"
    name: str  # of a recipe or of a type
    importance: bool = False

    @property
    def key(self) -> str:
        return f"{self.group} {self.name}{' imatrix' if self.importance else ''}"


def cases() -> Iterator[Case]:
    """All: files by recipe, the head and then the layers by type."""
    for name, recipe in recipes.RECIPES.items():
        kinds = {recipe.type, *(rule.type for rule in recipe.rules)}
        needed = recipes.NEEDS_IMATRIX | recipe.needs_imatrix | quants.NEEDS_IMPORTANCE
        yield Case("files", name, importance=bool(kinds & needed))
    narrow = sorted((kind for kind in quants.WRITABLE if bits(kind) < 16), key=bits, reverse=True)
    for kind in narrow:
        if kind in EMBEDDINGS:
            yield Case("embeddings", kind.name)
        if kind in (Type.Q4_0, Type.Q4_K):
            yield Case("embeddings", kind.name, importance=True)
    for kind in narrow:
        if kind not in recipes.NEEDS_IMATRIX:
            yield Case("types", kind.name)
        if kind in recipes.NEEDS_IMATRIX | WITH_IMPORTANCES:
            yield Case("types", kind.name, importance=True)


class Bench:
    """The text, the base and what is made of it; everything lies in a folder and is made once."""

    def __init__(self, folder: Path, windows: int, threads: int, logits: IO[bytes]) -> None:
        self.folder, self.threads, self.how = folder, threads, Cut(windows=windows)
        self.text, _, rest = _BOOK.read_text(encoding="utf-8").partition(_CUT)
        self.calibration = _CUT + rest
        self._logits = logits

    @cached_property
    def base_path(self) -> Path:
        path = self.folder / "quality-base.gguf"
        if not path.exists():
            with err.status("the base"):
                make_base(gguf.read(source.resolve(MODEL)), path, self.threads)
        return path

    @cached_property
    def base(self) -> GGUF:
        return gguf.read(source.resolve(self.base_path))

    @cached_property
    def recorded(self) -> Recorded:
        """The base's logits, computed once for all cases."""
        with gemloom.load(self.base_path, context=self.how.size, threads=self.threads) as model:
            return Recorded(model, self.text, self.how, self._logits)

    @cached_property
    def importances(self) -> ImportanceMatrix:
        path = self.folder / "quality-imatrix.gguf"
        earlier = imatrix_file.read(path) if path.exists() else None
        how, dataset = Cut(windows=CALIBRATION), f"{_BOOK.name}, chapters VII to XII"
        with gemloom.load(self.base_path, context=how.size, threads=self.threads) as model:
            found = imatrix.collect(model, self.calibration, how, dataset, earlier)
            for of, matrix in found:
                err.print(f"importance matrix: {matrix.chunks} of {of} windows")
                imatrix_file.write(path, matrix)
        return imatrix_file.read(path)

    def make(self, case: Case) -> Path:
        """The model of a case."""
        path = self.folder / "quality-candidate.gguf"
        importances = self.importances if case.importance else None
        if case.group == "files":
            wanted = quantize.Wanted(recipes.recipe(case.name), imatrix=importances)
            quantize.write(quantize.plan(self.base, wanted), path, self.threads)
        else:
            chosen = _layers if case.group == "types" else _head
            kind = Type[case.name]
            round_matrices(self.base, path, kind, chosen, importances, self.threads)
        return path

    def measure(self, path: Path | str) -> Comparison:
        """A model held against the base."""
        with gemloom.load(path, context=self.how.size, threads=self.threads) as model:
            return compare(self.recorded, model, self.text, self.how)


def _layers(name: str) -> bool:
    return name.startswith("blk.")


def _head(name: str) -> bool:
    return name == HEAD


def facts(case: Case, path: Path) -> dict[str, Any]:
    """What a case takes: of a file its tensors' bytes, else the bits of the type."""
    shown = {"group": case.group, "name": case.name, "importance": case.importance}
    if case.group != "files":
        return shown | {"bits_per_weight": bits(Type[case.name])}
    tensors = gguf.read(source.resolve(path)).tensors.values()
    taken, weights = sum(t.nbytes for t in tensors), sum(prod(t.shape) for t in tensors)
    types = sorted({t.type.name for t in tensors if len(t.shape) > 1})
    return shown | {"bytes": taken, "bits_per_weight": 8 * taken / weights, "types": types}


def measure(options: argparse.Namespace) -> None:
    """Every case that has no result yet."""
    options.cache.mkdir(parents=True, exist_ok=True)
    with TemporaryFile(dir=options.cache) as logits:  # of the base
        _measure(Bench(options.cache, options.windows, options.threads, logits), options)


def _measure(bench: Bench, options: argparse.Namespace) -> None:
    found = _earlier(options)
    wanted = [case for case in cases() if case.group in options.groups]
    if "package" not in found["cases"]:
        found["cases"]["package"] = {"group": "package"} | bench.measure(MODEL).json()
        _save(found)
    for i, case in enumerate(wanted, 1):
        if case.key in found["cases"]:
            continue
        with err.status(f"{i} of {len(wanted)}: {case.key}"):
            path = bench.make(case)
            result = bench.measure(path)
        found["cases"][case.key] = facts(case, path) | result.json() | {"model": case.key}
        err.print(f"{case.key}: KL {result.divergence.value:.5f} ± {result.divergence.error:.5f}")
        _save(found)
        path.unlink()


def _earlier(options: argparse.Namespace) -> dict[str, Any]:
    """Results so far, of as many windows; none yet otherwise."""
    if RESULTS.exists():
        found: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))
        if found["windows"] == options.windows:
            return found
    return {"machine": describe(options.threads), "windows": options.windows, "cases": {}}


def _save(found: dict[str, Any]) -> None:
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="What types cost the real Gemma 3 270M.")
    groups = list(dict.fromkeys(case.group for case in cases()))
    parser.add_argument("--groups", nargs="+", choices=groups, default=groups)
    parser.add_argument("--windows", type=int, default=6, help="of the text, 512 tokens each")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--cache", type=Path, default=HERE / ".cache", help="for models: 5 GB")
    parser.add_argument("--show", action="store_true", help="measure nothing, show the tables")
    options = parser.parse_args()
    try:
        if not options.show:
            measure(options)
        show(json.loads(RESULTS.read_text(encoding="utf-8")), HERE.parent / "docs" / "quality.png")
    except (GemloomError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
