"""`dsfp4 bench kernels` at small widths: its figures are what their names say."""

import json

import pytest

from dsfp4 import _core
from dsfp4.cli import bench_kernels, main

SMALL = dict(
    HIDDEN=96, INTERMEDIATE=64, EXPERTS=16, TOP_K=2, SLOTS=16, READ_BYTES=1 << 20,
    HEADS=2, LORA=32, NOPE=16, ROPE=8, VALUE=16,
)  # fmt: skip


@pytest.fixture
def small(monkeypatch):
    for name, value in SMALL.items():
        monkeypatch.setattr(bench_kernels, name, value)
    monkeypatch.setattr(bench_kernels, "last_level_cache", lambda _: 1 << 14)


def test_json(small, capsys):
    assert main(["bench", "kernels", "--json", "--quick", "--threads", "2"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["threads"] == 2
    assert report["machine"]["cores"] == _core.available_cores()
    assert report["read_bandwidth_gb_s"] > 0
    assert report["peak_gop_s"]["fp32 sse2"] > 0
    names = {row["name"].split(",")[0].split(" at ")[0] for row in report["results"]}
    assert names == {
        *("linear", "moe layer", "absorb_query", "latent_attention", "expand_value"),
        "prefill attention",
    }
    for row in report["results"]:
        assert row["seconds"] > 0
        assert row["gb_s"] == pytest.approx(row["bytes"] / row["seconds"] / 1e9)
    linear = next(
        row
        for row in report["results"]
        if (row["name"], row["format"], row["tokens"]) == ("linear", "nvfp4", 8)
    )
    assert linear["shape"] == [96, 32]
    assert linear["bytes"] == 96 * 32 * 0.5625
    flops = linear["gflop_s"] * 1e9 * linear["seconds"]
    assert flops == pytest.approx(2 * 96 * 32 * 8)


def test_floor_is_the_larger_of_memory_and_arithmetic(small):
    bench = bench_kernels.Bench("cpu", 1, quick=True)
    bench.read_rate, bench.peak, bench.fp32_peak = 10.0, 100.0, 50.0
    row = bench.result("x", "bf16", [1], 1, [2.0, 4.0, 3.0], read=15.0, flops=100.0)
    assert row["seconds"] == 3.0
    assert row["floor_ratio"] == pytest.approx(1.5 / 3.0)
    row = bench.result("x", "bf16", [1], 1, [4.0], read=1.0, flops=100.0, exact=True)
    assert row["floor_ratio"] == pytest.approx(2.0 / 4.0)


def test_choices_are_different_from_run_to_run(small):
    chosen, distinct = bench_kernels.choices(3, 2)
    assert len(chosen) == 2 * 3 * 2
    assert len(set(chosen[:6])) == distinct
    assert not set(chosen[:6]) & set(chosen[6:])


@pytest.mark.parametrize(
    "arguments,parameter",
    [
        (("int3", 4, 32, 1, 1, 1), "format"),
        (("bf16", 0, 32, 1, 1, 1), "rows"),
        (("bf16", 4, 2**40, 1, 1, 1), "cols"),
    ],
)
def test_sizes_out_of_range_are_named(arguments, parameter):
    bench = _core.KernelBench("cpu", 1)
    with pytest.raises(ValueError, match=f"'{parameter}'"):
        bench.linear(*arguments)


def test_profile_names_the_ops_of_a_layer():
    ops = _core.KernelBench("cpu", 2).profile(
        position=0, rows=1, decode=True, slots=1, expert="nvfp4", runs=1
    )
    names = [name for name, _, _, _ in ops]
    assert names[:3] == ["input_layernorm", "q_a_proj", "q_a_layernorm"]
    assert {"latent_attention", "o_proj", "route", "experts", "combine"} <= set(names)
    assert all(len(seconds) == 1 for *_, seconds in ops)
