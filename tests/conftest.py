"""Fixtures for all tests. That this file is here also puts `fixtures` on the import path."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from fixtures.cases import CASES
from fixtures.random_checkpoint import write_checkpoint


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """name of a case -> folder of its checkpoint, written once a session; do not change it."""

    @cache
    def folder(name: str) -> Path:
        path = tmp_path_factory.mktemp("checkpoints") / name
        write_checkpoint(CASES[name], path)
        return path

    return folder
