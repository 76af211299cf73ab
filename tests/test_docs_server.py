"""The examples of docs/server.md, run as they stand but for the address."""

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import gemloom
import tiny
from http_serving import serving

PAGE = (Path(__file__).parent.parent / "docs" / "server.md").read_text(encoding="utf-8")
ADDRESS = "http://127.0.0.1:8080"


def blocks(language: str) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    assert found
    return found


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    data = tiny.gguf_bytes(tiny.VARIANTS["e2b"])
    with (
        gemloom.load(data, slots=4, context=1024, threads=1) as model,
        serving(model, name="gemma", slot_state=True) as url,
    ):
        yield url


def test_python(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    source = "\n".join(blocks("python")).replace(ADDRESS, url)
    exec(compile(source + "\nclient.close()\n", "server.md", "exec"), {})
    said = capsys.readouterr().out
    assert "tokens of the prompt were known already" in said
    assert re.search(r"^(True|False)$", said, re.MULTILINE)
    assert re.search(r"^weather (Paris|Oslo)$", said, re.MULTILINE)
    assert re.search(r"^96$", said, re.MULTILINE)  # the size of an embedding


COMMANDS = [
    line
    for block in re.findall(r"^```sh\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    for line in re.findall(r"^curl (?:[^'\n]|'[^']*')+", block, re.MULTILINE)
]


def test_curl(url: str, tmp_path: Path) -> None:
    assert len(COMMANDS) == 10
    for line in COMMANDS:
        checked = line.replace(ADDRESS, url).replace("curl", "curl -sS --fail-with-body", 1)
        done = subprocess.run(
            ["/bin/bash", "-c", checked],
            cwd=tmp_path, capture_output=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, (line, done)
        if not line.endswith(("/metrics", "chat.state")):
            assert "error" not in json.loads(done.stdout)


def test_the_commands_name_options_that_there_are() -> None:
    from command_line import fine

    known = set(re.findall(r"--[a-z-]+", fine("serve", "--help").output))
    named = [option for line in PAGE.splitlines() if "gemloom serve" in line
             for option in re.findall(r"--[a-z-]+", line)]  # fmt: skip
    assert named
    assert set(named) <= known | {"--help"}
