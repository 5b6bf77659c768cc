"""How fast a plan decodes and takes prompts: bytes over the rates of the wires that they cross.

A token beside a GPU takes, layer by layer, its dense part and then its experts' slowest wire:

    dense part + max(read / SSD, computed by the processor / host, copied / PCIe, crossed / RAM)

and never less than PCIe takes for all copies, those of streamed dense layers included, which are
made while other layers compute. RAM is read once for each expert that is not in VRAM, and written
once more for each that comes from the SSD. The processor and PCIe share the experts so that both
end together. Without a GPU: max(SSD bytes / SSD, bytes computed with / host, RAM bytes / RAM).

OVERHEAD is what measured runs take over this floor. bench/README.md and tests/python/
test_estimate.py have the runs that it comes from. Pure functions: nothing here asks a machine.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

OVERHEAD = 1.1  # measured: 0.9 to 1.2
HAND_OFF_SECONDS = 1e-4  # a layer whose routing the host must know, beside a GPU

Source = Literal["measured", "given", "assumed"]
Facts = Mapping[str, Any]  # of _core.Planner: its `model`, or a plan


@dataclass(frozen=True)
class Rate:
    """A rate and where it comes from."""

    value: float
    source: Source = "assumed"


@dataclass(frozen=True)
class Rates:
    """Of a machine's wires in GB/s (10^9 bytes), and of its arithmetic in TFLOP/s; all over 0.

    `host` is at what the processor computes experts, None as RAM is read. A GPU's product takes at
    least `gpu_rows` rows of a prompt, padded if there are fewer.
    """

    ssd: Rate = Rate(7.0)
    ram: Rate = Rate(60.0)
    pcie: Rate = Rate(25.0)
    vram: Rate = Rate(900.0)
    host: Rate | None = None
    gpu_tflops: Rate = Rate(40.0)
    cpu_tflops: Rate = Rate(0.5)
    gpu_rows: int = 16


@dataclass(frozen=True)
class Hits:
    """Shares of the chosen experts that are found in VRAM and in RAM; the others are read."""

    vram: float
    ram: float

    @property
    def rate(self) -> float:
        """The share that is not read from the SSD."""
        return min(1.0, self.vram + self.ram)

    @property
    def ssd(self) -> float:
        """The share that is read from the SSD."""
        return 1.0 - self.rate


@dataclass(frozen=True)
class Estimate:
    """Of a token, or of a prompt.

    `bytes` by wire: "ssd", "pcie", "ram", "vram", and "host", those that the processor computes
    with. `floor` is the seconds that each resource takes at least, by the names of `bytes`, and of
    "hand-offs" and "arithmetic". `binds` is the largest of them.
    """

    tokens: int
    seconds: float
    bytes: dict[str, float]
    floor: dict[str, float] = field(default_factory=dict)

    @property
    def tokens_per_second(self) -> float:
        """Tokens over seconds."""
        return self.tokens / self.seconds

    @property
    def binds(self) -> str:
        """The name of what takes longest."""
        return max(self.floor, key=lambda name: self.floor[name])


def on_gpu(plan: Facts) -> bool:
    """Return True for a plan of a machine whose GPU holds the model."""
    return bool(plan["vram_bytes"])


def even_hits(model: Facts, plan: Facts) -> Hits:
    """Return the hits of routing that favours no expert: those cached over all. A floor."""
    if not plan["tiered"]:
        return Hits(1.0, 0.0) if on_gpu(plan) else Hits(0.0, 1.0)
    experts = max(model["experts"], 1)
    vram = min(1.0, plan["device_cache_slots"] / experts)
    return Hits(vram, min(1.0 - vram, plan["cache_slots"] / experts))


def hits_at(even: Hits, rate: float) -> Hits:
    """Return `even` with another hit rate, 0 to 1, that VRAM and RAM share as before."""
    if even.rate == 0.0:
        return Hits(0.0, rate)
    vram = rate * even.vram / even.rate
    return Hits(vram, rate - vram)


def likely_hits(even: Hits) -> Hits:
    """Return the upper end of the range to expect: half of the misses of `even` are avoided."""
    return hits_at(even, (1.0 + even.rate) / 2)


def decode(
    model: Facts,
    plan: Facts,
    rates: Rates,
    hits: Hits,
    *,
    position: int = 0,
    cpu_share: float | None = None,
) -> Estimate:
    """Return the estimate for one token after `position` others.

    `cpu_share`, 0 to 1: of the experts in RAM beside a GPU the processor computes this share; None
    is the share with which it and PCIe end together.
    """
    step = _Step(model, plan, position)
    if not on_gpu(plan):
        return _decode_on_host(step, rates, hits)
    if cpu_share is not None:
        return _decode_beside_gpu(step, rates, hits, cpu_share)
    tried = (_decode_beside_gpu(step, rates, hits, share) for share in _shares(step, rates, hits))
    return min(tried, key=lambda estimate: estimate.seconds)


class _Step:
    """Bytes that one token needs, wherever they lie."""

    def __init__(self, model: Facts, plan: Facts, position: int) -> None:
        layers: Sequence[int] = plan["layer_bytes"]
        streamed: Iterable[bool] = plan["streamed"]
        self.layers = len(layers)
        self.tiered: bool = plan["tiered"]
        self.dense = sum(layers) + plan["head_bytes"] + plan["kv_bytes_per_token"] * position
        self.streamed = sum(size for size, away in zip(layers, streamed, strict=False) if away)
        chosen = _moe_layers(model) * model["num_experts_per_tok"]
        self.routed: float = chosen * model["expert_bytes"]


def _moe_layers(model: Facts) -> int:
    per_layer: int = model["n_routed_experts"]
    layers: int = model["experts"] // per_layer if per_layer else 0
    return layers


def _host(rates: Rates) -> float:
    return min(rates.ram.value, rates.host.value if rates.host else math.inf) * 1e9


def _decode_on_host(step: _Step, rates: Rates, hits: Hits) -> Estimate:
    read = step.routed * hits.ssd + step.streamed
    used = step.dense + step.routed
    floor = {
        "ssd": read / rates.ssd.value * 1e-9,
        "ram": (used + read) / rates.ram.value * 1e-9,
        "host": used / _host(rates),
    }
    moved = {"ssd": read, "pcie": 0.0, "ram": used + read, "vram": 0.0, "host": used}
    return Estimate(1, OVERHEAD * max(floor.values()), moved, floor)


def _shares(step: _Step, rates: Rates, hits: Hits) -> list[float]:
    """Return the processor's shares of experts one of which is the best.

    The time is the larger of lines that rise and of lines that fall with the share: the least is
    at an end, or where one of each kind meet. The first of equals is taken: where something else
    takes longer, both sides end together.
    """
    left = step.routed * (1.0 - hits.vram)
    if left <= 0:
        return [0.0]
    host, pcie = _host(rates), rates.pcie.value * 1e9
    dense = _dense_seconds(step, rates, hits)
    both_end = host / (host + pcie)
    # Copies of streamed layers begin with the token, the processor's part after the dense part.
    with_streams = ((left + step.streamed) / pcie - dense) * host * pcie / (host + pcie) / left
    return [both_end, min(1.0, max(0.0, with_streams)), 0.0, 1.0]


def _dense_seconds(step: _Step, rates: Rates, hits: Hits) -> float:
    in_vram = (step.dense + step.routed * hits.vram) / rates.vram.value * 1e-9
    return in_vram + _hand_offs(step)


def _hand_offs(step: _Step) -> float:
    return HAND_OFF_SECONDS * step.layers if step.tiered else 0.0


def _decode_beside_gpu(step: _Step, rates: Rates, hits: Hits, share: float) -> Estimate:
    in_vram = step.routed * hits.vram
    read = step.routed * hits.ssd
    left = step.routed - in_vram
    computed = share * left
    copied = left - computed
    pcie, ram = rates.pcie.value * 1e9, rates.ram.value * 1e9
    ssd = read / rates.ssd.value * 1e-9
    experts = max(ssd, computed / _host(rates), copied / pcie, (left + read) / ram)
    all_copies = (copied + step.streamed) / pcie
    all_ram = (left + read + step.streamed) / ram
    seconds = max(_dense_seconds(step, rates, hits) + experts, all_copies, all_ram)
    used = step.dense + in_vram + copied
    floor = {
        "ssd": ssd,
        "pcie": all_copies,
        "ram": all_ram,
        "host": computed / _host(rates),
        "vram": (step.dense + in_vram) / rates.vram.value * 1e-9,
        "hand-offs": _hand_offs(step),
    }
    moved = {
        "ssd": read,
        "pcie": copied + step.streamed,
        "ram": left + read + step.streamed,
        "vram": used,
        "host": computed,
    }
    return Estimate(1, OVERHEAD * seconds, moved, floor)


def prefill(
    model: Facts, plan: Facts, rates: Rates, tokens: int, hits: Hits | None = None
) -> Estimate:
    """Return the estimate for a prompt of `tokens`, 1 or more, from an empty context.

    The prompt passes the layers in pieces of the plan's `chunk`. Each piece needs nearly every
    expert: those that are not in RAM or VRAM are read once for each, and beside a GPU all that are
    not in VRAM are copied there. `hits` are even_hits() by default. On a GPU the dense part and
    the copies of a layer's experts follow each other; reads go on all the time.
    """
    hits = even_hits(model, plan) if hits is None else hits
    total: Estimate | None = None
    for start in range(0, tokens, plan["chunk"]):
        rows = min(plan["chunk"], tokens - start)
        piece = _piece(model, plan, rates, hits, _Piece(model, plan, start, rows))
        total = piece if total is None else _joined(total, piece)
    if total is None:
        raise ValueError(f"tokens must be 1 or more, not {tokens}")
    return total


def _joined(first: Estimate, second: Estimate) -> Estimate:
    return Estimate(
        first.tokens + second.tokens,
        first.seconds + second.seconds,
        {name: count + second.bytes[name] for name, count in first.bytes.items()},
        {name: seconds + second.floor[name] for name, seconds in first.floor.items()},
    )


class _Piece:
    """What rows of a prompt need: bytes of distinct experts, and FLOPs with and without them."""

    def __init__(self, model: Facts, plan: Facts, start: int, rows: int) -> None:
        self.rows = rows
        step = _Step(model, plan, start)
        self.dense_bytes, self.streamed = step.dense, step.streamed
        moe = _moe_layers(model)
        self.distinct = moe * distinct_experts(model, rows)  # experts of all layers
        self.expert_bytes = self.distinct * model["expert_bytes"]
        self.pairs = rows * moe * model["num_experts_per_tok"]
        hidden, layers = model["hidden_size"], model["num_hidden_layers"]
        shared = model["n_shared_experts"] * model["moe_intermediate_size"]
        mlps = (layers - moe) * model["intermediate_size"] + moe * shared
        weights = layers * _attention_weights(model) + 3 * hidden * mlps
        self.dense_flops = 2.0 * rows * (weights + layers * _scores(model, start, rows))
        self.pair_flops = 6.0 * hidden * model["moe_intermediate_size"]


def distinct_experts(model: Facts, rows: int) -> float:
    """Return how many experts of a layer `rows` rows choose, if routing favours none."""
    experts: int = model["n_routed_experts"]
    if experts == 0:
        return 0.0
    return experts * (1.0 - (1.0 - model["num_experts_per_tok"] / experts) ** rows)


def _attention_weights(model: Facts) -> int:
    """Return how many weights a layer's attention multiplies a row with."""
    hidden, heads, q_rank = model["hidden_size"], model["num_attention_heads"], model["q_lora_rank"]
    nope, rope, value = model["qk_nope_head_dim"], model["qk_rope_head_dim"], model["v_head_dim"]
    queries = heads * (nope + rope)
    q = hidden * q_rank + q_rank * queries if q_rank else hidden * queries
    latent: int = model["kv_lora_rank"]
    keys = hidden * (latent + rope) + latent * heads * (nope + value)
    return int(q + keys + heads * value * hidden)


