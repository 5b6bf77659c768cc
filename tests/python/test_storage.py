"""The limit of RAM, and `dsfp4 bench storage`."""

import json
import re

import pytest

import dsfp4
from dsfp4 import _core
from dsfp4.cli import main
from dsfp4.errors import Dsfp4Error, MemoryLimitError, ParameterError


def test_a_ram_limit_below_the_floor_is_refused_with_the_number():
    with pytest.raises(MemoryLimitError, match="raise ram_limit") as caught:
        dsfp4.Model("demo", ram_limit=0.01)
    needed = caught.value.needed
    assert needed > 25e6  # the demo model's weights alone
    assert caught.value.available == 10_000_000
    # What the process has already grows a little from one try to the next.
    model = dsfp4.Model("demo", ram_limit=needed / 1e9 + 0.1)
    assert model.generate([0, 1, 2], max_tokens=2).tokens


def test_models_of_one_process_share_its_limit(demo_model):
    def load(limit=None):
        return dsfp4.Model(demo_model, ram_limit=limit, threads=1, warm_start=False)

    def least():
        with pytest.raises(MemoryLimitError) as caught:
            load(1e-3)
        return caught.value.needed / 1e9

    first = load()
    reserved = first.stats()["reserved_bytes"] / 1e9  # most of which was never written
    beside_it = least()
    del first
    alone = least()
    # The process itself may have grown or shrunk a little.
    assert beside_it - alone == pytest.approx(reserved + 0.128, abs=0.03)
    assert load(alone + 0.03).generate([1], max_tokens=1).tokens


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), 1e12, "8", True])
def test_a_ram_limit_that_is_none_names_the_parameter(value):
    with pytest.raises(ParameterError) as caught:
        dsfp4.Model("demo", ram_limit=value)
    assert caught.value.parameter == "ram_limit"


def test_ram_limit_is_a_flag(capsys):
    assert main(["run", "demo", "--ram-limit", "0.01", "hello"]) == 1
    assert re.search(r"need .* GB of RAM and 0\.010 GB are available", capsys.readouterr().err)


@pytest.mark.parametrize("reader", ["io_uring", "pread"])
def test_bench_storage_measures_and_reports(tmp_path, capsys, reader):
    path = tmp_path / "blocks"
    path.write_bytes(bytes(range(256)) * 16 * 200)
    arguments = ["--reader", reader, "--block-kib", "4", "--depth", "1", "4", "--seconds", "0.05"]
    if main(["bench", "storage", str(path), *arguments, "--json"]) != 0:
        assert reader == "io_uring"
        pytest.skip(capsys.readouterr().err)
    report = json.loads(capsys.readouterr().out)
    assert [(rate["block_bytes"], rate["depth"]) for rate in report["rates"]] == [
        (4096, 1),
        (4096, 4),
    ]
    for rate in report["rates"]:
        assert rate["reader"] == reader
        assert rate["bytes"] > 0
        assert rate["gb_per_second"] == pytest.approx(rate["bytes"] / rate["seconds"] / 1e9)
    assert report["raw_ssd_gb_s"] == max(rate["gb_per_second"] for rate in report["rates"])
    assert main(["bench", "storage", str(path), *arguments]) == 0
    assert "raw_ssd_gb_s" in capsys.readouterr().out


def test_bench_storage_refuses_what_cannot_be_measured(tmp_path, capsys):
    path = tmp_path / "small"
    path.write_bytes(b"x" * 5000)
    assert main(["bench", "storage", str(path)]) == 1
    assert "64 are needed" in capsys.readouterr().err
    assert main(["bench", "storage", str(tmp_path)]) == 1
    assert "no *.safetensors" in capsys.readouterr().err
    assert main(["bench", "storage", str(path), "--block-kib", "6"]) == 1
    assert "multiples of 4" in capsys.readouterr().err


def test_a_demand_overtakes_speculation(tmp_path):
    path = tmp_path / "experts"
    path.write_bytes(bytes(64 * 65536))
    times = _core.measure_demand_beside_speculation(
        [path], reader="pread", expert_bytes=65536, experts=2, rounds=3
    )
    assert len(times["idle_seconds"]) == len(times["beside_seconds"]) == 3
    assert times["speculative_beside_demand"] == 0
    assert 0 < times["speculative_bytes"] <= 3 * 2 * 65536


def test_a_reader_that_is_none_is_refused(tmp_path):
    with pytest.raises(Dsfp4Error, match="reader"):
        _core.measure_raw_rate([tmp_path], reader="mmap", block_bytes=4096, depth=1, seconds=1)
