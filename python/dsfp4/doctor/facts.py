"""What a machine is, as far as it decides how fast models run, and if at all.

Everything comes from the folders and programs of a `System`, so that tests have machines of their
own. What a machine does not say is None; nothing here raises because a file is missing.
"""

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsfp4 import _core
from dsfp4.doctor.gpu import GpuFacts, Plugin, ask_nvidia_smi, ask_plugin, gpu_facts

_VIRTUAL = re.compile("qemu|vbox|vmware|virtual|msft", re.IGNORECASE)  # models of disks
_IPC_LOCK = 14  # CAP_IPC_LOCK: no limit of locked memory holds


@dataclass(frozen=True)
class System:
    """What describes a machine: folders, programs, and calls of the system."""

    proc: Path = Path("/proc")
    sys: Path = Path("/sys")
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    nvidia_smi: Callable[[], str] = ask_nvidia_smi
    plugin: Callable[[], Plugin] = ask_plugin
    uring_problem: Callable[[], str | None] = _core.uring_problem


@dataclass(frozen=True)
class Processor:
    """`cores` are those that this process may use; `all_online` False where others are there."""

    name: str | None
    cores: int
    all_online: bool | None
    threads: int  # that compute by default
    quota: float | None  # processors, by the control groups; None: no limit
    isa: str  # instruction set of the kernels
    forced_isa: str | None  # by the environment


@dataclass(frozen=True)
class Memory:
    """In bytes."""

    installed: int | None
    total: int | None  # less than `installed` in a control group with a limit
    available: int | None
    ram_limit: int | None  # what a model keeps to if it is told nothing
    swap: int | None
    swapped: int | None  # out
    huge_pages: str | None  # "always", "madvise" or "never"
    lock_limit: int | None  # of locked memory (RLIMIT_MEMLOCK); None: none, or not known


@dataclass(frozen=True)
class Storage:
    """The disk under a folder."""

    folder: str
    file_system: str | None
    device: str | None
    rotates: bool | None
    direct_reads: bool | None
    total: int | None  # bytes
    free: int | None  # bytes that this user may write
    checkpoint: bool  # there are weights in the folder


@dataclass(frozen=True)
class Machine:
    """All of it."""

    kernel: str | None
    wsl: bool
    processor: Processor
    memory: Memory
    storage: Storage
    io_uring_problem: str | None
    io_uring_disabled: int | None  # kernel.io_uring_disabled
    gpu: GpuFacts


def examine(folder: Path, system: System | None = None) -> Machine:
    """Look at the machine, and at the disk under `folder`, which exists. Takes no measurement."""
    system = system or System()
    kernel = read(system.proc / "sys/kernel/osrelease") or None
    disabled = read(system.proc / "sys/kernel/io_uring_disabled")
    return Machine(
        kernel=kernel,
        wsl="microsoft" in (kernel or "").lower(),
        processor=processor(system),
        memory=memory(system),
        storage=storage(folder, system),
        io_uring_problem=system.uring_problem(),
        io_uring_disabled=int(disabled) if disabled.isdigit() else None,
        gpu=gpu_facts(system.nvidia_smi(), system.plugin(), has_nvidia_card(system)),
    )


def read(file: Path) -> str:
    """Return a small file's text without blanks around it; "" where it cannot be read."""
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def processor_name(system: System) -> str | None:
    """Return the processor's name as it calls itself."""
    match = re.search(r"^model name\s*:\s*(.+)$", read(system.proc / "cpuinfo"), re.MULTILINE)
    return " ".join(match[1].split()) if match else None


def last_level_cache(system: System) -> int:
    """Return the bytes of the largest cache that /sys names; 32 MiB if it names none."""
    sizes = [32 << 20]
    for file in (system.sys / "devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = read(file)
        unit = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:], 0)
        if unit and text[:-1].isdigit():
            sizes.append(int(text[:-1]) * unit)
    return max(sizes)


def processor(system: System) -> Processor:
    """Look at the processors, the affinity mask and the control groups' quota."""
    cores: dict[str, Any] = _core.machine_cores(system.proc, system.sys)
    online = read(system.sys / "devices/system/cpu/online")
    return Processor(
        name=processor_name(system),
        cores=cores["physical"],
        all_online=cores["all"] if online else None,
        threads=cores["threads"],
        quota=cores["quota"],
        isa=_core.KernelBench("cpu", 1).isa,
        forced_isa=system.environment.get("DSFP4_ISA") or None,
    )