def _scores(model: Facts, start: int, rows: int) -> float:
    """Return the multiplications of a row with the keys and values before it, on average."""
    width = model["qk_nope_head_dim"] + model["qk_rope_head_dim"] + model["v_head_dim"]
    return float(model["num_attention_heads"] * width * (start + rows / 2))


def _piece(model: Facts, plan: Facts, rates: Rates, hits: Hits, piece: _Piece) -> Estimate:
    read = piece.expert_bytes * hits.ssd
    ram = rates.ram.value * 1e9
    if not on_gpu(plan):
        read += piece.streamed
        used = piece.dense_bytes + piece.expert_bytes
        flops = piece.dense_flops + piece.pairs * piece.pair_flops
        floor = {
            "ssd": read / rates.ssd.value * 1e-9,
            "ram": (used + read) / ram,
            "arithmetic": flops / rates.cpu_tflops.value * 1e-12,
        }
        moved = {"ssd": read, "pcie": 0.0, "ram": used + read, "vram": 0.0, "host": used}
        return Estimate(piece.rows, OVERHEAD * max(floor.values()), moved, floor)
    tflops, vram = rates.gpu_tflops.value * 1e12, rates.vram.value * 1e9
    padded = max(1.0, rates.gpu_rows / piece.rows)
    dense_arithmetic = piece.dense_flops * padded / tflops
    pairs = max(float(piece.pairs), piece.distinct * rates.gpu_rows)
    expert_arithmetic = pairs * piece.pair_flops / tflops
    copied = piece.expert_bytes * (1.0 - hits.vram)
    copies = copied / rates.pcie.value * 1e-9
    all_copies = (copied + piece.streamed) / rates.pcie.value * 1e-9
    crossed = copied + piece.streamed + read
    expert_part = max(copies, expert_arithmetic, piece.expert_bytes / vram)
    seconds = max(
        read / rates.ssd.value * 1e-9,
        crossed / ram,
        all_copies,
        max(dense_arithmetic, piece.dense_bytes / vram) + expert_part,
    )
    used = piece.dense_bytes + piece.expert_bytes
    floor = {
        "ssd": read / rates.ssd.value * 1e-9,
        "pcie": all_copies,
        "ram": crossed / ram,
        "vram": used / vram,
        "arithmetic": dense_arithmetic + expert_arithmetic,
    }
    moved = {"ssd": read, "pcie": copied + piece.streamed, "ram": crossed, "vram": used, "host": 0}
    return Estimate(piece.rows, OVERHEAD * seconds, moved, floor)
