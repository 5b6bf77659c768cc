"""The machine's rates: measured once with a model that is large enough, and kept."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import dsfp4

SCRIPT = Path(__file__).parents[2] / "bench" / "make_checkpoint.py"
WIRES = {"ssd", "host_experts"}  # without a GPU


def load(folder: Path, **options: Any) -> dsfp4.Model:
    return dsfp4.Model(folder, threads=2, max_context=8, cpu_cache_size=0.3, **options)


def test_rates_are_measured_once(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    made = subprocess.run(
        [sys.executable, str(SCRIPT), "--dense-layers", "0", "--moe-layers", "1", "--sparse",
         *("--attention", "fp8-nvfp4", "--vocab", "64", "--experts", "16", str(folder))],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert load(folder, warm_start=False).stats()["rates"] == {}

    rates = load(folder, warm_start=tmp_path / "kept").stats()["rates"]
    assert set(rates) == WIRES
    assert all(0 < rate < 1e4 for rate in rates.values())
    assert len(list((tmp_path / "kept").glob("*.rates"))) == 1
    # Two measurements are never so near.
    assert load(folder, warm_start=tmp_path / "kept").stats()["rates"] == pytest.approx(
        rates, rel=1e-6
    )
    for file in folder.glob("*.safetensors"):
        file.unlink()  # pytest keeps folders for a while


def test_a_small_model_is_not_worth_it(tmp_path: Path) -> None:
    model = dsfp4.Model("demo", threads=1, max_context=64, cpu_cache_size=0, warm_start=tmp_path)
    stats = model.stats()
    assert stats["tiered"]
    assert stats["rates"] == {}
    del model
    assert list(tmp_path.glob("*.rates")) == []
