"""Tool calls apart from an answer's text, wherever it is cut, and as pieces of a stream."""

import codecs
import json
import pickle
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsfp4 import DeepseekInference
from dsfp4.cli.terminal import print_folded
from dsfp4.cli.text import facts, print_stream
from dsfp4.stream import TextStream
from dsfp4.text import Piece, Text, TextBuilder
from dsfp4.tokenizer import (
    CALL_BEGIN,
    CALL_END,
    CALL_SEPARATOR,
    CALLS_BEGIN,
    CALLS_END,
    Tokenizer,
)
from dsfp4.tool_calls import ToolCall, ToolCallSplitter
from fixtures.real_tokenizers import write_tokenizer

SEPARATOR = CALL_SEPARATOR

ARGUMENTS = '{"city": "Zürich 🙂", "code": "```x```", "list": [1, {"a": "}"}]}'


def v31(name: str, arguments: str) -> str:
    return f"{CALL_BEGIN}{name}{SEPARATOR}{arguments}{CALL_END}"


def r1(name: str, arguments: str) -> str:
    return f"{CALL_BEGIN}function{SEPARATOR}{name}\n```json\n{arguments}\n```{CALL_END}"


def block(*calls: str, between: str = "") -> str:
    return CALLS_BEGIN + between.join(calls) + CALLS_END


TWO = [("get_weather", ARGUMENTS), ("time", "{}")]
CASES: list[tuple[str, str, str, list[tuple[str, str]]]] = [
    ("no calls", "Just text <｜tool, { ```json", "Just text <｜tool, { ```json", []),
    ("V3.1", "I look.\n\n" + block(*(v31(*call) for call in TWO)), "I look.\n\n", TWO),
    ("R1 and V3", block(*(r1(*call) for call in TWO), between="\n"), "", TWO),
    ("a block with breaks", block("\n", *(v31(*call) for call in TWO), "\n"), "", TWO),
    ("R1 without a block", "So: " + r1(*TWO[0]), "So: ", TWO[:1]),
    ("text behind", block(v31(*TWO[1])) + " Done.", " Done.", TWO[1:]),
    ("two blocks", block(r1(*TWO[0])) + "and" + block(v31(*TWO[1])), "and", TWO),
    ("V3.1 in a fence", block(v31("time", "```json\n{}\n```")), "", TWO[1:]),
    ("R1 without a fence", block(f"{CALL_BEGIN}function{SEPARATOR}time\n{{}}{CALL_END}"), "",
     TWO[1:]),
    ("R1 without breaks", block(f"{CALL_BEGIN}function{SEPARATOR}time```{{}}```{CALL_END}"), "",
     TWO[1:]),
    ("another type", block(f"{CALL_BEGIN}tool{SEPARATOR}time\n```json\n{{}}\n```{CALL_END}"), "",
     TWO[1:]),
    ("a tool called function", block(v31("function", "{}")), "", [("function", "{}")]),
    ("no arguments", block(v31("now", ""), v31("then", "{}")), "", [("now", ""), ("then", "{}")]),
    ("arguments that are no object", block(v31("now", "null")), "", [("now", "null")]),
    ("arguments that are a list", block(v31("sum", "[1, 2]")), "", [("sum", "[1, 2]")]),
    ("no ends", f"{CALLS_BEGIN}{CALL_BEGIN}a{SEPARATOR}{{}}{CALL_BEGIN}b{SEPARATOR}{{}}{CALLS_END}",
     "", [("a", "{}"), ("b", "{}")]),
    ("cut in the arguments", block(v31(*TWO[1])) + CALL_BEGIN + "a" + SEPARATOR + '{"x": "y ',
     "", [("time", "{}"), ("a", '{"x": "y')]),
    ("cut in the fence", CALLS_BEGIN + r1("a", '{"x": 1}')[: -len(CALL_END) - 1], "",
     [("a", '{"x": 1}')]),
    ("cut behind a call", CALLS_BEGIN + v31(*TWO[1]) + "\n", "", TWO[1:]),
    # A call without a name is text, as it was written.
    ("cut in the name", f"Hm {CALLS_BEGIN}{CALL_BEGIN}get_w", f"Hm {CALLS_BEGIN}{CALL_BEGIN}get_w",
     []),
    ("cut in R1's name", f"{CALL_BEGIN}function{SEPARATOR}get_w",
     f"{CALL_BEGIN}function{SEPARATOR}get_w", []),
    ("the mark in words", f"{CALLS_BEGIN} opens a block", f"{CALLS_BEGIN} opens a block", []),
    ("no separator", block(f"{CALL_BEGIN}what{CALL_END}"), block(f"{CALL_BEGIN}what{CALL_END}"),
     []),
    ("no name", block(v31("", "{}")), block(v31("", "{}")), []),
    ("R1 without a name", v31("function", ""), v31("function", ""), []),
    ("a name without end", CALL_BEGIN + "a" * 300 + SEPARATOR + "{}",
     CALL_BEGIN + "a" * 300 + SEPARATOR + "{}", []),
    ("the longest name", v31("a" * 256, "{}"), "", [("a" * 256, "{}")]),
]  # fmt: skip


