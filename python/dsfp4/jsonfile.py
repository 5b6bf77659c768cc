"""The small JSON files of a checkpoint folder, read with errors that name the file."""

import json
from pathlib import Path
from typing import Any

from dsfp4.errors import CheckpointError, IoError


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`. Raises IoError, or CheckpointError if it is none."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise IoError(
            f"cannot read '{path}': {error.strerror}", file=str(path), errno=error.errno or 0
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"'{path}' is not valid JSON: {error}", file=str(path)) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"'{path}' does not hold a JSON object", file=str(path))
    return value


def read_optional_json(path: Path) -> dict[str, Any]:
    """Like read_json, but an absent file is an empty object."""
    return read_json(path) if path.exists() else {}
