"""Where a model lies: a checkpoint folder, or the built-in demo model."""

import errno
import os
from pathlib import Path

from dsfp4.errors import IoError

DEMO = "demo"


def resolve_model(path: str | os.PathLike[str]) -> Path:
    """Return the absolute checkpoint folder that `path` means.

    The word "demo" is the built-in model; a folder of that name is "./demo". Raises IoError if
    there is no such folder.
    """
    folder = Path(__file__).with_name("demo_model") if path == DEMO else Path(path)
    folder = folder.expanduser().absolute()
    if not folder.is_dir():
        raise IoError(
            f"'{folder}' is not a folder; give the folder of a checkpoint, or the word '{DEMO}' "
            "for the built-in model",
            file=str(folder),
            errno=errno.ENOTDIR if folder.exists() else errno.ENOENT,
        )
    return folder
