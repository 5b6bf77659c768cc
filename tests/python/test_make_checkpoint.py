"""`bench/make_checkpoint.py`: what it writes loads, and holes take no disk."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import dsfp4
from dsfp4 import _core

SCRIPT = Path(__file__).parents[2] / "bench" / "make_checkpoint.py"
# The formats of the one layer's attention, whose widths are R1's.
FORMS = {"bf16": {"bf16": 5}, "fp8-nvfp4": {"fp8": 4, "nvfp4": 1}}


def make(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), "--dense-layers", "0", "--moe-layers", "1", *options,
         *("--vocab", "64", "--experts", "16", str(folder))],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.mark.parametrize("attention", FORMS)
def test_a_sparse_checkpoint_loads_and_takes_the_disk_of_its_dense_weights(
    tmp_path: Path, attention: str
) -> None:
    folder = tmp_path / attention
    made = make(folder, "--sparse", "--attention", attention)
    assert made.returncode == 0, made.stderr
    files = list(folder.glob("*.safetensors"))
    experts = 16 * 3 * 7168 * 2048 * 9 // 16
    size = sum(file.stat().st_size for file in files)
    on_disk = sum(512 * file.stat().st_blocks for file in files)
    assert size > experts
    assert on_disk < size - 0.99 * experts

    roles = {role["role"]: role["formats"] for role in _core.describe(str(folder))["roles"]}
    assert roles["attention"] == FORMS[attention]
    assert roles["routed experts"] == {"nvfp4": 48}
    model = dsfp4.Model(folder, threads=2, max_context=8, cpu_cache_size=0.3, warm_start=False)
    logits, chosen = model.forward([3, 1, 4], return_experts=True, decode=True)
    assert np.isfinite(logits).all()
    assert 0.5 < logits.std() < 8  # the stream has its size without the experts
    assert len(np.unique(chosen)) > 8
    for file in files:
        file.unlink()  # pytest keeps folders for a while
