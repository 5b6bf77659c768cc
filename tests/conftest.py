"""Fixtures for all tests. That this file is here also puts `fixtures` on the import path."""

import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from hypothesis import settings

from fixtures.cases import CASES
from fixtures.random_checkpoint import write_checkpoint

settings.register_profile("dsfp4", deadline=None)  # no test judges by the clock
settings.load_profile("dsfp4")


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """name of a case -> folder of its checkpoint, written once a session; do not change it."""

    @cache
    def folder(name: str) -> Path:
        path = tmp_path_factory.mktemp("checkpoints") / name
        write_checkpoint(CASES[name], path)
        return path

    return folder


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """A shell lets what it starts in the background ignore Ctrl-C; the tests of it need it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
