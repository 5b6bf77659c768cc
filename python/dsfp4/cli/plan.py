"""`dsfp4 plan MODEL`: where a model would lie, how fast it would be, and what would help."""

import argparse
import errno
import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dsfp4 import _core, hub
from dsfp4._arrays import parameter_error
from dsfp4._checks import check_quantization
from dsfp4.cli.options import add_json_flag, add_plan_flags, integer, placement, real
from dsfp4.cli.plan_report import lines
from dsfp4.cli.plot import check_drawing, draw_plan, picture_path
from dsfp4.demo import resolve_model
from dsfp4.doctor import Machine, examine, measure
from dsfp4.doctor import Rates as Measured
from dsfp4.errors import IoError, MemoryLimitError
from dsfp4.estimate import Rate, Rates
from dsfp4.forecast import Forecast, Hardware, forecast

# Of each core, measured with its kernels on prompts; AMX on 16 cores, AVX2 on 2.
_CORE_TFLOPS = {"amx": 0.085, "avx512": 0.06, "avx2": 0.055}
_HOPPER = "9.0"  # compute capability of GPUs with kernels of their own


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "plan",
        help="say whether a model runs here, or elsewhere, and how fast",
        description="Reads headers alone, and loads nothing: where each part of the model would "
        "lie, the bytes of a token on each wire, the speed to expect, and what would make it "
        "faster. The machine is this one, or what the flags describe: with --gpu-memory or --ram "
        "nothing is measured, and a rate that is not given is assumed. The exit code is 1 if the "
        "model cannot run; the message has the number that is missing.",
        examples=(
            "dsfp4 plan deepseek-r1-fp4 --gpu-memory 16 --ram 96 --ssd-rate 14",
            "dsfp4 plan ~/models/DeepSeek-R1-FP4    on this machine",
            "dsfp4 plan demo --device cpu --json",
        ),
    )
    add_arguments(parser)
    parser.add_argument(
        "--plot",
        type=picture_path,
        metavar="OUT",
        help="also draw the bytes by tier, and the speed over hit rates: .png, .svg or .pdf",
    )
    add_json_flag(parser)
    parser.set_defaults(execute=execute)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add MODEL and the flags that describe a machine and a load; prepare() reads them."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a checkpoint folder, a repository that was pulled (org/name), the word demo, or, "
        f"without a checkpoint, {', '.join(_core.published_models())}",
    )
    parser.add_argument(
        "--device",
        default="auto",
        choices=["auto", "cpu", "cuda"],
        help="auto is cuda if the machine has a GPU",
    )
    parser.add_argument(
        "--context",
        dest="max_context",
        type=integer(0, 2**31 - 1),
        default=0,
        metavar="TOKENS",
        help="the same as --max-context",
    )
    add_machine_flags(parser)
    add_plan_flags(parser)


def add_machine_flags(parser: argparse.ArgumentParser) -> None:
    """Add what describes a machine."""
    group = parser.add_argument_group("machine; what is not given is as here")
    size, rate = real(0, 1e6), real(1e-3, 1e6)
    group.add_argument("--gpu-memory", type=size, metavar="GB", help="VRAM that is free; 0: no GPU")
    group.add_argument("--ram", type=real(0.001, 1e6), metavar="GB", help="RAM in all")
    for name, what in _RATE_FLAGS.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=rate, metavar=what[0], help=what[1])
    group.add_argument(
        "--no-rates", action="store_true", help="measure nothing: rates are given or assumed"
    )
    group.add_argument(
        "--seconds",
        type=real(0.05, 600),
        default=1.0,
        metavar="S",
        help="for each rate that is measured; %(default)s",
    )


_RATE_FLAGS = {
    "ssd_rate": ("GB/S", "random reads of 512 KiB from the disk"),
    "ram_rate": ("GB/S", "reads of RAM by all cores"),
    "pcie_rate": ("GB/S", "copies from pinned RAM to the GPU"),
    "vram_rate": ("GB/S", "reads of VRAM by the GPU"),
    "gpu_tflops": ("TFLOP/S", "the GPU's arithmetic as prompts reach it"),
    "cpu_tflops": ("TFLOP/S", "the same of the processor"),
}


