"""`dsfp4 doctor`: machines of files, with one thing wrong at a time."""

import errno
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dsfp4.cli import doctor as command
from dsfp4.cli import main
from dsfp4.doctor import Finding, Rates, System, examine, findings, measure
from fixtures.fake_machine import NOT_BUILT, FakeMachine, only

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def fake(tmp_path: Path) -> FakeMachine:
    return FakeMachine(tmp_path)


def test_a_machine_with_nothing_to_fix(fake: FakeMachine) -> None:
    machine = fake.examine()
    assert findings(machine, Rates(ssd=7.0, ram=60.0, copy_in=25.0, copy_out=25.0)) == []
    assert machine.processor.name == "Fast Chip 9"
    assert (machine.memory.installed, machine.memory.total) == (62_500_000 * 1024,) * 2
    assert machine.memory.huge_pages == "madvise"
    assert machine.memory.lock_limit is None
    assert (machine.storage.file_system, machine.storage.device) == ("ext4", "/dev/nvme0n1p2")
    assert machine.gpu.gpus[0].memory == 24564 << 20
    assert (machine.gpu.gpus[0].name, machine.gpu.gpus[0].driver) == (
        "NVIDIA GeForce RTX 4090",
        "570.86.15",
    )
    text = "\n".join(command.lines(machine, None, []))
    assert text.startswith("system       Linux 6.8\n")
    assert "RTX 4090, compute capability 8.9, 25.8 GB" in text
    assert "CUDA 12.8; the driver supports 12.8" in text
    assert text.endswith("nothing to fix")


def test_a_bare_machine_says_little_and_breaks_nothing(tmp_path: Path) -> None:
    nothing = System(
        proc=tmp_path / "none",
        sys=tmp_path / "none",
        environment={},
        nvidia_smi=lambda: "",
        plugin=lambda: NOT_BUILT,
        uring_problem=lambda: None,
    )
    machine = examine(tmp_path, nothing)
    assert machine.processor.threads >= 1
    assert machine.memory.available is None
    assert [finding for finding in findings(machine) if "RAM" in finding.problem] == []
    text = "\n".join(command.lines(machine, Rates(problems={"ssd": "no", "ram": "no"}), []))
    assert "not known" in text
    assert "no NVIDIA GPU" in text


# ---- one thing wrong -----------------------------------------------------------------------------


def in_a_group(fake: FakeMachine) -> None:
    fake.write("sys/fs/cgroup/user.slice/memory.max", f"{8 * 10**9}\n")


def with_a_quota(fake: FakeMachine) -> None:
    fake.write("sys/fs/cgroup/user.slice/cpu.max", "50000 100000\n")


def with_platters(fake: FakeMachine) -> None:
    fake.write("sys/dev/block/queue/rotational", "1\n")
    fake.write("sys/dev/block/device/model", "WDC WD40EFRX-68N\n")


FILES: list[tuple[str, Callable[[FakeMachine], None], list[str]]] = [
    ("a memory limit", in_a_group, ["control group", "8.0 GB", "64.0 GB", "docker run --memory"]),
    ("little RAM left", lambda f: f.memory(64, 20), ["Only 20.0 GB of 64.0 GB", "ps aux"]),
    (
        "swapping",
        lambda f: f.memory(64, 60, 8, 5),
        ["3.0 GB are swapped out", "--ram-limit"],
    ),
    (
        "no huge pages",
        lambda f: f.write("sys/kernel/mm/transparent_hugepage/enabled", "always madvise [never]"),
        ["huge pages are off", "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage"],
    ),
    (
        "locked memory",
        lambda f: f.write("proc/self/limits", f.limits("8388608")),
        ["8.4 MB may be locked", "33.6 MB", "limits.conf", "--ulimit memlock=-1"],
    ),
    ("a quota", with_a_quota, ["use 0.5 of", "docker run --cpus", "CPUQuota="]),
    (
        "an affinity mask",
        lambda f: f.write("sys/devices/system/cpu/online", "0-1022\n"),
        ["the machine has others", "taskset", "--cpuset-cpus"],
    ),
    ("tmpfs", lambda f: f.mount("tmpfs", "tmpfs"), ["lies in RAM (tmpfs)", "NVMe"]),
    ("NFS", lambda f: f.mount("nfs4", "server:/x"), ["not on a disk of this machine (nfs4)"]),
    ("overlay", lambda f: f.mount("overlay", "overlay"), ["(overlay)", "docker run -v"]),
    ("platters", with_platters, ["disk with platters", "NVMe"]),
]


@pytest.mark.parametrize(
    ("change", "words"), [case[1:] for case in FILES], ids=[case[0] for case in FILES]
)
def test_one_thing_is_wrong(
    fake: FakeMachine, change: Callable[[FakeMachine], None], words: list[str]
) -> None:
    change(fake)
    finding = only(findings(fake.examine()))
    assert not finding.stops
    said = " ".join((finding.problem, finding.fix, finding.command))
    for word in words:
        assert word in said
    assert finding.problem.endswith(".")
    assert finding.fix.endswith(".")


