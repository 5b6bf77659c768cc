"""Argument parsers whose help and whose errors teach by example."""

import argparse
import difflib
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

WRONG_USAGE = 2  # the exit code


class _HelpFormatter(argparse.HelpFormatter):
    """Wraps paragraphs, and leaves lists of several lines as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)


class CommandParser(argparse.ArgumentParser):
    """A parser with `examples`: whole command lines, shown by --help; the first by errors too."""

    def __init__(self, *args: Any, examples: Sequence[str] = (), **options: Any) -> None:
        options.setdefault("allow_abbrev", False)
        options.setdefault("formatter_class", _HelpFormatter)
        if examples:
            options["epilog"] = "\n".join(["examples:", *(f"  {line}" for line in examples)])
        super().__init__(*args, **options)
        self._examples = examples

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and what would be right, and exit with code 2."""
        lines = [f"{self.prog}: error: {message}"]
        if close := _close_choice(message):
            lines.append(f"did you mean '{close}'?")
        if self._examples:
            command, *_ = self._examples[0].split("   ")  # what follows explains it
            lines.append(f"for example: {command}")
        lines.append(f"`{self.prog} --help` explains")
        self.print_usage(sys.stderr)
        self.exit(WRONG_USAGE, "\n".join(lines) + "\n")


def _close_choice(message: str) -> str | None:
    """Return the choice most like a wrong one, from argparse's own message about it."""
    match = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message)
    if match is None:
        return None
    choices = [choice.strip().strip("'") for choice in match[2].split(",")]
    return next(iter(difflib.get_close_matches(match[1], choices, 1)), None)
