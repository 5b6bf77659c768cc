"""Generated text: the whole with what is known of it, its pieces, and how ids become them."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, cast

from dsfp4.stop import StopFinder
from dsfp4.thinking import Kind as Thinking
from dsfp4.thinking import ThinkingSplitter
from dsfp4.tokenizer import Tokenizer
from dsfp4.tool_calls import Part, ToolCall, ToolCallSplitter

if TYPE_CHECKING:
    from dsfp4 import _core

FinishReason = Literal["stop", "length", "cancelled"]
Kind = Literal["reasoning", "answer", "tool_call"]


class Piece(str):
    """Some text of a stream. `kind` is "reasoning", "answer" or "tool_call".

    A piece of a tool call is a part of its arguments; `call` is its number, from 0, and `name` the
    tool's. Its first piece is empty, to tell the name at once. Elsewhere they are -1 and "".
    """

    __slots__ = ("call", "kind", "name")
    kind: Kind
    call: int
    name: str

    def __new__(cls, text: str, kind: Kind, call: int = -1, name: str = "") -> "Piece":
        """Label `text`."""
        piece = super().__new__(cls, text)
        piece.kind, piece.call, piece.name = kind, call, name
        return piece

    def __reduce__(self) -> tuple[type["Piece"], tuple[str, Kind, int, str]]:
        """Copies and pickles are made by __new__, which wants all."""
        return type(self), (str(self), self.kind, self.call, self.name)


class Text(str):
    """An answer: a string, with what is known of it beside.

    `reasoning` are the model's thoughts before it, "" if none; `tool_calls` are those it made, in
    order. `tokens` are the ids of all and of their tags, without the end token, but with those of a
    stop string that was found. Why it ended
    is `finish_reason`: "stop" (an end token or a stop string), "length" (max_tokens or the
    context's end) or "cancelled". `prompt_tokens` counts the prompt's; `prefill_seconds` and
    `decode_seconds` are the times for prompt and answer. `logprobs` has, where they were asked for,
    for each of `tokens` its `id`, `logprob` (natural) and `top`, the likeliest (id, logprob).
    """

    reasoning: str
    tool_calls: list[ToolCall]
    tokens: list[int]
    finish_reason: FinishReason
    prompt_tokens: int
    prefill_seconds: float
    decode_seconds: float
    logprobs: "list[_core.TokenLogprobs]"

    def as_message(self) -> dict[str, Any]:
        """Return the assistant's message for the next turn of the conversation."""
        message: dict[str, Any] = {"role": "assistant", "content": str(self)}
        if self.tool_calls:
            calls = [call.as_message() for call in self.tool_calls]
            message |= {"content": str(self) or None, "tool_calls": calls}
        return message


class TextBuilder:
    """Turns ids into labelled pieces, as they come, until a stop string is found.

    `thinking` tells whether the prompt ended inside the model's thoughts; None leaves all as it is.
    `continued` tells whether it ended inside a text. Stop strings end the answer; in thoughts and
    tool calls they are ordinary text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        thinking: bool | None,
        stop: tuple[str, ...],
        continued: bool = False,
    ) -> None:
        self._decoder = tokenizer.decoder()
        self._splitter = None if thinking is None else ThinkingSplitter(thinking, continued)
        self._calls = ToolCallSplitter()
        self._stop = StopFinder(stop)
        self._ids: list[int] = []
        self._texts: dict[Thinking, list[str]] = {"reasoning": [], "answer": []}
        self._called: list[tuple[str, list[str]]] = []  # names and parts of arguments

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found; nothing comes after it."""
        return self._stop.found

    def push(self, id: int) -> list[Piece]:
        """Take the next id and return the pieces that it completes."""
        self._ids.append(id)
        return self._pieces(self._decoder.push(id))

    def finish(self) -> list[Piece]:
        """Return the pieces that were held back."""
        pieces = self._pieces(self._decoder.finish())
        if self._splitter is not None:
            pieces += self._labelled(self._splitter.finish())
            pieces += self._answer(self._calls.finish())
        return pieces + self._said("answer", self._stop.finish())

    def text(self, result: "_core.GenerationResult") -> Text:
        """Return the whole, once `result` is there and finish() was called."""
        text = Text("".join(self._texts["answer"]))
        text.reasoning = "".join(self._texts["reasoning"])
        text.tool_calls = [ToolCall(name, "".join(parts)) for name, parts in self._called]
        text.tokens = self._ids
        text.finish_reason = "stop" if self.stopped else cast(FinishReason, result.finish_reason)
        text.prompt_tokens = result.prompt_tokens
        text.prefill_seconds = result.prefill_seconds
        text.decode_seconds = result.decode_seconds
        text.logprobs = list(result.logprobs)[: len(self._ids)]
        return text

    def _pieces(self, text: str) -> list[Piece]:
        if self._splitter is None:
            return self._said("answer", self._stop.push(text))
        return self._labelled(self._splitter.push(text))

    def _labelled(self, parts: Iterable[tuple[Thinking, str]]) -> list[Piece]:
        pieces: list[Piece] = []
        for kind, text in parts:
            if kind == "answer":
                pieces += self._answer(self._calls.push(text))
            else:
                pieces += self._said(kind, text)
        return pieces

    def _answer(self, parts: Iterable[Part]) -> list[Piece]:
        pieces: list[Piece] = []
        for part in parts:
            if self._stop.found:
                break
            if part.index < 0:
                pieces += self._said("answer", self._stop.push(part.text))
                continue
            pieces += self._said("answer", self._stop.finish())  # none goes on behind a call
            if part.index == len(self._called):
                self._called.append((part.name, []))
            self._called[part.index][1].append(part.text)
            pieces.append(Piece(part.text, "tool_call", part.index, part.name))
        return pieces

    def _said(self, kind: Thinking, text: str) -> list[Piece]:
        if not text:
            return []
        self._texts[kind].append(text)
        return [Piece(text, kind)]
