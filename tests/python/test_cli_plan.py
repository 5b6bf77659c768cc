"""`dsfp4 plan`: what it says of models and machines, measured or described."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest

from dsfp4 import _core
from dsfp4.cli import main
from dsfp4.cli import plan as command
from dsfp4.doctor import Rates as Measured
from dsfp4.estimate import Rate, Rates
from dsfp4.forecast import Hardware, forecast, gains
from fixtures.checkpoint_io import read_shard, write_shard
from fixtures.fake_machine import NOT_BUILT, FakeMachine
from fixtures.plans import FakePlanner

Capture = pytest.CaptureFixture[str]
ROOT = Path(__file__).parents[2]
TARGET = ["--gpu-memory", "16", "--ram", "96", "--ssd-rate", "14", "--pcie-rate", "55"]
GB = 10**9


def plan_json(capsys: Capture, *arguments: str) -> dict[str, Any]:
    assert main(["plan", *arguments, "--json"]) == 0
    facts: dict[str, Any] = json.loads(capsys.readouterr().out)
    return facts


def bytes_in(facts: dict[str, Any], tier: str) -> int:
    return sum(role["bytes"] for role in facts["plan"]["roles"] if role["tier"] == tier)


def test_a_described_machine(capsys: Capture) -> None:
    assert main(["plan", "deepseek-r1-fp4", *TARGET, "--context", "32768"]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[0] == (
        "deepseek-r1-fp4: 61 layers, 58 of them with 256 experts of 24.8 MB, 8 active"
    )
    assert lines[1].startswith("on disk: 397 GB; 26.9 GB more is not needed to decode")
    assert "SSD 14 GB/s (given), RAM 60 GB/s (assumed), PCIe 55 GB/s (given)" in out
    assert "placement for a context of 32768 tokens" in lines
    assert re.search(r"^routed experts +\d+ MB +[89]\d\.\d GB +368 GB$", out, re.MULTILINE)
    assert re.search(r"^0\.2\d evenly +1\.[2-6]\d* .* SSD$", out, re.MULTILINE)
    assert re.search(r"^0\.50 ", out, re.MULTILINE)
    assert re.search(r"expect 1\.\d+ to [23]\.\d+ tokens/s: from routing", out)
    assert re.search(r"^ 32768 .* s ", out, re.MULTILINE)
    assert "decoding is bound by: SSD" in lines
    assert re.search(r"^faster with an SSD of 28 GB/s: 1\.[5-9]\d* times$", out, re.MULTILINE)
    assert re.search(r"^faster with twice the RAM, 192 GB: 1\.[2-6]\d* times$", out, re.MULTILINE)
    assert out.count("faster with") == 2


def test_all_of_it_as_json(capsys: Capture) -> None:
    facts = plan_json(capsys, "deepseek-r1-fp4", *TARGET, "--ram-rate", "70", "--context", "4096")
    rates = facts["machine"]["rates"]
    assert rates["ram"] == {"value": 70.0, "source": "given"}
    assert rates["vram"]["source"] == rates["gpu_tflops"]["source"] == "assumed"
    assert (facts["machine"]["vram"], facts["machine"]["ram"]) == (16 * GB, 96 * GB)
    plan = facts["plan"]
    assert plan["max_context"] == 4096
    cached = plan["cache_slots"] + plan["device_cache_slots"]
    evenly, likely = facts["evenly"], facts["likely"]
    assert evenly["hit_rate"] == pytest.approx(cached / facts["model"]["experts"])
    assert likely["hit_rate"] == pytest.approx((1 + evenly["hit_rate"]) / 2)
    assert facts["table"][0] == evenly
    rows = [row["hit_rate"] for row in facts["table"][1:]]
    rounder = (0.25, 0.5, 0.75, 0.9, 1.0)
    assert rows == [rate for rate in rounder if rate > evenly["hit_rate"] + 0.005]
    for row in (evenly, likely, *facts["table"]):
        estimate = row["estimate"]
        assert estimate["tokens_per_second"] == pytest.approx(1 / estimate["seconds"])
        assert estimate["binds"] in estimate["floor"]
        assert set(estimate["bytes"]) == {"ssd", "pcie", "ram", "vram", "host"}
    assert [prompt["tokens"] for prompt in facts["prompts"]] == [512, 4096]
    assert len(facts["gains"]) == 2


@pytest.mark.parametrize("name", _core.published_models())
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_published_models_keep_to_their_limits(capsys: Capture, name: str, device: str) -> None:
    facts = plan_json(
        capsys, name, *TARGET, "--device", device, "--ram-limit", "64", "--memory-limit", "14"
    )
    assert 0 < bytes_in(facts, "ram") <= 64 * GB
    vram = bytes_in(facts, "vram")
    assert 0 < vram <= 14 * GB if device == "cuda" else vram == 0
    experts = facts["model"]["experts"] * facts["model"]["expert_bytes"]
    assert bytes_in(facts, "ssd") >= (experts if facts["plan"]["tiered"] else 0)
    assert facts["files"]["needed_bytes"] > experts
    assert facts["files"]["files"] == []


def test_what_cannot_run_is_refused_with_the_number(capsys: Capture) -> None:
    assert main(["plan", "deepseek-r1-fp4", "--gpu-memory", "3", "--ram", "96"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    needed = re.search(r"error: .* need (\d+\.\d+) GB of VRAM and (\d+\.\d+) GB are available", err)
    assert needed is not None, err
    enough = 3.001 + float(needed[1]) - float(needed[2])
    assert main(["plan", "deepseek-r1-fp4", "--gpu-memory", f"{enough:.3f}", "--ram", "96"]) == 0

    assert main(["plan", "deepseek-r1-fp4", "--device", "cpu", "--ram", "1"]) == 1
    assert " GB are available" in capsys.readouterr().err


def test_no_gpu(capsys: Capture) -> None:
    for arguments in (["--gpu-memory", "0"], ["--device", "cpu"]):
        facts = plan_json(capsys, "deepseek-v2-lite", "--ram", "64", *arguments)
        assert facts["machine"]["vram"] is None
        assert facts["evenly"]["hit_rate"] == 1.0
        assert facts["evenly"]["estimate"]["bytes"]["pcie"] == 0
    assert main(["plan", "deepseek-v2-lite", "--ram", "64", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "takes, without a GPU: RAM 3" in out
    assert re.search(r"^expect .* tokens/s: no expert is read from the SSD$", out, re.MULTILINE)
    assert "PCIe 25" not in out


def test_device_cuda_needs_vram(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine = FakeMachine(tmp_path).examine(nvidia_smi=lambda: "", plugin=lambda: NOT_BUILT)
    monkeypatch.setattr(command, "examine", lambda folder: machine)
    assert main(["plan", "deepseek-r1-fp4", "--ram", "96", "--device", "cuda"]) == 1
    assert "parameter 'gpu_memory': must be given for device cuda" in capsys.readouterr().err


def test_an_unknown_name(capsys: Capture) -> None:
    assert main(["plan", "deepseek-r2"]) == 1
    assert "without a checkpoint, one of deepseek-r1-fp4, " in capsys.readouterr().err
    assert main(["plan", "org/deepseek-r2"]) == 1
    assert "`dsfp4 pull org/deepseek-r2`" in capsys.readouterr().err


def test_the_demo_model(capsys: Capture, demo_model: Path) -> None:
    facts = plan_json(capsys, "demo", "--no-rates", "--device", "cpu")
    files = facts["files"]
    assert {"config.json", "tokenizer.json"} <= set(files["files"])
    assert files["unneeded_files"] == []
    assert files["needed_bytes"] == sum(
        (demo_model / name).stat().st_size for name in files["files"]
    )
    assert facts["evenly"]["hit_rate"] == 1.0
    assert facts["machine"]["rates"]["ssd"]["source"] == "assumed"
    # With few experts in RAM a token reads the others.
    facts = plan_json(capsys, "demo", "--no-rates", "--device", "cpu", "--cpu-cache-size", "0.001")
    assert 0 < facts["evenly"]["hit_rate"] < 1
    assert facts["evenly"]["estimate"]["bytes"]["ssd"] > 0


def test_files_of_no_use_are_named(
    capsys: Capture, random_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(random_checkpoint("v3-nvfp4-mtp"), folder)
    index_path = folder / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    mtp: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors = read_shard(path)
        mtp |= {name: t for name, t in tensors.items() if name.startswith("model.layers.3.")}
        write_shard(path, {name: t for name, t in tensors.items() if name not in mtp})
    write_shard(folder / "mtp.safetensors", mtp)
    index["weight_map"].update(dict.fromkeys(mtp, "mtp.safetensors"))
    index_path.write_text(json.dumps(index))

    facts = plan_json(capsys, str(folder), "--no-rates", "--device", "cpu")
    assert facts["files"]["unneeded_files"] == ["mtp.safetensors"]
    size = (folder / "mtp.safetensors").stat().st_size
    assert facts["files"]["unneeded_bytes"] == size
    assert main(["plan", str(folder), "--no-rates", "--device", "cpu"]) == 0
    assert "more is not needed to decode, mtp.safetensors" in " ".join(
        capsys.readouterr().out.split()
    )


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[float]:
    """This machine has an RTX 4090; returns the seconds of each measurement that is made."""
    machine = FakeMachine(tmp_path).examine()
    measurements: list[float] = []

    def measure(machine: Any, seconds: float) -> Measured:
        measurements.append(seconds)
        return Measured(ssd=6.5, ram=61.0, copy_in=24.5, copy_out=24.0, vram=930.0)

    monkeypatch.setattr(command, "examine", lambda folder: machine)
    monkeypatch.setattr(command, "measure", measure)
    return measurements


def test_this_machine_is_measured(capsys: Capture, here: list[float]) -> None:
    facts = plan_json(capsys, "deepseek-r1-fp4", "--seconds", "0.5", "--ssd-rate", "7")
    assert here == [0.5]
    rates = facts["machine"]["rates"]
    assert rates["ssd"] == {"value": 7.0, "source": "given"}
    assert rates["pcie"] == {"value": 24.5, "source": "measured"}
    assert rates["vram"] == {"value": 930.0, "source": "measured"}
    assert facts["machine"]["vram"] == (24564 - 512) << 20
    assert facts["machine"]["ram"] == 60 * GB // 1024 * 1024
    assert bytes_in(facts, "ram") <= facts["machine"]["ram_limit"] < 60 * GB


def test_a_gpu_that_this_build_cannot_use_is_no_gpu(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine = FakeMachine(tmp_path).examine(plugin=lambda: NOT_BUILT)
    monkeypatch.setattr(command, "examine", lambda folder: machine)
    facts = plan_json(capsys, "deepseek-v2-lite", "--no-rates")
    assert facts["machine"]["vram"] is None
    assert main(["plan", "deepseek-v2-lite", "--no-rates", "--device", "cuda"]) == 1
    assert NOT_BUILT.problem is not None
    assert NOT_BUILT.problem in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        ["--no-rates"],
        ["--ram", "64"],
        ["--gpu-memory", "16"],
        ["--ssd-rate", "7", "--ram-rate", "60", "--pcie-rate", "25", "--vram-rate", "900"],
        ["--device", "cpu", "--ssd-rate", "7", "--ram-rate", "60"],
    ],
)
def test_nothing_is_measured(capsys: Capture, here: list[float], flags: list[str]) -> None:
    facts = plan_json(capsys, "deepseek-v2-lite", *flags)
    assert here == []
    sources = {rate["source"] for name, rate in facts["machine"]["rates"].items()
               if isinstance(rate, dict)}  # fmt: skip
    assert "measured" not in sources


class Recorder(FakePlanner):
    """Keeps what it is made and asked with."""

    made: ClassVar[list[tuple[str, dict[str, Any]]]] = []
    asked: ClassVar[list[dict[str, Any]]] = []

    def __init__(self, model: str, **options: Any) -> None:
        super().__init__()
        self.made.append((model, options))

    def plan(self, **options: Any) -> dict[str, Any]:
        self.asked.append(options)
        return super().plan(**options)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> type[Recorder]:
    monkeypatch.setattr(Recorder, "made", [])
    monkeypatch.setattr(Recorder, "asked", [])
    monkeypatch.setattr(_core, "Planner", Recorder)
    return Recorder


def test_flags_of_a_load_reach_the_planner(recorder: type[Recorder]) -> None:
    arguments = [
        *("--kv-cache-dtype", "fp8", "--threads", "3", "--quantization", "o_proj=nvfp4"),
        *("--memory-limit", "14", "--ram-limit", "90", "--max-context", "2048"),
        *("--cpu-cache-size", "50", "--prefetch-size", "2", "--max-experts", "5"),
        *("--gpu-reserved", "1.5", "--max-gpu-layers", "40", "--min-layers", "4"),
        *("--prefetch-layers", "2"),
    ]
    assert main(["plan", "deepseek-r1-fp4", *TARGET, *arguments]) == 0
    model, options = recorder.made[0]
    assert (model, options.pop("published"), options.pop("device")) == (
        "deepseek-r1-fp4",
        True,
        "cuda",
    )
    assert options == {
        "kv_cache_dtype": "fp8",
        "threads": 3,
        "quantization": {"o_proj": "nvfp4"},
    }
    assert recorder.asked[0] == {
        "ram": 96 * GB,
        "vram": 14 * GB,
        "ram_limit": 90 * GB,
        "max_context": 2048,
        "cpu_cache_size": 50.0,
        "prefetch_size": 2.0,
        "max_experts": 5,
        "gpu_reserved": 1.5,
        "max_gpu_layers": 40,
        "min_layers": 4,
        "prefetch_layers": 2,
    }
    # Twice the RAM is of use under a limit only if that is twice as high.
    more = [asked["ram_limit"] for asked in recorder.asked if asked["ram"] == 192 * GB]
    assert more == [180 * GB]


def test_a_gpu_that_is_too_small_is_passed_over_as_by_a_load(
    capsys: Capture, here: list[float], recorder: type[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "_vram", lambda arguments, machine: 8 * GB)
    assert main(["plan", "deepseek-r1-fp4"]) == 0
    out, err = capsys.readouterr()
    assert err == "dsfp4: using the CPU: too little VRAM\n"
    assert [options["device"] for _, options in recorder.made] == ["cuda", "cpu"]
    assert "takes, without a GPU" in out
    for flags in (["--device", "cuda"], ["--gpu-memory", "8"], ["--max-experts", "3"]):
        assert main(["plan", "deepseek-r1-fp4", *flags]) == 1
        assert capsys.readouterr().err == "dsfp4: error: too little VRAM\n"


def hardware(**changes: Any) -> Hardware:
    values: dict[str, Any] = {"vram": 16 * GB, "ram": 96 * GB, "ram_limit": 0, "wishes": {}}
    rates = Rates(ssd=Rate(14), ram=Rate(70), pcie=Rate(55), vram=Rate(900))
    return Hardware(**({"rates": rates} | values | changes))


def test_advice_is_the_best_two_doublings() -> None:
    planner = FakePlanner()
    result = forecast(planner, hardware())
    assert [gain.change for gain in result.gains] == [
        "an SSD of 28 GB/s",
        "twice the RAM, 192 GB",
    ]
    # Each is what a machine that has it reaches.
    better = forecast(planner, hardware(ram=192 * GB))
    gain = result.evenly.estimate.seconds / better.evenly.estimate.seconds
    assert result.gains[1].factor == pytest.approx(gain)
    # With all experts in RAM its rate decides, and PCIe beside it does not.
    ample = hardware(ram=500 * GB)
    seconds = forecast(planner, ample).evenly.estimate.seconds
    assert gains(planner, ample, seconds)[0].change == "RAM of 140 GB/s"


def test_a_machine_that_lacks_nothing_gets_no_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsfp4.forecast._LEAST_GAIN", 1000.0)
    result = forecast(FakePlanner(), hardware())
    assert result.gains == []
    text = "\n".join(command.lines(FakePlanner.model, FILES, hardware(), result))
    assert "no single part" in text


FILES: dict[str, Any] = {
    "name": "model",
    "needed_bytes": 1,
    "unneeded_bytes": 0,
    "files": [],
    "unneeded_files": [],
}


def test_a_hopper_has_kernels_of_its_own(tmp_path: Path) -> None:
    parser = command.argparse.ArgumentParser()
    command.add_machine_flags(parser)
    arguments = parser.parse_args([])
    card = "NVIDIA H200, 570.86.15, {}, 143771, 0, 16, 16\n"
    for capability, tflops, rows in (("9.0", 290, 64), ("8.9", 40, 16)):
        folder = tmp_path / capability
        folder.mkdir()
        machine = FakeMachine(folder).examine(nvidia_smi=lambda text=capability: card.format(text))
        rates = command.rates_of(arguments, machine, Measured())
        assert (rates.gpu_tflops, rates.gpu_rows) == (Rate(tflops, "assumed"), rows)


def test_slow_machines_have_plain_numbers(capsys: Capture) -> None:
    machine = ["--device", "cpu", "--ram", "24", "--ssd-rate", "0.5", "--ram-rate", "10"]
    assert main(["plan", "deepseek-r1-fp4", *machine, "--context", "32768"]) == 0
    assert not re.search(r"\de\+\d", capsys.readouterr().out)


def test_a_picture(tmp_path: Path, capsys: Capture) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib draws: pip install 'dsfp4[plot]'")
    picture = tmp_path / "plan.png"
    assert main(["plan", "deepseek-r1-fp4", *TARGET, "--plot", str(picture)]) == 0
    assert picture.stat().st_size > 1000
    missing = tmp_path / "no" / "plan.png"
    assert main(["plan", "deepseek-r1-fp4", *TARGET, "--plot", str(missing)]) == 1
    assert "is not a folder" in capsys.readouterr().err


def test_the_plan_that_docs_check_by_hand(capsys: Capture) -> None:
    page = (ROOT / "docs" / "plan-r1.md").read_text(encoding="utf-8")
    [command_line] = re.findall(r"^    (dsfp4 plan .*?)\n\n", page, re.DOTALL | re.MULTILINE)
    words = command_line.replace("\\\n", " ").split()
    assert main(words[1:]) == 0
    out = capsys.readouterr().out
    shown = {
        "attention": ("3.21 GB", "1.05 GB"),
        "o_proj": ("3.04 GB", "991 MB"),
        "mlp": ("669 MB",),
        "shared_experts": ("1.07 GB", "372 MB"),
        "router": ("213 MB",),
        "lm_head": ("1.85 GB",),
        "buffers for layers": ("321 MB",),
        "routed experts": ("198 MB", "89.5 GB", "368 GB"),
        "KV cache": ("2.3 GB",),
        "activations": ("2.52 GB",),
        "CUDA context": ("537 MB",),
    }
    for role, sizes in shown.items():
        [line] = [line for line in out.splitlines() if re.match(rf"{role}  ", line)]
        for size in sizes:
            assert size in line
            assert size.split()[0] in page
    assert "15 of 61 layers" in out
    assert re.search(r"^0\.24 evenly +1\.42 .* 8\.71 GB .* 22\.6 GB ", out, re.MULTILINE)
    assert "expect 1.42 to 2.76 tokens/s" in out
    assert re.search(r"^  4096 +21\.9 s .* 279 GB  SSD$", out, re.MULTILINE)
    assert re.search(r"^ 32768 +138 s .* arithmetic$", out, re.MULTILINE)
