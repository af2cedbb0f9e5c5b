"""The page that shows how trainings go at this moment."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from segfit.report import results
from segfit.report.data import TrainingCurve
from segfit.report.page import fragment_of, page_of
from segfit.text import count, duration

__all__ = ["render_live", "render_live_part"]


def render_live(name: str, part: Markup) -> str:
    """Return the page around a part made by `render_live_part`."""
    return page_of("live.html.j2", f"{name} – live", ("live.js",), live=True, name=name, part=part)


def render_live_part(
    stages: Sequence[tuple[str, str, str]],
    curves: Sequence[TrainingCurve],
    *,
    share: float | None,
    left_s: float | None,
    silent_s: float | None,
) -> Markup:
    """Return what changes on the page.

    Parameters
    ----------
    stages : name, state and a few words of each
    share : of the trainings that is done
    left_s, silent_s : as of `segfit.project.live.Live`
    """
    done = "–" if share is None else f"{100 * share:.0f} %"
    sign = (
        "nothing was trained yet"
        if silent_s is None
        else f"last sign {duration(silent_s)} ago"
        if silent_s > 10
        else "at work"
    )
    return fragment_of(
        "live_part.html.j2",
        tiles=[
            ("Training done", done, count(len(curves), "training") + " begun"),
            ("Time left", "–" if left_s is None else duration(left_s), f"about; {sign}"),
        ],
        training=results.training(curves),
        stages=stages,
    )
