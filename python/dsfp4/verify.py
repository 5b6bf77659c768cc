"""Checks every byte of a checkpoint's tensors."""

import os
from pathlib import Path
from typing import Any

from dsfp4 import _core
from dsfp4._checks import check_integer
from dsfp4.demo import resolve_model
from dsfp4.errors import CheckpointError, ParameterError
from dsfp4.model import Progress

_MOST_THREADS = 1024
HASH_FILE = "dsfp4.xxh3.json"


def verify(
    path: str | os.PathLike[str],
    *,
    threads: int = 0,
    write: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Read all tensors of the checkpoint in folder `path`, in a few MiB for each thread.

    Scales and other values must be finite; where the folder has dsfp4.xxh3.json, each tensor's
    bytes must have the checksum (XXH3, 64 bits) that it gives. With `write`, and if nothing is
    wrong, that file is written; from then on loading checks it too. `threads`, to 1024, 0 is one
    for each core; `progress` is called with bytes done and in all. What loading would refuse for
    its headers or configuration is refused here as well, before anything is read.

    Returns files, tensors, bytes, compared (there were checksums), wrote, and problems: a list of
    file, tensor, offset (of the first byte at fault, in the file) and problem. Raises the errors of
    `dsfp4.errors`.
    """
    if check_integer("threads", threads) > _MOST_THREADS:
        raise ParameterError(
            f"threads must be 0 (one for each core) to {_MOST_THREADS}, not {threads}",
            parameter="threads",
        )
    workers = threads or len(os.sched_getaffinity(0))
    return _core.verify(str(resolve_model(path)), workers, bool(write), progress)


def check_sound(folder: Path, threads: int) -> None:
    """Where `folder` has checksums, compare them. Raises CheckpointError for the first problem."""
    if not (folder / HASH_FILE).exists():
        return
    problems = verify(folder, threads=threads)["problems"]
    if problems:
        first = problems[0]
        raise CheckpointError(
            f"'{first['file']}': '{first['tensor']}' at byte {first['offset']}: {first['problem']}",
            file=first["file"],
            tensor=first["tensor"],
            offset=first["offset"],
        )
