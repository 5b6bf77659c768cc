"""Reads held to a rate, for benchmarks: the same bits, and bad rates are refused by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dsfp4
from dsfp4.errors import ParameterError

RATE = 0.5  # GB/s


@pytest.fixture(scope="module")
def folder(random_checkpoint: Callable[[str], Path]) -> Path:
    return random_checkpoint("v3-nvfp4-real")


@pytest.mark.parametrize("reader", ["auto", "pread"])
def test_a_slow_disk_gives_the_same_bits(folder: Path, reader: str) -> None:
    options = {"threads": 1, "max_context": 64, "warm_start": False, "reader": reader}
    ids = np.random.default_rng(0).integers(2, 100, 20)
    fast = dsfp4.Model(folder, cpu_cache_size=0, **options)
    slow = dsfp4.Model(folder, cpu_cache_size=0, ssd_rate=RATE, **options)
    assert slow.stats()["tiered"]
    for decode in (False, True):
        expected = fast.forward(ids, decode=decode)
        np.testing.assert_array_equal(slow.forward(ids, decode=decode), expected)
    stats = slow.stats()  # the disk is busy for at least so long, whatever else the machine does
    assert stats["reads"] > 0
    assert stats["ssd_busy_seconds"] > 0.9 * stats["read_bytes"] / (RATE * 1e9)


@pytest.mark.parametrize("rate", [0, -1, 1e-9, 1001, 1e300, float("nan"), "1", True, 1j])
def test_bad_rates_are_named(folder: Path, rate: Any) -> None:
    with pytest.raises(ParameterError, match="ssd_rate") as raised:
        dsfp4.Model(folder, ssd_rate=rate)
    assert raised.value.parameter == "ssd_rate"