def split(pieces: Iterable[str]) -> tuple[str, list[tuple[str, str]]]:
    splitter = ToolCallSplitter()
    parts = [part for piece in pieces for part in splitter.push(piece)]
    parts += splitter.finish()
    calls: list[tuple[str, str]] = []
    for part in parts:
        assert part.text or part.name
        if part.index >= 0:
            if part.index == len(calls):
                assert part.text == ""  # the name comes first, alone
                calls.append((part.name, ""))
            assert part.index == len(calls) - 1
            assert part.name == calls[-1][0]
            calls[-1] = (part.name, calls[-1][1] + part.text)
    return "".join(part.text for part in parts if part.index < 0), calls


@pytest.mark.parametrize(("text", "answer", "calls"), [case[1:] for case in CASES],
                         ids=[case[0] for case in CASES])  # fmt: skip
def test_wherever_it_is_cut(text: str, answer: str, calls: list[tuple[str, str]]) -> None:
    assert split([text]) == (answer, calls)
    assert split(text) == (answer, calls)
    for cut in range(len(text)):
        assert split([text[:cut], text[cut:]]) == (answer, calls)


@pytest.mark.parametrize("form", [v31, r1])
def test_cut_at_every_byte(form: Any) -> None:
    data = ("Grüße 🙂 " + block(*(form(*call) for call in TWO))).encode()
    for cut in range(len(data)):
        decode = codecs.getincrementaldecoder("utf-8")().decode
        assert split([decode(data[:cut]), decode(data[cut:])]) == ("Grüße 🙂 ", TWO)


PARTS = [CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END, SEPARATOR, "function", "name", "{", "}", '"',
         "```", "`", "json", "\n", " ", "x", "<", "<｜tool▁call", "a" * 250]  # fmt: skip


@given(parts=st.lists(st.sampled_from(PARTS), max_size=14), data=st.data())
def test_cuts_do_not_matter(parts: list[str], data: st.DataObject) -> None:
    text = "".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)))))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = split([text])
    assert split(pieces) == whole == split(text)
    assert whole[1] or whole[0] == text  # without a call nothing is lost


def test_what_is_certain_comes_at_once() -> None:
    splitter = ToolCallSplitter()
    assert [part.text for part in splitter.push("Well <")] == ["Well "]
    assert [part.text for part in splitter.push("b>")] == ["<b>"]
    assert not list(splitter.push(f"{CALLS_BEGIN}{CALL_BEGIN}get{SEPARATOR}"))
    parts = list(splitter.push('{"a":'))
    assert [(part.text, part.index, part.name) for part in parts] == [
        ("", 0, "get"),
        ('{"a":', 0, "get"),
    ]


class Result(SimpleNamespace):
    """What the core says of a generation."""

    def __init__(self) -> None:
        super().__init__(finish_reason="length", prompt_tokens=1, prefill_seconds=0.0)
        self.decode_seconds, self.logprobs = 0.0, []


def built(
    tokenizer: Tokenizer, ids: Iterable[int], *, thinking: bool | None, stop: tuple[str, ...] = (),
    continued: bool = False,
) -> tuple[list[Piece], Text]:  # fmt: skip
    """Stream `ids`; check that the pieces are the whole, and return both."""
    builder = TextBuilder(tokenizer, thinking, stop, continued)
    pieces: list[Piece] = []
    for id in ids:
        pieces += builder.push(id)
        if builder.stopped:
            break
    pieces += builder.finish()
    text = builder.text(Result())  # type: ignore[arg-type]

    def joined(kind: str, call: int = -1) -> str:
        return "".join(piece for piece in pieces if (piece.kind, piece.call) == (kind, call))

    assert joined("answer") == text
    assert joined("reasoning") == text.reasoning
    calls = [joined("tool_call", i) for i in range(len(text.tool_calls))]
    assert calls == [call.arguments for call in text.tool_calls]
    return pieces, text


