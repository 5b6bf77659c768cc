"""bench/simulate.py: a routing played through a plan, event by event."""

import json
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsfp4.estimate import HAND_OFF_SECONDS, OVERHEAD, Rate, Rates, decode
from fixtures.plans import R1, make_plan, whole_r1

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import simulate

Capture = pytest.CaptureFixture[str]
TARGET = Rates(ssd=Rate(14), ram=Rate(70), pcie=Rate(55), vram=Rate(900))
ON_TARGET = [
    *("deepseek-r1-fp4", "--gpu-memory", "16", "--ram", "96", "--ssd-rate", "14"),
    *("--context", "4096", "--warm", "10", "--tokens", "5"),
]
# One MoE layer of 16 experts, 2 for a token, and one dense layer before it.
TINY: dict[str, Any] = R1 | {
    "num_hidden_layers": 2,
    "n_routed_experts": 16,
    "num_experts_per_tok": 2,
    "experts": 16,
    "expert_bytes": 7_000_000,
}


def tiny_plan(**changes: Any) -> dict[str, Any]:
    sizes = {"layer_bytes": [90_000_000, 45_000_000], "head_bytes": 9_000_000}
    return make_plan(**(sizes | {"kv_bytes_per_token": 0, "cache_slots": 4} | changes))


def routing(tokens: int, **changes: Any) -> np.ndarray:
    values = {"layers": 58, "experts": 256, "k": 8, "skew": 0.8, "seed": 1} | changes
    return simulate.zipf_routing(tokens=tokens, **values)


def test_a_token_by_hand() -> None:
    """From an empty cache: dense part, choice, two reads, and each is used when it is there."""
    used = np.array([[[3, 5]]])
    dense, head = 135e6 / 900e9 + 2 * HAND_OFF_SECONDS, 9e6 / 900e9
    played = simulate.Player(TINY, tiny_plan(), TARGET, "lru").play(used)
    read, use = 7e6 / 14e9, 7e6 / 70e9  # the processor is the faster side
    assert played.seconds == pytest.approx(dense + 2 * read + use + head)
    assert played.found == {"vram": 0, "ram": 0, "ssd": 2}
    assert played.bytes == pytest.approx(
        {"ssd": 14e6, "ram": 28e6, "host": 14e6, "pcie": 0, "vram": 144e6}
    )


def test_the_same_token_again_finds_its_experts() -> None:
    used = np.array([[[3, 5], [3, 5]]])
    player = simulate.Player(TINY, tiny_plan(), TARGET, "lru")
    player.play(used[:, :1])
    played = player.play(used[:, 1:])
    assert played.found == {"vram": 0, "ram": 2, "ssd": 0}
    # The processor takes one, PCIe the other; RAM gives both, one after the other.
    dense, head = 135e6 / 900e9 + 2 * HAND_OFF_SECONDS, 9e6 / 900e9
    ends = max(7e6 / 70e9, max(7e6 / 55e9, 14e6 / 70e9) + 7e6 / 900e9)
    assert played.seconds == pytest.approx(dense + ends + head)


def test_all_in_vram_by_hand() -> None:
    plan = tiny_plan(tiered=False)
    played = simulate.Player(TINY, plan, TARGET, "lru").play(np.tile([1, 2], (1, 3, 1)))
    assert played.found == {"vram": 6, "ram": 0, "ssd": 0}
    assert played.seconds == pytest.approx(3 * (135e6 + 14e6 + 9e6) / 900e9)


def test_streamed_layers_cross_their_wire_for_each_token() -> None:
    used = np.tile([1, 2], (1, 4, 1))
    for vram_bytes, wire in ((1, "pcie"), (0, "ssd")):
        plan = tiny_plan(tiered=False, streamed=[True, False], vram_bytes=vram_bytes)
        played = simulate.Player(TINY, plan, TARGET, "lru").play(used)
        # The buffer is filled again once it is free, so the last copy is for the token to come.
        assert played.bytes[wire] == 4 * 90_000_000
        rate = 55e9 if wire == "pcie" else 14e9
        assert played.seconds >= 4 * 90_000_000 / rate


def test_lru_is_lru() -> None:
    used = routing(400, layers=1, experts=16, k=1, skew=0.5)
    one = TINY | {"num_experts_per_tok": 1}
    played = simulate.Player(one, tiny_plan(), TARGET, "lru").play(used)
    cache: OrderedDict[int, None] = OrderedDict()
    misses = 0
    for expert in used[0, :, 0].tolist():
        misses += expert not in cache
        cache[expert] = None
        cache.move_to_end(expert)
        if len(cache) > 4:
            cache.popitem(last=False)
    assert played.found == {"vram": 0, "ram": 400 - misses, "ssd": misses}


def test_vram_and_ram_are_one_cache() -> None:
    """A promoted expert leaves RAM, and what VRAM gives up comes back: no slot is used twice."""
    plan = tiny_plan(cache_slots=6, device_cache_slots=3)
    player = simulate.Player(TINY, plan, TARGET, "counts")
    player.play(routing(200, layers=1, experts=16, k=2))
    vram, ram = (player.cache.here[tier] for tier in ("vram", "ram"))
    assert (vram.sum(), ram.sum()) == (3, 6)
    assert not (vram & ram).any()
    assert player.cache.count == {"vram": 3, "ram": 6}
    assert player.played.found["vram"] > 0


