"""The number formats: scalar codes and the block formats NVFP4, MXFP4 and FP8 128x128.

Sources: OCP Microscaling Formats 1.0, OCP 8-bit floating point 1.0, NVIDIA's NVFP4 checkpoints,
DeepSeek's FP8 checkpoints. Scalar functions take arrays of any shape, block functions matrices;
all take NumPy arrays and whatever has DLPack, and give NumPy arrays. The core does the work without
the GIL, so that threads can quantise several matrices at once. Raises ParameterError (a ValueError)
for bad arguments.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsfp4 import _core
from dsfp4._arrays import as_input, as_output, parameter_error
from dsfp4._checks import check_real

__all__ = [
    "decode_bf16",
    "decode_e2m1",
    "decode_e4m3",
    "decode_e8m0",
    "dequantize_fp8_block",
    "dequantize_mxfp4",
    "dequantize_nvfp4",
    "encode_bf16",
    "encode_e2m1",
    "encode_e4m3",
    "mx_scale_code",
    "nvfp4_global_scale",
    "quantize_fp8_block",
    "quantize_mxfp4",
    "quantize_nvfp4",
]

Floats = NDArray[np.float32]
Codes = NDArray[np.uint8]


def _each(
    function: Any, values: Any, dtype: type[np.generic], name: str = "values"
) -> NDArray[Any]:
    values = as_input(values, dtype, name)
    return as_output(function(values.reshape(-1))).reshape(values.shape)


def decode_e2m1(codes: Any) -> Floats:
    """E2M1 codes (low four bits of uint8) to float32: 0 .5 1 1.5 2 3 4 6, bit 3 is the sign."""
    return _each(_core.decode_e2m1, codes, np.uint8, "codes")


def encode_e2m1(values: Any) -> Codes:
    """float32 to E2M1: nearest even, saturating at 6. ParameterError for NaN and infinity."""
    return _each(_core.encode_e2m1, values, np.float32)


def decode_e4m3(codes: Any) -> Floats:
    """E4M3FN codes (uint8) to float32; 0x7F and 0xFF are NaN."""
    return _each(_core.decode_e4m3, codes, np.uint8, "codes")


def encode_e4m3(values: Any) -> Codes:
    """float32 to E4M3FN: nearest even, saturating at 448; NaN stays NaN."""
    return _each(_core.encode_e4m3, values, np.float32)


def decode_e8m0(codes: Any) -> Floats:
    """E8M0 codes (uint8) to float32: 2^(code - 127); 255 is NaN."""
    return _each(_core.decode_e8m0, codes, np.uint8, "codes")


def mx_scale_code(amax: Any) -> Codes:
    """The E8M0 scale of blocks with largest magnitude `amax`: 2^ceil(log2(amax / 6)); 127 for 0."""
    return _each(_core.mx_scale_code, amax, np.float32, "amax")


def decode_bf16(codes: Any) -> Floats:
    """BF16 codes (uint16) to float32."""
    return _each(_core.decode_bf16, codes, np.uint16, "codes")


def encode_bf16(values: Any) -> NDArray[np.uint16]:
    """float32 to BF16 codes: nearest even; NaN stays NaN."""
    return _each(_core.encode_bf16, values, np.float32)


def nvfp4_global_scale(amax: float) -> float:
    """The global scale of a tensor with largest magnitude `amax`: amax / 2688, and 1 for 0."""
    return float(_core.nvfp4_global_scale(check_real("amax", amax, float32=True)))


def _matrix(x: Any, group: int = 1) -> tuple[Floats, float]:
    """x as a finite matrix with a multiple of `group` columns, and its largest magnitude."""
    x = as_input(x, np.float32, "x")
    if x.ndim != 2:
        raise parameter_error("x", f"must be two-dimensional, not {x.ndim}-dimensional")
    if x.shape[1] % group != 0:
        raise parameter_error("x", f"must have a multiple of {group} columns, not {x.shape[1]}")
    amax = float(max(x.max(initial=0.0), -x.min(initial=0.0)))
    if not np.isfinite(amax):
        row, col = np.argwhere(~np.isfinite(x))[0]
        raise parameter_error(
            "x", f"the value in row {row}, column {col} is {x[row, col]}; all must be finite"
        )
    return x, amax


def _encode(name: str, x: Floats, global_scale: float = 1.0) -> tuple[Codes, Codes]:
    data, scales = _core.encode_blocks(name, x, global_scale)
    return as_output(data), as_output(scales)


def _codes(values: Any, name: str) -> Codes:
    codes = as_input(values, np.uint8, name)
    if codes.ndim != 2:
        raise parameter_error(name, f"must be two-dimensional, not {codes.ndim}-dimensional")
    return codes


def _decode(
    name: str, cols: int, data: Codes, scales: NDArray[Any], global_scale: float = 1.0
) -> Floats:
    flat = scales.reshape(-1).view(np.uint8)
    values = _core.decode_blocks(name, len(data), cols, data.reshape(-1), flat, global_scale)
    return as_output(values)


def _unpack(name: str, packed: Any, scales: Any, group: int, global_scale: float = 1.0) -> Floats:
    packed = _codes(packed, "packed")
    scales = _codes(scales, "scales")
    rows, cols = packed.shape[0], 2 * packed.shape[1]
    if cols % group != 0:
        raise parameter_error(
            "packed", f"must have a multiple of {group // 2} columns, not {cols // 2}"
        )
    if scales.shape != (rows, cols // group):
        raise parameter_error(
            "scales", f"must have the shape {(rows, cols // group)}, not {scales.shape}"
        )
    return _decode(name, cols, packed, scales, global_scale)


def quantize_nvfp4(x: Any, global_scale: float | None = None) -> tuple[Codes, Codes, float]:
    """x float32 [rows, cols], cols a multiple of 16, to NVFP4.

    Returns the packed E2M1 values uint8 [rows, cols/2] (low nibble first), the E4M3 scales uint8
    [rows, cols/16] and the global scale: the given one, positive, or that of x. Raises
    ParameterError for values that are not finite.
    """
    x, amax = _matrix(x, 16)
    if global_scale is None:
        global_scale = nvfp4_global_scale(amax)
    global_scale = check_real("global_scale", global_scale, float32=True)
    data, scales = _encode("nvfp4", x, global_scale)
    rows, cols = x.shape
    return data.reshape(rows, cols // 2), scales.reshape(rows, cols // 16), global_scale


def dequantize_nvfp4(packed: Any, scales: Any, global_scale: float) -> Floats:
    """The values of an NVFP4 matrix: E2M1 * E4M3 * global scale, float32 [rows, cols].

    Takes packed uint8 [rows, cols/2] and scales uint8 [rows, cols/16].
    """
    factor = check_real("global_scale", global_scale, float32=True)
    return _unpack("nvfp4", packed, scales, 16, factor)


def quantize_mxfp4(x: Any) -> tuple[Codes, Codes]:
    """x float32 [rows, cols], cols a multiple of 32, to MXFP4.

    Returns the packed E2M1 values uint8 [rows, cols/2] (low nibble first) and the E8M0 scales uint8
    [rows, cols/32]. Raises ParameterError for values that are not finite.
    """
    x, _ = _matrix(x, 32)
    data, scales = _encode("mxfp4", x)
    rows, cols = x.shape
    return data.reshape(rows, cols // 2), scales.reshape(rows, cols // 32)


def dequantize_mxfp4(packed: Any, scales: Any) -> Floats:
    """The values of an MXFP4 matrix: E2M1 * 2^(scale - 127), float32 [rows, cols].

    Takes packed uint8 [rows, cols/2] and scales uint8 [rows, cols/32].
    """
    return _unpack("mxfp4", packed, scales, 32)


def quantize_fp8_block(x: Any) -> tuple[Codes, Floats]:
    """x float32 [rows, cols] to FP8 with one multiplier for each 128x128 tile.

    Returns E4M3 codes uint8 [rows, cols] and multipliers float32 [ceil(rows/128), ceil(cols/128)].
    Raises ParameterError for values that are not finite.
    """
    x, _ = _matrix(x)
    data, scales = _encode("fp8", x)
    return data.reshape(x.shape), scales.view(np.float32).reshape(_tiles(*x.shape))


def dequantize_fp8_block(codes: Any, scale_inv: Any) -> Floats:
    """The values of an FP8 matrix: E4M3 * its tile's multiplier, float32 [rows, cols].

    Takes codes uint8 [rows, cols] and multipliers float32 [ceil(rows/128), ceil(cols/128)].
    """
    codes = _codes(codes, "codes")
    scale_inv = as_input(scale_inv, np.float32, "scale_inv")
    tiles = _tiles(*codes.shape)
    if scale_inv.shape != tiles:
        raise parameter_error("scale_inv", f"must have the shape {tiles}, not {scale_inv.shape}")
    return _decode("fp8", codes.shape[1], codes, scale_inv)


def _tiles(rows: int, cols: int) -> tuple[int, int]:
    return -(-rows // 128), -(-cols // 128)
