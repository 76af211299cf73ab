"""The scripts in benchmarks/: the models they write load and compute, and what they say is so.

No time is held against anything, and nothing here needs the peer.
"""

import argparse
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import gemloom
import tiny
from gemloom.adapters.reading import read
from gemloom.errors import GemloomError, OptionError, RequestError
from gemloom.files import gguf, source
from gemloom.files.blob import Blob
from gemloom.tools.adapters.base_shapes import open_base

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import ceilings  # noqa: E402
import compare  # noqa: E402
import scale  # noqa: E402
import sides  # noqa: E402
import sources  # noqa: E402
import synthetic  # noqa: E402
import work  # noqa: E402

import adapters  # noqa: E402

SMALL = {"head_dim": 32, "head_dim_full": 64, "window": 16}
E2B = replace(synthetic.E2B, n_embd=256, n_head=4, n_ff=256, n_ff_shared=512, **SMALL)
MOE = replace(synthetic.A4B, n_embd=256, n_ff=96, n_ff_exp=32, n_expert=8, n_expert_used=2, **SMALL)


@pytest.fixture(autouse=True)
def _small_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "POOL", 1 << 16)
    synthetic._pool.cache_clear()


@pytest.fixture(scope="module")
def words() -> gguf.Metadata:
    """The keys of a tiny tokenizer."""
    data = memoryview(tiny.gguf_bytes(tiny.VARIANTS["e2b"]))
    keys = gguf.parse(Blob("tiny", [data])).metadata
    return gguf.Metadata("tiny", {k: v for k, v in keys.items() if k.startswith("tokenizer.")})


@pytest.fixture
def model(tmp_path: Path, words: gguf.Metadata) -> Path:
    """A file with the structure of E2B."""
    path = tmp_path / "e2b.gguf"
    synthetic.write(path, "small", E2B, synthetic.q4_k_m, words)
    return path


# --- synthetic.py -------------------------------------------------------------


@pytest.mark.parametrize("mix", [synthetic.q4_k_m, synthetic.qat])
@pytest.mark.parametrize("shape", [E2B, MOE], ids=["e2b", "moe"])
def test_what_is_written_computes(
    tmp_path: Path, words: gguf.Metadata, shape: synthetic.Shape, mix: synthetic.Mix
) -> None:
    path = tmp_path / "model.gguf"
    synthetic.write(path, "small", shape, mix, words)
    with gemloom.load(path, context=64, threads=1) as model:
        logits = model.logits([2, *range(30, 70)])
    assert np.isfinite(logits).all()
    assert 1 < logits.std() < 15  # neither flat nor all at the cap
    assert len(set(logits.argmax(-1))) > 10  # what comes before decides what comes next
    assert [file.name for file in tmp_path.iterdir()] == ["model.gguf"]


def test_the_seed_decides_every_byte(tmp_path: Path, words: gguf.Metadata) -> None:
    files = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        synthetic.write(tmp_path / name, "small", E2B, synthetic.qat, words, seed)
        files.append((tmp_path / name).read_bytes())
    assert files[0] == files[1] and files[0] != files[2]


@pytest.mark.parametrize(
    ("shape", "parameters"),
    [
        (synthetic.E2B, 4_628_569_379),
        (synthetic.E4B, 7_463_013_418),
        (replace(synthetic.A4B, pattern=5 * synthetic.A4B.pattern), 25_233_141_790),
    ],
    ids=["E2B", "E4B", "26B-A4B"],
)
def test_shapes_are_those_of_the_released_models(shape: synthetic.Shape, parameters: int) -> None:
    """Each has as many parameters as the released text model."""
    sizes = synthetic.tensors(shape, 262_144)
    del sizes["rope_freqs.weight"]  # constants
    assert sum(prod(size) for size in sizes.values()) == parameters


def test_types_are_those_of_llama_quantize() -> None:
    """As its rule gives them: 15 layers of E2B have a V, all 35 an ffn_down."""
    kinds = synthetic.types(E2B, synthetic.q4_k_m, synthetic.tensors(E2B, 300))
    better = {
        part: [i for i in range(35) if kinds.get(f"blk.{i}.{part}.weight") == synthetic.Type.Q6_K]
        for part in ("attn_v", "ffn_down", "attn_q")
    }
    assert better["attn_v"] == [0, 3, 6, 9, 12, 13, 14]
    assert better["ffn_down"] == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 31, 32, 33, 34]
    assert better["attn_q"] == []
    assert kinds["token_embd.weight"] == kinds["per_layer_token_embd.weight"] == synthetic.Type.Q6_K


