"""What the CUDA kernels reach, beside what the device can do; with PyTorch's matmul where it is."""

import argparse
import json
import sys
from pathlib import Path

from dsfp4 import _core


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    problem = _core.cuda_problem()
    if problem:
        print(problem, file=sys.stderr)
        return 1
    if not hasattr(_core, "bench_cuda"):
        print("no kernel benchmarks in this build")
        return 0
    rows = _core.bench_cuda()
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
