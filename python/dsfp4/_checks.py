"""Checks of arguments, before the core sees them: each error is worded to name its parameter."""

import operator
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from dsfp4._arrays import parameter_error
from dsfp4.errors import ParameterError

__all__ = [
    "check_gigabytes",
    "check_integer",
    "check_integers",
    "check_quantization",
    "check_real",
    "check_text",
]

_LARGEST_FLOAT32 = float(np.finfo(np.float32).max)


def check_integers(
    parameter: str, values: npt.ArrayLike, shape: str = "[tokens]"
) -> npt.NDArray[np.int64]:
    """Return `values`, each from 0 to 2^31 - 1, as a contiguous array with the axes of `shape`.

    Raises ParameterError for anything else.
    """
    try:
        array = np.asarray(values)
    except (ValueError, OverflowError) as error:  # ragged, or wider than any integer type
        raise ParameterError(
            f"{parameter} must be integers {shape}: {error}", parameter=parameter
        ) from error
    is_integer = array.dtype.kind in "iu" or array.size == 0
    if array.ndim != shape.count(",") + 1 or not is_integer:
        raise ParameterError(
            f"{parameter} must be integers {shape}, not {array.dtype} {list(array.shape)}",
            parameter=parameter,
        )
    outside = (array < 0) | (array >= 2**31)
    if outside.any():
        raise ParameterError(
            f"{parameter} must be from 0 to 2^31 - 1, not {array[outside][0]}", parameter=parameter
        )
    return np.ascontiguousarray(array, dtype=np.int64)


def check_integer(parameter: str, value: Any, *, bits: int = 31) -> int:
    """Return `value` as an int from 0 to 2^bits - 1. Raises ParameterError for anything else."""
    try:  # truth values are no integers here, though Python and NumPy before 2.3 let them be
        integer = -1 if isinstance(value, bool | np.bool_) else operator.index(value)
    except TypeError:
        integer = -1
    if not 0 <= integer < 2**bits:
        raise ParameterError(
            f"{parameter} must be an integer from 0 to 2^{bits} - 1, not {value!r}",
            parameter=parameter,
        )
    return integer


def check_real(parameter: str, value: Any, *, float32: bool = False) -> float:
    """Return `value` as a float; its range is the engine's to check. Raises ParameterError.

    With `float32`, it must also be finite and fit.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, np.floating, np.integer)):
        raise ParameterError(f"{parameter} must be a number, not {value!r}", parameter=parameter)
    try:
        real = float(value)
    except OverflowError as error:
        raise ParameterError(
            f"{parameter} is out of range: {error}", parameter=parameter
        ) from error
    if float32 and not -_LARGEST_FLOAT32 <= real <= _LARGEST_FLOAT32:
        raise ParameterError(
            f"{parameter} must be finite and fit in a float32, not {value!r}", parameter=parameter
        )
    return real


def check_gigabytes(parameter: str, value: Any) -> int:
    """Return `value` GB (10^9 bytes) as bytes, at least 1; None, for no value, is 0.

    Raises ParameterError for anything else.
    """
    if value is None:
        return 0
    size = check_real(parameter, value) * 1e9
    if not 1.0 <= size < 2.0**63:  # also false for NaN
        raise ParameterError(
            f"{parameter} must be over 0 GB and below 2^63 bytes, not {value!r}",
            parameter=parameter,
        )
    return int(size)


def check_text(parameter: str, value: Any) -> str:
    """Return `value`, a string. Raises ParameterError for anything else."""
    if not isinstance(value, str):
        raise ParameterError(f"{parameter} must be a string, not {value!r}", parameter=parameter)
    return value


def check_quantization(quantization: str | Mapping[str, str]) -> dict[str, str] | None:
    """Return the roles' formats, None for "auto". Raises ParameterError for what is neither."""
    if quantization == "auto":
        return None
    if quantization == "keep":
        return {}
    if isinstance(quantization, Mapping):
        items = dict(quantization)
        if all(isinstance(text, str) for item in items.items() for text in item):
            return items
    raise parameter_error(
        "quantization", f"must be auto, keep or map roles to formats, not be {quantization!r}"
    )
