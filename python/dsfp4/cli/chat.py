"""`dsfp4 chat MODEL`: a conversation in the terminal."""

import argparse
import json
import sys

from dsfp4.cli.options import (
    add_engine_flags,
    add_json_flag,
    add_model,
    add_sampling_flags,
    load,
    sampling,
)
from dsfp4.cli.session import MAX_TOKENS, Session
from dsfp4.cli.terminal import LineReader, print_folded
from dsfp4.cli.text import closing_line, facts
from dsfp4.errors import Dsfp4Error, UnsupportedError
from dsfp4.stream import TextStream


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "chat",
        help="talk to a model",
        description="A conversation of many turns. /help lists the commands; the arrow keys bring "
        "back earlier lines. The model's thoughts are folded into one line, /thoughts shows them. "
        "Without a terminal, each line of stdin is a message.",
        examples=(
            "dsfp4 chat demo",
            "dsfp4 chat MODEL --system 'Answer in one sentence.' --temperature 0.6",
            "echo 'What is a file system?' | dsfp4 chat demo --json",
        ),
    )
    add_model(parser)
    parser.add_argument("--system", metavar="TEXT", help="the system prompt")
    add_json_flag(parser)
    add_sampling_flags(parser, max_tokens=MAX_TOKENS)
    add_engine_flags(parser)
    parser.set_defaults(execute=execute)


def execute(arguments: argparse.Namespace) -> None:
    """Read messages and answer them, until the end of input or /quit."""
    with load(arguments, arguments.model) as model:
        if model.chat_template is None:
            raise UnsupportedError(
                f"'{model.folder}' has no chat template; `dsfp4 run --raw` continues plain text"
            )
        session = Session(model, sampling(arguments), arguments.system)
        with LineReader() as lines:
            if lines.interactive:
                print("/help lists the commands, /quit leaves.", file=sys.stderr)
            for line in lines:
                _handle(session, line, interactive=lines.interactive, as_json=arguments.json)
                if session.finished:
                    return


def _handle(session: Session, line: str, *, interactive: bool, as_json: bool) -> None:
    """Answer a message or carry out a command; what goes wrong ends only a script."""
    question: str | None = line
    try:
        if line.startswith("/") and not line.startswith("//"):
            words, question = session.command(line)
            if words:
                print(words, file=sys.stderr)
        elif line.startswith("//"):
            question = line[1:]
        if question is not None:
            _answer(session, question, as_json=as_json)
    except Dsfp4Error as error:
        if not interactive:
            raise
        print(error, file=sys.stderr)


def _answer(session: Session, question: str, *, as_json: bool) -> None:
    device = session.model.model.device
    try:
        with session.ask(question) as stream:
            interrupted = _show(stream, as_json=as_json)
    except BaseException:
        session.dropped()
        raise
    text = stream.result
    if text is None or (interrupted and not text.strip()):
        session.dropped()
        return
    session.answered(str(text), text.reasoning)
    if as_json:
        print(json.dumps(facts(text, device), ensure_ascii=False), flush=True)
    else:
        print(closing_line(text, device) + (", stopped" if interrupted else ""), file=sys.stderr)


def _show(stream: TextStream, *, as_json: bool) -> bool:
    """Show the answer as it comes; return whether Ctrl-C ended it."""
    try:
        if as_json:
            for _ in stream:
                pass
        else:
            print_folded(stream)
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        return True
    return False
