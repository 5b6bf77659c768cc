"""`dsfp4 chat`: turns, /commands, pipes, and a real terminal."""

import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from fcntl import ioctl
from pathlib import Path
from typing import Any

import pytest

from dsfp4 import DeepseekInference
from dsfp4.cli import main, terminal
from dsfp4.cli.session import COMMANDS, Session, WrongCommand, help_text

Capture = pytest.CaptureFixture[str]
QUESTION = "What is a file system?"
OPTIONS: dict[str, Any] = {
    **{"max_tokens": 60, "temperature": 0.5, "top_k": None, "top_p": None, "min_p": 0.0},
    **{"repetition_penalty": 1.0, "stop": [], "thinking": None, "seed": 1},
    **{"stop_ids": None, "logit_bias": {}},
}


@pytest.fixture
def session(demo: DeepseekInference) -> Session:
    return Session(demo, dict(OPTIONS))


def ask(session: Session, question: str) -> Any:
    with session.ask(question) as stream:
        for _ in stream:
            pass
    assert stream.result is not None
    session.answered(str(stream.result), stream.result.reasoning)
    return stream.result


def test_turns_are_those_of_chat(session: Session, demo: DeepseekInference) -> None:
    session.system = "Be brief."
    first = ask(session, QUESTION)
    second = ask(session, "And a disk?")
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": str(first)},
        {"role": "user", "content": "And a disk?"},
    ]
    assert second == demo.chat(messages, **OPTIONS)
    assert second.prompt_tokens > first.prompt_tokens
    assert session.thoughts == second.reasoning


def test_reset_and_retry(session: Session) -> None:
    with pytest.raises(WrongCommand, match="nothing was asked"):
        session.command("/retry")
    first = ask(session, QUESTION)
    assert session.command("/retry") == ("", QUESTION)
    assert session.turns == []
    assert ask(session, QUESTION) == first
    words, question = session.command("/reset")
    assert (words, question) == ("the conversation is forgotten", None)
    assert (session.turns, session.thoughts) == ([], "")


def test_dropped_questions_leave_nothing(session: Session) -> None:
    first = ask(session, QUESTION)
    with session.ask("More?"):
        pass
    session.dropped()
    session.dropped()
    assert [turn["content"] for turn in session.turns] == [QUESTION, str(first)]


def test_system(session: Session) -> None:
    assert session.command("/system")[0] == "no system prompt"
    ask(session, QUESTION)
    session.command("/system  Speak like a king. ")
    assert session.system == "Speak like a king."
    assert session.turns == []
    assert session.command("/system")[0] == "Speak like a king."


def test_think(session: Session) -> None:
    assert session.command("/think")[0] == "thoughts: auto"
    assert session.command("/think on")[0] == "thoughts: on"  # as the demo model's template has it
    assert session.options["thinking"] is True
    with pytest.raises(WrongCommand, match="cannot switch thoughts to False"):
        session.command("/think off")
    with pytest.raises(WrongCommand, match="not one of on, off, auto"):
        session.command("/think maybe")
    assert session.options["thinking"] is True


@pytest.mark.parametrize(
    ("command", "name", "value"),
    [
        ("/set temperature 0.25", "temperature", 0.25),
        ("/set top_k 5", "top_k", 5),
        ("/set top-p 0.5", "top_p", 0.5),
        ("/set max_tokens 7", "max_tokens", 7),
        ("/set stop a b", "stop", ["a b"]),
        ("/set stop_ids 3", "stop_ids", [3]),
        ("/set logit_bias 3=-inf", "logit_bias", {3: float("-inf")}),
        ("/set seed 18446744073709551615", "seed", 2**64 - 1),
    ],
)
def test_set(session: Session, command: str, name: str, value: Any) -> None:
    assert session.command(command)[0] == f"{name} {value}"
    assert session.options == OPTIONS | {name: value}
    session.command(f"/set {name} default")
    default = {"max_tokens": 2048, "temperature": None, "seed": None}
    assert session.options[name] == default.get(name, OPTIONS[name])


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("/fly", "there is no /fly; /help"),
        ("/", "there is no /; /help"),
        ("/set colour blue", "NAME is one of max_tokens, temperature"),
        ("/set temperature", "NAME VALUE"),
        ("/set temperature hot", "temperature: 'hot' is not a number from 0 to 100"),
        ("/set max_tokens 0", "max-tokens: '0' is not an integer from 1"),
        ("/set seed -1", "seed: '-1' is not an integer"),
        ("/set logit_bias x", "'x' is not ID=BIAS"),
    ],
)
def test_wrong_commands_change_nothing(session: Session, command: str, problem: str) -> None:
    with pytest.raises(WrongCommand, match=problem):
        session.command(command)
    assert session.options == OPTIONS
    assert not session.finished


def test_help_names_every_command(session: Session) -> None:
    assert session.command("/help")[0] == help_text()
    for name in COMMANDS:
        assert f"/{name}" in help_text()
    session.command("/exit")
    assert session.finished


# --- the command, fed by a pipe ------------------------------------------------------------------


