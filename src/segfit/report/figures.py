"""Figures as inline SVG: light, consistent, in colours that colour-blind readers can tell apart.

All text inside the figures is ours; names that users chose stay in the page's HTML, where they are escaped and any
script can be written.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from segfit.evaluation.statistics import Estimate
from segfit.report.data import TrainingCurve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "FOLD_PALETTE",
    "PALETTE",
    "class_colour",
    "colour",
    "css",
    "drift_figure",
    "fold_colour",
    "histogram",
    "learning_rate_figure",
    "loss_figure",
    "strip",
    "validation_figure",
]

# Okabe and Ito's colours, yellow last because it is faint on white: of classes, on pictures.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7F5AA8", "#F0E442")

# Of folds and of the axes of images, never of classes.
FOLD_PALETTE = ("#27313c", "#4d6072", "#7a8a9a", "#3b566e", "#5f7f9b")

_INK, _MUTED, _LINE = "#1d2733", "#5d6b7a", "#dfe5ec"
_STYLE: Any = {  # Any: newer matplotlib types the keys, older ones do not
    "svg.fonttype": "none",  # text stays text: small, selectable, in the page's font
    "svg.hashsalt": "segfit",  # the same data gives the same page
    "text.parse_math": False,
    "font.size": 9.0,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _MUTED,
    "axes.titlesize": 9.5,
    "axes.titlecolor": _INK,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.major.size": 0.0,
    "ytick.major.size": 0.0,
    "lines.linewidth": 1.4,
    "lines.solid_capstyle": "round",
}
_MAX_POINTS = 240


_DASHES = ("-", "--", ":", "-.", (0, (7, 2)))  # of folds, which are hard to tell apart by their shade alone
_VARIABLES = {
    **{hue.lower(): f"var(--c{number})" for number, hue in enumerate(PALETTE)},
    **{hue: f"var(--f{number})" for number, hue in enumerate(FOLD_PALETTE)},
    _INK: "var(--ink)",
    _MUTED: "var(--muted)",
    _LINE: "var(--line)",
}
"""Colours as the page's style sheet has them: others where it is dark, and darker ones on white than on pictures."""


def colour(index: int) -> str:
    """Return the colour of the class at `index` on a picture; colours repeat after eight."""
    return PALETTE[index % len(PALETTE)]


def css(hue: str) -> str:
    """Return the variable of the style sheet for one of our colours; any other colour as it is."""
    return _VARIABLES.get(hue.lower(), hue)


def class_colour(index: int) -> str:
    """Return the colour of the class at `index` on the page."""
    return css(colour(index))


def fold_colour(index: int) -> str:
    """Return the colour of the fold, or the axis of images, at `index` on the page."""
    return css(FOLD_PALETTE[index % len(FOLD_PALETTE)])


def _fold_line(index: int) -> dict[str, Any]:
    return {"color": FOLD_PALETTE[index % len(FOLD_PALETTE)], "linestyle": _DASHES[index % len(_DASHES)]}


def loss_figure(curves: Sequence[TrainingCurve], name: str) -> Markup:
    """Draw the training loss of each fold over the share of the budget."""

    def draw(axes: Axes) -> None:
        for curve in curves:
            axes.plot(*_thinned(curve.share, curve.loss), **_fold_line(curve.fold))
        axes.set_title("Training loss")
        _budget_axis(axes)

    return _figure(draw, f"{name}-loss", "Training loss of each fold over the share of the budget")


def learning_rate_figure(curves: Sequence[TrainingCurve], name: str) -> Markup:
    """Draw the learning rate of each fold over the share of the budget."""

    def draw(axes: Axes) -> None:
        for curve in curves:
            axes.plot(*_thinned(curve.share, curve.learning_rate), **_fold_line(curve.fold))
        axes.set_title("Learning rate")
        axes.set_ylim(bottom=-0.03 * axes.get_ylim()[1])
        axes.yaxis.set_major_formatter("{x:.2g}")
        _budget_axis(axes)

    return _figure(draw, f"{name}-rate", "Learning rate of each fold over the share of the budget")


