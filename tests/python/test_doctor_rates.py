"""`dsfp4 doctor`: GPUs and their driver, and rates."""

import errno
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dsfp4 import _core
from dsfp4.cli import doctor as command
from dsfp4.cli import main
from dsfp4.doctor import Rates, System, examine, findings, measure
from dsfp4.doctor import rates as rates_module
from dsfp4.doctor.gpu import Plugin, ask_nvidia_smi, ask_plugin
from dsfp4.errors import CudaError, IoError
from fixtures.fake_machine import CARD, NOT_BUILT, WORKING, FakeMachine, only


@pytest.fixture
def fake(tmp_path: Path) -> FakeMachine:
    return FakeMachine(tmp_path)


# ---- the GPU -------------------------------------------------------------------------------------


def test_a_card_without_a_driver(fake: FakeMachine) -> None:
    fake.write("sys/bus/pci/devices/0000:01:00.0/vendor", "0x10de\n")
    fake.write("sys/bus/pci/devices/0000:01:00.0/class", "0x030000\n")
    machine = fake.examine(nvidia_smi=lambda: "", plugin=lambda: NOT_BUILT)
    finding = only(findings(machine))
    assert "nvidia-smi does not see it" in finding.problem
    assert "--gpus all" in finding.fix
    assert "without a driver" in "\n".join(command.lines(machine, None, []))


def test_another_card_is_no_gpu(fake: FakeMachine) -> None:
    fake.write("sys/bus/pci/devices/0000:02:00.0/vendor", "0x10de\n")
    fake.write("sys/bus/pci/devices/0000:02:00.0/class", "0x040300\n")  # its sound
    fake.write("sys/bus/pci/devices/0000:03:00.0/vendor", "0x1002\n")
    fake.write("sys/bus/pci/devices/0000:03:00.0/class", "0x030000\n")
    machine = fake.examine(nvidia_smi=lambda: "", plugin=lambda: NOT_BUILT)
    assert findings(machine) == []
    assert not machine.gpu.card


def test_a_build_without_cuda(fake: FakeMachine) -> None:
    finding = only(findings(fake.examine(plugin=lambda: NOT_BUILT)))
    assert "The GPU (NVIDIA GeForce RTX 4090) is not used: this build has no" in finding.problem
    assert "-Ccmake.define.DSFP4_CUDA=ON ." in finding.command


def test_a_driver_that_is_too_old(fake: FakeMachine) -> None:
    old = Plugin(built=True, problem="the NVIDIA driver is too old", cuda="13.0", driver_cuda="9.2")
    finding = only(findings(fake.examine(plugin=lambda: old)))
    assert "570.86.15 supports CUDA 9.2, and this build needs CUDA 13.0" in finding.problem
    assert finding.fix.startswith("Update NVIDIA's driver")


def test_a_gpu_that_cannot_be_used(fake: FakeMachine) -> None:
    failing = replace(WORKING, problem="its compute capability is 7.5")
    assert (
        "not used: its compute capability"
        in only(findings(fake.examine(plugin=lambda: failing))).problem
    )


def test_a_gpu_that_others_use(fake: FakeMachine) -> None:
    finding = only(findings(fake.examine(nvidia_smi=lambda: CARD.replace(" 512,", " 8192,"))))
    assert "8.6 GB of the GPU's 25.8 GB are used by other programs" in finding.problem


def test_a_card_in_the_wrong_slot(fake: FakeMachine) -> None:
    finding = only(findings(fake.examine(nvidia_smi=lambda: CARD.replace("16, 16", "4, 16"))))
    assert "4 of its 16 PCIe lanes" in finding.problem


def test_numbers_that_nvidia_smi_does_not_know(fake: FakeMachine) -> None:
    said = "NVIDIA GB10, 580.95, 12.1, [N/A], [N/A], [N/A], [N/A]\nan error of some kind\n"
    machine = fake.examine(nvidia_smi=lambda: said)
    assert [gpu.memory for gpu in machine.gpu.gpus] == [None]
    assert findings(machine) == []


