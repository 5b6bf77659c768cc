"""A person's side of a conversation: lines with editing and history, and folded thoughts."""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from dsfp4.cli.text import DIM, PLAIN
from dsfp4.stream import TextStream

_ERASE_LINE = "\r\x1b[K"
_MOST_LINES = 1000  # of history
_PROMPT, _MORE = ">>> ", "... "
_SECONDS_BETWEEN_UPDATES = 0.1


def history_path() -> Path:
    """Return where earlier lines are kept: $XDG_STATE_HOME/dsfp4/history, ~/.local/state else."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "dsfp4" / "history"


class LineReader:
    """Iterates over what a person types, or over the lines of stdin where that is no terminal.

    A line that ends with a backslash goes on in the next one. Blank messages are left out. Ctrl-C
    drops the line, Ctrl-D ends. As a context manager it keeps the history in a file.
    """

    def __init__(self) -> None:
        self.interactive = sys.stdin.isatty()
        self._readline: ModuleType | None = None

    def __enter__(self) -> "LineReader":
        """Get the history."""
        if self.interactive:
            try:
                import readline
            except ImportError:  # a Python that was built without it
                print("no line editing and no history: Python has no readline", file=sys.stderr)
                return self
            self._readline = readline
            readline.set_auto_history(True)
            if history_path().exists():
                try:
                    readline.read_history_file(history_path())
                except OSError as error:
                    print(f"no history: '{history_path()}': {error.strerror}", file=sys.stderr)
        return self

    def __exit__(self, *exception: object) -> None:
        """Keep the history."""
        if self._readline is None:
            return
        path = history_path()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)  # nobody else's to read
            self._readline.set_history_length(_MOST_LINES)
            self._readline.write_history_file(path)
        except OSError as error:
            print(f"the history is not kept: '{path}': {error.strerror}", file=sys.stderr)

    def __iter__(self) -> Iterator[str]:
        """Yield message after message."""
        while True:
            try:
                message = self._message()
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                print(file=sys.stderr)
                continue
            except EOFError:
                if self.interactive:
                    print(file=sys.stderr)
                return
            if message.strip():
                yield message

    def _message(self) -> str:
        lines = [self._line(_PROMPT)]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            lines.append(self._line(_MORE))
        return "\n".join(lines)

    def _line(self, prompt: str) -> str:
        return input(prompt if self.interactive else "")


def print_folded(stream: TextStream) -> None:
    """Print the answer to stdout as it comes; the thoughts become one dim line on stderr.

    A tool call is a line with its name and arguments. On a terminal the thoughts' line counts the
    seconds. Whatever happens, the last line is ended.
    """
    thoughts = _Thoughts()
    written = False
    call = -1
    try:
        for piece in stream:
            if piece.kind == "reasoning":
                thoughts.go_on()
                continue
            thoughts.fold()
            if piece.call != call:
                print("\n" if written else "", piece.name, sep="", end=" " if piece.name else "")
                call = piece.call
            print(piece, end="", flush=True)
            written = True
    finally:
        thoughts.fold()
        if written:
            print(flush=True)


class _Thoughts:
    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._start = time.monotonic()
        self._next = self._start
        self._open = False

    def go_on(self) -> None:
        self._open = True
        now = time.monotonic()
        if self._terminal and now >= self._next:
            self._next = now + _SECONDS_BETWEEN_UPDATES
            self._say(f"{_ERASE_LINE}{DIM}thinking, {now - self._start:.0f} s{PLAIN}")

    def fold(self) -> None:
        if not self._open:
            return
        self._open = False
        line = f"[thought for {time.monotonic() - self._start:.1f} s; /thoughts shows it]"
        self._say(f"{_ERASE_LINE}{DIM}{line}{PLAIN}\n" if self._terminal else f"{line}\n")

    def _say(self, text: str) -> None:
        print(text, end="", file=sys.stderr, flush=True)
