"""Progress on stderr, and only where somebody watches."""

import os
import sys
import time

_ERASE_LINE = "\r\x1b[K"
_SECONDS_BETWEEN_UPDATES = 0.1


def format_bytes(count: float) -> str:
    """Return `count` bytes in decimal units: 24.8 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


class Progress:
    """A callback of (bytes done, bytes in all) that keeps one line of a terminal up to date.

    As a context manager it erases the line at the end. Where stderr is not a terminal, or CI is
    set, it says nothing.
    """

    def __init__(self, verb: str) -> None:
        self._verb = verb
        self._shown = sys.stderr.isatty() and not os.environ.get("CI")
        self._start = time.monotonic()
        self._next = self._start

    def __call__(self, done: int, total: int) -> None:
        """Show the state, though not more often than can be read."""
        now = time.monotonic()
        if not self._shown or now < self._next:
            return
        self._next = now + _SECONDS_BETWEEN_UPDATES
        rate = done / max(now - self._start, 1e-3)
        text = f"{self._verb} {format_bytes(done)} of {format_bytes(total)}, {format_bytes(rate)}/s"
        print(f"{_ERASE_LINE}{text}", end="", file=sys.stderr, flush=True)

    def __enter__(self) -> "Progress":
        """Return the callback itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Erase the line."""
        if self._shown:
            print(_ERASE_LINE, end="", file=sys.stderr, flush=True)
