"""Plays a routing through the plan of `dsfp4 plan` as discrete events, beside its estimate.

A token goes through the layers as the engine takes it: the dense part, the router's choice, then
its experts. Those in VRAM are computed there. Those in RAM go to the processor or over PCIe,
whichever ends first. Those on the SSD are read one after the other, and go on as soon as they are
there. RAM is a wire as well: each read writes it, each use reads it. Dense weights that are
streamed are copied (without a GPU: read) into two buffers while other layers compute.

The cache has the plan's slots, cold at first, and one order of worth: `lru`, or `counts` of uses
that fade by 0.98 a token, which is near the engine's default policy. The routing is one of Zipf's
law, or --trace: a NumPy file .npz with `used`, integers [MoE layers, tokens, experts per token], as
Model.routing_trace() gives them. Times are of the model of the machine, not of this one: the same
seed gives the same figures everywhere.
"""

import argparse
import heapq
import itertools
import json
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dsfp4.cli.options import add_json_flag, integer, real
from dsfp4.cli.parser import CommandParser
from dsfp4.cli.plan import add_arguments, prepare
from dsfp4.errors import Dsfp4Error
from dsfp4.estimate import HAND_OFF_SECONDS, OVERHEAD, Hits, Rates, decode, on_gpu

FADING = 0.98
BUFFERS = 2  # of streamed layers
TIERS = ("vram", "ram", "ssd")


