"""`--plot`: the data of its pictures, without matplotlib, and the pictures themselves with it."""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dsfp4.cli import bench_decode, decode_floor, main, plot, timeline
from dsfp4.cli.timeline import Span
from dsfp4.errors import CheckpointError, IoError, ParameterError, UnsupportedError

TRACKS = ["steps", "CPU", "waits", "SSD", "PCIe", "GPU"]
# Three steps of 10 ms from 1 s on; times in microseconds.
EVENTS: list[dict[str, Any]] = [
    {"ph": "M", "pid": 1, "name": "process_name", "args": {"name": "dsfp4"}},
    *(
        {"ph": "M", "pid": 1, "tid": tid, "name": "thread_name", "args": {"name": name}}
        for tid, name in enumerate(TRACKS)
    ),
    *(
        {"ph": "X", "tid": 0, "ts": 1_000_000 + 10_000 * i, "dur": 10_000, "name": f"decode {i}"}
        for i in range(3)
    ),
    {"ph": "b", "tid": 3, "ts": 1_008_000, "name": "a", "id": 1, "args": {"bytes": 600}},
    {"ph": "b", "tid": 3, "ts": 1_012_000, "name": "b", "id": 2, "args": {"bytes": 400}},
    {"ph": "e", "tid": 3, "ts": 1_014_000, "name": "a", "id": 1},
    {"ph": "e", "tid": 3, "ts": 1_016_000, "name": "b", "id": 2},
    {"ph": "b", "tid": 3, "ts": 1_017_000, "name": "not ended", "id": 3},
    {"ph": "X", "tid": 4, "ts": 1_011_000, "dur": 2_000, "name": "copy", "args": {"bytes": 100}},
    {"ph": "X", "tid": 5, "ts": 1_015_000, "dur": 40_000, "name": "layer 1"},
    {"ph": "X", "tid": 1, "ts": 1_001_000, "dur": 1_000, "name": "before"},
]
PLAN: dict[str, Any] = {
    "model": "deepseek-r1-fp4",
    "roles": [
        {"role": "routed experts", "tier": "RAM", "bytes": 80e9},
        {"role": "attention", "tier": "VRAM", "bytes": 7e9},
        {"role": "routed experts", "tier": "SSD", "bytes": 260e9},
    ],
    "decode": [
        {"hit_rate": 0.9, "tokens_per_second": 9.0, "binds": "RAM"},
        {"hit_rate": 0.3, "tokens_per_second": 1.0, "binds": "SSD"},
        {"hit_rate": 0.6, "tokens_per_second": 2.0, "binds": "SSD"},
    ],
}


def write_trace(folder: Path, events: list[dict[str, Any]] = EVENTS, end: str = "\n]\n") -> Path:
    path = folder / "trace.json"
    path.write_text("[" + ",\n".join(map(json.dumps, events)) + end, encoding="utf-8")
    return path


@pytest.mark.parametrize("end", ["\n]\n", ""])
def test_a_trace_is_read_whole_or_unfinished(tmp_path: Path, end: str) -> None:
    spans = timeline.read_trace(write_trace(tmp_path, end=end))
    assert [(span.track, span.name) for span in spans] == [
        *(("steps", f"decode {i}") for i in range(3)),
        *[("SSD", "a"), ("SSD", "b"), ("PCIe", "copy"), ("GPU", "layer 1"), ("CPU", "before")],
    ]
    assert spans[3] == Span("SSD", "a", 1.008, 1.014, 600)


