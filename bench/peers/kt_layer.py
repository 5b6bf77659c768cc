"""Times one MoE layer in kt-kernel's extension on random weights; one run a line, in seconds.

usage: kt_layer.py FOLDER VARIANT METHOD(nvfp4|mxfp4) THREADS EXPERTS TOKENS RUNS
"""

import importlib.util
import sys
import time
from pathlib import Path

import numpy as np

HIDDEN, INTERMEDIATE, TOP_K = 7168, 2048, 8


def load(folder: Path, variant: str):
    """The extension module of the wheel, without the package around it, which needs PyTorch."""
    file = next((folder / "kt_kernel").glob(f"_kt_kernel_ext_{variant}.*.so"))
    spec = importlib.util.spec_from_file_location("kt_kernel_ext", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def matrices(rng, experts: int, rows: int, cols: int, group: int):
    """Packed E2M1 and BF16 scales (2^-7 to 2^-4) of every expert."""
    packed = [rng.integers(0, 256, (rows, cols // 2), np.uint8) for _ in range(experts)]
    scales = [
        (rng.integers(120, 124, (rows, cols // group)) << 7).astype(np.uint16)
        for _ in range(experts)
    ]
    return packed, scales


def main() -> None:
    """Measure."""
    folder, variant, method = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    threads, experts, tokens, runs = map(int, sys.argv[4:8])
    group = 16 if method == "nvfp4" else 32
    ext = load(folder, variant)
    moe_class = None
    if method == "mxfp4":
        moe_class = getattr(ext.moe, "AMXFP4_KGroup_MOE", None)
    moe_class = moe_class or ext.moe.AVX2MXFP4_MOE

    config = ext.WorkerPoolConfig()
    config.subpool_count = 1
    config.subpool_numa_map = [0]
    config.subpool_thread_count = [threads]
    infer = ext.CPUInfer(config)

    rng = np.random.default_rng(0)
    on_gpu = np.zeros(experts, np.uint8)
    moe = ext.moe.MOEConfig(experts, TOP_K, HIDDEN, INTERMEDIATE, on_gpu.ctypes.data)
    moe.layer_idx = 0
    moe.pool = infer.backend_
    moe.max_len = max(tokens, 16)
    moe.quant_config.bits = 4
    moe.quant_config.group_size = group
    moe.quant_config.zero_point = False
    kept = []
    for name, rows, cols in (
        ("gate", INTERMEDIATE, HIDDEN),
        ("up", INTERMEDIATE, HIDDEN),
        ("down", HIDDEN, INTERMEDIATE),
    ):
        packed, scales = matrices(rng, experts, rows, cols, group)
        kept.append((packed, scales))
        setattr(moe, f"{name}_projs", [[a.ctypes.data for a in packed]])
        setattr(moe, f"{name}_scales", [[a.ctypes.data for a in scales]])
    layer = moe_class(moe)
    order = np.arange(experts, dtype=np.int64)
    infer.submit(layer.load_weights_task(order.ctypes.data))
    infer.sync()
    kept.clear()  # the layer has copied them

    x = (rng.standard_normal((tokens, HIDDEN)).astype(np.float32).view(np.uint32) >> 16).astype(
        np.uint16
    )
    weights = np.full((tokens, TOP_K), 1 / TOP_K, np.float32)
    out = np.zeros((tokens, HIDDEN), np.uint16)
    count = np.array([tokens], np.int32)
    for run in range(-1, runs):
        first = (run + 1) * tokens * TOP_K
        chosen = (first + np.arange(tokens * TOP_K)).reshape(tokens, TOP_K) % experts
        chosen = np.ascontiguousarray(chosen, np.int64)
        start = time.perf_counter()
        task = layer.forward_task(
            count.ctypes.data,
            TOP_K,
            chosen.ctypes.data,
            weights.ctypes.data,
            x.ctypes.data,
            out.ctypes.data,
            False,
        )
        infer.submit(task)
        infer.sync()
        took = time.perf_counter() - start
        if run >= 0:
            print(f"{took:.9f}")
    finite = (out.view(np.int16) & 0x7F80) != 0x7F80
    assert out.any() and finite.all(), "the layer computed nothing"


if __name__ == "__main__":
    main()
