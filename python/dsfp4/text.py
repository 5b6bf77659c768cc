"""Generated text: the whole with what is known of it, its pieces, and how ids become them."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal, cast

from dsfp4.stop import StopFinder
from dsfp4.thinking import Kind, ThinkingSplitter
from dsfp4.tokenizer import Tokenizer

if TYPE_CHECKING:
    from dsfp4 import _core

FinishReason = Literal["stop", "length", "cancelled"]


class Piece(str):
    """Some text of a stream. `kind` is "reasoning" or "answer"."""

    __slots__ = ("kind",)
    kind: Kind

    def __new__(cls, text: str, kind: Kind) -> "Piece":
        """Label `text`."""
        piece = super().__new__(cls, text)
        piece.kind = kind
        return piece

    def __reduce__(self) -> tuple[type["Piece"], tuple[str, Kind]]:
        """Copies and pickles are made by __new__, which wants both."""
        return type(self), (str(self), self.kind)


class Text(str):
    """An answer: a string, with what is known of it beside.

    `reasoning` are the model's thoughts before it, "" if none. `tokens` are the ids of both and of
    their tags, without the end token, but with those of a stop string that was found. Why it ended
    is `finish_reason`: "stop" (an end token or a stop string), "length" (max_tokens or the
    context's end) or "cancelled". `prompt_tokens` counts the prompt's; `prefill_seconds` and
    `decode_seconds` are the times for prompt and answer. `logprobs` has, where they were asked for,
    for each of `tokens` its `id`, `logprob` (natural) and `top`, the likeliest (id, logprob).
    """

    reasoning: str
    tokens: list[int]
    finish_reason: FinishReason
    prompt_tokens: int
    prefill_seconds: float
    decode_seconds: float
    logprobs: "list[_core.TokenLogprobs]"


class TextBuilder:
    """Turns ids into labelled pieces, as they come, until a stop string is found.

    `thinking` tells whether the prompt ended inside the model's thoughts; None leaves all as it is.
    Stop strings end the answer; in the thoughts they are ordinary text.
    """

    def __init__(self, tokenizer: Tokenizer, thinking: bool | None, stop: tuple[str, ...]) -> None:
        self._decoder = tokenizer.decoder()
        self._splitter = None if thinking is None else ThinkingSplitter(thinking)
        self._stop = StopFinder(stop)
        self._ids: list[int] = []
        self._texts: dict[Kind, list[str]] = {"reasoning": [], "answer": []}

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found; nothing comes after it."""
        return self._stop.found

    def push(self, id: int) -> list[Piece]:
        """Take the next id and return the pieces that it completes."""
        self._ids.append(id)
        return self._pieces(self._split(self._decoder.push(id)))

    def finish(self) -> list[Piece]:
        """Return the pieces that were held back."""
        parts = self._split(self._decoder.finish())
        if self._splitter is not None:
            parts += self._splitter.finish()
        pieces = self._pieces(parts)
        if rest := self._stop.finish():
            pieces.append(self._piece("answer", rest))
        return pieces

    def text(self, result: "_core.GenerationResult") -> Text:
        """Return the whole, once `result` is there and finish() was called."""
        text = Text("".join(self._texts["answer"]))
        text.reasoning = "".join(self._texts["reasoning"])
        text.tokens = self._ids
        text.finish_reason = "stop" if self.stopped else cast(FinishReason, result.finish_reason)
        text.prompt_tokens = result.prompt_tokens
        text.prefill_seconds = result.prefill_seconds
        text.decode_seconds = result.decode_seconds
        text.logprobs = list(result.logprobs)[: len(self._ids)]
        return text

    def _split(self, text: str) -> list[tuple[Kind, str]]:
        if self._splitter is None:
            return [("answer", text)]
        return list(self._splitter.push(text))

    def _pieces(self, parts: Iterable[tuple[Kind, str]]) -> list[Piece]:
        shown = (
            (kind, self._stop.push(text) if kind == "answer" else text) for kind, text in parts
        )
        return [self._piece(kind, text) for kind, text in shown if text]

    def _piece(self, kind: Kind, text: str) -> Piece:
        self._texts[kind].append(text)
        return Piece(text, kind)
