"""Groups are taken from names where they say them, and from nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from segfit.dataset.layouts import open_dataset
from segfit.dataset.name_groups import grouped_by_names, groups_from_names
from segfit.dataset.phantom import make_phantom
from segfit.errors import InputError

_PATIENTS = range(1, 13)

_SAID = {  # names, and the group of one of them
    "examinations": ([f"exam{n:03}_{k}" for n in _PATIENTS for k in range(1, n % 3 + 2)], ("exam004_1", "exam004")),
    "eyes": ([f"Image_{n:02}{side}" for n in _PATIENTS for side in "LR"], ("Image_04R", "Image_04")),
    "frames": ([f"patient{n:03}_frame{k}" for n in _PATIENTS for k in (1, 9 + n)], ("patient003_frame1", "patient003")),
    "subjects": ([f"sub-{n:02}_ses-{k}_T1w" for n in _PATIENTS for k in (1, 2)], ("sub-03_ses-2_T1w", "sub-03")),
    "visits": ([f"p{n}_v{k}" for n in _PATIENTS for k in (1, 2)], ("p3_v2", "p3")),
    "time points": ([f"GLI-{n:05}-{k:03}" for n in _PATIENTS for k in range(2)], ("GLI-00003-001", "GLI-00003")),
    "slices": ([f"CS_{n}_19960909_{k}" for n in _PATIENTS for k in range(1, 9)], ("CS_3_19960909_7", "CS_3_19960909")),
    "turned pictures": (
        [f"Image_{n:02}{side}{turn}" for n in _PATIENTS for side in "LR" for turn in ("", "_rot90", "_flip")],
        ("Image_04L_rot90", "Image_04"),
    ),
}

_NOT_SAID = {
    "numbered": [f"hippocampus_{n:03}" for n in range(40)],
    "numbered after a data set": [f"wbc1_{n:03}" for n in range(40)],
    "letters": [f"case_{n:03}_{letter}" for n in _PATIENTS for letter in "abc"],
    "numbered by year": [f"case_{year}_{n:03}" for year in range(2010, 2020) for n in range(1, 4)],
    "numbered by day": [f"2020-01-{day:02}_{n}" for day in range(10, 20) for n in range(1, 4)],
    "dates": [f"2020-{month:02}-{day:02}" for month in range(1, 10) for day in range(1, 9)],
    "sites": [f"site{n}_{k:03}" for n in range(1, 7) for k in range(1, 30)],
    "running numbers": [f"run{n // 3}_{n}" for n in range(60)],
    "few": [f"exam{n:03}_{k}" for n in range(1, 4) for k in (1, 2)],
    "one side": [f"Image_{n:02}L" for n in _PATIENTS],
    "mice": [f"tg4510_tp3_{n}_2013052{n % 9}_{kind}" for n, kind in zip(_PATIENTS, ["UT", "WT"] * 6, strict=True)],
    "frames of nobody": [f"frame_{n:03}" for n in range(40)],
    "versions": [f"scan_v{n}" for n in range(40)],
}


@pytest.mark.parametrize("kind", _SAID)
def test_groups_that_names_say(kind: str) -> None:
    names, (name, group) = _SAID[kind]
    found = groups_from_names(names[::-1])
    assert found[name] == group
    assert set(found) <= set(names)
    assert len({found.get(name, name) for name in names}) == len(_PATIENTS)


@pytest.mark.parametrize("kind", _NOT_SAID)
def test_names_that_say_no_groups(kind: str) -> None:
    assert groups_from_names(_NOT_SAID[kind]) == {}


def test_few_groups_when_asked() -> None:
    assert set(groups_from_names(_NOT_SAID["few"], asked=True).values()) == {"exam001", "exam002", "exam003"}
    for kind in ("numbered", "numbered after a data set"):  # no group, one of all
        assert groups_from_names(_NOT_SAID[kind], asked=True) == {}


def test_groups_that_are_asked_for_and_not_there(tmp_path: Path) -> None:
    dataset = open_dataset(make_phantom(tmp_path / "Dataset001_P", cases=3, test_cases=0, shape=(8, 8, 8)))
    assert grouped_by_names(dataset, None, by_default=True).training == dataset.training
    with pytest.raises(InputError, match="such as phantom_tr_000 say no groups"):
        grouped_by_names(dataset, "names", by_default=False)
