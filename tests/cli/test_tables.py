"""No table of a command loses a letter in a narrow terminal, or breaks a number in two."""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import tiny_lora
from command_line import write
from conftest import Load
from gemloom.cli import app
from gemloom.cli.bench import tables
from gemloom.cli.device_options import plan_table
from gemloom.cli.load import open_file
from gemloom.cli.terminal import render, table
from gemloom.compute.fitting import propose
from gemloom.options import Options
from gemloom.tools import bench

if TYPE_CHECKING:
    from rich.table import Table

Printed = Callable[[Iterable["Table"], int], str]

WIDTHS = (80, 60, 40, 25)
NUMBER = re.compile(r"[\d.,]*\d[\d.,]*%?( [KMGT]?i?B\b)?")


def shown(width: int, *args: str | Path) -> str:
    """What a command writes in a terminal of so many columns."""
    ran = CliRunner(env={"COLUMNS": str(width)}).invoke(app, [str(arg) for arg in args])
    assert ran.exit_code == 0, ran.output
    return ran.stdout


def letters(text: str) -> Counter[str]:
    return Counter("".join(text.split()))


def check(show: Callable[[int], str], widths: Iterable[int] = WIDTHS) -> None:
    """``show`` gives the same in each width as where there is room for all."""
    wide = show(500)
    numbers = {match[0] for match in NUMBER.finditer(wide)}
    assert numbers
    for width in widths:
        narrow = show(width)
        assert "…" not in narrow
        assert not letters(wide) - letters(narrow), (width, narrow)
        assert {n for n in numbers if len(n) < width // 3 and n not in narrow} == set()
        assert max(map(len, narrow.splitlines())) <= width, narrow


LONG = "a-name-that-is-as-long-as-those-of-released-models-IQ4_XS.gguf"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, two others made of it, adapters of it, and a text."""
    made = tmp_path_factory.mktemp("tables")
    (made / LONG).write_bytes(write(made, types="q8_0").read_bytes())
    (made / "same.gguf").write_bytes(write(made).read_bytes())
    (made / "lora.gguf").write_bytes(tiny_lora.gguf_bytes(tiny_lora.lora("e2b")))
    (made / "text").write_text("the quick brown fox " * 60)
    return made


CUT = ("--context", "32", "--chunks", "2", "--threads", "1")
COMMANDS = [
    ["inspect", "e2b.gguf"],
    ["inspect", LONG, "--tensors"],
    ["inspect", "e2b.gguf", "--diff", LONG],
    ["tokenize", "e2b.gguf", "some words of a text"],
    ["quantize", "e2b.gguf", "--type", "Q4_K_M", "--dry-run"],
    ["perplexity", "e2b.gguf", "text", *CUT],
    ["compare", "e2b.gguf", LONG, "same.gguf", "text", *CUT],
    ["adapter", "inspect", "lora.gguf", "--model", "e2b.gguf"],
    ["adapter", "extract", "same.gguf", LONG, "out.gguf", "--force", "-r", "2"],
]


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words[:2]))
def test_tables_of_commands(words: list[str], folder: Path) -> None:
    given = [folder / word if (folder / word).exists() else word for word in words]
    given = [folder / word if word == "out.gguf" else word for word in given]
    check(lambda width: shown(width, *given))


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Printed:
    """What tables look like in a width."""

    def show(made: Iterable["Table"], width: int) -> str:
        monkeypatch.setenv("COLUMNS", str(width))
        for part in made:
            render(part)
        return capsys.readouterr().out

    return show


def test_the_plan_of_what_goes_where(folder: Path, printed: Printed) -> None:
    placement = propose(open_file(str(folder / "e2b.gguf")), Options(device="cpu", context=64))
    check(lambda width: printed([plan_table(placement)], width))


def test_the_tables_of_a_benchmark(load: Load, printed: Printed) -> None:
    model = load("e2b", context=256)
    timings = [
        bench.Timing(kind, 4_096, depth, [0.123, 1.5, 2.0], dict.fromkeys(bench.PHASES, 12_345.678))
        for kind in ("prompt", "decode")
        for depth in (0, 512, 65_536)
    ]
    report = replace(
        bench.bench(model, prompts=(8,), generate=(), depths=(0,), repetitions=1), timings=timings
    )
    check(lambda width: printed(tables(report), width))
    wide = printed(tables(report), 80)
    assert "launch" in wide and "2,048.00" in wide and "12,345.68" in wide


rows = st.lists(
    st.tuples(st.text("abc-._", min_size=1, max_size=40), st.integers(0, 10**15)), min_size=1
)


@given(rows=rows, width=st.integers(25, 120))
@settings(
    max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
def test_any_table(rows: list[tuple[str, int]], width: int, printed: Printed) -> None:
    def made() -> list["Table"]:
        grid = table("name", ">bytes", ">again", "name")
        for name, number in rows:
            grid.add_row(name, f"{number:,}", f"{number}", name)
        return [grid]

    check(lambda width: printed(made(), width), [width])
