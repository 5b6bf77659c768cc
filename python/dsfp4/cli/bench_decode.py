"""`dsfp4 bench decode MODEL`: how near decoding comes to what the machine's wires allow.

With --prompt, prefill too.
"""

import argparse
import json
import resource
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dsfp4 import _core
from dsfp4.cli.options import integer, real
from dsfp4.demo import resolve_model
from dsfp4.errors import UnsupportedError
from dsfp4.model import Model

_BLOCK_BYTES = 512 << 10  # as the engine reads
_DEPTH = 64
_RATE_SECONDS = 1.5
_GPU_COUNTS = ("device_hits", "uploads", "uploaded_bytes", "cpu_bytes", "cpu_seconds")


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "decode",
        help="tokens/s of a model that does not fit, beside the floor of each wire",
        description="Decodes random text from an empty cache, then again from the cache as that "
        "left it. The raw rate of the disk is measured before and after, with the same blocks and "
        "depth. The floor is what the bytes and the arithmetic need at least; for a prompt, the "
        "latter is the time in which it did not wait for reads.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "model", metavar="MODEL", help="a checkpoint folder; no tokenizer is needed"
    )
    parser.add_argument("--cpu-cache-size", type=real(0, 1e6), required=True, metavar="GB")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="%(default)s")
    parser.add_argument("--memory-limit", type=real(1e-9, 1e6), metavar="GB", help="of VRAM")
    parser.add_argument("--max-experts", type=integer(0, 1 << 30), metavar="N", help="in VRAM")
    parser.add_argument("--cpu-share", type=real(0, 1), metavar="SHARE", help="beside a GPU")
    parser.add_argument("--prefetch-size", type=real(0, 1e6), metavar="GB")
    parser.add_argument("--prefetch-layers", type=integer(0, 16), metavar="N")
    parser.add_argument("--cache-policy", default="default", choices=_core.policy_names())
    parser.add_argument("--tokens", type=integer(2, 1 << 20), default=32, metavar="N")
    parser.add_argument(
        "--prompt",
        type=integer(1, 1 << 20),
        action="append",
        default=[],
        metavar="N",
        help="also prefill N tokens with an empty cache; may be given several times",
    )
    parser.add_argument("--threads", type=integer(0, 1024), default=0, metavar="N")
    parser.add_argument(
        "--reader", default="auto", choices=["auto", "io_uring", "pread"], help="%(default)s"
    )
    parser.add_argument(
        "--ssd-rate",
        type=real(0.001, 1000),
        metavar="GB/S",
        help="hold reads to this rate, as if the disk were that slow",
    )
    parser.add_argument("--ram-limit", type=real(1e-9, 1e9), metavar="GB", help="of the process")
    parser.add_argument("--trace", metavar="FILE", help="a timeline for ui.perfetto.dev")
    parser.add_argument("--json", action="store_true", help="everything, for programs")
    parser.set_defaults(execute=execute)