def validation_figure(curves: Sequence[TrainingCurve], classes: Sequence[str], name: str) -> Markup:
    """Draw the Dice of `classes` on some validation cases.

    Thin lines are folds, a thick one is their mean where they share x; a single validation is a dot.
    """

    def draw(axes: Axes) -> None:
        for index, class_ in enumerate(classes):
            lines = [_thinned(curve.validation_share, curve.dice[class_]) for curve in curves if class_ in curve.dice]
            for x, y in lines:
                single = len(lines) == 1
                width, alpha = (1.4, 1.0) if single else (0.6, 0.55)
                axes.plot(x, y, color=colour(index), marker="o" if len(x) == 1 else "", linewidth=width, alpha=alpha)
            if len(lines) > 1:
                grid = np.linspace(0, 1, 60)
                finite = [(x[np.isfinite(y)], y[np.isfinite(y)]) for x, y in lines]
                values = [np.interp(grid, x, y, left=np.nan, right=np.nan) for x, y in finite if len(x)]
                shown = np.isfinite(values).all(0)
                axes.plot(grid[shown], np.mean(values, axis=0)[shown], color=colour(index), linewidth=2.0)
        axes.set_title("Dice of some validation cases")
        axes.set_ylim(-0.02, 1.02)
        _budget_axis(axes)

    return _figure(draw, f"{name}-dice", "Dice of each class on some validation cases over the share of the budget")


def histogram(
    columns: Sequence[Sequence[float]], title: str, unit: str, name: str, palette: Sequence[str] = FOLD_PALETTE
) -> Markup:
    """Draw step histograms of several value lists (one per image axis or label, coloured in order) over common bins."""

    def draw(axes: Axes) -> None:
        low, high = min(map(min, columns)), max(map(max, columns))
        margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
        edges = np.linspace(low - margin, high + margin, 21)
        for index, column in enumerate(columns):
            counts, _ = np.histogram(column, edges)
            hue = palette[index % len(palette)]
            axes.stairs(counts, edges, color=hue, linewidth=1.3)
            axes.stairs(counts, edges, color=hue, alpha=0.12, fill=True)
        axes.set_title(title)
        axes.set_xlabel(unit)
        axes.set_ylabel("cases")
        axes.yaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]

    return _figure(draw, name, title)


def drift_figure(values: Mapping[int, float], usual: tuple[float, float] | None, split: int, name: str) -> Markup:
    """Draw a number of cases by their place; shaded: what is usual; a line where recent ones begin, at `split`."""

    def draw(axes: Axes) -> None:
        if usual is not None:
            axes.axhspan(*usual, color=colour(2), alpha=0.15, linewidth=0)
        for part, tint in ((range(split), _MUTED), (range(split, 1 + max(values)), PALETTE[0])):
            there = [place for place in part if place in values]
            axes.plot([place + 1 for place in there], [values[place] for place in there], "o", color=tint, markersize=2)
        if split:
            axes.axvline(split + 0.5, color=_MUTED, linewidth=0.8, linestyle="--")
        axes.set_xlabel("case, in order of time")

    return _figure(draw, name, "The number in each case, in order of time")


def strip(
    values: Sequence[float], low: float, high: float = 1.0, index: int = 0, estimate: Estimate | None = None
) -> Markup:
    """Draw one distribution as a box with its points on a line from `low` to `high`, 400 x 26 units.

    The box spans the quartiles, the bar is the median; an `estimate` is the mean with its interval. With more than 300
    values only those outside 1.5 box lengths are drawn as points.
    """
    finite = np.sort(np.asarray([value for value in values if np.isfinite(value)], dtype=float))
    ticks = "".join(
        f'<line x1="{_place(tick, low, high):.1f}" x2="{_place(tick, low, high):.1f}" y1="0" y2="26" class="tick"/>'
        for tick in strip_ticks(low, high)
    )
    parts = ['<svg class="strip" viewBox="0 0 400 26" aria-hidden="true">', ticks]
    if len(finite):
        lower, median, upper = np.percentile(finite, [25, 50, 75])
        left, middle, right = (_place(float(v), low, high) for v in (lower, median, upper))
        parts.append(f'<rect x="{left:.1f}" y="5" width="{max(right - left, 1):.1f}" height="16" rx="2" class="box"/>')
        points = finite
        if len(finite) > 300:
            reach = 1.5 * (upper - lower)
            points = finite[(finite < lower - reach) | (finite > upper + reach)][:200]
        # The golden ratio spreads neighbours without any randomness.
        heights = 6 + 14 * ((np.arange(len(points)) * 0.618034) % 1)
        circles = (
            f'<circle cx="{_place(float(value), low, high):.1f}" cy="{y:.1f}" r="2"/>'
            for value, y in zip(points, heights, strict=True)
        )
        parts.append(f'<g style="fill:{class_colour(index)}" fill-opacity="0.6">{"".join(circles)}</g>')
        parts.append(f'<line x1="{middle:.1f}" x2="{middle:.1f}" y1="3" y2="23" class="median"/>')
        if estimate is not None and estimate.mean is not None:
            parts.append(_mean_mark(estimate, low, high))
    return Markup("".join(parts) + "</svg>")


