"""Prints README's table of machines: what `dsfp4 plan` expects of eight, in Markdown.

Nothing is measured. Capacities and the rates of RAM and SSD are those that the table shows; VRAM's
is of the cards' data sheets, PCIe's is nine tenths of that; the rest is what plan assumes.
"""

import argparse
from collections.abc import Iterable
from dataclasses import dataclass

from dsfp4 import _core
from dsfp4.errors import MemoryLimitError
from dsfp4.estimate import Rate, Rates
from dsfp4.forecast import Forecast, Hardware, forecast

_PROMPT = 4096
_CONTEXT = 8192  # tokens


@dataclass(frozen=True)
class Described:
    """GB and GB/s; without a GPU, vram, pcie and vram_rate are 0."""

    name: str
    vram: int
    ram: int
    ram_rate: float
    ssd: float
    pcie: float
    vram_rate: float


MACHINES = (
    Described("laptop", 8, 32, 70, 7, 14, 256),
    Described("RTX 3060", 12, 32, 45, 3.5, 28, 360),
    Described("RTX 4060 Ti", 16, 64, 50, 7, 14, 288),
    Described("RTX 5080", 16, 96, 75, 14, 55, 960),
    Described("RTX 4090", 24, 128, 60, 7, 28, 1008),
    Described("RTX 5090", 32, 192, 80, 14, 55, 1792),
    Described("workstation", 24, 256, 200, 14, 55, 1000),
    Described("no GPU", 0, 96, 75, 14, 0, 0),
)


def expect(planner: _core.Planner, machine: Described) -> Forecast | None:
    """Return the forecast; None if the model cannot run there."""
    default = Rates()
    rates = Rates(
        ssd=Rate(machine.ssd),
        ram=Rate(machine.ram_rate),
        pcie=Rate(machine.pcie) if machine.vram else default.pcie,
        vram=Rate(machine.vram_rate) if machine.vram else default.vram,
    )
    vram = machine.vram * 10**9 or None
    hardware = Hardware(vram, machine.ram * 10**9, 0, rates, {"max_context": _CONTEXT})
    try:
        return forecast(planner, hardware)
    except MemoryLimitError:
        return None


def number(value: float) -> str:
    """Return two digits of it."""
    return f"{value:.2g}" if value < 10 else f"{float(f'{value:.2g}'):.0f}"


def cells(found: Forecast | None) -> tuple[str, str]:
    """Return tokens/s from evenly used experts to repeated ones, and seconds of a prompt."""
    if found is None:
        return "does not run", "-"
    slow, fast = (row.estimate.tokens_per_second for row in (found.evenly, found.likely))
    speeds = dict.fromkeys((number(slow), number(fast)))  # one, if both are the same
    decode = " to ".join(speeds)
    [seconds] = [prompt.seconds for prompt in found.prompts if prompt.tokens == _PROMPT]
    return decode, f"{number(seconds)} s"


def table(models: Iterable[str]) -> Iterable[str]:
    """Return the table's lines."""
    models = list(models)
    heads = [f"{name}, tokens/s | a prompt of {_PROMPT} tokens" for name in models]
    yield "| machine | VRAM | RAM | SSD | " + " | ".join(heads) + " |"
    yield "|---" * (4 + 2 * len(models)) + "|"
    planners = {
        (name, device): _core.Planner(name, published=True, device=device)
        for name in models
        for device in ("cpu", "cuda")
    }
    for machine in MACHINES:
        device = "cuda" if machine.vram else "cpu"
        row = [
            machine.name,
            f"{machine.vram} GB" if machine.vram else "-",
            f"{machine.ram} GB at {machine.ram_rate:g} GB/s",
            f"{machine.ssd:g} GB/s",
        ]
        for name in models:
            row += cells(expect(planners[name, device], machine))
        yield "| " + " | ".join(row) + " |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "models", nargs="*", default=["deepseek-r1-fp4", "deepseek-v2-lite"], metavar="MODEL"
    )
    print("\n".join(table(parser.parse_args().models)))
