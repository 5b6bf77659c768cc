"""Small files read whole: regular ones only, and never more of them than a limit."""

import os
import re
import stat
from collections.abc import Callable
from errno import ENOENT
from pathlib import Path

from dsfp4.errors import CheckpointError, Dsfp4Error, IoError

# A tokenizer of 256,000 tokens has 35 MB; as Python's objects a file of this size takes about 1 GB.
MOST_BYTES = 64 << 20
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_MOST_LFS_POINTER = 1024  # bytes; real ones have about 130


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

    Raises IoError, and CheckpointError for a file that is longer, is not a regular one or is a Git
    LFS pointer.
    """

    def refuse(problem: str) -> CheckpointError:
        return CheckpointError(problem, file=str(path))

    try:
        data = read_file(path, MOST_BYTES, refuse)
    except IoError as error:
        if error.errno != ENOENT or not path.is_symlink():
            raise
        raise IoError(
            f"cannot read '{path}': it is a link to '{os.readlink(path)}', which is not there: its "
            "download has stopped, or the file was moved; download it again",
            file=str(path),
            errno=ENOENT,
        ) from error
    if len(data) <= _MOST_LFS_POINTER and data.startswith(_LFS_POINTER):
        size = re.search(rb"^size (\d+)$", data, re.MULTILINE)
        of = f" of {size[1].decode()} bytes" if size else ""
        raise refuse(
            f"'{path}' is a Git LFS pointer in the place of a file{of}; run `git lfs pull` in its "
            "folder, or download the file"
        )
    return data
