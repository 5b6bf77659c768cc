"""What the README and the recorded terminal show is so."""

import argparse
import re
import subprocess
import sys
from importlib import util
from pathlib import Path
from typing import Any

import pytest

from dsfp4.cli import main, make_parser

ROOT = Path(__file__).parents[2]
READMES = pytest.mark.parametrize("readme", ["README.md", "README.zh-CN.md"])


def commands() -> set[str]:
    [group] = [
        action
        for action in make_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    ]
    return set(group.choices)


def snippet_of(readme: str) -> str:
    text = (ROOT / readme).read_text(encoding="utf-8")
    # One program: the second snippet goes on where the first one ends.
    return "\n".join(re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE))


def test_the_snippet_runs_as_printed() -> None:
    snippet = snippet_of("README.md")
    assert 'DeepseekInference("demo")' in snippet
    assert ".generate(" in snippet
    assert ".chat(" in snippet
    assert ".set_memory_strategy(" in snippet
    done = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "file system" in done.stdout.lower()
    assert len(done.stdout.split()) > 12
    hits, misses = re.search(r"(\d+) experts found in RAM, (\d+) read", done.stdout).groups()
    assert int(hits) > 0
    assert int(misses) > 0
    assert snippet_of("README.zh-CN.md") == snippet


@READMES
def test_every_command_is_told_of(readme: str) -> None:
    text = (ROOT / readme).read_text(encoding="utf-8")
    assert commands() <= set(re.findall(r"^    dsfp4 (\w+)", text, re.MULTILINE))


def recordings() -> list[tuple[str, str]]:
    text = (ROOT / "docs" / "terminal.md").read_text(encoding="utf-8")
    return re.findall(r"^```console\n\$ (.*?)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def test_every_command_is_recorded_used_well_and_wrongly() -> None:
    good = {line.split()[1] for line, shown in recordings() if "[exit" not in shown}
    wrong = {line.split()[1] for line, shown in recordings() if "[exit 2]" in shown and " " in line}
    assert commands() <= good
    assert commands() <= wrong


def test_wrong_usage_is_still_as_recorded(capsys: pytest.CaptureFixture[str]) -> None:
    wrong = [(line, shown) for line, shown in recordings() if "[exit 2]" in shown]
    assert len(wrong) > 5
    for line, shown in wrong:
        with pytest.raises(SystemExit) as stop:
            main(line.split()[1:])
        assert stop.value.code == 2
        said = [text for text in capsys.readouterr().err.splitlines() if "usage:" not in text][-3:]
        assert shown.splitlines()[-len(said) - 1 : -1] == said


@pytest.mark.parametrize(
    ("output", "screen"),
    [
        ("a\r\nb\r\n", "a\nb"),
        ("loading 1\r\x1b[Kloading 2\r\x1b[Kdone\r\n", "done"),
        ("\x1b[2mdim\x1b[0m", "dim"),
        ("abc\rX", "Xbc"),
        ("ab\x1b[K", "ab"),
    ],
)
def test_what_stands_on_the_screen(output: str, screen: str) -> None:
    spec = util.spec_from_file_location("record", ROOT / "docs" / "record.py")
    assert spec is not None and spec.loader is not None
    record: Any = util.module_from_spec(spec)
    spec.loader.exec_module(record)
    assert record.render(output) == screen
