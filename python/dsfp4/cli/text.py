"""Text on the screen as it is made."""

import sys
from typing import TextIO

from dsfp4.stream import TextStream
from dsfp4.text import Text
from dsfp4.thinking import Kind

_DIM, _PLAIN = "\033[2m", "\033[0m"


def print_stream(stream: TextStream) -> Text | None:
    """Print the answer as it comes to stdout, and the model's thoughts, dim, to stderr.

    The last line is ended, come what may. Returns the whole, None if it was cut short.
    """
    kind: Kind | None = None
    try:
        for piece in stream:
            if piece.kind != kind:
                _end_line(kind)
                kind = piece.kind
                if kind == "reasoning" and sys.stderr.isatty():
                    print(_DIM, end="", file=sys.stderr)
            print(piece, end="", flush=True, file=_file(kind))
    finally:
        _end_line(kind)
    return stream.result


def closing_line(text: Text, device: str) -> str:
    """Say how much was written, and how fast."""
    tokens, seconds = len(text.tokens), text.prefill_seconds + text.decode_seconds
    return f"{tokens} tokens in {seconds:.2f} s, {tokens / seconds:.1f} tokens/s on {device}"


def _file(kind: Kind) -> TextIO:
    return sys.stderr if kind == "reasoning" else sys.stdout


def _end_line(kind: Kind | None) -> None:
    if kind is None:
        return
    plain = _PLAIN if kind == "reasoning" and sys.stderr.isatty() else ""
    print(plain, flush=True, file=_file(kind))
