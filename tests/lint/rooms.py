"""Checks what a file of cpp/ may include: rooms to its left, and addresses only where they belong.

A DevicePtr is opened by those who implement memory and devices. If others did, the host would read
a GPU's memory as if it were its own.
"""

import re
import sys
from pathlib import Path

ROOMS = (
    "base", "format", "checkpoint", "storage", "memory", "ops", "residency", "model", "engine",
    "bindings",
)  # fmt: skip
OPENERS = {
    "base/device_access.h": ("memory", "ops"),
    "ops/raw.h": ("ops",),
}
# The one place that must hand a pointer to a caller's framework, and benchmarks of kernels.
ALLOWED = {"bindings/bind_cuda_ops.cpp", "engine/bench_cuda.cpp", "engine/gpu_rates.cpp"}


def problems(root: Path) -> list[str]:
    found = []
    for path in sorted(root.rglob("*")):
        if path.suffix not in (".h", ".cpp", ".cu", ".cuh"):
            continue
        name = path.relative_to(root).as_posix()
        room = name.split("/")[0]
        for header in re.findall(r'^#include "([^"]+)"', path.read_text(), re.MULTILINE):
            target = header.split("/")[0]
            if target in ROOMS and ROOMS.index(target) > ROOMS.index(room):
                found.append(f"cpp/{name}: includes {header}, of a room to its right")
            if room not in OPENERS.get(header, (room,)) and name not in ALLOWED:
                found.append(f"cpp/{name}: includes {header}, which is for {OPENERS[header]}")
    return found


def main() -> int:
    found = problems(Path(__file__).resolve().parents[2] / "cpp")
    print("\n".join(found), end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
