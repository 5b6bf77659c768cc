"""How the next token is chosen, and what a checkpoint recommends."""

from dataclasses import dataclass
from pathlib import Path

from dsfp4.errors import CheckpointError
from dsfp4.jsonfile import read_optional_json


@dataclass(frozen=True)
class Sampling:
    """`temperature` 0 takes the likeliest token; `top_k` 0 and `top_p` 1 are off."""

    temperature: float = 0.7
    top_k: int = 0
    top_p: float = 1.0


def recommended_sampling(folder: Path) -> Sampling:
    """Read generation_config.json in `folder`; what it does not say is Sampling's default.

    Raises CheckpointError for a value of the wrong type or out of range.
    """
    path = folder / "generation_config.json"
    config = read_optional_json(path)

    def number(field: str, default: float, low: float, high: float) -> float:
        value = config.get(field)
        if value is None:
            return default
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not low <= value <= high
        ):
            raise CheckpointError(
                f"{field} in '{path}' must be a number from {low:g} to {high:g}, not {value!r}",
                file=str(path),
                tensor=field,
            )
        return value

    default = Sampling()
    temperature = number("temperature", default.temperature, 0, 100)
    return Sampling(
        temperature=0.0 if config.get("do_sample") is False else temperature,
        top_k=int(number("top_k", default.top_k, 0, 2**31 - 1)),
        top_p=number("top_p", default.top_p, 0, 1),
    )
