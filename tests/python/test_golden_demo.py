"""The engine against transformers in float32, on the demo model and texts of its kind."""

from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import dsfp4
from fixtures.golden_vectors import (
    GoldenText,
    chosen_otherwise,
    load_demo_golden,
    relative_error,
)

CLOSE_CALL = 1e-2  # a fast backend's router may choose otherwise below this reference margin
PHASES = pytest.mark.parametrize("decode", [False, True], ids=["prefill", "decode"])


@pytest.fixture(scope="module")
def texts() -> list[GoldenText]:
    return load_demo_golden(Path(str(files("dsfp4"))) / "demo_model")


@pytest.fixture(scope="module")
def reference() -> Any:
    return dsfp4.Model("demo", device="reference")


@pytest.fixture(scope="module")
def cpu() -> Any:
    return dsfp4.Model("demo", device="cpu")


def nats(logits: NDArray[np.float32], ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """Negative log-likelihood of each next token, [T - 1]."""
    rows = logits[:-1].astype(np.float64)
    largest = rows.max(axis=1)
    log_sum = np.log(np.exp(rows - largest[:, None]).sum(axis=1)) + largest
    return log_sum - rows[np.arange(len(rows)), ids[1:]]


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
    agree, nll, reference_nll = [], [], []
    for text in texts:
        logits = cpu.forward(text.ids, decode=decode)
        clear = text.gap > 0.1
        agree.append((logits.argmax(axis=1) == text.top)[clear])
        nll.append(nats(logits, text.ids))
        reference_nll.append(text.nll)
    assert np.concatenate(agree).mean() >= 0.99
    perplexity = np.exp(np.concatenate(nll).mean())
    expected = np.exp(np.concatenate(reference_nll).astype(np.float64).mean())
    assert abs(perplexity / expected - 1) <= 0.005
