"""Stop strings: they end a text, and no part of one is ever shown."""

from collections.abc import Sequence

from dsfp4.errors import ParameterError
from dsfp4.thinking import held_back


def check_stop(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return the stop strings that `stop` means. Raises ParameterError."""
    strings = (stop,) if isinstance(stop, str) else () if stop is None else stop
    if not isinstance(strings, Sequence) or not all(
        isinstance(string, str) and string for string in strings
    ):
        raise ParameterError(
            f"stop must be a string or a list of strings, none of them empty, not {stop!r:.200}",
            parameter="stop",
        )
    return tuple(strings)


class StopFinder:
    """Passes a text on up to the stop string that is complete first; of several, the longest."""

    def __init__(self, strings: tuple[str, ...]) -> None:
        self._strings = strings
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """Return what can be shown now; nothing more once `found` is set."""
        if self.found:
            return ""
        text = self._held + text
        hits = [
            (start + len(string), start)
            for string in self._strings
            if (start := text.find(string)) >= 0
        ]
        if hits:
            self.found = True
            self._held = ""
            return text[: min(hits)[1]]
        shown = len(text) - held_back(text, strings=self._strings)
        self._held = text[shown:]
        return text[:shown]

    def finish(self) -> str:
        """Return what was held back, at the end of the text."""
        text, self._held = self._held, ""
        return text
