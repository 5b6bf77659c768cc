"""Every op of both backends against the float64 oracle in fixtures/numpy_ops.py."""

import ml_dtypes
import numpy as np
import pytest

from dsfp4 import ops
from fixtures import numpy_ops as oracle

BACKENDS = ["reference", "cpu"]
# reference: FP32 storage of FP64 sums. cpu: inputs rounded to BF16, FP32 sums.
TOLERANCE = {"reference": 2e-6, "cpu": 5e-3}
FORMATS = ["f32", "bf16", "fp8", "nvfp4", "mxfp4"]


def relative_error(actual, expected):
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def make_weight(fmt, values):
    """(weight, its decoded values)."""
    if fmt == "f32":
        return ops.Weight.f32(values), values
    if fmt == "bf16":
        codes = ops.encode_bf16(values)
        return ops.Weight.bf16(codes), ops.decode_bf16(codes)
    if fmt == "fp8":
        parts = ops.quantize_fp8_block(values)
        return ops.Weight.fp8(*parts), ops.dequantize_fp8_block(*parts)
    if fmt == "nvfp4":
        parts = ops.quantize_nvfp4(values)
        return ops.Weight.nvfp4(*parts), ops.dequantize_nvfp4(*parts)
    parts = ops.quantize_mxfp4(values)
    return ops.Weight.mxfp4(*parts), ops.dequantize_mxfp4(*parts)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("rows,cols,tokens", [(1, 32, 1), (7, 96, 5), (300, 416, 3), (64, 128, 0)])
def test_linear(backend, fmt, rows, cols, tokens):
    rng = np.random.default_rng(rows)
    weight, decoded = make_weight(fmt, normal(rng, rows, cols))
    assert weight.format == fmt
    assert weight.shape == (rows, cols)
    x = normal(rng, tokens, cols)
    actual = ops.linear(weight, x, backend, threads=2)
    assert actual.shape == (tokens, rows)
    if tokens:
        expected = oracle.linear(x.astype(np.float64), decoded)
        assert relative_error(actual, expected) < TOLERANCE[backend]


def test_linear_exact_inputs_are_not_rounded():
    rng = np.random.default_rng(1)
    weight, decoded = make_weight("bf16", normal(rng, 50, 256))
    x = normal(rng, 4, 256)
    expected = oracle.linear(x.astype(np.float64), decoded)
    assert relative_error(ops.linear(weight, x, "cpu", exact_inputs=True), expected) < 1e-6
    # BF16 activations cost what BF16 costs; FP32 products need not round at all.
    assert relative_error(ops.linear(weight, x, "cpu"), expected) < 4e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_embed(backend):
    values = normal(np.random.default_rng(2), 11, 24)
    table, decoded = make_weight("bf16", values)
    np.testing.assert_array_equal(ops.embed(table, [10, 0, 3], backend), decoded[[10, 0, 3]])


@pytest.mark.parametrize("backend", BACKENDS)
def test_rms_norm_and_silu(backend):
    rng = np.random.default_rng(3)
    x, weight = normal(rng, 5, 77), normal(rng, 77)
    expected = oracle.rms_norm(x.astype(np.float64), weight, 1e-5)
    assert relative_error(ops.rms_norm(x, weight, 1e-5, backend), expected) < 1e-6
    up = normal(rng, 5, 77)
    expected = oracle.silu(x.astype(np.float64)) * up
    assert relative_error(ops.silu_mul(x, up, backend), expected) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_rope(backend):
    rng = np.random.default_rng(4)
    x = normal(rng, 6, 3 * 20)
    yarn = {"factor": 4, "original_max_position_embeddings": 16, "mscale": 0.5, "mscale_all_dim": 1}
    rope = oracle.make_rope(20, 10000.0, yarn)
    positions = np.arange(6) * 7
    angle = positions[:, None] * rope.inverse_frequency
    cos_sin = np.stack([np.cos(angle), np.sin(angle)], axis=-1).reshape(6, 20) * rope.amplitude
    expected = oracle.apply_rope(x.reshape(6, 3, 20).astype(np.float64), positions, rope)
    actual = ops.rope(x, 3, cos_sin, backend).reshape(6, 3, 20)
    assert relative_error(actual, expected) < 1e-6