@pytest.fixture(scope="module")
def tokenizer(demo_model: Path) -> Tokenizer:
    return Tokenizer(demo_model)


@pytest.mark.parametrize("form", [v31, r1])
@pytest.mark.parametrize("thinking", [True, False])
def test_calls_become_pieces_of_the_stream(tokenizer: Tokenizer, form: Any, thinking: bool) -> None:
    thoughts = f"hm {CALL_BEGIN} is a mark\n</think>\n\n" if thinking else ""
    ids = tokenizer.encode(thoughts + "I look." + block(*(form(*call) for call in TWO)))
    pieces, text = built(tokenizer, ids, thinking=thinking)
    assert (text, text.reasoning) == ("I look.", f"hm {CALL_BEGIN} is a mark" if thinking else "")
    assert text.tool_calls == [ToolCall(*call) for call in TWO]
    assert json.loads(text.tool_calls[0].arguments)["city"] == "Zürich 🙂"
    kinds = [piece.kind for piece in pieces]
    assert kinds == sorted(kinds, key=["reasoning", "answer", "tool_call"].index)
    assert len(kinds) > 20
    copy = pickle.loads(pickle.dumps(pieces[-1]))
    assert (copy, copy.kind, copy.call, copy.name) == ("}", "tool_call", 1, "time")
    assert pickle.loads(pickle.dumps(text)).tool_calls == text.tool_calls
    assert text.as_message() == {
        "role": "assistant",
        "content": "I look.",
        "tool_calls": [
            {"type": "function", "function": {"name": name, "arguments": arguments}}
            for name, arguments in TWO
        ],
    }


def test_a_message_without_text_or_without_calls(tokenizer: Tokenizer) -> None:
    _, text = built(tokenizer, tokenizer.encode(block(v31(*TWO[1]))), thinking=False)
    assert text.as_message()["content"] is None
    _, text = built(tokenizer, tokenizer.encode("Hi"), thinking=False)
    assert text.as_message() == {"role": "assistant", "content": "Hi"}


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("name", ["r1", "v31"])
def test_marks_that_are_added_tokens(tmp_path: Path, name: str, special: bool) -> None:
    path = write_tokenizer(name, tmp_path) / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    marks = [CALLS_BEGIN, CALL_BEGIN, SEPARATOR, CALL_END, CALLS_END]
    for token in content["added_tokens"]:
        token["special"] = special if token["content"] in marks else token["special"]
    path.write_text(json.dumps(content), encoding="utf-8")
    tokenizer = Tokenizer(tmp_path)
    assert all(len(tokenizer.encode(mark)) == 1 for mark in marks)
    form = v31 if name == "v31" else r1
    _, text = built(tokenizer, tokenizer.encode("Hm." + block(form(*TWO[0]))), thinking=False)
    assert (text, text.tool_calls) == ("Hm.", [ToolCall(*TWO[0])])


def test_a_raw_continuation_keeps_its_marks(tokenizer: Tokenizer) -> None:
    written = "I look." + block(v31(*TWO[0]))
    _, text = built(tokenizer, tokenizer.encode(written), thinking=None)
    assert (text, text.tool_calls) == (written, [])


