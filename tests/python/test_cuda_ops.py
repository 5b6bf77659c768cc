"""`dsfp4.ops.cuda`: tensors of other libraries are read and given where they are."""

import os

import numpy as np
import pytest
from test_ops import make_weight

from dsfp4 import _core, ops
from dsfp4.errors import CudaError, ParameterError
from dsfp4.ops import cuda

PROBLEM = _core.cuda_problem()
if PROBLEM and os.environ.get("DSFP4_REQUIRE_CUDA"):
    raise RuntimeError(PROBLEM)
with_gpu = pytest.mark.skipif(PROBLEM is not None, reason=str(PROBLEM))


def random_floats(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def close(actual: np.ndarray, expected: np.ndarray) -> bool:
    return np.linalg.norm(actual - expected) <= 5e-3 * np.linalg.norm(expected)


def address(tensor: object) -> int:
    """Where a tensor's memory is, as PyTorch sees it."""
    torch = pytest.importorskip("torch")
    return torch.from_dlpack(tensor).data_ptr()


@pytest.mark.skipif(PROBLEM is None, reason="there is a GPU")
def test_without_a_gpu_one_clear_sentence():
    with pytest.raises(CudaError) as caught:
        cuda.array(np.zeros((1, 1), np.float32))
    assert str(caught.value) == PROBLEM


@with_gpu
@pytest.mark.parametrize("fmt", ["f32", "bf16", "fp8", "nvfp4", "mxfp4"])
def test_linear_and_moe_agree_with_reference(fmt):
    def weight(seed, rows, cols):
        return make_weight(fmt, random_floats(seed, rows, cols))[0]

    matrix = weight(1, 96, 128)
    x = random_floats(2, 5, 128)
    there = cuda.linear(cuda.place(matrix), cuda.array(x))
    assert close(cuda.numpy(there), ops.linear(matrix, x))
    experts = [(weight(i, 64, 128), weight(i + 1, 64, 128), weight(i + 2, 128, 64)) for i in (3, 7)]
    chosen = np.array([[0, 1], [1, 0], [0, 1], [1, 0], [0, 1]], np.int32)
    weights = random_floats(9, 5, 2)
    placed = [tuple(cuda.place(w) for w in expert) for expert in experts]
    result = cuda.moe(placed, cuda.array(x), chosen, weights)
    assert close(cuda.numpy(result), ops.moe(experts, x, chosen, weights))


@with_gpu
def test_elementwise_ops_agree_with_reference():
    x, up, weight = random_floats(1, 3, 64), random_floats(2, 3, 64), random_floats(3, 64)
    norm = cuda.rms_norm(cuda.array(x), weight, 1e-6)
    assert close(cuda.numpy(norm), ops.rms_norm(x, weight, 1e-6))
    gated = cuda.silu_mul(cuda.array(x), cuda.array(up))
    assert close(cuda.numpy(gated), ops.silu_mul(x, up))


@with_gpu
def test_torch_tensors_are_neither_copied_nor_changed():
    torch = pytest.importorskip("torch")
    matrix = make_weight("nvfp4", random_floats(1, 64, 128))[0]
    x = torch.from_numpy(random_floats(2, 4, 128)).cuda()
    x.mul_(2.0)  # queued on PyTorch's stream: what reads x must wait for it
    y = torch.from_dlpack(cuda.linear(cuda.place(matrix), x))
    assert y.is_cuda
    assert y.dtype == torch.float32
    assert close(y.cpu().numpy(), ops.linear(matrix, x.cpu().numpy()))
    mine = cuda.array(random_floats(3, 4, 128))
    seen = torch.from_dlpack(mine)
    seen.fill_(1.0)
    torch.cuda.synchronize()
    assert np.all(cuda.numpy(mine) == 1.0)
    assert address(mine) == seen.data_ptr()


@with_gpu
def test_cupy_arrays_are_not_copied():
    cupy = pytest.importorskip("cupy")
    matrix = make_weight("mxfp4", random_floats(1, 64, 128))[0]
    x = cupy.asarray(random_floats(2, 4, 128))
    y = cupy.from_dlpack(cuda.linear(cuda.place(matrix), x))
    assert close(cupy.asnumpy(y), ops.linear(matrix, cupy.asnumpy(x)))


@with_gpu
def test_a_result_outlives_everything_else():
    y = cuda.silu_mul(cuda.array(np.ones((2, 4), np.float32)), cuda.array(np.ones((2, 4))))
    cuda._ops.cache_clear()
    assert np.allclose(cuda.numpy(y), 1.0 / (1.0 + np.exp(-1.0)))


@with_gpu
def test_wrong_tensors_are_named():
    place = cuda.place(make_weight("bf16", random_floats(1, 8, 16))[0])
    with pytest.raises(ParameterError, match="'x': must be a tensor with DLPack, not list"):
        cuda.linear(place, [[1.0]])
    with pytest.raises(ParameterError, match="'x': lies on DLPack device 1:0, not on GPU 0"):
        cuda.linear(place, random_floats(1, 2, 16))
    with pytest.raises(ParameterError, match="'x': must have as many columns"):
        cuda.linear(place, cuda.array(random_floats(1, 2, 8)))
    with pytest.raises(ParameterError, match="'up': must have gate's shape"):
        cuda.silu_mul(cuda.array(random_floats(1, 2, 8)), cuda.array(random_floats(1, 2, 4)))
    torch = pytest.importorskip("torch")
    for bad in (
        torch.zeros(2, 16, device="cuda", dtype=torch.float64),
        torch.zeros(16, 2, device="cuda").T,
        torch.zeros(16, device="cuda"),
        torch.zeros(2, 16, device="cuda", requires_grad=True),
    ):
        with pytest.raises(ParameterError, match="'x'"):
            cuda.linear(place, bad)
