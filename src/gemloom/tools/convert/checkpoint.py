"""A Hugging Face checkpoint: the JSON files of a folder, and where each tensor's bytes are.

The headers are read and checked by the library of the format. The bytes are read here, some rows
at a time: to numpy that library gives no bfloat16.

Layout of a safetensors file (little endian): u64 length of the header, the header, and the bytes
of all tensors without gaps.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from gguf.constants import GGMLQuantizationType

from gemloom.errors import ConfigError, FormatError, SourceError, TensorError
from gemloom.files.names import shown

PIECE = 16 << 20  # bytes that are read at once, but never less than a row
_SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2,
    "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
_WEIGHTS = {name: GGMLQuantizationType[name] for name in ("F32", "F16", "BF16")}
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a checkpoint."""

    name: str
    path: Path  # of its file
    dtype: str  # as safetensors calls it
    shape: tuple[int, ...]  # slowest first, as it stands in the file
    offset: int  # of its first byte in the file

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return prod(self.shape) * _SIZES[self.dtype]

    @property
    def type(self) -> GGMLQuantizationType:
        """Its ggml type. TensorError for a dtype that no weight of these models has."""
        if self.dtype not in _WEIGHTS:
            raise TensorError(
                f"{self.path}: {self.name} is of the dtype {self.dtype}; "
                f"{', '.join(_WEIGHTS)} can be converted"
            )
        return _WEIGHTS[self.dtype]

    def pieces(self) -> Iterator[bytes]:
        """The bytes, some whole rows at a time. SourceError or FormatError if they are gone."""
        row = self.shape[-1] * _SIZES[self.dtype] if self.shape else self.nbytes
        step, end = max(1, PIECE // row) * row, self.offset + self.nbytes
        try:
            with self.path.open("rb") as file:
                for start in range(self.offset, end, step):
                    file.seek(start)
                    piece = file.read(min(step, end - start))
                    if len(piece) != min(step, end - start):
                        raise FormatError(f"{self.path}: truncated: it ends inside {self.name}")
                    yield piece
        except OSError as error:
            raise SourceError(f"{self.path}: {error.strerror or error}") from error


class Checkpoint:
    """A folder as transformers saves it; every tensor found, none of them read.

    Raises SourceError for a file that is missing and FormatError for one that is damaged.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise SourceError(
                f"{shown(os.fspath(folder))}: is not a folder; a Hugging Face checkpoint is one, "
                "with config.json, tokenizer.json and safetensors files"
            )
        self.config = self.json("config.json")
        self.files = self._files()
        self.tensors: dict[str, Stored] = {}
        for path in self.files:
            for tensor in header(path):
                if self._elsewhere(tensor):
                    continue
                if tensor.name in self.tensors:
                    raise FormatError(f"{path}: {tensor.name} is in another file too")
                self.tensors[tensor.name] = tensor
        self._check_index()

    @property
    def unlisted(self) -> frozenset[str]:
        """Tensors that lie in the parts, but not in their index."""
        return frozenset(self.tensors.keys() - self._index.keys() if self._index else ())

    def _elsewhere(self, tensor: Stored) -> bool:
        """Whether the index has another part's tensor of that name, so that this is a leftover."""
        part = self._index.get(tensor.name) if self._index else None
        return part is not None and part != tensor.path.name

    def json(self, name: str) -> Json:
        """A JSON object of the folder. SourceError if it is missing, ConfigError if it is none."""
        found = self.optional_json(name)
        if found is None:
            raise SourceError(f"{self.folder}: {name} is missing")
        return found

    def optional_json(self, name: str) -> Json | None:
        """As ``json``, or None where there is no such file."""
        text = self.text(name)
        if text is None:
            return None
        value = _parsed(text)
        if not isinstance(value, dict):
            raise ConfigError(f"{self.folder / name}: is not a JSON object")
        return value

    def text(self, name: str) -> str | None:
        """A file of the folder as text, or None where there is none."""
        path = self.folder / name
        try:
            return path.read_text(encoding="utf-8-sig")  # some editors put a byte order mark
        except FileNotFoundError:
            return None
        except OSError as error:
            raise SourceError(f"{path}: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path}: byte {error.start:,} is not UTF-8") from None

    def _files(self) -> list[Path]:
        if (self.folder / _SINGLE).exists():
            self._index: dict[str, str] | None = None
            return [self.folder / _SINGLE]
        index = self.optional_json(_INDEX)
        if index is None:
            raise SourceError(
                f"{self.folder}: neither {_SINGLE} nor {_INDEX} is there; other forms of weights, "
                "pickles among them, are not read"
            )
        self._index = _weight_map(self.folder / _INDEX, index)
        paths = [self.folder / name for name in sorted(set(self._index.values()))]
        missing = [path.name for path in paths if not path.is_file()]
        if missing:
            raise SourceError(f"{self.folder}: {len(missing)} of {len(paths)} parts are missing: "
                              f"{', '.join(missing[:3])}; download them")  # fmt: skip
        return paths

    def _check_index(self) -> None:
        if self._index is None:
            return
        if missing := self._index.keys() - self.tensors.keys():
            name = min(missing)
            raise FormatError(f"{self.folder / self._index[name]}: {name} is missing in it")


def _weight_map(path: Path, index: Json) -> dict[str, str]:
    found = index.get("weight_map")
    if not isinstance(found, dict) or not found:
        raise FormatError(f"{path}: weight_map is missing")
    for file in found.values():
        if not isinstance(file, str) or Path(file).name != file:
            raise FormatError(f"{path}: {str(file)[:80]!r} is not a name of a file beside it")
    return found


def header(path: Path) -> list[Stored]:
    """The tensors of one safetensors file, in the order of their bytes.

    FormatError unless header and bytes fit each other without a gap, SourceError for no file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with path.open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
        with safe_open(path, framework="numpy") as entries:
            parts = [(name, entries.get_slice(name)) for name in entries.offset_keys()]
            found = [(name, part.get_dtype(), part.get_shape()) for name, part in parts]
    except SafetensorError as error:
        raise FormatError(f"{path}: truncated, or no safetensors file: {error}") from None
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror or error}") from error
    tensors = []
    for name, dtype, shape in found:
        if dtype not in _SIZES:
            raise TensorError(f"{path}: {name} is of the dtype {dtype}, unsupported")
        tensors.append(Stored(name, path, dtype, tuple(shape), start))
        start += tensors[-1].nbytes
    return tensors


def _parsed(text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # RecursionError: brackets without end
        return None
