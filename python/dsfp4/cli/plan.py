"""`dsfp4 plan MODEL`: where a model would lie, and how fast it would be, before it is loaded."""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dsfp4 import _core, estimate, hub
from dsfp4.cli import options
from dsfp4.cli.plot import check_drawing, draw_plan, picture_path
from dsfp4.cli.progress import format_bytes
from dsfp4.demo import resolve_model
from dsfp4.doctor import Machine, examine, measure
from dsfp4.errors import MemoryLimitError, ParameterError
from dsfp4.model import check_quantization

_GB = 10**9
_PROMPTS = (512, 4096, 32768)
_SHARES = (0.25, 0.5, 0.75, 0.9, 1.0)  # of the chosen experts found in memory
# Rates of a machine that is only described: an NVMe disk with PCIe 4.0, two channels of DDR5, PCIe
# 4.0 x16, and a GPU of the middle class with this engine's portable kernels.
_ASSUMED = {"ssd": 7.0, "ram": 60.0, "pcie": 25.0, "vram": 500.0}
_GPU_TFLOPS = 30.0
_CORE_TFLOPS = 0.05  # of one core, with AVX2
_WIRES = {"ssd": "SSD", "ram": "RAM", "pcie": "PCIe", "vram": "VRAM"}
_TIERS = ("vram", "ram", "ssd")
_MEMORY_FLAGS = (
    *("cpu_cache_size", "prefetch_size", "max_experts", "gpu_reserved"),
    *("max_gpu_layers", "min_layers", "prefetch_layers"),
)
_BINDS = {
    "ssd": "SSD",
    "dense": "dense weights",
    "experts": "experts in RAM",
    "ram": "RAM",
    "pcie": "PCIe",
    "arithmetic": "arithmetic",
}
_FASTER = {
    "vram": "twice the VRAM",
    "ram": "twice the RAM",
    "ssd_rate": "an SSD of twice the rate",
    "pcie_rate": "PCIe of twice the rate",
    "ram_rate": "RAM of twice the rate",
}


@dataclass(frozen=True)
class Target:
    """The machine of a plan: bytes, and rates with where each of them is from."""

    ram: int
    vram: int | None  # that the process may take; None: no GPU
    rates: estimate.Rates
    sources: Mapping[str, str]  # of each size and rate: "measured", "given" or "assumed"


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "plan",
        help="show where a model would lie and how fast it would be, before loading it",
        description="Reads a checkpoint's headers, or takes the name of a published model, and "
        "says what the engine would do on this machine, or on one that the flags describe. Not a "
        "byte of weights is loaded. The exit code is 1 if the model cannot run there.",
        examples=(
            "dsfp4 plan deepseek-r1-fp4 --gpu-memory 16 --ram 96 --ssd-rate 14 --pcie-rate 55",
            "dsfp4 plan ~/models/DeepSeek-R1-FP4     on this machine, whose rates are measured",
            "dsfp4 plan deepseek-v2-lite --device cpu --json",
        ),
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a checkpoint folder, a repository that was pulled (org/name), the word demo, or one "
        "of " + ", ".join(_core.published_models()),
    )
    parser.add_argument(
        "--device",
        default="auto",
        choices=["auto", "cpu", "cuda"],
        help="auto: cuda where there is a GPU, or --gpu-memory is given",
    )
    machine = parser.add_argument_group(
        "machine", "What is not given is this machine's; its rates are measured if no size is given"
    )
    size = options.real(0.01, 1e6)
    machine.add_argument("--gpu-memory", type=size, metavar="GB", help="VRAM")
    machine.add_argument("--ram", type=size, metavar="GB", help="RAM in all")
    rate = options.real(0.01, 1e5)
    machine.add_argument(
        "--ssd-rate", type=rate, metavar="GB/S", help="random reads of 512 KiB, many at once"
    )
    machine.add_argument("--pcie-rate", type=rate, metavar="GB/S", help="RAM to GPU")
    machine.add_argument("--ram-rate", type=rate, metavar="GB/S", help="reads by all cores")
    machine.add_argument("--vram-rate", type=rate, metavar="GB/S", help="reads by the GPU")
    machine.add_argument(
        "--gpu-tflops",
        type=rate,
        default=_GPU_TFLOPS,
        metavar="TFLOP/S",
        help="of the GPU's kernels for prompts; %(default)g, about what they reach on a GPU of the "
        "middle class",
    )
    machine.add_argument(
        "--seconds",
        type=options.real(0.05, 600),
        default=1.0,
        metavar="S",
        help="for each rate that is measured; %(default)s",
    )
    options.add_placement_flags(parser)
    parser.add_argument(
        "--plot",
        type=picture_path,
        metavar="OUT.png",
        help="draw the bytes by tier and the rates of decoding there, too",
    )
    options.add_json_flag(parser)
    parser.set_defaults(execute=execute)