MIG_CARD = "NVIDIA A100-SXM4-40GB, 570.86.15, 8.0, 40960, 20000, 16, 16, Enabled\n"
SLICE = replace(WORKING, device="NVIDIA A100-SXM4-40GB MIG 1g.5gb", memory=4_900_000_000)


def test_a_slice_of_a_gpu(fake: FakeMachine) -> None:
    """What others use of the whole GPU takes nothing from the slice."""
    machine = fake.examine(nvidia_smi=lambda: MIG_CARD, plugin=lambda: SLICE)
    assert findings(machine) == []
    said = "\n".join(command.lines(machine, None, []))
    assert "driver 570.86.15, in slices (MIG)" in said
    assert re.search(r"GPU slice +NVIDIA A100-SXM4-40GB MIG 1g\.5gb, 4\.9 GB", said)
    whole = MIG_CARD.replace("Enabled", "Disabled")
    machine = fake.examine(nvidia_smi=lambda: whole, plugin=lambda: WORKING)
    assert "are used by other programs" in only(findings(machine)).problem
    assert "MIG" not in "\n".join(command.lines(machine, None, []))


def test_a_gpu_in_slices_of_which_none_may_be_used(fake: FakeMachine) -> None:
    none = replace(WORKING, problem="the driver sees none (CUDA_VISIBLE_DEVICES is 'MIG-1')")
    finding = only(findings(fake.examine(nvidia_smi=lambda: MIG_CARD, plugin=lambda: none)))
    assert "is cut into slices (MIG), and this process may use none of them" in finding.problem
    assert "CUDA_VISIBLE_DEVICES is 'MIG-1'" in finding.problem
    assert finding.command == "nvidia-smi -L"


def test_a_slice_that_cannot_be_used_is_named(fake: FakeMachine) -> None:
    failing = replace(SLICE, problem="its memory is too small")
    finding = only(findings(fake.examine(nvidia_smi=lambda: MIG_CARD, plugin=lambda: failing)))
    assert "The GPU (NVIDIA A100-SXM4-40GB MIG 1g.5gb) is not used: its memory" in finding.problem


def test_wsl(fake: FakeMachine) -> None:
    fake.write("proc/sys/kernel/osrelease", "5.15.153.1-microsoft-standard-WSL2\n")
    half, pinned = findings(fake.examine())
    assert ".wslconfig" in half.fix
    assert half.command == "wsl.exe --shutdown"
    assert "limits how much RAM can be pinned" in pinned.problem
    assert only(findings(fake.examine(nvidia_smi=lambda: ""))) == half
    fake.mount("9p", "C:")
    assert any("~/models" in finding.fix for finding in findings(fake.examine()))


def program(folder: Path, script: str) -> None:
    path = folder / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_nvidia_smi_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert ask_nvidia_smi() == ""
    program(tmp_path, f'echo "$*" >{tmp_path}/asked; echo "{CARD.strip()}"')
    assert ask_nvidia_smi() == CARD
    assert "--query-gpu=name,driver_version" in (tmp_path / "asked").read_text()
    older = f'case "$*" in *mig.mode*) exit 2;; esac; echo "{CARD.strip()}"'
    program(tmp_path, older)  # not a valid field to query
    assert ask_nvidia_smi() == CARD
    program(tmp_path, "echo NVIDIA-SMI has failed; exit 9")
    assert ask_nvidia_smi() == ""
    (tmp_path / "nvidia-smi").write_text("no program")
    assert ask_nvidia_smi() == ""


def test_the_plugin_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"gpus": 0, "name": "", "memory": 0, "driver_cuda": 0, "plugin_cuda": 12080}
    monkeypatch.setattr(_core, "probe_cuda", lambda: versions)
    monkeypatch.setattr(_core, "cuda_problem", lambda: "no driver is installed")
    assert ask_plugin() == Plugin(built=True, problem="no driver is installed", cuda="12.8")

    def missing() -> None:
        raise CudaError("no file")

    monkeypatch.setattr(_core, "probe_cuda", missing)
    assert not ask_plugin().built

    def failing() -> None:
        raise CudaError("the driver failed", code=999)

    monkeypatch.setattr(_core, "probe_cuda", failing)
    assert ask_plugin().built


