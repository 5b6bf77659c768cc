"""The small JSON files of a checkpoint folder, read with errors that name the file."""

import json
import os
from pathlib import Path
from typing import Any

from dsfp4.errors import CheckpointError
from dsfp4.files import read_checkpoint_file


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`. Raises IoError, or CheckpointError if it is none."""
    return parse_json(read_checkpoint_file(path), path)


def parse_json(data: bytes, path: Path) -> dict[str, Any]:
    """Return the JSON object that `data` of the file `path` is. Raises CheckpointError."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"'{path}' is not valid JSON: {error}", file=str(path)) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"'{path}' does not hold a JSON object", file=str(path))
    return value


def read_optional_json(path: Path) -> dict[str, Any]:
    """Like read_json, but an absent file is an empty object. A link that leads nowhere is none."""
    return read_json(path) if os.path.lexists(path) else {}