ROUTERS = {
    "v2_lite": dict(experts=16, top_k=6),
    "v2": dict(experts=16, top_k=4, groups=8, kept_groups=3, scaling_factor=16.0),
    "v3": dict(
        experts=16,
        top_k=4,
        groups=4,
        kept_groups=2,
        scoring="sigmoid",
        group_score="top2",
        normalize=True,
        scaling_factor=2.5,
    ),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", ROUTERS)
@pytest.mark.parametrize("forced", [False, True])
def test_route(backend, family, forced):
    rng = np.random.default_rng(5)
    fields = ROUTERS[family]
    logits = normal(rng, 50, 16)
    bias = 0.2 * normal(rng, 16) if family == "v3" else None
    given = np.argsort(rng.random((50, 16)), axis=1)[:, : fields["top_k"]] if forced else None
    router = oracle.Router(
        top_k=fields["top_k"],
        sigmoid=family == "v3",
        groups=fields.get("groups", 1),
        kept_groups=fields.get("kept_groups", 1),
        normalize=fields.get("normalize", False),
        scaling_factor=fields.get("scaling_factor", 1.0),
    )
    expected = oracle.route(logits.astype(np.float64), router, bias, given)
    chosen, weights = ops.route(
        ops.RouterSpec(**fields),
        logits,
        () if bias is None else bias,
        () if given is None else given,
        backend,
    )
    np.testing.assert_array_equal(chosen, expected.experts)
    np.testing.assert_allclose(weights, expected.weights, rtol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize("fmt", FORMATS)
def test_moe(backend, decode, fmt):
    rng = np.random.default_rng(6)
    experts, decoded = [], []
    for _ in range(5):
        made = [make_weight(fmt, normal(rng, *s) / 8) for s in [(96, 64), (96, 64), (64, 96)]]
        experts.append(tuple(weight for weight, _ in made))
        decoded.append([values for _, values in made])
    x = normal(rng, 9, 64)
    chosen = np.argsort(rng.random((9, 5)), axis=1)[:, :3]
    weights = rng.random((9, 3)).astype(np.float32)
    x64 = x.astype(np.float64)
    expected = np.zeros((9, 64))
    for t in range(9):
        for k in range(3):
            expected[t] += weights[t, k] * oracle.mlp(x64[t : t + 1], *decoded[chosen[t, k]])[0]
    actual = ops.moe(experts, x, chosen, weights, backend, decode=decode, threads=2)
    assert relative_error(actual, expected) < TOLERANCE[backend]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize("fmt", ["bf16", "fp8", "nvfp4"])
@pytest.mark.parametrize("dims", [(2, 512, 128, 64, 128), (3, 48, 24, 20, 40)])
def test_mla_attention(backend, decode, fmt, dims):
    heads, lora, nope, rope, value = dims
    rng = np.random.default_rng(7)
    kv_b, decoded = make_weight(fmt, normal(rng, heads * (nope + value), lora) / np.sqrt(lora))
    scale = 1.3 / np.sqrt(nope + rope)
    shape = ops.MlaShape(heads, lora, nope, rope, value, scale)
    lengths, rows = [67, 5], [3, 5]  # the first sequence crosses a block of the cache
    q = [normal(rng, length, heads * (nope + rope)) for length in lengths]
    latents = [normal(rng, length, lora + rope) for length in lengths]
    expected = []
    for queries, cached, count in zip(q, latents, rows, strict=True):
        out = oracle.mla_attention(
            queries.reshape(len(queries), heads, -1).astype(np.float64),
            cached[:, :lora].astype(np.float64),
            cached[:, lora:].astype(np.float64),
            decoded,
            value,
            scale,
        )
        expected.append(out[-count:].reshape(count, -1))
    last = np.concatenate([x[-count:] for x, count in zip(q, rows, strict=True)])
    actual = ops.mla_attention(shape, kv_b, last, latents, rows, backend, decode=decode, threads=2)
    # cpu: the cache, too, is BF16
    limit = {"reference": 5e-6, "cpu": 1e-2}[backend]
    assert relative_error(actual, np.concatenate(expected)) < limit


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("decode", [False, True])
def test_mla_attention_with_fp8_cache(backend, decode):
    heads, lora, nope, rope, value = 3, 48, 24, 20, 40
    rng = np.random.default_rng(8)
    kv_b, decoded = make_weight("bf16", normal(rng, heads * (nope + value), lora) / np.sqrt(lora))
    shape = ops.MlaShape(heads, lora, nope, rope, value, 0.15)
    q, latents = normal(rng, 70, heads * (nope + rope)), normal(rng, 70, lora + rope)
    latents[5, 3] = 1000.0  # saturates
    cached = latents.clip(-448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
    expected = oracle.mla_attention(
        q.reshape(70, heads, -1).astype(np.float64),
        cached[:, :lora],
        cached[:, lora:],
        decoded,
        value,
        0.15,
    )
    actual = ops.mla_attention(
        shape, kv_b, q, [latents], [70], backend, decode=decode, fp8_cache=True
    )
    assert relative_error(actual, expected.reshape(70, -1)) < TOLERANCE[backend] * 2


def test_wrong_shapes_name_the_parameter():
    weight = ops.Weight.f32(np.ones((4, 8), np.float32))
    with pytest.raises(ValueError, match="'x'"):
        ops.linear(weight, np.ones((2, 7), np.float32))
    with pytest.raises(ValueError, match="'device'"):
        ops.linear(weight, np.ones((2, 8), np.float32), backend="abacus")
    with pytest.raises(ValueError, match="'ids'"):
        ops.embed(weight, [4])
    with pytest.raises(ValueError, match="'scales'"):
        ops.Weight.nvfp4(np.ones((4, 7), np.uint8), np.ones((4, 1), np.uint8), 1.0)
    with pytest.raises(ValueError, match="'experts'"):
        ops.route(ops.RouterSpec(4, 2), np.ones((1, 4), np.float32), experts=[[0, 4]])
