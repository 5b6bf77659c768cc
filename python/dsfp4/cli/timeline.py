"""A trace of a few tokens as lanes of spans, and the bytes of a token: data that plot.py draws."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsfp4.errors import CheckpointError, IoError

# The trace's tracks, by the names it gives them, top to bottom.
LANES = {
    "SSD": "reads from the SSD",
    "PCIe": "copies, RAM to GPU",
    "CPU": "experts by the processor",
    "GPU": "the GPU's ops",
    "waits": "waits for reads",
}
_STEPS = "steps"


@dataclass(frozen=True)
class Span:
    """One thing that was done on `track`, from `start` to `end` in seconds of the trace's clock."""

    track: str
    name: str
    start: float
    end: float
    bytes: int = 0


@dataclass(frozen=True)
class Lane:
    """One wire or worker, the trace's `track`; the spans of each of its `rows` do not overlap.

    `busy` is the share of the time, 0 to 1, in which at least one of them ran.
    """

    track: str
    name: str
    rows: list[list[Span]]
    busy: float
    bytes: int


@dataclass(frozen=True)
class Timeline:
    """What ran from `start` to `end`, in seconds; `tokens` are the steps."""

    start: float
    end: float
    tokens: list[Span]
    lanes: list[Lane]


def read_trace(path: Path) -> list[Span]:
    """Return the spans of a trace, also of one that is still written.

    A span of which only the beginning is there is left out. Raises IoError, and CheckpointError
    for a file that is no trace.
    """
    try:
        with path.open(encoding="utf-8") as lines:  # each event has a line, the brackets are around
            texts = (line.strip().removeprefix("[").strip(",]") for line in lines)
            return _spans(json.loads(text) for text in texts if text)
    except OSError as error:
        raise IoError(
            f"cannot read '{path}': {error.strerror}", file=str(path), errno=error.errno or 0
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"'{path}' is not a trace of dsfp4: {error}", file=str(path)) from (
            error
        )


def _spans(events: Iterable[Mapping[str, Any]]) -> list[Span]:
    tracks: dict[int, str] = {}
    begun: dict[int, Mapping[str, Any]] = {}
    spans = []
    for event in events:
        phase = event["ph"]
        if phase == "M" and event["name"] == "thread_name":
            tracks[event["tid"]] = event["args"]["name"]
        elif phase == "b":
            begun[event["id"]] = event
        elif phase == "X" or (phase == "e" and event["id"] in begun):
            first = event if phase == "X" else begun.pop(event["id"])
            end = event["ts"] + event.get("dur", 0)
            spans.append(
                Span(
                    tracks[event["tid"]],
                    event["name"],
                    first["ts"] / 1e6,
                    end / 1e6,
                    first.get("args", {}).get("bytes", 0),
                )
            )
    return spans


def make_timeline(spans: Sequence[Span], first: int, last: int) -> Timeline:
    """Return the steps of the numbers `first` to `last`, not included, and all that ran meanwhile.

    A lane is there for each track that has spans anywhere in `spans`. Spans that reach out of the
    steps are cut. Raises ValueError if there are no such steps.
    """
    steps = sorted((span for span in spans if span.track == _STEPS), key=lambda span: span.start)
    tokens = steps[first:last]
    if first < 0 or first >= last or len(tokens) < last - first:
        raise ValueError(f"the trace has {len(steps)} steps, none from {first} to {last}")
    start, end = tokens[0].start, tokens[-1].end
    lanes = []
    for track in LANES:
        own = [span for span in spans if span.track == track]
        if own:
            inside = [span for span in own if span.start < end and span.end > start]
            lanes.append(_lane(track, inside, start, end))
    return Timeline(start, end, tokens, lanes)


def _lane(track: str, spans: Sequence[Span], start: float, end: float) -> Lane:
    cut = [
        Span(span.track, span.name, max(span.start, start), min(span.end, end), span.bytes)
        for span in spans
    ]
    busy = _covered(cut) / max(end - start, 1e-9)
    return Lane(track, LANES[track], pack(cut), busy, sum(span.bytes for span in spans))


def pack(spans: Iterable[Span]) -> list[list[Span]]:
    """Lay spans into as few rows as they need, in which none overlaps another."""
    rows: list[list[Span]] = []
    for span in sorted(spans, key=lambda span: (span.start, span.end)):
        free = next((row for row in rows if row[-1].end <= span.start), None)
        if free is None:
            rows.append([span])
        else:
            free.append(span)
    return rows


def _covered(spans: Iterable[Span]) -> float:
    """Return the seconds in which at least one span runs."""
    seconds, done = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.start):
        seconds += max(0.0, span.end - max(span.start, done))
        done = max(done, span.end)
    return seconds


def token_bytes(run: Mapping[str, Any], tokens: int, on_gpu: bool) -> dict[str, dict[str, float]]:
    """Return the bytes of a token: `tiers`, where its experts lay, and `wires`, what crossed them.

    `run` is a run of decode_floor.judge(). Without a GPU the processor reads every expert that is
    computed.
    """
    tiers = {
        name.upper(): share * run["used_bytes"] / tokens for name, share in run["hit_rates"].items()
    }
    wires = {"SSD to RAM": run["read_bytes"]}
    if on_gpu:
        wires["RAM to GPU"] = run["uploaded_bytes"] + run["layer_upload_bytes"]
    else:
        del tiers["VRAM"]
    wires["RAM to processor"] = run["cpu_bytes"] if on_gpu else run["used_bytes"]
    return {
        "tiers": tiers,
        "wires": {name: total / tokens for name, total in wires.items()},
    }
