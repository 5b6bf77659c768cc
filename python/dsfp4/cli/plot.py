"""Pictures of `dsfp4 bench decode --plot` and `dsfp4 plan --plot`; matplotlib draws them."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsfp4.cli.timeline import Lane, Timeline
from dsfp4.errors import IoError, ParameterError, UnsupportedError

SUFFIXES = (".png", ".svg", ".pdf")
# Tiers and wires, fastest first; the same colours in every picture, also told apart in grey.
_COLOURS = {"VRAM": "#1b4965", "RAM": "#62b6cb", "SSD": "#f4a259"}
_LANE_COLOURS = {
    "SSD": "#f4a259",
    "PCIe": "#8cb369",
    "CPU": "#62b6cb",
    "GPU": "#1b4965",
    "waits": "#bbbbbb",
}
_INCHES = (11.0, 6.5)
_MOST_ROWS = 16  # of a lane that are told apart


def picture_path(text: str) -> Path:
    """Parse a picture's name: an argparse type."""
    path = Path(text)
    if path.suffix.lower() not in SUFFIXES:
        raise argparse.ArgumentTypeError(f"'{text}' does not end in {', '.join(SUFFIXES)}")
    return path


def check_drawing(path: Path) -> None:
    """Raise what would keep a picture from being written to `path`, before it is computed.

    Raises UnsupportedError without matplotlib, ParameterError for another kind of picture, IoError
    where there is no such folder.
    """
    _matplotlib()
    try:
        picture_path(str(path))
    except argparse.ArgumentTypeError as error:
        raise ParameterError(str(error), parameter="plot") from None
    if not path.absolute().parent.is_dir():
        raise IoError(f"'{path.absolute().parent}' is not a folder; make it first", file=str(path))


def draw_decode(
    timeline: Timeline, bytes_of: Mapping[str, Mapping[str, float]], title: str, path: Path
) -> None:
    """Draw a timeline, and below it the bytes of a token, as timeline.token_bytes() gives them.

    Raises as check_drawing() does, and IoError where the file cannot be written.
    """
    check_drawing(path)
    figure = _matplotlib().figure.Figure(figsize=_INCHES, layout="constrained")
    figure.suptitle(title)
    grid = figure.add_gridspec(2, 2, height_ratios=(3, 1))
    _draw_timeline(figure.add_subplot(grid[0, :]), timeline)
    tiers = dict(bytes_of["tiers"])
    _draw_bars(
        figure.add_subplot(grid[1, 0]),
        "where a token's experts were",
        tiers,
        [_COLOURS[tier] for tier in tiers],
    )
    _draw_bars(
        figure.add_subplot(grid[1, 1]),
        "bytes over each wire, a token",
        bytes_of["wires"],
        ["#777777"] * len(bytes_of["wires"]),
    )
    _save(figure, path)


def draw_plan(plan: Mapping[str, Any], path: Path) -> None:
    """Draw what `dsfp4 plan` expects: the bytes of each role by tier, and tokens/s.

    `plan` has `roles`, mappings with `role`, `tier` ("VRAM", "RAM" or "SSD") and `bytes`, of which
    one role may have several; `decode`, mappings with `hit_rate` (0 to 1), `tokens_per_second` and
    `binds`, a wire's or worker's name; and, if it is known, `model`, the title. Raises
    ParameterError where one is missing or of another kind, and as check_drawing() does.
    """
    roles, decode = role_bytes(plan), decode_points(plan)
    check_drawing(path)
    figure = _matplotlib().figure.Figure(figsize=_INCHES, layout="constrained")
    figure.suptitle(str(plan.get("model", "plan")))
    bars, rates = figure.subplots(1, 2)
    names = list(roles)
    left = [0.0] * len(names)
    for tier, colour in _COLOURS.items():
        widths = [roles[name].get(tier, 0.0) / 1e9 for name in names]
        if any(widths):
            bars.barh(names, widths, left=left, color=colour, label=tier)
            left = [done + width for done, width in zip(left, widths, strict=True)]
    bars.invert_yaxis()
    bars.set(title="weights and cache by tier", xlabel="GB")
    if any(left):
        bars.legend()
    rates.plot(
        [100 * rate for rate, _, _ in decode],
        [tokens for _, tokens, _ in decode],
        color=_COLOURS["VRAM"],
        marker="o",
    )
    for rate, tokens, text in bound_labels(decode):
        rates.annotate(text, (100 * rate, tokens), (0, 8), textcoords="offset points", ha="center")
    rates.set(title="decoding", xlabel="experts found in VRAM or RAM, %", ylabel="tokens/s")
    rates.margins(x=0.1, y=0.15)
    rates.set_ylim(bottom=0)
    _save(figure, path)


