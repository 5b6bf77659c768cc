"""Small files read whole: regular ones only, and never more of them than a limit."""

import os
import stat
from collections.abc import Callable
from pathlib import Path

from dsfp4.errors import CheckpointError, Dsfp4Error, IoError

# A tokenizer of 256,000 tokens has 35 MB; as Python's objects a file of this size takes about 1 GB.
MOST_BYTES = 64 << 20


def read_file(path: Path, most: int, refuse: Callable[[str], Dsfp4Error]) -> bytes:
    """Return the bytes of the file `path`, `most` of them at most. A pipe is not waited for.

    Raises IoError where the system refuses, with `file` and `errno`. A file that is longer, is not
    a regular one or changes meanwhile raises what `refuse` makes of a sentence that names it.
    """
    try:
        # O_NONBLOCK: opening a pipe must not wait for its other end.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise refuse(f"'{path}' is not a regular file")
            size = status.st_size
            if size > most:
                raise refuse(f"'{path}' has {size} bytes; the limit is {most}")
            with os.fdopen(descriptor, "rb", closefd=False) as file:
                data = file.read(size + 1)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise IoError(
            f"cannot read '{path}': {error.strerror}", file=str(path), errno=error.errno or 0
        ) from error
    if len(data) != size:
        raise refuse(f"'{path}' changed while it was read; try again")
    return data


def read_checkpoint_file(path: Path) -> bytes:
    """Return the bytes of a small file of a checkpoint, MOST_BYTES of them at most.

    Raises IoError, and CheckpointError for a file that is longer or is not a regular one.
    """
    return read_file(path, MOST_BYTES, lambda problem: CheckpointError(problem, file=str(path)))
