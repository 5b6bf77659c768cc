"""`dsfp4 bench decode`: its arguments, the arithmetic of its report, and a run without a GPU."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dsfp4
from dsfp4.cli import bench_decode, decode_floor, decode_report
from dsfp4.cli.decode_floor import Rates
from dsfp4.errors import ParameterError

WIRES = {
    "copies": 50e9,
    "host": 100e9,
    "copies_beside": 40e9,
    "host_beside": 60e9,
    "together": 100e9,
}


def parse(*texts: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench_decode.add_command(parser.add_subparsers())
    return parser.parse_args(["decode", "MODEL", "--cpu-cache-size", "1", *texts])


def counted(**values: Any) -> dict[str, Any]:
    """Return the counts of a run, all else 0."""
    names = (
        *("demand_bytes", "prefetched_bytes", "streamed_bytes", "read_bytes", "used_bytes"),
        *(
            "device_hits",
            "uploads_ahead_used",
            "hits",
            "misses",
            "joined",
            "prefetched",
            "wasted_bytes",
            "predicted",
        ),
        *("predicted_used", "predictable", "wait_seconds", "stream_wait_seconds", "uploads"),
        *("expert_seconds", "ssd_busy_seconds", "uploaded_bytes", "cpu_bytes", "cpu_seconds"),
        *("image_bytes", "process_cpu_seconds", "layer_upload_bytes", "layer_upload_wait_seconds"),
    )
    return {name: 0 for name in names} | {"tokens": 10, "seconds": 1.0} | values


def test_cpu_share_may_be_given_several_times() -> None:
    assert parse().cpu_share == []
    assert parse("--cpu-share", "auto").cpu_share == [None]
    several = parse("--cpu-share", "0", "--cpu-share", "1", "--cpu-share", "auto", "--repeat", "3")
    assert several.cpu_share == [0.0, 1.0, None]
    assert several.repeat == 3


def test_the_numbers_of_layers_reach_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(bench_decode, "Model", lambda *_, **options: given.update(options))
    arguments = parse("--max-gpu-layers", "5", "--min-layers", "3")
    bench_decode._load(arguments, Path("folder"), 100)
    assert (given["max_gpu_layers"], given["min_layers"]) == (5, 3)


@pytest.mark.parametrize("text", ["-0.1", "1.5", "nan", "half", ""])
def test_bad_shares_are_named(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(f"--cpu-share={text}")
    assert f"'{text}' is neither a number from 0 to 1 nor auto" in capsys.readouterr().err


def test_the_floor_without_a_gpu_is_the_larger_of_disk_and_arithmetic() -> None:
    run = counted(demand_bytes=3e9, prefetched_bytes=1e9, streamed_bytes=2e9)
    for compute, floor in ((0.1, 3.0), (0.5, 5.0)):
        parts = decode_floor.floor_parts(run, Rates(ssd=2.0, compute=compute))
        assert parts == pytest.approx({"ssd": 3.0, "compute": 10 * compute})
        assert decode_floor.floor_of(parts) == pytest.approx(floor)


def test_the_floor_beside_a_gpu_adds_the_dense_part_to_both_wires() -> None:
    # 7 experts of 1 GB, 2 of them in VRAM: 5 GB cross the wires at 100 GB/s.
    run = counted(used_bytes=7e9, device_hits=2, image_bytes=1e9, demand_bytes=1e8)
    rates = Rates(ssd=1.0, dense=0.01, wires=WIRES)
    parts = decode_floor.floor_parts(run, rates)
    assert parts == pytest.approx({"ssd": 0.1, "dense": 0.1, "wires": 0.05})
    assert decode_floor.floor_of(parts) == pytest.approx(0.15)
    assert decode_floor.judge(run, rates)["time_over_floor"] == pytest.approx(1 / 0.15)
    slow_disk = decode_floor.judge(run, Rates(ssd=0.2, dense=0.01, wires=WIRES))
    assert slow_disk["time_over_floor"] == pytest.approx(2.0)


def test_layers_that_a_gpu_copies_from_ram_are_not_the_disks() -> None:
    run = counted(demand_bytes=1e9, layer_upload_bytes=8e9)
    rates = Rates(ssd=1.0, dense=0.01, wires=WIRES)  # a token's dense part has the copies in it
    assert decode_floor.floor_parts(run, rates) == pytest.approx(
        {"ssd": 1.0, "dense": 0.1, "wires": 0.0}
    )
    assert decode_floor.judge(run, rates)["useful_bytes"] == 1e9
    assert decode_floor.judge(run, rates)["layer_upload_bytes"] == 8e9
    from_ssd = counted(demand_bytes=1e9, streamed_bytes=8e9)
    assert decode_floor.judge(from_ssd, Rates(ssd=1.0, compute=0.1))["useful_bytes"] == 9e9


def test_hit_rates_add_up_over_the_tiers() -> None:
    run = counted(device_hits=5, hits=3, misses=1, joined=0, prefetched=1)
    assert decode_floor.hit_rates(run) == {"vram": 0.5, "ram": 0.3, "ssd": 0.2}
    assert decode_floor.hit_rates(counted()) == {"vram": 0.0, "ram": 0.0, "ssd": 0.0}
    assert decode_floor.judge(run, Rates(ssd=1.0, compute=1.0))["hit_rate"] == pytest.approx(0.8)


def test_processor_time_is_said_for_each_gb_read() -> None:
    rates = Rates(ssd=1.0, compute=1.0)
    run = counted(process_cpu_seconds=3.0, read_bytes=2_000_000_000)
    assert decode_floor.judge(run, rates)["process_cpu_seconds_per_gb_read"] == pytest.approx(1.5)
    nothing_read = decode_floor.judge(counted(process_cpu_seconds=3.0), rates)
    assert nothing_read["process_cpu_seconds_per_gb_read"] is None


def test_a_row_is_the_median_run_of_its_share() -> None:
    runs = [counted(seconds=seconds, cpu_bytes=seconds * 1e9) for seconds in (4.0, 1.0, 2.0)]
    row = decode_floor.judge_share(None, runs, Rates(ssd=1.0, compute=0.1))
    assert row["cpu_share"] == "auto"
    assert row["seconds"] == 2.0
    assert row["cpu_bytes"] == 2e9
    assert row["time_over_floor"] == pytest.approx(2.0)
    assert row["all_seconds"] == [4.0, 1.0, 2.0]
    assert decode_floor.median_run(runs[:2])["seconds"] == 1.0


def test_a_prompt_beside_a_gpu_has_its_experts_copied_once() -> None:
    prompt = {"seconds": 1.0, "needed_bytes": 1e9, "routed_bytes": 10e9, "compute": 0.9}
    prompt |= {"streamed_bytes": 0, "layer_upload_bytes": 2.5e9}
    on_gpu = decode_floor.judge_prompt(prompt, Rates(ssd=10.0, dense=0.1, wires=WIRES))
    assert on_gpu["floor_seconds"] == pytest.approx({"ssd": 0.1, "copies": 0.25})
    assert on_gpu["time_over_floor"] == pytest.approx(4.0)
    on_cpu = decode_floor.judge_prompt(prompt, Rates(ssd=10.0, compute=0.1))
    assert on_cpu["floor_seconds"] == pytest.approx({"ssd": 0.1, "compute": 0.9})
    assert "compute" not in on_cpu


def test_the_format_is_that_of_most_matrices() -> None:
    description = {
        "roles": [
            {"role": "embedding", "formats": {"bf16": 1}},
            {"role": "routed experts", "formats": {"bf16": 6, "nvfp4": 60}},
        ]
    }
    assert decode_floor.routed_format(description) == "nvfp4"


def measured(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    *texts: str,
    rate: Callable[..., dict[str, float]] = lambda *_: {
        "gb_per_second": 3.0,
        "cpu_seconds_per_gb": 0.25,
    },
) -> dict[str, Any]:
    """Run it on a tiny model, whose files are too small to measure a disk with."""
    monkeypatch.setattr(decode_floor, "ssd_rate", rate)
    arguments = parse("--tokens", "5", "--threads", "1", *texts)
    arguments.model = str(folder)
    report = bench_decode.measure(arguments)
    json.dumps(report)
    return report


@pytest.fixture(scope="module")
def folder(random_checkpoint: Callable[[str], Path]) -> Path:
    return random_checkpoint("v3-nvfp4-real")


def test_shares_are_measured_in_one_load(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads = []
    load = bench_decode._load
    monkeypatch.setattr(bench_decode, "_load", lambda *given: loads.append(1) or load(*given))
    shares = ("--cpu-share", "0", "--cpu-share", "auto", "--repeat", "2")
    report = measured(folder, monkeypatch, "--cpu-cache-size", "0", *shares)
    assert len(loads) == 1
    assert [row["cpu_share"] for row in report["cpu_shares"]] == [0.0, "auto"]
    assert all(len(row["all_seconds"]) == 2 for row in report["cpu_shares"])
    lines = list(decode_report.lines(report))
    header = next(i for i, line in enumerate(lines) if "cpu-share" in line)
    assert lines[header + 1].split()[0] == "0.0"
    assert lines[header + 2].split()[0] == "auto"
    for run in (report["cold"], report["warm"], *report["cpu_shares"]):
        assert sum(run["hit_rates"].values()) == pytest.approx(1.0)
        assert run["floor_seconds"].keys() == {"ssd", "compute"}


def test_stages_are_switched_off_in_turn(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    switched = []
    set_streams = dsfp4.Model.set_compute_streams
    monkeypatch.setattr(
        dsfp4.Model,
        "set_compute_streams",
        lambda model, streams: switched.append(streams) or set_streams(model, streams),
    )
    without = measured(folder, monkeypatch, "--cpu-cache-size", "0", "--stages")
    assert [row["off"] for row in without["stages"]] == [None, "prefetch", "compute", "transfer"]
    assert switched == [{}, {"prefetch": False}, {"compute": False}, {"transfer": False}, {}]
    assert all(row["decode_seconds"] > 0 for row in without["stages"])
    assert any(line.startswith("without transfer: ") for line in decode_report.lines(without))
    report = measured(folder, monkeypatch, "--cpu-cache-size", "0", "--stages", "--prompt", "9")
    assert {row["prompt_tokens"] for row in report["stages"]} == {9}
    assert any("a prompt of 9 in " in line for line in decode_report.lines(report))


def test_one_share_makes_no_table(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = measured(folder, monkeypatch, "--cpu-cache-size", "0", "--prompt", "9")
    assert report["cpu_shares"] == []
    (prompt,) = report["prefill"]
    assert (prompt["tokens"], prompt["cached"]) == (9, False)
    text = "\n".join(decode_report.lines(report))
    assert "cpu-share" not in text
    assert "held" not in text
    assert "0.25 s of processor time a GB" in text
    assert "dense weights copied" not in text
    report["warm"] |= {"layer_upload_bytes": 3e9, "layer_upload_wait_seconds": 0.5}
    text = "\n".join(decode_report.lines(report))
    assert "3.0 GB of dense weights copied to VRAM; the GPU waited for them for 0.50 s" in text


def test_a_prompt_is_measured_with_experts_in_ram_too(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slots = dsfp4.Model(folder, cpu_cache_size=0, threads=1, max_context=64).stats()["slot_bytes"]
    config = dsfp4.Model(folder, threads=1, max_context=64).config
    experts = config["n_routed_experts"] * (
        config["num_hidden_layers"] - config["first_k_dense_replace"]
    )
    fill = bench_decode._fill_cache
    monkeypatch.setattr(bench_decode, "_fill_cache", lambda model: fill(model) or True)
    size = str((experts - 1) * slots * 1e-9)  # one more would be loaded whole
    cold, cached = measured(folder, monkeypatch, "--cpu-cache-size", size, "--prompt", "9")[
        "prefill"
    ]
    assert (cold["cached"], cached["cached"]) == (False, True)
    assert cold["needed_bytes"] == cold["routed_bytes"] > 0
    assert cached["needed_bytes"] == 0
    assert cached["read_bytes"] < cold["read_bytes"]


def test_reads_held_to_a_rate_are_said_in_words(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = measured(folder, monkeypatch, "--cpu-cache-size", "0", "--ssd-rate", "0.5")
    assert (slow["raw_ssd_gb_s"], slow["measured_ssd_gb_s"]) == (0.5, 3.0)
    text = "\n".join(decode_report.lines(slow))
    assert "disk: 3.00 GB/s" in text
    assert "reads were held to 0.5 GB/s, as if the disk were that slow" in text
    fast = measured(folder, monkeypatch, "--cpu-cache-size", "0", "--ssd-rate", "14")
    assert fast["raw_ssd_gb_s"] == 3.0
    assert "but this disk gives less" in "\n".join(decode_report.lines(fast))


def test_the_disk_is_measured_between_parts_of_a_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded, rates = [], iter(range(1, 10))
    decode = bench_decode._decode
    monkeypatch.setattr(
        bench_decode, "_decode", lambda model, ids: decoded.append(len(ids)) or decode(model, ids)
    )
    report = measured(
        folder,
        monkeypatch,
        *("--cpu-cache-size", "0", "--tokens", "33"),
        rate=lambda *_: {"gb_per_second": float(next(rates)), "cpu_seconds_per_gb": 0.25},
    )
    assert decoded == [9, 8, 8, 8] * 2  # cold, then warm
    assert report["measured_ssd_windows"] == [float(i) for i in range(1, 10)]
    assert report["raw_ssd_gb_s"] == 5.0
    assert "disk: 5.00 GB/s (1.00 to 9.00 in 9 windows)" in "\n".join(decode_report.lines(report))


def test_parts_of_a_run_add_up() -> None:
    parts = [counted(seconds=1.0, misses=3, image_bytes=7), counted(misses=4, image_bytes=7)]
    whole = decode_floor.sum_of(parts)
    assert (whole["tokens"], whole["seconds"]) == (20, 2.0)
    assert (whole["misses"], whole["image_bytes"]) == (7, 7)


def test_a_cache_for_all_experts_is_filled_before_shares_are_compared(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = dsfp4.Model(folder, cpu_cache_size=0, threads=1, max_context=64, warm_start=False)
    stats = whole.stats()
    config = whole.config
    experts = config["n_routed_experts"]
    layers = config["num_hidden_layers"] - config["first_k_dense_replace"]
    forced = []
    monkeypatch.setattr(whole, "forward", lambda _, experts, **__: forced.append(experts))
    bench_decode._fill_cache(whole)
    assert forced == []
    monkeypatch.setattr(whole, "stats", lambda: stats | {"cache_slots": layers * experts})
    bench_decode._fill_cache(whole)
    assert all(set(layer.flatten()) == set(range(experts)) for layer in forced[0])
    assert len(forced[0]) == layers


def test_tokens_are_timed_one_by_one_with_and_without_experts(folder: Path) -> None:
    options: dict[str, Any] = {"threads": 1, "max_context": 64, "warm_start": False}
    tiered = dsfp4.Model(folder, cpu_cache_size=0, **options)
    seconds = tiered.token_seconds([3, 4, 5], routed_experts=False)
    assert len(seconds) == 3
    assert min(seconds) > 0
    assert tiered.stats()["total_pairs"] == 0
    assert decode_floor.dense_seconds(tiered, 3) > 0
    assert len(tiered.token_seconds([3, 4, 5])) == 3
    assert tiered.stats()["total_pairs"] == 3 * tiered._core.moe_layers * 4
    with pytest.raises(ParameterError, match="routed_experts"):
        dsfp4.Model(folder, **options).token_seconds([3], routed_experts=False)


def test_a_prompt_s_experts_are_known_without_logits(folder: Path) -> None:
    model = dsfp4.Model(folder, threads=1, max_context=64)
    ids = range(3, 40)
    _, chosen = model.forward(ids, return_experts=True)
    assert np.array_equal(model.chosen_experts(ids), chosen)


def test_settings_go_back_to_auto(folder: Path) -> None:
    options = {"cpu_cache_size": 0, "threads": 1, "max_context": 64, "warm_start": False}
    dsfp4.Model(folder, cpu_share="auto", prefetch_layers="auto", **options)
    model = dsfp4.Model(folder, **options)
    seen = []
    core = model._core

    class Watched:
        def set_memory_config(self, **wanted: Any) -> None:
            seen.append((wanted["cpu_share"], wanted["prefetch_layers"]))
            core.set_memory_config(**wanted)

    model._core = Watched()  # type: ignore[assignment]
    for share, layers in ((0.5, 2), (None, None), ("auto", "auto"), (None, None), (1, 0)):
        model.set_memory_config(cpu_share=share, prefetch_layers=layers)  # type: ignore[arg-type]
    assert seen == [(0.5, 2), (0.5, 2), (None, None), (None, None), (1.0, 0)]
    with pytest.raises(ParameterError, match="cpu_share"):
        model.set_memory_config(cpu_share="half")  # type: ignore[arg-type]
