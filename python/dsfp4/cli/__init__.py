"""The `dsfp4` command: one module for each subcommand."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import dsfp4
from dsfp4.cli import bench, chat, demo, doctor, eval, info, plan, pull, quantize, run, verify
from dsfp4.cli.parser import CommandParser
from dsfp4.errors import Dsfp4Error

_INTERRUPTED = 130  # what a shell reports for Ctrl-C


class _PrintCmakeDir(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(Path(dsfp4.__file__).parent / "lib" / "cmake" / "dsfp4")
        parser.exit()


def make_parser() -> argparse.ArgumentParser:
    """Return the parser; each subcommand sets `execute`, a function of the parsed arguments."""
    parser = CommandParser(
        prog="dsfp4",
        description="Runs DeepSeek models in FP4 from the folders that Hugging Face publishes. "
        "MODEL is such a folder, a repository that was pulled (org/name), or the word demo: the "
        "small model that is built in.",
        examples=(
            "dsfp4 demo                     the built-in model answers a question",
            "dsfp4 chat demo                talk to it",
            "dsfp4 run MODEL 'Who is Ada?'  one answer, on stdout",
            "dsfp4 run --help               what a command can do",
        ),
    )
    parser.add_argument("--version", action="version", version=f"dsfp4 {dsfp4.__version__}")
    parser.add_argument(
        "--cmake-dir",
        action=_PrintCmakeDir,
        nargs=0,
        help="print the folder that CMake's find_package(dsfp4) needs as dsfp4_DIR, and exit",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (demo, doctor, plan, run, chat, pull, info, eval, verify, quantize, bench):
        command.add_command(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, or 1 for an error while running.

    `verify` returns 1 too where it finds something wrong, `doctor` where nothing can run, and
    `plan` where the model cannot. Wrong usage exits with code 2 (SystemExit, by argparse).
    """
    arguments = make_parser().parse_args(argv)
    try:
        code: int | None = arguments.execute(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader went away, as `head` does. Nothing more can be said, not even by the flush that
        # Python does at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Dsfp4Error, OSError) as error:
        print(f"dsfp4: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("dsfp4: interrupted", file=sys.stderr)
        return _INTERRUPTED
    return code or 0
