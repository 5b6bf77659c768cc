"""Estimates against measured runs (bench/README.md: an H200 with 16 cores) and against physics."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsfp4 import _core, estimate

GB = 10**9
# As `dsfp4 doctor` measured that machine; the disk's rate is that of each run.
H200 = estimate.Rates(ssd=1.5, ram=131.0, cpu_tflops=1.2, pcie=55.3, vram=4520.0, gpu_tflops=275.0)
EXPERT = 24_772_608  # bytes of one of R1's, in NVFP4


def r1_layers(dense: int, moe: int) -> dict[str, Any]:
    """Return the facts of a model of R1's widths with so many layers."""
    planner = _core.Planner("deepseek-r1-fp4", published=True, device="cuda", threads=2)
    counts = {"num_hidden_layers": dense + moe, "first_k_dense_replace": dense}
    return dict(planner.model) | counts | {"experts": 256 * moe}


def plan_of(model: dict[str, Any], tier: str, cached: int, **facts: Any) -> dict[str, Any]:
    """Return a plan with BF16 attention, as published, and `cached` experts in RAM."""
    dense = model["first_k_dense_replace"]
    moe = model["num_hidden_layers"] - dense
    return {
        "roles": [{"role": "attention", "tier": tier, "bytes": 1, "format": "bf16"}],
        "layer_bytes": [597_000_000] * dense + [399_000_000] * moe,
        "head_bytes": 1_853_000_000,
        "kv_bytes_per_token": 1152 * model["num_hidden_layers"],
        "tiered": True,
        "streamed": [],
        "chunk": 32768,
        "max_context": 32768,
        "cache_slots": cached,
        "device_cache_slots": 0,
    } | facts


def near(estimated: float, measured: float) -> bool:
    """Return whether a measurement is within 15 % of its estimate."""
    return abs(measured - estimated) <= 0.15 * estimated


@pytest.mark.parametrize("measured", [164.0, 171.0])
def test_decoding_with_all_experts_in_ram(measured: float) -> None:
    model = r1_layers(1, 3)
    plan = plan_of(model, "vram", 768)
    found = estimate.decode(model, plan, H200, estimate.Hits(vram=0.0, ram=1.0))
    assert found.binds == "experts"
    assert found.wire_bytes["ssd"] == 0
    assert near(found.tokens_per_second, measured)


@pytest.mark.parametrize(
    ("hit_rate", "measured"), [(0.2926, 1.615), (0.5162, 2.141)], ids=["cold", "warm"]
)
def test_all_of_r1_as_published_beside_14_gb(hit_rate: float, measured: float) -> None:
    """A disk paced to 14 GB/s, 80 GB of cached experts, 15 of 61 layers streamed."""
    planner = _core.Planner("deepseek-r1-fp4", published=True, device="cuda", threads=16)
    plan = planner.plan(ram=96 * GB, vram=14 * GB, max_context=32768, cpu_cache_size=80.0)
    rates = replace(H200, ssd=14.0, ram=155.0)  # RAM: both wires, as measured in that run
    found = estimate.decode(
        planner.model, plan, rates, estimate.hits_at(planner.model, plan, hit_rate)
    )
    assert found.binds == "ssd"
    assert near(found.tokens_per_second, measured)
    low, high = estimate.usual_range(planner.model, plan)
    assert low <= hit_rate <= high


@pytest.mark.parametrize(("tokens", "measured"), [(512, 1371), (4096, 9303), (32768, 22303)])
def test_prompts_with_all_experts_in_ram(tokens: int, measured: float) -> None:
    model = r1_layers(1, 3)
    plan = plan_of(model, "vram", 768)
    found = estimate.prefill(model, plan, H200, tokens)
    assert found.binds == ("pcie" if tokens < 32768 else "arithmetic")
    assert near(found.tokens_per_second, measured)
    everything = model["experts"] * model["expert_bytes"]
    assert found.wire_bytes["pcie"] == pytest.approx(everything, rel=0.001)


@pytest.mark.parametrize(("tokens", "measured"), [(4096, 47708), (32768, 27492)])
def test_prompts_in_vram(tokens: int, measured: float) -> None:
    model = r1_layers(1, 3)
    plan = plan_of(model, "vram", 0, tiered=False)
    found = estimate.prefill(model, plan, H200, tokens)
    assert found.binds == "arithmetic"
    assert near(found.tokens_per_second, measured)


def test_bytes_of_r1_by_hand() -> None:
    """58 layers of 8 experts; at 40 % hits 6.9 GB of the 11.5 come from the SSD."""
    planner = _core.Planner("deepseek-r1-fp4", published=True, device="cuda", threads=2)
    model = planner.model
    assert estimate.routed_bytes(model) == 58 * 8 * EXPERT
    plan = planner.plan(ram=96 * GB, vram=16 * GB, max_context=4096)
    found = estimate.decode(model, plan, H200, estimate.hits_at(model, plan, 0.4))
    assert found.wire_bytes["ssd"] == pytest.approx(0.6 * 58 * 8 * EXPERT)
    # RAM takes what the SSD gives, and gives it again beside the hits.
    vram = plan["device_cache_slots"] / 14848
    outside = (1 - vram) * 58 * 8 * EXPERT
    assert found.wire_bytes["ram"] == pytest.approx(outside + found.wire_bytes["ssd"])


shares = st.floats(0, 1)
rate = st.floats(0.1, 1000)


@given(
    shares,
    shares,
    st.builds(
        estimate.Rates,
        ssd=rate,
        ram=rate,
        cpu_tflops=rate,
        pcie=rate,
        vram=rate,
        gpu_tflops=rate,
    ),
    st.sampled_from(["ssd", "ram", "pcie", "vram"]),
    st.sampled_from(["vram", "ram"]),
)
def test_more_hits_and_faster_wires_are_never_slower(
    one: float, other: float, rates: estimate.Rates, wire: str, tier: str
) -> None:
    model = r1_facts()
    plan = plan_of(model, tier, 100)
    few, many = sorted((one, other))

    def speed(rates: estimate.Rates, hits: float) -> float:
        found = estimate.decode(model, plan, rates, estimate.hits_at(model, plan, hits))
        return found.tokens_per_second

    faster = replace(rates, **{wire: 2 * getattr(rates, wire)})
    slack = 1 + 1e-9
    assert speed(rates, many) * slack >= speed(rates, few)
    assert speed(faster, few) * slack >= speed(rates, few)
    for tokens in (1, 512, 40000):
        before = estimate.prefill(model, plan, rates, tokens)
        assert estimate.prefill(model, plan, faster, tokens).seconds <= before.seconds * slack
        assert before.seconds > 0


_FACTS: dict[str, Any] = {}


def r1_facts() -> dict[str, Any]:
    """Return those of four layers, made once."""
    if not _FACTS:
        _FACTS.update(r1_layers(1, 3))
    return _FACTS