def memory(system: System) -> Memory:
    """Look at RAM, swap, huge pages and the limit of locked memory."""
    sizes: dict[str, int | None] = _core.machine_memory(system.proc, system.sys)
    lines = dict(re.findall(r"^(\w+):\s+(\d+) kB$", read(system.proc / "meminfo"), re.MULTILINE))
    numbers = {name: int(text) * 1024 for name, text in lines.items()}
    swap, unused = numbers.get("SwapTotal"), numbers.get("SwapFree")
    pages = re.search(r"\[(\w+)\]", read(system.sys / "kernel/mm/transparent_hugepage/enabled"))
    return Memory(
        installed=numbers.get("MemTotal"),
        total=sizes["total"],
        available=sizes["available"],
        ram_limit=sizes["ram_limit"],
        swap=swap,
        swapped=None if swap is None or unused is None else swap - unused,
        huge_pages=pages[1] if pages else None,
        lock_limit=lock_limit(system),
    )


def lock_limit(system: System) -> int | None:
    """Return the bytes that this process may lock in RAM; None: as many as it likes, or unknown."""
    rights = re.search(r"^CapEff:\s*([0-9a-f]+)$", read(system.proc / "self/status"), re.MULTILINE)
    if rights and int(rights[1], 16) >> _IPC_LOCK & 1:
        return None
    limit = re.search(r"^Max locked memory +(\d+)", read(system.proc / "self/limits"), re.MULTILINE)
    return int(limit[1]) if limit else None


def storage(folder: Path, system: System) -> Storage:
    """Look at the disk and the file system under `folder`."""
    number, file_system, device = mount_of(folder.resolve(), system)
    shards = sorted(folder.glob("*.safetensors"))
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        usage = None
    return Storage(
        folder=str(folder),
        file_system=file_system,
        device=device,
        rotates=rotates(number, system),
        direct_reads=has_direct_reads(folder, shards),
        total=usage.total if usage else None,
        free=usage.free if usage else None,
        checkpoint=bool(shards),
    )


def mount_of(folder: Path, system: System) -> tuple[str | None, str | None, str | None]:
    """Return the device number, the type and the source of the file system under `folder`."""
    best: tuple[int, list[str], list[str]] | None = None
    for line in read(system.proc / "self/mountinfo").splitlines():
        left, dash, right = line.partition(" - ")
        place, kind = left.split(), right.split()
        if not dash or len(place) < 5 or len(kind) < 2:
            continue
        point = Path(_unescape(place[4]))
        # A later mount at the same place covers an earlier one.
        if folder.is_relative_to(point) and (best is None or len(point.parts) >= best[0]):
            best = len(point.parts), place, kind
    if best is None:
        return None, None, None
    _, place, kind = best
    return place[2], kind[0], _unescape(kind[1])


def _unescape(name: str) -> str:
    """Undo the octal escapes of mountinfo: a blank is \\040."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), name)


def rotates(number: str | None, system: System) -> bool | None:
    """Return True for a disk with platters; `number` is that of a disk or a partition.

    The disk of a virtual machine claims to have some whatever lies below it: that is None.
    """
    block = system.sys / "dev/block" / (number or "-")
    for disk in (block, block / ".."):
        text = read(disk / "queue/rotational")
        if text:
            model = read(disk / "device/model")
            return text == "1" if model and not _VIRTUAL.search(model) else None
    return None


def has_direct_reads(folder: Path, shards: list[Path]) -> bool | None:
    """Try to open a file with O_DIRECT: a shard, else one that is made and deleted."""
    try:
        if shards:
            os.close(os.open(shards[0], os.O_RDONLY | os.O_DIRECT))
            return True
        with tempfile.NamedTemporaryFile(prefix=".dsfp4-doctor-", dir=folder) as file:
            os.close(os.open(file.name, os.O_RDONLY | os.O_DIRECT))
            return True
    except OSError as error:
        # The kernel says EINVAL for a file system that has none; a folder that must not be
        # written says nothing.
        return False if error.errno == errno.EINVAL else None


def has_nvidia_card(system: System) -> bool:
    """Return True if an NVIDIA GPU is on the PCI bus, with or without a driver."""
    nvidia, display = "0x10de", "0x03"
    return any(
        read(vendor) == nvidia and read(vendor.with_name("class")).startswith(display)
        for vendor in sorted((system.sys / "bus/pci/devices").glob("*/vendor"))
    )
