"""A table that lists the cases: a CSV or JSON file, or a folder with ``cases.csv`` or ``cases.json``.

Columns: ``case``; one per channel, whose header is the channel's name; ``label``, or ``label:NAME`` for one file per
class; and if wanted ``group`` (patient), ``site``, ``weight``, ``pixel_mm`` or ``spacing_mm`` (voxel size of files
that do not say it: one number, or ``z y x``) and ``set`` ("training", the default, or "test").

A table that names no file, beside folders of another layout, is no layout: it adds its facts to the cases found there.
Columns that are none of these are then not used.

Paths are relative to the table. A JSON table is a list of objects with these keys, or ``{"cases": [...], "labels":
{"background": 0, NAME: VALUE, ...}}``. For a CSV table a ``dataset.json`` beside it may hold "labels"; undeclared
classes are called "label 1", ... after the values in the files, or as in the columns ``label:NAME``.

Files of one class each are merged so: they are painted in the order of the declared classes (without a
declaration: of the columns), later ones over earlier ones, each where it is not 0. An empty cell: the class is
absent.
"""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from segfit.dataset.layouts.common import (
    WHOLE,
    declaration_of,
    found_channels,
    found_labels,
    is_there,
    json_problem,
    label_ending,
)
from segfit.dataset.layouts.names import composed, fault_of_name, likely_partners
from segfit.dataset.layouts.paired import masks_of, scheme_of
from segfit.dataset.manifest import Case, Dataset
from segfit.errors import DatasetError, InputError, Problem
from segfit.files import read_json, read_text
from segfit.images.formats import is_image_folder, known_ending, split_ending
from segfit.images.image import absence
from segfit.labels import LabelScheme
from segfit.text import count, listing

__all__ = ["names_images", "read", "recognises", "rows_beside", "spacings_of", "with_facts"]

_FILES = ("cases.csv", "cases.json")
_SIZES = ("pixel_mm", "spacing_mm")
_FACTS = ("group", "site", "weight", *_SIZES)
_OTHER = ("case", "label", "set", *_FACTS)  # columns that are no channel
_SETS = ("training", "train", "test")
_MASK = "label:"
_SHOWN_LETTERS = 40  # of a name in a message
_SHOWN_CASES = 4  # named in a message about many
_Row = Mapping[str, str]


def recognises(path: Path, _: Mapping[str, Any]) -> bool:
    """Whether this is a table or a folder that holds one."""
    return _table(path) is not None


def read(root: Path, declared: Mapping[str, Any], problems: list[Problem]) -> Dataset | None:
    """Understand the table; None if it has no usable case or no class can be told."""
    path = _table(root)
    assert path is not None
    rows, inside = _rows(path, problems)
    declared = {} if inside is None else inside or declared or declaration_of(path.parent)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    channels = tuple(name for name in columns if name not in _OTHER and not name.startswith(_MASK))
    classes = [name.removeprefix(_MASK) for name in columns if name.startswith(_MASK)]
    if rows:
        problems += _column_problems(path, columns, channels, classes)
    if "case" not in columns:
        return None
    scheme = scheme_of(declared, classes, problems)
    training: dict[str, Case] = {}
    test: dict[str, Case] = {}
    for number, row in enumerate(rows, 1):
        name = _name(path, number, row, problems)
        if name is None:
            continue
        if name in training or name in test:
            problems.append(Problem(name, f"is listed twice in {path.name}", "give every case its own name"))
            continue
        member = row.get("set", "").strip().lower() or "training"
        if member not in _SETS:
            problem = f'has "{member}" in the column "set" of {path.name}'
            problems.append(Problem(name, problem, f"write {' or '.join(_SETS)}; segfit makes the folds itself"))
        kept = test if member == "test" else training
        kept[name] = _case(path, name, row, channels, scheme, problems, labelled=kept is training)
    cases = tuple(training.values())
    problems += _weight_problems(path, cases)
    if scheme is None and "labels" not in declared:
        scheme = found_labels(cases, problems)
    ending = label_ending(cases, problems)
    if scheme is None or ending is None or not channels:
        return None
    return Dataset(
        name=path.stem if path.name not in _FILES else path.parent.name,
        root=root,
        layout="table",
        channel_names=_channel_names(channels, cases),
        labels=scheme,
        file_ending=ending,
        num_training=len(cases),
        training=cases,
        test=tuple(case for case in test.values() if None not in case.channels.values()),
    )


