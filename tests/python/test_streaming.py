"""Models of which RAM does not hold even the dense weights, and what is checked of what is read."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dsfp4
from dsfp4.errors import CheckpointError, MemoryLimitError
from dsfp4.verify import verify
from fixtures.checkpoint_io import flip, place_of

CONTEXT = 64
EXPERT = "model.layers.3.mlp.experts.5.up_proj"
ATTENTION = "model.layers.4.self_attn.kv_a_proj_with_mqa.weight"


def load(folder: Path, **options: Any) -> dsfp4.Model:
    options = {"threads": 1, "max_context": CONTEXT, "warm_start": False, **options}
    return dsfp4.Model(folder, **options)


def load_near_the_floor(folder: Path, spare: float = 0.0, **options: Any) -> dsfp4.Model:
    """Load with `spare` GB more than is needed at least, which an error tells.

    What Python itself takes is part of that, and changes between two calls.
    """
    if "libasan" in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("a sanitizer's own memory grows from load to load, and with it the floor")
    limit = 1e-3
    for _ in range(10):
        try:
            return load(folder, ram_limit=limit, **options)
        except MemoryLimitError as error:
            limit = error.needed / 1e9 + 1e-4 + spare
    raise AssertionError("the floor rises and rises")


def ids_of(model: dsfp4.Model, count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(2, model.config["vocab_size"], count)


def layers(model: dsfp4.Model) -> int:
    """MoE layers."""
    return int(model.config["num_hidden_layers"] - model.config["first_k_dense_replace"])


@pytest.fixture(scope="module")
def whole(demo_model: Path) -> dsfp4.Model:
    model = load(demo_model)
    assert model.stats()["streamed_layers"] == 0
    return model


@pytest.fixture
def folder(demo_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo_model, tmp_path / "checkpoint"))


def test_below_the_floor_everything_streams_and_below_that_nothing_loads(
    demo_model: Path, whole: dsfp4.Model
) -> None:
    model = load_near_the_floor(demo_model)
    stats = model.stats()
    assert stats["streamed_layers"] == whole.config["num_hidden_layers"]
    assert stats["tiered"]
    ids = ids_of(whole, 40)
    assert np.array_equal(model.forward(ids), whole.forward(ids))
    first = model.stats()["streamed_bytes"]
    assert np.array_equal(model.forward(ids[:3], decode=True), whole.forward(ids[:3], decode=True))
    assert model.stats()["streamed_bytes"] == 4 * first  # one pass for the prompt, three for tokens
    with pytest.raises(MemoryLimitError, match="raise ram_limit") as error:
        load(demo_model, ram_limit=1e-3)
    with pytest.raises(MemoryLimitError, match="raise ram_limit"):
        load(demo_model, ram_limit=error.value.needed / 1e9 - 0.02)


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    spare=st.floats(0, 8e-3),
    options=st.fixed_dictionaries(
        {
            "prefetch_layers": st.one_of(st.none(), st.integers(0, 3)),
            "reader": st.sampled_from(["auto", "pread"]),
            "direct_reads": st.booleans(),
        }
    ),
    count=st.integers(1, 40),
    decode=st.booleans(),
)
def test_streaming_changes_no_bit(
    demo_model: Path,
    whole: dsfp4.Model,
    spare: float,
    options: dict[str, Any],
    count: int,
    decode: bool,
) -> None:
    model = load_near_the_floor(demo_model, spare, **options)
    ids = ids_of(whole, count, count)
    for _ in range(2):
        assert np.array_equal(model.forward(ids, decode=decode), whole.forward(ids, decode=decode))


def test_cancelled_in_a_streamed_layer(demo_model: Path, whole: dsfp4.Model) -> None:
    model = load_near_the_floor(demo_model)
    ids = ids_of(whole, 30)
    expected = whole.generate(ids, max_tokens=6, stop_ids=[]).tokens
    for stop_at in range(1, 5):
        calls = iter(range(1000))

        def on_prefill(done: int, total: int, calls: Any = calls, last: int = stop_at) -> bool:
            return next(calls) < last

        cancelled = model.generate(ids, max_tokens=6, stop_ids=[], on_prefill=on_prefill)
        assert cancelled.finish_reason == "cancelled"
        assert model.generate(ids, max_tokens=6, stop_ids=[]).tokens == expected


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("tensor", [f"{EXPERT}.weight", f"{EXPERT}.weight_scale", ATTENTION])
def test_checksums_are_compared_whenever_a_tensor_is_read(
    folder: Path, whole: dsfp4.Model, tensor: str, streamed: bool
) -> None:
    verify(folder, write=True)
    flip(folder, tensor)

    def loaded() -> dsfp4.Model:
        return load_near_the_floor(folder) if streamed else load(folder, cpu_cache_size=0)

    forced = np.broadcast_to(np.arange(4, 8), (layers(whole), 3, 4))
    ids = ids_of(whole, 3)
    for _ in range(2):  # not found, and not believed the second time
        with pytest.raises(CheckpointError, match="checksum") as error:
            loaded().forward(ids, experts=forced)
        assert error.value.tensor == tensor
        assert Path(error.value.file).parent == folder
    if tensor != ATTENTION:  # another choice does not meet it
        other = np.broadcast_to(np.arange(8, 12), forced.shape)
        model = loaded()
        with pytest.raises(CheckpointError):
            model.forward(ids, experts=forced)
        expected = whole.forward(ids, experts=other)
        assert np.array_equal(model.forward(ids, experts=other), expected)


def test_a_block_scale_that_is_nan_is_found_when_its_expert_is_read(
    folder: Path, whole: dsfp4.Model
) -> None:
    tensor = f"{EXPERT}.weight_scale"
    path, offset = place_of(folder, tensor)
    data = bytearray(path.read_bytes())
    data[offset + 9] = 0x7F  # NaN in E4M3
    path.write_bytes(data)
    model = load(folder, cpu_cache_size=0)
    forced = np.broadcast_to(np.arange(4, 8), (layers(whole), 3, 4))
    with pytest.raises(CheckpointError, match="NaN") as error:
        model.forward(ids_of(whole, 3), experts=forced)
    assert (error.value.tensor, error.value.offset) == (tensor, offset + 9)


def test_a_trace(demo_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    model = load_near_the_floor(demo_model, trace=path)
    model.generate(ids_of(model, 20), max_tokens=3, stop_ids=[])
    stats = model.stats()
    del model
    events = json.loads(path.read_text())
    tracks = {
        event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"
    }
    spans: dict[str, list[dict[str, Any]]] = {name: [] for name in tracks.values()}
    for event in events:
        if event["ph"] in "Xb":
            spans[tracks[event["tid"]]].append(event)
    assert [span["name"] for span in spans["steps"]] == [
        "prefill 20 at 0",
        "decode 1 at 20",
        "decode 1 at 21",
    ]
    assert sum(span["dur"] for span in spans["waits"]) / 1e6 == pytest.approx(
        stats["wait_seconds"] + stats["stream_wait_seconds"], rel=0.1, abs=2e-3
    )
    assert {span["name"].split()[0] for span in spans["CPU"]} == {"layer"}
    read = sum(span["args"]["bytes"] for span in spans["SSD"] if "args" in span)
    assert read >= stats["demand_bytes"] + stats["streamed_bytes"]
    begun = {event["id"] for event in events if event["ph"] == "b"}
    assert begun == {event["id"] for event in events if event["ph"] == "e"}
    with pytest.raises(dsfp4.errors.IoError, match="trace"):
        load(demo_model, trace=tmp_path / "no" / "folder")


PEAK = """
import json, sys
import numpy as np
import dsfp4
from dsfp4 import DeepseekInference

