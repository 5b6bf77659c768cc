"""Where a model lies: a checkpoint folder, the Hub's cache, or the built-in demo model."""

import errno
import os
import re
from pathlib import Path

from dsfp4 import hub
from dsfp4.errors import IoError, ParameterError

DEMO = "demo"


def resolve_model(path: str | os.PathLike[str]) -> Path:
    """Return the absolute checkpoint folder that `path` means.

    The word "demo" is the built-in model; a folder of that name is "./demo". A string "org/name" or
    "org/name@revision" that is no folder is a repository in the Hub's cache, and so is its folder
    "models--org--name" there. Raises IoError if there is neither, CheckpointError if the cache has
    only a part of it, and ParameterError for an empty string or a URL.
    """
    if isinstance(path, str):
        _refuse_other_text(path)
    folder = Path(__file__).with_name("demo_model") if path == DEMO else Path(path)
    folder = folder.expanduser().absolute()
    if folder.is_dir():
        has_config = (folder / hub.CONFIG).exists()
        return (None if has_config else hub.find_in_folder(folder)) or folder
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


def _refuse_other_text(text: str) -> None:
    """Raise ParameterError for what names no folder, and is no name of a repository."""
    if not text:
        raise ParameterError(
            "the model's name is empty; give the folder of a checkpoint, 'org/name' of a "
            f"repository, or '{DEMO}'",
            parameter="model",
        )
    if not re.match(r"[a-z][a-z0-9+.-]*://", text, re.IGNORECASE):
        return
    repository = hub.repository_of_url(text)
    advice = "give the folder of a checkpoint, or download it first"
    if repository is not None:
        advice = f"`dsfp4 pull {repository}` downloads it, and then '{repository}' is its name"
    raise ParameterError(f"'{text}' is a URL; {advice}", parameter="model")