def names_images(root: Path) -> bool:
    """Whether the table in a folder names files, or cannot be read: then it is a layout, and not facts alone."""
    path = _table(root)
    assert path is not None
    rows, _ = _rows(path, [])
    return not rows or any(
        known_ending(text) or (is_there(path.parent / text) and is_image_folder(path.parent / text))
        for row in rows
        for column, cell in row.items()
        if column not in ("case", "set", *_FACTS) and (text := cell.strip())
    )


def with_facts(dataset: Dataset, problems: list[Problem]) -> Dataset:
    """Return a dataset of folders with what the table beside them says of its cases: group, site, weight, voxel size.

    Rows and cases without counterpart are warnings; a case with two rows that differ is a fatal problem.
    """
    path = _table(dataset.root)
    assert path is not None
    rows, _ = _rows(path, problems)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if "case" not in columns:
        problem = f'{path.name} has the columns {", ".join(columns)}, but no column "case"'
        problems.append(Problem(WHOLE, problem, "add it, or rename the file if it does not list cases"))
        return dataset
    if "set" in columns:
        problem = f'{path.name} has a column "set", but the folders say which cases are for training'
        problems.append(Problem(WHOLE, problem, "move test cases to the folder of test images", fatal=False))
    facts = _facts_by_case(path, rows, problems)
    ids = {composed(case.id): case.id for case in (*dataset.training, *dataset.test)}
    without = [case.id for case in dataset.training if composed(case.id) not in facts]
    strange = [name for name in facts if name not in ids]
    meant = likely_partners(strange, [case for name, case in ids.items() if name not in facts])
    for name, partner in meant.items():
        problem = f"is listed in {path.name} but not in the dataset"
        problems.append(Problem(name, problem, f"rename it to {partner} if that is meant", fatal=False))
    unknown = [name for name in strange if name not in meant]
    if unknown:
        cases = f"{count(len(unknown), 'case')} not in the dataset: {listing(unknown, _SHOWN_CASES)}"
        problems.append(
            Problem(WHOLE, f"{path.name} lists {cases}", "add their images or remove the rows", fatal=False)
        )
    if without:
        problem = (
            f"{count(len(without), 'training case')} without a row in {path.name}: {listing(without, _SHOWN_CASES)}"
        )
        if "group" in columns:
            problem += "; each is its own group"
        problems.append(Problem(WHOLE, problem, "add the missing rows", fatal=False))
    training, test = (
        tuple(case.model_copy(update=facts.get(composed(case.id), {})) for case in cases)
        for cases in (dataset.training, dataset.test)
    )
    problems += _weight_problems(path, training)
    return dataset.model_copy(update={"training": training, "test": test})


def spacings_of(folder: Path) -> dict[str, tuple[float, ...]]:
    """Return the voxel size of cases by name (accents composed) from the table in a folder, or in the one above it.

    Empty without a table of cases. Raises `DatasetError` for one that is not understood.
    """
    path, rows, problems = _beside(folder)
    facts = {} if path is None else _facts_by_case(path, rows, problems)
    if problems:
        raise DatasetError(problems)
    return {name: one["spacing_mm"] for name, one in facts.items() if one["spacing_mm"]}


def rows_beside(folder: Path) -> dict[str, _Row]:
    """Return all columns of cases by name, from the table that `spacings_of` reads; errors as there."""
    path, rows, problems = _beside(folder)
    found: dict[str, _Row] = {}
    for number, row in enumerate(rows, 1):
        assert path is not None
        name = _name(path, number, row, problems)
        if name is not None and found.setdefault(composed(name), row) != row:
            problems.append(_listed_twice(path, name))
    if problems:
        raise DatasetError(problems)
    return found


def _listed_twice(path: Path, name: str) -> Problem:
    problem = f"is listed twice in {path.name} with different values"
    return Problem(name, problem, "correct or remove one of the rows")


def _beside(folder: Path) -> tuple[Path | None, list[_Row], list[Problem]]:
    """Return the table of cases in a folder or in the one above it, and its rows; None without one."""
    path = _table(folder) or _table(folder.absolute().parent)
    problems: list[Problem] = []
    rows = [] if path is None else _rows(path, problems)[0]
    return (None, [], []) if rows and not any("case" in row for row in rows) else (path, rows, problems)


def _facts_by_case(path: Path, rows: Sequence[_Row], problems: list[Problem]) -> dict[str, dict[str, Any]]:
    """Return the facts of every case by its name, accents composed; two rows of a case must say the same."""
    facts: dict[str, dict[str, Any]] = {}
    for number, row in enumerate(rows, 1):
        name = _name(path, number, row, problems)
        if name is None:
            continue
        name = composed(name)
        found = _facts(path, name, row, problems)
        if facts.setdefault(name, found) != found:
            problems.append(_listed_twice(path, name))
    return facts


