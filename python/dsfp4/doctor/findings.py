"""What on a machine costs speed or keeps a model from running, and how to fix it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dsfp4.doctor.facts import Machine
from dsfp4.doctor.rates import Rates

_GB = 1e9
_LEAST_RAM = 0.3 * _GB  # the demo model needs about that
_LEAST_SPACE = 10 * _GB  # the smallest DeepSeek model in FP4 takes about that
_READ_BUFFERS = 64 * (512 << 10)  # bytes that a reader registers with io_uring
_SLOW_SSD = 1.0  # GB/s: below it is no NVMe disk, or something is wrong with it
_SLOW_COPIES = 10.0  # GB/s: PCIe 3.0 with 16 lanes, or 4.0 with 8, gives 12
_MUCH_VRAM = 0.1  # of it, used by others
_NETWORK = ("nfs", "nfs4", "cifs", "smb3", "ceph", "lustre", "gpfs", "beegfs", "glusterfs", "afs")
_SHARED = ("9p", "virtiofs", "vboxsf", "fuse.vmhgfs-fuse", "drvfs", "fuse.sshfs", "fuse.rclone")
_IN_RAM = ("tmpfs", "ramfs")


@dataclass(frozen=True)
class Finding:
    """One sentence each for what is wrong and what to do, and a command where there is one.

    `stops`: nothing runs until it is fixed. The others cost speed.
    """

    problem: str
    fix: str
    command: str = ""
    stops: bool = False


def findings(machine: Machine, rates: Rates | None = None) -> list[Finding]:
    """Return all that should be fixed, what stops everything first; `rates` if they were taken."""
    found = [finding for check in _CHECKS for finding in check(machine)]
    if rates is not None:
        found += _of_rates(machine, rates)
    return sorted(found, key=lambda finding: not finding.stops)


def gb(count: float) -> str:
    """Return bytes as 12.3 GB."""
    return f"{count / _GB:.1f} GB"


def _of_ram(machine: Machine) -> Iterator[Finding]:
    memory = machine.memory
    if memory.ram_limit is not None and memory.ram_limit < _LEAST_RAM:
        yield Finding(
            f"A model may take {gb(memory.ram_limit)} of RAM here, and even the demo model needs "
            f"{gb(_LEAST_RAM)}.",
            "End other programs, or give the container or the machine more memory.",
            stops=True,
        )
    if memory.installed and memory.total and memory.total < 0.95 * memory.installed:
        yield Finding(
            f"A control group gives this process {gb(memory.total)} of the machine's "
            f"{gb(memory.installed)} of RAM.",
            "Raise it where it is set: docker run --memory, resources.limits.memory of a pod, or "
            "MemoryMax= of a systemd unit.",
        )
    if memory.total and memory.available is not None and memory.available < memory.total / 2:
        yield Finding(
            f"Only {gb(memory.available)} of {gb(memory.total)} of RAM are available.",
            "End programs that need much of it: RAM holds the experts that VRAM does not.",
            "ps aux --sort=-rss | head",
        )
    if memory.swapped and memory.swapped > _GB:
        yield Finding(
            f"{gb(memory.swapped)} are swapped out, so programs need more RAM than there is.",
            "End some, or let dsfp4 take less (--ram-limit): a weight that is swapped out comes "
            "back slower than one that was left on the SSD.",
        )


def _of_pages(machine: Machine) -> Iterator[Finding]:
    memory = machine.memory
    if memory.huge_pages == "never":
        yield Finding(
            "Transparent huge pages are off, which makes reading weights from RAM slower.",
            "Let programs ask for them; after a restart the command must be given again.",
            "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled",
        )
    limit = memory.lock_limit
    if limit is not None and limit < _READ_BUFFERS and machine.io_uring_problem is None:
        yield Finding(
            f"Only {limit / 1e6:.1f} MB may be locked in RAM (RLIMIT_MEMLOCK), so not all "
            f"{_READ_BUFFERS / 1e6:.1f} MB of the buffers for reads can be registered with "
            "io_uring.",
            "Raise the limit in /etc/security/limits.conf and log in anew, or start the container "
            "with --ulimit memlock=-1.",
            "echo '* - memlock unlimited' | sudo tee -a /etc/security/limits.conf",
        )


def _of_processor(machine: Machine) -> Iterator[Finding]:
    processor = machine.processor
    if processor.quota is not None and processor.quota < processor.cores:
        yield Finding(
            f"A control group lets this process use {processor.quota:g} of {processor.cores} "
            "cores on average.",
            "Raise it where it is set: docker run --cpus, resources.limits.cpu of a pod, or "
            "CPUQuota= of a systemd unit.",
        )
    if processor.all_online is False:
        yield Finding(
            f"This process may run on {processor.cores} cores, and the machine has others.",
            "Start it without taskset or numactl, or the container without --cpuset-cpus.",
        )
    if processor.forced_isa is not None:
        yield Finding(
            f"DSFP4_ISA holds the kernels to {processor.isa}.",
            "Unset it: the best instruction set of the processor is found at start.",
            "unset DSFP4_ISA",
        )
    elif processor.isa == "baseline":
        yield Finding(
            "The processor has no AVX2, so computing on it is many times slower.",
            "In a virtual machine let it see the host's processor (QEMU: -cpu host); else this "
            "takes a processor of 2013 or later.",
        )


def _of_io_uring(machine: Machine) -> Iterator[Finding]:
    problem = machine.io_uring_problem
    if problem is None:
        return
    what = f"{problem}; threads read with pread instead, which costs more processor time."
    if machine.io_uring_disabled:
        yield Finding(
            what,
            "Permit it; add the line to /etc/sysctl.d to keep it.",
            "sudo sysctl kernel.io_uring_disabled=0",
        )
    else:
        yield Finding(
            what,
            "In a container use a seccomp profile that permits io_uring (docker run --security-opt "
            "seccomp=FILE, or seccomp=unconfined if you trust what runs in it); elsewhere this "
            "takes Linux 5.6 or later.",
        )


def _of_file_system(machine: Machine) -> Iterator[Finding]:
    storage = machine.storage
    kind, folder = storage.file_system, storage.folder
    if kind in _IN_RAM:
        yield Finding(
            f"'{folder}' lies in RAM ({kind}), where a checkpoint takes the place of cached "
            "experts.",
            "Put checkpoints on an NVMe disk.",
        )
    elif kind in _NETWORK or kind in _SHARED:
        fix = "Copy checkpoints to a disk of this machine."
        if machine.wsl and kind in _SHARED:
            fix = "Copy checkpoints to the Linux file system, as in ~/models: Windows' is shared."
        yield Finding(
            f"'{folder}' is not on a disk of this machine ({kind}), so each read is slow.", fix
        )
    elif kind == "overlay":
        yield Finding(
            f"'{folder}' lies in a container's layers (overlay), which make reads slower and are "
            "lost with the container.",
            "Keep checkpoints on a volume.",
            "docker run -v /path/to/models:/models ...",
        )
    if storage.direct_reads is False and kind not in _IN_RAM:
        yield Finding(
            f"The file system of '{folder}' ({kind or 'unknown'}) has no direct reads (O_DIRECT), "
            "so all goes through the page cache.",
            "Put checkpoints on ext4, XFS or btrfs.",
        )
    if storage.rotates:
        yield Finding(
            f"'{folder}' lies on a disk with platters, which reads at random some hundred times "
            "slower than an SSD.",
            "Put checkpoints on an NVMe disk.",
        )


def _of_space(machine: Machine) -> Iterator[Finding]:
    storage = machine.storage
    if not storage.checkpoint and storage.free is not None and storage.free < _LEAST_SPACE:
        yield Finding(
            f"{gb(storage.free)} are free in '{storage.folder}', too little for a checkpoint: "
            "DeepSeek-R1 in FP4 takes 423 GB.",
            "Free some, or give dsfp4 doctor a folder on another disk.",
            "df -h",
        )


def _of_gpu(machine: Machine) -> Iterator[Finding]:
    facts = machine.gpu
    if not facts.gpus:
        if facts.card:
            yield Finding(
                "There is an NVIDIA GPU, but nvidia-smi does not see it.",
                "Install NVIDIA's driver, or start the container with --gpus all.",
                "nvidia-smi",
            )
        return
    plugin, name = facts.plugin, facts.plugin.device or facts.gpus[0].name
    if plugin.problem is not None and not plugin.built:
        yield Finding(
            f"The GPU ({name}) is not used: {plugin.problem}.",
            "Install nvcc (the CUDA toolkit), then dsfp4 anew, from its source folder.",
            "pip install --force-reinstall --no-deps -Ccmake.define.DSFP4_CUDA=ON .",
        )
    elif plugin.problem is not None and _is_older(plugin.driver_cuda, plugin.cuda):
        yield Finding(
            f"The GPU ({name}) is not used: the driver {facts.gpus[0].driver} supports CUDA "
            f"{plugin.driver_cuda}, and this build needs CUDA {plugin.cuda}.",
            "Update NVIDIA's driver, or build dsfp4 with an older CUDA toolkit, 12.0 or later.",
        )
    elif plugin.problem is not None and plugin.device is None and any(g.mig for g in facts.gpus):
        yield Finding(
            f"The GPU ({name}) is cut into slices (MIG), and this process may use none of them: "
            f"{plugin.problem}.",
            "Let CUDA_VISIBLE_DEVICES name one as the command does, MIG-...; where it lists none, "
            "make one: nvidia-smi mig --help.",
            "nvidia-smi -L",
        )
    elif plugin.problem is not None:
        yield Finding(
            f"The GPU ({name}) is not used: {plugin.problem}.",
            "Look at what the driver says.",
            "nvidia-smi",
        )


def _of_graphics_memory(machine: Machine) -> Iterator[Finding]:
    for gpu in machine.gpu.gpus[:1]:  # the one that is used
        # Memory used of a whole GPU says nothing of the one slice that is ours.
        if (
            gpu.memory
            and gpu.used is not None
            and not gpu.mig
            and gpu.used > _MUCH_VRAM * gpu.memory
        ):
            yield Finding(
                f"{gb(gpu.used)} of the GPU's {gb(gpu.memory)} are used by other programs.",
                "End those that the command shows; a desktop can use the processor's graphics.",
                "nvidia-smi",
            )
        if gpu.pcie_lanes and gpu.most_pcie_lanes and gpu.pcie_lanes < gpu.most_pcie_lanes:
            yield Finding(
                f"The GPU uses {gpu.pcie_lanes} of its {gpu.most_pcie_lanes} PCIe lanes, so "
                "experts in RAM reach it slower.",
                "Put the card into the slot that the mainboard's manual calls x16, and look there "
                "which M.2 disks share its lanes.",
            )


def _of_wsl(machine: Machine) -> Iterator[Finding]:
    if not machine.wsl:
        return
    yield Finding(
        "WSL2 gives Linux half of the machine's RAM unless it is told otherwise.",
        "Write memory=... below [wsl2] into %UserProfile%\\.wslconfig, then restart WSL.",
        "wsl.exe --shutdown",
    )
    if machine.gpu.gpus:
        yield Finding(
            "WSL2 limits how much RAM can be pinned for the GPU, and copies of what is not "
            "pinned are slower.",
            "Raise memory= in .wslconfig; where RAM holds many experts, Linux itself is faster.",
        )


def _is_older(version: str | None, than: str | None) -> bool:
    """Compare the majors: within one of them any driver does."""
    if version is None or than is None:
        return False
    return int(version.split(".")[0]) < int(than.split(".")[0])


def _of_rates(machine: Machine, rates: Rates) -> Iterator[Finding]:
    if rates.unreadable:
        yield Finding(
            f"The checkpoint in '{machine.storage.folder}' cannot be read: "
            f"{rates.problems['ssd']}.",
            "See who may read its files, and what the kernel says of the disk.",
            "sudo dmesg | tail",
            stops=True,
        )
    if rates.ssd is not None and rates.ssd < _SLOW_SSD:
        yield Finding(
            f"The disk gives {rates.ssd:.2f} GB/s of random reads, where NVMe disks give 3 to 14.",
            "Put checkpoints on an NVMe disk with PCIe 4.0 or 5.0, and see that nothing else reads "
            "it.",
        )
    if rates.copy_in is not None and rates.copy_in < _SLOW_COPIES:
        yield Finding(
            f"Copies from RAM to the GPU run at {rates.copy_in:.1f} GB/s, where PCIe 4.0 with 16 "
            "lanes gives 25.",
            "Put the card into the slot that the mainboard's manual calls x16, and see that "
            "nothing else copies; a warning about memory that was not pinned says what to raise.",
        )
    if "gpu" in rates.problems:
        yield Finding(
            f"The GPU's rates could not be measured: {rates.problems['gpu']}.",
            "Until that is fixed, a model on device 'cuda' is likely to fail as well.",
            "nvidia-smi",
        )


_CHECKS: tuple[Callable[[Machine], Iterator[Finding]], ...] = (
    _of_ram,
    _of_gpu,
    _of_graphics_memory,
    _of_wsl,
    _of_file_system,
    _of_space,
    _of_io_uring,
    _of_pages,
    _of_processor,
)
