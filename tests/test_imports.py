"""Who may import whom: the arrows of docs/architecture.md, read from the source."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "src" / "gemloom"
FILES = {
    str(path.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}
FOREIGN_ONLY_IN = {  # a library that only one place may know
    "ggml": "ggml",
    "ctypes": ("ggml", "kernels.library"),
    "tokenizers": "text.tokenizer",
    "jinja2": "text.template",
    "huggingface_hub": "files.hub",
    "fsspec": "files.urls",
    "aiohttp": "files.urls",
    "cryptography": "files.sealed",
    "typer": "cli",
    "llguidance": "text.constraint",
    "fastapi": ("server", "cli.serving"),
    "starlette": "server",
    "uvicorn": ("server.connections", "cli.serving"),
    "h11": "server.connections",
    "anyio": "server",
    "prometheus_client": "server",
    "pydantic": "server",
    "matplotlib": "cli.picturing",
    "rich": ("cli", "files.builtin", "bench"),
    "safetensors": ("adapters", "convert"),
    "sentencepiece": "convert",
}
PURE = [
    "adapters.active",
    "adapters.checking",
    "adapters.info",
    "adapters.reading",
    "candidates",
    "compose",
    "config",
    "files.blob",
    "files.gguf",
    "files.names",
    "files.sealed",
    "files.urls",
    "files.writing",
    "kv_shape",
    "limits",
    "placement",
    "prompts",
    "quantization.recipes",
    "sampling",
    "scheduler",
    "sequence",
    "server.bodies",
    "server.parsing",
    "server.protocol",
    "slots",
    "tensor_names",
    "text.bounds",
    "text.chat",
    "text.constraint",
    "text.conversation",
    "text.markup",
    "text.router",
    "text.stopping",
    "text.template",
    "text.tokenizer",
    "text.tools",
    "text.visible",
    "text.vocabulary",
    "waiting",
]
ARROWS = {  # module or package: all it may import of this package
    "errors": [],
    "signals": [],
    "files": ["errors", "files"],
    "config": ["errors", "files"],
    "sampling": ["errors"],
    "candidates": ["sampling"],
    "text": ["errors", "files", "text"],
    "compose": ["errors", "sampling", "text"],
    "slots": ["adapters", "errors"],
    "sequence": ["adapters", "candidates", "config", "errors", "sampling", "slots", "text"],
    "scheduler": ["sequence"],
    "generation": ["errors", "sequence", "text"],
    "limits": [],
    "ggml": ["errors", "files", "ggml", "limits", "signals"],
    "placement": ["errors"],
    "tensor_names": [],
    "surveying": [
        "config",
        "files",
        "ggml",
        "kv",
        "kv_store",
        "models",
        "options",
        "placement",
        "program",
        "weights",
    ],
    "fitting": [
        "config",
        "errors",
        "files",
        "ggml",
        "homes",
        "kernels",
        "kv_shape",
        "limits",
        "models",
        "options",
        "placement",
        "weights",
    ],
    "homes": ["files", "ggml", "kernels", "options", "tensor_names"],
    "kernels": ["files", "ggml", "kernels"],
    "proving": ["ggml", "kernels"],
    "filling": ["files", "ggml", "kernels"],
    "weights": [
        "errors",
        "files",
        "filling",
        "ggml",
        "homes",
        "kernels",
        "options",
        "placement",
        "tensor_names",
    ],
    "adapters": [
        "adapters",
        "config",
        "errors",
        "files",
        "ggml",
        "kernels",
        "limits",
        "models",
        "placement",
        "tensor_names",
        "weights",
    ],
    "quantization": [
        "errors",
        "files",
        "ggml",
        "limits",
        "model",
        "quantization",
        "tensor_names",
        "text",
    ],
    "convert": [
        "config",
        "convert",
        "errors",
        "files",
        "ggml",
        "models",
        "tensor_names",
        "text",
    ],
    "linear": ["adapters", "ggml", "kernels"],
    "kv_shape": ["config"],
    "kv_store": ["config", "ggml", "kv_shape", "placement"],
    "kv": ["adapters", "config", "ggml", "kernels", "kv_shape", "kv_store"],
    "cells": ["adapters", "kv_shape", "kv_store", "slots"],
    "models": ["config", "kv", "errors", "ggml", "linear", "models", "tensor_names", "weights"],
    "inputs": ["adapters", "config", "ggml", "kv", "kv_shape", "sequence", "want"],
    "want": ["candidates", "sampling"],
    "program": [
        "adapters",
        "candidates",
        "config",
        "errors",
        "ggml",
        "inputs",
        "kv",
        "models",
        "sampling",
        "sequence",
        "want",
        "weights",
    ],
    "options": ["config", "errors"],
    "loading": ["files", "model", "options"],
    "server": [
        "adapters",
        "compose",
        "engine",
        "errors",
        "generation",
        "model",
        "sampling",
        "sequence",
        "server",
        "text",
    ],
    "engine": [
        "cells",
        "errors",
        "options",
        "program",
        "sequence",
        "signals",
        "slots",
        "step",
        "waiting",
    ],
    "step": [
        "adapters",
        "candidates",
        "cells",
        "errors",
        "options",
        "program",
        "sampling",
        "scheduler",
        "sequence",
        "slots",
        "waiting",
        "want",
    ],
    "waiting": ["sequence", "slots"],
    "state": ["cells", "config", "errors", "files", "slots"],
}


def imports(path: Path) -> Iterator[str]:
    """Every module a file imports at any depth, but for type checking only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for block in ast.walk(tree):
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING":
            block.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield node.module or ""
            if node.module == "gemloom":
                yield from (f"gemloom.{alias.name}" for alias in node.names)


def ours(path: Path) -> set[str]:
    names = {name.removeprefix("gemloom.") for name in imports(path) if name.startswith("gemloom.")}
    return {name for name in names if name.split(".")[0] in {file.split(".")[0] for file in FILES}}


@pytest.mark.parametrize("module", FILES)
def test_foreign_libraries_have_one_door(module: str) -> None:
    for name in imports(FILES[module]):
        allowed = FOREIGN_ONLY_IN.get(name.split(".")[0])
        assert allowed is None or module.startswith(allowed), f"{module} imports {name}"


@pytest.mark.parametrize("module", ARROWS)
def test_arrows(module: str) -> None:
    for name, path in FILES.items():
        if name.split(".")[0] == module:
            extra = {used for used in ours(path) if used.split(".")[0] not in ARROWS[module]}
            assert not extra, f"{name} imports {extra}"


def reached(module: str) -> set[str]:
    found: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name not in found and name in FILES:
            found.add(name)
            waiting += ours(FILES[name])
    return found


@pytest.mark.parametrize("module", PURE)
def test_policy_needs_no_native_library(module: str) -> None:
    assert not [name for name in reached(module) if name.startswith("ggml")]
