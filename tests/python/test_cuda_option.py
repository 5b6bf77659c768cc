"""The build's DSFP4_CUDA: with which tools and GPUs it builds the CUDA plugin, and what it says."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "cmake" / "cuda.cmake"
PROGRAMS = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
CMAKE = shutil.which("cmake", path=PROGRAMS)
ALL = "80-real;86-real;89-real;90a-real;100-real;120"
NVCC = {
    "13.0": "80 86 87 89 90 100 103 120",
    "12.4": "70 75 80 86 87 89 90",
    "11.8": "70 75 80 86 87 89 90",
}

pytestmark = pytest.mark.skipif(CMAKE is None, reason="there is no cmake")


class Tools:
    """A folder of programs that stand for those of a machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir()

    def put(self, name: str, script: str) -> None:
        path = self.folder / "bin" / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def nvcc(self, version: str) -> None:
        known = "\n".join(f"compute_{arch}" for arch in NVCC[version].split())
        release = f"Cuda compilation tools, release {version}, V{version}.1"
        self.put("nvcc", f"[ \"$1\" = --version ] && echo '{release}' || echo '{known}'")

    def gpus(self, *capabilities: str) -> None:
        lines = "\n".join(capabilities)
        self.put("nvidia-smi", f"echo '{lines}'")

    def decide(self, option: str, *, architectures: str = "", on_path: bool = True) -> str:
        """The line that the build says."""
        done = subprocess.run(
            [
                str(CMAKE),
                f"-DDSFP4_CUDA={option}",
                f"-DDSFP4_CUDA_ARCHITECTURES={architectures}",
                f"-DDSFP4_CUDA_FOLDERS={'' if on_path else self.folder}",
                "-P",
                str(SCRIPT),
            ],
            env={"PATH": str(self.folder / "bin") if on_path else str(self.folder)},
            capture_output=True,
            text=True,
        )
        said = " ".join((done.stdout + done.stderr).split())
        assert (done.returncode == 0) == ("CMake Error" not in said), said
        return said


@pytest.fixture
def tools(tmp_path: Path) -> Tools:
    return Tools(tmp_path)


def test_a_machine_with_neither(tools: Tools) -> None:
    assert "CUDA plugin: not built: there is no nvcc" in tools.decide("AUTO")


def test_a_gpu_without_nvcc(tools: Tools) -> None:
    tools.gpus("8.9")
    assert "not built: there is no nvcc; install the CUDA toolkit" in tools.decide("AUTO")


def test_nvcc_without_a_gpu_is_off_unless_it_is_forced(tools: Tools) -> None:
    tools.nvcc("13.0")
    said = tools.decide("AUTO")
    assert "not built: nvcc is here, but nvidia-smi shows no GPU" in said
    assert "DSFP4_CUDA=ON" in said
    assert tools.decide("ON") == f"-- CUDA plugin: built for {ALL}"


def test_a_driver_that_does_not_run_is_no_gpu(tools: Tools) -> None:
    tools.nvcc("13.0")
    tools.put("nvidia-smi", "echo NVIDIA-SMI has failed 9.9; exit 9")
    assert "nvidia-smi shows no GPU" in tools.decide("AUTO")


@pytest.mark.parametrize(
    ("gpus", "targets"),
    [
        (["8.9"], "89-real"),
        (["9.0"], "90a-real"),
        (["12.0", "12.0"], "120-real"),
        (["10.0", "8.6"], "100-real;86-real"),
        (["7.5", "8.0"], "80-real"),
    ],
)
@pytest.mark.parametrize("option", ["AUTO", "ON"])
def test_it_is_built_for_the_gpus_that_are_here(
    tools: Tools, gpus: list[str], targets: str, option: str
) -> None:
    tools.nvcc("13.0")
    tools.gpus(*gpus)
    assert tools.decide(option) == f"-- CUDA plugin: built for {targets}"


def test_nvcc_need_not_be_on_path(tools: Tools) -> None:
    tools.nvcc("13.0")
    assert tools.decide("ON", on_path=False) == f"-- CUDA plugin: built for {ALL}"


def test_off_is_off(tools: Tools) -> None:
    tools.nvcc("13.0")
    tools.gpus("8.9")
    assert tools.decide("OFF") == "-- CUDA plugin: not built: DSFP4_CUDA is OFF"


@pytest.mark.parametrize(("named", "targets"), [("all", ALL), ("80-real;90a", "80-real;90a")])
def test_architectures_that_are_named_come_first(tools: Tools, named: str, targets: str) -> None:
    tools.nvcc("13.0")
    tools.gpus("8.9")
    assert tools.decide("AUTO", architectures=named) == f"-- CUDA plugin: built for {targets}"


def test_a_gpu_that_is_too_old(tools: Tools) -> None:
    tools.nvcc("13.0")
    tools.gpus("7.5")
    assert "older than compute capability 8.0" in tools.decide("AUTO")


def test_an_nvcc_that_is_too_old(tools: Tools) -> None:
    tools.nvcc("12.4")
    tools.gpus("12.0")
    said = tools.decide("AUTO")
    assert "is of CUDA 12.4 and does not know sm_120; install a newer CUDA toolkit" in said
    said = tools.decide("ON", architectures="all")
    assert "CMake Error" in said
    assert "does not know sm_100, sm_120" in said
    tools.nvcc("11.8")
    assert "of CUDA 11.8; 12.0 or later is needed" in tools.decide("AUTO", architectures="80")


def test_on_without_nvcc_is_an_error(tools: Tools) -> None:
    said = tools.decide("ON")
    assert "CMake Error" in said
    assert "DSFP4_CUDA is ON, but there is no nvcc" in said


def test_a_word_that_is_none_of_the_three(tools: Tools) -> None:
    assert "must be ON, OFF or AUTO, not 'yes'" in tools.decide("yes")


@pytest.mark.skipif(shutil.which("ninja", path=PROGRAMS) is None, reason="there is no ninja")
def test_it_is_the_default_of_a_build(tools: Tools, tmp_path: Path) -> None:
    tools.nvcc("13.0")
    tools.put("nvidia-smi", "exit 9")
    done = subprocess.run(
        [str(CMAKE), "-G", "Ninja", "-S", str(SCRIPT.parents[1]), "-B", str(tmp_path / "build")],
        env=os.environ | {"PATH": f"{tools.folder / 'bin'}:{PROGRAMS}"},
        capture_output=True,
        text=True,
    )
    assert "nvcc is here, but nvidia-smi shows no GPU" in done.stdout, done.stderr