def role_bytes(plan: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return the bytes of a plan's roles by tier, in the plan's order. Raises ParameterError."""
    roles: dict[str, dict[str, float]] = {}
    for row in _rows(plan, "roles"):
        role, tier, size = _fields(row, "roles", ("role", "tier", "bytes"))
        if tier not in _COLOURS:
            raise ParameterError(
                f"the tier of a role must be one of {', '.join(_COLOURS)}, not {tier!r:.100}",
                parameter="plan",
            )
        tiers = roles.setdefault(str(role), {})
        tiers[tier] = tiers.get(tier, 0.0) + _number(size, "bytes")
    return roles


def decode_points(plan: Mapping[str, Any]) -> list[tuple[float, float, str]]:
    """Return (hit rate, tokens/s, binds) of a plan by rising hit rate. Raises ParameterError."""
    points = []
    for row in _rows(plan, "decode"):
        rate, tokens, binds = _fields(row, "decode", ("hit_rate", "tokens_per_second", "binds"))
        points.append((_number(rate, "hit_rate"), _number(tokens, "tokens_per_second"), str(binds)))
    return sorted(points, key=lambda point: point[0])


def bound_labels(points: Sequence[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    """Return the points of decode_points() at which something else begins to bind."""
    return [point for i, point in enumerate(points) if i == 0 or points[i - 1][2] != point[2]]


def _rows(plan: Mapping[str, Any], name: str) -> list[Any]:
    rows = plan.get(name)
    if not isinstance(rows, (list, tuple)) or not rows:
        raise ParameterError(
            f"a plan needs {name}, a list that is not empty, to be drawn", parameter="plan"
        )
    return list(rows)


def _fields(row: Any, name: str, fields: Sequence[str]) -> list[Any]:
    if not isinstance(row, Mapping) or any(field not in row for field in fields):
        raise ParameterError(
            f"each of a plan's {name} needs {', '.join(fields)}, not {row!r:.200}",
            parameter="plan",
        )
    return [row[field] for field in fields]


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
        raise ParameterError(f"{name} must be 0 or more, not {value!r:.100}", parameter="plan")
    return float(value)


def _draw_timeline(axes: Any, timeline: Timeline) -> None:
    def milliseconds(time: float) -> float:
        return 1e3 * (time - timeline.start)

    for place, lane in enumerate(timeline.lanes):
        height = 0.8 / min(max(len(lane.rows), 1), _MOST_ROWS)
        for number, row in enumerate(lane.rows):
            bars = [
                (milliseconds(span.start), milliseconds(span.end) - milliseconds(span.start))
                for span in row
            ]
            bottom = place - 0.4 + height * (number % _MOST_ROWS)
            axes.broken_barh(
                bars, (bottom, 0.9 * height), facecolors=_LANE_COLOURS[lane.track], linewidth=0
            )
    for token in timeline.tokens[1:]:
        axes.axvline(milliseconds(token.start), color="black", linewidth=0.8)
    axes.set_yticks(range(len(timeline.lanes)), [lane_label(lane) for lane in timeline.lanes])
    axes.set_ylim(max(len(timeline.lanes), 1) - 0.5, -0.5)
    axes.set_xlim(0, milliseconds(timeline.end))
    axes.set_xlabel(f"ms; {len(timeline.tokens)} tokens, a line between two")
    if not timeline.lanes:
        axes.text(
            0.5, 0.5, "all weights are in memory: nothing moved", transform=axes.transAxes,
            ha="center",
        )  # fmt: skip


def lane_label(lane: Lane) -> str:
    """Return a lane's name with what it did in that time."""
    moved = f", {lane.bytes / 1e6:.1f} MB" if lane.bytes else ""
    return f"{lane.name}\n{100 * lane.busy:.0f} % busy{moved}"


def _draw_bars(axes: Any, title: str, sizes: Mapping[str, float], colours: Sequence[str]) -> None:
    megabytes = [size / 1e6 for size in sizes.values()]
    bars = axes.barh(list(sizes), megabytes, color=colours)
    axes.bar_label(bars, [f"{size:.1f}" for size in megabytes], padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set(title=title, xlabel="MB")


def _save(figure: Any, path: Path) -> None:
    try:
        figure.savefig(path)
    except OSError as error:
        raise IoError(
            f"cannot write '{path}': {error.strerror}", file=str(path), errno=error.errno or 0
        ) from error


def _matplotlib() -> Any:
    """Return the package; a Figure of its own needs no screen and no state of the process."""
    try:
        import matplotlib
        import matplotlib.figure
    except ImportError:
        raise UnsupportedError(
            "drawing needs the package matplotlib, which is not installed; "
            "`pip install 'dsfp4[plot]'` installs it"
        ) from None
    return matplotlib
