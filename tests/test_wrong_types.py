"""Values of a wrong type at the doors of the package: one sentence of segfit's own, never a TypeError from inside."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import segfit
from segfit.device import resolve_device
from segfit.geometry import Grid
from segfit.labels import LabelScheme

SCHEME = LabelScheme.from_declaration({"background": 0, "a": 1})
GRID = Grid((2, 2), (1.0, 1.0))
NOWHERE = Path("/nowhere/at/all")

DOORS: dict[str, Callable[[Any], object]] = {
    "open_dataset": segfit.open_dataset,
    "load_model": segfit.load_model,
    "device": resolve_device,
    "evaluate, predictions": lambda value: segfit.evaluate(value, ".", SCHEME, ending=".png"),
    "evaluate, references": lambda value: segfit.evaluate(".", value, SCHEME, ending=".png"),
    "evaluate, scheme": lambda value: segfit.evaluate(".", ".", value, ending=".png"),
    "evaluate, ending": lambda value: segfit.evaluate(".", ".", SCHEME, ending=value),
    "Project.open": segfit.Project.open,
    "Project.create": lambda value: segfit.Project.create(value, NOWHERE),
    "Project.create, dataset": lambda value: segfit.Project.create(NOWHERE, value),
    "Project.create, settings": lambda value: segfit.Project.create(NOWHERE, NOWHERE, settings=[value]),
    "Options, preset": lambda value: segfit.Options(preset=value),
    "settings": lambda value: segfit.Options().with_settings([value]),
    "Image, array": lambda value: segfit.Image(value, GRID),
    "Image, grid": lambda value: segfit.Image(np.zeros((1, 2, 2)), value),
    "workers": lambda value: segfit.Execution(workers=value),
}

_simple = st.integers(max_value=0) | st.floats() | st.booleans() | st.binary(max_size=4)
WRONG = st.one_of(
    _simple,
    st.lists(_simple | st.none(), max_size=3),
    st.tuples(st.text(max_size=3)),
    st.dictionaries(st.text(max_size=3), _simple, max_size=2),
    st.sampled_from([object(), len, {1}]),
)


@pytest.mark.parametrize("door", list(DOORS))
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(value=WRONG)
def test_values_of_a_wrong_type(door: str, value: Any) -> None:
    with pytest.raises(segfit.InputError) as caught:
        DOORS[door](value)
    assert caught.value.problem


@pytest.mark.parametrize("value", [None, 3, "planning", [1], ["planning"], b"x"])
def test_settings_are_a_list_of_texts(value: Any) -> None:
    with pytest.raises(segfit.InputError):
        segfit.Options().with_settings(value)


@pytest.mark.parametrize("door", ["open_dataset", "load_model", "Project.open", "Project.create, dataset", "settings"])
def test_nothing_is_refused_too(door: str) -> None:
    for value in (None, "a\0b"):
        with pytest.raises(segfit.InputError):
            DOORS[door](value)