class Wire:
    """Serves requests in their order at a rate in bytes/s."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.free = 0.0
        self.bytes = 0.0
        self.busy = 0.0

    def end(self, now: float, size: float) -> float:
        """Return when a request made now would be served."""
        return max(self.free, now) + size / self.rate

    def serve(self, now: float, size: float) -> float:
        self.free = self.end(now, size)
        self.bytes += size
        self.busy += size / self.rate
        return self.free


class Cache:
    """Which of all experts are in VRAM and in RAM: one cache in two tiers."""

    def __init__(self, experts: int, vram: int, ram: int, policy: str) -> None:
        self.slots = {"vram": vram, "ram": ram}
        self.here = {tier: np.zeros(experts, bool) for tier in self.slots}
        self.count = dict.fromkeys(self.slots, 0)
        self.worth = np.zeros(experts)
        self.policy = policy

    def tier(self, expert: int) -> str:
        return next((tier for tier, here in self.here.items() if here[expert]), "ssd")

    def note(self, chosen: np.ndarray, time: int) -> None:
        """Count that a layer uses these experts; `time` is in tokens."""
        if self.policy == "lru":
            self.worth[chosen] = time + 1
        else:
            self.worth[chosen] += FADING**-time

    def put(self, expert: int, tier: str, pinned: np.ndarray) -> None:
        """Move an expert there; what has the least worth, and is not pinned, makes room."""
        if self.slots[tier] == 0:
            return
        if self.count[tier] == self.slots[tier]:
            worth = np.where(self.here[tier], self.worth, np.inf)
            worth[pinned] = np.inf
            worst = int(np.argmin(worth))
            if not np.isfinite(worth[worst]):
                return
            self._drop(worst, tier)
            if tier == "vram":
                self._drop(expert, "ram")  # the one that VRAM gives up gets its slot
                self.put(worst, "ram", pinned)
        self._drop(expert, "ram")
        self.here[tier][expert] = True
        self.count[tier] += 1

    def _drop(self, expert: int, tier: str) -> None:
        self.count[tier] -= int(self.here[tier][expert])
        self.here[tier][expert] = False


@dataclass
class Played:
    """What tokens took, in seconds, and found; bytes and busy seconds by wire."""

    tokens: int = 0
    seconds: float = 0.0
    found: dict[str, int] = field(default_factory=lambda: dict.fromkeys(TIERS, 0))
    bytes: dict[str, float] = field(default_factory=dict)
    busy: dict[str, float] = field(default_factory=dict)

    @property
    def hits(self) -> Hits:
        """The shares of experts that were found."""
        chosen = max(sum(self.found.values()), 1)
        return Hits(self.found["vram"] / chosen, self.found["ram"] / chosen)


class Machine:
    """Wires, and the events that are to come."""

    def __init__(self, rates: Rates, gpu: bool) -> None:
        host = min(rates.ram.value, rates.host.value if rates.host else np.inf)
        values = {"ssd": rates.ssd.value, "ram": rates.ram.value, "host": host}
        if gpu:
            values |= {"pcie": rates.pcie.value, "vram": rates.vram.value}
        self.wires = {name: Wire(value * 1e9) for name, value in values.items()}
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def at(self, time: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time, next(self._order), event))

    def serve(self, size: float, *names: str) -> float:
        """Return when all of these wires have served a request made now."""
        return max(self.wires[name].serve(self.now, size) for name in names)

    def run(self) -> None:
        """Let all events happen."""
        while self._events:
            self.now, _, event = heapq.heappop(self._events)
            event()


class Player:
    """One sequence, token after token."""

    def __init__(
        self, model: Mapping[str, Any], plan: Mapping[str, Any], rates: Rates, policy: str
    ) -> None:
        self.gpu = on_gpu(plan)
        self.machine = Machine(rates, self.gpu)
        self.main = "vram" if self.gpu else "host"  # serves dense weights
        self.tiered: bool = plan["tiered"]
        self.layers: Sequence[int] = plan["layer_bytes"]
        self.head: int = plan["head_bytes"]
        self.kv: float = plan["kv_bytes_per_token"] / len(self.layers)
        self.per_layer: int = model["n_routed_experts"]
        self.expert_bytes: int = model["expert_bytes"]
        moe = model["experts"] // self.per_layer if self.per_layer else 0
        self.dense_layers = len(self.layers) - moe
        self.cache = Cache(
            model["experts"], plan["device_cache_slots"], plan["cache_slots"], policy
        )
        away = [layer for layer, streamed in enumerate(plan["streamed"]) if streamed]
        self._streamed = set(away)
        self._to_stream = itertools.cycle(away)
        self._arrived: dict[int, float] = {}
        self.played = Played()
        self._token = 0
        for _ in range(min(BUFFERS, len(away))):
            self._stream_next()

    def play(self, used: np.ndarray, position: int = 0) -> Played:
        """Return what tokens took whose choices are `used` [MoE layers, tokens, k]."""
        wires = self.machine.wires
        before = {name: (wire.bytes, wire.busy) for name, wire in wires.items()}
        self.played = Played(tokens=used.shape[1])
        start = self.machine.now
        for token in range(used.shape[1]):
            self._start_layer(0, used[:, token], position)
            self.machine.run()
            self._token += 1
        self.played.seconds = self.machine.now - start
        for name, wire in wires.items():
            self.played.bytes[name] = wire.bytes - before[name][0]
            self.played.busy[name] = wire.busy - before[name][1]
        return self.played

    def _stream_next(self) -> None:
        layer = next(self._to_stream)
        wires = ("pcie", "ram") if self.gpu else ("ssd", "ram")
        self._arrived[layer] = self.machine.serve(self.layers[layer], *wires)

    def _start_layer(self, layer: int, choices: np.ndarray, position: int) -> None:
        if layer == len(self.layers):
            self._finish(self._serve_main(self.head), lambda: None)
            return
        begin = max(self.machine.now, self._arrived.get(layer, 0.0))
        self.machine.at(begin, lambda: self._dense(layer, choices, position))

    def _dense(self, layer: int, choices: np.ndarray, position: int) -> None:
        end = self._serve_main(self.layers[layer] + self.kv * position)
        hand_off = HAND_OFF_SECONDS if self.gpu and self.tiered else 0.0
        self._finish(end + hand_off, lambda: self._experts(layer, choices, position))

    def _serve_main(self, size: float) -> float:
        return self.machine.serve(size, *(("vram",) if self.gpu else ("host", "ram")))

    def _finish(self, time: float, then: Callable[[], None]) -> None:
        self.machine.at(time, then)

    def _experts(self, layer: int, choices: np.ndarray, position: int) -> None:
        if layer in self._streamed:
            self._stream_next()  # into the buffer that this layer no longer needs
        moe_layer = layer - self.dense_layers
        if moe_layer < 0 or not len(choices):
            self._start_layer(layer + 1, choices, position)
            return
        chosen = moe_layer * self.per_layer + choices[moe_layer].astype(np.int64)
        self.cache.note(chosen, self._token)
        left = len(chosen)

        def done() -> None:
            nonlocal left
            left -= 1
            if left == 0:
                self._start_layer(layer + 1, choices, position)

        for expert in chosen.tolist():
            tier = self.cache.tier(expert) if self.tiered else ("vram" if self.gpu else "ram")
            self.played.found[tier] += 1
            if tier == "vram":
                self.machine.at(self.machine.serve(self.expert_bytes, "vram"), done)
            elif tier == "ram":
                self._use(expert, chosen, done)
            else:
                self._read(expert, chosen, done)

    def _read(self, expert: int, chosen: np.ndarray, done: Callable[[], None]) -> None:
        def arrived() -> None:
            self.cache.put(expert, "ram", chosen)
            self._use(expert, chosen, done)

        self.machine.at(self.machine.serve(self.expert_bytes, "ssd", "ram"), arrived)

    def _use(self, expert: int, chosen: np.ndarray, done: Callable[[], None]) -> None:
        """Compute with an expert that is in RAM, on the side that ends first."""
        wires, now, size = self.machine.wires, self.machine.now, self.expert_bytes
        if not self.gpu or wires["host"].end(now, size) <= wires["pcie"].end(now, size):
            self.machine.at(self.machine.serve(size, "host", "ram"), done)
            return

        def copied() -> None:
            self.cache.put(expert, "vram", chosen)
            self.machine.at(self.machine.serve(size, "vram"), done)

        self.machine.at(self.machine.serve(size, "pcie", "ram"), copied)


def zipf_routing(
    layers: int, experts: int, k: int, tokens: int, skew: float, seed: int
) -> np.ndarray:
    """Return choices [layers, tokens, k]: of each layer's ranks, drawn without return."""
    random = np.random.default_rng(seed)
    used = np.empty((layers, tokens, k), np.int32)
    log_weights = -skew * np.log(np.arange(1, experts + 1))
    for layer in range(layers):
        weights = log_weights[random.permutation(experts)]
        keys = weights + random.gumbel(size=(tokens, experts))
        used[layer] = np.argpartition(keys, experts - k, axis=1)[:, experts - k :]
    return used