def execute(arguments: argparse.Namespace) -> None:
    """Measure and print."""
    report = measure(arguments)
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        print("\n".join(_lines(report)))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the report that --json prints."""
    folder = resolve_model(arguments.model)
    files = sorted(folder.glob("*.safetensors"))
    prompts = [_prefill(arguments, folder, tokens) for tokens in arguments.prompt]
    before = _raw_rate(files, arguments)
    model = _load(arguments, folder, 2 * arguments.tokens + 2)
    ids = np.random.default_rng(0).integers(2, model.config["vocab_size"], 2 * arguments.tokens)
    cold = _decode(model, ids[: arguments.tokens])
    warm = _decode(model, ids[arguments.tokens :])
    compute = _compute_seconds(model, ids[:1])
    raw = (before + _raw_rate(files, arguments)) / 2
    runs = {name: _judge(run, raw, compute) for name, run in (("cold", cold), ("warm", warm))}
    for prompt in prompts:
        floor = {"ssd": prompt["needed_bytes"] / raw / 1e9, "compute": prompt.pop("compute")}
        prompt["floor_seconds"] = floor
        prompt["time_over_floor"] = prompt["seconds"] / max(floor.values())
    return {
        "model": str(arguments.model),
        "tokens": arguments.tokens,
        "cpu_cache_size": arguments.cpu_cache_size,
        "prefetch_layers": arguments.prefetch_layers,
        "streamed_layers": model.stats()["streamed_layers"],
        "cache_policy": arguments.cache_policy,
        "raw_ssd_gb_s": raw,
        "ssd_rate": arguments.ssd_rate,
        "compute_seconds_per_token": compute,
        **runs,
        "prefill": prompts,
        "reserved_bytes": model.stats()["reserved_bytes"],
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _load(arguments: argparse.Namespace, folder: Path, max_context: int) -> Model:
    """Return the model with an empty cache."""
    return Model(
        folder,
        arguments.device,
        memory_limit=arguments.memory_limit,
        max_experts=arguments.max_experts,
        cpu_share=arguments.cpu_share,
        threads=arguments.threads,
        max_context=max_context,
        cpu_cache_size=arguments.cpu_cache_size,
        prefetch_size=arguments.prefetch_size,
        prefetch_layers=arguments.prefetch_layers,
        cache_policy=arguments.cache_policy,
        reader=arguments.reader,
        ram_limit=arguments.ram_limit,
        trace=arguments.trace,
        ssd_rate=arguments.ssd_rate,
        warm_start=False,
    )


def _prefill(arguments: argparse.Namespace, folder: Path, tokens: int) -> dict[str, Any]:
    """Return what one prompt took and read, beside the distinct weights that it needed."""
    model = _load(arguments, folder, tokens + 1)
    ids = np.random.default_rng(1).integers(2, model.config["vocab_size"], tokens)
    before = model.stats()
    start = time.perf_counter()
    _, chosen = model.forward(ids, return_experts=True)
    seconds = time.perf_counter() - start
    after = model.stats()
    waited = sum(after[name] - before[name] for name in ("wait_seconds", "stream_wait_seconds"))
    distinct = sum(len(np.unique(layer)) for layer in chosen)
    read = after["read_bytes"] - before["read_bytes"]
    needed = distinct * after["image_bytes"] + after["streamed_bytes"] - before["streamed_bytes"]
    return {
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_s": tokens / seconds,
        "distinct_experts": distinct,
        "read_bytes": read,
        "needed_bytes": needed,
        "read_over_needed": read / needed if needed > 0 else 0.0,  # all was in memory
        "wait_seconds": waited,
        "compute": seconds - waited,
    }


def _raw_rate(files: list[Path], arguments: argparse.Namespace) -> float:
    """Return GB/s of random reads as the engine makes them, --ssd-rate at most."""
    measured = _measured_rate(files, arguments.reader)
    return min(measured, arguments.ssd_rate or measured)


def _measured_rate(files: list[Path], reader: str) -> float:
    """Return GB/s of random reads with the block size and depth of the engine."""
    kind = "io_uring" if reader == "auto" else reader
    try:
        rate = _core.measure_raw_rate(
            files, reader=kind, block_bytes=_BLOCK_BYTES, depth=_DEPTH, seconds=_RATE_SECONDS
        )
    except UnsupportedError:
        if reader != "auto":
            raise
        return _measured_rate(files, "pread")
    return float(rate["gb_per_second"])


def _decode(model: Model, ids: np.ndarray) -> dict[str, Any]:
    """Decode the ids one by one; return the time, and what the counters gained."""
    before = model.stats()
    start = time.perf_counter()
    chosen, logits = model.routing_trace(ids, decode=True)
    seconds = time.perf_counter() - start
    after = model.stats()
    counted = {
        name: after[name] - before[name]
        for name, value in after.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
    trace = {"chosen": chosen, "logits": logits, "cache_slots": after["cache_slots"]}
    return {**counted, "seconds": seconds, "tokens": len(ids), "trace": trace}


def _compute_seconds(model: Model, ids: np.ndarray, tokens: int = 4) -> float:
    """Return the seconds of a token whose experts are all in RAM: nothing but arithmetic."""
    experts = np.arange(model.config["num_experts_per_tok"], dtype=np.int32)
    layers = model.config["num_hidden_layers"] - model.config["first_k_dense_replace"]
    times = []
    for count in (1, 1 + tokens):  # the first one reads the experts
        forced = np.broadcast_to(experts, (layers, count, len(experts))).copy()
        start = time.perf_counter()
        model.forward(np.repeat(ids, count), experts=forced, decode=True)
        times.append(time.perf_counter() - start)
    return times[1] / (1 + tokens)


def _judge(run: Mapping[str, Any], raw: float, compute: float) -> dict[str, Any]:
    """Set what was measured beside the floor."""
    found = run["hits"] + run["misses"] + run["joined"] + run["prefetched"]
    useful = run["demand_bytes"] + run["prefetched_bytes"] + run["streamed_bytes"]
    floor = {"ssd": useful / raw / 1e9, "compute": compute * run["tokens"]}
    return {
        "seconds": run["seconds"],
        "tokens_per_s": run["tokens"] / run["seconds"],
        "read_bytes": run["read_bytes"],
        "useful_bytes": useful,
        "useful_gb_s": useful / run["seconds"] / 1e9,
        "useful_over_raw": useful / run["seconds"] / 1e9 / raw,
        "ssd_busy": run["ssd_busy_seconds"] / run["seconds"],
        "floor_seconds": floor,
        "time_over_floor": run["seconds"] / max(floor.values()),
        "hit_rate": run["hits"] / max(found, 1),
        "misses": run["misses"],
        "prefetched": run["prefetched"],
        "wasted_bytes": run["wasted_bytes"],
        "prediction_recall": run["predicted_used"] / max(run["predictable"], 1),
        "prediction_precision": run["predicted_used"] / max(run["predicted"], 1),
        "wait_seconds": run["wait_seconds"] + run["stream_wait_seconds"],
        "expert_seconds": run["expert_seconds"],
        **{name: run[name] for name in _GPU_COUNTS},
    }


def _lines(report: Mapping[str, Any]) -> Iterable[str]:
    rate = report["raw_ssd_gb_s"]
    yield f"disk: {rate:.2f} GB/s, blocks of {_BLOCK_BYTES >> 10} KiB, {_DEPTH} deep"
    for name in ("cold", "warm"):
        run = report[name]
        floor = run["floor_seconds"]
        yield (
            f"{name}: {run['tokens_per_s']:.2f} tokens/s, {run['seconds']:.1f} s; floor "
            f"{max(floor.values()):.1f} s (disk {floor['ssd']:.1f}, "
            f"arithmetic {floor['compute']:.1f})"
        )
        yield (
            f"  useful {run['useful_gb_s']:.2f} GB/s, {100 * run['useful_over_raw']:.0f} % of the "
            f"disk's rate; disk busy {100 * run['ssd_busy']:.0f} % of the time; hit rate "
            f"{100 * run['hit_rate']:.1f} %"
        )
        if run["uploads"] + run["cpu_bytes"] + run["device_hits"] > 0:
            yield (
                f"  {run['device_hits']} experts were in VRAM, {run['uploads']} copied there "
                f"({run['uploaded_bytes'] / 1e9:.1f} GB), {run['cpu_bytes'] / 1e9:.1f} GB computed "
                f"by the processor in {run['cpu_seconds']:.2f} s"
            )
    for prompt in report["prefill"]:
        floor = prompt["floor_seconds"]
        yield (
            f"prefill of {prompt['tokens']}: {prompt['tokens_per_s']:.1f} tokens/s, "
            f"{prompt['seconds']:.1f} s; floor {max(floor.values()):.1f} s (disk "
            f"{floor['ssd']:.1f}, arithmetic {floor['compute']:.1f}); read "
            f"{prompt['read_over_needed']:.4f} times the weights that it needs"
        )
    yield f"peak memory {report['peak_rss_bytes'] / 1e9:.2f} GB"
