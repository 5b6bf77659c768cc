"""Reads the same file with dsfp4's readers and with fio, in turn: their rates side by side.

Usage: python bench/storage_vs_fio.py FILE [--block-kib 512] [--depth 64] [--seconds 2] [--rounds 9]

Needs fio (Debian: fio) and a file much larger than the disk's own cache, say 8 GB. fio runs
`io_uring` with one job and the queue depth, and `psync` with as many threads. The order of the two
changes from round to round; the figure is the median of the rounds' ratios.
"""

import argparse
import json
import statistics
import subprocess
from pathlib import Path

from dsfp4 import _core
from machine import machine

_READERS = ("io_uring", "pread")


def ours(path: Path, reader: str, arguments: argparse.Namespace, seed: int) -> tuple[float, float]:
    """Return GB/s and processor seconds per GB of dsfp4's reader."""
    rate = _core.measure_raw_rate(
        [path],
        reader=reader,
        block_bytes=arguments.block_kib * 1024,
        depth=arguments.depth,
        seconds=arguments.seconds,
        seed=seed,
    )
    return rate["gb_per_second"], rate["cpu_seconds_per_gb"]


def fio(path: Path, reader: str, arguments: argparse.Namespace) -> tuple[float, float]:
    """Return the same of fio."""
    jobs = arguments.depth if reader == "pread" else 1
    engine = (
        ["--ioengine=psync", f"--numjobs={jobs}", "--thread"]
        if reader == "pread"
        else ["--ioengine=io_uring", f"--iodepth={arguments.depth}"]
    )
    command = [
        *("fio", "--name=read", f"--filename={path}", "--rw=randread", "--direct=1", "--readonly"),
        *(f"--bs={arguments.block_kib}k", "--time_based", f"--runtime={arguments.seconds}"),
        *("--ramp_time=0.2", "--randrepeat=0", "--norandommap", "--group_reporting"),
        *("--output-format=json", *engine),
    ]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    job = json.loads(output[output.index("{") :])["jobs"][0]
    seconds = job["job_runtime"] / 1e3  # of all jobs together, as are the shares of a processor
    cpu = (job["usr_cpu"] + job["sys_cpu"]) / 100 * seconds
    return job["read"]["bw_bytes"] / 1e9, cpu / (job["read"]["io_bytes"] / 1e9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--block-kib", type=int, default=512)
    parser.add_argument("--depth", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    print(machine())
    print(f"blocks of {arguments.block_kib} KiB, depth {arguments.depth}")
    for reader in _READERS:
        rates: dict[str, list[tuple[float, float]]] = {"dsfp4": [], "fio": []}
        for round_ in range(arguments.rounds):
            for who in ("dsfp4", "fio") if round_ % 2 == 0 else ("fio", "dsfp4"):
                rates[who].append(
                    ours(arguments.file, reader, arguments, round_)
                    if who == "dsfp4"
                    else fio(arguments.file, reader, arguments)
                )
        for who, values in rates.items():
            rate = statistics.median(value[0] for value in values)
            cpu = statistics.median(value[1] for value in values)
            print(f"{reader:<9} {who:<6} {rate:.3f} GB/s, {cpu:.4f} processor seconds per GB")
        ratio = statistics.median(
            a[0] / b[0] for a, b in zip(rates["dsfp4"], rates["fio"], strict=True)
        )
        print(f"{reader:<9} dsfp4 / fio {ratio:.3f} (median of {arguments.rounds} rounds)")


if __name__ == "__main__":
    main()
