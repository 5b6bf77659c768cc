"""Draws of the sampler against the distribution that NumPy computes from the same options."""

import numpy as np
import pytest

from dsfp4 import ops

DRAWS = 50_000

CASES = {
    "temperature": dict(temperature=0.7),
    "hot": dict(temperature=3.0),
    "top_k": dict(temperature=1.0, top_k=7),
    "top_p": dict(temperature=0.9, top_p=0.8),
    "min_p": dict(temperature=1.2, min_p=0.05),
    "penalty": dict(temperature=1.0, repetition_penalty=1.7, prompt=[3, 5, 8, 8, 20]),
    "bias": dict(temperature=1.0, logit_bias={2: 3.0, 4: -np.inf, 9: -1.0}),
    "everything": dict(
        temperature=0.8,
        top_k=15,
        top_p=0.95,
        min_p=0.02,
        repetition_penalty=1.3,
        prompt=[0, 1, 2],
        logit_bias={7: 1.0},
    ),
}


def probabilities(
    logits,
    temperature,
    top_k=0,
    top_p=1.0,
    min_p=0.0,
    repetition_penalty=1.0,
    logit_bias=None,
    prompt=(),
):
    """Penalty, bias, temperature, top_k, top_p, min_p: each on what the one before has left."""
    x = logits.astype(np.float64)
    seen = np.unique(np.asarray(prompt, int))
    x[seen] = np.where(x[seen] > 0, x[seen] / repetition_penalty, x[seen] * repetition_penalty)
    for token, bias in (logit_bias or {}).items():
        x[token] += bias
    order = np.argsort(-x, kind="stable")
    p = np.exp((x[order] - x.max()) / temperature)
    if top_k:
        p[top_k:] = 0
    before = np.concatenate([[0], np.cumsum(p)[:-1]]) / p.sum()
    p[before >= top_p] = 0
    p[p < min_p * p[0]] = 0
    out = np.zeros_like(p)
    out[order] = p / p.sum()
    return out


def chi_square_limit(freedom, z=4.0):
    """What chi-square exceeds as seldom as a normal variable exceeds z (Wilson-Hilferty)."""
    return freedom * (1 - 2 / (9 * freedom) + z * np.sqrt(2 / (9 * freedom))) ** 3


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", [1, 2])
def test_distribution(case, seed):
    logits = (2 * np.random.default_rng(seed).standard_normal(40)).astype(np.float32)
    expected = DRAWS * probabilities(logits, **CASES[case])
    counts = np.bincount(ops.sample(logits, DRAWS, seed=1000 * seed, **CASES[case]), minlength=40)
    assert np.all(counts[expected == 0] == 0)
    common = expected >= 5
    rest = max(expected[~common].sum(), 1e-9)
    statistic = ((counts - expected)[common] ** 2 / expected[common]).sum()
    if rest >= 5:
        statistic += (counts[~common].sum() - rest) ** 2 / rest
    assert statistic < chi_square_limit(max(common.sum() - 1, 1))


def test_greedy_needs_no_luck():
    logits = np.float32([0.0, 3.0, 3.0, -1.0])
    assert set(ops.sample(logits, 100, temperature=0.0)) == {1}
    assert set(ops.sample(logits, 100, temperature=0.0, logit_bias={2: 0.5})) == {2}
