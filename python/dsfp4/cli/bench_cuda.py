"""`dsfp4 bench kernels --device cuda`: how close each CUDA kernel comes to what the GPU can do."""

import json
from typing import Any

from dsfp4 import _core
from dsfp4.errors import CudaError

Row = dict[str, Any]


def measure(only: str = "") -> list[Row]:
    """Return a row a case whose name holds `only`: name, seconds, gb_s, gflop_s, floor_ratio.

    The floor is the larger of bytes over the read rate and operations over the rate of mma.sync;
    both rates are the first two rows. Raises CudaError where there is no usable GPU.
    """
    problem = _core.cuda_problem()
    if problem:
        raise CudaError(problem)
    return [row_of(time) for time in _core.bench_cuda(only)]


def row_of(time: Row) -> Row:
    """Return a measured time with its rates."""
    seconds = time["seconds"]
    return {
        **time,
        "gb_s": time["bytes"] / seconds / 1e9,
        "gflop_s": time["flops"] / seconds / 1e9,
        "floor_ratio": time["floor"] / seconds,
    }


def table(rows: list[Row]) -> str:
    """Return `rows` as lines for people."""
    lines = [f"{'kernel':46} {'us':>10} {'GB/s':>7} {'TFLOP/s':>8} {'floor/t':>8}"]
    lines += [
        f"{row['name']:46} {1e6 * row['seconds']:10.1f} {row['gb_s']:7.0f} "
        f"{row['gflop_s'] / 1e3:8.1f} {row['floor_ratio']:8.2f}"
        for row in rows
    ]
    return "\n".join(lines)


def report(*, as_json: bool) -> str:
    """Measure all cases; return JSON or a table."""
    rows = measure()
    return json.dumps({"device": "cuda", "results": rows}, indent=2) if as_json else table(rows)
