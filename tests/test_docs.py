"""Pages name only what there is: options of commands, keywords of functions, files, targets."""

import ast
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from gemloom.cli import app

ROOT = Path(__file__).parent.parent
PAGES = [
    page
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md"))
    if page.name not in ("log.md", "CHANGELOG.md")  # they tell what was
]
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
OPTION = r"(?<![\w-])--[a-z][a-z-]*"


@cache
def commands() -> dict[str, set[str]]:
    """Options by command: of gemloom ("adapter merge") and of the benchmarks ("compare.py")."""
    found = {
        script.name: set(re.findall(OPTION, script.read_text(encoding="utf-8")))
        for script in ROOT.glob("benchmarks/*.py")
    }
    for name, command in _below(get_command(app)).items():
        below = _below(command)
        for path, leaf in [(name, command), *((f"{name} {n}", c) for n, c in below.items())]:
            found[path] = {o for p in leaf.params for o in (*p.opts, *p.secondary_opts)}
            found[path].add("--help")
    return found


def _below(command: Any) -> dict[str, Any]:
    """A group's commands by name."""
    return dict(getattr(command, "commands", {}))


@cache
def keywords() -> set[str]:
    """Names of all parameters and fields of the package."""
    trees = (ast.parse(f.read_text(encoding="utf-8")) for f in ROOT.glob("src/**/*.py"))
    nodes = [node for tree in trees for node in ast.walk(tree)]
    fields = {
        n.target.id for n in nodes if isinstance(n, ast.AnnAssign) and hasattr(n.target, "id")
    }
    return fields | {n.arg for n in nodes if isinstance(n, ast.arg)}


def code(page: Path) -> list[str]:
    """What is set as code: within backticks, and lines of blocks, joined where they go on."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.splitlines()]
    others = re.findall(r"`([^`\n]+)`|^ {4}(\S.*)$", text, re.MULTILINE)
    return lines + [inline or indented for inline, indented in others]


@pages
def test_options(page: Path) -> None:
    """Those of a command are its own; one that stands alone is some command's."""
    every = set().union(*commands().values())
    for line in code(page):
        told = line.split("#")[0]
        if re.match(r"(\w+=(\"[^\"]*\"|\S+) )*(curl|hf|pip|ssh) ", told):
            continue
        found = re.search(r"gemloom (adapter \w+|\w+)|(\w+\.py)", told)
        name = found and (found[1] or found[2])
        known = commands().get(name or "", every)
        assert set(re.findall(OPTION, told)) <= known, line


@pages
def test_keywords(page: Path) -> None:
    """``kernels="plain"`` and the like, where it stands in a sentence."""
    for inline in re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8")):
        if not inline.startswith(("gemloom ", "--")):
            assert set(re.findall(r"(?:^|[(, ])([a-z_]+)=(?!=)", inline)) <= keywords(), inline


@pages
def test_links_and_targets(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (page.parent / link).exists(), link
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in code(page):
        for target in re.findall(r"^make ((?:[a-z-]+ ?)+)", line.split("#")[0]):
            assert set(target.split()) <= targets, line