@dataclass(frozen=True)
class ModelFiles:
    """What the model is stored in; bytes. `files` is empty for a published model's name."""

    name: str
    needed_bytes: int
    unneeded_bytes: int
    files: list[str]
    unneeded_files: list[str]


def execute(arguments: argparse.Namespace) -> None:
    """Plan, estimate, print and draw. Raises MemoryLimitError for what cannot run."""
    if arguments.plot is not None:
        check_drawing(arguments.plot)
    planner, hardware, result = prepare(arguments)
    files = files_of(arguments.model, _folder(arguments.model), planner.model)
    if arguments.json:
        print(json.dumps(report(planner.model, files, hardware, result), indent=2))
    else:
        print("\n".join(lines(planner.model, asdict(files), hardware, result)))
    if arguments.plot is not None:
        draw_plan(picture_of(arguments.model, result), arguments.plot)


def picture_of(name: str, result: Forecast) -> dict[str, Any]:
    """Return what draw_plan() draws."""
    return {
        "model": name,
        "roles": [role | {"tier": role["tier"].upper()} for role in result.plan["roles"]],
        "decode": [
            {
                "hit_rate": row.hits.rate,
                "tokens_per_second": row.estimate.tokens_per_second,
                "binds": row.estimate.binds,
            }
            for row in result.table
        ],
    }


def prepare(arguments: argparse.Namespace) -> tuple[Any, Hardware, Forecast]:
    """Return the planner, the machine and the forecast. Raises MemoryLimitError."""
    folder = _folder(arguments.model)
    hardware = describe_hardware(arguments, examine(folder or Path()))
    planner = _planner(arguments, folder, hardware)
    try:
        return planner, hardware, forecast(planner, hardware, arguments.cpu_share)
    except MemoryLimitError as error:
        if not _may_pass_over_gpu(arguments, hardware):
            raise
        print(f"dsfp4: using the CPU: {error}", file=sys.stderr)
    hardware = replace(hardware, vram=None)
    planner = _planner(arguments, folder, hardware)
    return planner, hardware, forecast(planner, hardware, arguments.cpu_share)


def _planner(arguments: argparse.Namespace, folder: Path | None, hardware: Hardware) -> Any:
    return _core.Planner(
        arguments.model if folder is None else str(folder),
        published=folder is None,
        device="cpu" if hardware.vram is None else "cuda",
        kv_cache_dtype=arguments.kv_cache_dtype,
        threads=arguments.threads,
        quantization=check_quantization(arguments.quantization),
    )


def _may_pass_over_gpu(arguments: argparse.Namespace, hardware: Hardware) -> bool:
    """Return True where a load, told nothing about a GPU, would pass over one that is too small."""
    of_gpu = (
        *("gpu_memory", "memory_limit", "max_experts", "gpu_reserved"),
        *("max_gpu_layers", "min_layers"),
    )
    told = any(getattr(arguments, name) is not None for name in of_gpu)
    return arguments.device == "auto" and hardware.vram is not None and not told


def _folder(model: str) -> Path | None:
    """Return the folder of a checkpoint; None for the name of a published model."""
    names = _core.published_models()
    if model in names:
        return None
    try:
        return resolve_model(model)
    except IoError as error:
        if "/" in model or error.errno != errno.ENOENT:
            raise
        raise IoError(
            f"{error}; without a checkpoint, one of {', '.join(names)}",
            file=error.file,
            errno=errno.ENOENT,
        ) from None


def files_of(name: str, folder: Path | None, model: dict[str, Any]) -> ModelFiles:
    """Return which files running the model needs, and which weights lie there in vain."""
    if folder is None:
        return ModelFiles(name, model["weight_bytes"], model["unneeded_bytes"], [], [])
    names = {path.name for path in folder.iterdir() if path.is_file()}
    needed = hub.needed_files(folder, names)
    unneeded = sorted(
        name for name in names if name.endswith(".safetensors") and name not in needed
    )
    sizes = {name: (folder / name).stat().st_size for name in (*needed, *unneeded)}
    return ModelFiles(
        name,
        sum(sizes[name] for name in needed),
        sum(sizes[name] for name in unneeded),
        needed,
        unneeded,
    )