def kib(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))

open("/proc/self/clear_refs", "w").write("5")  # VmHWM starts again
baseline = kib("VmRSS") * 1024
model = dsfp4.Model(sys.argv[1], ram_limit=float(sys.argv[2]) or None, max_context=1024,
                    warm_start=False)
model.generate(np.arange(2, 302), max_tokens=8, stop_ids=[])
stats = model.stats()
print(json.dumps({"baseline": baseline, "peak": kib("VmHWM") * 1024,
                  "reserved": stats["reserved_bytes"], "streamed": stats["streamed_layers"]}))
"""


def test_peak_memory_at_six_limits(demo_model: Path) -> None:
    def run(limit: float) -> dict[str, int]:
        done = subprocess.run(
            [sys.executable, "-c", PEAK, str(demo_model), str(limit)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise AssertionError(done.stderr)
        return dict(json.loads(done.stdout))

    with pytest.raises(AssertionError, match="MemoryLimitError") as error:
        run(0.001)
    words = str(error.value).split()
    least = float(words[words.index("need") + 1])
    streamed = set()
    for spare in (0.001, 0.003, 0.005, 0.007, 0.02, 1.0):
        used = run(least + spare)
        assert used["peak"] <= used["baseline"] + used["reserved"] + 128e6
        assert used["peak"] <= (least + spare) * 1e9
        streamed.add(used["streamed"])
    assert len(streamed) > 1
