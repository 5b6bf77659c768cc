"""`dsfp4 pull REPOSITORY`: download a model from the Hugging Face Hub."""

import argparse
import json
import shlex
import sys
from dataclasses import asdict

from dsfp4.cli.options import add_json_flag
from dsfp4.cli.progress import Progress, format_bytes
from dsfp4.cli.text import rate_line
from dsfp4.pull import parse, pull


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "pull",
        help="download a model from the Hugging Face Hub",
        description="Downloads the files that running the model needs, and no others, and prints "
        "the folder that holds them. The model and the free space are checked before the weights "
        "are downloaded. Interrupted, it goes on when called again: complete files are kept. In "
        "the Hub's cache, other commands find the model by its REPOSITORY.",
        examples=(
            "dsfp4 pull nvidia/DeepSeek-R1-FP4",
            "dsfp4 pull nvidia/DeepSeek-R1-FP4 --to ~/models/DeepSeek-R1-FP4",
        ),
    )
    parser.add_argument(
        "repository", metavar="REPOSITORY", help="org/name or org/name@revision on the Hub"
    )
    parser.add_argument(
        "--revision", metavar="NAME", help="a branch, a tag or a commit; default: main"
    )
    parser.add_argument(
        "--to", metavar="FOLDER", help="download there; default: into the Hub's cache"
    )
    add_json_flag(parser)
    parser.set_defaults(execute=execute)


def execute(arguments: argparse.Namespace) -> None:
    """Download, and print the folder; how to go on is said on stderr."""
    repository = parse(arguments.repository, arguments.revision)
    try:
        with Progress("downloading") as progress:
            pulled = pull(str(repository), to=arguments.to, progress=progress)
    except KeyboardInterrupt:
        again = ["dsfp4", "pull", str(repository)]
        again += ["--to", arguments.to] if arguments.to else []
        print(f"complete files are kept; `{shlex.join(again)}` goes on", file=sys.stderr)
        raise
    if arguments.json:
        facts = asdict(pulled) | {"folder": str(pulled.folder), "seconds": progress.seconds}
        print(json.dumps(facts, indent=2))
        return
    print(pulled.folder)
    speed = rate_line(
        format_bytes(pulled.downloaded), pulled.downloaded / 1e6, progress.seconds, "MB/s"
    )
    size = f"the model has {format_bytes(pulled.needed)} in {pulled.files} files"
    if pulled.left_out:
        size += f", and {format_bytes(pulled.left_out)} of weights that are not needed to decode"
    model = shlex.quote(str(pulled.folder) if arguments.to else str(repository))
    print(f"{speed}; {size}\n`dsfp4 chat {model}` talks to it", file=sys.stderr)
