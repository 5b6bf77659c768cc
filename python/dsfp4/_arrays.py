"""Arrays at the border to the core: DLPack or NumPy in, NumPy out, copied only where needed."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsfp4.errors import ParameterError

__all__ = ["as_input", "as_output", "parameter_error"]


def parameter_error(name: str, problem: str) -> ParameterError:
    """The error of an argument, worded as the core words its own."""
    return ParameterError(f"parameter '{name}': {problem}", parameter=name)


def as_input(values: Any, dtype: type[np.generic], name: str = "values") -> NDArray[Any]:
    """`values` as a C-contiguous NumPy array of `dtype`; a copy only where that needs one.

    Numbers may be narrowed (float64 to float32), but never change kind or wrap: raises
    ParameterError, naming `name`, for that and for tensors that are not in CPU memory.
    """
    if not isinstance(values, np.ndarray) and hasattr(values, "__dlpack__"):
        try:
            values = np.from_dlpack(values)
        except (BufferError, RuntimeError, TypeError) as error:
            raise parameter_error(name, f"cannot be read through DLPack: {error}") from error
    try:
        array = np.asarray(values)
    except (ValueError, OverflowError, TypeError) as error:  # ragged, or not to be converted
        raise parameter_error(name, f"must hold {np.dtype(dtype)} values: {error}") from error
    if array.dtype != dtype and array.size > 0:
        _check_conversion(array, dtype, name)
    return np.asarray(array, dtype=dtype, order="C")


def _check_conversion(array: NDArray[Any], dtype: type[np.generic], name: str) -> None:
    wanted = np.dtype(dtype)
    if wanted.kind not in "iu":
        if not np.can_cast(array.dtype, wanted, "same_kind"):
            raise parameter_error(name, f"must hold {wanted} values, not {array.dtype}")
        return
    if array.dtype.kind not in "biu":
        raise parameter_error(name, f"must hold {wanted} values, not {array.dtype}")
    low, high = int(array.min()), int(array.max())
    limits = np.iinfo(wanted)
    if low < limits.min or high > limits.max:
        wrong = low if low < limits.min else high
        raise parameter_error(name, f"must hold {wanted} values, and {wrong} is not one")


def as_output(array: Any) -> NDArray[Any]:
    """The core's array as a NumPy array over the same memory."""
    return np.asarray(array)
