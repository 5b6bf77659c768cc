"""The engine against transformers in float32, on the demo model and texts of its kind."""

from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dsfp4
from fixtures.golden_vectors import (
    GoldenText,
    chosen_otherwise,
    compare_free,
    load_demo_drawn,
    load_demo_golden,
    relative_error,
)

DEMO = Path(str(files("dsfp4"))) / "demo_model"
CLOSE_CALL = 1e-2  # a fast backend's router may choose otherwise below this reference margin
PHASES = pytest.mark.parametrize("decode", [False, True], ids=["prefill", "decode"])


@pytest.fixture(scope="module")
def texts() -> list[GoldenText]:
    return load_demo_golden(DEMO)


@pytest.fixture(scope="module")
def reference() -> Any:
    return dsfp4.Model("demo", device="reference")


@pytest.fixture(scope="module")
def cpu() -> Any:
    return dsfp4.Model("demo", device="cpu")


def test_reference(reference: Any, texts: list[GoldenText]) -> None:
    # Forced, because a text of this length has choices that float32 itself leaves open.
    for text in texts:
        logits, experts = reference.forward(text.ids, experts=text.experts, return_experts=True)
        assert relative_error(logits[text.positions], text.logits) <= 1e-4, text.name
        assert not np.any(chosen_otherwise(experts, text) & (text.margin >= 1e-5)), text.name


@PHASES
def test_cpu_forced(cpu: Any, texts: list[GoldenText], decode: bool) -> None:
    for text in texts:
        logits, experts = cpu.forward(
            text.ids, experts=text.experts, return_experts=True, decode=decode
        )
        error = relative_error(logits[text.positions], text.logits)
        assert error <= 2 * text.bf16_error, text.name
        assert not np.any(chosen_otherwise(experts, text) & (text.margin >= CLOSE_CALL)), text.name


@PHASES
def test_cpu_free(cpu: Any, texts: list[GoldenText], decode: bool) -> None:
    agreement, perplexity = compare_free(lambda ids: cpu.forward(ids, decode=decode), texts)
    assert agreement >= 0.99
    assert abs(perplexity) <= 0.005


@pytest.mark.full
@PHASES
def test_cpu_free_on_drawn_texts(cpu: Any, decode: bool) -> None:
    drawn = load_demo_drawn(DEMO)
    agreement, perplexity = compare_free(lambda ids: cpu.forward(ids, decode=decode), drawn)
    assert agreement >= 0.99
    assert abs(perplexity) <= 0.005
