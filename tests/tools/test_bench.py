"""The benchmark of one model: what it counts adds up, and what cannot be measured is refused.

No time is held against anything.
"""

import json
from typing import Any

import pytest

import gemloom
from conftest import Load
from gemloom.cli.bench import tables
from gemloom.cli.terminal import render
from gemloom.errors import OptionError
from gemloom.testing import parts_of
from gemloom.tools import bench


@pytest.fixture
def model(load: Load) -> gemloom.Model:
    return load("e2b", context=128, chunk=16)


def measured(model: gemloom.Model, **options: Any) -> bench.BenchReport:
    options = {"prompts": (40,), "generate": (3,), "depths": (0, 50), "repetitions": 3} | options
    return bench.bench(model, **options)


def test_everything_asked_for_is_measured_in_order(model: gemloom.Model) -> None:
    seen: list[bench.Timing] = []
    report = measured(model, prompts=(5, 40), generate=(2, 3), done=seen.append)
    found = [(test.kind, test.tokens, test.depth) for test in report.timings]
    assert found == [
        ("prompt", 5, 0), ("prompt", 40, 0),
        ("decode", 2, 0), ("decode", 3, 0), ("decode", 2, 50), ("decode", 3, 50),
    ]  # fmt: skip
    assert seen == report.timings
    assert all(len(test.seconds) == 3 and min(test.seconds) > 0 for test in seen)


def test_phases_add_up_to_the_time(model: gemloom.Model) -> None:
    for test in measured(model, repetitions=1).timings:
        steps = test.tokens if test.kind == "decode" else 1
        whole = sum(test.phases.values()) * steps / 1e3
        if test.kind == "prompt":
            assert whole == pytest.approx(test.seconds[0], rel=1e-6)
            assert test.phases["compute"] > 0
        # Of a decode it is the difference of two runs, which noise can make nothing.
        assert whole > test.seconds[0] * (1 - 1e-6)
        assert min(test.phases.values()) >= 0
        assert 0 < test.python_share <= 1


def test_json_holds_what_the_report_says(model: gemloom.Model) -> None:
    report = measured(model)
    found = json.loads(json.dumps(report.json()))
    assert found["machine"]["threads"] == model.threads and found["machine"]["backends"]
    assert found["memory"]["kv_full"] == model.memory()["kv_full"]
    for test, values in zip(report.timings, found["timings"], strict=True):
        speed = values["tokens_per_second"]
        assert speed["min"] <= speed["median"] <= speed["max"]
        assert speed["median"] == sorted(test.tokens / s for s in test.seconds)[1]


def test_prompts_are_cold_and_depths_are_filled(
    model: gemloom.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows computed, not rows asked for: a second benchmark of the same finds nothing cached."""
    rows: list[int] = []
    program = parts_of(model).program
    compute = program.run
    monkeypatch.setattr(
        program, "run", lambda b, *a: rows.append(len(b[0].tokens)) or compute(b, *a)
    )
    cold = [16, 16, 8]
    for _ in range(2):
        rows.clear()
        measured(model, prompts=(40,), generate=(), repetitions=2)
        assert rows[0] == 2
        assert rows[-3:] == cold
        counted = [rows[i : i + 3] for i in range(len(rows) - 2)].count(cold)
        assert counted == 2  # one that found a token in the cells was measured again
    rows.clear()
    measured(model, prompts=(), generate=(3,), depths=(50,), repetitions=1)
    assert sum(rows[:-3]) >= 50 and rows[-3:] == [1, 1, 1]


def test_it_is_shown(model: gemloom.Model, capsys: pytest.CaptureFixture[str]) -> None:
    report = measured(model)
    for part in tables(report):
        render(part)
    text = capsys.readouterr().out
    for expected in (
        "prompt 40",
        "decode 3 at 50",
        f"{report.timings[0].speed:,.2f}",
        "kv_sliding",
    ):
        assert expected in text


def test_context_for_is_just_enough(load: Load) -> None:
    wanted = {"prompts": (20,), "generate": (3,), "depths": (40,)}
    context = bench.context_for(**wanted)
    bench.bench(load("e2b", context=context), **wanted, repetitions=1)
    with pytest.raises(OptionError, match=f"context of {context:,}"):
        bench.bench(load("e2b", context=context - 1), **wanted, repetitions=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repetitions": 0}, "repetitions must be from 1"),
        ({"prompts": (0,)}, "prompt must be at least 1, is 0"),
        ({"generate": (-1,)}, "generate must be at least 1, is -1"),
        ({"depths": (-1,)}, "depth must be at least 0, is -1"),
        ({"prompts": (), "generate": ()}, "nothing to measure"),
        ({"prompts": (999,)}, "a context of 999"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    model: gemloom.Model, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=message) as error:
        measured(model, **options)
    assert "\n" not in str(error.value)
