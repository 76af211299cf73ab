"""Sentences that people read are short: none over thirty-five words, under twenty on average."""

import re
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted(chain(*(ROOT.glob(pattern) for pattern in ("*.md", "docs/*.md", "benchmarks/*.md"))))
LONGEST, AVERAGE = 35, 20
CODE_BLOCK = r"^```[\s\S]*?^```|(?<=\n\n)(?: {4}.*\n)+"
NOT_A_SENTENCE = r"^ *(?:\||#|!\[|---).*$"  # tables, headings, pictures, rules
PARAGRAPH = r"\n\s*(?:[-*]|\d+\.) |\n\s*\n"  # a list item is one
SENTENCE_END = (
    r"(?<!\b[A-Z]\.)(?<!e\.g\.)(?<!i\.e\.)(?<=[.!?])"  # initials and abbreviations end none
    r"[*_)\"']*\s+(?=[*_(\"'`]*(?:[A-Z0-9`]|ggml|llama\.cpp))"  # these names may begin one
)


def sentences(text: str) -> list[str]:
    """The sentences of a page without its code blocks, tables and headings."""
    text = re.sub(CODE_BLOCK, "\n", text, flags=re.MULTILINE)
    text = re.sub(NOT_A_SENTENCE, "", text, flags=re.MULTILINE)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)  # a link is its words
    text = re.sub(r"`[^`]+`", "`code`", text)
    paragraphs = (p for p in re.split(PARAGRAPH, "\n" + text) if p.strip())
    found = chain.from_iterable(re.split(SENTENCE_END, p) for p in paragraphs)
    return [" ".join(sentence.split()) for sentence in found if sentence.strip()]


def test_sentences_are_found() -> None:
    page = (
        "# Title\n\nOne is *short*. `two` names code:\n\n    make bench  # A. B. C.\n\n"
        "- **Three.** Four\n  reads 1.5 GB by L. Carroll, e.g. Alice. ggml is five.\n"
        "- Six; `a\n  b` (seven.)\n\n| a. | B. |\n\n```sh\nls. A\n```\n1. Eight\n"
    )
    assert sentences(page) == [
        "One is *short*.",
        "`code` names code:",
        "**Three.",
        "Four reads 1.5 GB by L. Carroll, e.g. Alice.",
        "ggml is five.",
        "Six; `code` (seven.)",
        "Eight",
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_sentences_are_short(page: Path) -> None:
    found = sentences(page.read_text(encoding="utf-8"))
    long = [sentence for sentence in found if len(sentence.split()) > LONGEST]
    assert not long, "\n".join(long)
    assert sum(len(sentence.split()) for sentence in found) / len(found) < AVERAGE
