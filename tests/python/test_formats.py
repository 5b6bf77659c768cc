"""Every code of every format against ml_dtypes, and the block encoders against NumPy."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsfp4 import ops
from dsfp4.errors import ParameterError

ALL = np.arange(256, dtype=np.uint8)
E2M1 = ml_dtypes.float4_e2m1fn
E4M3 = ml_dtypes.float8_e4m3fn
E8M0 = ml_dtypes.float8_e8m0fnu


def neighbours(values):
    """values, their middles, and the float32 next to each on both sides."""
    values = np.unique(values[np.isfinite(values)])
    points = np.concatenate([values, (values[1:] + values[:-1]) / 2]).astype(np.float32)
    inf = np.float32(np.inf)
    return np.concatenate([points, np.nextafter(points, inf), np.nextafter(points, -inf)])


def random_floats(count):
    bits = np.random.PCG64(1).random_raw(count).astype(np.uint32)
    values = bits.view(np.float32)
    return values[np.isfinite(values)]


def assert_same(actual, expected):
    """Equal, signs of zeros included; any NaN equals any NaN."""
    np.testing.assert_array_equal(actual, expected)
    number = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(actual)[number], np.signbit(expected)[number])


def test_decode_every_code():
    assert_same(ops.decode_e4m3(ALL), ALL.view(E4M3).astype(np.float32))
    assert_same(ops.decode_e8m0(ALL), ALL.view(E8M0).astype(np.float32))
    assert_same(ops.decode_e2m1(ALL), (ALL & 15).astype(np.uint8).view(E2M1).astype(np.float32))
    codes = np.arange(65536, dtype=np.uint16)
    assert_same(ops.decode_bf16(codes), codes.view(ml_dtypes.bfloat16).astype(np.float32))


def test_encode_e2m1():
    values = np.concatenate([neighbours(ops.decode_e2m1(ALL)), random_floats(1_000_000)])
    expected = np.clip(values, -6, 6).astype(E2M1).view(np.uint8)
    np.testing.assert_array_equal(ops.encode_e2m1(values), expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_encode_e2m1_refuses_what_it_cannot_hold(bad):
    with pytest.raises(ValueError, match="E2M1 has no NaN"):
        ops.encode_e2m1([1.0, bad])


def test_encode_e4m3():
    values = np.concatenate([neighbours(ops.decode_e4m3(ALL)), random_floats(1_000_000)])
    expected = np.clip(values, -448, 448).astype(E4M3).view(np.uint8)
    np.testing.assert_array_equal(ops.encode_e4m3(values), expected)
    np.testing.assert_array_equal(ops.encode_e4m3([np.inf, -np.inf]), [0x7E, 0xFE])
    assert np.all(ops.encode_e4m3([np.nan, -np.nan]) & 0x7F == 0x7F)


def test_encode_bf16():
    # Every code, every middle of two, and the float32 next to each middle on both sides.
    low_halves = np.uint32([0, 0x7FFF, 0x8000, 0x8001])
    points = ((np.arange(65536, dtype=np.uint32) << 16)[:, None] | low_halves).reshape(-1)
    points = points.view(np.float32)
    values = np.concatenate([random_floats(1_000_000), points[~np.isnan(points)]])
    with np.errstate(over="ignore"):
        expected = values.astype(ml_dtypes.bfloat16).view(np.uint16)
    np.testing.assert_array_equal(ops.encode_bf16(values), expected)
    assert np.isnan(ops.decode_bf16(ops.encode_bf16([np.nan]))).all()


def test_mx_scale_code():
    amax = np.abs(
        np.concatenate([random_floats(200_000), neighbours(6 * 2.0 ** np.arange(-20, 20))])
    )
    amax = amax[amax > 0]
    code = ops.mx_scale_code(amax).astype(np.int64)
    scale = np.ldexp(1.0, code - 127)
    largest = amax.astype(np.float64)
    assert np.all(largest <= 6 * scale)
    assert np.all((largest > 3 * scale) | (code == 0))
    assert ops.mx_scale_code([0.0])[0] == 127


def test_shapes_are_kept_and_dlpack_is_read():
    class Tensor:
        """Anything with DLPack, not an array."""

        def __init__(self, array):
            self.array = array

        def __dlpack__(self, **arguments):
            return self.array.__dlpack__(**arguments)

        def __dlpack_device__(self):
            return self.array.__dlpack_device__()

    codes = ALL.reshape(4, 8, 8)
    assert ops.decode_e4m3(codes).shape == (4, 8, 8)
    np.testing.assert_array_equal(ops.decode_e4m3(Tensor(codes)), ops.decode_e4m3(codes))
    transposed = ops.decode_e4m3(codes.T)
    np.testing.assert_array_equal(transposed, ops.decode_e4m3(codes).T)


def test_scalars_stay_scalars_and_results_are_ones_own():
    assert ops.decode_e4m3(np.uint8(0x38)).shape == ()
    assert ops.encode_bf16(1.0) == 0x3F80
    assert ops.decode_e8m0(np.zeros((3, 0), np.uint8)).shape == (3, 0)
    codes = ops.encode_e4m3(np.ones(4, np.float32))
    again = ops.encode_e4m3(np.ones(4, np.float32))
    codes[:] = 0
    assert np.all(again == 0x38)


@pytest.mark.parametrize(
    ("function", "values", "parameter"),
    [
        (ops.decode_e4m3, [0, 256], "codes"),
        (ops.decode_e4m3, [-1], "codes"),
        (ops.decode_e4m3, [1.0], "codes"),
        (ops.decode_e4m3, np.ones(2, E4M3), "codes"),
        (ops.decode_bf16, np.ones(2, ml_dtypes.bfloat16), "codes"),
        (ops.encode_e4m3, [1j], "values"),
        (ops.encode_e4m3, ["1"], "values"),
        (ops.mx_scale_code, [1.0, -1.0], "amax"),
        (ops.mx_scale_code, [np.inf], "amax"),
        (ops.nvfp4_global_scale, -1.0, "amax"),
        (ops.nvfp4_global_scale, np.nan, "amax"),
    ],
)
def test_values_are_never_reinterpreted(function, values, parameter):
    with pytest.raises(ParameterError) as caught:
        function(values)
    assert caught.value.parameter == parameter


def every_byte_with_every_scale(groups_of_bytes):
    """(packed [256, 256], scales [256, 256 / groups]): row s has scale s and every byte."""
    packed = np.tile(ALL, (256, 1))
    return packed, np.repeat(ALL[:, None], 256 // groups_of_bytes, axis=1)


def unpack(packed):
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)
    return codes.astype(np.uint8).view(E2M1).astype(np.float32)


def test_nvfp4_every_byte_with_every_scale():
    packed, scales = every_byte_with_every_scale(8)
    for global_scale in (1.0, 0.0123, 3e-38):
        expected = unpack(packed) * np.repeat(scales.view(E4M3).astype(np.float32), 16, axis=1)
        expected = expected * np.float32(global_scale)
        assert_same(ops.dequantize_nvfp4(packed, scales, global_scale), expected)


def test_mxfp4_every_byte_with_every_scale():
    packed, scales = every_byte_with_every_scale(16)
    with np.errstate(over="ignore"):
        expected = unpack(packed) * np.repeat(scales.view(E8M0).astype(np.float32), 32, axis=1)
    assert_same(ops.dequantize_mxfp4(packed, scales), expected)


def test_fp8_every_code_and_edge_tiles():
    codes = np.resize(ALL, (130, 260))
    scale_inv = np.float32([[1, 2, 0.5], [3, 4, 1e-5]])
    expected = codes.view(E4M3).astype(np.float32)
    tiled = np.repeat(np.repeat(scale_inv, 128, axis=0), 128, axis=1)[:130, :260]
    assert_same(ops.dequantize_fp8_block(codes, scale_inv), expected * tiled)


matrices = st.builds(
    lambda seed, rows, groups, exponent, zero_rows: (seed, rows, groups, exponent, zero_rows),
    st.integers(0, 2**32 - 1),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(-44, 36),
    st.booleans(),
)


def matrix_of(case, group):
    seed, rows, groups, exponent, zero_rows = case
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, groups * group)) * 10.0**exponent
    x *= np.exp(
        rng.standard_normal((rows, groups, 1))
        .repeat(group, axis=1)
        .reshape(x.shape[0], -1, 1)[:, :, 0]
    )
    if zero_rows:
        x[0] = 0
    return x.astype(np.float32)


def nearest_code(dtype, x):
    """The code of `dtype` nearest to the float64 `x`, ties to even; ml_dtypes would round twice."""
    positive = ALL[: 8 if dtype is E2M1 else 127].view(dtype).astype(np.float64)
    middles = (positive[1:] + positive[:-1]) / 2
    magnitude = np.abs(x)
    code = np.searchsorted(middles, magnitude)
    tie = np.append(middles, np.inf)[code] == magnitude
    code += tie & (code % 2 == 1)
    return (code + np.signbit(x) * (8 if dtype is E2M1 else 128)).astype(np.uint8)


def pack(codes):
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


@settings(max_examples=200, deadline=None)
@given(matrices)
def test_quantize_nvfp4(case):
    x = matrix_of(case, 16)
    packed, scales, g = ops.quantize_nvfp4(x)
    amax = np.abs(x).max()
    smallest = np.float32(1e-45)  # where the quotient underflows
    assert g == (max(np.float32(amax) / np.float32(2688), smallest) if amax else 1.0)
    blocks = x.astype(np.float64).reshape(len(x), -1, 16)
    wanted = np.abs(blocks).max(axis=2) / (6 * g)
    expected = np.clip(wanted, 2.0**-9, 448).astype(np.float32).astype(E4M3)
    np.testing.assert_array_equal(scales, expected.view(np.uint8))
    divisor = expected.astype(np.float64)[:, :, None] * g
    codes = nearest_code(E2M1, blocks / divisor).reshape(x.shape)
    np.testing.assert_array_equal(packed, pack(codes))


@settings(max_examples=200, deadline=None)
@given(matrices)
def test_quantize_mxfp4(case):
    x = matrix_of(case, 32)
    packed, scales = ops.quantize_mxfp4(x)
    blocks = x.astype(np.float64).reshape(len(x), -1, 32)
    amax = np.abs(blocks).max(axis=2)
    with np.errstate(divide="ignore"):
        power = np.where(amax == 0, 0, np.ceil(np.log2(amax / 6)))
    # log2 rounds near powers of two; the definition is the least power that holds amax
    power = np.where((amax > 0) & (amax > 6 * 2.0**power), power + 1, power)
    power = np.where((amax > 0) & (amax <= 3 * 2.0**power), power - 1, power)
    power = np.clip(power, -127, 127)
    np.testing.assert_array_equal(scales, (power + 127).astype(np.uint8))
    codes = nearest_code(E2M1, blocks / 2.0 ** power[:, :, None]).reshape(x.shape)
    np.testing.assert_array_equal(packed, pack(codes))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 260), st.integers(1, 260), st.integers(-30, 30))
def test_quantize_fp8_block(seed, rows, cols, exponent):
    x = np.random.default_rng(seed).standard_normal((rows, cols)) * 10.0**exponent
    x = x.astype(np.float32)
    codes, scale_inv = ops.quantize_fp8_block(x)
    assert scale_inv.shape == (-(-rows // 128), -(-cols // 128))
    for i in range(0, rows, 128):
        for j in range(0, cols, 128):
            tile = x[i : i + 128, j : j + 128]
            scale = np.abs(tile).max() / np.float32(448)
            assert scale_inv[i // 128, j // 128] == scale
            expected = nearest_code(E4M3, tile.astype(np.float64) / scale)
            np.testing.assert_array_equal(codes[i : i + 128, j : j + 128], expected)


# All of float32: subnormals, both zeros and the largest are among what hypothesis likes to draw.
any_float32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


def assert_nearest(dtype, x, codes, scale):
    """Each code's value is finite as float32, and no other finite one is nearer to x.

    `scale` is float64 and exact, of x's shape.
    """
    every = ALL[: 16 if dtype is E2M1 else 256].view(dtype).astype(np.float64)
    values = every * np.asarray(scale, np.float64)[:, :, None]
    with np.errstate(over="ignore"):
        values[~np.isfinite(values.astype(np.float32))] = np.inf
    error = np.abs(values - np.asarray(x, np.float64)[:, :, None])
    chosen = np.take_along_axis(error, codes[:, :, None].astype(np.int64), axis=2)[:, :, 0]
    np.testing.assert_array_equal(chosen, error.min(axis=2))


def split(packed):
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(any_float32, min_size=32, max_size=32),
    st.none() | st.floats(width=32, min_value=2.0**-149, max_value=np.finfo(np.float32).max),
)
def test_nvfp4_codes_are_the_nearest_finite_ones(values, global_scale):
    x = np.float32(values).reshape(2, 16)
    packed, scales, g = ops.quantize_nvfp4(x, global_scale)
    assert global_scale is None or g == global_scale
    assert np.all(np.isin(scales, np.arange(1, 127)))  # 2^-9 to 448
    scale = np.repeat(scales.view(E4M3).astype(np.float64), 16, axis=1) * g
    assert_nearest(E2M1, x, split(packed), scale)
    assert np.all(np.isfinite(ops.dequantize_nvfp4(packed, scales, g)))


@settings(max_examples=200, deadline=None)
@given(st.lists(any_float32, min_size=64, max_size=64))
def test_mxfp4_codes_are_the_nearest_finite_ones(values):
    x = np.float32(values).reshape(2, 32)
    packed, scales = ops.quantize_mxfp4(x)
    scale = np.ldexp(1.0, np.repeat(scales, 32, axis=1).astype(np.int64) - 127)
    assert_nearest(E2M1, x, split(packed), scale)
    assert np.all(np.isfinite(ops.dequantize_mxfp4(packed, scales)))


@settings(max_examples=200, deadline=None)
@given(st.lists(any_float32, min_size=1, max_size=20))
def test_fp8_codes_are_the_nearest_ones(values):
    x = np.float32(values).reshape(1, -1)
    codes, scale_inv = ops.quantize_fp8_block(x)
    e4m3 = codes & 0x7F
    assert np.all(e4m3 != 0x7F)
    assert_nearest(E4M3, x, codes, np.broadcast_to(scale_inv.astype(np.float64), x.shape))
    decoded = ops.dequantize_fp8_block(codes, scale_inv)
    assert np.all(np.isfinite(decoded))


# (quantize, dequantize, largest error over amax, smallest step). MXFP4 has no scale under 2^-127,
# and next to the largest float it takes 3 * 2^126, as 4 * 2^126 is no finite float.
BLOCK_FORMATS = [
    (ops.quantize_nvfp4, ops.dequantize_nvfp4, 0.2, 2.0**-149),
    (ops.quantize_mxfp4, ops.dequantize_mxfp4, 0.2501, 2.0**-128),
    (ops.quantize_fp8_block, ops.dequantize_fp8_block, 0.04, 2.0**-149),
]


@pytest.mark.parametrize("amax", [1e-44, 1e-40, 1e-36, 1e-20, 1.0, 1e20, 1e38, 3.4028234e38])
@pytest.mark.parametrize(("quantize", "dequantize", "tolerance", "step"), BLOCK_FORMATS)
def test_magnitudes_survive_quantising(quantize, dequantize, tolerance, step, amax):
    x = (amax * np.linspace(-1, 1, 64)).astype(np.float32).reshape(2, 32)
    y = dequantize(*quantize(x))
    error = np.abs(y.astype(np.float64) - x.astype(np.float64))
    assert error.max() <= tolerance * amax + step
    np.testing.assert_array_equal(np.signbit(y), np.signbit(x))


def test_zero_blocks_rows_and_tiles():
    x = np.zeros((130, 160), np.float32)
    x[0, 0] = 5.0
    packed, scales, g = ops.quantize_nvfp4(x)
    assert np.all(scales.reshape(-1)[1:] == 1)  # 2^-9, the least that is not zero
    np.testing.assert_array_equal(ops.dequantize_nvfp4(packed, scales, g)[0, 1:], 0)
    packed, scales = ops.quantize_mxfp4(x)
    assert np.all(scales.reshape(-1)[1:] == 127)
    codes, scale_inv = ops.quantize_fp8_block(x)
    expected = np.float32([[np.float32(5) / np.float32(448), 1], [1, 1]])
    np.testing.assert_array_equal(scale_inv, expected)
    np.testing.assert_array_equal(codes.reshape(-1)[1:], 0)


def test_a_given_global_scale_saturates_and_flushes():
    x = np.zeros((1, 32), np.float32)
    x[0, 0], x[0, 1], x[0, 16] = 1e30, -1e30, 1e-30
    packed, scales, g = ops.quantize_nvfp4(x, 1.0)
    np.testing.assert_array_equal(scales, [[0x7E, 0x01]])
    y = ops.dequantize_nvfp4(packed, scales, g)
    np.testing.assert_array_equal(y[0, [0, 1, 16]], [2688, -2688, 0])


def test_zero_rows_and_wrong_shapes():
    packed, scales, g = ops.quantize_nvfp4(np.zeros((0, 16), np.float32))
    assert packed.shape == (0, 8) and scales.shape == (0, 1) and g == 1.0
    with pytest.raises(ValueError, match="multiple of 16"):
        ops.quantize_nvfp4(np.ones((2, 24), np.float32))
    with pytest.raises(ValueError, match="'x'"):
        ops.quantize_mxfp4(np.ones(32, np.float32))
    with pytest.raises(ValueError, match="must be finite"):
        ops.quantize_fp8_block(np.float32([[1, np.nan]]))
    with pytest.raises(ValueError, match="'scales'"):
        ops.dequantize_nvfp4(np.ones((1, 8), np.uint8), np.ones((1, 2), np.uint8), 1.0)
