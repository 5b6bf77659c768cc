"""Separates a model's thoughts from its answer, as the text arrives."""

from collections.abc import Iterator
from typing import Literal

from dsfp4.tokenizer import THINK_END, THINK_START

Kind = Literal["reasoning", "answer"]


def held_back(text: str, *, strings: tuple[str, ...]) -> int:
    """Return how many characters at the end of `text` may be the beginning of one of `strings`."""
    longest = max(map(len, strings), default=1) - 1
    return next(
        (
            length
            for length in range(min(longest, len(text)), 0, -1)
            if any(len(string) > length and string.startswith(text[-length:]) for string in strings)
        ),
        0,
    )


class ThinkingSplitter:
    """Labels generated text as "reasoning" or "answer"; the tags may be cut anywhere.

    `thinking` tells whether the prompt ended inside the thoughts. Elsewise they begin with <think>,
    if that is the first thing written. They end at the first </think>, or never; without thoughts
    it is text. White space around them is dropped. With `continued` the prompt ended inside a text,
    so nothing is dropped at the beginning, and an answer has no thoughts before it.
    """

    def __init__(self, thinking: bool, continued: bool = False) -> None:
        self._state: Literal["undecided", "reasoning", "answer"] = (
            "reasoning" if thinking else "answer" if continued else "undecided"
        )
        self._at_start = (
            thinking and not continued
        )  # white space is dropped until something else comes
        self._held = ""

    def push(self, text: str) -> Iterator[tuple[Kind, str]]:
        """Yield what `text` makes certain."""
        self._held += text
        if self._state == "undecided":
            begin = self._held.lstrip()
            if begin.startswith(THINK_START):
                self._enter("reasoning", begin[len(THINK_START) :])
            elif not THINK_START.startswith(begin):
                self._state = "answer"
        if self._state == "reasoning":
            yield from self._reason()
        if self._state == "answer":
            yield from self._take("answer", len(self._held))

    def finish(self) -> Iterator[tuple[Kind, str]]:
        """Yield what was held back, at the end of the text."""
        if self._state == "reasoning":
            self._held = self._held.rstrip()
            yield from self._take("reasoning", len(self._held))
        else:
            yield from self._take("answer", len(self._held))

    def _enter(self, state: Kind, rest: str) -> None:
        self._state, self._held, self._at_start = state, rest, True

    def _reason(self) -> Iterator[tuple[Kind, str]]:
        thoughts, end, rest = self._held.partition(THINK_END)
        kept = len(thoughts) - (0 if end else held_back(thoughts, strings=(THINK_END,)))
        yield from self._take("reasoning", len(thoughts[:kept].rstrip()))
        if end:
            self._enter("answer", rest)

    def _take(self, kind: Kind, count: int) -> Iterator[tuple[Kind, str]]:
        text, self._held = self._held[:count], self._held[count:]
        if self._at_start:
            text = text.lstrip()
        if text:
            self._at_start = False
            yield kind, text
