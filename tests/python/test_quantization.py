"""Dense weights that are converted while they are loaded, beside those that `quantize` writes."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dsfp4
from dsfp4.cli.options import quantization
from dsfp4.errors import CheckpointError, ParameterError
from dsfp4.quantize import quantize
from fixtures.cases import CASES
from fixtures.checkpoint_io import place_of, read_shard, write_shard
from fixtures.random_checkpoint import token_ids, write_checkpoint

CASE = CASES["v3-bf16-real"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with NVFP4 MLPs and BF16 attention."""
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(CASE, folder / "source", 1)
    quantize(folder / "source", folder / "nvfp4")
    quantize(folder / "source", folder / "fp8", attention="fp8")
    return folder


def logits(folder: Path, **options: Any) -> np.ndarray:
    model = dsfp4.Model(folder, "reference", threads=2, warm_start=False, **options)
    return model.forward(token_ids(CASE))


@pytest.mark.parametrize("tiers", [{}, {"cpu_cache_size": 0}])
def test_converted_at_load_or_by_quantize_is_the_same(folder: Path, tiers: dict[str, Any]) -> None:
    right = logits(folder / "fp8")
    formats = {"attention": "fp8", "o_proj": "fp8"}
    converted = logits(folder / "nvfp4", quantization=formats, **tiers)
    np.testing.assert_array_equal(converted, right)
    assert not np.array_equal(logits(folder / "nvfp4", **tiers), right)


def test_keep_and_auto_are_as_published_where_there_is_room(folder: Path) -> None:
    right = logits(folder / "nvfp4", quantization="keep")
    np.testing.assert_array_equal(logits(folder / "nvfp4"), right)
    np.testing.assert_array_equal(logits(folder / "nvfp4", quantization={}), right)


def test_memory_is_saved(folder: Path) -> None:
    def loaded(quantization: Any) -> tuple[int, int]:
        model = dsfp4.Model(folder / "source", quantization=quantization, warm_start=False)
        return model.weight_bytes, model.stats()["reserved_bytes"]

    published = loaded("keep")
    fp8 = loaded({"attention": "fp8", "o_proj": "fp8"})
    assert fp8 < published
    assert published[0] - fp8[0] < 1.05 * (published[1] - fp8[1])
    assert loaded({"attention": "fp8", "o_proj": "nvfp4"})[0] < fp8[0]


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ("fp8", "must be auto, keep or map roles to formats, not be 'fp8'"),
        (3, "must be auto, keep or map roles to formats, not be 3"),
        ({"mlp": 8}, "must be auto, keep or map roles to formats"),
        ({"experts": "fp8"}, "has no role 'experts'; the roles are attention, o_proj"),
        ({"attention": "nvfp4"}, "attention can be keep or fp8, not 'nvfp4'"),
        ({"mlp": "FP8"}, "mlp can be keep, fp8 or nvfp4, not 'FP8'"),
    ],
)
def test_what_is_no_quantization_is_named(folder: Path, wanted: Any, words: str) -> None:
    with pytest.raises(ParameterError, match="quantization") as raised:
        dsfp4.Model(folder / "nvfp4", quantization=wanted)
    assert words in str(raised.value)


def test_a_value_that_no_format_holds_is_named(folder: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(folder / "source", tmp_path / "broken")
    name = "model.layers.1.self_attn.o_proj.weight"
    path, _ = place_of(broken, name)
    tensors = read_shard(path)
    weight = tensors[name].copy()
    weight[3, 5] = np.inf
    write_shard(path, tensors | {name: weight})
    dsfp4.Model(broken, warm_start=False)
    with pytest.raises(CheckpointError, match=r"o_proj\.weight"):
        dsfp4.Model(broken, quantization={"o_proj": "fp8"}, warm_start=False)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("auto", "auto"),
        ("keep", "keep"),
        ("mlp=fp8", {"mlp": "fp8"}),
        ("mlp=fp8,o_proj=nvfp4", {"mlp": "fp8", "o_proj": "nvfp4"}),
    ],
)
def test_the_flag(text: str, value: str | Mapping[str, str]) -> None:
    assert quantization(text) == value
