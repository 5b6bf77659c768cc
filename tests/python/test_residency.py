"""Models whose experts stay in their files: the same bits as one that is loaded whole."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dsfp4
from dsfp4 import _core
from dsfp4.errors import MemoryLimitError, ParameterError

CASE = "v3-nvfp4-real"
POLICIES = _core.policy_names()


@pytest.fixture(scope="module")
def folder(random_checkpoint: Callable[[str], Path]) -> Path:
    return random_checkpoint(CASE)


@pytest.fixture(scope="module")
def whole(folder: Path) -> dsfp4.Model:
    model = dsfp4.Model(folder, threads=1, max_context=128)
    assert not model.stats()["tiered"]
    return model


def tiered(folder: Path, slots: float = 9, **options: Any) -> dsfp4.Model:
    """A model with room for `slots` cached experts of 32."""
    options = {"threads": 1, "max_context": 128, "warm_start": False, **options}
    probe = slot_bytes(folder)
    options.setdefault("prefetch_size", 8.1 * probe / 1e9)
    model = dsfp4.Model(folder, cpu_cache_size=(slots + 0.1) * probe / 1e9, **options)
    assert model.stats()["tiered"]
    assert model.stats()["cache_slots"] == slots
    return model


_SLOT_BYTES: dict[Path, int] = {}


def slot_bytes(folder: Path) -> int:
    if folder not in _SLOT_BYTES:
        model = dsfp4.Model(folder, threads=1, max_context=8, cpu_cache_size=0, warm_start=False)
        _SLOT_BYTES[folder] = model.stats()["slot_bytes"]
    return _SLOT_BYTES[folder]


def random_ids(model: dsfp4.Model, count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(2, model.config["vocab_size"], count)


@pytest.mark.parametrize("decode", [False, True])
def test_the_same_bits_as_loaded_whole(folder: Path, whole: dsfp4.Model, decode: bool) -> None:
    model = tiered(folder)
    ids = random_ids(whole, 40)
    logits, experts = model.forward(ids, return_experts=True, decode=decode)
    expected = whole.forward(ids, return_experts=True, decode=decode)
    assert np.array_equal(logits, expected[0])
    assert np.array_equal(experts, expected[1])
    stats = model.stats()
    assert stats["misses"] > 0
    assert stats["demand_bytes"] > 0
    assert stats["used_bytes"] >= stats["demand_bytes"]


RESIDENCY = st.fixed_dictionaries(
    {
        "slots": st.integers(0, 31),
        "staging": st.integers(1, 12),
        "cache_policy": st.sampled_from(POLICIES),
        "prefetch_layers": st.one_of(st.none(), st.integers(0, 2)),
        "reader": st.sampled_from(["auto", "pread"]),
        "direct_reads": st.booleans(),
        "decode": st.booleans(),
        "prompt": st.integers(1, 40),
        "seed": st.integers(0, 3),
    }
)


def check_bits(folder: Path, whole: dsfp4.Model, wanted: dict[str, Any]) -> None:
    decode, count = wanted.pop("decode"), wanted.pop("prompt")
    ids = random_ids(whole, count, wanted.pop("seed"))
    staging = wanted.pop("staging") * slot_bytes(folder) * 1.001 / 1e9
    model = tiered(folder, wanted.pop("slots"), prefetch_size=staging, **wanted)
    for _ in range(2):  # from an empty cache, and from what that left
        assert np.array_equal(model.forward(ids, decode=decode), whole.forward(ids, decode=decode))


_SETTINGS = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


@settings(max_examples=25, **_SETTINGS)
@given(wanted=RESIDENCY)
def test_residency_changes_no_bit(folder: Path, whole: dsfp4.Model, wanted: dict[str, Any]) -> None:
    check_bits(folder, whole, wanted)


@pytest.mark.full
@settings(max_examples=500, **_SETTINGS)
@given(wanted=RESIDENCY)
def test_five_hundred_residencies_change_no_bit(
    folder: Path, whole: dsfp4.Model, wanted: dict[str, Any]
) -> None:
    check_bits(folder, whole, wanted)


def test_misses_are_those_of_the_replay(folder: Path, whole: dsfp4.Model) -> None:
    ids = random_ids(whole, 100)
    _, logits = whole.routing_trace(ids, decode=True)
    bias = np.stack(
        [np.frombuffer(tensor, np.float32) for tensor in router_biases(folder, whole.config)]
    )
    scores = (1 / (1 + np.exp(-logits)) + bias[:, None, :]).astype(np.float32)
    for policy in POLICIES:
        model = tiered(folder, 10, cache_policy=policy)
        used, _ = model.routing_trace(ids, decode=True)
        expected = _core.replay_misses(policy, used, scores, 10)
        assert 0 < model.stats()["misses"] <= 1.02 * expected
        # Slots for reads hold what they held until they are taken: less is missed, not more.
        more = _core.replay_misses("lru", used, scores, 10 + 8)
        assert model.stats()["misses"] > 0.5 * more


def router_biases(folder: Path, config: dict[str, Any]) -> list[bytes]:
    from fixtures.checkpoint_io import read_tensors

    tensors = read_tensors(folder)
    first = config["first_k_dense_replace"]
    names = [
        f"model.layers.{layer}.mlp.gate.e_score_correction_bias"
        for layer in range(first, config["num_hidden_layers"])
    ]
    return [tensors[name].tobytes() for name in names]


def test_prefetch_finds_experts_before_they_are_asked_for(folder: Path, whole: dsfp4.Model) -> None:
    model = tiered(folder, 4, prefetch_layers=1)
    ids = random_ids(whole, 60)
    assert np.array_equal(model.forward(ids, decode=True), whole.forward(ids, decode=True))
    stats = model.stats()
    assert stats["prefetched"] > 0
    assert 0 < stats["predicted_used"] <= stats["predicted"]
    assert stats["predictable"] == 60 * whole.config["num_experts_per_tok"]  # one layer of two


def test_a_prompt_reads_the_next_layer_ahead(folder: Path, whole: dsfp4.Model) -> None:
    ids = random_ids(whole, 60)
    expected = whole.forward(ids)
    for prefetch_layers, ahead in ((None, True), (0, False)):
        model = tiered(folder, 4, prefetch_layers=prefetch_layers)
        assert np.array_equal(model.forward(ids), expected)
        stats = model.stats()
        assert (stats["prefetched"] > 0) == ahead
        assert (stats["speculative_bytes"] > 0) == ahead
        experts = stats["misses"] + stats["prefetched"]
        assert experts * stats["image_bytes"] == stats["demand_bytes"] + stats["prefetched_bytes"]


def test_a_long_prompt_reads_the_first_layer_from_the_start(
    folder: Path, whole: dsfp4.Model
) -> None:
    experts = whole.config["n_routed_experts"]
    ids = random_ids(whole, 100)
    _, chosen = whole.forward(ids, return_experts=True)
    model = tiered(folder, 31)  # room for all of the first layer
    model.forward(ids)
    assert len(np.unique(chosen[0])) > experts // 2
    assert model.stats()["misses"] < len(np.unique(chosen[0])) // 2  # of both layers
    assert len(ids) * whole.config["num_experts_per_tok"] >= 8 * experts  # it is a long one


def test_single_tokens_read_ahead_while_the_cache_has_room(
    folder: Path, whole: dsfp4.Model
) -> None:
    ids = random_ids(whole, 60)
    expected = whole.forward(ids, decode=True)
    model = tiered(folder, 12)
    assert np.array_equal(model.forward(ids, decode=True), expected)
    filled = model.stats()
    assert filled["prefetched"] > 0
    assert np.array_equal(model.forward(ids, decode=True), expected)
    assert model.stats()["speculative_bytes"] == filled["speculative_bytes"]
    off = tiered(folder, 12, prefetch_layers=0)
    off.forward(ids, decode=True)
    assert off.stats()["speculative_bytes"] == 0
    assert filled["misses"] <= off.stats()["misses"]


def test_settings_between_generations(folder: Path, whole: dsfp4.Model) -> None:
    model = tiered(folder, 9)
    ids = random_ids(whole, 30)
    expected = whole.forward(ids, decode=True)
    assert np.array_equal(model.forward(ids, decode=True), expected)
    before = model.stats()["misses"]
    model.forward(ids, decode=True)
    warm = model.stats()["misses"] - before
    size = slot_bytes(folder)
    for slots in (20, 3, 32):
        model.set_memory_strategy(
            {"cpu_cache_size": (slots + 0.1) * size / 1e9, "prefetch_size": 8.1 * size / 1e9}
        )
        assert model.stats()["cache_slots"] == slots
        assert np.array_equal(model.forward(ids, decode=True), expected)
    before = model.stats()["misses"]
    model.set_memory_config(prefetch_layers=1)
    assert np.array_equal(model.forward(ids, decode=True), expected)
    assert model.stats()["misses"] == before  # everything is cached now
    assert warm > 0


def test_threshold_leaves_out_light_experts_and_says_so(folder: Path, whole: dsfp4.Model) -> None:
    ids = random_ids(whole, 40)
    expected = whole.forward(ids, decode=True)
    exact = tiered(folder, 4, expert_threshold=0.0)
    assert np.array_equal(exact.forward(ids, decode=True), expected)
    assert exact.stats()["skipped_pairs"] == 0
    model = tiered(folder, 4, expert_threshold=0.3)
    logits = model.forward(ids, decode=True)
    stats = model.stats()
    assert 0 < stats["skipped_pairs"] < stats["total_pairs"]
    assert stats["misses"] < exact.stats()["misses"]
    assert np.isfinite(logits).all()
    assert not np.array_equal(logits, expected)
    model.set_memory_config(expert_threshold=0.0)
    assert np.array_equal(model.forward(ids, decode=True), expected)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"cpu_cache_size": -1}, "cpu_cache_size"),
        ({"cpu_cache_size": float("nan")}, "cpu_cache_size"),
        ({"cpu_cache_size": "many"}, "cpu_cache_size"),
        ({"cpu_cache_size": 0, "prefetch_size": 0}, "prefetch_size"),
        ({"max_experts": -1}, "max_experts"),
        ({"max_experts": 2**31}, "max_experts"),
        ({"max_experts": 1.5}, "max_experts"),
        ({"max_experts": True}, "max_experts"),
        ({"max_experts": 0}, "max_experts': limits VRAM, and device 'cpu' uses none"),
        ({"gpu_reserved": -1}, "gpu_reserved"),
        ({"gpu_reserved": float("nan")}, "gpu_reserved"),
        ({"gpu_reserved": "1"}, "gpu_reserved"),
        ({"gpu_reserved": 0}, "gpu_reserved': limits VRAM, and device 'cpu' uses none"),
        ({"prefetch_layers": -1}, "prefetch_layers"),
        ({"prefetch_layers": 17}, "prefetch_layers"),
        ({"expert_threshold": 1.5}, "expert_threshold"),
        ({"expert_threshold": float("nan")}, "expert_threshold"),
        ({"cpu_cache_size": 0, "cache_policy": "fifo"}, "policy"),
        ({"cpu_cache_size": 0, "reader": "mmap"}, "reader"),
    ],
)
def test_bad_options_are_named(folder: Path, options: dict[str, Any], name: str) -> None:
    with pytest.raises(ParameterError, match=name):
        dsfp4.Model(folder, max_context=8, warm_start=False, **options)


def test_bad_settings_are_named_and_change_nothing(folder: Path, whole: dsfp4.Model) -> None:
    model = tiered(folder)
    for bad in (
        *({"cpu_cache": 1}, {"cpu_cache_size": -1}, {"prefetch_size": 0}, [1]),
        *({"max_experts": 1}, {"max_experts": 1.0}, {"gpu_reserved": 0.0}, {"gpu_reserved": "1"}),
    ):
        with pytest.raises(ParameterError):
            model.set_memory_strategy(bad)  # type: ignore[arg-type]
    with pytest.raises(MemoryLimitError):
        model.set_memory_strategy({"cpu_cache_size": 1e5, "prefetch_size": 1e5})
    with pytest.raises(ParameterError, match="prefetch_layers"):
        model.set_memory_config(prefetch_layers=99)
    with pytest.raises(ParameterError, match="cpu_cache_size"):
        whole.set_memory_strategy({"cpu_cache_size": 1})
    assert model.stats()["cache_slots"] == 9


# --- warm start ----------------------------------------------------------------------------------


def test_the_second_start_is_as_good_as_the_end_of_the_first(
    folder: Path, whole: dsfp4.Model, tmp_path: Path
) -> None:
    ids = random_ids(whole, 80)
    first = tiered(folder, 9, warm_start=tmp_path)
    first.forward(ids, decode=True)
    before = first.stats()["misses"]
    first.forward(ids[:20], decode=True)
    end = first.stats()["misses"] - before
    del first
    assert [file.suffix for file in tmp_path.iterdir()] == [".experts"]
    second = tiered(folder, 9, warm_start=tmp_path)
    second.forward(ids[:20], decode=True)
    cold = tiered(folder, 9)
    cold.forward(ids[:20], decode=True)
    assert second.stats()["misses"] <= end + 9
    assert second.stats()["misses"] < cold.stats()["misses"]


KILLED = """
import sys
import dsfp4
options = dict(threads=1, max_context=64, cpu_cache_size=0)
model = dsfp4.Model(sys.argv[1], warm_start=sys.argv[2], **options)
model.generate([3, 4], max_tokens=1)
print("ready", flush=True)  # there is a file, and it will be replaced
while True:
    model.generate([3, 4], max_tokens=1)
