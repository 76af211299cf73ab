"""Models that compute the same have one fingerprint; of other weights, types or facts, another."""

from typing import Any

import pytest

from conftest import Load


@pytest.mark.parametrize("options", [{}, {"slots": 1, "chunk": 7}, {"kernels": "plain"}], ids=str)
def test_how_a_model_is_loaded_is_no_matter(load: Load, options: dict[str, Any]) -> None:
    assert load(**options).fingerprint == load().fingerprint


@pytest.mark.parametrize("forms", [{"seed": 1}, {"types": "q8_0"}, {"untied": True}], ids=str)
def test_another_file_has_another(load: Load, forms: dict[str, Any]) -> None:
    assert load(forms=forms).fingerprint != load().fingerprint


def test_another_structure_has_another(load: Load) -> None:
    assert load("e2b").fingerprint != load("e4b").fingerprint