def load_routing(path: Path, model: Mapping[str, Any]) -> np.ndarray:
    """Return `used` of a file. Raises ValueError if it is not of this model."""
    if not zipfile.is_zipfile(path) and path.exists():
        raise ValueError(f"'{path}' is no .npz file; numpy.savez(file, used=...) makes one")
    with np.load(path) as file:
        if "used" not in file:
            raise ValueError(f"'{path}' has no array `used`; it has {', '.join(file) or 'none'}")
        used: np.ndarray = file["used"]
    experts = model["n_routed_experts"]
    layers = model["experts"] // max(experts, 1)
    shape = (layers, model["num_experts_per_tok"])
    if used.ndim != 3 or (used.shape[0], used.shape[2]) != shape or used.dtype.kind not in "iu":
        raise ValueError(
            f"'{path}': `used` is {used.dtype} {list(used.shape)}, and the model needs integers "
            f"[{shape[0]}, tokens, {shape[1]}]"
        )
    if used.size and not 0 <= used.min() <= used.max() < experts:
        raise ValueError(f"'{path}': `used` has experts that are not from 0 to {experts - 1}")
    return used


def simulate(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what was played and the estimate at the hit rate that it had."""
    planner, hardware, result = prepare(arguments)
    model, plan = planner.model, result.plan
    tokens = arguments.warm + arguments.tokens
    if arguments.trace:
        used = load_routing(arguments.trace, model)
        if used.shape[1] < tokens:
            raise ValueError(
                f"'{arguments.trace}' has {used.shape[1]} tokens, and --warm and --tokens want "
                f"{tokens}"
            )
    else:
        experts = model["n_routed_experts"]
        layers = model["experts"] // experts if experts else 0
        shape = (layers, experts, model["num_experts_per_tok"] if experts else 0)
        used = zipf_routing(*shape, tokens, arguments.skew, arguments.seed)
    player = Player(model, plan, hardware.rates, arguments.policy)
    player.play(used[:, : arguments.warm], result.position)
    played = player.play(used[:, arguments.warm : tokens], result.position)
    estimate = decode(model, plan, hardware.rates, played.hits, position=result.position)
    return {
        "model": arguments.model,
        "machine": asdict(hardware),
        "policy": arguments.policy,
        "warm_tokens": arguments.warm,
        "played": asdict(played),
        "hit_rates": asdict(played.hits),
        "tokens_per_second": played.tokens / played.seconds,
        "estimated_tokens_per_second": estimate.tokens_per_second,
        "floor_tokens_per_second": OVERHEAD * estimate.tokens_per_second,
        "binds": estimate.binds,
    }


def lines(report: Mapping[str, Any]) -> list[str]:
    """Return the report for people."""
    played, hits = report["played"], report["hit_rates"]
    found = hits["vram"] + hits["ram"]
    busy = {name: seconds / played["seconds"] for name, seconds in played["busy"].items()}
    return [
        f"{report['model']}: {played['tokens']} tokens after {report['warm_tokens']}, policy "
        f"{report['policy']}",
        f"experts found: {hits['vram']:.3f} in VRAM, {hits['ram']:.3f} in RAM, {1 - found:.3f} on "
        "the SSD",
        f"played:    {report['tokens_per_second']:8.3f} tokens/s",
        f"estimate:  {report['estimated_tokens_per_second']:8.3f} tokens/s, bound by "
        f"{report['binds']}",
        f"its floor: {report['floor_tokens_per_second']:8.3f} tokens/s",
        "busy: " + ", ".join(f"{name} {100 * share:.0f} %" for name, share in busy.items()),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = CommandParser(
        prog="simulate.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        examples=("bench/simulate.py deepseek-r1-fp4 --gpu-memory 16 --ram 96 --ssd-rate 14",),
    )
    add_arguments(parser)
    routing = parser.add_argument_group("routing")
    routing.add_argument("--trace", type=Path, metavar="NPZ", help="a recorded routing")
    routing.add_argument("--skew", type=real(0, 5), default=0.8, metavar="Z", help="%(default)s")
    routing.add_argument("--seed", type=integer(0, 2**32 - 1), default=1, metavar="N")
    routing.add_argument("--warm", type=integer(0, 10**5), default=200, metavar="TOKENS",
                         help="that are not counted; %(default)s")  # fmt: skip
    routing.add_argument("--tokens", type=integer(1, 10**5), default=64, metavar="N",
                         help="%(default)s")  # fmt: skip
    routing.add_argument("--policy", choices=["counts", "lru"], default="counts")
    add_json_flag(parser)
    arguments = parser.parse_args(argv)
    try:
        report = simulate(arguments)
    except (Dsfp4Error, OSError, ValueError) as error:
        print(f"simulate.py: error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(report, indent=2) if arguments.json else "\n".join(lines(report)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
