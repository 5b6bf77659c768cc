"""`dsfp4 demo`: the built-in model answers a question."""

import argparse
import sys

from dsfp4.cli.options import add_engine_flags, load
from dsfp4.cli.text import closing_line, print_stream
from dsfp4.demo import DEMO

_QUESTION = "What is a file system?"
_TEMPERATURE = 0.5
_SEED = 0
_MAX_TOKENS = 200


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "demo", help="let the small built-in model answer a question", allow_abbrev=False
    )
    add_engine_flags(parser)
    parser.set_defaults(execute=execute)


def execute(arguments: argparse.Namespace) -> None:
    """Load the model, print question, thoughts and answer, and say how fast it was."""
    with load(arguments, DEMO) as model:
        print(f"> {_QUESTION}\n", flush=True)
        with model.generate(
            _QUESTION, _MAX_TOKENS, temperature=_TEMPERATURE, seed=_SEED, stream=True
        ) as stream:
            text = print_stream(stream)
        if text is not None:
            print(f"\n{closing_line(text, model.model.device)}", file=sys.stderr)
