"""How fast a planned model will be: bytes over the rates of the wires that they cross.

A decode step takes the larger of two times: that of its reads from the SSD, and that of the dense
part of its layers followed by their routed experts. A prompt takes the largest of all of them, as
everything overlaps (the floors of bench/README.md). Measured runs took 0.96 to 1.24 of such a
floor; OVERHEAD stands for that.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

OVERHEAD = 1.1
_LAYER_SECONDS = 1e-4  # of a layer whose choice the host must know, beside a GPU
_READ_GB, _TERA = 1e9, 1e12

Model = Mapping[str, Any]  # _core.Planner.model
Plan = Mapping[str, Any]  # _core.Planner.plan()


@dataclass(frozen=True)
class Rates:
    """GB/s (10^9 bytes), and TFLOP/s of the kernels that multiply many rows."""

    ssd: float
    ram: float
    cpu_tflops: float
    pcie: float = 0.0  # 0, as the next two: there is no GPU
    vram: float = 0.0
    gpu_tflops: float = 0.0


@dataclass(frozen=True)
class Hits:
    """Shares of the chosen experts that are found in VRAM and in RAM; the rest is on the SSD."""

    vram: float
    ram: float

    @property
    def memory(self) -> float:
        """In either."""
        return self.vram + self.ram


@dataclass(frozen=True)
class Estimate:
    """Seconds of `tokens` tokens; bytes and seconds by wire, before they overlap."""

    tokens: int
    seconds: float
    wire_bytes: Mapping[str, float]  # "ssd", "ram", "pcie", "vram"
    parts: Mapping[str, float]  # seconds by what they are spent on
    binds: str  # the part that decides

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds


def even_hits(model: Model, plan: Plan) -> Hits:
    """Return the hits of routing that favours no expert: the shares that are cached."""
    experts = model["experts"]
    if experts == 0 or not plan["tiered"]:
        return Hits(vram=1.0, ram=0.0) if on_gpu(plan) else Hits(vram=0.0, ram=1.0)
    vram = min(plan["device_cache_slots"] / experts, 1.0)
    return Hits(vram, min(plan["cache_slots"] / experts, 1.0 - vram))


def hits_at(model: Model, plan: Plan, share: float) -> Hits:
    """Return the hits where `share` of the chosen experts, 0 to 1, is found in memory."""
    even = even_hits(model, plan)
    return Hits(min(even.vram, share), max(share - even.vram, 0.0))


def usual_range(model: Model, plan: Plan) -> tuple[float, float]:
    """Return the shares found in memory of even routing, and where half of its misses are spared.

    Real routing repeats itself, and the cache keeps what is used: it lies between.
    """
    even = even_hits(model, plan).memory
    return even, (1.0 + even) / 2.0


def on_gpu(plan: Plan) -> bool:
    """Return whether a GPU holds the model, alone or with other tiers."""
    return any(role["tier"] == "vram" for role in plan["roles"])


def routed_bytes(model: Model) -> float:
    """Return the bytes of the routed experts of one token."""
    layers = model["num_hidden_layers"] - model["first_k_dense_replace"]
    chosen = model["num_experts_per_tok"] * layers if model["experts"] else 0
    return float(chosen * model["expert_bytes"])


def decode(model: Model, plan: Plan, rates: Rates, hits: Hits, context: int = 0) -> Estimate:
    """Return the estimate for one token after `context` others."""
    routed = routed_bytes(model)
    streamed = _streamed_bytes(plan)
    dense = sum(plan["layer_bytes"]) + plan["head_bytes"] + plan["kv_bytes_per_token"] * context
    ssd = routed * max(1.0 - hits.memory, 0.0)
    if on_gpu(plan):
        outside = routed * (1.0 - hits.vram)  # of VRAM: computed by the processor, or copied
        bytes_ = {"ssd": ssd, "ram": outside + ssd + streamed, "pcie": outside + streamed}
        bytes_["vram"] = dense + routed * hits.vram
        waits = _LAYER_SECONDS * model["num_hidden_layers"] if plan["tiered"] else 0.0
        parts = {
            "ssd": ssd / rates.ssd,
            "dense": max(
                (dense + routed * hits.vram) / rates.vram + waits * _READ_GB,
                streamed / rates.pcie,
            ),
            # Both wires carry experts at once, and RAM gives and takes all of it.
            "experts": max(outside / (rates.pcie + rates.ram), (outside + ssd) / rates.ram),
        }
    else:
        ssd += streamed
        bytes_ = {"ssd": ssd, "ram": dense + routed + ssd, "pcie": 0.0, "vram": 0.0}
        parts = {
            "ssd": ssd / rates.ssd,
            "dense": dense / rates.ram,
            "experts": (routed + ssd) / rates.ram,
        }
    parts = {name: seconds / _READ_GB for name, seconds in parts.items()}
    computed = parts["dense"] + parts["experts"]
    seconds = OVERHEAD * max(parts["ssd"], computed)
    binds = (
        "ssd" if parts["ssd"] >= computed else max(parts, key=lambda name: _computed(parts, name))
    )
    return Estimate(1, seconds, bytes_, parts, binds)


def prefill(model: Model, plan: Plan, rates: Rates, tokens: int) -> Estimate:
    """Return the estimate for a prompt that the model has not seen, up to its first token."""
    chunk = plan["chunk"]
    seconds = 0.0
    bytes_ = dict.fromkeys(("ssd", "ram", "pcie", "vram"), 0.0)
    parts = dict.fromkeys(("ssd", "ram", "pcie", "arithmetic"), 0.0)
    for first in range(0, tokens, chunk):
        rows = min(chunk, tokens - first)
        there, spent = _pass(model, plan, rates, first, rows)
        seconds += OVERHEAD * max(spent.values())
        for name, count in there.items():
            bytes_[name] += count
        for name, time in spent.items():
            parts[name] += time
    return Estimate(tokens, seconds, bytes_, parts, max(parts, key=lambda name: parts[name]))


def _pass(
    model: Model, plan: Plan, rates: Rates, first: int, rows: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Return bytes by wire and seconds by part of `rows` rows after `first` others."""
    hits = even_hits(model, plan)
    experts = 0.0
    if model["experts"]:
        share = model["num_experts_per_tok"] / model["n_routed_experts"]
        experts = model["experts"] * model["expert_bytes"] * (1.0 - (1.0 - share) ** rows)
    streamed = _streamed_bytes(plan)
    ssd = experts * max(1.0 - hits.memory, 0.0)
    gpu = on_gpu(plan)
    pcie = experts * (1.0 - hits.vram) + streamed if gpu else 0.0
    if not gpu:
        ssd += streamed
    ram = pcie + ssd if gpu else experts + streamed + ssd
    flops = _flops(model, first, rows)
    rate = rates.gpu_tflops if gpu else rates.cpu_tflops
    vram = sum(plan["layer_bytes"]) + experts if gpu else 0.0
    spent = {
        "ssd": ssd / rates.ssd / _READ_GB,
        "ram": ram / rates.ram / _READ_GB,
        "pcie": pcie / rates.pcie / _READ_GB if gpu else 0.0,
        "arithmetic": flops / rate / _TERA,
    }
    return {"ssd": ssd, "ram": ram, "pcie": pcie, "vram": vram}, spent


