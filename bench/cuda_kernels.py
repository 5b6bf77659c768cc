"""What the CUDA kernels reach, beside PyTorch's BF16 product where PyTorch is installed."""

import argparse
import json
import sys
from pathlib import Path

from dsfp4.cli.bench_cuda import Row, measure, row_of, table
from dsfp4.errors import CudaError


def torch_rows() -> list[Row]:
    """PyTorch's products at the shapes that the prefill cases have, if PyTorch is installed."""
    try:
        import torch
    except ImportError:
        return []
    rows = []
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
        time = {
            "name": f"torch.matmul bf16 {tokens} x {cols} x {outs}",
            "seconds": sorted(times[2:])[5],
            "bytes": 2.0 * (tokens * cols + outs * cols + tokens * outs),
            "flops": 2.0 * tokens * cols * outs,
            "floor": 0.0,
        }
        rows.append(row_of(time))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    arguments = parser.parse_args()
    try:
        rows = measure(arguments.only)
    except CudaError as error:
        print(error, file=sys.stderr)
        return 1
    if not arguments.only:
        rows += torch_rows()
    print(table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
