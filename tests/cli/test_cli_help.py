"""What --help says of every command, and what it costs."""

import re
import subprocess
import sys
from dataclasses import fields
from typing import get_args

import pytest

import gemloom
from command_line import ENVIRONMENT, fine
from gemloom.cli.options import LoadOptions, SamplingOptions
from gemloom.options import Options
from gemloom.sampling.params import SamplingParams

COMMANDS = (
    "run", "chat", "serve", "inspect", "tokenize", "quantize", "doctor", "perplexity", "compare",
    "imatrix", "seal", "unseal", "worker",
)  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_examples_and_fits(name: str) -> None:
    text = fine(name, "--help").stdout
    assert re.search(rf"Examples:\n  +gemloom {name} ?", text)
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("name", [*COMMANDS, "adapter merge", "adapter convert"])
def test_arguments_are_named_alike_and_options_grouped(name: str) -> None:
    text = fine(*name.split(), "--help").stdout
    arguments = re.findall(r"^  (\S.*?) <", text.partition("\nArguments:\n")[2], re.MULTILINE)
    usage = text.partition("\n")[0].partition("[OPTIONS]")[2]
    assert usage == usage.upper() and not set("{}") & set(usage)
    for argument in arguments:
        assert argument.startswith("-") or argument in usage
    assert "<list[" not in text and "range>" not in text


def test_what_is_used_most_comes_first() -> None:
    text = fine("run", "--help").stdout.partition("Arguments:")[2]
    order = ["Options:", "--max-tokens", "--temperature", "--context", "--help", "Sampling:"]
    order += ["--top-k", "Devices:", "--gpu-layers", "Memory:", "--kv-type", "Speed:", "--packed"]
    places = [text.index(word) for word in order]
    assert places == sorted(places)
    assert fine("adapter", "merge", "--help").stdout.startswith(
        "Usage: gemloom adapter merge [OPTIONS] MODEL ADAPTER[@SCALE]... OUT\n"
    )
    assert "..." not in fine("adapter", "--help").stdout.partition("Commands:")[2]


def test_the_list_of_commands() -> None:
    text = fine("--help").stdout
    listed = re.findall(r"^  (\w+) {2,}", text.partition("Commands:")[2], re.MULTILINE)
    assert set(listed) >= set(COMMANDS)
    assert "..." not in text.partition("Commands:")[2]  # nothing is cut off


def test_help_imports_nothing_heavy() -> None:
    heavy = ["numpy", "ggml", "gguf", "tokenizers", "jinja2", "huggingface_hub", "rich"]
    heavy += ["fsspec", "aiohttp", "cryptography"]
    code = f"import sys, gemloom.cli; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True)
    assert done.stdout.decode().strip() == "[]"


def test_version() -> None:
    assert fine("--version").stdout == f"gemloom {gemloom.__version__}\n"


@pytest.mark.parametrize(
    ("group", "library"), [(LoadOptions, Options), (SamplingOptions, SamplingParams)]
)
def test_the_defaults_told_are_those_of_the_library(group: type, library: type) -> None:
    defaults = {field.name: field.default for field in fields(library)}
    for field in (field for field in fields(group) if field.name != "key_file"):
        told = re.search(r"\[default: (.*)\]", get_args(field.type)[1].help)
        default = defaults[field.name]  # a KeyError: an option that the library has not
        if told and isinstance(default, int | float | str) and not isinstance(default, bool):
            assert told[1] == str(default), field.name
