"""`dsfp4 run MODEL PROMPT`: continue a text."""

import argparse
import sys

from dsfp4.cli.options import add_engine_flags, add_sampling_flags, load, sampling
from dsfp4.cli.text import print_stream


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand."""
    parser = commands.add_parser("run", help="continue a text", allow_abbrev=False)
    parser.add_argument("model", metavar="MODEL", help="a checkpoint folder, or the word demo")
    parser.add_argument(
        "prompt", metavar="PROMPT", help="the text to continue; - reads it from stdin"
    )
    add_sampling_flags(parser, max_tokens=256)
    add_engine_flags(parser)
    parser.set_defaults(execute=execute)


def execute(arguments: argparse.Namespace) -> None:
    """Print the continuation as it is made."""
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    with (
        load(arguments, arguments.model) as model,
        model.generate(prompt, stream=True, **sampling(arguments)) as stream,
    ):
        print_stream(stream)
