"""`dsfp4 verify MODEL`: read everything, and say what is wrong."""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from dsfp4.cli.options import add_json_flag, add_model, integer
from dsfp4.cli.progress import Progress, format_bytes
from dsfp4.cli.text import rate_line
from dsfp4.verify import HASH_FILE, verify


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "verify",
        help="read a whole checkpoint and say what is wrong",
        description="Reads every tensor: are all scales and values finite, and all bytes those "
        f"that were hashed? The checksums are in {HASH_FILE}, which --write makes; where it is "
        "there, loading checks it too.",
        examples=("dsfp4 verify demo", "dsfp4 verify ~/models/DeepSeek-R1-FP4 --write"),
    )
    add_model(parser)
    parser.add_argument(
        "--write", action="store_true", help="if nothing is wrong, write the checksums"
    )
    parser.add_argument(
        "--threads", type=integer(0, 1024), default=0, metavar="N", help="0: one for each core"
    )
    add_json_flag(parser)
    parser.set_defaults(execute=execute)


def execute(arguments: argparse.Namespace) -> int:
    """Print what was found; return 1 if something is wrong."""
    with Progress("verifying") as progress:
        report = verify(
            arguments.model, threads=arguments.threads, write=arguments.write, progress=progress
        )
    seconds = progress.seconds
    if arguments.json:
        print(json.dumps(report | {"seconds": seconds}, indent=2))
    else:
        print("\n".join(_lines(report, arguments.write)))
        size = report["bytes"]
        print(rate_line(format_bytes(size), size / 1e6, seconds, "MB/s"), file=sys.stderr)
    return 1 if report["problems"] else 0


def _lines(report: Mapping[str, Any], write: bool) -> Iterable[str]:
    for problem in report["problems"]:
        yield (
            f"'{problem['file']}': tensor '{problem['tensor']}', byte {problem['offset']}: "
            f"{problem['problem']}"
        )
    wrong = len({problem["tensor"] for problem in report["problems"]})
    of_all = f"of {report['tensors']} tensors in {report['files']} files"
    if wrong:
        yield f"{wrong} {of_all} {'is' if wrong == 1 else 'are'} not sound"
        if write:
            yield f"{HASH_FILE} was not written"
        return
    yield f"all values {of_all} are finite"
    if report["compared"]:
        yield f"all bytes are those that {HASH_FILE} was made from"
    if report["wrote"]:
        yield f"{HASH_FILE} is written; loading checks it from now on"
    elif not report["compared"]:
        yield "there are no checksums to compare with; --write makes them"
