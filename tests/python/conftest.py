"""Fixtures of the Python tests: the demo model, as a folder and loaded, and chat templates."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dsfp4 import DeepseekInference
from dsfp4.chat import ChatTemplate
from dsfp4.demo import resolve_model
from dsfp4.tokenizer import Tokenizer
from fixtures.real_tokenizers import chat_template, write_tokenizer


@pytest.fixture(scope="session")
def demo_model() -> Path:
    return resolve_model("demo")


@pytest.fixture(scope="session")
def demo() -> Iterator[DeepseekInference]:
    with DeepseekInference("demo") as model:
        yield model


@pytest.fixture
def chat(demo_model: Path, tmp_path: Path) -> Callable[[str], ChatTemplate]:
    """Return the demo model's tokenizer with the template that is given."""

    def make(template: str) -> ChatTemplate:
        text = json.dumps({"chat_template": template})
        (tmp_path / "tokenizer_config.json").write_text(text, encoding="utf-8")
        return ChatTemplate(tmp_path, Tokenizer(demo_model))

    return make


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ChatTemplate]:
    """Return a published template with the tokenizer that has its markup; may skip."""
    made: dict[str, ChatTemplate] = {}

    def make(name: str) -> ChatTemplate:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            write_tokenizer(name if name in ("r1", "v31") else "v31", folder)
            path = folder / "tokenizer_config.json"
            config = json.loads(path.read_text()) | {"chat_template": chat_template(name)}
            path.write_text(json.dumps(config))
            made[name] = ChatTemplate(folder, Tokenizer(folder))
        return made[name]

    return make