def _computed(parts: Mapping[str, float], name: str) -> float:
    return parts[name] if name != "ssd" else -1.0


def _streamed_bytes(plan: Plan) -> float:
    return float(
        sum(
            size
            for size, streamed in zip(plan["layer_bytes"], plan["streamed"], strict=False)
            if streamed
        )
    )


def _flops(model: Model, first: int, rows: int) -> float:
    """Return the operations of `rows` rows after `first`: two for each weight that a row meets."""
    hidden, heads = model["hidden_size"], model["num_attention_heads"]
    nope, rope, value = (model[f"{name}_head_dim"] for name in ("qk_nope", "qk_rope", "v"))
    lora, latent = model["q_lora_rank"], model["kv_lora_rank"]
    query = heads * (nope + rope)
    attention = hidden * lora + lora * query if lora else hidden * query
    attention += hidden * (latent + rope) + latent * heads * (nope + value) + heads * value * hidden
    layers = model["num_hidden_layers"]
    dense = model["first_k_dense_replace"] if model["experts"] else layers
    mlp = 3 * hidden * model["intermediate_size"]
    active = model["num_experts_per_tok"] + model["n_shared_experts"]
    experts = 3 * hidden * model["moe_intermediate_size"] * active
    weights = layers * attention + dense * mlp + (layers - dense) * experts
    # Scores and sums over what each row sees: itself and all before it.
    seen = rows * (first + (rows + 1) / 2)
    return 2.0 * rows * weights + 2.0 * layers * heads * (nope + rope + value) * seen
