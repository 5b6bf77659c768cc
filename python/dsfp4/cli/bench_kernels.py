"""`dsfp4 bench kernels`: how close each op comes to what the machine can do."""

import argparse
import json
import os
import platform
import random
import statistics
import sys
from collections.abc import Iterator
from typing import Any

from dsfp4 import _core
from dsfp4.cli import bench_cuda
from dsfp4.cli.options import integer
from dsfp4.doctor.facts import System, last_level_cache, processor_name
from dsfp4.ops import MlaShape

Result = dict[str, Any]

# DeepSeek-R1's widths.
HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 7168, 2048, 256, 8
HEADS, LORA, NOPE, ROPE, VALUE = 128, 512, 128, 64, 128
# Experts that are really there: as many as 8 tokens choose at most, 1.6 GB in NVFP4. All 256 would
# be 6.3 GB; 512 tokens use each of these four times, far apart enough that no cache helps.
SLOTS = 64

READ_BYTES = 1 << 29  # at least, to measure the memory's read rate

BYTES_PER_WEIGHT = {"bf16": 2.0, "fp8": 1.0, "nvfp4": 0.5625, "mxfp4": 0.53125}
CACHE_BYTES = {"bf16": 2, "fp8": 1}


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `kernels` to the subcommands of `dsfp4 bench`."""
    parser = commands.add_parser(
        "kernels",
        help="how close each op comes to what the machine can do",
        description="Times matrix products, experts and attention at DeepSeek-R1's widths on "
        "random weights that rotate through at least four times the last-level cache. "
        "floor_ratio is the least time that the memory's read rate and the arithmetic's peak, both "
        "measured in this run with the same threads, allow, over the time taken: 1 is perfect. "
        f"Takes 4 GB of RAM: the MoE layers hold {SLOTS} of {EXPERTS} experts.",
        examples=(
            "dsfp4 bench kernels --quick      few runs of what is short",
            "dsfp4 bench kernels --profile    where one layer's time goes",
            "dsfp4 bench kernels --json",
        ),
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda", "reference"])
    parser.add_argument(
        "--threads", type=integer(0, 1024), default=0, metavar="N", help="0: one for each core"
    )
    parser.add_argument("--quick", action="store_true", help="few runs, and none that take seconds")
    parser.add_argument("--profile", action="store_true", help="instead: one whole layer, op by op")
    parser.set_defaults(execute=execute)


def machine() -> dict[str, Any]:
    """The processor, the cores that may be used, the memory."""
    return {
        "cpu": processor_name(System()) or platform.machine(),
        "cores": _core.available_cores(),
        "ram_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "last_level_cache_bytes": last_level_cache(System()),
    }


class Bench:
    """A backend, what the machine can do, and the cases."""

    def __init__(self, device: str, threads: int, *, quick: bool) -> None:
        """Measures the memory's read rate and the arithmetic's peaks."""
        self.core = _core.KernelBench(device, threads)
        self.threads = threads or _core.available_cores()
        self.isa = self.core.isa or device
        self.quick = quick
        self.runs = 5 if quick else 11
        self.rotation = 4 * last_level_cache(System())
        size = max(self.rotation, READ_BYTES)
        self.read_rate = size / statistics.median(self.core.read_memory(size, 5))
        self.all_peaks = self.core.peaks()
        levels = ["baseline", "avx2", "avx512", "avx512vnni", "avx512bf16", "amx"]
        level = levels.index(self.isa) if self.isa in levels else 0
        self.peaks = {
            name: rate for name, (isa, rate) in self.all_peaks.items() if levels.index(isa) <= level
        }
        self.fp32_peak = max(rate for name, rate in self.peaks.items() if name.startswith("fp32"))
        self.peak = max(self.peaks.values())

    def result(
        self,
        name: str,
        fmt: str,
        shape: list[int],
        tokens: int,
        seconds: list[float],
        *,
        read: float,
        flops: float,
        exact: bool = False,
    ) -> Result:
        """A row of the table; `exact` arithmetic is held against the FP32 peak alone."""
        median = statistics.median(seconds)
        floor = max(read / self.read_rate, flops / (self.fp32_peak if exact else self.peak))
        return {
            "name": name,
            "format": fmt,
            "shape": shape,
            "tokens": tokens,
            "isa": self.isa,
            "threads": self.threads,
            "seconds": median,
            "bytes": round(read),
            "gb_s": read / median / 1e9,
            "gflop_s": flops / median / 1e9,
            "floor_ratio": floor / median,
        }

    def copies(self, size: float) -> int:
        """How many of a thing of `size` bytes rotate."""
        return max(1, -int(-self.rotation // size))

    def linear(self) -> Iterator[Result]:
        """One large matrix: R1's o_proj."""
        rows, cols = HIDDEN, HEADS * VALUE
        for fmt, width in BYTES_PER_WEIGHT.items():
            size = rows * cols * width
            for tokens in (1, 8) if self.quick else (1, 8, 64, 512):
                runs = self.runs if tokens < 64 else 3
                times = self.core.linear(fmt, rows, cols, tokens, self.copies(size), runs)
                flops = 2.0 * rows * cols * tokens
                yield self.result(
                    "linear", fmt, [rows, cols], tokens, times, read=size, flops=flops
                )

    def moe(self) -> Iterator[Result]:
        """The routed experts of one layer."""
        for fmt in ("nvfp4", "mxfp4"):
            one = 3 * HIDDEN * INTERMEDIATE * BYTES_PER_WEIGHT[fmt]
            for tokens in (1, 8) if self.quick else (1, 8, 512):
                runs = self.runs if tokens < 512 else 3
                chosen, distinct = choices(tokens, runs + 1)
                times = self.core.experts(
                    fmt, HIDDEN, INTERMEDIATE, SLOTS, tokens, TOP_K, chosen, runs
                )
                yield self.result(
                    "moe layer",
                    fmt,
                    [EXPERTS, HIDDEN, INTERMEDIATE],
                    tokens,
                    times,
                    read=distinct * one,
                    flops=6.0 * HIDDEN * INTERMEDIATE * TOP_K * tokens,
                )

    def decode_attention(self) -> Iterator[Result]:
        """One token on a long context, absorbed."""
        shape = mla_shape()
        weights = HEADS * LORA * 2.0  # bytes of one row of the head's part, BF16
        for cache in ("bf16", "fp8"):
            for context in (4096,) if self.quick else (4096, 32768):
                size = float(context * (LORA + ROPE) * CACHE_BYTES[cache])
                copies = self.copies(size)
                times = self.core.decode_attention(shape, "bf16", cache, context, copies, self.runs)
                work = {
                    "absorb_query": (weights * NOPE, 2.0 * HEADS * NOPE * LORA, "bf16"),
                    "latent_attention": (
                        size,
                        2.0 * HEADS * context * (2 * LORA + ROPE),
                        f"{cache} cache",
                    ),
                    "expand_value": (weights * VALUE, 2.0 * HEADS * VALUE * LORA, "bf16"),
                }
                for name, (read, flops, fmt) in work.items():
                    yield self.result(
                        f"{name}, context {context}",
                        fmt,
                        [HEADS, LORA, ROPE],
                        1,
                        times[name],
                        read=read,
                        flops=flops,
                        exact=True,
                    )

    def prefill_attention(self) -> Iterator[Result]:
        """A chunk of a prompt, at its beginning and far in."""
        rows = 64 if self.quick else 512
        for position in (0,) if self.quick else (0, 4096 - 512):
            tokens = position + rows
            weight = 2.0 * HEADS * (NOPE + VALUE) * LORA
            read = weight + tokens * (LORA + ROPE) * 2.0
            keys = rows * (position + (rows + 1) / 2)
            flops = weight * tokens + 2.0 * HEADS * keys * (NOPE + ROPE + VALUE)
            times = self.core.prefill_attention(
                mla_shape(), "bf16", "bf16", position, rows, self.copies(read), 3
            )
            yield self.result(
                f"prefill attention at {position}",
                "bf16",
                [HEADS, LORA, ROPE],
                rows,
                times,
                read=read,
                flops=flops,
                exact=True,
            )

    def profile(self) -> Iterator[Result]:
        """One MoE layer of R1 as NVIDIA publishes it: experts NVFP4, attention BF16."""
        for tokens, position, decode in ((1, 4095, True), (512, 0, False)):
            if decode or not self.quick:
                runs = self.runs if decode else 3
                ops = self.core.profile(position, tokens, decode, SLOTS, "nvfp4", runs)
                for name, read, flops, times in ops:
                    yield self.result(name, "", [], tokens, times, read=read, flops=flops)


