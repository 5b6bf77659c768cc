"""Stop strings: found across pieces, never shown."""

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsfp4 import DeepseekInference
from dsfp4.errors import ParameterError
from dsfp4.stop import StopFinder

PROMPT = "And the king said unto"


def run(strings: tuple[str, ...], pieces: list[str]) -> tuple[list[str], bool]:
    finder = StopFinder(strings)
    shown = [finder.push(piece) for piece in pieces]
    return [*shown, finder.finish()], finder.found


def expected(strings: tuple[str, ...], text: str) -> tuple[str, bool]:
    """By definition: the shortest beginning that ends with a stop string, without it."""
    for end in range(len(text) + 1):
        found = [string for string in strings if text[:end].endswith(string)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


@given(
    strings=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3).map(tuple),
    pieces=st.lists(st.text("ab\nc", max_size=4), max_size=12),
)
def test_against_the_definition(strings: tuple[str, ...], pieces: list[str]) -> None:
    shown, found = run(strings, pieces)
    assert ("".join(shown), found) == expected(strings, "".join(pieces))


def test_no_part_is_shown_before_it_is_certain() -> None:
    finder = StopFinder(("\nUser:", "END"))
    pieces = ["Hi\n", "Us", "e", "d E", "N", "ough", "\nUser", ":", "more"]
    assert [finder.push(piece) for piece in pieces] == [
        "Hi", "", "", "\nUsed ", "", "ENough", "", "", "",
    ]  # fmt: skip
    assert finder.found
    assert finder.finish() == ""


@pytest.fixture(scope="module")
def whole(demo: DeepseekInference) -> Any:
    return demo.generate(PROMPT, 24, 0, raw=True, stop_ids=[])


def test_every_stop_string_of_a_text(demo: DeepseekInference, whole: Any) -> None:
    """Many of these begin or end within a token."""
    for start, length in itertools.product(range(2, len(whole) - 9, 7), (1, 3, 8)):
        stop = whole[start : start + length]
        text = demo.generate(PROMPT, 24, 0, raw=True, stop_ids=[], stop=[stop, "no such text"])
        assert text == whole[: whole.index(stop)]
        assert text.finish_reason == "stop"
        assert text.tokens == whole.tokens[: len(text.tokens)]
        written = demo.tokenizer.decode(text.tokens)
        assert stop in written
        assert stop not in demo.tokenizer.decode(text.tokens[:-1])  # not a token too many


def test_streams_stop_alike(demo: DeepseekInference, whole: Any) -> None:
    stop = whole[len(whole) // 2 :][:5]
    with demo.generate(PROMPT, 24, 0, raw=True, stop_ids=[], stop=stop, stream=True) as stream:
        pieces = list(stream)
    assert "".join(pieces) == whole[: whole.index(stop)] == stream.result
    assert stream.result is not None and stream.result.finish_reason == "stop"


def test_held_text_comes_at_the_end(demo: DeepseekInference, whole: Any) -> None:
    stop = whole[-3:] + "and something else"
    text = demo.generate(PROMPT, 24, 0, raw=True, stop_ids=[], stop=stop)
    assert (text, text.finish_reason) == (whole, "length")


@pytest.mark.parametrize("stop", ["", [""], ["a", ""], [1], 3, {"a"}], ids=repr)
def test_bad_stop_strings(demo: DeepseekInference, stop: Any) -> None:
    with pytest.raises(ParameterError) as error:
        demo.generate(PROMPT, 4, stop=stop)
    assert error.value.parameter == "stop"