def describe_hardware(arguments: argparse.Namespace, machine: Machine) -> Hardware:
    """Return the machine that the flags describe; the rest, and its rates, are `machine`'s."""
    described = arguments.gpu_memory is not None or arguments.ram is not None
    vram = _vram(arguments, machine)
    if arguments.ram is not None:
        ram, ram_limit = _bytes(arguments.ram), 0
    elif machine.memory.available is not None:
        ram, ram_limit = machine.memory.available, machine.memory.ram_limit or 0
    else:
        raise parameter_error("ram", "must be given: this machine does not say how much it has")
    if arguments.ram_limit is not None:
        ram_limit = _bytes(arguments.ram_limit)
    wishes = placement(arguments) | {"max_context": arguments.max_context}
    measures = not described and not arguments.no_rates and not _all_given(arguments, vram)
    measured = measure(machine, arguments.seconds) if measures else Measured()
    return Hardware(vram, ram, ram_limit, rates_of(arguments, machine, measured), wishes)


def _vram(arguments: argparse.Namespace, machine: Machine) -> int | None:
    """Return the bytes that the process may take of a GPU; None for device cpu."""
    if arguments.device == "cpu":
        return None
    gpu = machine.gpu.gpus[0] if machine.gpu.gpus else None
    if arguments.gpu_memory is not None:
        vram = _bytes(arguments.gpu_memory)
    elif gpu is not None and gpu.memory is not None and machine.gpu.plugin.problem is None:
        vram = gpu.memory - (gpu.used or 0)
    else:
        vram = 0
    if vram == 0:
        if arguments.device == "auto":
            return None
        reason = machine.gpu.plugin.problem or "no GPU says how much it has"
        raise parameter_error("gpu_memory", f"must be given for device cuda: {reason}")
    return vram if arguments.memory_limit is None else min(vram, _bytes(arguments.memory_limit))


def _bytes(gigabytes: float) -> int:
    return round(gigabytes * 1e9)


def _all_given(arguments: argparse.Namespace, vram: int | None) -> bool:
    names = ("ssd_rate", "ram_rate") + (() if vram is None else ("pcie_rate", "vram_rate"))
    return all(getattr(arguments, name) is not None for name in names)


def rates_of(arguments: argparse.Namespace, machine: Machine, measured: Measured) -> Rates:
    """Return what was given, else measured, else assumed."""
    default = Rates()

    def choose(given: float | None, found: float | None, assumed: Rate) -> Rate:
        if given is not None:
            return Rate(given, "given")
        return assumed if found is None else Rate(found, "measured")

    described = arguments.gpu_memory is not None or arguments.ram is not None
    gpu = machine.gpu.gpus[0] if machine.gpu.gpus and not described else None
    hopper = gpu is not None and gpu.compute_capability == _HOPPER
    core = next(
        (rate for isa, rate in _CORE_TFLOPS.items() if machine.processor.isa.startswith(isa)), None
    )
    host = default.cpu_tflops
    if core is not None and not described:
        host = Rate(core * machine.processor.cores)
    return Rates(
        ssd=choose(arguments.ssd_rate, measured.ssd, default.ssd),
        ram=choose(arguments.ram_rate, measured.ram, default.ram),
        pcie=choose(arguments.pcie_rate, measured.copy_in, default.pcie),
        vram=choose(arguments.vram_rate, measured.vram, default.vram),
        gpu_tflops=choose(
            arguments.gpu_tflops, None, Rate(290.0) if hopper else default.gpu_tflops
        ),
        cpu_tflops=choose(arguments.cpu_tflops, None, host),
        gpu_rows=64 if hopper else default.gpu_rows,
    )


def report(
    model: dict[str, Any], files: ModelFiles, hardware: Hardware, result: Forecast
) -> dict[str, Any]:
    """Return all that is known, as JSON's types."""
    facts = asdict(result)
    speeds = [
        *zip((facts["evenly"], facts["likely"]), (result.evenly, result.likely), strict=True),
        *zip(facts["table"], result.table, strict=True),
    ]
    for row, decoding in speeds:
        row["hit_rate"] = decoding.hits.rate
        row["estimate"] |= _derived(decoding.estimate)
    for row, prompt in zip(facts["prompts"], result.prompts, strict=True):
        row |= _derived(prompt)
    return {"model": model, "files": asdict(files), "machine": asdict(hardware), **facts}


def _derived(estimate: Any) -> dict[str, Any]:
    return {"tokens_per_second": estimate.tokens_per_second, "binds": estimate.binds}
