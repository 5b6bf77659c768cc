"""`dsfp4 bench storage PATH`: how fast the disk under a checkpoint is read."""

import argparse
import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dsfp4 import _core, hub
from dsfp4.cli.options import integer, real
from dsfp4.demo import DEMO, resolve_model
from dsfp4.errors import IoError, ParameterError, UnsupportedError

_READERS = ("io_uring", "pread")
_KIB = 1024
_EXPERT_BYTES = 24_838_144  # one of R1's, in whole blocks of 4 KiB
_EXPERTS = 6


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "storage",
        help="how fast files are read, by block size and queue depth",
        description="Reads random blocks of PATH, past the page cache, with each reader. Nothing "
        "is written. The best rate is raw_ssd_gb_s.",
        allow_abbrev=False,
    )
    parser.add_argument("path", metavar="PATH", help="a large file, or a checkpoint folder")
    parser.add_argument("--json", action="store_true", help="everything, for programs")
    parser.add_argument("--reader", choices=_READERS, help="only this one")
    parser.add_argument(
        "--block-kib",
        type=integer(4, 1 << 20),
        nargs="+",
        default=[128, 256, 512, 1024, 2048],
        metavar="KIB",
        help="block sizes, multiples of 4 KiB",
    )
    parser.add_argument(
        "--depth", type=integer(1, 1024), nargs="+", default=[1, 16, 64], metavar="N"
    )
    parser.add_argument(
        "--seconds", type=real(0.05, 600), default=1.0, metavar="S", help="each; %(default)s"
    )
    parser.add_argument(
        "--demand",
        type=integer(0, 1000),
        default=0,
        metavar="ROUNDS",
        help="also time a demand for six of R1's experts, alone and during speculation",
    )
    parser.set_defaults(execute=execute)


def execute(arguments: argparse.Namespace) -> None:
    """Measure and print."""
    files = _files(arguments.path)
    readers = [arguments.reader] if arguments.reader else _READERS
    rates: list[dict[str, Any]] = []
    refused: dict[str, str] = {}
    demands: list[dict[str, Any]] = []
    for reader in readers:
        try:
            rates += _rates(files, reader, arguments)
            if arguments.demand:
                demands.append(_demand(files, reader, arguments.demand))
        except UnsupportedError as error:
            refused[reader] = str(error)
    if not rates:
        raise UnsupportedError("; ".join(refused.values()))
    best = max(rates, key=lambda rate: rate["gb_per_second"])
    report = {
        "path": str(arguments.path),
        "files": len(files),
        "bytes": sum(file.stat().st_size for file in files),
        "raw_ssd_gb_s": best["gb_per_second"],
        "best": best,
        "rates": rates,
        "refused": refused,
        "demands": demands,
    }
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        print("\n".join(_lines(report)))


def _files(text: str) -> list[Path]:
    """Return what there is to read: the file, or the folder's shards."""
    path = Path(text).expanduser()
    is_repository = not path.exists() and hub.parse_repository(text) is not None
    if text == DEMO or path.is_dir() or is_repository:
        folder = resolve_model(text)
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise IoError(f"'{folder}' holds no *.safetensors file", file=str(folder), errno=2)
        return files
    return [path]


def _rates(
    files: list[Path], reader: str, arguments: argparse.Namespace
) -> Iterable[dict[str, Any]]:
    """Measure one reader at every block size and depth."""
    for kib in arguments.block_kib:
        if kib % 4:
            raise ParameterError(
                f"--block-kib must be multiples of 4, not {kib}", parameter="block-kib"
            )
        for depth in arguments.depth:
            rate = _core.measure_raw_rate(
                files,
                reader=reader,
                block_bytes=kib * _KIB,
                depth=depth,
                seconds=arguments.seconds,
            )
            yield {"reader": reader, "block_bytes": kib * _KIB, "depth": depth, **rate}


def _demand(files: list[Path], reader: str, rounds: int) -> dict[str, Any]:
    """Time demands for six experts, alone and during speculation."""
    times = _core.measure_demand_beside_speculation(
        files, reader=reader, expert_bytes=_EXPERT_BYTES, experts=_EXPERTS, rounds=rounds
    )
    idle = statistics.median(times["idle_seconds"])
    beside = statistics.median(times["beside_seconds"])
    return {
        "reader": reader,
        "bytes": _EXPERT_BYTES * _EXPERTS,
        "idle_median_seconds": idle,
        "beside_median_seconds": beside,
        "ratio": beside / idle,
        **times,
    }


def _lines(report: dict[str, Any]) -> Iterable[str]:
    yield f"{'reader':<10} {'block':>9} {'depth':>6} {'GB/s':>8} {'CPU s/GB':>9}"
    for rate in report["rates"]:
        yield (
            f"{rate['reader']:<10} {rate['block_bytes'] // _KIB:>5} KiB {rate['depth']:>6} "
            f"{rate['gb_per_second']:>8.3f} {rate['cpu_seconds_per_gb']:>9.4f}"
        )
    for reader, why in report["refused"].items():
        yield f"{reader:<10} not measured: {why}"
    yield ""
    yield f"raw_ssd_gb_s {report['raw_ssd_gb_s']:.3f}"
    for demand in report["demands"]:
        yield ""
        yield (
            f"{demand['reader']}: six experts ({demand['bytes'] / 1e6:.0f} MB) in "
            f"{demand['idle_median_seconds'] * 1e3:.1f} ms alone, "
            f"{demand['beside_median_seconds'] * 1e3:.1f} ms during speculation "
            f"({demand['ratio']:.3f}x); medians of {len(demand['idle_seconds'])}"
        )
        yield (
            f"speculative reads submitted beside a demand: {demand['speculative_beside_demand']}; "
            f"most speculation in flight: "
            f"{demand['peak_speculative_in_flight_bytes'] / 1e6:.1f} MB"
        )
        yield from _histogram(demand["idle_seconds"], "alone")
        yield from _histogram(demand["beside_seconds"], "during speculation")


def _histogram(seconds: list[float], title: str, bins: int = 10) -> Iterable[str]:
    low, high = min(seconds), max(seconds)
    width = max((high - low) / bins, 1e-6)
    counts = [0] * bins
    for value in seconds:
        counts[min(int((value - low) / width), bins - 1)] += 1
    yield f"  {title}"
    for i, count in enumerate(counts):
        start = (low + i * width) * 1e3
        yield f"  {start:>8.1f} - {start + width * 1e3:>7.1f} ms {count:>4} {'#' * count}"
