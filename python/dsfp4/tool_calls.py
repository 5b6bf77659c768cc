"""Tool calls that R1, V3 and V3.1 write into an answer, apart from its text, as it arrives.

V3.1 writes a call as its name, a separator and the arguments; R1, V2.5 and V3 write the type, a
separator, the name, a line break and the arguments in a fence. Calls stand in a block, which R1
sometimes does not open.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dsfp4.thinking import held_back
from dsfp4.tokenizer import CALL_BEGIN, CALL_END, CALL_SEPARATOR, CALLS_BEGIN, CALLS_END

_ENDS = (CALL_END, CALLS_END, CALL_BEGIN, CALLS_BEGIN)
_LONGEST_NAME = 256  # characters, with all that is before and behind it
_FENCE = "```"
_OPEN_FENCE = re.compile(r"```[A-Za-z]*\s*")


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool: its `name` and `arguments`, which are JSON unless the model erred.

    Where the text ended within the arguments, they are as far as they came.
    """

    name: str
    arguments: str

    def as_message(self) -> dict[str, Any]:
        """Return it as an entry of an assistant message's `tool_calls`."""
        return {
            "type": "function",
            "function": {"name": self.name, "arguments": self.arguments},
        }


@dataclass(frozen=True)
class Part:
    """Some text of an answer, or, where `index` is 0 or more, of that call's arguments.

    The first part of a call has no text: it tells the name.
    """

    text: str
    index: int = -1
    name: str = ""


class ToolCallSplitter:
    """Takes an answer's text, cut anywhere, and yields its parts, each as soon as it is certain.

    What begins like a call and has no name is text of the answer, as it was written.
    """

    def __init__(self) -> None:
        self._held = ""
        self._state = self._text
        self._ended = False
        self._written = ""  # of a call whose name is not known yet
        self._before = ""  # its separator
        self._index, self._name = -1, ""
        self._fenced: bool | None = None  # None: the arguments have not begun

    def push(self, text: str) -> Iterator[Part]:
        """Yield what `text` makes certain."""
        self._held += text
        while (part := self._state()) is not None:
            if part.text or part.name:
                yield part

    def finish(self) -> Iterator[Part]:
        """Yield what was held back, at the end of the text."""
        self._ended = True
        yield from self.push("")

    # Each state takes some of what is held and returns a part, perhaps empty; None if it needs
    # more, or nothing is left. At the end of the text, nothing more comes.

    def _text(self) -> Part | None:
        at, mark = _first(self._held, (CALLS_BEGIN, CALL_BEGIN))
        if mark:
            part = Part(self._take(at))
            self._written = self._take(len(mark))
            self._state = self._block if mark == CALLS_BEGIN else self._head
            return part
        kept = 0 if self._ended else held_back(self._held, strings=(CALLS_BEGIN, CALL_BEGIN))
        return Part(self._take(len(self._held) - kept)) if len(self._held) > kept else None

    def _block(self) -> Part | None:
        """Behind the beginning of a block, where a call must be."""
        rest = self._held.lstrip()
        if rest.startswith(CALL_BEGIN):
            self._written += self._take(len(self._held) - len(rest) + len(CALL_BEGIN))
            self._state = self._head
            return Part("")
        return None if self._waits(rest, (CALL_BEGIN,)) else self._as_written()

    def _head(self) -> Part | None:
        """Before the separator."""
        marks = (CALL_SEPARATOR, *_ENDS)
        at, mark = _first(self._held, marks)
        if mark == CALL_SEPARATOR and at <= _LONGEST_NAME:
            self._before = self._take(at)
            self._written += self._before + self._take(len(mark))
            self._state = self._behind_separator
            return Part("")
        return None if not mark and self._may_be_a_name(marks) else self._as_written()

    def _behind_separator(self) -> Part | None:
        """Where either the arguments or the name is."""
        rest = self._held.lstrip()
        if self._waits(rest, (_FENCE, *_ENDS)):
            return None
        before = self._before.strip()
        if rest.startswith(("{", "[", '"', _FENCE)) or (
            rest.startswith(_ENDS) and before != "function"
        ):
            return self._begin(before, 0)
        marks = ("\n", _FENCE, "{", *_ENDS)
        at, mark = _first(rest, marks)
        at += len(self._held) - len(rest)
        if mark and at <= _LONGEST_NAME:
            if before != "function" and mark not in ("\n", _FENCE):
                return self._begin(before, 0)  # arguments that are no JSON
            return self._begin(self._held[:at].strip(), at)
        return None if not mark and self._may_be_a_name(marks) else self._as_written()

    def _begin(self, name: str, behind: int) -> Part:
        """Begin a call; the name ends `behind` so many characters."""
        if not name:
            return self._as_written()
        self._take(behind)
        self._index, self._name, self._written = self._index + 1, name, ""
        self._fenced = None
        self._state = self._arguments
        return Part("", self._index, name)

    def _arguments(self) -> Part | None:
        if self._fenced is None:
            rest = self._held.lstrip()
            fence = _OPEN_FENCE.match(rest)
            if self._waits(rest, (_FENCE,)) or (
                fence and fence.end() == len(rest) and not self._ended
            ):
                return None
            self._fenced = fence is not None
            self._held = rest[fence.end() :] if fence else rest
        at, mark = _first(self._held, _ENDS)
        if mark or self._ended:
            whole = self._take(at)
            self._take(len(mark) if mark == CALL_END else 0)
            self._state = self._between if mark else self._text
            return self._argument(whole[: self._certain(whole)])
        kept = held_back(self._held, strings=_ENDS)
        certain = self._certain(self._held[: len(self._held) - kept])
        return self._argument(self._take(certain)) if certain else None

    def _argument(self, text: str) -> Part:
        return Part(text, self._index, self._name if text else "")

    def _certain(self, text: str) -> int:
        """Return how many characters come before what may be the fence's end, or its blanks."""
        text = text.rstrip()
        if self._fenced:
            for _ in _FENCE:
                text = text.removesuffix("`")
        return len(text.rstrip())

    def _between(self) -> Part | None:
        """Behind a call."""
        rest = self._held.lstrip()
        if self._waits(rest, (CALL_BEGIN, CALLS_BEGIN, CALLS_END)):
            return None
        if rest.startswith((CALL_BEGIN, CALLS_END)):
            self._held = rest
            begins = rest.startswith(CALL_BEGIN)
            self._written = self._take(len(CALL_BEGIN if begins else CALLS_END))
            self._state = self._head if begins else self._text
        else:
            self._held = self._held if rest else ""
            self._state = self._text
        return Part("")

    def _as_written(self) -> Part:
        """Give up on a call: what was taken for its beginning is text."""
        text, self._written, self._state = self._written, "", self._text
        return Part(text)

    def _waits(self, rest: str, strings: tuple[str, ...]) -> bool:
        """Tell whether `rest` may still become one of `strings`."""
        return not self._ended and any(
            len(rest) < len(string) and string.startswith(rest) for string in strings
        )

    def _may_be_a_name(self, marks: tuple[str, ...]) -> bool:
        """Tell whether one of `marks` may still come soon enough."""
        whole = len(self._held) - held_back(self._held, strings=marks)
        return not self._ended and whole <= _LONGEST_NAME

    def _take(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        return text


def _first(text: str, strings: tuple[str, ...]) -> tuple[int, str]:
    """Return where the first of `strings` is in `text`, and which; the end and "" if none is."""
    found = [(at, string) for string in strings if (at := text.find(string)) >= 0]
    return min(found, default=(len(text), ""))
