"""Margins from validation predictions."""

from __future__ import annotations

import numpy as np
import pytest

from segfit.connected_components import PostprocessingStep
from segfit.evaluation.evaluate import evaluate
from segfit.evaluation.pairs import Pair
from segfit.execution.execution import Execution
from segfit.labels import LabelScheme
from segfit.selection.margins import margins_of

TWO = LabelScheme.from_declaration({"background": 0, "disc": 1, "ring": 2})


def picture(radius: int) -> np.ndarray:
    y, x = np.ogrid[-30:31, -30:31]
    distance = np.hypot(y, x)
    labels = np.where((distance > 24) & (distance < 28), 2, 0)
    return np.where(distance <= radius, 1, labels).astype(np.uint8)


def stray(labels: np.ndarray) -> np.ndarray:
    labels = labels.copy()
    labels[0, 0] = 1
    return labels


def test_areas_of_all_and_outlines_of_convex_classes() -> None:
    loads = {f"c{i}": (stray(picture(10 + i % 2)), picture(10)) for i in range(20)}
    pairs = [Pair(case, lambda p=p: p, lambda r=r: r) for case, (p, r) in loads.items()]
    steps = [PostprocessingStep.largest_of("disc", (1,))]
    cleaned = [Pair(f"c{i}", lambda i=i: picture(10 + i % 2), lambda: picture(10)) for i in range(20)]
    here = Execution(workers=1)
    summary = evaluate(cleaned, TWO, execution=here)
    found = margins_of(summary, steps, pairs, TWO, {}, pictures=True, spacing_of=lambda _: (0.5, 0.5), execution=here)
    assert {name: set(of_class) for name, of_class in found.items()} == {
        "disc": {"area", "diameter", "circumference"},
        "ring": {"area"},
    }
    ratio = (picture(11) == 1).sum() / (picture(10) == 1).sum()
    assert found["disc"]["area"].factor_95 == pytest.approx(ratio)
    assert found["disc"]["circumference"].factor_95 == pytest.approx(11 / 10, rel=0.02)
    assert found["ring"]["area"].factor_95 == 1.0
    volumes = margins_of(summary, (), [], TWO, {}, pictures=False, spacing_of=lambda _: (), execution=here)
    assert {name: set(of_class) for name, of_class in volumes.items()} == {"disc": {"volume"}, "ring": {"volume"}}