def test_rows_that_are_no_multiple_of_256_fall_back() -> None:
    kinds = synthetic.types(MOE, synthetic.q4_k_m, synthetic.tensors(MOE, 300))
    down = [kinds[f"blk.{i}.ffn_down_exps.weight"].name for i in range(6)]
    assert down == ["Q5_0", "Q5_0", "Q8_0", "Q5_0", "Q5_0", "Q8_0"]


def test_full_disk_is_seen_before_anything_is_written(
    tmp_path: Path, words: gguf.Metadata, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(RequestError, match=r"needs \d+ MB of disk, 1 are free"):
        synthetic.write(tmp_path / "a", "small", E2B, synthetic.qat, words)
    assert list(tmp_path.iterdir()) == []


def test_interrupted_file_is_not_left(
    tmp_path: Path, words: gguf.Metadata, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(synthetic, "_vector", stop)
    with pytest.raises(KeyboardInterrupt):
        synthetic.write(tmp_path / "a", "small", E2B, synthetic.qat, words)
    assert list(tmp_path.iterdir()) == []


# --- one line for bad input ---------------------------------------------------


@pytest.mark.parametrize(
    ("command", "status", "message"),
    [
        (["synthetic.py", "e2b-qat", "nowhere/out.gguf"], 1, "nowhere: no such folder"),
        (["synthetic.py", "e3b", "out.gguf"], 2, "invalid choice: 'e3b'"),
        (["compare.py", "--pairs", "0"], 1, "pairs must be from 1 to 1,000, is 0"),
        (["compare.py", "--depths", "-1"], 1, "depths must be from 0 to 100,000, is -1"),
        (["compare.py", "--models", "e3b"], 2, "invalid choice: 'e3b'"),
        (["compare.py", "--name", "../x"], 1, "name must be letters"),
        (["compare.py", "--frobnicate"], 2, "unrecognized arguments: --frobnicate"),
        (["compare.py", "--quick", "--peer", "nowhere/python"], 1, "--peer nowhere/python: "),
        (["ceilings.py", "--threads", "0"], 1, "threads must be from 1"),
    ],
)
def test_bad_input_is_one_line(command: list[str], status: int, message: str) -> None:
    script, *options = command
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *options],
        cwd=BENCHMARKS.parent, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == status
    last = done.stderr.splitlines()[-1]
    assert message in last and "error: " in last
    assert "Traceback" not in done.stderr and not done.stdout


# --- work.py ------------------------------------------------------------------


def test_work_counts_each_matrix_once(model: Path) -> None:
    needs = work.of(model)
    matrices = {
        name: size
        for name, size in synthetic.tensors(E2B, needs.config.n_vocab).items()
        if len(size) > 1 and name != "per_layer_token_embd.weight"
    }
    attention = sum(2 * 4 * E2B.dim(i) for i in range(14))  # a row sees itself; 14 own K/V before
    assert needs.prompt(1) == sum(prod(size) for size in matrices.values()) + attention
    kinds = synthetic.types(E2B, synthetic.q4_k_m, synthetic.tensors(E2B, needs.config.n_vocab))
    assert needs.decoded(0) == sum(gguf.nbytes(kinds[n], size) for n, size in matrices.items())


def test_several_requests_read_weights_once_and_each_its_cells(model: Path) -> None:
    needs = work.of(model)
    assert needs.stepped(30, 1) == needs.decoded(30)
    cells = needs.decoded(30) - needs.decoded(0)
    assert needs.stepped(30, 8) == needs.decoded(0) + 8 * cells


def test_work_grows_with_what_is_seen(model: Path) -> None:
    needs = work.of(model)
    sliding, full = 28 * 32, 7 * 64
    assert needs.decoded(10) - needs.decoded(0) == 4 * 10 * (sliding + full)
    assert needs.decoded(1000) - needs.decoded(100) == 4 * 900 * full  # sliding ones see 16
    each = [needs.prompt(n + 1) - needs.prompt(n) for n in (1, 15, 16, 17, 500)]
    per_position = [b - a for a, b in pairwise(each)]
    all_layers, full_layers = 2 * 4 * (12 * 32 + 2 * 64), 2 * 4 * 2 * 64
    assert per_position == [14 * all_layers, full_layers, full_layers, 483 * full_layers]


# --- sides.py, ours.py --------------------------------------------------------


def test_our_side_measures_a_file(model: Path) -> None:
    job = {"model": str(model), "threads": 1, "context": 256}
    speed = {"task": "speed", "prompts": [5, 40], "depths": [0, 40], "decode": 3}
    done = sides.run(sides.OURS, job | speed)
    assert list(done.answer["prompt"]) == ["5", "40"] and list(done.answer["decode"]) == ["0", "40"]
    assert all(
        seconds > 0 for kind in ("prompt", "decode") for seconds in done.answer[kind].values()
    )
    done = sides.run(sides.OURS, job | {"task": "start", "prompt": 40})
    assert done.answer["load"] > 0 and done.answer["first"] > 0
    assert done.peak > 1_000_000


def test_our_side_measures_adapters(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every figure once a round, of an adapter that changes every matrix of the layers."""
    monkeypatch.setattr(adapters, "POOL", 1 << 12)
    file = adapters.prepare_adapter(model, tmp_path)
    job = {"task": "adapters", "model": str(model), "adapter": str(file), "threads": 1}
    sizes = {"requests": 3, "prompt": 40, "decode": 4, "rounds": 2, "context": 256}
    answer = sides.run(sides.OURS, job | sizes).answer
    counts = {"prompt": (2, 2), "decode": (2, 2), "together": (2, 2, 2), "switch": (16, 16)}
    for name, expected in counts.items():
        assert tuple(map(len, answer[name].values())) == expected
        assert all(seconds > 0 for values in answer[name].values() for seconds in values)
    assert len(answer["load"]) == 3
    base = open_base(gguf.read(source.resolve(model)))
    wanted = {name for name in base.matrices if name.startswith("blk.")}
    assert set(read(file).pairs) == wanted and len(wanted) > 30
    shown = adapters.costs([answer])
    assert list(shown) == [*list(adapters.LIMITS)[:3], "one adapter for all", "switch", "load"]


def test_costs_are_taken_between_neighbours() -> None:
    seconds = {"base": [1.0, 2.0], "adapter": [1.1, 2.4], "one": [1.0, 2.0], "eight": [1.5, 2.5]}
    answer = {
        "prompt": seconds, "decode": seconds, "together": seconds, "load": [0.1, 0.3],
        "switch": {"same": [0.01, 0.02], "other": [0.012, 0.021]},
    }  # fmt: skip
    found = {name: values["median"] for name, values in adapters.costs([answer]).items()}
    assert found == pytest.approx(
        {"prompt": 15, "decode": 15, "eight adapters": 37.5, "one adapter for all": 0,
         "switch": 0.0015, "load": 0.2}
    )  # fmt: skip
    assert adapters.rates([answer], "base")["prompt"] == pytest.approx(adapters.PROMPT / 1.5)
    peer = {name: values for name, values in answer.items() if name != "together"}
    shown = adapters.table({"gemloom": [answer], "llama.cpp": [peer]})
    assert shown.columns[-1]._cells[:3] == ["15.0 % (10.0 % to 20.0 %)"] * 2 + [""]


def test_failure_of_a_side_is_one_line(tmp_path: Path) -> None:
    missing = str(tmp_path / "none.gguf")
    job = {"task": "start", "model": missing, "threads": 1, "context": 64, "prompt": 1}
    with pytest.raises(GemloomError, match=r"^gemloom: .*none\.gguf") as error:
        sides.run(sides.OURS, job)
    assert "\n" not in str(error.value)


def test_process_that_does_not_end_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sides, "LIMIT", 0.2)
    script = tmp_path / "endless.py"
    script.write_text("while True: pass\n", encoding="utf-8")
    with pytest.raises(GemloomError, match="not done after"):
        sides.run(sides.Side("peer", sys.executable, str(script)), {})


def test_peer_that_cannot_be_built_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sides, "ENVIRONMENT", tmp_path / "peer")
    monkeypatch.setattr(sides, "_build", lambda *_: "no compiler")
    assert sides.peer_side(None, Console()) is None
    assert "llama.cpp is missing, only Gemloom is measured: no compiler" in capsys.readouterr().out


# --- compare.py ---------------------------------------------------------------


PEER = sides.Side("llama.cpp", "python", "peer.py")


class Machine:
    """Stands in for the processes: Gemloom twice as fast, with half the memory."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []

    def __call__(self, side: sides.Side, job: dict[str, Any]) -> sides.Done:
        self.calls.append((side.name, job["task"]))
        slow = 1.0 if side is sides.OURS else 2.0
        if job["task"] == "start":
            answer = {"import": 1.0, "load": 0.5 * slow, "first": 0.25 * slow}
        else:
            answer = {
                kind: {str(n): slow for n in job[names]}
                for kind, names in (("prompt", "prompts"), ("decode", "depths"))
            }
        return sides.Done(json.loads(json.dumps(answer)), int(slow * 2**20))


def figures(monkeypatch: pytest.MonkeyPatch, both: list[sides.Side]) -> tuple[Any, Machine]:
    machine = Machine()
    monkeypatch.setattr(compare, "run", machine)
    options = argparse.Namespace(pairs=2, threads=1)
    return compare.measure(Path("model"), both, options, ([128, 512], [0])), machine


def test_each_side_goes_first_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    _, machine = figures(monkeypatch, [sides.OURS, PEER])
    names = [name for name, _ in machine.calls[1:]]  # the first packs the weights into a file
    turn = ["gemloom"] * 3 + ["llama.cpp"] * 2
    assert names == turn + turn[::-1]


def test_ratios_above_one_are_in_our_favour(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = figures(monkeypatch, [sides.OURS, PEER])
    assert list(found) == [
        "prompt 128", "prompt 512", "decode at 0",
        *(f"{name}{kept}" for kept in ("", compare.KEPT)
          for name in ("load", "first token", "load to first token", "peak memory")),
    ]  # fmt: skip
    assert all(figure.ratios == [2.0, 2.0] for figure in found.values())
    assert found["prompt 512"].ours == [512.0, 512.0]
    assert found["decode at 0"].peer == [compare.DECODED / 2] * 2


def test_without_the_peer_our_side_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found, machine = figures(monkeypatch, [sides.OURS])
    assert {name for name, _ in machine.calls} == {"gemloom"}
    assert "ratio" not in found["load"].json() and found["load"].json()["gemloom"] == [0.5, 0.5]
    compare.save(tmp_path / "out" / "x.json", {"pairs": 2}, {"model": found})
    saved = json.loads((tmp_path / "out" / "x.json").read_text(encoding="utf-8"))
    assert saved["models"]["model"]["prompt 512"]["gemloom"] == [512.0, 512.0]
    Console().print(compare.table({"model": found}, 2, {}))


def test_shares_are_of_the_best_rates(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    found, _ = figures(monkeypatch, [sides.OURS])
    needs = work.of(model)
    limits: ceilings.Ceilings = {
        "read": {"unit": "GB/s", "best": 2.0}, "f32": {"unit": "G multiply-adds/s", "best": 4.0}
    }  # fmt: skip
    compare.add_shares(found, needs, limits)
    assert found["prompt 512"].shares == {"f32": pytest.approx(needs.prompt(512) / 4e9)}
    tokens = compare.DECODED
    assert found["decode at 0"].shares == {"read": pytest.approx(needs.decoded(0) * tokens / 2e9)}
    assert found["load"].shares == {}


def test_model_that_does_not_fit_is_left_out_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"e2b-qat-{synthetic.VERSION}.gguf"
    path.write_bytes(b"x" * 100)
    monkeypatch.setattr(compare, "meminfo", lambda key: 1_000)
    assert compare.prepare("e2b-qat", tmp_path) is None
    assert "e2b-qat is left out" in capsys.readouterr().err


# --- sources.py ---------------------------------------------------------------


def test_every_source_that_is_measured_is_the_same_model(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(tiny.gguf_bytes(tiny.VARIANTS["gemma3_scaled"]))
    sealed, key = sources._sealed(path)
    with sources._with_ranges(tmp_path) as ranges, sources._without_ranges(tmp_path) as plain:
        jobs = sources.jobs(path, sealed, key, ranges, plain)
        assert {job["given"] for job in jobs.values()} == set(sources.GIVEN)
        told = [sources.load(job | {"threads": 1}) for job in jobs.values()]
    by_kernels: dict[str, set[float]] = {}  # which add in orders of their own
    for job, answer in zip(jobs.values(), told, strict=True):
        by_kernels.setdefault(str(job["options"].get("kernels")), set()).add(answer["check"])
    assert all(len(checks) == 1 for checks in by_kernels.values())
    assert len(by_kernels) == 2
    assert all(answer["seconds"] > 0 and answer["after"] > 1_000_000 for answer in told)


# --- ceilings.py, scale.py ----------------------------------------------------


@pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler")
def test_ceilings_are_measured() -> None:
    found = ceilings.measure(threads=2, seconds=0.01)
    assert {"read", "f32"} <= set(found)
    for rate in found.values():
        assert float(rate["best"]) >= float(rate["median"]) > 0.1


def test_ceilings_need_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(GemloomError, match="a C compiler, cc, is needed"):
        ceilings.measure(threads=1)


def test_scale_is_told_what_it_cannot_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    options = argparse.Namespace(repetitions=1, lengths=[5], plot=tmp_path / "x.png", name=None)
    with pytest.raises(RequestError, match="matplotlib is needed"):
        scale._check(options)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    scale._check(options)
    options.lengths = [0]
    with pytest.raises(OptionError, match="lengths must be from 1"):
        scale._check(options)
