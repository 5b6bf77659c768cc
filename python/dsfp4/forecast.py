"""What a model does on a machine: its plan, how fast that decodes and takes prompts, what helps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dsfp4.errors import MemoryLimitError
from dsfp4.estimate import (
    Estimate,
    Hits,
    Rate,
    Rates,
    decode,
    even_hits,
    hits_at,
    likely_hits,
    prefill,
)

POSITION = 1024  # tokens before the one that is estimated, if the context is twice as long
PROMPTS = (512, 4096, 32768)
_HIT_RATES = (0.25, 0.5, 0.75, 0.9, 1.0)
_LEAST_GAIN = 1.02
_MOST_ADVICE = 2


@dataclass(frozen=True)
class Hardware:
    """A machine in bytes, its rates, and the options of a load that a plan depends on.

    `vram` is what the process may take of a GPU, its context included; None without a GPU. `ram`
    is what other processes leave of RAM; `ram_limit` 0 is the default. `wishes` are keywords of
    _core.Planner.plan.
    """

    vram: int | None
    ram: int
    ram_limit: int
    rates: Rates
    wishes: Mapping[str, Any]

    def plan(self, planner: Any) -> dict[str, Any]:
        """Return the plan that a load would make. Raises MemoryLimitError as a load does."""
        plan: dict[str, Any] = planner.plan(
            ram=self.ram, vram=self.vram, ram_limit=self.ram_limit, **self.wishes
        )
        return plan


@dataclass(frozen=True)
class Decoding:
    """A row of the table: decoding at a hit rate."""

    hits: Hits
    estimate: Estimate


@dataclass(frozen=True)
class Gain:
    """A change of the machine, and how many times as fast decoding then is."""

    change: str
    factor: float


@dataclass(frozen=True)
class Forecast:
    """All of it; `evenly` and `likely` are the ends of the range of speed to expect."""

    plan: dict[str, Any]
    position: int
    evenly: Decoding
    likely: Decoding
    table: list[Decoding]
    prompts: list[Estimate]
    gains: list[Gain]


def forecast(planner: Any, hardware: Hardware, cpu_share: float | None = None) -> Forecast:
    """Plan `planner`'s model for a machine and estimate its speed.

    The table begins with routing that favours no expert and goes on with rounder hit rates above.
    Prompts are those of PROMPTS that fit into the context. Raises MemoryLimitError.
    """
    plan = hardware.plan(planner)
    position = min(POSITION, plan["max_context"] // 2)

    def at(hits: Hits) -> Decoding:
        speed = decode(
            planner.model, plan, hardware.rates, hits, position=position, cpu_share=cpu_share
        )
        return Decoding(hits, speed)

    even = even_hits(planner.model, plan)
    evenly = at(even)
    rates = [rate for rate in _HIT_RATES if rate > even.rate + 0.005]
    return Forecast(
        plan=plan,
        position=position,
        evenly=evenly,
        likely=at(likely_hits(even)),
        table=[evenly, *(at(hits_at(even, rate)) for rate in rates)],
        prompts=[
            prefill(planner.model, plan, hardware.rates, tokens)
            for tokens in PROMPTS
            if tokens <= plan["max_context"]
        ],
        gains=gains(planner, hardware, evenly.estimate.seconds, cpu_share),
    )


def gains(
    planner: Any, hardware: Hardware, seconds: float, cpu_share: float | None = None
) -> list[Gain]:
    """Return the best changes, each of one thing doubled, for a token that takes `seconds` now."""
    found = []
    for change, changed in _changes(hardware):
        try:
            plan = changed.plan(planner)
        except MemoryLimitError:
            continue
        hits = even_hits(planner.model, plan)
        position = min(POSITION, plan["max_context"] // 2)
        then = decode(
            planner.model, plan, changed.rates, hits, position=position, cpu_share=cpu_share
        )
        found.append(Gain(change, seconds / then.seconds))
    found.sort(key=lambda gain: -gain.factor)
    return [gain for gain in found if gain.factor >= _LEAST_GAIN][:_MOST_ADVICE]


def _changes(hardware: Hardware) -> Sequence[tuple[str, Hardware]]:
    rates = hardware.rates
    changes = [
        (
            f"twice the RAM, {2e-9 * hardware.ram:.3g} GB",
            replace(hardware, ram=2 * hardware.ram, ram_limit=2 * hardware.ram_limit),
        ),
        _faster(hardware, "an SSD of", ssd=_doubled(rates.ssd)),
        _faster(hardware, "RAM of", ram=_doubled(rates.ram), host=rates.host),
    ]
    if hardware.vram is not None:
        changes += [
            (
                f"twice the VRAM, {2e-9 * hardware.vram:.3g} GB",
                replace(hardware, vram=2 * hardware.vram),
            ),
            _faster(hardware, "PCIe of", pcie=_doubled(rates.pcie)),
            _faster(hardware, "VRAM of", vram=_doubled(rates.vram)),
        ]
    return changes


def _doubled(rate: Rate) -> Rate:
    return replace(rate, value=2 * rate.value)


def _faster(hardware: Hardware, what: str, **rates: Rate | None) -> tuple[str, Hardware]:
    changed = replace(hardware.rates, **rates)  # type: ignore[arg-type]
    value = next(rate.value for rate in rates.values() if rate is not None)
    return f"{what} {value:.3g} GB/s", replace(hardware, rates=changed)
