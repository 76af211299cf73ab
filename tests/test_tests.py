"""Where tests lie: in folders as in src, on nobody's shoulders, and findable for every module."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ROOT = TESTS.parent
PACKAGE = ROOT / "src" / "gemloom"
NO_PACKAGE = {"benchmarks", "data", "native", "reference", "vulkan"}  # tests/README.md
FILES = sorted(TESTS.rglob("*.py"))
TEST_FILES = {path for path in FILES if path.name.startswith("test_")}
MODULES = [
    path.relative_to(PACKAGE)
    for path in sorted(PACKAGE.rglob("*.py"))
    if not path.name.startswith("__")
]


def packages(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_dir() and any(path.glob("*.py"))}


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def listed() -> dict[str, list[str]]:
    """The last table of tests/README.md: a module's tests; no module is in it twice."""
    table = (TESTS / "README.md").read_text(encoding="utf-8").split("## Which tests")[1]
    found: dict[str, list[str]] = {}
    for modules, tests in re.findall(r"^\| (`.*`) \| (`.*`) \|$", table, re.MULTILINE):
        for module in re.findall("`(.*?)`", modules):
            assert module not in found, module
            found[module] = re.findall("`(.*?)`", tests)
    return found


def has_its_own(module: Path) -> bool:
    """Tests of its name lie in its package's folder: the package's name may stand before it."""
    package = module.parts[0] if len(module.parts) > 1 else ""
    names = [f"test_{module.stem}.py", f"test_{package}_{module.stem}.py"]
    return any((TESTS / package / name).exists() for name in names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_file_imports_tests(path: Path) -> None:
    tests = {test.stem for test in TEST_FILES}
    assert not tests & {name.split(".")[-1] for name in imported(path)}


def test_folders_are_those_of_the_packages() -> None:
    assert packages(TESTS) - NO_PACKAGE == packages(PACKAGE)


def test_what_tests_share_is_not_among_them() -> None:
    """Only ``tests/`` is on the path of all tests, so a folder has no module of another name."""
    inner = {path for path in FILES if path.parent.name in packages(PACKAGE)}
    assert inner <= TEST_FILES


def test_no_two_modules_have_one_name() -> None:
    """Scripts of benchmarks/ are imported beside them: the first on the path would be taken."""
    names = [path.stem for path in [*FILES, *(ROOT / "benchmarks").glob("*.py")]]
    assert not {name for name in names if names.count(name) > 1}


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_tests_of_a_module_are_found(module: Path) -> None:
    found = has_its_own(module) or str(module) in listed()
    assert found, f"{module}: no test file has its name; name its tests in tests/README.md"


def test_the_table_names_what_there_is() -> None:
    for module, tests in listed().items():
        assert (PACKAGE / module).is_file(), module
        assert not [test for test in tests if not (TESTS / test).is_file()], module


def test_every_shared_module_is_told() -> None:
    text = (TESTS / "README.md").read_text(encoding="utf-8")
    shared = {path.name for path in TESTS.glob("*.py")} - {path.name for path in TEST_FILES}
    assert not [name for name in shared if f"`{name}`" not in text]