def chat(monkeypatch: Any, lines: str, *arguments: str) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    return main(["chat", "demo", "--seed", "1", "--max-tokens", "60", *arguments])


def test_a_pipe(monkeypatch: Any, capsys: Capture, demo: DeepseekInference) -> None:
    lines = f"{QUESTION}\n\n/thoughts\n/quit\nnever asked\n"
    assert chat(monkeypatch, lines, "--temperature", "0.5") == 0
    out, err = capsys.readouterr()
    expected = demo.chat([{"role": "user", "content": QUESTION}], 60, 0.5, seed=1)
    assert out == f"{expected}\n"
    assert ">>>" not in out + err
    folded, closing, *thoughts = err.splitlines()
    assert re.fullmatch(r"\[thought for [0-9.]+ s; /thoughts shows it\]", folded)
    assert closing.startswith(f"{len(expected.tokens)} tokens in ")
    assert "\n".join(thoughts) == expected.reasoning.strip()


def test_lines_go_on_and_slashes_are_escaped(
    monkeypatch: Any, capsys: Capture, demo: DeepseekInference
) -> None:
    assert chat(monkeypatch, "//etc is\\\nwhat?\n", "--json", "--system", "Be brief.") == 0
    out, err = capsys.readouterr()
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "/etc is\nwhat?"},
    ]
    expected = demo.chat(messages, 60, seed=1)
    facts = json.loads(out)
    assert (facts["answer"], facts["reasoning"]) == (expected, expected.reasoning)
    assert (facts["tokens"], facts["finish_reason"], err) == (
        len(expected.tokens),
        expected.finish_reason,
        "",
    )


@pytest.mark.parametrize("line", ["/fly", "long " * 5000])
def test_what_goes_wrong_ends_a_script(monkeypatch: Any, capsys: Capture, line: str) -> None:
    assert chat(monkeypatch, f"{line}\n{QUESTION}\n") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("dsfp4: error: ")


# --- a real terminal -----------------------------------------------------------------------------


class Person:
    """Types into `dsfp4 chat` on a pseudo-terminal, and reads what is shown."""

    def __init__(self, home: Path, *arguments: str) -> None:
        self.screen, terminal_end = pty.openpty()
        environment = {k: v for k, v in os.environ.items() if k not in ("XDG_STATE_HOME", "CI")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "dsfp4", "chat", "demo", "--seed", "1", *arguments],
            stdin=terminal_end,
            stdout=terminal_end,
            stderr=terminal_end,
            env=environment | {"HOME": str(home), "TERM": "dumb"},
            start_new_session=True,
            preexec_fn=lambda: ioctl(0, termios.TIOCSCTTY, 0),  # so that Ctrl-C is a signal
        )
        os.close(terminal_end)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self.screen, text.encode())

    def wait_for(self, pattern: str) -> str:
        """Return what is shown up to the end of `pattern`."""
        deadline = time.monotonic() + 60
        while (match := re.search(pattern, self.seen)) is None:
            assert time.monotonic() < deadline, (pattern, self.seen)
            if select.select([self.screen], [], [], 1)[0]:
                try:
                    self.seen += os.read(self.screen, 65536).decode()
                except OSError:  # how Linux ends a pseudo-terminal
                    raise AssertionError((pattern, self.seen)) from None
        shown, self.seen = self.seen[: match.end()], self.seen[match.end() :]
        return shown


@pytest.fixture
def person(tmp_path: Path) -> Iterator[Person]:
    person = Person(tmp_path)
    yield person
    person.process.kill()
    person.process.wait()
    os.close(person.screen)


def test_a_terminal(person: Person, tmp_path: Path) -> None:
    person.wait_for("(?s)/help lists the commands.*>>> ")
    person.type(f"{QUESTION}\n")
    assert "thinking" in person.wait_for(r"\[thought for .*\]")
    person.wait_for("(?s)system.*tokens/s on cpu.*>>> ")
    person.type("/set temperature hot\n")
    person.wait_for("(?s)'hot' is not a number.*>>> ")
    person.type("half a line")
    person.wait_for("half a line")  # Python can miss a signal that comes while it reads keys
    person.type("\x03")  # Ctrl-C drops it
    person.wait_for(">>> ")
    person.type("\x04")  # Ctrl-D leaves
    assert person.process.wait(60) == 0
    history = tmp_path / ".local/state/dsfp4/history"
    assert QUESTION in history.read_text().splitlines()
    assert history.stat().st_mode & 0o077 == 0


def test_ctrl_c_stops_an_answer(person: Person) -> None:
    person.wait_for(">>> ")
    person.type("/set stop_ids 3\n")  # not the model's own end: it would go on to the limit
    person.wait_for(">>> ")
    person.type(f"{QUESTION}\n")
    person.wait_for("thinking")
    time.sleep(0.3)
    person.type("\x03")
    person.wait_for(">>> ")
    person.type("/reset\n")
    person.wait_for("(?s)the conversation is forgotten.*>>> ")
    person.type("/quit\n")
    assert person.process.wait(60) == 0


def test_history_path(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert terminal.history_path() == tmp_path / "dsfp4" / "history"
