"""How fast a machine's wires are: the disk, RAM, PCIe and the GPU's memory."""

import errno
import os
import shutil
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from dsfp4 import _core
from dsfp4.doctor.facts import Machine, System, last_level_cache
from dsfp4.errors import Dsfp4Error, IoError

_BLOCK_BYTES = 512 << 10
_DEPTH = 64
_LEAST_SHARDS = 256 << 20  # bytes: fewer are no fair sample of a disk
_SCRATCH_BYTES = 512 << 20
_PIECE_BYTES = 8 << 20
_RAM_BYTES = 512 << 20
_RAM_RUNS = 5


@dataclass
class Rates:
    """GB/s (10^9 bytes); None where it was not measured, and `problems` then says why, by field."""

    ssd: float | None = None  # random reads of 512 KiB
    ram: float | None = None  # reads by all threads
    copy_in: float | None = None  # from RAM to the GPU
    copy_out: float | None = None
    vram: float | None = None  # reads by the GPU
    problems: dict[str, str] = field(default_factory=dict)
    reader: str = ""  # "io_uring" or "pread"
    from_scratch: bool = False  # `ssd` is of a file that was written for it
    unreadable: bool = False  # the checkpoint's own files could not be read


def measure(machine: Machine, seconds: float, system: System | None = None) -> Rates:
    """Measure for `seconds` each. A folder without much to read gets a file of 0.5 GB meanwhile."""
    rates = Rates()
    _measure_ssd(machine, seconds, rates)
    _measure_ram(machine, system or System(), rates)
    if machine.gpu.plugin.problem is None:
        _measure_gpu(seconds, rates)
    return rates


def _measure_ssd(machine: Machine, seconds: float, rates: Rates) -> None:
    folder = Path(machine.storage.folder)
    shards = sorted(folder.glob("*.safetensors"))
    rates.reader = "pread" if machine.io_uring_problem else "io_uring"
    try:
        rates.from_scratch = sum(file.stat().st_size for file in shards) < _LEAST_SHARDS
        if rates.from_scratch:
            with _scratch_file(folder) as file:
                rates.ssd = _read_rate([file], rates.reader, seconds)
        else:
            rates.ssd = _read_rate(shards, rates.reader, seconds)
    except (Dsfp4Error, OSError) as error:
        rates.problems["ssd"] = str(error)
        rates.unreadable = not rates.from_scratch and isinstance(error, OSError)


def _read_rate(files: list[Path], reader: str, seconds: float) -> float:
    rate: float = _core.measure_raw_rate(
        files, reader=reader, block_bytes=_BLOCK_BYTES, depth=_DEPTH, seconds=seconds
    )["gb_per_second"]
    return rate


@contextmanager
def _scratch_file(folder: Path) -> Iterator[Path]:
    """Make a file of random bytes, so that nothing on the way can make it smaller."""
    if shutil.disk_usage(folder).free < 2 * _SCRATCH_BYTES:
        raise IoError(
            f"there is no room in '{folder}' for a file of {_SCRATCH_BYTES / 1e9:.1f} GB to read",
            file=str(folder),
            errno=errno.ENOSPC,
        )
    with tempfile.NamedTemporaryFile(prefix=".dsfp4-doctor-", dir=folder) as file:
        for _ in range(_SCRATCH_BYTES // _PIECE_BYTES):
            file.write(os.urandom(_PIECE_BYTES))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # from the disk, not RAM
        yield Path(file.name)


def _measure_ram(machine: Machine, system: System, rates: Rates) -> None:
    size = max(4 * last_level_cache(system), _RAM_BYTES)
    available = machine.memory.available
    if available is not None and size > available // 2:
        rates.problems["ram"] = (
            f"{size / 1e9:.1f} GB are read for it, and {available / 1e9:.1f} GB are available"
        )
        return
    try:
        bench = _core.KernelBench("cpu", 0)
        rates.ram = size / statistics.median(bench.read_memory(size, _RAM_RUNS)) * 1e-9
    except Dsfp4Error as error:
        rates.problems["ram"] = str(error)


def _measure_gpu(seconds: float, rates: Rates) -> None:
    try:
        measured = _core.measure_gpu(seconds)
    except Dsfp4Error as error:
        rates.problems["gpu"] = str(error)
        return
    rates.copy_in = measured["copy_in"] * 1e-9
    rates.copy_out = measured["copy_out"] * 1e-9
    rates.vram = measured["read"] * 1e-9
