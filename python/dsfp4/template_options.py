"""Variables of a chat template that a caller may set, and the switch of thoughts among them."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from dsfp4.errors import ParameterError
from dsfp4.messages import json_copy

# The names that published templates have for the switch, and their values for off and on.
_SWITCHES: dict[str, tuple[Any, Any]] = {
    "thinking": (False, True),
    "enable_thinking": (False, True),
    "thinking_mode": ("chat", "thinking"),
}
_OWN = (
    *("messages", "tools", "documents", "bos_token", "eos_token"),
    *("add_generation_prompt", "raise_exception", "strftime_now", "namespace"),
)


@dataclass(frozen=True)
class Switch:
    """The switch of thoughts: the template's `variables` for it, and what is `wanted` of it."""

    wanted: bool | None
    variables: dict[str, Any]

    def check(self, thinking: bool) -> None:
        """Raise ParameterError if the prompt is not as wanted, and there was nothing to switch."""
        if self.wanted not in (None, thinking) and not self.variables:
            raise ParameterError(
                f"this checkpoint's chat template cannot switch thoughts to {self.wanted}; leave "
                "thinking at None",
                parameter="thinking",
            )


def check_options(options: Mapping[str, Any] | None, variables: Collection[str]) -> dict[str, Any]:
    """Return `options` as JSON. Raises ParameterError for one that no template knows.

    `variables` are those that the template reads; the switch of thoughts has all its names.
    """
    if options is None:
        return {}
    if not isinstance(options, Mapping):
        raise ParameterError(
            f"template_options must be a mapping, not {type(options).__name__}",
            parameter="template_options",
        )
    known = sorted(set(variables) - set(_OWN))
    for name in options:
        if name in _OWN or (name not in known and name not in _SWITCHES):
            has = f"; it has {', '.join(known)}" if known else ", and has none to set"
            raise ParameterError(
                f"this checkpoint's chat template has no option {name!r:.100}{has}",
                parameter=f"template_options[{name!r:.100}]",
            )
    plain: dict[str, Any] = json_copy(options, "template_options")
    return plain


def switch_thinking(
    thinking: bool | None, options: dict[str, Any], variables: Collection[str]
) -> Switch:
    """Return the switch that `thinking` or `options` ask for, and take it out of `options`.

    An option stays there where the template itself has it: its value is the template's to know.
    Raises ParameterError for another kind of value, and where two contradict each other.
    """
    if thinking is not None and not isinstance(thinking, bool):
        raise ParameterError(
            f"thinking must be True, False or None, not {thinking!r:.100}", parameter="thinking"
        )
    wanted = thinking
    own = [name for name in _SWITCHES if name in variables]
    given = [name for name in _SWITCHES if name in options]
    for name in given:
        off_on = _SWITCHES[name]
        value = options[name]
        known = next((bool(i) for i, each in enumerate(off_on) if each == value), None)
        if known is None and name not in own:
            raise ParameterError(
                f"template_options[{name!r}] must be {off_on[0]!r} or {off_on[1]!r}, not "
                f"{value!r:.100}",
                parameter=f"template_options[{name!r}]",
            )
        if known is not None and wanted not in (None, known):
            raise ParameterError(
                f"template_options[{name!r}] contradicts another switch of thoughts",
                parameter=f"template_options[{name!r}]",
            )
        wanted = known if wanted is None else wanted
        if name not in own:
            del options[name]
    values = {
        name: _SWITCHES[name][wanted] for name in own if name not in options and wanted is not None
    }
    return Switch(wanted, values)