# ---- rates ---------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scratch file and reads of RAM that take no time."""
    monkeypatch.setattr(rates_module, "_SCRATCH_BYTES", 40 << 20)
    monkeypatch.setattr(rates_module, "_RAM_BYTES", 1 << 20)
    monkeypatch.setattr(rates_module, "last_level_cache", lambda _: 1 << 18)


def test_rates_of_an_empty_folder(tmp_path: Path, small: None) -> None:
    rates = measure(examine(tmp_path, System(nvidia_smi=lambda: "")), 0.05)
    assert rates.problems.keys() <= {"gpu"}  # a real one might be busy
    assert rates.ssd is not None
    assert rates.ssd > 0
    assert rates.ram is not None
    assert rates.ram > 0
    assert rates.from_scratch
    assert list(tmp_path.iterdir()) == []
    assert (rates.reader == "pread") == (_core.uring_problem() is not None)


def test_a_checkpoint_is_measured_itself(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(34 << 20))
    monkeypatch.setattr(rates_module, "_LEAST_SHARDS", 33 << 20)
    rates = measure(examine(tmp_path), 0.05)
    assert not rates.from_scratch
    assert rates.ssd is not None


def test_a_checkpoint_that_cannot_be_read_stops(
    fake: FakeMachine, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise IoError("'model.safetensors' at byte 0: Input/output error", errno=errno.EIO)

    machine = fake.examine(plugin=lambda: NOT_BUILT, nvidia_smi=lambda: "")
    monkeypatch.setattr(_core, "measure_raw_rate", fail)
    assert not any(finding.stops for finding in findings(machine, measure(machine, 0.05)))
    (fake.folder / "model.safetensors").write_bytes(bytes(100))
    monkeypatch.setattr(rates_module, "_LEAST_SHARDS", 1)
    finding = only(findings(machine, measure(machine, 0.05)))
    assert finding.stops
    assert "cannot be read: 'model.safetensors' at byte 0" in finding.problem


def test_no_room_for_a_scratch_file(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rates_module, "_SCRATCH_BYTES", 1 << 60)
    rates = measure(examine(tmp_path), 0.05)
    assert "there is no room" in rates.problems["ssd"]


def test_too_little_ram_to_read(fake: FakeMachine, small: None) -> None:
    fake.memory(64, 0)
    machine = fake.examine(plugin=lambda: NOT_BUILT)
    assert "GB are available" in measure(machine, 0.05).problems["ram"]


def test_a_slow_disk(fake: FakeMachine) -> None:
    finding = only(findings(fake.examine(), Rates(ssd=0.4)))
    assert "0.40 GB/s of random reads" in finding.problem


def test_slow_copies(fake: FakeMachine) -> None:
    finding = only(findings(fake.examine(), Rates(ssd=7.0, copy_in=6.2)))
    assert "to the GPU run at 6.2 GB/s" in finding.problem


def test_the_gpus_rates(fake: FakeMachine, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"copy_in": 25e9, "copy_out": 26e9, "read": 900e9}
    monkeypatch.setattr(_core, "measure_gpu", lambda seconds: given)
    machine = fake.examine()
    rates = measure(machine, 0.05)
    assert (rates.copy_in, rates.copy_out, rates.vram) == (25.0, 26.0, 900.0)
    text = "\n".join(command.lines(machine, rates, []))
    assert "25 GB/s, to the GPU" in text
    assert "900 GB/s, reads by the GPU" in text

    def fail(seconds: float) -> None:
        raise CudaError("no kernel image is available", code=209)

    monkeypatch.setattr(_core, "measure_gpu", fail)
    rates = measure(machine, 0.05)
    rates.ssd = 7.0
    assert "could not be measured: no kernel image" in only(findings(machine, rates)).problem
    assert "not measured: no kernel" in "\n".join(command.lines(machine, rates, []))


def test_json_holds_everything(
    tmp_path: Path, small: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", str(tmp_path), "--seconds", "0.05", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["machine"]["storage"]["folder"] == str(tmp_path)
    assert report["machine"]["memory"]["ram_limit"] > 0
    assert report["rates"]["ssd"] > 0
    for finding in report["findings"]:
        assert finding.keys() == {"problem", "fix", "command", "stops"}