def _mean_mark(found: Estimate, low: float, high: float) -> str:
    """Return a diamond at a mean, and a line over its interval."""
    at = _place(found.mean or 0.0, low, high)
    mark = f'<path d="M{at - 4:.1f} 13L{at:.1f} 9L{at + 4:.1f} 13L{at:.1f} 17Z" class="mean"/>'
    if found.low is None or found.high is None:
        return mark
    left, right = (_place(max(low, end), low, high) for end in (found.low, found.high))
    return f'<line x1="{left:.1f}" x2="{right:.1f}" y1="13" y2="13" class="interval"/>{mark}'


def strip_ticks(low: float, high: float = 1.0) -> list[float]:
    """Return up to six round positions from `low` to `high`."""
    step = next(s for s in (0.01, 0.02, 0.05, 0.1, 0.2) if (high - low) / s <= 5.01)
    first = int(np.ceil(low / step - 1e-9))
    return [round(i * step, 4) for i in range(first, int(np.floor(high / step + 1e-9)) + 1)]


def strip_axis(low: float, high: float = 1.0) -> Markup:
    """Draw the numbers below a column of strips."""
    ticks = strip_ticks(low, high)
    digits = 2 if any(abs(tick * 10 - round(tick * 10)) > 1e-6 for tick in ticks) else 1
    anchors = ["middle"] * len(ticks)
    if abs(ticks[0] - low) < 1e-6:
        anchors[0] = "start"
    anchors[-1] = "end"
    texts = (
        f'<text x="{_place(tick, low, high):.1f}" y="11" text-anchor="{anchor}">{tick:.{digits}f}</text>'
        for tick, anchor in zip(ticks, anchors, strict=True)
    )
    return Markup(f'<svg class="strip" viewBox="0 0 400 14" aria-hidden="true">{"".join(texts)}</svg>')


def _place(value: float, low: float, high: float) -> float:
    return 3 + 394 * (value - low) / (high - low)


def _budget_axis(axes: Axes) -> None:
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    axes.set_xlabel("share of the budget")


def _thinned(x: Sequence[float], y: Sequence[float]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Average neighbours until at most `_MAX_POINTS` are left; a group without any finite value stays a gap."""
    xs, ys = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    size = -(-len(xs) // _MAX_POINTS) if len(xs) else 1
    if size == 1:
        return xs, np.where(np.isfinite(ys), ys, np.nan)
    starts = np.arange(0, len(xs), size)
    finite = np.isfinite(ys)
    amount = np.add.reduceat(finite.astype(float), starts)
    total = np.add.reduceat(np.where(finite, ys, 0.0), starts)
    lengths = np.diff(np.append(starts, len(xs)))
    means = np.divide(total, amount, out=np.full(len(starts), np.nan), where=amount > 0)
    return np.add.reduceat(xs, starts) / lengths, means


def _figure(draw: Callable[[Axes], None], name: str, description: str) -> Markup:
    """Return one small figure as an inline ``<svg>`` whose ids all start with `name`."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure(figsize=(3.7, 2.2))
        draw(figure.add_axes((0.155, 0.2, 0.775, 0.68)))
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'((?:xlink:)?href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r'<svg[^>]*?viewBox="([^"]*)"[^>]*>', r'<svg class="plot" role="img" viewBox="\1">', text, count=1)
    text = text.replace("xlink:href=", "href=")
    text = re.sub('#[0-9a-f]{6}(?=;|"| )', lambda hue: css(hue[0]), text)
    text = text.replace('role="img"', f'role="img" aria-label="{description}"', 1)
    return Markup(re.sub(r">\s+<", "><", text).strip())