def mla_shape() -> MlaShape:
    """R1's attention."""
    return MlaShape(HEADS, LORA, NOPE, ROPE, VALUE, 0.1352)


def choices(tokens: int, runs: int) -> tuple[list[int], int]:
    """Experts of every token and run, [runs, tokens, TOP_K] flat, and how many are different.

    They are numbered so that those of one run lie in different slots where there are enough.
    """
    rng = random.Random(0)
    pattern = [rng.sample(range(EXPERTS), TOP_K) for _ in range(tokens)]
    distinct = sorted({expert for row in pattern for expert in row})
    number = {expert: i for i, expert in enumerate(distinct)}
    flat = [number[expert] for row in pattern for expert in row]
    return [e + run * len(distinct) for run in range(runs) for e in flat], len(distinct)


def print_head(bench: Bench, about: dict[str, Any]) -> None:
    """What the figures are held against."""
    print(f"machine: {about['cpu']}, {about['cores']} cores, {about['ram_gb']:.0f} GB RAM")
    print(f"threads: {bench.threads}, instruction set: {bench.isa}")
    print(f"memory read: {bench.read_rate / 1e9:.1f} GB/s")
    for name, rate in bench.peaks.items():
        print(f"registers only, {name}: {rate / 1e9:.0f} G operations/s")