"""


def check_killed(folder: Path, tmp_path: Path, times: int) -> None:
    """Whatever a killed process leaves: the file is whole, or none."""
    good = 0
    delays = np.random.default_rng(0).uniform(0, 0.03, times)
    for delay in delays:
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(folder), str(tmp_path)], stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        for file in tmp_path.glob("*.experts"):
            assert _core.check_warm_start(os.fspath(file))
            good += 1
    assert good > 0


def test_killed_while_writing(folder: Path, tmp_path: Path) -> None:
    check_killed(folder, tmp_path, 3)


@pytest.mark.full
def test_killed_while_writing_fifty_times(folder: Path, tmp_path: Path) -> None:
    check_killed(folder, tmp_path, 50)


# --- cancelling ----------------------------------------------------------------------------------


def test_cancelled_while_reads_are_in_flight(folder: Path, whole: dsfp4.Model) -> None:
    model = tiered(folder, 4, prefetch_layers=1)
    ids = random_ids(whole, 100)
    for stop_after in (1, 2, 3, 5, 8):
        calls = []

        def on_prefill(done: int, total: int, calls: list = calls, most: int = stop_after) -> bool:
            calls.append(done)
            return len(calls) < most

        result = model.generate(ids, max_tokens=4, on_prefill=on_prefill)
        assert result.finish_reason == "cancelled"
        assert len(calls) == stop_after
    assert np.array_equal(model.forward(ids), whole.forward(ids))
    stats = model.stats()
    assert stats["hits"] + stats["misses"] + stats["joined"] + stats["prefetched"] > 0


def test_compute_streams_change_no_bit(folder: Path, whole: dsfp4.Model) -> None:
    ids = random_ids(whole, 40)
    right = whole.forward(ids)
    model = tiered(folder, 10)
    for off in ("prefetch", "compute", "transfer"):
        model.set_compute_streams({off: False})
        np.testing.assert_array_equal(model.forward(ids), right)
    model.set_compute_streams({})
    np.testing.assert_array_equal(model.forward(ids), right)


def test_what_is_no_stage_is_named(folder: Path) -> None:
    model = tiered(folder, 10)
    for streams, words in (
        ({"read": False}, "has 'read'; it may have prefetch, compute, transfer"),
        ({"compute": 0}, "compute must be True or False, not 0"),
        (["compute"], "must map stages to bools"),
    ):
        with pytest.raises(ParameterError, match=re.escape(words)):
            model.set_compute_streams(streams)  # type: ignore[arg-type]
