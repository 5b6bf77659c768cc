"""Reading a whole checkpoint: numbers that are not finite, checksums, and loading with them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import dsfp4
from dsfp4 import _core
from dsfp4.cli import main
from dsfp4.errors import CheckpointError, Dsfp4Error, ParameterError, UnsupportedError
from dsfp4.quantize import quantize
from dsfp4.verify import HASH_FILE, verify
from fixtures.checkpoint_io import flip, place_of, read_shard, write_shard

EXPERT = "model.layers.1.mlp.experts.3.up_proj"
DAMAGE = {
    f"{EXPERT}.weight_scale": (np.nan, "scale"),
    f"{EXPERT}.weight_scale_2": (np.inf, "scale"),
    f"{EXPERT}.input_scale": (-np.inf, "scale"),
    "model.layers.1.mlp.gate.weight": (np.nan, "value"),
    "model.norm.weight": (np.inf, "value"),
}


@pytest.fixture
def folder(random_checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(random_checkpoint("v3-nvfp4-mtp"), tmp_path / "checkpoint"))


def damage(folder: Path, tensor: str, value: float, at: int) -> None:
    path, _ = place_of(folder, tensor)
    tensors = read_shard(path)
    changed: Any = tensors[tensor].copy()
    changed.reshape(-1)[at:] = value
    tensors[tensor] = changed
    write_shard(path, tensors)


def test_a_sound_checkpoint(folder: Path) -> None:
    report = verify(folder)
    names = [name for path in folder.glob("*.safetensors") for name in read_shard(path)]
    sizes = [t.nbytes for path in folder.glob("*.safetensors") for t in read_shard(path).values()]
    assert report == {
        "files": len(list(folder.glob("*.safetensors"))),
        "tensors": len(names),
        "bytes": sum(sizes),
        "compared": False,
        "wrote": False,
        "problems": [],
    }
    assert not (folder / HASH_FILE).exists()


@pytest.mark.parametrize("tensor", DAMAGE)
def test_values_that_are_not_finite(folder: Path, tensor: str) -> None:
    value, word = DAMAGE[tensor]
    path, offset = place_of(folder, tensor)
    old = read_shard(path)[tensor]
    at = max(old.size - 2, 0)
    damage(folder, tensor, value, at)
    report = verify(folder, write=True, threads=1)
    [problem] = report["problems"]
    assert problem["tensor"] == tensor
    assert problem["file"] == str(path)
    assert problem["offset"] == offset + at * old.itemsize
    assert problem["problem"].startswith(f"{old.size - at} {word}")
    assert not report["wrote"]
    assert not (folder / HASH_FILE).exists()


def add_to_index(folder: Path, tensor: str, shard: str) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][tensor] = shard
    path.write_text(json.dumps(index))


def test_every_nan_of_every_float_type(folder: Path) -> None:
    """Against NumPy, all codes of the small types, in a file that the model does not use."""
    for dtype, codes in [
        (ml_dtypes.float8_e4m3fn, np.arange(256, dtype=np.uint8)),
        (ml_dtypes.bfloat16, np.arange(65536, dtype=np.uint16)),
        (np.float32, np.arange(65536, dtype=np.uint32) << np.uint32(16)),
    ]:
        values = codes.view(dtype)
        write_shard(folder / "adapter_model.safetensors", {"x": values})
        add_to_index(folder, "x", "adapter_model.safetensors")
        [problem] = verify(folder)["problems"]
        finite = np.isfinite(values.astype(np.float32))
        assert problem["problem"].split()[0] == str((~finite).sum())
        first = int(np.argmin(finite)) * values.itemsize
        assert problem["offset"] == place_of(folder, "x")[1] + first


def test_verify_and_info_refuse_what_loading_refuses(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"{EXPERT}.pre_quant_scale"
    write_shard(folder / "model-more.safetensors", {name: np.ones(128, ml_dtypes.bfloat16)})
    add_to_index(folder, name, "model-more.safetensors")
    said = []
    for read in (dsfp4.Model, verify, _core.describe):
        with pytest.raises(UnsupportedError, match="NVFP4 without AWQ is") as error:
            read(str(folder))
        said.append(str(error.value))
    assert name in said[0] and "model-more.safetensors" in said[0]
    assert len(set(said)) == 1
    for command in ("verify", "info"):
        assert main([command, str(folder)]) != 0
        assert said[0] in capsys.readouterr().err


def test_checksums_are_written_compared_and_kept_at_loading(folder: Path) -> None:
    before = dsfp4.Model(folder).forward(range(1, 9))
    assert verify(folder, write=True)["wrote"]
    assert verify(folder)["compared"]
    np.testing.assert_array_equal(dsfp4.Model(folder).forward(range(1, 9)), before)
    path = flip(folder, f"{EXPERT}.weight")
    [problem] = verify(folder)["problems"]
    assert (problem["file"], problem["tensor"]) == (str(path), f"{EXPERT}.weight")
    with pytest.raises(CheckpointError, match="checksum") as error:
        dsfp4.Model(folder)
    assert error.value.file == str(path)
    assert error.value.tensor == f"{EXPERT}.weight"


@pytest.mark.parametrize(
    "tensor", ["model.norm.weight", f"{EXPERT}.weight_scale_2", "lm_head.weight"]
)
def test_loading_checks_every_kind_of_tensor(folder: Path, tensor: str) -> None:
    verify(folder, write=True)
    flip(folder, tensor)
    with pytest.raises(CheckpointError, match="checksum") as error:
        dsfp4.Model(folder)
    assert error.value.tensor == tensor


def test_quantize_refuses_a_damaged_source(
    random_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = Path(shutil.copytree(random_checkpoint("v3-bf16-real"), tmp_path / "source"))
    verify(source, write=True)
    quantize(source, tmp_path / "sound")
    assert not (tmp_path / "sound" / HASH_FILE).exists()  # other bytes, other checksums
    path = flip(source, f"{EXPERT}.weight")
    with pytest.raises(CheckpointError, match="checksum") as error:
        quantize(source, tmp_path / "other")
    assert (error.value.file, error.value.tensor) == (str(path), f"{EXPERT}.weight")
    assert not (tmp_path / "other").exists()


def test_writing_does_not_bless_what_changed(folder: Path) -> None:
    verify(folder, write=True)
    old = (folder / HASH_FILE).read_bytes()
    flip(folder, f"{EXPERT}.weight")
    assert not verify(folder, write=True)["wrote"]
    assert (folder / HASH_FILE).read_bytes() == old
    (folder / HASH_FILE).unlink()
    assert verify(folder, write=True)["wrote"]
    dsfp4.Model(folder)


def test_a_tensor_without_checksum(folder: Path) -> None:
    verify(folder, write=True)
    content = json.loads((folder / HASH_FILE).read_text())
    assert content["algorithm"] == "xxh3-64"
    del content["tensors"]["model.norm.weight"]
    (folder / HASH_FILE).write_text(json.dumps(content))
    assert [p["tensor"] for p in verify(folder)["problems"]] == ["model.norm.weight"]
    with pytest.raises(CheckpointError, match="no checksum"):
        dsfp4.Model(folder)


def test_a_malformed_checksum_file(folder: Path) -> None:
    (folder / HASH_FILE).write_text("{")
    for read in (verify, dsfp4.Model):
        with pytest.raises(CheckpointError) as error:
            read(folder)
        assert error.value.file == str(folder / HASH_FILE)


def test_progress_and_its_errors(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    total = verify(folder, progress=lambda *state: seen.append(state))["bytes"]
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verify(folder, progress=stop)


@pytest.mark.parametrize("threads", [-1, 1025, 2**63, 0.5, None])
def test_bad_threads(threads: Any) -> None:
    with pytest.raises(ParameterError, match="threads"):
        verify("demo", threads=threads)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(Dsfp4Error, match="is not a folder"):
        verify(tmp_path / "nowhere")


def test_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(folder), "--write"]) == 0
    out, err = capsys.readouterr()
    assert "are finite\n" in out
    assert f"{HASH_FILE} is written" in out
    assert err.endswith("MB/s\n")
    assert main(["verify", str(folder), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["compared"] and report["problems"] == []
    path = flip(folder, f"{EXPERT}.weight")
    assert main(["verify", str(folder), "--threads", "1"]) == 1
    out = capsys.readouterr().out
    assert f"'{path}': tensor '{EXPERT}.weight', byte " in out
    assert "1 of " in out
    assert main(["verify", str(folder), "--json"]) == 1
    assert len(json.loads(capsys.readouterr().out)["problems"]) == 1
