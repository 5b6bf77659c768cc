"""The two oracles, transformers' golden vectors and the NumPy model, against each other.

They share no code for the forward pass, so what both say is what the engine must compute.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fixtures import numpy_ops as ops
from fixtures.cases import CASES
from fixtures.checkpoint_io import dequantized_weights
from fixtures.golden_vectors import chosen_otherwise, load_golden, relative_error
from fixtures.numpy_model import NumpyModel
from fixtures.random_checkpoint import token_ids

V3_YARN = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config, dequantized_weights(folder)


@pytest.mark.parametrize("name", CASES)
def test_numpy_model_agrees_with_transformers(
    name: str, random_checkpoint: Callable[[str], Path]
) -> None:
    folder = random_checkpoint(name)
    golden = load_golden(name, folder)
    np.testing.assert_array_equal(golden.ids, token_ids(CASES[name]))
    model = NumpyModel(*read(folder))
    free = model.forward(golden.ids)
    assert relative_error(free.logits, golden.logits) < 5e-6
    assert not chosen_otherwise(free.experts, golden).any()
    np.testing.assert_allclose(free.margin, golden.margin, atol=1e-5)
    forced = model.forward(golden.ids, forced=golden.experts, absorbed=True)
    np.testing.assert_allclose(forced.logits, free.logits, atol=1e-11)


# What an engine could plausibly get wrong, as a change to the configuration or to a constant. Each
# must move the logits by far more than the reference backend's tolerance of 1e-4.
MISTAKES: dict[str, tuple[str, dict[str, Any]]] = {
    "rope_theta": ("v3-no_yarn", {"rope_theta": 10000}),
    "no YaRN": ("v3-bf16-real", {"rope_scaling": None}),
    "mscale_all_dim": ("v2-mscales", {"rope_scaling": {"mscale_all_dim": 1.3}}),
    "mscale": ("v2-mscales", {"rope_scaling": {"mscale": 0.4}}),
    "beta_fast": ("v2-mscales", {"rope_scaling": {"beta_fast": 32}}),
    "absent mscales taken as 1": (
        "v2_lite-no_mscale",
        {"rope_scaling": {"mscale": 1.0, "mscale_all_dim": 1.0}},
    ),
    "rms_norm_eps": ("v3-no_yarn", {"rms_norm_eps": 1e-6}),
    "groups, V3": ("v3-bf16-real", {"topk_group": 4}),
    "groups, V2": ("v2-bf16-real", {"topk_group": 4}),
    "norm_topk_prob": ("v3-bf16-real", {"norm_topk_prob": False}),
    "routed_scaling_factor": ("v2-bf16-real", {"routed_scaling_factor": 15.9}),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_golden_vectors_catch_a_wrong_configuration(
    mistake: str, random_checkpoint: Callable[[str], Path]
) -> None:
    name, changes = MISTAKES[mistake]
    folder = random_checkpoint(name)
    golden = load_golden(name, folder)
    config, weights = read(folder)
    for key, value in changes.items():
        config[key] = config[key] | value if isinstance(value, dict) else value
    logits = NumpyModel(config, weights).forward(golden.ids).logits
    assert relative_error(logits, golden.logits) > 3e-4


def test_golden_vectors_catch_a_wrong_latent_eps(
    random_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = random_checkpoint("v3-no_yarn")
    golden = load_golden("v3-no_yarn", folder)
    config, weights = read(folder)
    monkeypatch.setattr("fixtures.numpy_model.LATENT_EPS", config["rms_norm_eps"])
    logits = NumpyModel(config, weights).forward(golden.ids).logits
    assert relative_error(logits, golden.logits) > 3e-4


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.family == "v3"])
def test_golden_vectors_need_the_correction_bias(
    name: str, random_checkpoint: Callable[[str], Path]
) -> None:
    folder = random_checkpoint(name)
    golden = load_golden(name, folder)
    config, weights = read(folder)
    unbiased = {k: v for k, v in weights.items() if "e_score_correction_bias" not in k}
    without = NumpyModel(config, unbiased).forward(golden.ids)
    assert chosen_otherwise(without.experts, golden).mean() > 0.1


def test_softmax_scales_are_the_published_ones() -> None:
    v3 = ops.make_rope(64, 10000.0, V3_YARN)
    v2 = ops.make_rope(64, 10000.0, V3_YARN | {"mscale": 0.707, "mscale_all_dim": 0.707})
    assert 192**-0.5 * v3.softmax_factor == pytest.approx(0.1352338, abs=1e-7)
    assert 192**-0.5 * v2.softmax_factor == pytest.approx(0.1147214, abs=1e-7)
    assert v3.amplitude == v2.amplitude == 1.0


def test_yarn_interpolates_from_pair_10_to_pair_23() -> None:
    stretched = ops.make_rope(64, 10000.0, V3_YARN).inverse_frequency
    plain = ops.make_rope(64, 10000.0, None).inverse_frequency
    ratio = plain / stretched
    np.testing.assert_allclose(ratio[:11], 1.0)
    np.testing.assert_allclose(ratio[23:], 40.0)
    assert np.all(np.diff(ratio[10:24]) > 0)
