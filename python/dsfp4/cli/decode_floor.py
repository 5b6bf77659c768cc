"""What decoding needs at least: the machine's wires, and a run beside them.

For a token beside a GPU: time >= max(SSD bytes / SSD rate, dense time + routed bytes in RAM / the
rate of both wires at once). Without one: max(SSD bytes / SSD rate, time of the arithmetic).
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsfp4 import _core
from dsfp4.errors import UnsupportedError
from dsfp4.model import Model

BLOCK_BYTES = 512 << 10  # as the engine reads
_LEAST_BLOCK_BYTES = 4 << 10  # what O_DIRECT takes
DEPTH = 64
_SSD_SECONDS = 0.75  # a window
_WIRE_SECONDS = 1.0  # alone, the other alone, and both
_WARM_UP = 4  # tokens: a layer is run, recorded, and then replayed
_DENSE_TOKENS = 32
LONGEST = _WARM_UP + _DENSE_TOKENS  # the longest sequence here
_GPU_COUNTS = (
    *("device_hits", "uploads", "uploaded_bytes", "cpu_bytes", "cpu_seconds"),
    *("layer_upload_bytes", "layer_upload_wait_seconds"),
)


@dataclass(frozen=True)
class Rates:
    """The rates of one report, all measured in its run."""

    ssd: float  # GB/s
    compute: float = 0.0  # seconds of a token whose experts are all in RAM; not beside a GPU
    # Beside a GPU, else 0 and None:
    dense: float = 0.0  # seconds of a token without its routed experts
    wires: Mapping[str, float] | None = None  # bytes/s, as _core.measure_wires() gives them


def block_bytes(files: Sequence[Path]) -> int:
    """Return the bytes of a read that measures the disk: fewer where the files are small."""
    sizes = [file.stat().st_size for file in files]
    size = BLOCK_BYTES
    while size > _LEAST_BLOCK_BYTES and sum(bytes // size for bytes in sizes) < DEPTH:
        size //= 2
    return size


def ssd_rate(files: list[Path], reader: str) -> dict[str, float]:
    """Return GB/s, and CPU seconds a GB, of random reads as the engine makes them."""
    kind = "io_uring" if reader == "auto" else reader
    try:
        rate = _core.measure_raw_rate(
            files,
            reader=kind,
            block_bytes=block_bytes(files),
            depth=DEPTH,
            seconds=_SSD_SECONDS,
        )
    except UnsupportedError:
        if reader != "auto":
            raise
        return ssd_rate(files, "pread")
    return {name: float(rate[name]) for name in ("gb_per_second", "cpu_seconds_per_gb")}


class Disk:
    """The disk's rate, in windows that alternate with what it is compared with."""

    def __init__(self, files: list[Path], reader: str) -> None:
        self._files, self._reader = files, reader
        self._measured: list[dict[str, float]] = []

    def measure(self) -> None:
        """Measure one window."""
        self._measured.append(ssd_rate(self._files, self._reader))

    @property
    def windows(self) -> list[float]:
        """The rates in GB/s, in order."""
        return [window["gb_per_second"] for window in self._measured]

    @property
    def gb_per_second(self) -> float:
        """The mean of the windows."""
        return statistics.fmean(self.windows)

    @property
    def cpu_seconds_per_gb(self) -> float:
        """Processor time of the reads themselves, the mean of the windows."""
        return statistics.fmean(window["cpu_seconds_per_gb"] for window in self._measured)


