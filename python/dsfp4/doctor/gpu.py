"""The NVIDIA GPUs, their driver and the CUDA plugin."""

import shutil
import subprocess
from dataclasses import dataclass

from dsfp4 import _core
from dsfp4.errors import CudaError

# The last one is not known to drivers from before there was MIG (R450).
_FIELDS = (
    "name",
    "driver_version",
    "compute_cap",
    "memory.total",
    "memory.used",
    "pcie.link.width.current",
    "pcie.link.width.max",
    "mig.mode.current",
)
_WSL_FOLDER = "/usr/lib/wsl/lib"  # not on every PATH
_PATIENCE = 20  # seconds; a driver that hangs must not hang us
_MIB = 1 << 20


@dataclass(frozen=True)
class Gpu:
    """What nvidia-smi says of one; memory in bytes, None where it says nothing.

    `mig`: it is cut into slices, and its numbers are those of all of them.
    """

    name: str
    driver: str
    compute_capability: str
    memory: int | None
    used: int | None
    pcie_lanes: int | None
    most_pcie_lanes: int | None
    mig: bool = False


@dataclass(frozen=True)
class Plugin:
    """The CUDA plugin of this build; versions as in 13.0, None where it or the driver is missing.

    `problem` says in one sentence why device 'cuda' cannot be used. `device` is the name of the GPU
    that is used, or of the slice of one (MIG), `memory` its bytes; None where there is none.
    """

    built: bool
    problem: str | None
    cuda: str | None = None  # that it is built with
    driver_cuda: str | None = None  # the newest that the driver supports
    device: str | None = None
    memory: int | None = None


@dataclass(frozen=True)
class GpuFacts:
    """GPUs in the order of nvidia-smi; `card` is True if one is on the PCI bus."""

    gpus: tuple[Gpu, ...]
    plugin: Plugin
    card: bool


def ask_nvidia_smi() -> str:
    """Return nvidia-smi's line for each GPU; "" where there is none or it does not work."""
    program = shutil.which("nvidia-smi") or shutil.which("nvidia-smi", path=_WSL_FOLDER)
    if program is None:
        return ""
    for fields in (_FIELDS, _FIELDS[:-1]):
        command = [program, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE)
        except (OSError, subprocess.TimeoutExpired):
            return ""
        if done.returncode == 0:
            return done.stdout
    return ""


def ask_plugin() -> Plugin:
    """Ask the CUDA plugin what it sees."""
    problem: str | None = _core.cuda_problem()
    try:
        said = _core.probe_cuda()
    except CudaError as error:
        return Plugin(built=bool(error.code), problem=problem)  # the driver's errors have a code
    return Plugin(
        built=True,
        problem=problem,
        cuda=_version(said["plugin_cuda"]),
        driver_cuda=_version(said["driver_cuda"]),
        device=said["name"] or None,
        memory=said["memory"] or None,
    )


def gpu_facts(said: str, plugin: Plugin, card: bool) -> GpuFacts:
    """Put together what nvidia-smi `said`, the plugin, and the PCI bus."""
    lines = [[word.strip() for word in line.split(",")] for line in said.splitlines()]
    gpus = tuple(
        Gpu(
            name=words[0],
            driver=words[1],
            compute_capability=words[2],
            memory=_number(words[3], _MIB),
            used=_number(words[4], _MIB),
            pcie_lanes=_number(words[5]),
            most_pcie_lanes=_number(words[6]),
            mig=words[7:] == ["Enabled"],
        )
        for words in lines
        if len(words) in (len(_FIELDS), len(_FIELDS) - 1)
    )
    return GpuFacts(gpus=gpus, plugin=plugin, card=card or bool(gpus))


def _number(text: str, unit: int = 1) -> int | None:
    return int(text) * unit if text.isdigit() else None  # "[N/A]" is none


def _version(number: int) -> str | None:
    return f"{number // 1000}.{number % 1000 // 10}" if number else None
