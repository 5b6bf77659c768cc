"""Checkpoint folders as they come: the accepted oddities of real ones, and malformed ones by hand.

A malformed folder is a small sound one with one thing changed. The error must be a CheckpointError
(or UnsupportedError) that names the file or tensor at fault.
"""

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
from dsfp4.errors import CheckpointError, Dsfp4Error, IoError, UnsupportedError
from fixtures.checkpoint_io import read_shard, write_shard

INDEX = "model.safetensors.index.json"
SHARD = "model-00001-of-00003.safetensors"
EXPERT = "model.layers.1.mlp.experts.3.up_proj"


@pytest.fixture
def folder(random_checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of a small NVFP4 checkpoint with an MTP layer, to be changed."""
    return Path(shutil.copytree(random_checkpoint("v3-nvfp4-mtp"), tmp_path / "checkpoint"))


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def shard_of(folder: Path, tensor: str) -> Path:
    for path in sorted(folder.glob("*.safetensors")):
        if tensor in read_shard(path):
            return path
    raise AssertionError(tensor)


def edit_tensor(folder: Path, name: str, change: Callable[[Any], Any]) -> None:
    """Replaces a tensor; None takes it out of the shard."""
    path = shard_of(folder, name)
    tensors = read_shard(path)
    changed = change(tensors.pop(name))
    if changed is not None:
        tensors[name] = changed
    else:
        edit_json(folder / INDEX, lambda index: index["weight_map"].pop(name, None))
    write_shard(path, tensors)


def edit_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrites the header and leaves the data as it is."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[start:])


def logits(folder: Path) -> Any:
    return dsfp4.Model(folder, device="reference").forward(range(1, 9))


# --- accepted ------------------------------------------------------------------------------------


def test_scales_missing_from_the_index(folder: Path) -> None:
    before = logits(folder)
    edit_json(
        folder / INDEX,
        lambda index: [
            index["weight_map"].pop(name) for name in list(index["weight_map"]) if "_scale" in name
        ],
    )
    np.testing.assert_array_equal(logits(folder), before)


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_global_scale_as_scalar_or_vector_f32_or_bf16(
    folder: Path, shape: tuple[int, ...], dtype: Any
) -> None:
    name = f"{EXPERT}.weight_scale_2"
    edit_tensor(folder, name, lambda old: old.astype(dtype).reshape(shape))
    rounded = logits(folder)
    edit_tensor(folder, name, lambda old: old.astype(np.float32).reshape(()))
    np.testing.assert_array_equal(rounded, logits(folder))


def test_no_quantization_config_anywhere(folder: Path) -> None:
    before = logits(folder)
    edit_json(folder / "config.json", lambda config: config.pop("quantization_config", None))
    (folder / "hf_quant_config.json").unlink()
    np.testing.assert_array_equal(logits(folder), before)


def test_no_index(folder: Path) -> None:
    before = logits(folder)
    (folder / INDEX).unlink()
    np.testing.assert_array_equal(logits(folder), before)


def test_shards_of_the_mtp_layer_may_be_absent(folder: Path) -> None:
    before = logits(folder)
    mtp: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors = read_shard(path)
        mtp |= {n: t for n, t in tensors.items() if n.startswith("model.layers.3.")}
        write_shard(path, {n: t for n, t in tensors.items() if n not in mtp})
    assert mtp, "the fixture has no MTP layer"
    edit_json(
        folder / INDEX,
        lambda index: index["weight_map"].update(dict.fromkeys(mtp, "model-00004.safetensors")),
    )
    np.testing.assert_array_equal(logits(folder), before)


def test_links_to_shards_are_followed(folder: Path) -> None:
    before = logits(folder)
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for path in folder.glob("*.safetensors"):
        path.rename(blobs / path.name)
        path.symlink_to(blobs / path.name)
    np.testing.assert_array_equal(logits(folder), before)


def test_k_scale_serves_the_fp8_cache_alone(folder: Path) -> None:
    _, experts = dsfp4.Model(folder).forward(range(1, 9), return_experts=True)

    def forced(dtype: str) -> Any:
        model = dsfp4.Model(folder, device="reference", kv_cache_dtype=dtype)
        return model.forward(range(1, 9), experts=experts)

    def with_k_scale(scale: float) -> None:
        names = [f"model.layers.{layer}.self_attn.k_proj.k_scale" for layer in range(3)]
        tensors = read_shard(folder / SHARD) | dict.fromkeys(names, np.float32(scale))
        write_shard(folder / SHARD, tensors)

    exact, plain = forced("bf16"), forced("fp8")
    with_k_scale(0.5)  # a power of two: other values round to zero, the rest is the same
    assert np.linalg.norm(forced("fp8") - plain) < 0.05 * np.linalg.norm(plain)
    with_k_scale(1e6)  # every latent rounds to zero
    assert np.linalg.norm(forced("fp8") - plain) > 0.2 * np.linalg.norm(plain)
    np.testing.assert_array_equal(forced("bf16"), exact)


# --- malformed -----------------------------------------------------------------------------------


def config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", change)


def field(name: str, value: Any) -> Callable[[Path], None]:
    return config(lambda c: c.update({name: value}))


def index(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / INDEX, change)


def header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda folder: edit_header(folder / SHARD, change)


def first(h: dict[str, Any]) -> dict[str, Any]:
    """The entry of the first tensor in a header."""
    return next(entry for name, entry in h.items() if name != "__metadata__")


def data(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes())) and None


def tensor(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    return lambda folder: edit_tensor(folder, name, change)


def put(index: int, value: float) -> Callable[[Any], Any]:
    def change(old: Any) -> Any:
        changed = old.copy()
        changed[index] = value
        return changed

    return change


def add_shard(folder: Path, name: str, values: Any) -> None:
    """A tensor in a shard of its own, which the index knows."""
    write_shard(folder / "model-more.safetensors", {name: values})
    index(lambda i: i["weight_map"].update({name: "model-more.safetensors"}))(folder)


def beside(module: str, part: str) -> Callable[[Path], None]:
    """A tensor more in the module of a matrix."""
    values = np.ones(128, ml_dtypes.bfloat16)
    return lambda folder: add_shard(folder, f"{module}.{part}", values)


def deep(levels: int) -> bytes:
    return b'{"a":' * levels + b"1" + b"}" * levels


def with_length(length: int) -> Callable[[bytes], bytes]:
    return lambda old: length.to_bytes(8, "little") + old[8:]


def shift_last(h: dict[str, Any], by: int) -> None:
    last = max(
        (e for n, e in h.items() if n != "__metadata__"), key=lambda e: int(e["data_offsets"][1])
    )
    last["data_offsets"] = [o + by for o in last["data_offsets"]]


def twice(old: bytes) -> bytes:
    """The header's first entry, once more at its end."""
    start = 8 + int.from_bytes(old[:8], "little")
    name, entry = list(json.loads(old[8:start]).items())[1]
    text = old[8:start].rstrip()[:-1] + f",{json.dumps(name)}:{json.dumps(entry)}}}".encode()
    return len(text).to_bytes(8, "little") + text + old[start:]


def elsewhere(folder: Path) -> None:
    """The same tensor in a second shard."""
    name, values = next(iter(read_shard(folder / SHARD).items()))
    add_shard(folder, name, values)


MALFORMED: dict[str, tuple[Callable[[Path], None], str]] = {
    # safetensors: sizes
    "empty file": (data(SHARD, lambda old: b""), SHARD),
    "seven bytes": (data(SHARD, lambda old: old[:7]), SHARD),
    "length only": (data(SHARD, lambda old: old[:8]), SHARD),
    "length zero": (data(SHARD, with_length(0)), SHARD),
    "length one less": (
        data(SHARD, lambda old: with_length(int.from_bytes(old[:8], "little") - 1)(old)),
        SHARD,
    ),
    "length over the file": (data(SHARD, with_length(99_000_000)), SHARD),
    "length over the limit": (data(SHARD, with_length(100_000_001)), SHARD),
    "length 2^63": (data(SHARD, with_length(2**63)), SHARD),
    "length 2^64 - 1": (data(SHARD, with_length(2**64 - 1)), SHARD),
    "truncated in the header": (data(SHARD, lambda old: old[:100]), SHARD),
    "truncated by one byte": (data(SHARD, lambda old: old[:-1]), "truncated"),
    "truncated in the middle": (data(SHARD, lambda old: old[: len(old) // 2]), "truncated"),
    "one byte too many": (data(SHARD, lambda old: old + b"x"), SHARD),
    # safetensors: JSON
    "not JSON": (data(SHARD, lambda old: (2).to_bytes(8, "little") + b"xx"), SHARD),
    "a list": (data(SHARD, lambda old: (2).to_bytes(8, "little") + b"[]"), SHARD),
    "bad UTF-8": (data(SHARD, lambda old: old.replace(b"model.", b"mode\xff.", 1)), SHARD),
    "control character": (data(SHARD, lambda old: old.replace(b"model.", b"mode\x01.", 1)), SHARD),
    "deep JSON": (
        data(SHARD, lambda old: len(deep(500)).to_bytes(8, "little") + deep(500)),
        SHARD,
    ),
    "a tensor twice": (data(SHARD, twice), "twice"),
    "a tensor in two files": (elsewhere, "as well"),
    # safetensors: entries
    "no dtype": (header(lambda h: first(h).pop("dtype")), SHARD),
    "no shape": (header(lambda h: first(h).pop("shape")), SHARD),
    "no offsets": (header(lambda h: first(h).pop("data_offsets")), SHARD),
    "unknown dtype": (header(lambda h: h["model.embed_tokens.weight"].update(dtype="F4")), "F4"),
    "dtype a number": (header(lambda h: first(h).update(dtype=4)), SHARD),
    "other dtype": (header(lambda h: first(h).update(dtype="F64")), SHARD),
    "unknown field": (header(lambda h: first(h).update(strides=[1])), "strides"),
    "entry a string": (header(lambda h: h.update(x="y")), "x"),
    "entry null": (header(lambda h: h.update(x=None)), "x"),
    "shape negative": (header(lambda h: first(h).update(shape=[-1, 4])), SHARD),
    "shape fractional": (header(lambda h: first(h).update(shape=[1.5])), SHARD),
    "shape a string": (header(lambda h: first(h).update(shape=["4"])), SHARD),
    "shape overflows": (header(lambda h: first(h).update(shape=[2**62, 2**62])), SHARD),
    "shape 2^64": (header(lambda h: first(h).update(shape=[2**64])), SHARD),
    "shape nested": (header(lambda h: first(h).update(shape=[[1]])), SHARD),
    "shape of 100 dimensions": (header(lambda h: first(h).update(shape=[1] * 100)), SHARD),
    "offsets one number": (header(lambda h: first(h).update(data_offsets=[0])), SHARD),
    "offsets three numbers": (header(lambda h: first(h).update(data_offsets=[0, 1, 2])), SHARD),
    "offsets backwards": (header(lambda h: first(h)["data_offsets"].reverse()), SHARD),
    "offsets negative": (header(lambda h: first(h).update(data_offsets=[-2, 2])), SHARD),
    "offsets 2^63": (header(lambda h: first(h).update(data_offsets=[0, 2**63])), SHARD),
    "size one less": (
        header(lambda h: first(h)["data_offsets"].__setitem__(1, first(h)["data_offsets"][1] - 1)),
        SHARD,
    ),
    "an overlap": (header(lambda h: shift_last(h, -2)), SHARD),
    "beyond the file": (header(lambda h: shift_last(h, 2)), SHARD),
    "a hole": (header(lambda h: h.pop(list(h)[2])), SHARD),
    "metadata a number": (header(lambda h: h.update(__metadata__={"a": 1})), "__metadata__"),
    # index
    "index not JSON": (data(INDEX, lambda old: old[:-5]), INDEX),
    "index a list": (data(INDEX, lambda old: b"[]"), INDEX),
    "index without map": (index(lambda i: i.pop("weight_map")), "weight_map"),
    "map a list": (index(lambda i: i.update(weight_map=[])), "weight_map"),
    "shard name a path": (index(lambda i: i["weight_map"].update(x="../a.safetensors")), "x"),
    "shard name absolute": (index(lambda i: i["weight_map"].update(x="/a.safetensors")), "x"),
    "shard name with NUL": (index(lambda i: i["weight_map"].update(x="a\0.safetensors")), "x"),
    "shard name empty": (index(lambda i: i["weight_map"].update(x="")), "x"),
    "shard name a number": (index(lambda i: i["weight_map"].update(x=1)), "x"),
    "tensor not in its shard": (
        header(lambda h: h.update({"mtp.x": h.pop("model.embed_tokens.weight")})),
        "places this tensor",
    ),
    # config
    "config empty": (data("config.json", lambda old: b""), "config.json"),
    "config twice the key": (
        data("config.json", lambda old: b'{"hidden_size":1,' + old[1:]),
        "hidden_size",
    ),
    "config deep": (data("config.json", lambda old: deep(1000)), "config.json"),
    "layers zero": (field("num_hidden_layers", 0), "num_hidden_layers"),
    "layers negative": (field("num_hidden_layers", -3), "num_hidden_layers"),
    "layers huge": (field("num_hidden_layers", 2**63), "num_hidden_layers"),
    "layers fractional": (field("num_hidden_layers", 2.5), "num_hidden_layers"),
    "layers a string": (field("num_hidden_layers", "3"), "num_hidden_layers"),
    "layers true": (field("num_hidden_layers", True), "num_hidden_layers"),
    "hidden missing": (config(lambda c: c.pop("hidden_size")), "hidden_size"),
    "hidden null": (field("hidden_size", None), "hidden_size"),
    "groups do not divide": (field("n_group", 7), "n_group"),
    "more groups kept than there are": (field("topk_group", 99), "topk_group"),
    "more experts a token than there are": (field("num_experts_per_tok", 99), "num_experts"),
    "rope dimension odd": (field("qk_rope_head_dim", 21), "qk_rope_head_dim"),
    "eps zero": (field("rms_norm_eps", 0), "rms_norm_eps"),
    "eps huge": (field("rms_norm_eps", 1e300), "rms_norm_eps"),
    "theta negative": (field("rope_theta", -1), "rope_theta"),
    "YaRN without factor": (
        config(lambda c: c["rope_scaling"].pop("factor")),
        "factor",
    ),
    # roles
    "more layers than tensors": (field("num_hidden_layers", 9), "model.layers."),
    "other hidden size": (field("hidden_size", 64), "it must be"),
    "a missing weight": (tensor(f"{EXPERT}.weight", lambda old: None), f"{EXPERT}.weight"),
    "a missing scale": (
        tensor(f"{EXPERT}.weight_scale", lambda old: None),
        f"{EXPERT}.weight_scale",
    ),
    "a missing global scale": (
        tensor(f"{EXPERT}.weight_scale_2", lambda old: None),
        f"{EXPERT}.weight_scale_2",
    ),
    "a scale of the wrong shape": (
        tensor(f"{EXPERT}.weight_scale", lambda old: np.ascontiguousarray(old[:, :-1])),
        f"{EXPERT}.weight_scale",
    ),
    "a scale of the wrong dtype": (
        tensor(f"{EXPERT}.weight_scale", lambda old: old.view(np.uint8)),
        f"{EXPERT}.weight_scale",
    ),
    "a weight of the wrong shape": (
        tensor(f"{EXPERT}.weight", lambda old: np.ascontiguousarray(old[:-1])),
        f"{EXPERT}.weight",
    ),
    "a norm of the wrong length": (
        tensor("model.norm.weight", lambda old: old[:-1].copy()),
        "model.norm.weight",
    ),
    "global scale NaN": (
        tensor(f"{EXPERT}.weight_scale_2", lambda old: np.float32(np.nan)),
        f"{EXPERT}.weight_scale_2",
    ),
    "global scale zero": (
        tensor(f"{EXPERT}.weight_scale_2", lambda old: np.float32(0)),
        f"{EXPERT}.weight_scale_2",
    ),
    "a norm with a NaN": (
        tensor("model.norm.weight", put(5, np.nan)),
        "value 5 of 128",
    ),
    "a router's bias infinite": (
        tensor("model.layers.1.mlp.gate.e_score_correction_bias", put(5, np.inf)),
        "value 5 of 16",
    ),
    "global scale infinite": (
        tensor(f"{EXPERT}.weight_scale_2", lambda old: np.float32(np.inf)),
        f"{EXPERT}.weight_scale_2",
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed(folder: Path, name: str) -> None:
    change, named = MALFORMED[name]
    change(folder)
    with pytest.raises(CheckpointError) as caught:
        dsfp4.Model(folder)
    facts = f"{caught.value} {caught.value.file} {caught.value.tensor}"
    assert named in facts
    assert caught.value.file, "the error names no file"


UNSUPPORTED: dict[str, tuple[Callable[[Path], None], str]] = {
    "V3.2": (field("model_type", "deepseek_v32"), "deepseek_v32"),
    "V4": (field("model_type", "deepseek_v4"), "deepseek_v4"),
    "llama": (field("model_type", "llama"), "llama"),
    "biases": (field("attention_bias", True), "attention_bias"),
    "activation": (field("hidden_act", "gelu"), "gelu"),
    "linear rope": (config(lambda c: c["rope_scaling"].update(type="linear")), "linear"),
    "every second layer": (field("moe_layer_freq", 2), "moe_layer_freq"),
    "AWQ": (beside(EXPERT, "pre_quant_scale"), "NVFP4 without AWQ is"),
    "SVDQuant": (beside(EXPERT, "weight_quantizer._svdquant_lora_a"), "NVFP4 without SVDQuant is"),
    "a rotation": (beside(EXPERT, "v_input.weight"), "without transforms"),
    "a zero point": (beside(EXPERT, "weight_zero_point"), "weight_zero_point"),
    "rotations": (
        config(lambda c: c.update(quantization_config={"transform_config": {"R1": 1}})),
        "transform_config",
    ),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported(folder: Path, name: str) -> None:
    change, named = UNSUPPORTED[name]
    change(folder)
    with pytest.raises(UnsupportedError, match=named):
        dsfp4.Model(folder)


def test_missing_shard_is_named(folder: Path) -> None:
    (folder / SHARD).unlink()
    with pytest.raises(CheckpointError, match=SHARD):
        dsfp4.Model(folder)


def test_missing_folder_and_files(tmp_path: Path) -> None:
    with pytest.raises(IoError, match="is not a folder"):
        dsfp4.Model(tmp_path / "absent")
    with pytest.raises(Dsfp4Error, match=r"config\.json"):
        dsfp4.Model(tmp_path)


def test_a_file_cut_after_its_header_was_read(folder: Path) -> None:
    path = folder / SHARD
    catalogue = _core.Catalogue(str(folder))
    assert catalogue.tensors
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="truncated"):
        dsfp4.Model(folder)