def test_what_is_no_trace_is_named(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    with pytest.raises(IoError, match=r"cannot read '.*other.json'"):
        timeline.read_trace(path)
    for text in ("hello", '[{"name": 1}]', "[3]", '[{"ph":"X","tid":7,"ts":1,"name":"a"}]'):
        path.write_text(text)
        with pytest.raises(CheckpointError, match=r"other.json' is not a trace of dsfp4"):
            timeline.read_trace(path)


def test_a_timeline_has_a_lane_for_each_track_and_cuts_at_its_ends(tmp_path: Path) -> None:
    lines = timeline.make_timeline(timeline.read_trace(write_trace(tmp_path)), 1, 2)
    assert (lines.start, lines.end) == (1.010, 1.020)
    assert [span.name for span in lines.tokens] == ["decode 1"]
    lanes = {lane.track: lane for lane in lines.lanes}
    assert list(lanes) == ["SSD", "PCIe", "CPU", "GPU"]
    # Two reads overlap: two rows. The first began in the step before.
    assert [[span.name for span in row] for row in lanes["SSD"].rows] == [["a"], ["b"]]
    assert lanes["SSD"].rows[0][0].start == 1.010
    assert lanes["SSD"].busy == pytest.approx(0.6)
    assert lanes["SSD"].bytes == 1000
    assert lanes["PCIe"].busy == pytest.approx(0.2)
    assert (lanes["CPU"].rows, lanes["CPU"].busy) == ([], 0.0)
    assert lanes["GPU"].busy == pytest.approx(0.5)
    assert plot.lane_label(lanes["SSD"]) == "reads from the SSD\n60 % busy, 0.0 MB"


@pytest.mark.parametrize(("first", "last"), [(2, 5), (-1, 2), (2, 2), (3, 4)])
def test_steps_that_a_trace_has_not_are_refused(tmp_path: Path, first: int, last: int) -> None:
    with pytest.raises(ValueError, match="has 3 steps"):
        timeline.make_timeline(timeline.read_trace(write_trace(tmp_path)), first, last)


def test_spans_are_packed_into_few_rows() -> None:
    spans = [Span("SSD", str(i), start, end) for i, (start, end) in enumerate(
        [(0, 4), (1, 2), (2, 3), (4, 5), (4, 6)]
    )]  # fmt: skip
    rows = timeline.pack(reversed(spans))
    assert [[span.name for span in row] for row in rows] == [["0", "3"], ["1", "2", "4"]]


def test_bytes_of_a_token_by_tier_and_wire() -> None:
    run = {
        "hit_rates": {"vram": 0.5, "ram": 0.3, "ssd": 0.2},
        "used_bytes": 1000,
        "read_bytes": 220,
        "uploaded_bytes": 100,
        "layer_upload_bytes": 50,
        "cpu_bytes": 400,
    }
    on_gpu = timeline.token_bytes(run, 10, on_gpu=True)
    assert on_gpu["tiers"] == pytest.approx({"VRAM": 50, "RAM": 30, "SSD": 20})
    assert on_gpu["wires"] == pytest.approx(
        {"SSD to RAM": 22, "RAM to GPU": 15, "RAM to processor": 40}
    )
    run["hit_rates"] = {"vram": 0.0, "ram": 0.8, "ssd": 0.2}
    on_cpu = timeline.token_bytes(run, 10, on_gpu=False)
    assert on_cpu["tiers"] == pytest.approx({"RAM": 80, "SSD": 20})
    assert on_cpu["wires"] == pytest.approx({"SSD to RAM": 22, "RAM to processor": 100})


def test_a_plan_s_bytes_and_rates() -> None:
    assert plot.role_bytes(PLAN) == {
        "routed experts": {"RAM": 80e9, "SSD": 260e9},
        "attention": {"VRAM": 7e9},
    }
    points = plot.decode_points(PLAN)
    assert points == [(0.3, 1.0, "SSD"), (0.6, 2.0, "SSD"), (0.9, 9.0, "RAM")]
    assert plot.bound_labels(points) == [points[0], points[2]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"roles": []}, "needs roles"),
        ({"decode": None}, "needs decode"),
        ({"roles": [{"role": "a", "tier": "RAM"}]}, "needs role, tier, bytes"),
        ({"roles": [{"role": "a", "tier": "disk", "bytes": 1}]}, "VRAM, RAM, SSD, not 'disk'"),
        ({"roles": [{"role": "a", "tier": "RAM", "bytes": -1}]}, "bytes must be 0 or more"),
        ({"decode": [{"hit_rate": 0.1, "binds": "SSD"}]}, "tokens_per_second"),
        (
            {"decode": [{"hit_rate": float("nan"), "tokens_per_second": 1, "binds": "SSD"}]},
            "hit_rate must be 0 or more, not nan",
        ),
    ],
)
def test_a_plan_that_cannot_be_drawn_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ParameterError, match=message):
        plot.draw_plan(PLAN | change, tmp_path / "plan.png")


def test_a_missing_matplotlib_is_said_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(bench_decode, "measure", lambda _: pytest.fail("measured"))
    out = str(tmp_path / "out.png")
    assert main(["bench", "decode", "demo", "--cpu-cache-size", "0", "--plot", out]) == 1
    assert "`pip install 'dsfp4[plot]'` installs it" in capsys.readouterr().err
    with pytest.raises(UnsupportedError, match="matplotlib"):
        plot.draw_plan(PLAN, Path(out))


