"""Text on the screen as it is made."""

import json
import sys
from typing import Any, TextIO

from dsfp4.stream import TextStream
from dsfp4.text import Kind, Text

DIM, PLAIN = "\033[2m", "\033[0m"


def print_stream(stream: TextStream) -> Text | None:
    """Print the answer as it comes to stdout, and the model's thoughts, dim, to stderr.

    A tool call is a line of stdout with its name and arguments. The last line is ended, come what
    may. Returns the whole, None if it was cut short.
    """
    kind: Kind | None = None
    call = -1
    try:
        for piece in stream:
            if (piece.kind, piece.call) != (kind, call):
                _end_line(kind)
                kind, call = piece.kind, piece.call
                if piece.kind == "tool_call":
                    print(piece.name, end=" ")
                if kind == "reasoning" and sys.stderr.isatty():
                    print(DIM, end="", file=sys.stderr)
            print(piece, end="", flush=True, file=_file(piece.kind))
    finally:
        _end_line(kind)
    return stream.result


def print_result(stream: TextStream, device: str, *, as_json: bool) -> None:
    """Print a generation and its closing line as it comes; or, at its end, one JSON object."""
    if not as_json:
        text = print_stream(stream)
        if text is not None:
            print(closing_line(text, device), file=sys.stderr)
        return
    for _ in stream:
        pass
    if stream.result is not None:
        print(json.dumps(facts(stream.result, device), ensure_ascii=False), flush=True)


def closing_line(text: Text, device: str) -> str:
    """Say how much was written, and how fast."""
    tokens, seconds = len(text.tokens), text.prefill_seconds + text.decode_seconds
    return rate_line(f"{tokens} tokens", tokens, seconds, f"tokens/s on {device}")


def rate_line(amount: str, count: float, seconds: float, unit: str) -> str:
    """Say how much was done, in which time, and how fast."""
    return f"{amount} in {seconds:.2f} s, {count / max(seconds, 1e-9):.1f} {unit}"


def facts(text: Text, device: str) -> dict[str, Any]:
    """Return all that is known of an answer, as JSON's types; times are in seconds."""
    seconds = text.prefill_seconds + text.decode_seconds
    result: dict[str, Any] = {
        "answer": str(text),
        "reasoning": text.reasoning,
        "finish_reason": text.finish_reason,
        "prompt_tokens": text.prompt_tokens,
        "tokens": len(text.tokens),
        "prefill_seconds": text.prefill_seconds,
        "decode_seconds": text.decode_seconds,
        "tokens_per_second": len(text.tokens) / max(seconds, 1e-9),
        "device": device,
    }
    if text.tool_calls:
        result["tool_calls"] = [
            {"name": call.name, "arguments": call.arguments} for call in text.tool_calls
        ]
    if text.logprobs:
        result["logprobs"] = [
            {"id": item.id, "logprob": item.logprob, "top": [list(pair) for pair in item.top]}
            for item in text.logprobs
        ]
    return result


def _file(kind: Kind) -> TextIO:
    return sys.stderr if kind == "reasoning" else sys.stdout


def _end_line(kind: Kind | None) -> None:
    if kind is None:
        return
    plain = PLAIN if kind == "reasoning" and sys.stderr.isatty() else ""
    print(plain, flush=True, file=_file(kind))
