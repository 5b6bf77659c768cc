"""Single operations on tensors that lie on an NVIDIA GPU, DLPack in and out, nothing copied.

For tests and experiments. A tensor is anything with ``__dlpack__`` on GPU 0 (of PyTorch, CuPy, ..),
float32, C-contiguous and two-dimensional, [tokens, width]. Results have ``__dlpack__``, too, so
``torch.from_dlpack(y)`` and ``cupy.from_dlpack(y)`` read them where they are. Neither library is
needed: `array` and `numpy` copy from and to NumPy arrays.

All raise ParameterError for tensors that are none of that, and CudaError where there is no GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsfp4 import _core
from dsfp4._arrays import as_input, as_output, parameter_error
from dsfp4._checks import check_real
from dsfp4.ops.layers import Weight

__all__ = ["array", "linear", "moe", "numpy", "place", "rms_norm", "silu_mul"]

_INDEX = 0
_KIND = 2  # kDLCUDA


@lru_cache(maxsize=1)
def _ops() -> Any:
    return _core.CudaOps(_INDEX)


def _capsule(tensor: Any, name: str) -> Any:
    """The tensor's memory, once what writes it is ordered before what `_ops` queues."""
    stream = _ops().stream
    if not hasattr(tensor, "__dlpack__") or not hasattr(tensor, "__dlpack_device__"):
        raise parameter_error(name, f"must be a tensor with DLPack, not {type(tensor).__name__}")
    kind, index = tensor.__dlpack_device__()
    if (int(kind), int(index)) != (_KIND, _INDEX):
        raise parameter_error(
            name, f"lies on DLPack device {int(kind)}:{int(index)}, not on GPU {_INDEX}"
        )
    try:
        return tensor.__dlpack__(stream=stream)
    except (BufferError, RuntimeError, TypeError) as error:
        raise parameter_error(name, f"cannot be read through DLPack: {error}") from error


def _run(op: Any, names: str, *arguments: Any) -> Any:
    """The core refuses other element types, strides and dimensions as arguments of a wrong type."""
    try:
        return op(*arguments)
    except TypeError as error:
        raise parameter_error(names, "must be C-contiguous float32 on the GPU") from error


def array(values: Any) -> Any:
    """A copy of a float32 NumPy array [rows, cols] on the GPU."""
    return _ops().upload(as_input(values, np.float32, "values"))


def numpy(tensor: Any) -> NDArray[np.float32]:
    """A copy of a tensor as a NumPy array."""
    return as_output(_run(_ops().download, "tensor", _capsule(tensor, "tensor")))


def place(weight: Weight) -> Any:
    """A copy of a weight on the GPU, for the operations here."""
    return _ops().weight(weight._core)


def linear(weight: Any, x: Any, *, exact_inputs: bool = False) -> Any:
    """x W^T: x [tokens, in] -> [tokens, out]; ``weight`` comes from `place`."""
    return _run(_ops().linear, "x", weight, _capsule(x, "x"), exact_inputs)


def rms_norm(x: Any, weight: Any, eps: float) -> Any:
    """x / sqrt(mean(x^2) + eps) * weight, row by row; ``weight`` is a NumPy array."""
    checked = as_input(weight, np.float32, "weight")
    eps = check_real("eps", eps, float32=True)
    return _run(_ops().rms_norm, "x", _capsule(x, "x"), checked, eps)


def silu_mul(gate: Any, up: Any) -> Any:
    """silu(gate) * up."""
    return _run(_ops().silu_mul, "gate, up", _capsule(gate, "gate"), _capsule(up, "up"))


def moe(experts: Sequence[tuple[Any, Any, Any]], x: Any, chosen: Any, weights: Any) -> Any:
    """As `dsfp4.ops.moe`; experts are (gate, up, down) of `place`, the choice is NumPy arrays."""
    flat = [matrix for expert in experts for matrix in expert]
    checked = as_input(chosen, np.int32, "chosen"), as_input(weights, np.float32, "weights")
    return _run(_ops().moe, "x", flat, _capsule(x, "x"), *checked)
