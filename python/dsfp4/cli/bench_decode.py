"""`dsfp4 bench decode MODEL`: how near decoding comes to what the machine's wires allow.

With --prompt, prefill too.
"""

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsfp4 import _core
from dsfp4.cli import decode_floor, decode_report, plot, timeline
from dsfp4.cli.options import integer, quantization, real, share
from dsfp4.demo import resolve_model
from dsfp4.model import Model

_PROMPT_COUNTS = (
    "wait_seconds",
    "stream_wait_seconds",
    "read_bytes",
    "streamed_bytes",
    "uploaded_bytes",
    "layer_upload_bytes",
    "layer_upload_wait_seconds",
)
_STAGES = ("prefetch", "compute", "transfer")
_WARM_UP = 4  # tokens, after a change of cpu_share
_PARTS = 4  # that tokens are decoded in, each between two windows of the disk's rate
_LEAST_PART = 8  # tokens
_DRAWN = 3  # tokens, the last of the warm run


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "decode",
        help="tokens/s of a model that does not fit, beside the floor of each wire",
        description="Decodes random text from an empty cache, then again from the cache as that "
        "left it. The raw rate of the disk is measured before, between and after, with the same "
        "blocks and depth. The floor is what the bytes and the arithmetic need at least; for a "
        "prompt, the latter is the time in which it did not wait for reads. Beside a GPU it is the "
        "dense part, then the chosen experts in RAM at the rate at which processor and PCIe take "
        "them at once.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "model", metavar="MODEL", help="a checkpoint folder; no tokenizer is needed"
    )
    parser.add_argument("--cpu-cache-size", type=real(0, 1e6), required=True, metavar="GB")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="%(default)s")
    parser.add_argument("--memory-limit", type=real(1e-9, 1e6), metavar="GB", help="of VRAM")
    parser.add_argument("--max-experts", type=integer(0, 1 << 30), metavar="N", help="in VRAM")
    parser.add_argument("--max-gpu-layers", type=integer(0, 1 << 30), metavar="N", help="in VRAM")
    parser.add_argument("--min-layers", type=integer(0, 1 << 30), metavar="N", help="in VRAM")
    parser.add_argument(
        "--quantization", type=quantization, default="auto", metavar="ROLE=FORMAT,...|auto|keep"
    )
    parser.add_argument(
        "--cpu-share",
        type=share,
        action="append",
        default=[],
        metavar="SHARE",
        help="beside a GPU: 0 to 1, or auto, the default; given several times, a table compares "
        "them",
    )
    parser.add_argument(
        "--repeat",
        type=integer(1, 1000),
        default=1,
        metavar="N",
        help="measure each cpu-share N times in turn, and show medians; %(default)s",
    )
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
        help="also prefill N tokens with an empty cache, then with one that holds all experts if "
        "it is that large; may be given several times",
    )
    parser.add_argument(
        "--max-context",
        type=integer(1, 1 << 20),
        default=1,
        metavar="TOKENS",
        help="reserve a KV cache of so many tokens; default: as many as are decoded",
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
    parser.add_argument(
        "--plot",
        type=plot.picture_path,
        metavar="OUT",
        help=f"draw the last {_DRAWN} tokens of the warm run, and the bytes of one, as .png, .svg "
        "or .pdf; needs dsfp4[plot]",
    )
    parser.add_argument("--json", action="store_true", help="everything, for programs")
    parser.add_argument(
        "--stages",
        action="store_true",
        help="also decode, and prefill the last --prompt, with the overlap of each stage of "
        "set_compute_streams() switched off",
    )
    parser.set_defaults(execute=execute)


def execute(arguments: argparse.Namespace) -> None:
    """Measure, draw and print."""
    report = measure(arguments) if arguments.plot is None else _measure_and_draw(arguments)
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        print("\n".join(decode_report.lines(report)))


def _measure_and_draw(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure with a trace, and draw it."""
    plot.check_drawing(arguments.plot)  # rather now than after minutes
    with tempfile.TemporaryDirectory() as folder:
        traced = argparse.Namespace(**vars(arguments))
        traced.trace = arguments.trace or str(Path(folder, "trace.json"))
        report = measure(traced)
        spans = timeline.read_trace(Path(traced.trace))
    tokens, warm = arguments.tokens, report["warm"]
    plot.draw_decode(
        # The cold run's steps come first, one a token.
        timeline.make_timeline(spans, 2 * tokens - min(_DRAWN, tokens), 2 * tokens),
        timeline.token_bytes(warm, tokens, arguments.device == "cuda"),
        f"{arguments.model} on {arguments.device}, warm: {warm['tokens_per_s']:.2f} tokens/s",
        arguments.plot,
    )
    return report


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the report that --json prints."""
    folder = resolve_model(arguments.model)
    files = sorted(folder.glob("*.safetensors"))
    prompts = [row for tokens in arguments.prompt for row in _prefill(arguments, folder, tokens)]
    disk = decode_floor.Disk(files, arguments.reader)
    wires = None
    if arguments.device == "cuda":
        wires = decode_floor.wire_rates(folder, arguments.threads, arguments.memory_limit)
    context = _context(arguments.tokens, _core.read_config(str(folder)))
    if arguments.stages:
        context = max([context, *(tokens + 1 for tokens in arguments.prompt[-1:])])
    model = _load(arguments, folder, context)
    draw = np.random.default_rng(0)
    disk.measure()
    cold, warm = (
        _decode_between(disk, model, _ids(draw, model, arguments.tokens)) for _ in range(2)
    )
    shares = _decode_shares(model, arguments, draw)
    stages = _without_stages(model, arguments, draw) if arguments.stages else []
    one_id = int(_ids(draw, model, 1)[0])
    compute = dense = 0.0
    if wires is not None and model.stats()["tiered"]:
        dense = decode_floor.dense_seconds(model, one_id)
    else:
        wires = None  # nothing crosses them
        compute = _compute_seconds(model, one_id)
    measured = disk.gb_per_second
    raw = min(measured, arguments.ssd_rate or measured)
    rates = decode_floor.Rates(raw, compute, dense, wires)
    return {
        "model": str(arguments.model),
        "tokens": arguments.tokens,
        "cpu_cache_size": arguments.cpu_cache_size,
        "prefetch_layers": arguments.prefetch_layers,
        "streamed_layers": model.stats()["streamed_layers"],
        "cache_policy": arguments.cache_policy,
        "raw_ssd_gb_s": raw,
        "measured_ssd_gb_s": measured,
        "measured_ssd_windows": disk.windows,
        "measured_ssd_block_bytes": decode_floor.block_bytes(files),
        "reading_cpu_seconds_per_gb": disk.cpu_seconds_per_gb,
        "ssd_rate": arguments.ssd_rate,
        "compute_seconds_per_token": compute if wires is None else None,
        "dense_seconds_per_token": None if wires is None else dense,
        "wires": wires,
        "cold": decode_floor.judge(cold, rates),
        "warm": decode_floor.judge(warm, rates),
        "cpu_shares": [decode_floor.judge_share(share, runs, rates) for share, runs in shares],
        "stages": stages,
        "prefill": [decode_floor.judge_prompt(prompt, rates) for prompt in prompts],
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
        max_gpu_layers=arguments.max_gpu_layers,
        min_layers=arguments.min_layers,
        quantization=arguments.quantization,
        cpu_share=arguments.cpu_share[0] if arguments.cpu_share else None,
        threads=arguments.threads,
        max_context=max(max_context, arguments.max_context),
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


def _context(tokens: int, config: dict[str, Any]) -> int:
    """Return the longest sequence of this benchmark."""
    return max(tokens, decode_floor.LONGEST, _tokens_for_all_experts(config)) + 1


def _tokens_for_all_experts(config: dict[str, Any]) -> int:
    return -(-config["n_routed_experts"] // config["num_experts_per_tok"])


def _ids(draw: np.random.Generator, model: Model, count: int) -> np.ndarray:
    return draw.integers(2, model.config["vocab_size"], count)


def _prefill(arguments: argparse.Namespace, folder: Path, tokens: int) -> list[dict[str, Any]]:
    """Return what a prompt took from an empty cache, and from one that holds all, if it can."""
    model = _load(arguments, folder, tokens + 1)
    ids = np.random.default_rng(1).integers(2, model.config["vocab_size"], tokens)
    runs = {False: _one_prefill(model, ids)}
    if _fill_cache(model):
        model.generate(ids, max_tokens=1)  # some kernels are loaded when they are first used
        runs[True] = _one_prefill(model, ids)
    distinct = sum(len(np.unique(layer)) for layer in model.chosen_experts(ids))
    return [_beside_needed(model, run, distinct, cached) for cached, run in runs.items()]


def _one_prefill(model: Model, ids: np.ndarray) -> dict[str, Any]:
    """Return the time of a prompt up to its first token, and what the counters gained."""
    before = model.stats()
    start = time.perf_counter()
    model.generate(ids, max_tokens=1)
    seconds = time.perf_counter() - start
    after = model.stats()
    gained = {name: after[name] - before[name] for name in _PROMPT_COUNTS}
    return {"tokens": len(ids), "seconds": seconds, **gained}


def _beside_needed(
    model: Model, run: Mapping[str, Any], distinct: int, cached: bool
) -> dict[str, Any]:
    """Set a prompt beside the distinct weights that it needed."""
    waited = run["wait_seconds"] + run["stream_wait_seconds"]
    routed = distinct * model.stats()["image_bytes"]
    needed = (0 if cached else routed) + run["streamed_bytes"]
    return {
        **run,
        "cached": cached,
        "tokens_per_s": run["tokens"] / run["seconds"],
        "routed_bytes": routed,
        "needed_bytes": needed,
        "read_over_needed": run["read_bytes"] / needed if needed > 0 else 0.0,  # all was in memory
        "wait_seconds": waited,
        "compute": run["seconds"] - waited,
    }


def _decode(model: Model, ids: np.ndarray) -> dict[str, Any]:
    """Decode the ids one by one; return the time, and what the counters gained."""
    before = model.stats()
    start, cpu_start = time.perf_counter(), time.process_time()
    model.token_seconds(ids)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    after = model.stats()
    counted = {
        name: after[name] - before[name]
        for name, value in after.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
    return {
        **counted,
        "image_bytes": after["image_bytes"],
        "seconds": seconds,
        "process_cpu_seconds": cpu_seconds,
        "tokens": len(ids),
    }


def _decode_between(disk: decode_floor.Disk, model: Model, ids: np.ndarray) -> dict[str, Any]:
    """_decode() in parts, the disk measured after each, as its rate changes while this runs."""
    runs = []
    for part in np.array_split(ids, max(1, min(_PARTS, len(ids) // _LEAST_PART))):
        runs.append(_decode(model, part))
        disk.measure()
    return decode_floor.sum_of(runs)


def _decode_shares(
    model: Model, arguments: argparse.Namespace, draw: np.random.Generator
) -> Sequence[tuple[float | None, list[dict[str, Any]]]]:
    """Decode with each --cpu-share in turn, there and back; nothing where there is one to do."""
    shares = arguments.cpu_share or [None]
    if len(shares) == 1 and arguments.repeat == 1:
        return []
    _fill_cache(model)
    runs: list[list[dict[str, Any]]] = [[] for _ in shares]
    order = list(range(len(shares)))
    for _ in range(arguments.repeat):
        ids = _ids(draw, model, arguments.tokens)
        for i in order:
            model.set_memory_config(cpu_share="auto" if shares[i] is None else shares[i])
            model.token_seconds(ids[:_WARM_UP])
            runs[i].append(_decode(model, ids))
        order.reverse()
    return list(zip(shares, runs, strict=True))


def _without_stages(
    model: Model, arguments: argparse.Namespace, draw: np.random.Generator
) -> list[dict[str, Any]]:
    """Return the seconds with all stages overlapped, then with each switched off."""
    _fill_cache(model)
    ids = _ids(draw, model, arguments.tokens)
    prompts = [_ids(draw, model, tokens) for tokens in arguments.prompt[-1:]]
    rows = []
    for stage in (None, *_STAGES):
        model.set_compute_streams({} if stage is None else {stage: False})
        model.token_seconds(ids[:_WARM_UP])
        row: dict[str, Any] = {"off": stage, "decode_seconds": _decode(model, ids)["seconds"]}
        for prompt in prompts:
            row["prompt_tokens"] = len(prompt)
            row["prompt_seconds"] = _one_prefill(model, prompt)["seconds"]
        rows.append(row)
    model.set_compute_streams({})
    return rows


def _fill_cache(model: Model) -> bool:
    """Have every expert read once, where the cache holds them all; say whether it does."""
    config, stats = model.config, model.stats()
    layers = config["num_hidden_layers"] - config["first_k_dense_replace"]
    experts, top_k = config["n_routed_experts"], config["num_experts_per_tok"]
    if not stats["tiered"]:
        return True
    if stats["cache_slots"] < layers * experts:
        return False
    count = _tokens_for_all_experts(config)
    forced = (np.arange(count * top_k, dtype=np.int32) % experts).reshape(1, count, top_k)
    model.forward([2] * count, experts=np.repeat(forced, layers, axis=0), decode=True)
    return True


def _compute_seconds(model: Model, one_id: int, tokens: int = 4) -> float:
    """Return the seconds of a token whose experts are all in RAM: nothing but arithmetic."""
    experts = np.arange(model.config["num_experts_per_tok"], dtype=np.int32)
    layers = model.config["num_hidden_layers"] - model.config["first_k_dense_replace"]
    times = []
    for count in (1, 1 + tokens):  # the first one reads the experts
        forced = np.broadcast_to(experts, (layers, count, len(experts))).copy()
        start = time.perf_counter()
        model.forward([one_id] * count, experts=forced, decode=True)
        times.append(time.perf_counter() - start)
    return times[1] / (1 + tokens)
