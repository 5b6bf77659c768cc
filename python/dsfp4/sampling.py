"""How the next token is chosen, and what a checkpoint recommends."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dsfp4.errors import CheckpointError
from dsfp4.jsonfile import read_optional_json

_MOST_TOP_K = 2**31 - 1


@dataclass(frozen=True)
class Sampling:
    """`temperature` 0 takes the likeliest token; `top_k` 0 and `top_p` 1 are off."""

    temperature: float = 0.7
    top_k: int = 0
    top_p: float = 1.0

    def describe(self) -> str:
        """Return one line of words: "temperature 0.6, top_k off, top_p 0.95"."""
        if self.temperature == 0:
            return "the likeliest token (temperature 0)"
        top_k = self.top_k or "off"
        top_p = "off" if self.top_p == 1 else f"{self.top_p:g}"
        return f"temperature {self.temperature:g}, top_k {top_k}, top_p {top_p}"


def recommended_sampling(folder: Path) -> Sampling:
    """Read generation_config.json in `folder`; what it does not say is Sampling's default.

    Raises CheckpointError for a value of the wrong type, or one that generate() would refuse.
    """
    path = folder / "generation_config.json"
    config = read_optional_json(path)

    def number(field: str, default: float, words: str, sound: Callable[[float], bool]) -> float:
        value = config.get(field)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not sound(value):
            raise CheckpointError(
                f"{field} in '{path}' must be {words}, not {value!r}", file=str(path), tensor=field
            )
        return value

    default = Sampling()
    temperature = number(
        "temperature", default.temperature, "a number from 0 to 100", lambda x: 0 <= x <= 100
    )
    top_k = number(
        "top_k",
        default.top_k,
        f"an integer from 0 (off) to {_MOST_TOP_K}",
        lambda x: 0 <= x <= _MOST_TOP_K and x == int(x),
    )
    return Sampling(
        temperature=0.0 if config.get("do_sample") is False else temperature,
        top_k=int(top_k),
        top_p=number("top_p", default.top_p, "a number over 0, to 1 (off)", lambda x: 0 < x <= 1),
    )
