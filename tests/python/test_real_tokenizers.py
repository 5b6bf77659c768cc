"""DeepSeek's real tokenizers and templates: Hugging Face's ids, and no forged markup."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import pytest

from dsfp4.chat import ChatTemplate
from dsfp4.tokenizer import Tokenizer
from fixtures.real_tokenizers import (
    COUNT,
    chat_template,
    digest_of,
    golden,
    string_digests,
    write_tokenizer,
)
from fixtures.texts import conversations, hostile_conversations

HOSTILE = 500


class Checkpoint:
    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.tokenizer = Tokenizer(write_tokenizer(name, folder))
        self.template = ChatTemplate(folder, self.tokenizer) if name != "v4" else None
        self.golden = golden()[name]
        self.added = {token["id"]: token["content"] for token in self.golden["added_tokens"]}

    def markup_of(self, ids: list[int]) -> list[str]:
        return [self.added[id] for id in ids if id in self.added]


@pytest.fixture(scope="module", params=["r1", "v31", "v4"])
def checkpoint(request: Any, tmp_path_factory: Any) -> Iterator[Checkpoint]:
    yield Checkpoint(request.param, tmp_path_factory.mktemp(request.param))


def prompt_of(checkpoint: Checkpoint, talk: dict[str, Any]) -> Any:
    if checkpoint.name == "r1":  # its template has no switch
        talk = {key: value for key, value in talk.items() if key != "thinking"}
    return checkpoint.template.prompt(**talk)


def test_strings_have_hugging_face_ids(checkpoint: Checkpoint) -> None:
    digests = string_digests(checkpoint.tokenizer.encode, list(checkpoint.added.values()), COUNT)
    assert digests == checkpoint.golden["strings"]


def test_conversations_have_hugging_face_ids(checkpoint: Checkpoint) -> None:
    if checkpoint.template is None:
        assert "conversations" not in checkpoint.golden  # V4 comes without a template
        return
    expected = checkpoint.golden["conversations"]
    talks = list(conversations(len(expected)))
    assert [digest_of(prompt_of(checkpoint, talk).ids) for talk in talks] == expected


def neutral(value: Any, role: bool = False) -> Any:
    """The conversation with all its texts harmless."""
    if isinstance(value, str):
        return value if role else "x"
    if isinstance(value, list):
        return [neutral(item) for item in value]
    if isinstance(value, dict):
        return {key: neutral(item, key == "role") for key, item in value.items()}
    return value


def test_hostile_conversations_forge_nothing(checkpoint: Checkpoint) -> None:
    if checkpoint.template is None:
        return
    tokens = {
        key: checkpoint.golden["config"][key]["content"] for key in ("bos_token", "eos_token")
    }
    plain = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(
        chat_template(checkpoint.name)
    )
    forged = 0
    for talk in hostile_conversations(list(checkpoint.added.values()), HOSTILE):
        prompt = prompt_of(checkpoint, talk)
        own = checkpoint.markup_of(prompt_of(checkpoint, neutral(talk)).ids)
        assert checkpoint.markup_of(prompt.ids) == own
        rendered = plain.render(add_generation_prompt=True, **tokens, **talk)
        assert prompt.text == rendered
        forged += checkpoint.markup_of(checkpoint.tokenizer.encode(rendered)) != own
    assert forged > HOSTILE * 0.9  # without the disguise, nearly each would have succeeded


def test_plain_encoding_spells_markup_out(checkpoint: Checkpoint) -> None:
    for token in checkpoint.added.values():
        ids = checkpoint.tokenizer.encode_plain(token)
        assert checkpoint.markup_of(ids) == []
        assert checkpoint.tokenizer.decode(ids) == token
