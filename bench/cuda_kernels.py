"""What the CUDA kernels reach, beside what the device can do; with PyTorch's matmul where it is."""

import argparse
import json
import sys
from pathlib import Path

from dsfp4 import _core


def torch_rows() -> list[dict[str, object]]:
    """PyTorch's BF16 product at the shapes that the prefill cases have, if PyTorch is installed."""
    try:
        import torch
    except ImportError:
        return []
    rows: list[dict[str, object]] = []
    for tokens, cols, outs in ((4096, 7168, 18432), (4096, 7168, 7168), (32768, 7168, 6144)):
        a = torch.randn(tokens, cols, device="cuda", dtype=torch.bfloat16)
        b = torch.randn(outs, cols, device="cuda", dtype=torch.bfloat16)
        times = []
        for _ in range(12):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            torch.matmul(a, b.T)
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e-3)
        seconds = sorted(times[2:])[5]
        rows.append(
            {
                "name": f"torch.matmul bf16 {tokens} x {cols} x {outs}",
                "seconds": seconds,
                "bytes": 2.0 * (tokens * cols + outs * cols + tokens * outs),
                "flops": 2.0 * tokens * cols * outs,
                "floor": 0.0,
            }
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    arguments = parser.parse_args()
    problem = _core.cuda_problem()
    if problem:
        print(problem, file=sys.stderr)
        return 1
    rows = _core.bench_cuda(arguments.only) + torch_rows()
    print(f"{'kernel':44} {'us':>10} {'GB/s':>8} {'TFLOP/s':>8} {'floor/t':>8}")
    for row in rows:
        print(
            f"{row['name']:44} {row['seconds'] * 1e6:10.1f} "
            f"{row['bytes'] / row['seconds'] * 1e-9:8.0f} "
            f"{row['flops'] / row['seconds'] * 1e-12:8.1f} {row['floor'] / row['seconds']:8.2f}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
