"""Where a model lies: a checkpoint folder, the Hub's cache, or the built-in demo model."""

import errno
import os
from pathlib import Path

from dsfp4 import hub
from dsfp4.errors import IoError

DEMO = "demo"


def resolve_model(path: str | os.PathLike[str]) -> Path:
    """Return the absolute checkpoint folder that `path` means.

    The word "demo" is the built-in model; a folder of that name is "./demo". A string "org/name" or
    "org/name@revision" that is no folder is a repository in the Hub's cache. Raises IoError if
    there is neither, and CheckpointError if the cache has only a part of it.
    """
    folder = Path(__file__).with_name("demo_model") if path == DEMO else Path(path)
    folder = folder.expanduser().absolute()
    if folder.is_dir():
        return folder
    repository = hub.parse_repository(path) if isinstance(path, str) else None
    if repository is None or folder.exists():
        raise IoError(
            f"'{folder}' is not a folder; give the folder of a checkpoint, or the word '{DEMO}' "
            "for the built-in model",
            file=str(folder),
            errno=errno.ENOTDIR if folder.exists() else errno.ENOENT,
        )
    cached = hub.find_in_cache(repository)
    if cached is None:
        raise IoError(
            f"'{path}' is neither a folder nor a repository in the Hub's cache, "
            f"'{hub.cache_folder()}'; `dsfp4 pull {repository}` downloads it if the Hub has it",
            file=str(folder),
            errno=errno.ENOENT,
        )
    return cached