def _facts(path: Path, name: str, row: _Row, problems: list[Problem]) -> dict[str, Any]:
    """Return what a row says of its case beside the files, as fields of `Case`."""
    return {
        "group": row.get("group", "").strip() or None,
        "site": row.get("site", "").strip() or None,
        "weight": _weight(row.get("weight", "").strip(), name, path, problems),
        "spacing_mm": _spacing(row, name, path, problems),
    }


def _name(path: Path, number: int, row: _Row, problems: list[Problem]) -> str | None:
    """Return the case of a row; None, with a problem, if it has none or one that cannot be."""
    name = row.get("case", "").strip()
    fault = fault_of_name(name)
    if not fault:
        return name
    shown = f"{name[:_SHOWN_LETTERS]}..." if len(name) > _SHOWN_LETTERS else name
    problem = f'row {number} of {path.name} has the case "{shown}", which is not a valid file name'
    problems.append(Problem(WHOLE, f"{problem}: it {fault}", "give every case its own name"))
    return None


def _weight_problems(path: Path, cases: Sequence[Case]) -> list[Problem]:
    if len(cases) < 2 or sum(case.weight > 0 for case in cases) > 1:
        return []
    problem = f"fewer than two training cases have a weight above 0 in {path.name}"
    return [Problem(WHOLE, problem, "give more cases a weight; every fold leaves some out")]


def _table(path: Path) -> Path | None:
    if path.is_dir():
        return next((path / name for name in _FILES if _is_there(path / name)), None)
    is_table = path.suffix.lower() in (".csv", ".tsv", ".json") and path.name != "dataset.json"
    return path if is_table and _is_there(path) else None


def _is_there(path: Path) -> bool:
    """Whether there is anything but a folder; what is no file is refused when it is read."""
    return path.exists() and not path.is_dir()


def _rows(path: Path, problems: list[Problem]) -> tuple[list[_Row], Mapping[str, Any] | None]:
    """Return the rows, as text, and what is declared in the table itself; None if it is unusable."""
    rows: list[_Row]
    form = 'write a list of {"case": ID, CHANNEL: PATH, ..., "label": PATH}'
    if path.suffix.lower() == ".json":
        try:
            content = read_json(path)
        except InputError as error:
            problems.append(json_problem(path, error))
            return [], None
        listed = content.get("cases") if isinstance(content, dict) else content
        if not isinstance(listed, list) or not all(isinstance(row, dict) for row in listed) or not listed:
            problems.append(Problem(WHOLE, f"{path.name} does not list cases", form))
            return [], None
        rows = [{str(key): _text(value) for key, value in row.items()} for row in listed]
        return rows, content if isinstance(content, dict) and "labels" in content else {}
    return _csv_rows(path, problems), {}


def _text(value: object) -> str:
    """Return a value of a JSON table as the cell of a CSV table; lists are numbers with blanks between."""
    return "" if value is None else " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _csv_rows(path: Path, problems: list[Problem]) -> list[_Row]:
    """Return the rows of a CSV table; none, with a problem, where they cannot be told for certain."""
    try:
        text = read_text(path)
    except OSError as error:
        problem = f"{path.name} cannot be read ({error.strerror})"
        problems.append(Problem(WHOLE, problem, "restore it or its permissions"))
        return []
    except UnicodeDecodeError:
        problems.append(Problem(WHOLE, f"{path.name} is not UTF-8 text", "save it as CSV in UTF-8"))
        return []
    first = text.partition("\n")[0]
    reader = csv.reader(io.StringIO(text), delimiter=max(",;\t", key=first.count))
    try:
        lines = [line for line in reader if any(cell.strip() for cell in line)]
    except csv.Error as error:
        problems.append(Problem(WHOLE, f"{path.name} is not a CSV table ({error})", "save it again as CSV in UTF-8"))
        return []
    if len(lines) < 2:
        problems.append(Problem(WHOLE, f"{path.name} lists no case", "write one row per case below the header"))
        return []
    header = [name.strip() for name in lines[0]]
    twice = [name for name, count in Counter(header).items() if count > 1 and name]
    if twice:
        problem = f'{path.name} has two columns called "{twice[0]}"'
        problems.append(Problem(WHOLE, problem, "give every column its own name"))
        return []
    for number, line in enumerate(lines[1:], 1):
        if any(cell.strip() for cell in line[len(header) :]):
            problem = f"row {number} of {path.name} has {count(len(line), 'cell')}, the header {len(header)}"
            problems.append(Problem(WHOLE, problem, 'add the missing names, or put "..." around cells with commas'))
    filled = [dict(zip_longest(header, line[: len(header)], fillvalue="")) for line in lines[1:]]
    return [{key: value for key, value in row.items() if key} for row in filled]


