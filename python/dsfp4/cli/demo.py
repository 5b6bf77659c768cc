"""`dsfp4 demo`: the built-in model answers a question."""

import argparse

from dsfp4.cli.options import add_engine_flags, add_json_flag, load
from dsfp4.cli.text import print_result
from dsfp4.demo import DEMO

_QUESTION = "What is a file system?"
_TEMPERATURE = 0.5
_SEED = 0
_MAX_TOKENS = 200


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "demo",
        help="let the small built-in model answer a question",
        description="Loads the small model that is built in and lets it answer a question.",
        examples=("dsfp4 demo", "dsfp4 demo --device reference"),
    )
    add_json_flag(parser)
    add_engine_flags(parser)
    parser.set_defaults(execute=execute)


def execute(arguments: argparse.Namespace) -> None:
    """Load the model, print question, thoughts and answer, and say how fast it was."""
    with load(arguments, DEMO) as model:
        if not arguments.json:
            print(f"> {_QUESTION}\n", flush=True)
        with model.generate(
            _QUESTION, _MAX_TOKENS, temperature=_TEMPERATURE, seed=_SEED, stream=True
        ) as stream:
            print_result(stream, model.model.device, as_json=arguments.json)
