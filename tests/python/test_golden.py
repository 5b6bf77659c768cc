"""The engine against transformers in float32, on small random checkpoints of every kind."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dsfp4
from fixtures.cases import CASES
from fixtures.golden_vectors import Golden, chosen_otherwise, load_golden, relative_error

# The reference backend's tolerance, and the margin below which float32 may choose otherwise.
REFERENCE_ERROR = 1e-4
REFERENCE_MARGIN = 1e-5
# Rounding to BF16 changes the oracle's own choice up to a margin of 3e-3.
CLOSE_CALL = 1e-2


@pytest.fixture(scope="module", params=CASES)
def golden(request: pytest.FixtureRequest, random_checkpoint: Callable[[str], Path]) -> Golden:
    return load_golden(request.param, random_checkpoint(request.param))


def load(device: str, golden: Golden, random_checkpoint: Callable[[str], Path]) -> Any:
    return dsfp4.Model(str(random_checkpoint(golden.name)), device=device)


@pytest.fixture(scope="module")
def reference(golden: Golden, random_checkpoint: Callable[[str], Path]) -> Iterator[Any]:
    yield load("reference", golden, random_checkpoint)


@pytest.fixture(scope="module")
def cpu(golden: Golden, random_checkpoint: Callable[[str], Path]) -> Iterator[Any]:
    yield load("cpu", golden, random_checkpoint)


def test_reference_prefill(reference: Any, golden: Golden) -> None:
    logits, experts = reference.forward(golden.ids, return_experts=True)
    assert logits.dtype == np.float32
    assert logits.shape == golden.logits.shape
    assert experts.shape == golden.experts.shape
    assert relative_error(logits, golden.logits) <= REFERENCE_ERROR
    assert not np.any(chosen_otherwise(experts, golden) & (golden.margin >= REFERENCE_MARGIN))


def test_reference_decode(reference: Any, golden: Golden) -> None:
    prefill = reference.forward(golden.ids)
    logits, experts = reference.forward(golden.ids, return_experts=True, decode=True)
    assert relative_error(logits, prefill) <= REFERENCE_ERROR
    assert relative_error(logits, golden.logits) <= REFERENCE_ERROR
    assert not np.any(chosen_otherwise(experts, golden) & (golden.margin >= REFERENCE_MARGIN))


def test_reference_forced_experts_are_used(reference: Any, golden: Golden) -> None:
    forced = reference.forward(golden.ids, experts=golden.experts)
    assert relative_error(forced, golden.logits) <= REFERENCE_ERROR
    # The experts of the tokens in reverse order: another choice must give other logits.
    others = np.ascontiguousarray(golden.experts[:, ::-1])
    assert relative_error(reference.forward(golden.ids, experts=others), golden.logits) > 1e-2


@pytest.mark.parametrize("decode", [False, True], ids=["prefill", "decode"])
def test_cpu_forced(cpu: Any, golden: Golden, decode: bool) -> None:
    logits = cpu.forward(golden.ids, experts=golden.experts, decode=decode)
    assert logits.shape == golden.logits.shape
    assert relative_error(logits, golden.logits) <= 2 * golden.bf16_error


@pytest.mark.parametrize("decode", [False, True], ids=["prefill", "decode"])
def test_cpu_chooses_otherwise_only_in_close_calls(cpu: Any, golden: Golden, decode: bool) -> None:
    _, experts = cpu.forward(golden.ids, experts=golden.experts, return_experts=True, decode=decode)
    assert not np.any(chosen_otherwise(experts, golden) & (golden.margin >= CLOSE_CALL))