@pytest.mark.parametrize("gpu", [True, False])
@pytest.mark.parametrize("cached", [0, 3552, 14848])
def test_never_faster_than_the_floor_and_bytes_are_conserved(gpu: bool, cached: int) -> None:
    plan = whole_r1(cached, 60 if gpu else 0, 0) | ({} if gpu else {"vram_bytes": 0})
    player = simulate.Player(R1, plan, TARGET, "lru")
    player.play(routing(12))
    played = player.play(routing(6, seed=2), position=100)
    estimate = decode(R1, plan, TARGET, played.hits, position=100)
    assert played.seconds / 6 >= estimate.seconds / OVERHEAD * (1 - 1e-9)
    assert sum(played.found.values()) == 6 * 58 * 8
    size = R1["expert_bytes"]
    assert played.bytes["ssd"] == played.found["ssd"] * size
    used = played.bytes["host"] + (played.bytes["vram"] if gpu else 0)
    kept = sum(plan["layer_bytes"]) + plan["head_bytes"] + 100 * plan["kv_bytes_per_token"]
    assert used == pytest.approx(6 * (58 * 8 * size + kept))
    # Each wire is busy for its bytes, and never for longer than there was time.
    for name, busy in played.busy.items():
        assert busy == pytest.approx(played.bytes[name] / player.machine.wires[name].rate)
        assert busy <= played.seconds * (1 + 1e-9)


def test_faded_counts_find_more_of_a_skewed_routing() -> None:
    used = routing(60, skew=1.0)
    rates = {}
    for policy in ("lru", "counts"):
        played = simulate.Player(R1, whole_r1(3000, 0, 0), TARGET, policy).play(used)
        rates[policy] = played.hits.rate
    assert rates["counts"] > rates["lru"] > 0.1


def test_a_skewed_routing_has_distinct_choices_and_favourites() -> None:
    used = routing(500, layers=2)
    assert used.shape == (2, 500, 8)
    assert all(len(set(choice)) == 8 for layer in used.tolist() for choice in layer)
    for skew, least, most in ((0.0, 1.0, 2.0), (1.0, 8.0, 32.0)):
        counts = np.bincount(routing(500, layers=1, skew=skew).ravel(), minlength=256)
        assert least <= counts.max() / counts.mean() <= most
    assert (routing(5) == routing(5)).all()
    assert (routing(5) != routing(5, seed=2)).any()


def report(capsys: Capture, *arguments: str) -> dict[str, Any]:
    assert simulate.main([*ON_TARGET, *arguments, "--json"]) == 0
    facts: dict[str, Any] = json.loads(capsys.readouterr().out)
    return facts


def test_the_command(capsys: Capture) -> None:
    assert simulate.main(ON_TARGET) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "deepseek-r1-fp4: 5 tokens after 10, policy counts"
    assert lines[2].startswith("played: ")
    assert lines[3].startswith("estimate: ")
    facts = report(capsys)
    assert facts == report(capsys)
    assert facts != report(capsys, "--seed", "2")
    assert facts["tokens_per_second"] == pytest.approx(5 / facts["played"]["seconds"])
    assert facts["tokens_per_second"] <= facts["floor_tokens_per_second"] * (1 + 1e-9)
    assert facts["floor_tokens_per_second"] > facts["estimated_tokens_per_second"]


def test_a_recorded_routing(capsys: Capture, tmp_path: Path) -> None:
    file = tmp_path / "routing.npz"
    np.savez(file, used=routing(15, skew=0.8))
    facts = report(capsys, "--trace", str(file))
    assert facts == report(capsys)  # the same tokens, made here
    np.savez(file, used=np.zeros((58, 15, 8), np.int32) + np.arange(8, dtype=np.int32))
    assert report(capsys, "--trace", str(file))["hit_rates"]["ram"] > 0.9


@pytest.mark.parametrize(
    ("arrays", "problem"),
    [
        ({"other": np.zeros(3)}, "has no array `used`; it has other"),
        ({"used": np.zeros((58, 15, 6), np.int32)}, "the model needs integers [58, tokens, 8]"),
        ({"used": np.zeros((58, 15, 8))}, "`used` is float64"),
        ({"used": np.full((58, 15, 8), 256)}, "not from 0 to 255"),
        ({"used": np.full((58, 15, 8), -1)}, "not from 0 to 255"),
        ({"used": np.zeros((58, 14, 8), np.int32)}, "has 14 tokens, and --warm and --tokens"),
    ],
)
def test_a_wrong_recording(
    capsys: Capture, tmp_path: Path, arrays: dict[str, Any], problem: str
) -> None:
    file = tmp_path / "routing.npz"
    np.savez(file, **arrays)
    assert simulate.main([*ON_TARGET, "--trace", str(file)]) == 1
    err = capsys.readouterr().err
    assert err.startswith("simulate.py: error: '")
    assert problem in err


def test_an_array_alone_is_no_recording(capsys: Capture, tmp_path: Path) -> None:
    for name, data in (("one.npy", None), ("text.npz", "no array")):
        file = tmp_path / name
        if data is None:
            np.save(file, routing(15))
        else:
            file.write_text(data)
        assert simulate.main([*ON_TARGET, "--trace", str(file)]) == 1
        assert f"simulate.py: error: '{file}' is no .npz file" in capsys.readouterr().err


def test_what_cannot_run_is_refused(capsys: Capture, tmp_path: Path) -> None:
    assert simulate.main(["deepseek-r1-fp4", "--gpu-memory", "3", "--ram", "96"]) == 1
    assert "GB of VRAM" in capsys.readouterr().err
    assert simulate.main([*ON_TARGET, "--trace", str(tmp_path / "none.npz")]) == 1
    assert "none.npz" in capsys.readouterr().err
