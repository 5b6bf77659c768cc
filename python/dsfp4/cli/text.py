"""Text on the screen as it is made."""

import time
from collections.abc import Iterable


def print_stream(pieces: Iterable[str]) -> float:
    """Print `pieces` as they come and end the line, come what may. Returns the seconds taken."""
    start = time.monotonic()
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
    finally:
        print(flush=True)
    return time.monotonic() - start