def test_names_that_are_no_picture_s_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "decode", "demo", "--cpu-cache-size", "0", "--plot", "out.jpeg"])
    assert "'out.jpeg' does not end in .png, .svg, .pdf" in capsys.readouterr().err


def test_a_disk_is_measured_with_smaller_reads_where_the_files_are_small(tmp_path: Path) -> None:
    files = [tmp_path / "a", tmp_path / "b"]
    for file, blocks in zip(files, (40, 24), strict=True):
        file.write_bytes(bytes(blocks << 16))
    assert decode_floor.block_bytes(files) == 64 << 10
    assert decode_floor.block_bytes(files[:1]) == 32 << 10
    files[0].write_bytes(b"")
    assert decode_floor.block_bytes(files[:1]) == 4 << 10


@pytest.fixture
def drawn() -> Iterator[Any]:
    """matplotlib, where it is installed."""
    yield pytest.importorskip("matplotlib", reason="matplotlib is not installed")


@pytest.mark.parametrize(
    ("suffix", "more"),
    [(".png", []), (".svg", ["--prompt", "9", "--stages"]), (".pdf", ["--trace", "trace.json"])],
)
def test_a_picture_of_a_model_that_is_read_from_its_files(
    random_checkpoint: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    drawn: Any,
    suffix: str,
    more: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        decode_floor, "ssd_rate", lambda *_: {"gb_per_second": 3.0, "cpu_seconds_per_gb": 0.25}
    )
    seen: list[timeline.Timeline] = []
    draw = plot.draw_decode
    monkeypatch.setattr(
        plot, "draw_decode", lambda lines, *rest: seen.append(lines) or draw(lines, *rest)
    )
    out = tmp_path / f"out{suffix}"
    parser = argparse.ArgumentParser()
    bench_decode.add_command(parser.add_subparsers())
    folder = str(random_checkpoint("v3-nvfp4-real"))
    options = ["--cpu-cache-size", "0", "--tokens", "9", "--threads", "1", "--plot", str(out)]
    bench_decode.execute(parser.parse_args(["decode", folder, *options, *more]))
    heads = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}
    assert out.read_bytes().startswith(heads[suffix])
    (lines,) = seen
    # Nine tokens are one part of the run: its positions begin at 0.
    assert [token.name for token in lines.tokens] == [f"decode 1 at {i}" for i in (6, 7, 8)]
    assert Path("trace.json").exists() == ("--trace" in more)
    lanes = {lane.track: lane for lane in lines.lanes}
    assert lanes["SSD"].bytes > 0
    assert lanes["CPU"].busy > 0


def test_a_picture_of_a_gpu_s_trace_and_of_a_plan(tmp_path: Path, drawn: Any) -> None:
    lines = timeline.make_timeline(timeline.read_trace(write_trace(tmp_path)), 0, 3)
    sizes = {"tiers": {"VRAM": 1e6, "RAM": 2e6, "SSD": 0.0}, "wires": {"SSD to RAM": 0.0}}
    for suffix in plot.SUFFIXES:
        plot.draw_decode(lines, sizes, "a title", tmp_path / f"decode{suffix}")
        plot.draw_plan(PLAN, tmp_path / f"plan{suffix}")
    text = (tmp_path / "decode.svg").read_text()
    for words in ("copies, RAM to GPU", "the GPU's ops", "a title"):
        assert f"<!-- {words}" in text
    empty = timeline.Timeline(lines.start, lines.end, lines.tokens, [])
    plot.draw_decode(empty, sizes, "all in memory", tmp_path / "empty.svg")
    assert "nothing moved" in (tmp_path / "empty.svg").read_text()
    assert "deepseek-r1-fp4" in (tmp_path / "plan.svg").read_text()
    assert "matplotlib.pyplot" not in sys.modules


def test_a_folder_that_is_not_there_is_named(tmp_path: Path, drawn: Any) -> None:
    with pytest.raises(IoError, match="nowhere' is not a folder"):
        plot.draw_plan(PLAN, tmp_path / "nowhere" / "plan.png")
    (tmp_path / "full.png").mkdir()
    with pytest.raises(IoError, match=r"cannot write '.*full.png'"):
        plot.draw_plan(PLAN, tmp_path / "full.png")


def test_no_command_line_loads_the_library_before_it_draws() -> None:
    program = (
        "import sys, dsfp4.cli; dsfp4.cli.make_parser(); sys.exit('matplotlib' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