def execute(arguments: argparse.Namespace) -> int:
    """Print the plan; return 1 if the model cannot run there."""
    if arguments.plot is not None:
        check_drawing(arguments.plot)
    published = arguments.model in _core.published_models()
    folder = None if published else resolve_model(arguments.model)
    target, device = describe_machine(arguments, folder)
    planner = _core.Planner(
        arguments.model if folder is None else str(folder),
        published=published,
        device=device,
        kv_cache_dtype=arguments.kv_cache_dtype,
        threads=arguments.threads,
        quantization=check_quantization(arguments.quantization),
    )
    wishes = {name: getattr(arguments, name) for name in _MEMORY_FLAGS}
    wishes["max_context"] = arguments.max_context
    wishes["ram_limit"] = int((arguments.ram_limit or 0) * _GB)
    try:
        report = make_report(planner, target, wishes)
    except MemoryLimitError as error:
        if arguments.json:
            print(json.dumps({"runs": False, "problem": str(error)}, indent=2))
        else:
            print(f"it does not run there: {error}", file=sys.stderr)
        return 1
    report["files"] = _files(folder)
    report["machine"] = asdict(target)
    if arguments.plot is not None:
        roles = [role | {"tier": _WIRES[role["tier"]]} for role in report["plan"]["roles"]]
        drawn = {"model": arguments.model, "roles": roles, "decode": report["decode"]}
        draw_plan(drawn, arguments.plot)
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        print("\n".join(lines(arguments.model, planner.model, report, target)))
    return 0


def describe_machine(arguments: argparse.Namespace, folder: Path | None) -> tuple[Target, str]:
    """Return the machine that the flags describe, completed from this one, and the device."""
    here = examine(folder or Path())
    described = arguments.gpu_memory is not None or arguments.ram is not None
    sources: dict[str, str] = {}

    ram = int((arguments.ram or 0) * _GB) or here.memory.total or 0
    if ram == 0:
        raise ParameterError(
            "ram must be given: this system does not say how much there is", parameter="ram"
        )
    sources["ram_bytes"] = "given" if arguments.ram else "measured"
    vram = _vram(arguments, here, described)
    sources["vram_bytes"] = (
        "given" if arguments.gpu_memory or arguments.memory_limit else "measured"
    )

    wanted = {name: getattr(arguments, f"{name}_rate") for name in _ASSUMED}
    needed = {"ssd", "ram"} | ({"pcie", "vram"} if vram else set())
    measured: dict[str, float | None] = {}
    if not described and any(wanted[name] is None for name in needed):
        found = measure(here, arguments.seconds)
        measured = {
            "ssd": found.ssd,
            "ram": found.ram,
            "pcie": found.copy_in,
            "vram": found.vram,
        }
    rates: dict[str, float] = {}
    for name, assumed in _ASSUMED.items():
        given, there = wanted[name], measured.get(name)
        rates[name] = given or there or assumed
        sources[name] = "given" if given else "measured" if there else "assumed"
    cores = here.processor.threads
    target = Target(
        ram,
        vram,
        estimate.Rates(
            ssd=rates["ssd"],
            ram=rates["ram"],
            cpu_tflops=_CORE_TFLOPS * cores,
            pcie=rates["pcie"] if vram else 0.0,
            vram=rates["vram"] if vram else 0.0,
            gpu_tflops=arguments.gpu_tflops if vram else 0.0,
        ),
        sources,
    )
    return target, "cuda" if vram else "cpu"


