"""Chat templates, rendered in a sandbox."""

import json
import shutil
from pathlib import Path

import pytest

from dsfp4.chat import ChatTemplate
from dsfp4.errors import CheckpointError, UnsupportedError
from dsfp4.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(demo_model: Path) -> Tokenizer:
    return Tokenizer(demo_model)


def with_template(folder: Path, template: object, tokenizer: Tokenizer) -> ChatTemplate:
    text = json.dumps({"chat_template": template})
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    return ChatTemplate(folder, tokenizer)


def test_a_question_becomes_the_prompt_of_an_answer(demo_model: Path, tokenizer: Tokenizer) -> None:
    prompt = ChatTemplate(demo_model, tokenizer).render([{"role": "user", "content": "Who?"}])
    assert prompt == "<｜begin▁of▁sentence｜><｜User｜>Who?<｜Assistant｜><think>\n"
    ids = tokenizer.encode(prompt)
    assert ids[:2] == [0, 4092]
    assert ids[-3:-1] == [4093, 4094]


def test_earlier_turns_lose_their_thoughts(demo_model: Path, tokenizer: Tokenizer) -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "A"},
        {"role": "assistant", "content": "hm</think>\nB"},
        {"role": "user", "content": "C"},
    ]
    prompt = ChatTemplate(demo_model, tokenizer).render(turns, add_generation_prompt=False)
    assert prompt == (
        "<｜begin▁of▁sentence｜>Be brief."
        "<｜User｜>A<｜Assistant｜>B<｜end▁of▁sentence｜><｜User｜>C"
    )


def test_without_a_template(tmp_path: Path, demo_model: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(UnsupportedError, match="chat_template"):
        ChatTemplate(tmp_path, tokenizer)
    shutil.copyfile(demo_model / "tokenizer.json", tmp_path / "tokenizer.json")
    with pytest.raises(UnsupportedError, match="chat_template"):
        with_template(tmp_path, 3, tokenizer)


def test_a_malformed_template_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(CheckpointError, match=r"chat_template in .*tokenizer_config\.json"):
        with_template(tmp_path, "{% if %}", tokenizer)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].no_such_method() }}",
    ],
)
def test_templates_are_caged(tmp_path: Path, tokenizer: Tokenizer, template: str) -> None:
    chat = with_template(tmp_path, template, tokenizer)
    with pytest.raises(CheckpointError, match="chat_template"):
        chat.render([{"role": "user", "content": "x"}])
