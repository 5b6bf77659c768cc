"""`dsfp4 run MODEL PROMPT`: answer a question, or continue a text."""

import argparse
import sys

from dsfp4.cli.options import (
    add_engine_flags,
    add_json_flag,
    add_model,
    add_sampling_flags,
    integer,
    load,
    sampling,
)
from dsfp4.cli.text import print_result


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "run",
        help="answer a question or continue a text",
        description="The prompt is a user's turn where the checkpoint has a chat template. The "
        "answer goes to stdout, the model's thoughts and a closing line go to stderr.",
        examples=(
            "dsfp4 run demo 'What is a file system?' --temperature 0.5",
            "dsfp4 run demo 'And the king said' --raw --max-tokens 40 --seed 1",
            "dsfp4 run demo - --json < question.txt | jq -r .answer",
        ),
    )
    add_model(parser)
    parser.add_argument("prompt", metavar="PROMPT", help="the prompt; - reads it from stdin")
    parser.add_argument("--raw", action="store_true", help="continue PROMPT as plain text")
    add_json_flag(parser)
    parser.add_argument(
        "--logprobs",
        type=integer(0, 20),
        default=0,
        metavar="N",
        help="with --json: each token's log probability, and so many likeliest tokens",
    )
    add_sampling_flags(parser, max_tokens=256)
    add_engine_flags(parser)
    parser.set_defaults(execute=execute)


def execute(arguments: argparse.Namespace) -> None:
    """Print the text as it is made."""
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    options = sampling(arguments) | {"logprobs": arguments.logprobs}
    with load(arguments, arguments.model) as model:
        with model.generate(prompt, raw=arguments.raw, stream=True, **options) as stream:
            print_result(stream, model.model.device, as_json=arguments.json)
