"""Fixtures of the Python tests: the demo model, as a folder and loaded."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from dsfp4 import DeepseekInference
from dsfp4.demo import resolve_model


@pytest.fixture(scope="session")
def demo_model() -> Path:
    return resolve_model("demo")


@pytest.fixture(scope="session")
def demo() -> Iterator[DeepseekInference]:
    with DeepseekInference("demo") as model:
        yield model
