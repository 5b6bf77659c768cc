"""`dsfp4 demo`: the built-in model answers a question."""

import argparse

from dsfp4.chat import ChatTemplate
from dsfp4.cli.options import add_engine_flags, load
from dsfp4.cli.text import print_stream
from dsfp4.demo import DEMO

_QUESTION = "What is a file system?"
_SEED = 3
_MAX_TOKENS = 200


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "demo", help="let the small built-in model answer a question", allow_abbrev=False
    )
    add_engine_flags(parser)
    parser.set_defaults(execute=execute)


def execute(arguments: argparse.Namespace) -> None:
    """Load the model, print question and answer, and say how fast it was."""
    with load(arguments, DEMO) as model:
        template = ChatTemplate(model.folder, model.tokenizer)
        prompt = template.render([{"role": "user", "content": _QUESTION}])
        print(f"> {_QUESTION}\n", flush=True)
        stream = model.generate(
            model.tokenizer.encode(prompt), _MAX_TOKENS, seed=_SEED, stream=True
        )
        with stream:
            seconds = print_stream(stream)
        tokens = len(stream.result.tokens) if stream.result else 0
        print(
            f"\n{tokens} tokens in {seconds:.2f} s, {tokens / seconds:.1f} tokens/s on "
            f"{model.model.device}"
        )
