"""Text of a caller inside a template: markup in it is disguised, but the template does not notice.

The disguise replaces single characters one for one (markup.py says which), so a template that
compares, searches or cuts a text gets what it would get without, once its own literals are put in
the same spelling.
"""

from collections.abc import Iterator
from typing import Any

# The methods of str whose arguments are the template's literals.
_SEARCHES = (
    "__contains__ __eq__ __ne__ count endswith find index lstrip partition removeprefix "
    "removesuffix rfind rindex rpartition rsplit rstrip split startswith strip"
)

_SPELLING: dict[int, str] = {}
_PLAIN: dict[int, str] = {}


def set_disguise(disguise: dict[str, str]) -> None:
    """Set the disguise of the texts to come: characters and what stands for them."""
    _SPELLING.clear()
    _SPELLING.update({ord(plain): private for plain, private in disguise.items()})
    _PLAIN.clear()
    _PLAIN.update({ord(private): plain for plain, private in disguise.items()})


class Field(str):
    """A disguised text, also after cutting. Joined with a template's markup it is a plain str."""

    __hash__ = str.__hash__

    def __str__(self) -> "Field":
        """Stay a Field where a filter asks for a string."""
        return self

    def __repr__(self) -> str:
        """Quote, as for a list of them."""
        return str.__repr__(self.translate(_PLAIN)).translate(_SPELLING)

    def __getitem__(self, key: Any) -> "Field":
        """Cut."""
        return Field(super().__getitem__(key))

    def __iter__(self) -> Iterator["Field"]:
        """Yield characters that are Fields."""
        return map(Field, super().__iter__())

    def __add__(self, other: str) -> str:
        """Join; what is no string may know how to be added to one."""
        if not isinstance(other, str):
            return NotImplemented
        return joined(super().__add__(other), other)

    def __radd__(self, other: str) -> str:
        """Join."""
        return joined(str.__add__(other, self), other)

    def replace(self, old: Any, new: str, count: Any = -1) -> str:
        """Replace; what the template puts in stays its own."""
        return joined(super().replace(_spelt(old), new, count), new)


def _searching(name: str) -> Any:
    plain = getattr(str, name)

    def method(self: Field, *arguments: Any, **options: Any) -> Any:
        return _as_fields(plain(self, *map(_spelt, arguments), **options))

    method.__name__ = name
    return method


for _name in _SEARCHES.split():
    setattr(Field, _name, _searching(_name))


def joined(whole: str, other: str) -> str:
    """Return `whole`, a Field joined with `other`: a Field, unless `other` has markup in it."""
    return Field(whole) if isinstance(other, Field) or _spelt(other) == other else whole


def _spelt(value: Any) -> Any:
    if type(value) is str:
        return value.translate(_SPELLING)
    return tuple(map(_spelt, value)) if type(value) is tuple else value


def _as_fields(value: Any) -> Any:
    if type(value) is str:
        return Field(value)
    return type(value)(map(_as_fields, value)) if isinstance(value, (list, tuple)) else value


def as_fields(conversation: Any) -> Any:
    """Return JSON `conversation` with a Field for each string but the roles."""
    if isinstance(conversation, str):
        return Field(conversation)
    if isinstance(conversation, list):
        return [as_fields(item) for item in conversation]
    if isinstance(conversation, dict):
        return {
            Field(key): value if key == "role" and isinstance(value, str) else as_fields(value)
            for key, value in conversation.items()
        }
    return conversation


def escape_non_ascii(json_text: str) -> str:
    r"""Return JSON with \u escapes, but let disguised ASCII characters be."""

    def escaped(character: str) -> str:
        original = _PLAIN.get(ord(character), character)
        if original.isascii():
            return character
        units = original.encode("utf-16-be").hex()
        return "".join(f"\\u{units[i : i + 4]}" for i in range(0, len(units), 4))

    return "".join(map(escaped, json_text))