def test_stop_strings_end_answers_but_not_calls(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a {" + block(v31("f", '{"x": "END"}')) + " b END c")
    _, text = built(tokenizer, ids, thinking=False, stop=("END",))
    assert (text, text.tool_calls) == ("a { b ", [ToolCall("f", '{"x": "END"}')])
    # Text held as the beginning of a stop string comes before the call.
    pieces, text = built(tokenizer, ids, thinking=False, stop=("{ b", "END"))
    assert (text, text.finish_reason) == ("a { b ", "stop")
    assert "".join(pieces[: [piece.kind for piece in pieces].index("tool_call")]) == "a {"
    _, text = built(tokenizer, ids, thinking=False, stop=("a",))
    assert (text, text.tool_calls) == ("", [])


def test_a_stop_string_in_the_thoughts_is_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("so END it\n</think>\n\nYes. END no")
    _, text = built(tokenizer, ids, thinking=True, stop=("END",))
    assert (text.reasoning, text) == ("so END it", "Yes. ")


@pytest.mark.parametrize("thinking", [True, False, None])
def test_a_limit_within_an_emoji(tokenizer: Tokenizer, thinking: bool | None) -> None:
    ids = tokenizer.encode("Hi 👩🏽")
    assert len(ids) > 4
    for count in range(len(ids) + 1):
        pieces, text = built(tokenizer, ids[:count], thinking=thinking)
        whole = tokenizer.decode(ids[:count])
        if thinking:
            assert (text.reasoning, text) == (whole.rstrip(), "")
        else:
            assert (text.reasoning, text) == ("", whole)
        assert all("\ufffd" not in piece for piece in pieces[:-1])


TAGS = [
    # prompt ends in thoughts, text, reasoning, answer
    (False, "No tags at all.", "", "No tags at all."),
    (True, "No tags at all.", "No tags at all.", ""),
    (False, "hm</think>Yes", "", "hm</think>Yes"),
    (True, "hm</think>Yes", "hm", "Yes"),
]


@pytest.mark.parametrize(("thinking", "written", "reasoning", "answer"), TAGS)
def test_tags_that_are_missing(
    tokenizer: Tokenizer, thinking: bool, written: str, reasoning: str, answer: str
) -> None:
    _, text = built(tokenizer, tokenizer.encode(written), thinking=thinking)
    assert (text.reasoning, text) == (reasoning, answer)


def test_a_text_that_goes_on_keeps_its_first_blank(tokenizer: Tokenizer) -> None:
    _, text = built(tokenizer, tokenizer.encode(" so\n</think> Yes"), thinking=True, continued=True)
    assert (text.reasoning, text) == (" so", "Yes")
    ids = tokenizer.encode(" <think>, a tag")
    _, text = built(tokenizer, ids, thinking=False, continued=True)
    assert (text.reasoning, text) == ("", " <think>, a tag")


def test_calls_in_a_terminal_and_as_json(
    tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = tokenizer.encode("I look." + block(*(v31(*call) for call in TWO)))
    pieces, text = built(tokenizer, ids, thinking=False)
    for show in (print_stream, print_folded):
        show(TextStream(lambda put: put(*pieces) and text))  # type: ignore[arg-type,return-value]
        assert capsys.readouterr().out == f"I look.\nget_weather {ARGUMENTS}\ntime {{}}\n"
    assert facts(text, "cpu")["tool_calls"] == [
        {"name": name, "arguments": arguments} for name, arguments in TWO
    ]


def test_a_model_that_answers_has_none(demo: DeepseekInference) -> None:
    assert demo.generate("Hello", 4).tool_calls == []


def written_by(model: DeepseekInference, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `model` write `text`, as far as max_tokens allows."""
    ids = model.tokenizer.encode(text)

    def generate(_: Any, *, max_tokens: int, on_token: Any, **others: Any) -> Any:
        for id in ids[:max_tokens]:
            if not on_token(id):
                break
        return Result()

    monkeypatch.setattr(model._model, "generate", generate)


USER = {"role": "user", "content": "Weather?"}


def test_a_chat_streams_what_it_returns(
    demo: DeepseekInference, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = "hm 👩🏽\n</think>\n\nI look. 👍🏽" + block(*(r1(*call) for call in TWO))
    written_by(demo, written, monkeypatch)
    for limit in range(len(demo.tokenizer.encode(written)) + 1):
        text = demo.chat([USER], limit, stop="never")
        with demo.chat([USER], limit, stop="never", stream=True) as stream:
            pieces = list(stream)
        assert "".join(piece for piece in pieces if piece.kind == "reasoning") == text.reasoning
        assert "".join(piece for piece in pieces if piece.kind == "answer") == text
        called: dict[int, ToolCall] = {}
        for piece in pieces:
            if piece.kind == "tool_call":
                so_far = called.get(piece.call, ToolCall(piece.name, "")).arguments
                called[piece.call] = ToolCall(piece.name, so_far + piece)
        assert list(called.values()) == text.tool_calls
        assert stream.result == text
    assert (text, text.reasoning) == ("I look. 👍🏽", "hm 👩🏽")
    assert text.tool_calls == [ToolCall(*call) for call in TWO]


def test_an_answer_that_goes_on_keeps_its_first_blank(
    demo: DeepseekInference, monkeypatch: pytest.MonkeyPatch
) -> None:
    written_by(demo, " is blue.", monkeypatch)
    turn = [USER, {"role": "assistant", "content": "The sky"}]
    assert demo.chat(turn, 20, continue_last=True) == " is blue."
    thoughts = [USER, {"role": "assistant", "reasoning_content": "The sky"}]
    text = demo.chat(thoughts, 20, continue_last=True)
    assert (text, text.reasoning) == ("", " is blue.")
