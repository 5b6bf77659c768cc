"""`dsfp4 run MODEL PROMPT`: answer a question, or continue a text."""

import argparse
import sys

from dsfp4.cli.options import add_engine_flags, add_sampling_flags, load, sampling
from dsfp4.cli.text import closing_line, print_stream


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "run",
        help="answer a question or continue a text",
        description="The prompt is a user's turn where the checkpoint has a chat template. The "
        "answer goes to stdout, the model's thoughts and a closing line go to stderr.",
        epilog="example: dsfp4 run demo 'What is a file system?' --temperature 0.5",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="a checkpoint folder, or the word demo")
    parser.add_argument("prompt", metavar="PROMPT", help="the prompt; - reads it from stdin")
    parser.add_argument("--raw", action="store_true", help="continue PROMPT as plain text")
    add_sampling_flags(parser, max_tokens=256)
    add_engine_flags(parser)
    parser.set_defaults(execute=execute)


def execute(arguments: argparse.Namespace) -> None:
    """Print the text as it is made."""
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    with load(arguments, arguments.model) as model:
        with model.generate(
            prompt, raw=arguments.raw, stream=True, **sampling(arguments)
        ) as stream:
            text = print_stream(stream)
        if text is not None:
            print(closing_line(text, model.model.device), file=sys.stderr)
