"""Runs a command while the rest of the machine's memory is held.

    python bench/hold_memory.py --leave 8.7 -- dsfp4 bench decode MODEL --cpu-cache-size 4

MemAvailable of /proc/meminfo is GB (10^9 bytes) as the command begins. What is held is locked: it
is neither swapped nor cached away. An ordinary user may lock as much as `ulimit -l` says, mostly 8
MiB, so this needs root or a higher limit. A control group's own limit is not looked at.
"""

import argparse
import ctypes
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PIECE = 256 << 20
CLOSE_ENOUGH = 32 << 20  # of what is to be left; the machine's other processes move, too


def main() -> int:
    """Hold, run, and return the command's exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--leave", type=float, required=True, metavar="GB")
    parser.add_argument("command", nargs="+", metavar="COMMAND")
    arguments = parser.parse_args()
    if not 0 < arguments.leave * 1e9 <= available():
        parser.error(f"--leave must be over 0 and at most MemAvailable, {available() / 1e9:.2f} GB")
    try:
        with held(int(arguments.leave * 1e9)) as size:
            print(
                f"holding {size / 1e9:.2f} GB; MemAvailable is {available() / 1e9:.2f} GB",
                file=sys.stderr,
            )
            return subprocess.run(arguments.command, check=False).returncode
    except OSError as error:
        parser.exit(1, f"{parser.prog}: {error}\n")


def available() -> int:
    """Return MemAvailable in bytes."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    raise OSError("/proc/meminfo has no MemAvailable")


@contextmanager
def held(leave: int) -> Iterator[int]:
    """Lock memory until `leave` bytes are available; yields the bytes that are held."""
    pieces: list[mmap.mmap] = []
    try:
        while (rest := available() - leave) > CLOSE_ENOUGH:
            pieces.append(locked(min(PIECE, rest)))
        yield sum(map(len, pieces))
    finally:
        for piece in pieces:
            piece.close()


def locked(size: int) -> mmap.mmap:
    """Return that many bytes of memory, locked. Raises OSError."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    memory.madvise(mmap.MADV_DONTFORK)
    libc = ctypes.CDLL(None, use_errno=True)
    first = ctypes.c_char.from_buffer(memory)
    refused = libc.mlock(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(size)) != 0
    del first  # or the memory cannot be closed
    if refused:
        problem = os.strerror(ctypes.get_errno())
        memory.close()
        more = f"{size / 1e6:.0f} MB more cannot be locked ({problem})"
        raise OSError(f"{more}: run as root, or raise ulimit -l")
    return memory


if __name__ == "__main__":
    sys.exit(main())