def sum_of(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return several runs of one model as one."""
    total = {name: sum(run[name] for run in runs) for name in runs[0]}
    return total | {"image_bytes": runs[0]["image_bytes"]}


def wire_rates(folder: Path, threads: int, memory_limit: float | None) -> dict[str, float]:
    """Return the rates between RAM, processor and GPU with this model's experts."""
    config = _core.read_config(str(folder))
    return _core.measure_wires(
        "cuda",
        format=routed_format(_core.describe(str(folder))),
        hidden_size=config["hidden_size"],
        moe_intermediate_size=config["moe_intermediate_size"],
        top_k=config["num_experts_per_tok"],
        threads=threads,
        memory_limit=0 if memory_limit is None else int(memory_limit * 1e9),
        seconds=_WIRE_SECONDS,
    )


def routed_format(description: Mapping[str, Any]) -> str:
    """Return the format of most matrices of routed experts."""
    formats = {role["role"]: role["formats"] for role in description["roles"]}["routed experts"]
    return max(formats, key=lambda name: formats[name])


def dense_seconds(model: Model, one_id: int) -> float:
    """Return the median seconds of a token without its routed experts."""
    times = model.token_seconds([one_id] * LONGEST, routed_experts=False)
    return statistics.median(times[_WARM_UP:])


def floor_of(parts: Mapping[str, float]) -> float:
    """Return the seconds that the reads, or all else one after the other, take at least."""
    return max(parts["ssd"], sum(parts.values()) - parts["ssd"])


def floor_parts(run: Mapping[str, Any], rates: Rates) -> dict[str, float]:
    """Return the seconds of `ssd`, and of `compute` or, beside a GPU, `dense` and `wires`."""
    parts = {"ssd": useful_bytes(run) / rates.ssd / 1e9}
    if rates.wires is None:
        parts["compute"] = rates.compute * run["tokens"]
        return parts
    in_ram = run["used_bytes"] - run["device_hits"] * run["image_bytes"]
    parts["dense"] = rates.dense * run["tokens"]
    parts["wires"] = in_ram / rates.wires["together"]
    return parts


def useful_bytes(run: Mapping[str, Any]) -> int:
    """Return the bytes that had to be read."""
    return run["demand_bytes"] + run["prefetched_bytes"] + run["streamed_bytes"]


def hit_rates(run: Mapping[str, Any]) -> dict[str, float]:
    """Return the shares of the chosen experts that were in VRAM, in RAM and on the SSD."""
    found = {
        "vram": run["device_hits"],
        "ram": run["hits"] + run["uploads_ahead_used"],
        "ssd": run["misses"] + run["joined"] + run["prefetched"],
    }
    chosen = max(sum(found.values()), 1)
    return {tier: count / chosen for tier, count in found.items()}


def judge(run: Mapping[str, Any], rates: Rates) -> dict[str, Any]:
    """Set what was measured beside the floor."""
    useful = useful_bytes(run)
    parts = floor_parts(run, rates)
    tiers = hit_rates(run)
    read = run["read_bytes"]
    return {
        "seconds": run["seconds"],
        "tokens_per_s": run["tokens"] / run["seconds"],
        "read_bytes": read,
        "used_bytes": run["used_bytes"],
        "useful_bytes": useful,
        "useful_gb_s": useful / run["seconds"] / 1e9,
        "useful_over_raw": useful / run["seconds"] / 1e9 / rates.ssd,
        "ssd_busy": run["ssd_busy_seconds"] / run["seconds"],
        "floor_seconds": parts,
        "time_over_floor": run["seconds"] / floor_of(parts),
        "hit_rate": tiers["vram"] + tiers["ram"],
        "hit_rates": tiers,
        "misses": run["misses"],
        "prefetched": run["prefetched"],
        "wasted_bytes": run["wasted_bytes"],
        "prediction_recall": run["predicted_used"] / max(run["predictable"], 1),
        "prediction_precision": run["predicted_used"] / max(run["predicted"], 1),
        "wait_seconds": run["wait_seconds"] + run["stream_wait_seconds"],
        "expert_seconds": run["expert_seconds"],
        "process_cpu_seconds": run["process_cpu_seconds"],
        "process_cpu_seconds_per_gb_read": run["process_cpu_seconds"] / read * 1e9
        if read
        else None,
        **{name: run[name] for name in _GPU_COUNTS},
    }


def median_run(runs: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the run of the median time, of an even number the faster of the two."""
    return sorted(runs, key=lambda run: run["seconds"])[(len(runs) - 1) // 2]


def judge_share(
    share: float | None, runs: Sequence[Mapping[str, Any]], rates: Rates
) -> dict[str, Any]:
    """Return a row of the table: the median run of a cpu_share."""
    row = judge(median_run(runs), rates)
    return {"cpu_share": "auto" if share is None else share, **row} | {
        "all_seconds": [run["seconds"] for run in runs]
    }


def judge_prompt(prompt: Mapping[str, Any], rates: Rates) -> dict[str, Any]:
    """Set a prompt beside its floor: its weights read once, and copied once or computed with."""
    judged = dict(prompt)
    compute = judged.pop("compute")
    parts = {"ssd": prompt["needed_bytes"] / rates.ssd / 1e9}
    if rates.wires is None:
        parts["compute"] = compute
    else:
        copied = prompt["routed_bytes"] + prompt["layer_upload_bytes"]
        parts["copies"] = copied / rates.wires["copies"]
    return judged | {
        "floor_seconds": parts,
        "time_over_floor": prompt["seconds"] / floor_of(parts),
    }
