"""The report's figures as inline SVG."""

import io
import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from megaeva.errors import UserError

INK, MUTED, GRID, ACCENT = "#1f2933", "#7b8794", "#e4e7eb", "#1c5d99"
COLOURS = {"teacher": "#8d6a3f", "student": ACCENT}
OTHER_COLOURS = ("#a8b2bd", "#6f9a8d", "#b9849b", "#c9a86a")
_MAX_POINTS = 400


class Curve(NamedTuple):
    """One stage's loss: steps and values in order."""

    title: str
    unit: str
    steps: list[float]
    values: list[float]


class Point(NamedTuple):
    """One trained CLIP."""

    name: str
    num_parameters: float
    chain_samples: float | None
    recall: float


def loss_curve(curve: Curve) -> str:
    """One stage's curve on an axis of its own: contrastive losses and cosines do not compare."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(3.6, 2.3), layout="constrained")
    stride = max(1, len(curve.steps) // _MAX_POINTS)
    axis.plot(curve.steps[::stride], curve.values[::stride], color=ACCENT, alpha=0.28, linewidth=0.9)
    axis.plot(curve.steps[::stride], smoothed(curve.values)[::stride], color=ACCENT, linewidth=1.5)
    axis.set_title(curve.title, loc="left")
    axis.set_ylabel(curve.unit)
    axis.set_xlabel("step")
    axis.xaxis.set_major_locator(plt.MaxNLocator(4, integer=True))
    axis.yaxis.set_major_locator(plt.MaxNLocator(4))
    _quiet(axis)
    return _svg(figure)


def recall_against(points: Sequence[Point], field: Literal["num_parameters", "chain_samples"]) -> str:
    """Mean recall against the number of parameters, or all samples behind the weights, on a log axis."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(5.2, 3.4), layout="constrained")
    shown = [(value, point) for point in points if (value := getattr(point, field))]
    others = [point.name for point in points if point.name not in COLOURS]
    for x, point in shown:
        colour = COLOURS.get(point.name) or OTHER_COLOURS[others.index(point.name) % len(OTHER_COLOURS)]
        axis.scatter([x], [100 * point.recall], s=64, color=colour, zorder=3)
    _label(axis, [(x, 100 * point.recall, point.name) for x, point in shown])
    axis.set_xscale("log")
    axis.set_xlabel({"num_parameters": "parameters", "chain_samples": "samples seen along the chain"}[field])
    axis.set_ylabel("mean recall, %")
    axis.margins(y=0.18)
    xs = [x for x, _ in shown] or [1.0]
    axis.set_xlim(min(xs) / 1.6, max(xs) * 1.9)
    axis.xaxis.set_major_locator(plt.LogLocator(10, subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(plt.FuncFormatter(lambda value, _: _short(value)))
    axis.xaxis.set_minor_locator(plt.NullLocator())
    axis.yaxis.set_major_locator(plt.MaxNLocator(6))
    _quiet(axis)
    return _svg(figure)


def smoothed(values: Sequence[float], share: float = 0.06) -> list[float]:
    """The mean over a centred window of about `share` of the curve, narrower at the ends: it lags behind nowhere."""
    reach = int(share * len(values) / 2)
    result = []
    for at in range(len(values)):
        side = min(reach, at, len(values) - 1 - at)
        window = values[at - side : at + side + 1]
        result.append(sum(window) / len(window))
    return result


def _label(axis: Any, points: list[tuple[float, float, str]]) -> None:
    """Names beside the points; where two would overlap, the lower one moves down."""
    low, high = min((y for _, y, _ in points), default=0.0), max((y for _, y, _ in points), default=0.0)
    gap = max(high - low, 1e-9) * 0.075
    placed: list[float] = []
    for x, y, name in sorted(points, key=lambda p: -p[1]):
        at = min([y, *(other - gap for other in placed[-1:] if other - y < gap)])
        placed.append(at)
        axis.annotate(name, (x, at), xytext=(9, 0), textcoords="offset points", va="center", fontsize=9, color=INK)


def _quiet(axis: Any) -> None:
    axis.grid(axis="y", color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.spines["bottom"].set_color(GRID)
    axis.tick_params(length=0)


def _short(value: float) -> str:
    for unit, size in ((" G", 1e9), (" M", 1e6), (" k", 1e3)):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise UserError(
            "matplotlib is not installed.\nThe report needs it for its figures; run: pip install 'megaeva[demo]'"
        ) from error
    matplotlib.use("agg")
    from matplotlib import pyplot, ticker

    pyplot.rcParams.update(
        {
            "svg.fonttype": "none",  # text stays text: smaller, sharp, in the page's font
            "svg.hashsalt": "megaeva",  # the same data give the same bytes
            "font.family": "sans-serif",
            "font.size": 9,
            "axes.titlesize": 10,
            "axes.titleweight": "bold",
            "text.color": INK,
            "axes.labelcolor": MUTED,
            "xtick.color": MUTED,
            "ytick.color": MUTED,
        }
    )
    for name in ("MaxNLocator", "LogLocator", "FuncFormatter", "NullLocator"):
        setattr(pyplot, name, getattr(ticker, name))
    return pyplot


def _svg(figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    _pyplot().close(figure)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    # The page decides the width; the viewBox keeps the proportions.
    return re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1), count=1
    )
