"""Values of a conversation that published templates treat in two ways, and that answer to both.

A call's arguments are added to a string by some templates and turned into JSON by others; content
that is None is compared with None by some and added to a string by others.
"""

from collections.abc import Mapping
from typing import Any

from dsfp4.template_fields import Field, joined


class Arguments(dict[str, Any]):
    """A call's arguments: a mapping, and its JSON `text` wherever a string is wanted."""

    def __init__(self, value: dict[str, Any], text: str, was_text: bool) -> None:
        super().__init__(value)
        self._text = Field(text)
        self.was_text = was_text

    def __str__(self) -> str:
        """Return the JSON."""
        return self._text

    def __add__(self, other: Any) -> str:
        """Join."""
        return self._text + other

    def __radd__(self, other: str) -> str:
        """Join."""
        return joined(str.__add__(other, self._text), other)


class NoText(Field):
    """Content that is None: empty where a string is wanted."""

    __hash__ = Field.__hash__

    def __eq__(self, other: object) -> bool:
        """Equal None, and as a string what is empty."""
        return other is None or str.__eq__(self, other) is True

    def __ne__(self, other: object) -> bool:
        """The opposite."""
        return not self == other


def is_none(value: object) -> bool:
    """Jinja's test `none`."""
    return value is None or isinstance(value, NoText)


def is_string(value: object) -> bool:
    """Jinja's test `string`; arguments are one where the caller gave one."""
    if isinstance(value, Arguments):
        return value.was_text
    return isinstance(value, str) and not isinstance(value, NoText)


def is_mapping(value: object) -> bool:
    """Jinja's test `mapping`."""
    if isinstance(value, Arguments):
        return not value.was_text
    return isinstance(value, Mapping)


def put_values(
    messages: list[dict[str, Any]], arguments: list[list[Any]], without_text: list[int]
) -> None:
    """Put Arguments and NoText into `messages`; what is where comes from dsfp4.messages."""
    for message, call, text, was_text in arguments:
        called = messages[message]["tool_calls"][call]
        function = called.get("function", called)
        function["arguments"] = Arguments(function["arguments"], text, was_text)
    for message in without_text:
        messages[message]["content"] = NoText("")
