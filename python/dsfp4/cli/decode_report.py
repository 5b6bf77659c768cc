"""The report of `dsfp4 bench decode` as text."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dsfp4.cli.decode_floor import DEPTH, floor_of

_PART_NAMES = {
    "ssd": "disk",
    "compute": "arithmetic",
    "dense": "dense part",
    "wires": "experts over both wires",
    "copies": "weights over PCIe",
}


def lines(report: Mapping[str, Any]) -> Iterable[str]:
    """Return the report line by line."""
    yield from _rates(report)
    for name in ("cold", "warm"):
        yield from _run(name, report[name])
    yield from _shares(report["cpu_shares"])
    for row in report["stages"]:
        yield _stage(row, report["tokens"])
    for prompt in report["prefill"]:
        where = (
            "experts in RAM"
            if prompt["cached"]
            else (f"read {prompt['read_over_needed']:.4f} times the weights that it needs")
        )
        yield (
            f"prefill of {prompt['tokens']}: {prompt['tokens_per_s']:.1f} tokens/s, "
            f"{prompt['seconds']:.1f} s; {_floor(prompt['floor_seconds'])}; {where}"
        )
    yield f"peak memory {report['peak_rss_bytes'] / 1e9:.2f} GB"


def _rates(report: Mapping[str, Any]) -> Iterable[str]:
    disk = report["measured_ssd_gb_s"]
    windows = report["measured_ssd_windows"]
    yield (
        f"disk: {disk:.2f} GB/s ({min(windows):.2f} to {max(windows):.2f} in {len(windows)} "
        f"windows), blocks of {report['measured_ssd_block_bytes'] >> 10} KiB, {DEPTH} deep; "
        f"{report['reading_cpu_seconds_per_gb']:.2f} s of processor time a GB"
    )
    held = report["ssd_rate"]
    if held is not None:
        yield (
            f"reads were held to {held:g} GB/s, as if the disk were that slow: what follows is of "
            f"that rate, not of this disk"
            if held <= disk
            else f"reads were to be held to {held:g} GB/s, but this disk gives less"
        )
    wires = report["wires"]
    if wires is not None:
        rate = {name: value / 1e9 for name, value in wires.items()}
        yield (
            f"wires: {rate['copies']:.1f} GB/s over PCIe alone, {rate['host']:.1f} by the "
            f"processor alone; at once {rate['copies_beside']:.1f} + {rate['host_beside']:.1f} = "
            f"{rate['together']:.1f}"
        )
    dense = report["dense_seconds_per_token"]
    if dense is not None:
        yield f"dense part: {1e3 * dense:.2f} ms a token, with its shared experts and the head"


def _floor(parts: Mapping[str, float]) -> str:
    named = ", ".join(f"{_PART_NAMES[name]} {seconds:.2f}" for name, seconds in parts.items())
    return f"floor {floor_of(parts):.2f} s ({named})"


def _run(name: str, run: Mapping[str, Any]) -> Iterable[str]:
    yield (
        f"{name}: {run['tokens_per_s']:.2f} tokens/s, {run['seconds']:.2f} s; "
        f"{_floor(run['floor_seconds'])}"
    )
    tiers = {tier: 100 * share for tier, share in run["hit_rates"].items()}
    yield (
        f"  useful {run['useful_gb_s']:.2f} GB/s, {100 * run['useful_over_raw']:.0f} % of the "
        f"disk's rate; disk busy {100 * run['ssd_busy']:.0f} % of the time; experts found in VRAM "
        f"{tiers['vram']:.1f} %, in RAM {tiers['ram']:.1f} %, on the SSD {tiers['ssd']:.1f} %"
    )
    per_gb = run["process_cpu_seconds_per_gb_read"]
    if per_gb is not None:
        yield f"  {per_gb:.2f} s of processor time a GB read, computing included"
    if run["uploads"] + run["cpu_bytes"] + run["device_hits"] > 0:
        yield (
            f"  {run['device_hits']} experts were in VRAM, {run['uploads']} copied there "
            f"({run['uploaded_bytes'] / 1e9:.1f} GB), {run['cpu_bytes'] / 1e9:.1f} GB computed "
            f"by the processor in {run['cpu_seconds']:.2f} s"
        )
    if run["layer_upload_bytes"] > 0:
        yield (
            f"  {run['layer_upload_bytes'] / 1e9:.1f} GB of dense weights copied to VRAM; the GPU "
            f"waited for them for {run['layer_upload_wait_seconds']:.2f} s"
        )


def _stage(row: Mapping[str, Any], tokens: int) -> str:
    stages = "all stages overlap" if row["off"] is None else f"without {row['off']}"
    prompt = (
        f", a prompt of {row['prompt_tokens']} in {row['prompt_seconds']:.2f} s"
        if "prompt_seconds" in row
        else ""
    )
    return f"{stages}: {tokens / row['decode_seconds']:.2f} tokens/s{prompt}"


def _shares(rows: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    """Lay the shares out as a table."""
    if not rows:
        return
    columns = ("cpu-share", "tokens/s", "s", "floor s", "over floor", "CPU GB", "PCIe GB")
    cells = [
        (
            str(row["cpu_share"]),
            f"{row['tokens_per_s']:.2f}",
            f"{row['seconds']:.2f}",
            f"{floor_of(row['floor_seconds']):.2f}",
            f"{row['time_over_floor']:.2f}",
            f"{row['cpu_bytes'] / 1e9:.2f}",
            f"{row['uploaded_bytes'] / 1e9:.2f}",
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    for line in (columns, *cells):
        yield "  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True))
