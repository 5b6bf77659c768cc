"""Reasoning apart from the answer, wherever the text is cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsfp4.thinking import ThinkingSplitter

CASES = [
    # prompt ends in thoughts, text, reasoning, answer
    (True, "\nhm, well\n</think>\n\nYes.", "hm, well", "Yes."),
    (True, "</think>Yes.", "", "Yes."),
    (True, "never closed </thin", "never closed </thin", ""),
    (True, "no end </think", "no end </think", ""),
    (True, "a </thing> b </think> c </think> d", "a </thing> b", "c </think> d"),
    (True, "  \n ", "", ""),
    (True, "a  \n", "a", ""),
    (False, "<think>\nhm\n</think>\n\nYes.\n", "hm", "Yes.\n"),
    (False, "\n\n<think>hm</think>Yes", "hm", "Yes"),
    (False, " Yes, <think> is a tag </think>", "", " Yes, <think> is a tag </think>"),
    (False, "<thinking>", "", "<thinking>"),
    (False, "\n<thi", "", "\n<thi"),
    (False, "", "", ""),
]


def split(thinking: bool, pieces: list[str]) -> tuple[str, str]:
    splitter = ThinkingSplitter(thinking)
    parts = [part for piece in pieces for part in splitter.push(piece)]
    parts += splitter.finish()
    assert all(text for _, text in parts)
    kinds = [kind for kind, _ in parts]
    assert kinds == sorted(kinds, reverse=True)  # reasoning first
    reasoning = "".join(text for kind, text in parts if kind == "reasoning")
    return reasoning, "".join(text for kind, text in parts if kind == "answer")


@pytest.mark.parametrize(("thinking", "text", "reasoning", "answer"), CASES)
def test_wherever_it_is_cut(thinking: bool, text: str, reasoning: str, answer: str) -> None:
    assert split(thinking, [text]) == (reasoning, answer)
    assert split(thinking, list(text)) == (reasoning, answer)
    for cut in range(len(text)):
        assert split(thinking, [text[:cut], text[cut:]]) == (reasoning, answer)


@given(
    thinking=st.booleans(),
    parts=st.lists(st.sampled_from(["<think>", "</think>", "<", "</thi", "nk>", "a", " ", "\n"])),
    data=st.data(),
)
def test_cuts_do_not_matter(thinking: bool, parts: list[str], data: st.DataObject) -> None:
    text = "".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)))))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert split(thinking, pieces) == split(thinking, [text])


def test_what_is_certain_comes_at_once() -> None:
    splitter = ThinkingSplitter(True)
    assert list(splitter.push("so <")) == [("reasoning", "so")]
    assert list(splitter.push("b>")) == [("reasoning", " <b>")]
    assert list(splitter.push("</think>\nY")) == [("answer", "Y")]
    assert list(splitter.push(" <")) == [("answer", " <")]
