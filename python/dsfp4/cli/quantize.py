"""`dsfp4 quantize SRC DST`: make an NVFP4 checkpoint."""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from typing import Any, get_args

from dsfp4.cli.options import add_json_flag, integer
from dsfp4.cli.progress import Progress, format_bytes
from dsfp4.cli.text import rate_line
from dsfp4.quantize import quantize
from dsfp4.quantize.plan import Format


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "quantize",
        help="convert a BF16 or FP8 checkpoint to NVFP4",
        description="Experts and MLPs become NVFP4; embeddings, head, norms, routers and MTP "
        "layers stay as they are. It goes shard by shard, so the model need not fit in memory.",
        examples=("dsfp4 quantize DeepSeek-V3 DeepSeek-V3-FP4 --attention fp8",),
    )
    parser.add_argument("source", metavar="SRC", help="a BF16, F32 or FP8 checkpoint folder")
    parser.add_argument("destination", metavar="DST", help="a new or empty folder")
    parser.add_argument(
        "--attention",
        default="keep",
        choices=get_args(Format),
        help="what becomes of the attention's matrices (default: %(default)s)",
    )
    parser.add_argument(
        "--threads", type=integer(0, 1024), default=0, metavar="N", help="0: one for each core"
    )
    add_json_flag(parser)
    parser.set_defaults(execute=execute)


def execute(arguments: argparse.Namespace) -> None:
    """Convert, and print the summary."""
    with Progress("quantising") as progress:
        summary = quantize(
            arguments.source,
            arguments.destination,
            attention=arguments.attention,
            threads=arguments.threads,
            progress=progress,
        )
    seconds = progress.seconds
    if arguments.json:
        print(json.dumps(summary | {"seconds": seconds}, indent=2))
        return
    print("\n".join(_lines(summary)))
    size = summary["bytes_in"]
    print(rate_line(format_bytes(size), size / 1e6, seconds, "MB/s"), file=sys.stderr)


def _lines(summary: Mapping[str, Any]) -> Iterable[str]:
    yield (
        f"{format_bytes(summary['bytes_in'])} -> {format_bytes(summary['bytes_out'])} in "
        f"{summary['files']} files"
    )
    yield ", ".join(f"{count} {name}" for name, count in sorted(summary["matrices"].items()))
    for role, error in summary["relative_rms_error"].items():
        yield f"{role}: relative RMS error {error:.4f}"
    for module in summary["kept"]:
        yield f"kept as it was, because its input features are no multiple of 16: {module}"
