"""`dsfp4 info MODEL`: what a checkpoint holds, read from its headers alone."""

import argparse
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from dsfp4 import _core
from dsfp4.cli.options import add_json_flag, add_model
from dsfp4.cli.progress import format_bytes
from dsfp4.demo import resolve_model
from dsfp4.sampling import Sampling, recommended_sampling

_COLUMNS = ("role", "matrices by format", "size", "per token")


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "info",
        help="show what a checkpoint holds",
        description="Reads the headers alone: family, formats and sizes by role, and the bytes "
        "that one decoded token reads; and how it samples unless told otherwise.",
        examples=("dsfp4 info demo", "dsfp4 info ~/models/DeepSeek-R1-FP4 --json"),
    )
    add_model(parser)
    add_json_flag(parser)
    parser.set_defaults(execute=execute)


def execute(arguments: argparse.Namespace) -> None:
    """Print the description of the checkpoint."""
    folder = resolve_model(arguments.model)
    sampling = recommended_sampling(folder)
    description = {**_core.describe(str(folder)), "sampling": asdict(sampling)}
    if arguments.json:
        print(json.dumps(description, indent=2))
    else:
        print("\n".join(_lines(description, sampling)))


def _lines(description: Mapping[str, Any], sampling: Sampling) -> Iterable[str]:
    config = description["config"]
    yield (
        f"{config['model_type']}: {config['num_hidden_layers']} layers, hidden size "
        f"{config['hidden_size']}, {config['n_routed_experts']} experts with "
        f"{config['num_experts_per_tok']} active, context {config['max_position_embeddings']}"
    )
    yield f"{description['tensors']} tensors in {description['files']} files"
    yield f"sampling, unless told otherwise: {sampling.describe()}"
    yield ""
    rows = [
        (
            role["role"],
            ", ".join(f"{count} {name}" for name, count in sorted(role["formats"].items())),
            format_bytes(role["bytes"]),
            format_bytes(role["bytes_per_token"]),
        )
        for role in description["roles"]
    ]
    total = format_bytes(description["total_bytes"])
    per_token = format_bytes(description["bytes_per_token"])
    yield from _table([_COLUMNS, *rows, ("total", "", total, per_token)])
    if description["unused_bytes"]:
        yield ""
        yield f"{format_bytes(description['unused_bytes'])} more is not needed to decode"


def _table(rows: list[tuple[str, ...]]) -> Iterable[str]:
    """Lay out rows: two columns of text to the left, then numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for role, formats, size, per_token in rows:
        yield (
            f"{role:<{widths[0]}}  {formats:<{widths[1]}}  {size:>{widths[2]}}  "
            f"{per_token:>{widths[3]}}"
        )
