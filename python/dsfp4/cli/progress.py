"""Progress on stderr, and only where somebody watches."""

import os
import sys
import time
from collections.abc import Callable

_ERASE_LINE = "\r\x1b[K"
_SECONDS_BETWEEN_UPDATES = 0.1
_SECONDS_BEFORE_FORECAST = 1.0  # of the time left


def format_bytes(count: float) -> str:
    """Return `count` bytes in decimal units: 24.8 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def format_tokens(count: float) -> str:
    """Return `count` tokens in words."""
    return f"{count:.0f} tokens"


def format_seconds(seconds: float) -> str:
    """Return a time as long as a person would say it: 42 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


class Progress:
    """A callback of (done, total) that keeps one line of a terminal up to date.

    Both count bytes, or what `amount` puts into words. As a context manager it erases the line at
    the end. Where stderr is not a terminal, or CI is set, it says nothing.
    """

    def __init__(self, verb: str, amount: Callable[[float], str] = format_bytes) -> None:
        self._verb = verb
        self._amount = amount
        self._shown = sys.stderr.isatty() and not os.environ.get("CI")
        self._start = time.monotonic()
        self._next = self._start

    @property
    def seconds(self) -> float:
        """Since it was made."""
        return time.monotonic() - self._start

    def __call__(self, done: int, total: int) -> None:
        """Show the state, the rate and the time left, though not more often than can be read."""
        now = time.monotonic()
        if not self._shown or now < self._next:
            return
        self._next = now + _SECONDS_BETWEEN_UPDATES
        rate = done / max(self.seconds, 1e-3)
        known = done > 0 and self.seconds >= _SECONDS_BEFORE_FORECAST
        left = f", {format_seconds((total - done) / rate)} left" if known else ""
        text = f"{self._verb} {self._amount(done)} of {self._amount(total)}"
        text += f", {self._amount(rate)}/s{left}"
        print(f"{_ERASE_LINE}{text}", end="", file=sys.stderr, flush=True)

    def __enter__(self) -> "Progress":
        """Return the callback itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Erase the line."""
        if self._shown:
            print(_ERASE_LINE, end="", file=sys.stderr, flush=True)
