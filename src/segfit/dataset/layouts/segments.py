"""Classes that label files name themselves, as those of 3D Slicer and TotalSegmentator do."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from segfit.dataset.manifest import Case, Dataset, Mask
from segfit.errors import Problem
from segfit.images.formats import known_ending, segments_of
from segfit.images.image import Segment
from segfit.labels import LabelScheme

__all__ = ["LABEL_NAMES", "has_layers", "layered_classes", "names_of_values", "with_segments"]

LABEL_NAMES = "label-names"  # the code of files that name label values otherwise than others
_HEADERS = (".nrrd", ".nhdr")  # of files that may keep layers
_DEFAULT = re.compile(r"Segment_?\d+")  # names that 3D Slicer gives
_OWN = ("background", "ignore")  # names that mean something


def has_layers(segments: Iterable[Segment]) -> bool:
    """Whether a file keeps its segments in several layers, so that they may overlap."""
    return any(segment.layer for segment in segments)


def names_of_values(
    values: Iterable[int], segments: Mapping[Path, Sequence[Segment]], cases: Mapping[Path, Case]
) -> tuple[dict[str, int], list[Problem]]:
    """Return a name for every value other than 0, and a problem for every file that names one otherwise.

    A value that no file names, or only as 3D Slicer names a new segment, is called "label V".
    """
    occurring = set(values) - {0}
    names: dict[str, int] = {}
    for one in (segment for path in segments for segment in segments[path]):
        known = one.name in names or one.value in names.values() or one.name.lower() in _OWN
        if one.value in occurring and not known and not _DEFAULT.fullmatch(one.name):
            names[one.name] = one.value
    problems = [item for path in segments for item in _contradictions(cases[path].id, path, segments[path], names)]
    rest = {f"label {value}": value for value in occurring - set(names.values())}
    return dict(sorted((names | rest).items(), key=lambda item: item[1])), problems


def layered_classes(
    segments: Mapping[Path, Sequence[Segment]], cases: Mapping[Path, Case]
) -> tuple[dict[str, int], list[Problem]]:
    """Return classes 1, 2, ... by the names of all segments, in their order, and a problem for files without names."""
    every = [segment for path in segments for segment in segments[path]]
    names = dict.fromkeys(one.name for one in every if one.name != "background")
    example = next(path.name for path in segments if has_layers(segments[path]))
    problems = [
        Problem(
            cases[path].id,
            f"{path.name} names no segments, but {example} has them in layers",
            "save all with the names of their segments, or write one file per class",
        )
        for path in segments
        if not segments[path]
    ]
    return {name: value for value, name in enumerate(names, 1)}, problems


def with_segments(dataset: Dataset, problems: list[Problem]) -> Dataset:
    """Return a dataset whose label files are taken segment by segment where their values do not tell the classes.

    So are files with layers, all others beside them that name segments, and files that name declared classes but number
    them otherwise, which is a warning. They become masks of the declared classes.
    """
    cases = [case for case in (*dataset.training, *dataset.test) if case.label is not None]
    named = {
        case.id: found
        for case in cases
        if case.label is not None
        and known_ending(case.label).lower() in _HEADERS
        and (found := segments_of(case.label))
    }
    layered = any(map(has_layers, named.values()))

    def taken(case: Case, *, fatal: bool) -> Case:
        path, segments = case.label, named.get(case.id, ())
        if path is None or not segments:
            return case
        other = [] if layered else _contradictions(case.id, path, segments, _declared(dataset.labels), names_only=True)
        if not layered and not other:
            return case
        case, wrong = _by_segments(case, path, segments, dataset.labels)
        if other and other[0] not in problems:
            told = "its segments are taken by their names; correct it if that is wrong"
            wrong.append(replace(other[0], action=told, fatal=False))
        problems.extend(item if fatal else replace(item, fatal=False) for item in wrong if item not in problems)
        return case

    training = tuple(taken(case, fatal=True) for case in dataset.training)
    return dataset.model_copy(
        update={"training": training, "test": tuple(taken(case, fatal=False) for case in dataset.test)}
    )


def _declared(scheme: LabelScheme) -> dict[str, int]:
    """Return the stored value of every class that has one."""
    stored = scheme.stored_values
    return {class_.name: stored[class_.values[0]] for class_ in scheme.labels if len(class_.values) == 1}


def _by_segments(
    case: Case, path: Path, segments: Sequence[Segment], scheme: LabelScheme
) -> tuple[Case, list[Problem]]:
    inner = {class_.name: class_.values[0] for class_ in scheme.labels if len(class_.values) == 1}
    inner |= {} if scheme.ignore_value is None else {"ignore": scheme.ignore_value}
    problems = [
        Problem(
            case.id,
            f'{path.name} has the segment "{segment.name}", which is not declared',
            f"declare it or remove it; declared are {', '.join(inner)}",
        )
        for segment in segments
        if segment.name not in inner
    ]
    masks = sorted(
        (
            Mask(path=path, value=inner[segment.name], layer=segment.layer, label=segment.value)
            for segment in segments
            if inner.get(segment.name, 0)
        ),
        key=lambda mask: mask.value,  # the order of the declared classes
    )
    if not masks:
        return case, problems
    return case.model_copy(update={"label": None, "masks": tuple(masks)}), problems


def _contradictions(
    case: str, path: Path, segments: Sequence[Segment], names: Mapping[str, int], *, names_only: bool = False
) -> list[Problem]:
    """Return a problem for the first name that others have for another value or, unless `names_only`, the reverse."""
    by_value = {} if names_only else {value: name for name, value in names.items()}
    for segment in segments:
        value = names.get(segment.name, segment.value)
        name = by_value.get(segment.value, segment.name)
        if (value != segment.value or name != segment.name) and not _DEFAULT.fullmatch(segment.name):
            problem = f'{path.name} names label {segment.value} "{segment.name}"'
            other = f"label {value} has this name" if value != segment.value else f'it is "{name}"'
            action = 'name all alike, or write {"labels": {"background": 0, NAME: VALUE, ...}} into dataset.json'
            return [Problem(case, f"{problem}, elsewhere {other}", action, code=LABEL_NAMES)]
    return []
