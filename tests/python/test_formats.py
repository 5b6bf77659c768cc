"""Every code of every format against ml_dtypes, and the block encoders against NumPy."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsfp4 import ops

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


def test_decode_every_code():
    np.testing.assert_array_equal(ops.decode_e4m3(ALL), ALL.view(E4M3).astype(np.float32))
    np.testing.assert_array_equal(ops.decode_e8m0(ALL), ALL.view(E8M0).astype(np.float32))
    expected = (ALL & 15).astype(np.uint8).view(E2M1).astype(np.float32)
    np.testing.assert_array_equal(ops.decode_e2m1(ALL), expected)
    codes = np.arange(65536, dtype=np.uint16)
    expected = codes.view(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(ops.decode_bf16(codes), expected)


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
    values = np.concatenate([random_floats(1_000_000), np.float32([np.inf, -np.inf, 0, -0.0])])
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
        actual = ops.dequantize_nvfp4(packed, scales, global_scale)
        np.testing.assert_array_equal(actual, expected)


def test_mxfp4_every_byte_with_every_scale():
    packed, scales = every_byte_with_every_scale(16)
    with np.errstate(over="ignore"):
        expected = unpack(packed) * np.repeat(scales.view(E8M0).astype(np.float32), 32, axis=1)
    np.testing.assert_array_equal(ops.dequantize_mxfp4(packed, scales), expected)


def test_fp8_every_code_and_edge_tiles():
    codes = np.resize(ALL, (130, 260))
    scale_inv = np.float32([[1, 2, 0.5], [3, 4, 1e-5]])
    expected = codes.view(E4M3).astype(np.float32)
    tiled = np.repeat(np.repeat(scale_inv, 128, axis=0), 128, axis=1)[:130, :260]
    np.testing.assert_array_equal(ops.dequantize_fp8_block(codes, scale_inv), expected * tiled)


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
