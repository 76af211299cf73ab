"""Who may import whom: the arrows of docs/architecture.md, read from the source."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from itertools import chain
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
    "fastapi": ("server", "cli.serve"),
    "starlette": "server",
    "uvicorn": ("server.connections", "cli.serve"),
    "h11": "server.connections",
    "anyio": "server",
    "prometheus_client": "server",
    "pydantic": "server",
    "matplotlib": "cli.picture",
    "rich": ("cli", "files.builtin", "tools.bench"),
    "safetensors": ("adapters", "tools"),
    "sentencepiece": "tools.convert",
}
PURE = [  # what decides, and what only reads: none of it needs a native library of ours
    "adapters.checking",
    "adapters.info",
    "adapters.names",
    "adapters.reading",
    "adapters.request_adapters",
    "compute.batch",
    "compute.kv_shape",
    "compute.placement",
    "compute.slots",
    "compute.want",
    "engine.request",
    "engine.scheduler",
    "engine.waiting",
    "files",
    "models.config",
    "models.facts",
    "models.layout",
    "models.tensor_names",
    "options",
    "sampling",
    "server",
    "system",
    "text",
    "tools.quantization.recipes",
]
PURE_MODELS = [  # of which an architecture's facts are made
    "models.config",
    "models.gemma3_facts",
    "models.gemma4_facts",
    "models.keys",
    "models.layout",
    "models.module_names",
    "models.tensor_names",
]
# A module or package: all it may import of this package, besides itself. The longest name counts.
ARROWS = {
    "errors": [],
    "system": [],
    "files": ["errors"],
    "sampling": ["errors"],
    "text": ["errors", "files", "sampling"],
    "models.config": ["errors"],
    "models.facts": [*PURE_MODELS, "errors", "files"],
    "models.gemma3_facts": [*PURE_MODELS, "files"],
    "models.gemma4_facts": [*PURE_MODELS, "errors", "files"],
    "models.keys": ["errors", "files", "models.config", "models.tensor_names"],
    "models.layout": ["models.config", "models.tensor_names"],
    "models.module_names": [],
    "models.tensor_names": [],
    "options": ["errors", "models.config"],
    "ggml": ["errors", "files", "system"],
    "kernels": ["files", "ggml"],
    "adapters": [
        "compute.placement",
        "errors",
        "files",
        "ggml",
        "kernels",
        "models.config",
        "models.facts",
        "models.tensor_names",
    ],
    "adapters.request_adapters": [],
    "adapters.info": [],
    "adapters.names": ["errors"],
    "weights": [
        "compute.placement",
        "errors",
        "files",
        "ggml",
        "kernels",
        "models.layout",
        "models.tensor_names",
        "options",
    ],
    "compute.placement": ["errors", "models.layout", "models.tensor_names"],
    "compute.slots": ["adapters.request_adapters", "errors"],
    "compute.kv_shape": ["models.config"],
    "compute.batch": ["adapters.request_adapters", "models.config"],
    "compute.want": ["sampling"],
    "compute.linear": ["adapters.delta", "ggml", "kernels"],
    "compute.kv_store": ["compute", "ggml", "models.config"],
    "compute.kv": ["adapters.delta", "compute", "ggml", "kernels", "models.config"],
    "models": ["compute.kv", "compute.linear", "errors", "files", "ggml", "weights"],
    "compute": [
        "adapters",
        "errors",
        "files",
        "ggml",
        "kernels",
        "models",
        "options",
        "sampling",
        "system",
        "weights",
    ],
    "engine": [
        "adapters.request_adapters",
        "compute",
        "errors",
        "files",
        "models.config",
        "options",
        "sampling",
        "system",
        "text",
    ],
    "engine.inspector": ["adapters", "compute", "engine", "errors", "ggml", "text"],
    "model": ["engine", "sampling", "text"],
    "loading": [
        "adapters",
        "compute",
        "engine",
        "files",
        "ggml",
        "kernels",
        "model",
        "models",
        "options",
        "text",
        "weights",
    ],
    "testing": ["compute", "engine", "loading", "model"],
    "tools": [
        "adapters",
        "engine",
        "errors",
        "files",
        "ggml",
        "model",
        "models",
        "system",
        "text",
        "weights",
    ],
    "server": [
        "adapters.info",
        "adapters.names",
        "engine.generation",
        "engine.request",
        "errors",
        "sampling",
        "text",
    ],
    "cli": [""],  # whatever it wants: nothing imports it
    "__init__": ["errors"],
    "__main__": ["cli"],
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
            module = node.module or ""
            inner = [f"{module}.{alias.name}" for alias in node.names]
            modules = [name for name in inner if name.removeprefix("gemloom.") in FILES]
            yield from modules
            if len(modules) < len(inner):
                yield module


def ours(path: Path) -> set[str]:
    names = {name.removeprefix("gemloom.") for name in imports(path) if name.startswith("gemloom.")}
    return {name for name in names if name in FILES}


def within(name: str, package: str) -> bool:
    return not package or name == package or name.startswith(f"{package}.")


@pytest.mark.parametrize("module", FILES)
def test_foreign_libraries_have_one_door(module: str) -> None:
    for name in imports(FILES[module]):
        allowed = FOREIGN_ONLY_IN.get(name.split(".")[0])
        assert allowed is None or module.startswith(allowed), f"{module} imports {name}"


@pytest.mark.parametrize("module", FILES)
def test_arrows(module: str) -> None:
    """Every module is in some room, and imports only what that room may."""
    rooms = [room for room in ARROWS if within(module, room)]
    assert rooms, f"{module} is in no room of ARROWS"
    room = max(rooms, key=len)
    allowed = [room, *ARROWS[room]]
    extra = {used for used in ours(FILES[module]) if not any(within(used, a) for a in allowed)}
    assert not extra, f"{module} ({room}) imports {extra}"


@pytest.mark.parametrize("name", [*ARROWS, *PURE, *chain.from_iterable(ARROWS.values())])
def test_every_room_is_there(name: str) -> None:
    assert any(within(module, name) for module in FILES), name


def reached(module: str) -> set[str]:
    found: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name not in found and name in FILES:
            found.add(name)
            waiting += ours(FILES[name])
    return found


PURE_MODULES = [module for module in FILES if any(within(module, name) for name in PURE)]


@pytest.mark.parametrize("module", PURE_MODULES)
def test_policy_needs_no_native_library(module: str) -> None:
    assert not [name for name in reached(module) if name.startswith("ggml")]


def test_importing_policy_loads_no_native_library() -> None:
    """Really, with the packages on the way, whose ``__init__`` could import anything."""
    names = "; ".join(f"import gemloom.{module}" for module in PURE_MODULES if "__" not in module)
    code = f"import sys; import gemloom; {names}; sys.exit('ggml' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_top_level_is_small() -> None:
    assert len([name for name in FILES if "." not in name and FILES[name].parent == ROOT]) <= 8


def test_no_two_classes_of_one_name() -> None:
    homes: dict[str, str] = {}
    for module, path in FILES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                assert node.name not in homes, (node.name, homes[node.name], module)
                homes[node.name] = module


def test_only_testing_reaches_inside_a_model() -> None:
    inside = {"_parts", "_inspector"}  # of ``Model``; those who use their own say ``self``
    top = ROOT.parent.parent
    for path in chain(*((top / name).rglob("*.py") for name in ("src", "tests", "benchmarks"))):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in inside:
                own = isinstance(node.value, ast.Name) and node.value.id == "self"
                assert own or path == FILES["testing"], f"{path}:{node.lineno}"


def test_a_class_of_many_fields_names_them_all() -> None:
    """Of seven values in a row nobody sees which is which."""
    for module, path in FILES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                how = [ast.unparse(each) for each in node.decorator_list]
                if any(each.startswith("dataclass") for each in how):
                    fields = [line for line in node.body if isinstance(line, ast.AnnAssign)]
                    assert len(fields) <= 5 or "kw_only=True" in how[0], (module, node.name)
