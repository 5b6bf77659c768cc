"""The quantiser's output against the formats' definitions in fixtures/checkpoint_io.py."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import dsfp4
from dsfp4.errors import CheckpointError, IoError, ParameterError, UnsupportedError
from dsfp4.quantize import quantize
from dsfp4.quantize.writer import ShardWriter, TensorSpec
from fixtures.cases import CASES, Case
from fixtures.checkpoint_io import (
    dequantized_weights,
    nvfp4_global_scale,
    quantize_fp8,
    read_shard,
    read_tensors,
)
from fixtures.numpy_model import NumpyModel
from fixtures.random_checkpoint import token_ids, write_checkpoint

MLP = re.compile(r"model\.layers\.\d+\.mlp\..*(gate|up|down)_proj\.weight")
ATTENTION = re.compile(r"model\.layers\.\d+\.self_attn\..*_proj(_with_mqa)?\.weight")
MTP = "model.layers.3."  # in the cases of real geometry

BF16 = CASES["v3-bf16-real"]
FP8 = CASES["v3-fp8-real"]
MODES = {"keep": BF16, "fp8": BF16, "nvfp4": BF16}


def source(case: Case, folder: Path, shards: int = 3) -> Path:
    write_checkpoint(case, folder / "source", shards)
    return folder / "source"


def is_nvfp4(name: str, attention: str) -> bool:
    return bool(MLP.fullmatch(name) or (attention == "nvfp4" and ATTENTION.fullmatch(name)))


def check_nvfp4(stored: dict[str, Any], weights: dict[str, Any], name: str) -> None:
    """The tensors of one weight are what the definition gives, up to rare ties in rounding."""
    module = name.removesuffix(".weight")
    partner = re.sub(r"(gate|up)_proj\.weight$", "", name)
    family = [name]
    if partner != name:
        family = [f"{partner}gate_proj.weight", f"{partner}up_proj.weight"]
    scale = nvfp4_global_scale(*(weights[member] for member in family))
    assert stored[f"{module}.weight_scale_2"].shape == ()
    assert stored[f"{module}.weight_scale_2"] == pytest.approx(scale, rel=1e-6)
    assert stored[f"{module}.input_scale"] == np.float32(1.0)
    scales = stored[f"{module}.weight_scale"]
    assert scales.dtype == ml_dtypes.float8_e4m3fn
    blocks = weights[name].astype(np.float64).reshape(*scales.shape, 16) / scale
    wanted = np.clip(np.abs(blocks).max(axis=2) / 6, 2.0**-9, 448)
    assert_nearest(scales.astype(np.float64), wanted, ml_dtypes.float8_e4m3fn, range(127))
    packed = stored[name]
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(blocks.shape)
    values = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    scaled = np.clip(blocks / scales.astype(np.float64)[..., None], -6, 6)
    assert_nearest(values, scaled, ml_dtypes.float4_e2m1fn, range(16))


def assert_nearest(values: Any, wanted: Any, dtype: Any, codes: range) -> None:
    """No value of `dtype` is nearer to `wanted` than `values`, but for ties and their rounding."""
    table = np.sort(np.uint8(codes).view(dtype).astype(np.float64))
    above = np.searchsorted(table, wanted).clip(1, len(table) - 1)
    nearest = np.minimum(np.abs(table[above] - wanted), np.abs(table[above - 1] - wanted))
    assert np.all(np.abs(values - wanted) <= nearest + 1e-6 * np.abs(wanted))


@pytest.mark.parametrize("case", [BF16, FP8, CASES["v3-no_yarn"], CASES["v2_lite-bf16-real"]])
@pytest.mark.parametrize("attention", ["keep", "fp8", "nvfp4"])
def test_every_tensor(tmp_path: Path, case: Case, attention: Any) -> None:
    folder = source(replace(case, mtp_layer=True), tmp_path)
    quantize(folder, tmp_path / "out", attention=attention)
    before, after = read_tensors(folder), read_tensors(tmp_path / "out")
    weights = dequantized_weights(folder)
    expected: set[str] = set()
    for name, tensor in before.items():
        module = name.rpartition(".")[0]
        is_fp8 = tensor.dtype == ml_dtypes.float8_e4m3fn
        if name.startswith(MTP) or not (MLP.fullmatch(name) or ATTENTION.fullmatch(name)):
            if name.endswith("_scale_inv") and is_nvfp4(f"{module}.weight", attention):
                continue  # gone, with the FP8 weight
            expected.add(name)
            assert after[name].tobytes() == tensor.tobytes()
        elif is_nvfp4(name, attention):
            expected |= {name, *(f"{name}_{kind}" for kind in ("scale", "scale_2"))}
            expected.add(f"{module}.input_scale")
            check_nvfp4(after, weights, name)
        elif attention == "fp8" and not is_fp8:
            expected |= {name, f"{name}_scale_inv"}
            _, scale_inv = quantize_fp8(weights[name])
            np.testing.assert_allclose(after[f"{name}_scale_inv"], scale_inv, rtol=1e-6)
            assert after[name].dtype == ml_dtypes.float8_e4m3fn
            rows, cols = weights[name].shape
            tiles = np.repeat(np.repeat(after[f"{name}_scale_inv"], 128, axis=0), 128, axis=1)
            scaled = np.clip(weights[name] / tiles[:rows, :cols].astype(np.float64), -448, 448)
            codes = after[name].astype(np.float64)
            magnitudes = range(127)
            assert_nearest(np.abs(codes), np.abs(scaled), ml_dtypes.float8_e4m3fn, magnitudes)
            assert np.all(codes * scaled >= 0)
        else:
            expected.add(name)
            assert after[name].tobytes() == tensor.tobytes()
    mtp_scales = {name for name in before if name.startswith(MTP)}
    assert set(after) == expected | mtp_scales


def test_gate_and_up_share_their_scale_across_shards(tmp_path: Path) -> None:
    folder = source(BF16, tmp_path, shards=23)
    quantize(folder, tmp_path / "out")
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())["weight_map"]
    after, weights = read_tensors(tmp_path / "out"), dequantized_weights(folder)
    gates = [name for name in weights if name.endswith("gate_proj.weight")]
    split = [n for n in gates if index[n] != index[n.replace("gate_proj", "up_proj")]]
    assert split, "the shards do not part any gate and up: choose another number of them"
    for gate in gates:
        up = gate.replace("gate_proj", "up_proj")
        assert after[f"{gate}_scale_2"] == after[f"{up}_scale_2"]
        check_nvfp4(after, weights, gate)
        check_nvfp4(after, weights, up)


def test_the_result_runs(tmp_path: Path) -> None:
    folder = source(BF16, tmp_path)
    quantize(folder, tmp_path / "out", attention="fp8")
    config = json.loads((tmp_path / "out/config.json").read_text())
    ids = token_ids(BF16)
    expected = NumpyModel(config, dequantized_weights(tmp_path / "out")).forward(ids).logits
    logits = dsfp4.Model(tmp_path / "out", device="reference").forward(ids)
    assert np.linalg.norm(logits - expected) < 1e-4 * np.linalg.norm(expected)


def test_files_are_as_safetensors_writes_them(tmp_path: Path) -> None:
    quantize(source(BF16, tmp_path), tmp_path / "out", attention="fp8")
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [path.name for path in shards] == [f"model-0000{n}-of-00003.safetensors" for n in "123"]
    assert not list((tmp_path / "out").glob("*.part"))
    order = ["F32", "BF16", "F8_E4M3", "U8"]
    for path in shards:
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        assert size % 8 == 0
        header = json.loads(data[8 : 8 + size])
        assert header.pop("__metadata__") == {"format": "pt"}
        assert list(header) == sorted(header, key=lambda n: (order.index(header[n]["dtype"]), n))
        ends = [0]
        for entry in header.values():
            assert entry["data_offsets"][0] == ends[-1]
            ends.append(entry["data_offsets"][1])
        assert 8 + size + ends[-1] == len(data)


def test_index_and_configs(tmp_path: Path) -> None:
    folder = source(replace(FP8, mtp_layer=True), tmp_path)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "notes.txt").write_text("not for others")
    quantize(folder, tmp_path / "out")
    out = tmp_path / "out"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    stored = {p.name: read_shard(p) for p in out.glob("*.safetensors")}
    assert index["weight_map"] == {n: file for file, tensors in stored.items() for n in tensors}
    total = sum(tensor.nbytes for tensors in stored.values() for tensor in tensors.values())
    assert index["metadata"]["total_size"] == total
    assert (out / "tokenizer.json").read_text() == "{}"
    assert not (out / "notes.txt").exists()
    excluded = ["*mlp.gate", "lm_head", *(f"model.layers.{n}.self_attn*" for n in range(3))]
    excluded.append("model.layers.3*")
    quantization = json.loads((out / "hf_quant_config.json").read_text())["quantization"]
    assert quantization["quant_algo"] == "NVFP4"
    assert quantization["group_size"] == 16
    assert quantization["exclude_modules"] == excluded
    config = json.loads((out / "config.json").read_text())
    assert config.pop("quantization_config")["quant_method"] == "modelopt"
    original = json.loads((folder / "config.json").read_text())
    assert original.pop("quantization_config")["quant_method"] == "fp8"
    assert config == original


def test_summary(tmp_path: Path) -> None:
    folder = source(BF16, tmp_path)
    calls: list[tuple[int, int]] = []
    summary = quantize(
        folder, tmp_path / "out", attention="fp8", progress=lambda *done: calls.append(done)
    )
    tensors = read_tensors(folder)
    assert summary["bytes_in"] == sum(tensor.nbytes for tensor in tensors.values())
    assert calls[-1] == (summary["bytes_in"], summary["bytes_in"])
    assert calls == sorted(calls)
    assert summary["bytes_out"] == sum(t.nbytes for t in read_tensors(tmp_path / "out").values())
    assert summary["matrices"] == {
        "nvfp4": sum(bool(MLP.fullmatch(name)) for name in tensors),
        "fp8": sum(bool(ATTENTION.fullmatch(name)) for name in tensors),
    }
    assert summary["kept"] == []
    weights, decoded = dequantized_weights(folder), dequantized_weights(tmp_path / "out")
    experts = [name for name in weights if ".mlp.experts." in name]
    error = sum(np.sum((decoded[n].astype(float) - weights[n]) ** 2) for n in experts)
    squares = sum(np.sum(weights[n].astype(float) ** 2) for n in experts)
    assert summary["relative_rms_error"]["routed experts"] == pytest.approx(
        (error / squares) ** 0.5, rel=1e-4
    )
    assert set(summary["relative_rms_error"]) == {
        *("attention", "dense MLP", "routed experts", "shared experts")
    }


def test_threads_do_not_change_the_bytes(tmp_path: Path) -> None:
    folder = source(BF16, tmp_path)
    for threads in (1, 5):
        quantize(folder, tmp_path / f"out{threads}", attention="nvfp4", threads=threads)
    for path in (tmp_path / "out1").iterdir():
        assert path.read_bytes() == (tmp_path / "out5" / path.name).read_bytes()


def test_widths_that_are_no_multiple_of_16_are_kept(tmp_path: Path) -> None:
    case = replace(BF16, config={"moe_intermediate_size": 72})
    folder = source(case, tmp_path)
    summary = quantize(folder, tmp_path / "out", attention="nvfp4")
    before, after = read_tensors(folder), read_tensors(tmp_path / "out")
    kept = {n for n in before if re.search(r"(experts\.\d+|shared_experts)\.down_proj\.weight$", n)}
    assert {f"{module}.weight" for module in summary["kept"]} == kept
    assert all(after[name].tobytes() == before[name].tobytes() for name in kept)
    quantization = json.loads((tmp_path / "out/hf_quant_config.json").read_text())["quantization"]
    assert set(summary["kept"]) < set(quantization["exclude_modules"])
    assert summary["matrices"]["bf16"] == len(kept)


def test_an_all_zero_matrix(tmp_path: Path) -> None:
    folder = source(BF16, tmp_path, shards=1)
    name = "model.layers.0.mlp.down_proj.weight"
    patch_first_row(folder, name, 0x0000, rows=None)
    quantize(folder, tmp_path / "out")
    after = read_tensors(tmp_path / "out")
    assert after[f"{name}_scale_2"] == 1.0
    assert not dequantized_weights(tmp_path / "out")[name].any()


def patch_first_row(folder: Path, name: str, code: int, rows: int | None = 1) -> None:
    """Overwrite the first `rows` rows (None: all) of a BF16 tensor with one value."""
    (path,) = folder.glob("*.safetensors")
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    entry = json.loads(data[8:start])[name]
    first, last = entry["data_offsets"]
    count = (last - first) // 2 if rows is None else rows * entry["shape"][1]
    data[start + first : start + first + 2 * count] = code.to_bytes(2, "little") * count
    path.write_bytes(data)


@pytest.mark.parametrize("code", [0x7FC0, 0x7F80, 0xFF80], ids=["NaN", "inf", "-inf"])
@pytest.mark.parametrize("existed", [False, True])
def test_values_that_are_not_finite(tmp_path: Path, code: int, existed: bool) -> None:
    folder = source(BF16, tmp_path, shards=1)
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    patch_first_row(folder, name, code)
    if existed:
        (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="not finite") as error:
        quantize(folder, tmp_path / "out")
    assert error.value.tensor == name
    assert error.value.offset > 0
    # What was there before is there again, and no more.
    assert (tmp_path / "out").exists() == existed
    assert not existed or not list((tmp_path / "out").iterdir())


def test_an_error_in_the_progress_callback_leaves_nothing(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(source(BF16, tmp_path), tmp_path / "out", progress=stop)
    assert not (tmp_path / "out").exists()


def test_what_is_copied_is_read_first_and_is_a_small_file(tmp_path: Path) -> None:
    folder = source(BF16, tmp_path)
    (folder / "LICENSES").mkdir()
    (folder / "LICENSE").write_bytes(b"may be copied")
    (folder / "tokenizer.json").unlink(missing_ok=True)
    (folder / "tokenizer.json").symlink_to("/dev/zero")

    def too_late(done: int, total: int) -> None:
        raise AssertionError("the weights came first")

    with pytest.raises(CheckpointError, match=r"tokenizer\.json' is not a regular file"):
        quantize(folder, tmp_path / "out", progress=too_late)
    (folder / "tokenizer.json").unlink()
    quantize(folder, tmp_path / "out")
    assert (tmp_path / "out/LICENSE").read_bytes() == b"may be copied"


def test_a_destination_in_use(tmp_path: Path) -> None:
    folder = source(BF16, tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious").write_text("data")
    for destination in (tmp_path / "out", tmp_path / "out/precious", folder):
        with pytest.raises(ParameterError, match="empty folder") as error:
            quantize(folder, destination)
        assert error.value.parameter == "destination"
    assert (tmp_path / "out/precious").read_text() == "data"


def test_a_full_disk_is_noticed_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr("dsfp4.quantize.run.shutil.disk_usage", lambda _: Usage)
    with pytest.raises(IoError, match="1000 bytes free"):
        quantize(source(BF16, tmp_path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["v3-nvfp4-real", "v3-compressed_tensors"])
def test_fp4_sources_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UnsupportedError, match="FP4 already"):
        quantize(source(CASES[name], tmp_path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_incomplete_sources_are_refused(tmp_path: Path) -> None:
    folder = source(BF16, tmp_path)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00003"):
        quantize(folder, tmp_path / "out")


def test_bad_parameters(tmp_path: Path) -> None:
    folder = source(BF16, tmp_path)
    with pytest.raises(ParameterError, match="attention must be keep, fp8 or nvfp4"):
        quantize(folder, tmp_path / "out", attention="int8")  # type: ignore[arg-type]
    with pytest.raises(ParameterError, match="threads"):
        quantize(folder, tmp_path / "out", threads=-1)
    with pytest.raises(IoError, match="nowhere"):
        quantize(tmp_path / "nowhere", tmp_path / "out")


def test_an_unfinished_file_is_not_committed(tmp_path: Path) -> None:
    spec = TensorSpec("a", "F32", (2,), 8)
    with (
        pytest.raises(RuntimeError, match="4 bytes"),
        ShardWriter(tmp_path / "x.safetensors", [spec]) as writer,
    ):
        writer.write("a", 0, memoryview(bytes(4)))
        writer.commit()
    assert not list(tmp_path.iterdir())
