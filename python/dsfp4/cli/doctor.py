"""`dsfp4 doctor [FOLDER]`: what this machine gives, and what to fix on it."""

import argparse
import json
import re
import textwrap
from collections.abc import Iterable
from dataclasses import asdict

from dsfp4.cli.options import add_json_flag, real
from dsfp4.cli.progress import format_bytes
from dsfp4.demo import resolve_model
from dsfp4.doctor import Finding, Machine, Rates, examine, findings, measure
from dsfp4.doctor.gpu import GpuFacts

Row = tuple[str, str]
_UNKNOWN = "not known"
_COLUMNS = 100


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "doctor",
        help="show what this machine gives, and what to fix on it",
        description="Measures how fast the disk under FOLDER, RAM and the GPU are, looks at limits "
        "and drivers, and says what to fix and how. A folder without weights gets a file of 0.5 GB "
        "for some seconds. The exit code is 1 only if nothing can run.",
        examples=(
            "dsfp4 doctor                    the current folder's disk",
            "dsfp4 doctor ~/models           where checkpoints lie, or will lie",
            "dsfp4 doctor --no-rates --json  nothing is measured or written",
        ),
    )
    parser.add_argument(
        "folder",
        metavar="FOLDER",
        nargs="?",
        default=".",
        help="a checkpoint folder, one on the same disk, or the word demo; the current folder",
    )
    parser.add_argument("--no-rates", action="store_true", help="measure nothing")
    parser.add_argument(
        "--seconds",
        type=real(0.05, 600),
        default=2.0,
        metavar="S",
        help="for each rate; %(default)s",
    )
    add_json_flag(parser)
    parser.set_defaults(execute=execute)


def execute(arguments: argparse.Namespace) -> int:
    """Print facts, rates and findings; return 1 if nothing can run."""
    machine = examine(resolve_model(arguments.folder))
    rates = None if arguments.no_rates else measure(machine, arguments.seconds)
    found = findings(machine, rates)
    if arguments.json:
        report = {
            "machine": asdict(machine),
            "rates": asdict(rates) if rates else None,
            "findings": [asdict(finding) for finding in found],
        }
        print(json.dumps(report, indent=2))
    else:
        print("\n".join(lines(machine, rates, found)))
    return 1 if any(finding.stops for finding in found) else 0


def lines(machine: Machine, rates: Rates | None, found: list[Finding]) -> Iterable[str]:
    """Return the report for people."""
    rows = list(_facts(machine))
    if rates is not None:
        rows += _rates(rates, machine)
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        yield f"{name:<{width}}  {text}"
    yield ""
    if not found:
        yield "nothing to fix"
    for number, finding in enumerate(found, 1):
        stops = " Nothing runs until it is fixed." * finding.stops
        yield _wrapped(f"{number}. {finding.problem}{stops}")
        yield _wrapped(f"   {finding.fix}")
        if finding.command:
            yield f"   $ {finding.command}"


def _wrapped(text: str) -> str:
    return textwrap.fill(
        text, _COLUMNS, subsequent_indent="   ", break_long_words=False, break_on_hyphens=False
    )


def _facts(machine: Machine) -> Iterable[Row]:
    processor, memory, storage = machine.processor, machine.memory, machine.storage
    quota = "no quota" if processor.quota is None else f"a quota of {processor.quota:g}"
    kernel = re.match(r"\d+\.\d+", machine.kernel or "")
    yield "system", f"Linux {kernel[0] if kernel else _UNKNOWN}{', WSL2' * machine.wsl}"
    yield "processor", processor.name or _UNKNOWN
    yield "cores", f"{processor.cores}, {quota}; {processor.threads} threads, {processor.isa}"
    yield (
        "RAM",
        f"{_size(memory.total)} ({_size(memory.installed)} installed), {_size(memory.available)} "
        f"available; a model takes at most {_size(memory.ram_limit)}",
    )
    yield "swap", f"{_size(memory.swap)}, {_size(memory.swapped)} used"
    lock = "no limit" if memory.lock_limit is None else f"at most {_size(memory.lock_limit)}"
    yield "huge pages", f"{memory.huge_pages or _UNKNOWN}; locked memory: {lock}"
    yield "folder", storage.folder
    yield (
        "disk",
        f"{storage.device or _UNKNOWN} ({storage.file_system or _UNKNOWN}), "
        f"{_size(storage.free)} of {_size(storage.total)} free",
    )
    direct = {True: "direct", False: "through the page cache", None: "direct if possible"}
    reader = "io_uring" if machine.io_uring_problem is None else "pread, as io_uring is not allowed"
    yield "reads", f"{reader}; {direct[storage.direct_reads]}"
    yield from _gpus(machine.gpu)


def _gpus(facts: GpuFacts) -> Iterable[Row]:
    if not facts.gpus:
        yield "GPU", "an NVIDIA GPU without a driver" if facts.card else "no NVIDIA GPU"
    for number, gpu in enumerate(facts.gpus):
        yield (
            f"GPU {number}",
            f"{gpu.name}, compute capability {gpu.compute_capability}, {_size(gpu.memory)} "
            f"({_size(gpu.used)} used), driver {gpu.driver}"
            + (", in slices (MIG)" if gpu.mig else ""),
        )
    plugin = facts.plugin
    if plugin.device is not None and any(gpu.mig for gpu in facts.gpus):
        yield "GPU slice", f"{plugin.device}, {_size(plugin.memory)}"
    if plugin.built:
        driver = f"the driver supports {plugin.driver_cuda}" if plugin.driver_cuda else "no driver"
        yield "CUDA plugin", f"CUDA {plugin.cuda or _UNKNOWN}; {driver}"
    else:
        yield "CUDA plugin", "not in this build"


def _rates(rates: Rates, machine: Machine) -> Iterable[Row]:
    sample = "a file written for it" if rates.from_scratch else "the checkpoint"
    yield "SSD", _rate(rates, "ssd", f"random reads of {sample}, {rates.reader}")
    yield "RAM", _rate(rates, "ram", f"reads by {machine.processor.threads} threads")
    if rates.copy_in is not None or "gpu" in rates.problems:
        yield "PCIe", _rate(rates, "copy_in", "to the GPU")
        yield "", _rate(rates, "copy_out", "from it")
        yield "VRAM", _rate(rates, "vram", "reads by the GPU")


def _rate(rates: Rates, name: str, what: str) -> str:
    rate: float | None = getattr(rates, name)
    if rate is not None:
        return f"{rate:.3g} GB/s, {what}"
    return f"not measured: {rates.problems.get(name) or rates.problems['gpu']}"


def _size(count: int | None) -> str:
    return _UNKNOWN if count is None else format_bytes(count)
