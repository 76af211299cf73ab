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
    "tokenizers": "tokenizer",
    "jinja2": "chat",
    "huggingface_hub": "hub",
    "fsspec": "urls",
    "aiohttp": "urls",
    "cryptography": "sealed",
    "typer": "cli",
    "llguidance": "constraint",
    "fastapi": ("server", "cli.serving"),
    "starlette": "server",
    "uvicorn": "cli.serving",
    "anyio": "server",
    "prometheus_client": "server",
    "pydantic": "server",
    "matplotlib": "cli.picturing",
    "rich": ("cli", "builtin", "bench"),
    "safetensors": ("adapters", "convert"),
    "sentencepiece": "convert",
}
PURE = [
    "sampling", "candidates", "stopping", "slots", "sequence", "scheduler", "chat",
    "conversation", "router", "constraint", "prompts", "schemas", "tokenizer", "gguf", "blob",
    "config", "sealed", "urls", "server.protocol",
    "adapters.active", "adapters.info", "adapters.reading",
    "adapters.checking", "recipes", "writing", "placement",
]  # fmt: skip
ARROWS = {  # module: all it may import of this package; a name stands for what is below it too
    "errors": [],
    "blob": ["errors"],
    "gguf": ["blob", "errors"],
    "builtin": ["blob", "errors"],
    "hub": ["errors"],
    "sealed": ["blob", "errors"],
    "urls": ["blob", "errors"],
    "awaited": ["errors"],
    "source": ["blob", "builtin", "errors", "gguf", "hub", "sealed", "urls"],
    "config": ["errors", "gguf"],
    "tokenizer": ["errors", "gguf"],
    "chat": ["errors", "tokenizer"],
    "sampling": ["errors"],
    "candidates": ["sampling"],
    "stopping": [],
    "slots": ["adapters", "errors"],
    "conversation": ["chat", "errors"],
    "router": [],
    "tool_grammar": ["errors"],
    "prompts": ["errors", "tokenizer"],
    "schemas": ["errors"],
    "constraint": ["errors", "schemas", "sequence", "tokenizer", "tool_grammar"],
    "sequence": ["adapters", "candidates", "errors", "sampling", "slots", "stopping", "tokenizer"],
    "scheduler": ["sequence"],
    "generation": ["errors", "router", "sequence"],
    "ggml": ["errors", "ggml", "gguf", "signals"],
    "placement": ["errors"],
    "surveying": [
        "cache",
        "config",
        "ggml",
        "gguf",
        "models",
        "options",
        "placement",
        "runner",
        "weights",
    ],
    "fitting": [
        "cache",
        "config",
        "errors",
        "ggml",
        "gguf",
        "kernels",
        "models",
        "options",
        "placement",
        "weights",
    ],
    "kernels": ["blob", "ggml", "gguf", "kernels"],
    "writing": ["errors", "gguf", "source"],
    "filling": ["ggml", "gguf", "kernels"],
    "weights": ["errors", "filling", "ggml", "gguf", "kernels", "options", "placement"],
    "adapters": [
        "adapters",
        "blob",
        "config",
        "errors",
        "ggml",
        "gguf",
        "kernels",
        "models",
        "placement",
        "source",
        "weights",
        "writing",
    ],
    "imatrix_file": ["blob", "errors", "gguf", "source", "writing"],
    "parts": [],
    "signals": [],
    "recipes": ["errors"],
    "quantize": ["errors", "ggml", "gguf", "imatrix_file", "recipes", "writing"],
    "convert": [
        "blob",
        "config",
        "convert",
        "errors",
        "ggml",
        "gguf",
        "models",
        "tokenizer",
        "weights",
        "writing",
    ],
    "linear": ["adapters", "ggml", "kernels"],
    "cache": ["adapters", "config", "errors", "ggml", "kernels", "placement"],
    "models": ["cache", "config", "errors", "ggml", "linear", "models", "weights"],
    "inputs": ["adapters", "cache", "ggml", "sequence"],
    "runner": [
        "adapters",
        "cache",
        "candidates",
        "config",
        "ggml",
        "inputs",
        "models",
        "sampling",
        "sequence",
        "weights",
    ],
    "options": ["config", "errors"],
    "loading": ["awaited", "gguf", "model", "options", "source"],
    "perplexity": ["errors", "model", "tokenizer"],
    "imatrix": ["errors", "ggml", "imatrix_file", "model", "perplexity"],
    "server": [
        "adapters",
        "chat",
        "constraint",
        "conversation",
        "engine",
        "errors",
        "generation",
        "model",
        "router",
        "sampling",
        "sequence",
        "server",
        "tokenizer",
    ],
    "engine": [
        "adapters",
        "cache",
        "candidates",
        "errors",
        "options",
        "runner",
        "sampling",
        "scheduler",
        "sequence",
        "signals",
        "slots",
    ],
    "state": ["cache", "config", "errors", "gguf", "slots"],
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
