"""Write ``tests/data/llama-types.json``: the type llama.cpp's quantizer gives every tensor.

    python tests/reference/make_types.py --peer .venv-peer/bin/python

For each released structure and each quantization, and again where an importance matrix changes it.
The peer is a Python with llama-cpp-python, as `make bench` sets one up; it plans and quantizes
nothing, and the files it reads are a header and a hole.
"""

import argparse
import json
import subprocess
import tempfile
from math import prod
from pathlib import Path

from gguf import GGMLQuantizationType, GGUFWriter

import tiny
from gemloom.tools.quantization.recipes import RECIPES
from structures import RELEASED, brief, keys, shapes
from tiny import Variant

OUT = Path(__file__).parents[1] / "data" / "llama-types.json"
OURS_ALONE = {"QAT_Q4_0", "MXFP4", "NVFP4"}  # llama.cpp has no such mix
UNTIED = {"gemma3-270m", "gemma4-e2b"}

PEER = """
import ctypes, json, re, sys
from llama_cpp import llama_cpp as L

lines = []
log = L.llama_log_callback(lambda level, text, data: lines.append(text.decode("utf-8", "replace")))
L.llama_log_set(log, None)
value = (ctypes.c_float * 1)(1.0)
imatrix = (L.llama_model_imatrix_data * 2)()
imatrix[0].name, imatrix[0].data, imatrix[0].size = b"none", value, 1
for job in sys.stdin:
    path, file_type, with_imatrix = json.loads(job)
    params = L.llama_model_quantize_default_params()
    params.ftype, params.dry_run = file_type, True
    if with_imatrix:
        params.imatrix = imatrix
    lines.clear()
    failed = L.llama_model_quantize(path.encode(), b"unused", ctypes.byref(params))
    line = re.compile(r"^\\[ *\\d+/ *\\d+\\] +(\\S+) .*, type = +(\\w+), size = (.*)$", re.M)
    found = line.findall("".join(lines))
    types = {n: (re.search(r"\\((\\w+)\\)", s) or [0, t])[1].upper() for n, t, s in found}
    print(json.dumps(None if failed else types), flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--peer", required=True, help="a Python with llama-cpp-python")
    peer = subprocess.Popen(
        [parser.parse_args().peer, "-c", PEER],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for variant in RELEASED.values():
            for untied in (False, True) if variant.name in UNTIED else (False,):
                path = hollow(Path(folder), variant, untied)
                for recipe in RECIPES.values():
                    if recipe.name not in OURS_ALONE:
                        key = " ".join([variant.name, recipe.name, *["untied"] * untied])
                        found |= ask(peer, key, path, int(recipe.file_type))
    OUT.write_text(json.dumps(found, indent=0) + "\n")


def ask(peer: "subprocess.Popen[str]", key: str, path: Path, file_type: int) -> dict[str, str]:
    """What llama.cpp chooses, by its key; with an importance matrix where that differs."""
    found = {}
    for imatrix in (False, True):
        assert peer.stdin is not None
        assert peer.stdout is not None
        peer.stdin.write(f"{json.dumps([str(path), file_type, imatrix])}\n")
        peer.stdin.flush()
        types = json.loads(peer.stdout.readline())
        if types is not None:
            found[f"{key} imatrix" if imatrix else key] = brief(types)
    if found.get(f"{key} imatrix") == found.get(key):
        found.pop(f"{key} imatrix", None)
    return found


def hollow(folder: Path, variant: Variant, untied: bool) -> Path:
    """A file of this structure whose tensors are a hole."""
    path = folder / "hollow.gguf"
    writer = GGUFWriter(None, arch="")
    size = 0
    for key, value in keys(variant).items():
        writer.add_key_value(key, value, tiny._value_type(value))
    for key, value in tiny.metadata(variant).items():
        if key.startswith("tokenizer."):
            writer.add_key_value(key, value, tiny._value_type(value))
    for name, shape in shapes(variant, untied).items():
        size += (bytes_ := 4 * prod(shape)) + -bytes_ % 32
        writer.add_tensor_info(name, shape[::-1], None, bytes_, GGMLQuantizationType.F32)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + 32 + size)
    return path


if __name__ == "__main__":
    main()
