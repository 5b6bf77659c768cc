"""The tokenizer against Hugging Face's own encoding and decoding of the same files."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from dsfp4.errors import CheckpointError, IoError, ParameterError, UnsupportedError
from dsfp4.tokenizer import Tokenizer

TEXTS = [
    "What is a file system?",
    "  two  spaces\n\n",
    "naïve café",
    "数据库 与 文件",
    "👩‍👩‍👧 ok",
    "",
]
BEYOND_VOCABULARY = 4100


@pytest.fixture(scope="module")
def ours(demo_model: Path) -> Tokenizer:
    return Tokenizer(demo_model)


@pytest.fixture(scope="module")
def theirs(demo_model: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(demo_model / "tokenizer.json"))


@pytest.fixture
def edited(demo_model: Path, tmp_path: Path) -> Any:
    """A function that loads a copy of the tokenizer with some fields of one file changed."""

    def load(file: str, **changes: Any) -> Tokenizer:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(demo_model / name, tmp_path / name)
        content = json.loads((tmp_path / file).read_text(encoding="utf-8"))
        (tmp_path / file).write_text(json.dumps(content | changes), encoding="utf-8")
        return Tokenizer(tmp_path)

    return load


@pytest.mark.parametrize("text", TEXTS)
def test_encodes_as_the_library_does(ours: Tokenizer, theirs: Any, text: str) -> None:
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(ours: Tokenizer, text: str) -> None:
    assert ours.decode(ours.encode(text)) == text


def test_prompt_starts_with_the_begin_id(ours: Tokenizer) -> None:
    assert ours.encode_prompt("And the king") == [0, *ours.encode("And the king")]


def test_prompt_without_begin_id_where_the_checkpoint_wants_none(edited: Any) -> None:
    tokenizer = edited("tokenizer_config.json", add_bos_token=False)
    assert tokenizer.encode_prompt("And") == tokenizer.encode("And")


def test_token_objects_are_accepted(edited: Any) -> None:
    begin = {"__type": "AddedToken", "content": "<｜begin▁of▁sentence｜>"}
    assert edited("tokenizer_config.json", bos_token=begin).bos_id == 0


@given(ids=st.lists(st.integers(0, BEYOND_VOCABULARY), max_size=40))
def test_pieces_join_to_the_decoded_whole(ours: Tokenizer, theirs: Any, ids: list[int]) -> None:
    whole = theirs.decode(ids, skip_special_tokens=True)
    assert "".join(ours.decode_pieces(ids)) == whole
    assert ours.decode(ids) == whole


@given(text=st.text(max_size=30))
def test_pieces_never_split_a_character(ours: Tokenizer, text: str) -> None:
    pieces = list(ours.decode_pieces(ours.encode(text)))
    assert "".join(pieces) == text
    assert all(pieces)
    assert sum(piece.count("\ufffd") for piece in pieces) == text.count("\ufffd")


def test_pieces_come_as_soon_as_they_are_whole(ours: Tokenizer) -> None:
    ids = ours.encode("a👍b")
    assert len(ids) > 3  # the thumb is several tokens
    fed = iter(ids)
    pieces = ours.decode_pieces(fed)
    assert [next(pieces), next(pieces)] == ["a", "👍"]
    assert list(fed) == ids[-1:]  # no token beyond the thumb's last was asked for


def test_special_tokens_have_no_text(ours: Tokenizer) -> None:
    assert ours.decode([0, *ours.encode("x"), 1, 2]) == "x"


def test_markup_that_is_not_special_has_text(ours: Tokenizer) -> None:
    assert ours.decode([4094, 4095]) == "<think></think>"


def test_lone_surrogates_are_refused(ours: Tokenizer) -> None:
    with pytest.raises(ParameterError, match="character 2") as error:
        ours.encode("ab\udcff")
    assert error.value.parameter == "prompt"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(IoError, match=r"tokenizer\.json") as error:
        Tokenizer(tmp_path)
    assert error.value.file == str(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("content", ["{", "[]", '"text"', "\xff", "[" * 100_000])
def test_malformed_json_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer(tmp_path)


def test_an_invalid_tokenizer_is_refused(edited: Any) -> None:
    with pytest.raises(CheckpointError, match="malformed"):
        edited("tokenizer.json", model={"type": "BPE", "vocab": 3})


def test_other_kinds_of_tokenizer_are_refused(edited: Any) -> None:
    with pytest.raises(UnsupportedError, match="byte-level"):
        edited("tokenizer.json", decoder={"type": "WordPiece", "prefix": "##", "cleanup": True})


@pytest.mark.parametrize("bos_token", [None, "<no such token>"])
def test_a_begin_token_that_is_not_there_is_refused(edited: Any, bos_token: str | None) -> None:
    with pytest.raises(CheckpointError, match="add_bos_token"):
        edited("tokenizer_config.json", bos_token=bos_token)


def test_markup_as_plain_text(ours: Tokenizer) -> None:
    for token in ours.markup:
        ids = ours.encode_plain(f"a{token}b")
        assert ours.decode(ids) == f"a{token}b"
        assert not {0, 1, 2, 4092, 4093, 4094, 4095} & set(ids)
    assert ours.encode_plain("no markup") == ours.encode("no markup")


def test_added_tokens_that_the_vocabulary_can_spell(edited: Any, demo_model: Path) -> None:
    content = json.loads((demo_model / "tokenizer.json").read_text(encoding="utf-8"))
    word = next(text for text in content["model"]["vocab"] if text.isascii() and len(text) == 5)
    token = dict(content["added_tokens"][-1], content=word, id=content["model"]["vocab"][word])
    tokenizer = edited("tokenizer.json", added_tokens=[*content["added_tokens"], token])
    assert tokenizer.encode(word) == [token["id"]]
    ids = tokenizer.encode_plain(word)
    assert token["id"] not in ids
    assert tokenizer.decode(ids) == word


def test_normalizers_are_refused(edited: Any) -> None:
    with pytest.raises(UnsupportedError, match="normalizer"):
        edited("tokenizer.json", normalizer={"type": "NFKC"})