def print_results(results: Iterator[Result]) -> list[Result]:
    """Print rows as they come, and return them."""
    kept = []
    print(
        f"\n{'op':32} {'format':10} {'tokens':>6} {'ms':>10} {'GB/s':>7} {'GFLOP/s':>8}"
        f" {'floor':>6}"
    )
    for row in results:
        kept.append(row)
        print(
            f"{row['name']:32} {row['format']:10} {row['tokens']:6} {1e3 * row['seconds']:10.3f} "
            f"{row['gb_s']:7.1f} {row['gflop_s']:8.1f} {row['floor_ratio']:6.2f}",
            flush=True,
        )
    return kept


def execute(arguments: argparse.Namespace) -> None:
    """Measure and print."""
    if arguments.device == "cuda":
        print(bench_cuda.report(as_json=arguments.json))
        return
    bench = Bench(arguments.device, arguments.threads, quick=arguments.quick)
    about = machine()

    def cases() -> Iterator[Result]:
        if arguments.profile:
            yield from bench.profile()
            return
        yield from bench.linear()
        yield from bench.moe()
        yield from bench.decode_attention()
        yield from bench.prefill_attention()

    if not arguments.json:
        print_head(bench, about)
        rows = print_results(cases())
        if arguments.profile:
            for tokens in sorted({row["tokens"] for row in rows}):
                total = sum(row["seconds"] for row in rows if row["tokens"] == tokens)
                print(f"{tokens} token(s): {1e3 * total:.1f} ms a layer")
        return
    results = []
    for row in cases():
        results.append(row)
        print(f"{row['name']} {row['format']} {row['tokens']}", file=sys.stderr)
    print(
        json.dumps(
            {
                "machine": about,
                "isa": bench.isa,
                "threads": bench.threads,
                "read_bandwidth_gb_s": bench.read_rate / 1e9,
                "peak_gop_s": {name: rate / 1e9 for name, (_, rate) in bench.all_peaks.items()},
                "results": results,
            },
            indent=2,
        )
    )
