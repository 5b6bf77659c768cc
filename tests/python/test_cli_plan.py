"""`dsfp4 plan`: what it prints for described machines, and for this one."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dsfp4.cli import main, plan
from dsfp4.doctor import Machine, examine

TARGET = (
    *("--gpu-memory", "16", "--ram", "96", "--max-context", "32768"),
    *("--ssd-rate", "14", "--pcie-rate", "55", "--ram-rate", "75", "--vram-rate", "960"),
)


def report_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """Return what the command prints as JSON."""
    assert main(["plan", *arguments, "--json"]) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


def test_r1_on_a_described_machine(capsys: pytest.CaptureFixture[str]) -> None:
    report = report_of(capsys, "deepseek-r1-fp4", *TARGET)
    assert set(report["machine"]["sources"].values()) == {"given"}
    assert report["machine"]["vram"] == 16 * 10**9
    in_vram = sum(role["bytes"] for role in report["plan"]["roles"] if role["tier"] == "vram")
    assert 15e9 < in_vram <= 16e9
    slow, fast = report["usual_tokens_per_second"]
    assert 1 < slow < fast < 5
    assert report["binds"] == "ssd"
    rates = [row["tokens_per_second"] for row in report["decode"]]
    assert rates == sorted(rates)
    assert [row["tokens"] for row in report["prompts"]] == [512, 4096, 32768]
    assert report["faster"][0]["what"] == "ssd_rate"
    assert report["faster"][0]["gain"] == pytest.approx(2, rel=0.05)
    assert report["files"] is None


def test_the_report_for_people_is_narrow(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "deepseek-r1-fp4", *TARGET]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "deepseek-r1-fp4: 397 GB of weights that decoding needs"
    notes = [line for line in lines if line.startswith("note: ")]
    assert any("15 of 61 layers" in note for note in notes)
    assert any("fp8" in note for note in notes)
    assert max(len(line) for line in lines if line not in notes) <= 100
    assert any(line.startswith("decoding: ") and "24%" in line for line in lines)
    assert lines[-1].startswith("faster with an SSD of twice the rate: 2 times")


def test_what_cannot_run_is_refused_with_the_number(capsys: pytest.CaptureFixture[str]) -> None:
    machine = ("--gpu-memory", "3", "--ram", "96")
    assert main(["plan", "deepseek-r1-fp4", *machine]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "it does not run there: " in printed.err
    assert "memory_limit" in printed.err
    assert main(["plan", "deepseek-r1-fp4", *machine, "--json"]) == 1
    refusal = json.loads(capsys.readouterr().out)
    assert refusal["runs"] is False
    assert "VRAM" in refusal["problem"]


def test_rates_that_nobody_gave_are_marked(capsys: pytest.CaptureFixture[str]) -> None:
    report = report_of(capsys, "deepseek-v2-lite", "--ram", "32", "--ssd-rate", "3.5")
    sources = report["machine"]["sources"]
    assert sources["ssd"] == "given"
    assert sources["ram"] == "assumed"
    assert report["machine"]["vram"] is None  # the machine that is described has no GPU
    assert report["machine"]["rates"]["ssd"] == 3.5


def test_a_checkpoint_on_this_machine_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    report = report_of(capsys, "demo", "--device", "cpu", "--seconds", "0.05")
    sources = report["machine"]["sources"]
    assert sources["ram_bytes"] == sources["ram"] == "measured"
    assert "model-00001-of-00005.safetensors" in report["files"]["needed"]
    assert report["files"]["unneeded_weights"] == []
    assert report["plan"]["tiered"] is False
    assert [row["hit_rate"] for row in report["decode"]] == [1.0]


def test_memory_flags_are_those_of_a_load(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--cpu-cache-size", "8", "--max-experts", "0", "--quantization", "keep")
    report = report_of(capsys, "deepseek-v3-fp8", *TARGET[:4], *flags, "--memory-limit", "12")
    plan = report["plan"]
    assert plan["device_cache_slots"] == 0
    assert plan["conversion"] == ""
    assert plan["cache_slots"] == 8 * 10**9 // (plan["ram_bytes"] and 44_047_360)
    assert report["machine"]["vram"] == 12 * 10**9


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--device", "cpu", "--gpu-memory", "8"), "leave out one"),
        (("--device", "cuda", "--ram", "32"), "must be given"),
        (("--gpu-memory", "8", "--quantization", "mlp=fp3"), "quantization"),
        (("--gpu-memory", "16", "--max-context", "200000"), "max_context"),
    ],
)
def test_wrong_settings_are_said(
    arguments: tuple[str, ...],
    problem: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def without_gpu(folder: Path) -> Machine:
        here = examine(folder)
        return replace(here, gpu=replace(here.gpu, gpus=()))

    monkeypatch.setattr(plan, "examine", without_gpu)
    assert main(["plan", "deepseek-v2-lite", *arguments]) == 1
    assert problem in capsys.readouterr().err


def test_an_unknown_name_is_no_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "deepseek-r9"]) == 1
    assert "is not a folder" in capsys.readouterr().err


def test_a_picture_needs_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib draws: pip install 'dsfp4[plot]'")
    picture = tmp_path / "plan.png"
    assert main(["plan", "deepseek-r1-fp4", *TARGET, "--plot", str(picture)]) == 0
    assert picture.stat().st_size > 1000
    assert main(["plan", "deepseek-r1-fp4", "--plot", str(tmp_path / "no" / "plan.png")]) == 1
    assert "is not a folder" in capsys.readouterr().err
