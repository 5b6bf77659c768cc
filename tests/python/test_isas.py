"""The cpu backend on every instruction set that this machine runs, against `reference`."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_ops import make_weight

from dsfp4 import ops
from dsfp4.ops import layers

ISAS = ["scalar", "avx2", "avx512", "avx512vnni", "avx512bf16", "amx"]
GROUP = {"f32": 1, "bf16": 1, "fp8": 1, "nvfp4": 16, "mxfp4": 32}


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    monkeypatch.setenv("DSFP4_ISA", request.param)
    layers._cached_backend.cache_clear()
    one = ops.Weight.f32(np.ones((1, 1), np.float32))
    try:
        ops.linear(one, np.ones((1, 1), np.float32), "cpu")
    except ValueError as error:
        assert "DSFP4_ISA" in str(error)
        pytest.skip(str(error))
    yield request.param
    layers._cached_backend.cache_clear()


CASE = st.fixed_dictionaries(
    {
        "fmt": st.sampled_from(sorted(GROUP)),
        "rows": st.integers(1, 140),
        "groups": st.integers(1, 90),
        "tokens": st.integers(0, 20),
        "spread": st.sampled_from([0.0, 1.0, 3.0]),  # of the activations' magnitudes, in e-folds
        "threads": st.integers(1, 3),
        "seed": st.integers(0, 2**32 - 1),
    }
)


@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(case=CASE)
def test_linear_agrees_with_reference_and_with_itself(isa, case):
    rng = np.random.default_rng(case["seed"])
    cols = case["groups"] * GROUP[case["fmt"]]
    values = rng.standard_normal((case["rows"], cols)).astype(np.float32)
    weight, decoded = make_weight(case["fmt"], values)
    x = rng.standard_normal((case["tokens"], cols)) * np.exp(
        case["spread"] * rng.standard_normal((case["tokens"], cols))
    )
    x = x.astype(np.float32)
    expected = ops.linear(weight, x, "reference")
    actual = ops.linear(weight, x, "cpu", threads=case["threads"])
    # Rounding to BF16 moves a value by at most 2^-8 of itself, as it has 8 significant bits; int16
    # by 2^-16 of the largest in 128 or 256 columns. The sums in FP32 add little.
    absolute = np.abs(x.astype(np.float64)) @ np.abs(decoded.astype(np.float64)).T
    largest = np.abs(x).max(axis=1, initial=0.0)[:, None] * np.abs(decoded).sum(axis=1)
    bound = 1.01 * (2.0**-8 * absolute + 2.0**-16 * largest)
    assert np.all(np.abs(actual - expected) <= bound)
    for token in range(case["tokens"]):
        alone = ops.linear(weight, x[token : token + 1], "cpu", threads=1)
        np.testing.assert_array_equal(alone[0], actual[token])


@settings(deadline=None, max_examples=25, suppress_health_check=list(HealthCheck))
@given(case=CASE)
def test_experts_agree_with_reference_and_with_themselves(isa, case):
    rng = np.random.default_rng(case["seed"])
    hidden = min(case["groups"], 12) * GROUP[case["fmt"]]
    width = max(1, min(case["rows"], 90) // GROUP[case["fmt"]]) * GROUP[case["fmt"]]

    def weight(rows, cols):
        return make_weight(case["fmt"], rng.standard_normal((rows, cols)).astype(np.float32) / 8)[0]

    experts = [
        (weight(width, hidden), weight(width, hidden), weight(hidden, width)) for _ in range(4)
    ]
    tokens = max(1, case["tokens"])
    x = rng.standard_normal((tokens, hidden)).astype(np.float32)
    chosen = np.argsort(rng.random((tokens, 4)), axis=1)[:, :2]
    weights = rng.random((tokens, 2)).astype(np.float32)
    expected = ops.moe(experts, x, chosen, weights, "reference")
    actual = ops.moe(experts, x, chosen, weights, "cpu", threads=case["threads"])
    scale = np.linalg.norm(expected)
    assert np.linalg.norm(actual - expected) <= 0.02 * scale + 1e-6
    token = case["seed"] % tokens
    alone = ops.moe(
        experts, x[token : token + 1], chosen[token : token + 1], weights[token : token + 1], "cpu"
    )
    np.testing.assert_array_equal(alone[0], actual[token])


def test_a_wrong_name_is_an_error(monkeypatch):
    monkeypatch.setenv("DSFP4_ISA", "sse9")
    layers._cached_backend.cache_clear()
    with pytest.raises(ValueError, match="avx512bf16"):
        ops.linear(ops.Weight.f32(np.ones((1, 1), np.float32)), np.ones((1, 1), np.float32), "cpu")
    layers._cached_backend.cache_clear()
