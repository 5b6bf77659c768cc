"""The report of `dsfp4 plan` as text, at most 100 columns wide."""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dsfp4.cli.progress import format_bytes
from dsfp4.estimate import OVERHEAD, Estimate, Rate, Rates
from dsfp4.forecast import Forecast, Hardware

_COLUMNS = 100
_TIERS = ("vram", "ram", "ssd")
_WIRES = ("ssd", "pcie", "ram", "vram")
_BINDS = {
    "ssd": "SSD",
    "pcie": "PCIe",
    "ram": "RAM",
    "vram": "VRAM",
    "host": "processor",
    "hand-offs": "hand-offs between GPU and processor",
    "arithmetic": "arithmetic",
}
Row = Sequence[str]


def lines(
    model: Mapping[str, Any], files: Mapping[str, Any], hardware: Hardware, result: Forecast
) -> Iterable[str]:
    """Return the report line by line."""
    yield from _model(model, files)
    yield from _machine(hardware, result.plan)
    yield ""
    yield from _placement(result.plan)
    yield ""
    yield from _decoding(result)
    yield ""
    yield from _prompts(result.prompts, result.evenly.hits.rate)
    yield ""
    yield from _advice(result)
    for warning in result.plan["warnings"]:
        yield _wrapped(f"warning: {warning}")
    yield _wrapped(
        f"Speeds are estimates: {OVERHEAD:g} times what the bytes take at these rates. Hit rates "
        "depend on the text and on how long the model has been running."
    )


def _wrapped(text: str) -> str:
    return textwrap.fill(
        text, _COLUMNS, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


def _model(model: Mapping[str, Any], files: Mapping[str, Any]) -> Iterable[str]:
    experts = ""
    if model["experts"]:
        moe = model["experts"] // model["n_routed_experts"]
        experts = (
            f", {moe} of them with {model['n_routed_experts']} experts of "
            f"{format_bytes(model['expert_bytes'])}, {model['num_experts_per_tok']} active"
        )
    yield _wrapped(f"{files['name']}: {model['num_hidden_layers']} layers{experts}")
    needed = f"on disk: {format_bytes(files['needed_bytes'])}"
    if files["files"]:
        needed += f" in {len(files['files'])} files"
    if files["unneeded_bytes"]:
        names = ", ".join(files["unneeded_files"])
        needed += (
            f"; {format_bytes(files['unneeded_bytes'])} more is not needed to decode"
            f"{f', {names}' if names else ', and `dsfp4 pull` leaves it out'}"
        )
    yield _wrapped(needed)


def _machine(hardware: Hardware, plan: Mapping[str, Any]) -> Iterable[str]:
    ram = f"RAM {format_bytes(plan['ram_bytes'])} of {format_bytes(hardware.ram)}"
    if hardware.vram is None:
        yield f"takes, without a GPU: {ram}"
    else:
        used = sum(role["bytes"] for role in plan["roles"] if role["tier"] == "vram")
        yield f"takes: VRAM {format_bytes(used)} of {format_bytes(hardware.vram)}, {ram}"
    yield _wrapped(f"rates: {_rates(hardware.rates, hardware.vram is not None)}")


def _rates(rates: Rates, gpu: bool) -> str:
    wires = [("SSD", rates.ssd), ("RAM", rates.ram)]
    if gpu:
        wires += [("PCIe", rates.pcie), ("VRAM", rates.vram)]
    tflops = rates.gpu_tflops if gpu else rates.cpu_tflops

    def text(name: str, rate: Rate, unit: str) -> str:
        return f"{name} {rate.value:.3g} {unit} ({rate.source})"

    shown = [text(name, rate, "GB/s") for name, rate in wires]
    return ", ".join([*shown, text("arithmetic", tflops, "TFLOP/s")])


def _placement(plan: Mapping[str, Any]) -> Iterable[str]:
    roles: dict[str, dict[str, int]] = {}
    formats: dict[str, str] = {}
    for role in plan["roles"]:
        roles.setdefault(role["role"], {})[role["tier"]] = role["bytes"]
        formats.setdefault(role["role"], role["format"])
    rows: list[Row] = [("", "VRAM", "RAM", "SSD", "format")]
    for name, sizes in roles.items():
        cells = [format_bytes(sizes[tier]) if tier in sizes else "" for tier in _TIERS]
        rows.append((name, *cells, formats[name]))
    yield f"placement for a context of {plan['max_context']} tokens"
    yield from _table(rows, left=(0, 4))
    away = sum(plan["streamed"])
    if away:
        wire = "PCIe" if plan["vram_bytes"] else "SSD"
        yield f"{away} of {len(plan['layer_bytes'])} layers' dense weights cross {wire} each time"
    if plan["conversion"]:
        yield _wrapped(f"converted while loading: {plan['conversion']}")


def _decoding(result: Forecast) -> Iterable[str]:
    rows: list[Row] = [
        ("hit rate", "tokens/s", "ms", "SSD", "PCIe", "RAM", "VRAM", "bound by"),
    ]
    for decoding in result.table:
        estimate = decoding.estimate
        evenly = " evenly" if decoding is result.evenly else ""
        rows.append(
            (
                f"{decoding.hits.rate:.2f}{evenly}",
                _speed(estimate),
                _number(1e3 * estimate.seconds),
                *(_amount(estimate.bytes[wire]) for wire in _WIRES),
                _BINDS[estimate.binds],
            )
        )
    yield f"decoding, and bytes of a token on each wire, after {result.position} tokens"
    yield from _table(rows, left=(0, 7))
    low, high = result.evenly, result.likely
    if low.hits.rate >= 1.0:
        yield f"expect {_speed(low.estimate)} tokens/s: no expert is read from the SSD"
        return
    yield _wrapped(
        f"expect {_speed(low.estimate)} to {_speed(high.estimate)} tokens/s: from routing that "
        f"favours no expert to half of the misses avoided, a hit rate of {high.hits.rate:.2f}"
    )


def _number(value: float) -> str:
    """Three digits of it, and never an exponent."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _amount(count: float) -> str:
    return format_bytes(count) if count else "-"


def _speed(estimate: Estimate) -> str:
    speed = estimate.tokens_per_second
    return f"{speed:.0f}" if speed >= 100 else f"{speed:.3g}"


def _prompts(prompts: Sequence[Estimate], cached: float) -> Iterable[str]:
    rows: list[Row] = [("prompt", "first token", "tokens/s", "SSD", "bound by")]
    rows += [
        (
            str(prompt.tokens),
            f"{_number(prompt.seconds)} s",
            _speed(prompt),
            _amount(prompt.bytes["ssd"]),
            _BINDS[prompt.binds],
        )
        for prompt in prompts
    ]
    if prompts:
        yield f"prompts, if {100 * cached:.0f} % of the experts are cached"
        yield from _table(rows, left=(4,))
    else:
        yield "prompts: the context is shorter than those that are estimated"


def _advice(result: Forecast) -> Iterable[str]:
    yield f"decoding is bound by: {_BINDS[result.evenly.estimate.binds]}"
    for gain in result.gains:
        yield f"faster with {gain.change}: {gain.factor:.3g} times"
    if not result.gains:
        yield "no single part, twice as large or fast, makes it faster by 2 %"


def _table(rows: Sequence[Row], left: Sequence[int]) -> Iterable[str]:
    """Lay rows out; the columns in `left` are text, the others numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (
            f"{cell:<{width}}" if index in left else f"{cell:>{width}}"
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join(cells).rstrip()