def _column_problems(
    path: Path, columns: Sequence[str], channels: Sequence[str], classes: Sequence[str]
) -> list[Problem]:
    found = f"{path.name} has the columns {', '.join(columns)}"
    problems = []
    if "case" not in columns:
        problems.append(Problem(WHOLE, f'{found}, but no column "case"', "add it: a name for every case"))
    if not channels:
        action = "add one column per channel, its header the channel's name"
        problems.append(Problem(WHOLE, f"{found}, but none of a channel", action))
    if "label" not in columns and not classes:
        action = 'add "label", or "label:NAME" for each class'
        problems.append(Problem(WHOLE, f'{found}, but no column "label"', action))
    if "label" in columns and classes:
        action = "keep one of the two"
        problems.append(Problem(WHOLE, f'{found}, both "label" and "label:NAME"', action))
    return problems


def _case(
    path: Path,
    name: str,
    row: _Row,
    channels: Sequence[str],
    scheme: LabelScheme | None,
    problems: list[Problem],
    *,
    labelled: bool,
) -> Case:
    """Return the case of a row with the files that are there; what is missing is a problem, test cases a warning."""
    wrong: list[Problem] = []

    def file(column: str, *, needed: bool) -> Path | None:
        text = row.get(column, "").strip()
        if not text:
            if needed:
                wrong.append(Problem(name, f'has no file in the column "{column}" of {path.name}', "add it"))
            return None
        try:
            found = path.parent / Path(text).expanduser()
        except RuntimeError:  # the home folder of nobody
            found = path.parent / text
        if not is_there(found):
            problem, action = absence(found, "add it or correct its path")
            wrong.append(Problem(name, f"the listed file {text} {problem}", action))
            return None
        try:
            split_ending(found)
        except InputError as error:
            wrong.append(Problem(name, str(error), "convert the file"))
            return None
        return found

    images = {channel: file(channel, needed=True) for channel in channels}
    files = {
        column.removeprefix(_MASK): found
        for column in row
        if column.startswith(_MASK) and (found := file(column, needed=False)) is not None
    }
    label = None if files else file("label", needed=labelled and not any(c.startswith(_MASK) for c in row))
    if labelled and label is None and not files and not wrong:
        wrong.append(Problem(name, f"has no label in {path.name}", "add one or remove the case"))
    masks = masks_of(name, files, scheme, wrong)
    facts = _facts(path, name, row, wrong)
    problems += wrong if labelled else [Problem(p.case, f"test case: {p.problem}", p.action, False) for p in wrong]
    return Case(id=name, channels=images, label=label, masks=masks, **facts)


def _channel_names(columns: Sequence[str], cases: Sequence[Case]) -> tuple[str, ...]:
    """Return the headers, or the names of the channels in the files of a single column."""
    inside = found_channels(cases) if len(columns) == 1 else ()
    return inside if len(inside) > 1 else tuple(columns)


def _weight(text: str, name: str, path: Path, problems: list[Problem]) -> float:
    if not text:
        return 1.0
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not (math.isfinite(weight) and weight >= 0):
        problems.append(Problem(name, f"has the weight {text!r} in {path.name}", "write a number of 0 or more"))
        return 1.0
    return weight


def _spacing(row: _Row, name: str, path: Path, problems: list[Problem]) -> tuple[float, ...] | None:
    """Return the voxel size that a row gives, if it gives one: one number, or one per axis with blanks between."""
    given = {column: text for column in _SIZES if (text := row.get(column, "").strip())}
    found: set[tuple[float, ...]] = set()
    for column, text in given.items():
        try:
            sizes = tuple(map(float, text.split()))
        except ValueError:
            sizes = ()
        if not 1 <= len(sizes) <= 3 or not all(math.isfinite(size) and size > 0 for size in sizes):
            action = 'write millimetres above 0: one number, or "z y x" separated by blanks'
            problems.append(Problem(name, f"has the {column} {text!r} in {path.name}", action))
        else:
            found.add(sizes)
    if len(found) > 1:
        problem = f"has different pixel_mm and spacing_mm in {path.name}"
        problems.append(Problem(name, problem, "keep the column that is right"))
    return found.pop() if len(found) == 1 else None
