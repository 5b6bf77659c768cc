"""The jobs of a conversion: each reads some tensors of the source and writes what they become."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dsfp4.ops import formats
from dsfp4.quantize.plan import Linear, Plan, Shard
from dsfp4.quantize.source import TILE, Matrix, Source
from dsfp4.quantize.writer import ShardWriter

if TYPE_CHECKING:
    from dsfp4._core import TensorInfo

_SLAB_ROWS = 8 * TILE  # rows converted at a time: bounds the memory of a worker
_COPY_BYTES = 64 << 20

Floats = npt.NDArray[np.float32]


class Done(NamedTuple):
    """What one job did: bytes of the source dealt with, and the squares behind a relative error."""

    bytes_in: int
    role: str = ""
    error_squares: float = 0.0
    squares: float = 0.0


def make_jobs(
    plan: Plan, source: Source, shard: Shard, writer: ShardWriter
) -> Iterator[Callable[[], list[Done]]]:
    """Yield what has to be done for one file; the jobs may run in any order and at once."""
    families = plan.families()
    for tensor in shard.copies:
        yield partial(_copy, source, tensor, writer)
    for name, group in groupby(
        sorted(shard.linears, key=attrgetter("family")), attrgetter("family")
    ):
        linears = list(group)
        if linears[0].target == "fp8":
            yield partial(_write_fp8, linears, writer)
        else:
            yield partial(_write_nvfp4, linears, families[name], writer)


def _copy(source: Source, tensor: "TensorInfo", writer: ShardWriter) -> list[Done]:
    for start in range(0, tensor.bytes, _COPY_BYTES):
        stop = min(start + _COPY_BYTES, tensor.bytes)
        writer.write(tensor.name, start, memoryview(source.read(tensor, start, stop)))
    return [Done(tensor.bytes)]


def _write_fp8(linears: list[Linear], writer: ShardWriter) -> list[Done]:
    return [_convert(linear, _fp8_slab, writer) for linear in linears]


def _write_nvfp4(linears: list[Linear], family: list[Linear], writer: ShardWriter) -> list[Done]:
    """Convert `linears`, of which all of `family` (some may lie in other files) share the scale."""
    amax = max(float(np.abs(x).max()) for member in family for x in _slabs(member.matrix))
    scale = formats.nvfp4_global_scale(amax)
    for linear in linears:
        module = linear.matrix.module
        writer.write(f"{module}.weight_scale_2", 0, np.array([scale], np.float32).data)
        writer.write(f"{module}.input_scale", 0, np.array([1.0], np.float32).data)
    return [_convert(linear, partial(_nvfp4_slab, scale), writer) for linear in linears]


# A slab of rows becomes the bytes of a few tensors (by suffix), and the values that they stand for.
_Encoded = tuple[dict[str, npt.NDArray[Any]], Floats]


def _fp8_slab(values: Floats) -> _Encoded:
    codes, scale_inv = formats.quantize_fp8_block(values)
    decoded = formats.dequantize_fp8_block(codes, scale_inv)
    return {"weight": codes, "weight_scale_inv": scale_inv}, decoded


def _nvfp4_slab(scale: float, values: Floats) -> _Encoded:
    packed, scales, _ = formats.quantize_nvfp4(values, scale)
    decoded = formats.dequantize_nvfp4(packed, scales, scale)
    return {"weight": packed, "weight_scale": scales}, decoded


def _convert(linear: Linear, encode: Callable[[Floats], _Encoded], writer: ShardWriter) -> Done:
    matrix = linear.matrix
    written: dict[str, int] = {}
    error_squares = squares = 0.0
    for values in _slabs(matrix):
        encoded, decoded = encode(values)
        for suffix, data in encoded.items():
            start = written.get(suffix, 0)
            writer.write(f"{matrix.module}.{suffix}", start, data.data)
            written[suffix] = start + data.nbytes
        error_squares += _sum_of_squares(decoded - values)
        squares += _sum_of_squares(values)
    return Done(matrix.bytes, linear.role, error_squares, squares)


def _slabs(matrix: Matrix) -> Iterator[Floats]:
    for first in range(0, matrix.rows, _SLAB_ROWS):
        yield matrix.read_rows(first, min(first + _SLAB_ROWS, matrix.rows))


def _sum_of_squares(values: Floats) -> float:
    return float(np.square(values, dtype=np.float64).sum())