def _vram(arguments: argparse.Namespace, here: Machine, described: bool) -> int | None:
    """Return the bytes of VRAM that the process may take; None: there is no GPU, or not to be."""
    if arguments.device == "cpu":
        if arguments.gpu_memory or arguments.memory_limit:
            raise ParameterError(
                "gpu_memory is of no use with --device cpu: leave out one", parameter="gpu_memory"
            )
        return None
    vram: int | None = None
    if arguments.gpu_memory:
        vram = int(arguments.gpu_memory * _GB)
    elif here.gpu.gpus and not (described and arguments.device == "auto"):
        gpu = here.gpu.gpus[0]
        vram = (gpu.memory or 0) - (gpu.used or 0)
    if not vram:
        if arguments.device == "cuda" or arguments.memory_limit:
            raise ParameterError(
                "gpu_memory must be given: device cuda is planned for, and no GPU is here",
                parameter="gpu_memory",
            )
        return None
    if arguments.memory_limit:
        vram = min(vram, int(arguments.memory_limit * _GB))
    return vram


def make_report(
    planner: _core.Planner, target: Target, wishes: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the plan and its estimates. Raises MemoryLimitError if the model cannot run there."""
    model = planner.model
    plan = planner.plan(ram=target.ram, vram=target.vram, **wishes)
    even, repeated = estimate.usual_range(model, plan)
    shares = [even, *(share for share in _SHARES if share > even + 0.005)]
    if model["experts"] == 0 or not plan["tiered"]:
        shares = [1.0]
    decode = []
    for share in shares:
        found = estimate.decode(model, plan, target.rates, estimate.hits_at(model, plan, share))
        decode.append({"hit_rate": share} | _facts(found))
    prompts = [
        _facts(estimate.prefill(model, plan, target.rates, tokens))
        for tokens in _PROMPTS
        if tokens <= plan["max_context"]
    ]
    usual = [
        estimate.decode(model, plan, target.rates, estimate.hits_at(model, plan, share))
        for share in (even, repeated)
    ]
    return {
        "runs": True,
        "model": {name: model[name] for name in ("weight_bytes", "unneeded_bytes")},
        "plan": plan,
        "decode": decode,
        "usual_tokens_per_second": [found.tokens_per_second for found in usual],
        "usual_hit_rates": [even, repeated],
        "binds": usual[0].binds,
        "prompts": prompts,
        "faster": faster(planner, target, wishes, usual[0].tokens_per_second),
    }


def faster(
    planner: _core.Planner, target: Target, wishes: Mapping[str, Any], now: float
) -> list[dict[str, Any]]:
    """Return what a doubled part of the machine would bring to decoding, the best first."""
    rates = target.rates
    doubled = {
        "ram": replace(target, ram=2 * target.ram),
        "ssd_rate": replace(target, rates=replace(rates, ssd=2 * rates.ssd)),
        "ram_rate": replace(target, rates=replace(rates, ram=2 * rates.ram)),
    }
    if target.vram is not None:
        doubled["vram"] = replace(target, vram=2 * target.vram)
        doubled["pcie_rate"] = replace(target, rates=replace(rates, pcie=2 * rates.pcie))
    gains = []
    for name, other in doubled.items():
        plan = planner.plan(ram=other.ram, vram=other.vram, **wishes)
        hits = estimate.even_hits(planner.model, plan)
        found = estimate.decode(planner.model, plan, other.rates, hits)
        gains.append({"what": name, "gain": found.tokens_per_second / now})
    return sorted(gains, key=lambda gain: -gain["gain"])


def _facts(found: estimate.Estimate) -> dict[str, Any]:
    return asdict(found) | {"tokens_per_second": found.tokens_per_second}


def _files(folder: Path | None) -> dict[str, Any] | None:
    """Return which files of a checkpoint running it needs, and which not; None without one."""
    if folder is None:
        return None
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    needed = set(hub.needed_files(folder, names))
    spare = [name for name in names if name.endswith(".safetensors") and name not in needed]
    return {
        "needed": sorted(needed),
        "unneeded_weights": spare,
        "unneeded_bytes": sum((folder / name).stat().st_size for name in spare),
    }


def lines(
    name: str, model: Mapping[str, Any], report: Mapping[str, Any], target: Target
) -> Iterable[str]:
    """Return the report for people."""
    plan = report["plan"]
    yield f"{name}: {format_bytes(model['weight_bytes'])} of weights that decoding needs"
    unneeded = model["unneeded_bytes"]
    if report["files"] and report["files"]["unneeded_weights"]:
        yield (
            f"not needed: {', '.join(report['files']['unneeded_weights'])}, "
            f"{format_bytes(report['files']['unneeded_bytes'])}"
        )
    elif unneeded:
        yield (
            f"not needed: the layer for multi-token prediction, {format_bytes(unneeded)} more; "
            "`dsfp4 pull` leaves its files out"
        )
    yield from _machine_lines(target)
    yield ""
    yield from _role_lines(plan)
    yield f"context {plan['max_context']} tokens; prompts pass in pieces of {plan['chunk']} tokens"
    for warning in plan["warnings"]:
        yield f"note: {warning}"
    if plan["conversion"]:
        yield f"note: dense weights are converted while they are loaded: {plan['conversion']}"
    yield ""
    yield from _decode_lines(report)
    yield ""
    yield from _prompt_lines(report)
    yield ""
    gains = [gain for gain in report["faster"] if gain["gain"] >= 1.05][:2]
    if gains:
        yield "faster with " + ", or ".join(
            f"{_FASTER[gain['what']]}: {gain['gain']:.2g} times" for gain in gains
        )
    else:
        yield "nothing that is doubled alone makes it 5 % faster"


def _machine_lines(target: Target) -> Iterable[str]:
    sizes = [f"{format_bytes(target.ram)} of RAM ({target.sources['ram_bytes']})"]
    if target.vram is not None:
        sizes.insert(0, f"{format_bytes(target.vram)} of VRAM ({target.sources['vram_bytes']})")
    yield "machine: " + ", ".join(sizes)
    rates = asdict(target.rates)
    yield "rates in GB/s: " + ", ".join(
        f"{_WIRES[wire]} {rates[wire]:.3g} ({target.sources[wire]})"
        for wire in _WIRES
        if rates[wire]
    )


def _role_lines(plan: Mapping[str, Any]) -> Iterable[str]:
    """Lay out a table: a row for each role, a column for each tier."""
    by_role: dict[str, dict[str, float]] = {}
    formats: dict[str, str] = {}
    for role in plan["roles"]:
        by_role.setdefault(role["role"], {})[role["tier"]] = role["bytes"]
        formats[role["role"]] = role["format"] or formats.get(role["role"], "")
    tiers = [tier for tier in _TIERS if any(tier in places for places in by_role.values())]
    rows = [("", *(_WIRES[tier] for tier in tiers), "format")]
    rows += [
        (role.replace("_", " "), *(_cell(places, tier) for tier in tiers), formats[role])
        for role, places in by_role.items()
    ]
    # The SSD keeps all experts, so that column has no sum.
    sums = [
        format_bytes(sum(places.get(tier, 0) for places in by_role.values()))
        if tier != "ssd"
        else ""
        for tier in tiers
    ]
    yield from _table([*rows, ("in all", *sums, "")])


def _cell(places: Mapping[str, float], tier: str) -> str:
    return format_bytes(places[tier]) if tier in places else "-"


def _decode_lines(report: Mapping[str, Any]) -> Iterable[str]:
    wires = [wire for wire in _WIRES if any(row["wire_bytes"][wire] for row in report["decode"])]
    rows = [("in memory", *(f"{_WIRES[wire]} a token" for wire in wires), "tokens/s", "binds")]
    rows += [
        (
            f"{row['hit_rate']:.0%}",
            *(format_bytes(row["wire_bytes"][wire]) for wire in wires),
            f"{row['tokens_per_second']:.3g}",
            _BINDS[row["binds"]],
        )
        for row in report["decode"]
    ]
    slow, fast = report["usual_tokens_per_second"]
    low, high = report["usual_hit_rates"]
    if low >= 1.0:
        yield f"decoding: about {slow:.3g} tokens/s"
    else:
        yield (
            f"decoding: {slow:.3g} to {fast:.3g} tokens/s, where {low:.0%} (even use) to "
            f"{high:.0%} of experts are in memory"
        )
    yield from _table(rows)


def _prompt_lines(report: Mapping[str, Any]) -> Iterable[str]:
    rows = [("prompt", "until the first token", "tokens/s", "binds")]
    rows += [
        (
            f"{row['tokens']} tokens",
            f"{row['seconds']:.3g} s",
            f"{row['tokens_per_second']:.3g}",
            _BINDS[row["binds"]],
        )
        for row in report["prompts"]
    ]
    yield from _table(rows)


def _table(rows: Sequence[tuple[str, ...]]) -> Iterable[str]:
    """Lay out rows: text in the first and the last column, numbers between."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *numbers, last in rows:
        middle = "  ".join(
            f"{text:>{width}}" for text, width in zip(numbers, widths[1:-1], strict=True)
        )
        yield f"{first:<{widths[0]}}  {middle}  {last}".rstrip()
