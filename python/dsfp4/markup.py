"""Keeps a caller's text from turning into a chat template's markup.

Markup is what tokenizer.json calls added tokens: where their text occurs in a prompt, they become
one id. Before a conversation is rendered, each character that begins or ends an added token is
replaced in it by a private-use character that occurs nowhere else. Then no added token can lie in a
caller's text, reach into it or reach out of it, whatever the template joins or cuts. The rendered
prompt is split at its added tokens, which are the template's own; what lies between gets its usual
spelling back and is encoded as plain text.
"""

import secrets
from collections.abc import Iterable
from typing import Any

from dsfp4.errors import ParameterError

_PRIVATE = range(0xF0000, 0xFFFFE)  # plane 15
_FIRST = chr(_PRIVATE.start)


class Disguise:
    """The private spelling for one conversation. `markup` are the texts of the added tokens.

    `mark` is one more character that occurs nowhere, to find a place again.
    """

    def __init__(self, markup: Iterable[str], conversation: Any, template: str) -> None:
        tokens = [token for token in markup if token]
        texts = list(_texts(conversation))
        edges = sorted({token[0] for token in tokens} | {token[-1] for token in tokens})
        # A text that lies in a token's middle is disguised as a whole.
        self._middles = "\0".join(token[1:-1] for token in tokens)
        inner = sorted({c for text in texts if text in self._middles for c in text})
        self.mark, *private = _unused(1 + len(edges) + len(inner), [*texts, template, *tokens])
        self.characters = dict(zip(edges, private, strict=False))
        self._inner = dict(zip(inner, private[len(edges) :], strict=True))
        self._hide = str.maketrans(self.characters)
        self._hide_all = str.maketrans(self.characters | self._inner)
        plain = (self.characters | self._inner).items()
        self._show = {ord(stand_in): character for character, stand_in in plain}

    def hide(self, value: Any) -> Any:
        """Return JSON `value` with all strings disguised, keys too."""
        if isinstance(value, str):
            return value.translate(self._hide_all if value in self._middles else self._hide)
        if isinstance(value, list):
            return [self.hide(item) for item in value]
        if isinstance(value, dict):
            return {key.translate(self._hide): self.hide(item) for key, item in value.items()}
        return value

    def show(self, text: str) -> str:
        """Return `text` in its usual spelling."""
        return text.translate(self._show)


def _texts(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        if isinstance(value, dict):
            yield from value.keys()
            value = value.values()
        for item in value:
            yield from _texts(item)


def _unused(count: int, texts: list[str]) -> list[str]:
    """Choose private characters at random that none of `texts` has."""
    used = {ord(character) for text in texts for character in set(text) if character >= _FIRST}
    free = [code for code in _PRIVATE if code not in used] if used else _PRIVATE
    if len(free) < count:
        raise ParameterError(
            "the messages use nearly every private-use character; remove some",
            parameter="messages",
        )
    start = secrets.randbelow(len(free) - count + 1)
    return [chr(code) for code in free[start : start + count]]