def test_too_little_ram_for_anything_stops(fake: FakeMachine) -> None:
    fake.write("sys/fs/cgroup/user.slice/memory.max", f"{64 * 10**6}\n")
    fake.write("sys/fs/cgroup/user.slice/memory.current", f"{63 * 10**6}\n")
    first, *others = findings(fake.examine())
    assert first.stops
    assert "even the demo model needs" in first.problem
    assert not any(finding.stops for finding in others)


def test_a_right_to_lock_memory_has_no_limit(fake: FakeMachine) -> None:
    fake.write("proc/self/limits", fake.limits("65536"))
    fake.write("proc/self/status", "CapEff:\t000001ffffffffff\n")
    assert findings(fake.examine()) == []


def test_a_virtual_disk_does_not_know_its_platters(fake: FakeMachine) -> None:
    with_platters(fake)
    fake.write("sys/dev/block/device/model", "QEMU HARDDISK\n")
    assert fake.examine().storage.rotates is None
    (fake.root / "sys/dev/block/device/model").unlink()  # virtio has none
    assert fake.examine().storage.rotates is None


def test_a_whole_disk_rotates_too(fake: FakeMachine) -> None:
    fake.mount("ext4", "/dev/sdb", "8:16")
    fake.write("sys/dev/block/8:16/queue/rotational", "1\n")
    fake.write("sys/dev/block/8:16/device/model", "ST8000\n")
    assert fake.examine().storage.rotates is True


def test_a_blank_in_a_mount_point(tmp_path: Path) -> None:
    (tmp_path / "a disk").mkdir()
    fake = FakeMachine(tmp_path / "a disk")
    fake.mount("btrfs", "/dev/sdb")
    assert fake.examine().storage.file_system == "btrfs"


@pytest.mark.parametrize(
    ("disabled", "words"),
    [("2", "sudo sysctl kernel.io_uring_disabled=0"), ("0", "seccomp=unconfined")],
)
def test_io_uring_is_forbidden(fake: FakeMachine, disabled: str, words: str) -> None:
    fake.write("proc/sys/kernel/io_uring_disabled", f"{disabled}\n")
    # Without io_uring the limit of what it may lock does not matter.
    fake.write("proc/self/limits", fake.limits("65536"))
    machine = fake.examine(uring_problem=lambda: "io_uring cannot be used here: forbidden")
    finding = only(findings(machine))
    assert "cannot be used here: forbidden; threads read with pread instead" in finding.problem
    assert words in finding.fix + finding.command
    assert "pread" in "\n".join(command.lines(machine, None, []))


def test_an_old_instruction_set(fake: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSFP4_ISA", "baseline")  # the core's choice
    assert "no AVX2" in only(findings(fake.examine())).problem
    finding = only(findings(fake.examine(environment={"DSFP4_ISA": "baseline"})))
    assert "holds the kernels to baseline" in finding.problem
    assert finding.command == "unset DSFP4_ISA"


def test_a_file_system_without_direct_reads(
    fake: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_open = os.open

    def without_direct(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_open(path, flags, *arguments, **options)

    monkeypatch.setattr(os, "open", without_direct)
    finding = only(findings(fake.examine()))
    assert "(ext4) has no direct reads (O_DIRECT)" in finding.problem
    (fake.folder / "model.safetensors").write_bytes(b"x")
    assert fake.examine().storage.direct_reads is False


def test_a_folder_that_may_not_be_written(
    fake: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(fake.folder))

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", refuse)
    machine = fake.examine(plugin=lambda: NOT_BUILT, nvidia_smi=lambda: "")
    assert machine.storage.direct_reads is None
    rates = measure(machine, 0.05)
    assert "Permission denied" in rates.problems["ssd"]
    assert not any(finding.stops for finding in findings(machine, rates))
    assert "not measured: " in "\n".join(command.lines(machine, rates, []))


def test_little_space(fake: FakeMachine) -> None:
    machine = fake.examine()
    full = replace(machine, storage=replace(machine.storage, free=3 * 10**9))
    assert "3.0 GB are free" in only(findings(full)).problem
    there = replace(full, storage=replace(full.storage, checkpoint=True))
    assert findings(there) == []


# ---- the command ---------------------------------------------------------------------------------


def test_nothing_is_measured_or_left(tmp_path: Path, capsys: Capture) -> None:
    assert main(["doctor", str(tmp_path), "--no-rates"]) == 0
    out = capsys.readouterr().out
    assert "GB/s" not in out
    assert str(tmp_path) in out
    assert list(tmp_path.iterdir()) == []


def test_the_exit_code_is_1_where_nothing_can_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    stop = Finding("It is broken.", "Mend it.", "mend", stops=True)
    monkeypatch.setattr(command, "findings", lambda machine, rates: [stop])
    assert main(["doctor", str(tmp_path), "--no-rates"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3:] == [
        "1. It is broken. Nothing runs until it is fixed.",
        "   Mend it.",
        "   $ mend",
    ]


def test_a_folder_that_is_not_there(capsys: Capture) -> None:
    assert main(["doctor", "/no/such/folder"]) == 1
    assert "'/no/such/folder' is not a folder" in capsys.readouterr().err
