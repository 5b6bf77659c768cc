"""The command line: output, exit codes, and what goes to which stream."""

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import dsfp4
from dsfp4 import DeepseekInference
from dsfp4.cli import main
from dsfp4.cli.progress import Progress, format_bytes, format_seconds, format_tokens

Capture = pytest.CaptureFixture[str]


def dsfp4_command(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dsfp4", *arguments]
    return subprocess.run(command, capture_output=True, text=True, **options)  # type: ignore[call-overload, no-any-return]


def test_version() -> None:
    done = dsfp4_command("--version")
    assert (done.returncode, done.stdout) == (0, f"dsfp4 {dsfp4.__version__}\n")


def test_demo_prints_question_answer_and_speed(capsys: Capture) -> None:
    assert main(["demo"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0] == "> What is a file system?"
    answer = " ".join(lines[1:])
    assert len(answer.split()) > 5
    assert "file" in answer
    assert "think>" not in out + err
    words = err.splitlines()[-1].split()
    assert int(words[0]) > 10
    assert words[1:3] == ["tokens", "in"]
    assert words[-2:] == ["on", "cpu"]


def test_run_prints_the_text_alone(capsys: Capture, demo: DeepseekInference) -> None:
    arguments = ["--max-tokens", "12", "--temperature", "0.9", "--top-k", "20", "--top-p", "0.9"]
    arguments += ["--min-p", "0.01", "--repetition-penalty", "1.1", "--stop", "zzz", "--raw"]
    assert main(["run", "demo", "And the king", *arguments, "--seed", "5"]) == 0
    out, err = capsys.readouterr()
    expected = demo.generate(
        "And the king",
        12,
        0.9,
        top_k=20,
        top_p=0.9,
        min_p=0.01,
        repetition_penalty=1.1,
        seed=5,
        raw=True,
    )
    assert out == expected + "\n"
    assert err.startswith("12 tokens in ")
    assert err.count("\n") == 1


def test_run_answers_a_question(capsys: Capture, demo: DeepseekInference) -> None:
    assert main(["run", "demo", "What is a file system?", "--seed", "0", "--max-tokens", "90"]) == 0
    out, err = capsys.readouterr()
    expected = demo.generate("What is a file system?", 90, seed=0)
    assert out == expected + "\n"
    assert err.startswith(expected.reasoning + "\n")


def test_demo_for_programs(capsys: Capture, demo: DeepseekInference) -> None:
    assert main(["demo", "--json"]) == 0
    out, err = capsys.readouterr()
    expected = demo.generate("What is a file system?", 200, 0.5, seed=0)
    facts = json.loads(out)
    assert (facts["answer"], facts["reasoning"]) == (expected, expected.reasoning)
    assert (facts["tokens"], facts["device"], err) == (len(expected.tokens), "cpu", "")


def test_run_for_programs(capsys: Capture, demo: DeepseekInference) -> None:
    options = ["--max-tokens", "8", "--temperature", "0", "--raw", "--json", "--logprobs", "2"]
    options += ["--logit-bias", "300=-inf", "--logit-bias", "301=-2", "--stop-id", "5"]
    assert main(["run", "demo", "And the king", *options]) == 0
    out, err = capsys.readouterr()
    expected = demo.generate(
        *("And the king", 8, 0),
        raw=True,
        logprobs=2,
        logit_bias={300: float("-inf"), 301: -2.0},
        stop_ids=[5],
    )
    facts = json.loads(out)
    assert (facts["answer"], facts["finish_reason"], err) == (expected, "length", "")
    assert [item["id"] for item in facts["logprobs"]] == expected.tokens
    assert [len(item["top"]) for item in facts["logprobs"]] == [2] * 8
    assert facts["logprobs"][0]["logprob"] == pytest.approx(expected.logprobs[0].logprob, rel=1e-5)


def test_run_reads_the_prompt_from_stdin(demo: DeepseekInference) -> None:
    arguments = ("--max-tokens", "6", "--temperature", "0", "--threads", "1", "--max-context", "64")
    done = dsfp4_command("run", "demo", "-", "--raw", *arguments, input="And the king")
    assert done.stdout == demo.generate("And the king", 6, 0, raw=True) + "\n"


def test_info_for_people(capsys: Capture) -> None:
    assert main(["info", "demo"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("deepseek_v3: 8 layers, hidden size 256, 32 experts with 4 active")
    rows = {line.split("  ")[0]: line for line in lines}
    assert "672 nvfp4" in rows["routed experts"]  # 7 layers x 32 experts x 3
    assert "40 fp8" in rows["attention"]  # 8 layers x 5
    assert rows["total"].endswith("B")


def test_info_for_programs(capsys: Capture, demo_model: Path) -> None:
    assert main(["info", str(demo_model), "--json"]) == 0
    description = json.loads(capsys.readouterr().out)
    roles = {role["role"]: role for role in description["roles"]}
    assert description["config"]["n_routed_experts"] == 32
    # An expert has three [128, 256] matrices: half a byte a value, a scale byte for each 16, and
    # the global scale.
    expert = 3 * (128 * 256 * 9 // 16 + 4)
    assert roles["routed experts"]["bytes"] == 7 * 32 * expert
    assert roles["routed experts"]["bytes_per_token"] == 7 * 4 * expert
    assert sum(role["bytes"] for role in roles.values()) == description["total_bytes"]


def test_quantize(
    capsys: Capture, tmp_path: Path, random_checkpoint: Callable[[str], Path]
) -> None:
    source = str(random_checkpoint("v3-bf16-real"))
    assert main(["quantize", source, str(tmp_path / "a"), "--attention", "fp8"]) == 0
    out, err = capsys.readouterr()
    assert "in 3 files" in out
    assert "routed experts: relative RMS error 0.09" in out
    assert err.endswith(" MB/s\n")
    assert err.count("\n") == 1
    assert main(["quantize", source, str(tmp_path / "b"), "--threads", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["matrices"].keys() == {"bf16", "nvfp4"}


def test_quantize_lists_what_it_kept(
    capsys: Capture, tmp_path: Path, random_checkpoint: Callable[[str], Path]
) -> None:
    assert main(["quantize", str(random_checkpoint("v3-bf16-odd")), str(tmp_path / "a")]) == 0
    kept = [line for line in capsys.readouterr().out.splitlines() if line.startswith("kept")]
    assert any(line.endswith(": model.layers.0.mlp.gate_proj") for line in kept)


FAILURES = [
    ["run", "NOWHERE", "x"],
    ["info", "NOWHERE"],
    ["quantize", "NOWHERE", "OUT"],
    ["run", "demo", "x", "--max-context", "1000000"],
    ["run", "EMPTY", "x"],
    ["info", "EMPTY"],
    ["verify", "NOWHERE"],
    ["verify", "EMPTY"],
    ["chat", "NOWHERE"],
    ["eval", "demo", "NOWHERE"],
    ["eval", "demo", "EMPTY"],
]


@pytest.mark.parametrize("arguments", FAILURES, ids=" ".join)
def test_errors_are_one_line(capsys: Capture, tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "EMPTY").mkdir()
    names = {"NOWHERE", "EMPTY", "OUT"}
    assert main([str(tmp_path / a) if a in names else a for a in arguments]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("dsfp4: error: ")
    assert err.count("\n") == 1


def test_errors_have_no_traceback() -> None:
    done = dsfp4_command("run", "/no/such/folder", "x")
    assert done.returncode == 1
    assert done.stderr.startswith("dsfp4: error: '/no/such/folder' is not a folder")


WRONG_USAGE = [
    ([], "required: COMMAND"),
    (["fly"], "invalid choice: 'fly'"),
    (["run", "demo"], "required: PROMPT"),
    (["run", "demo", "x", "--max-tokens", "0"], "'0' is not an integer from 1 to 2147483647"),
    (["run", "demo", "x", "--max-tokens", "many"], "'many' is not an integer"),
    (["run", "demo", "x", "--temperature", "nan"], "'nan' is not a number from 0 to 100"),
    (["run", "demo", "x", "--temperature", "hot"], "'hot' is not a number"),
    (["run", "demo", "x", "--top-p", "1.1"], "'1.1' is not a number from 0 to 1"),
    (["run", "demo", "x", "--seed", "-1"], "'-1' is not an integer from 0 to"),
    (["run", "demo", "x", "--device", "tpu"], "invalid choice: 'tpu'"),
    (["quantize", "a", "b", "--attention", "int8"], "invalid choice: 'int8'"),
    (["demo", "--thread", "1"], "unrecognized arguments"),
    (["run", "demo", "x", "--thinking", "maybe"], "'maybe' is not one of on, off, auto"),
    (["run", "demo", "x", "--logit-bias", "5"], "'5' is not ID=BIAS, as in 42=-5"),
    (["run", "demo", "x", "--logit-bias", "5=nan"], "'5=nan' is not ID=BIAS"),
    (["run", "demo", "x", "--stop-id", "x"], "'x' is not an integer"),
    (["run", "demo", "x", "--logprobs", "21"], "'21' is not an integer from 0 to 20"),
    (["runn", "demo", "x"], "did you mean 'run'?"),
    (["chat"], "for example: dsfp4 chat demo"),
    (["chat", "demo", "--sytem", "x"], "unrecognized arguments: --sytem"),
    (["info"], "for example: dsfp4 info demo"),
    (["eval", "demo"], "for example: dsfp4 eval demo book.txt --plot"),
    (["eval", "demo", "x", "--window", "1"], "'1' is not an integer from 2 to"),
    (["verify"], "for example: dsfp4 verify demo"),
    (["verify", "demo", "--threads", "-1"], "'-1' is not an integer from 0 to 1024"),
    (["quantize", "a"], "for example: dsfp4 quantize "),
    (["demo", "--json=1"], "for example: dsfp4 demo"),
]


@pytest.mark.parametrize(("arguments", "sentence"), WRONG_USAGE, ids=str)
def test_wrong_usage(capsys: Capture, arguments: list[str], sentence: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert sentence in err
    assert err.endswith("--help` explains\n")


COMMANDS = ["demo", "plan", "run", "chat", "info", "eval", "verify", "quantize"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(capsys: Capture, command: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert f"\nexamples:\n  dsfp4 {command}" in out.replace("echo 'What", "dsfp4 chat")
    assert "--json" in out


def test_every_command_is_listed(capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    assert all(f"\n    {command} " in out for command in COMMANDS)


def test_a_reader_that_goes_away() -> None:
    command = f"{sys.executable} -m dsfp4 run demo x --max-tokens 200 --seed 1 | head -c 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert len(done.stdout) <= 1
    assert "rror" not in done.stderr  # the thoughts are there, a traceback is not


def test_ctrl_c(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dsfp4.cli.run.load", interrupt)
    assert main(["run", "demo", "x"]) == 130
    assert capsys.readouterr().err == "dsfp4: interrupted\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("ci", "shown"), [("", True), ("true", False)])
def test_progress_on_a_terminal(monkeypatch: pytest.MonkeyPatch, ci: str, shown: bool) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("CI", ci)
    with Progress("loading") as progress:
        progress(24_800_000, 368_000_000_000)
    assert ("loading 24.8 MB of 368 GB, " in terminal.getvalue()) == shown
    assert (terminal.getvalue() == "") != shown
    assert "left" not in terminal.getvalue()  # nobody could know yet


def test_progress_tells_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("CI", "")
    now = iter([0.0, *[10.0] * 9])
    monkeypatch.setattr("time.monotonic", lambda: next(now))
    Progress("evaluating", format_tokens)(100, 2100)
    assert terminal.getvalue().endswith(
        "evaluating 100 tokens of 2100 tokens, 10 tokens/s, 3 min 20 s left"
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (3599, "59 min 59 s"), (7500, "2 h 5 min")],
)
def test_format_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (24_772_608, "24.8 MB"),
        (999_600, "1 MB"),
        (423e9, "423 GB"),
        (1.5e12, "1.5 TB"),
    ],
)
def test_format_bytes(count: float, text: str) -> None:
    assert format_bytes(count) == text
