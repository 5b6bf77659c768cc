"""Plans for described machines, against counts and searches of their own."""

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsfp4 import _core, estimate
from dsfp4.demo import resolve_model
from dsfp4.errors import Dsfp4Error, MemoryLimitError, ParameterError

GB = 10**9
_PLANNERS: dict[tuple[str, str], _core.Planner] = {}


def planner_of(name: str, device: str) -> _core.Planner:
    """Return the planner of a published model, made once."""
    if (name, device) not in _PLANNERS:
        _PLANNERS[name, device] = _core.Planner(name, published=True, device=device, threads=2)
    return _PLANNERS[name, device]


def tokens_per_second(planner: _core.Planner, plan: dict[str, Any], rates: estimate.Rates) -> float:
    """Return what decoding reaches where no expert is favoured."""
    hits = estimate.even_hits(planner.model, plan)
    return estimate.decode(planner.model, plan, rates, hits).tokens_per_second


def check_sizes(planner: _core.Planner, plan: dict[str, Any], ram: int, vram: int | None) -> None:
    """Count a plan from its parts, and hold it against the machine."""
    model = planner.model
    by_tier = {"vram": 0, "ram": 0, "ssd": 0}
    for role in plan["roles"]:
        by_tier[role["tier"]] += role["bytes"]
    assert by_tier["ram"] <= ram
    assert by_tier["vram"] <= (vram or 0)
    dense = sum(plan["layer_bytes"]) + plan["head_bytes"]
    kv = plan["kv_bytes_per_token"] * plan["max_context"]
    experts = plan["device_slots"] * model["expert_bytes"]
    slots = plan["slots"] * model["expert_bytes"]
    streamed = sum(
        size
        for size, is_streamed in zip(plan["layer_bytes"], plan["streamed"], strict=False)
        if is_streamed
    )
    if vram is not None:
        assert by_tier["vram"] >= dense - streamed + kv + experts
        assert by_tier["ram"] >= slots + streamed
    else:
        assert by_tier["ram"] >= dense - streamed + kv + slots
    if plan["tiered"]:
        assert by_tier["ssd"] >= model["experts"] * model["expert_bytes"]
        assert plan["cache_slots"] <= model["experts"]
    assert 1 <= plan["chunk"] <= plan["max_context"]


machines = st.fixed_dictionaries(
    {
        "name": st.sampled_from(_core.published_models()),
        "ram": st.floats(8, 600).map(lambda size: int(size * GB)),
        "vram": st.none() | st.floats(4, 200).map(lambda size: int(size * GB)),
        "max_context": st.sampled_from([1, 100, 4096, 32768, 163840]),
        "seed": st.integers(0, 2**32),
        "rates": st.builds(
            estimate.Rates,
            ssd=st.builds(estimate.Rate, st.floats(0.5, 30)),
            ram=st.builds(estimate.Rate, st.floats(20, 250)),
            pcie=st.builds(estimate.Rate, st.floats(4, 60)),
            # Faster than both wires: experts are cached in VRAM for that.
            vram=st.builds(estimate.Rate, st.floats(400, 5000)),
        ),
    }
)


def random_wishes(random_: random.Random, model: dict[str, Any], on_gpu: bool) -> dict[str, Any]:
    """Return settings that a user could have made in place of the plan's own.

    Not prefetch_size: the estimate does not know what room for reads under way is worth.
    """
    wishes: dict[str, Any] = {}
    if random_.random() < 0.7:
        wishes["cpu_cache_size"] = random_.uniform(0, 500)
    if on_gpu:
        layers = model["num_hidden_layers"]
        if random_.random() < 0.6:
            wishes["max_experts"] = random_.choice([0, random_.randrange(2000)])
        if random_.random() < 0.3:
            wishes["max_gpu_layers"] = random_.randrange(layers + 1)
        if random_.random() < 0.2:
            wishes["gpu_reserved"] = random_.uniform(0, 4)
    return wishes


@settings(max_examples=500, deadline=None)
@given(machines)
def test_a_plan_fits_and_none_that_fits_is_faster(machine: dict[str, Any]) -> None:
    """By its own estimate; and what one of the others can run is not refused."""
    device = "cpu" if machine["vram"] is None else "cuda"
    planner = planner_of(machine["name"], device)
    sizes = {"ram": machine["ram"], "vram": machine["vram"]}
    try:
        plan = planner.plan(**sizes, max_context=machine["max_context"])
    except MemoryLimitError:
        plan = None
    if plan is not None:
        check_sizes(planner, plan, **sizes)
        speed = tokens_per_second(planner, plan, machine["rates"])
    random_ = random.Random(machine["seed"])
    for _ in range(50):
        wishes = random_wishes(random_, planner.model, device == "cuda")
        try:
            other = planner.plan(**sizes, max_context=machine["max_context"], **wishes)
        except Dsfp4Error:
            continue
        assert plan is not None, f"refused, and {wishes} run"
        check_sizes(planner, other, **sizes)
        if other["conversion"] != plan["conversion"]:
            continue  # less exact, which no plan does for speed alone
        # A longer chunk is worth some cached experts: prompts need it. And no layer is streamed to
        # make room for a few more.
        least = 0.85 if other["chunk"] < plan["chunk"] else 0.95
        assert speed >= least * tokens_per_second(planner, other, machine["rates"]), wishes


def test_a_folder_is_planned_from_its_headers() -> None:
    """The demo model, whole in RAM and in tiers."""
    planner = _core.Planner(str(resolve_model("demo")), published=False, device="cpu", threads=2)
    whole = planner.plan(ram=4 * GB)
    assert not whole["tiered"]
    tiered = planner.plan(ram=4 * GB, cpu_cache_size=0.0)
    assert tiered["tiered"]
    assert tiered["cache_slots"] == 0
    assert planner.model["expert_bytes"] > 0
    assert planner.model["unneeded_bytes"] == 0


@pytest.mark.parametrize("device", ["reference", "auto", "tpu", ""])
def test_devices_that_nobody_plans_for_are_refused(device: str) -> None:
    with pytest.raises(ParameterError, match="cpu, cuda"):
        _core.Planner("deepseek-v2-lite", published=True, device=device)


def test_what_a_load_refuses_is_refused() -> None:
    planner = planner_of("deepseek-r1-fp4", "cpu")
    with pytest.raises(ParameterError, match="max_experts"):
        planner.plan(ram=96 * GB, max_experts=3)
    with pytest.raises(ParameterError, match="vram"):
        planner.plan(ram=96 * GB, vram=16 * GB)
    with pytest.raises(ParameterError, match="max_context"):
        planner.plan(ram=96 * GB, max_context=10**9)
    with pytest.raises(MemoryLimitError, match="max_context"):
        planner.plan(ram=8 * GB, max_context=163840)
    with pytest.raises(ParameterError, match="deepseek-r1-fp4"):
        _core.Planner("deepseek-r2", published=True, device="cpu")
