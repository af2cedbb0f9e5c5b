"""The datasets of the benchmarks, each parted into what is trained on and what is set aside to score with.

Groups (an examination, a child, an animal) are never parted. About a fifth of the cases is set aside, of three groups
at least; hashes of the groups' names decide, so that every machine parts alike. A dataset with labelled test images of
its own keeps them for that, and trains on all others.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["SETS", "Parted", "part", "set_aside"]

SETS = {
    "hippocampus": "Dataset004_Hippocampus",
    "nuclei": "Dataset120_Nuclei",
    "fetal-head": "Dataset201_FetalHead",
    "white-blood-cells": "Dataset202_WhiteBloodCells",
    "retina": "Dataset203_Retina",
    "mouse-brain": "Dataset204_MouseBrain",
}
_SHARE = 0.2
_MIN_GROUPS = 3
_EYE = re.compile(r"^(Image_\d+)[LR]$")  # retina: two eyes of one child
_GENOTYPE = re.compile(r"_(WT|UT)$")  # mouse brain: both kinds are set aside, each in its proportion


@dataclass(frozen=True)
class Parted:
    """`dataset` is a folder in the reference's layout without what was set aside: `images` and `labels`."""

    dataset: Path
    images: Path
    labels: Path


def part(source: Path, work: Path) -> Parted:
    """Part a dataset in the reference's layout; files are linked from folders under `work`, made unless they are."""
    parted = Parted(
        work / "training" / source.name, work / "set-aside" / source.name, work / "set-aside" / f"{source.name}-labels"
    )
    declaration = json.loads((source / "dataset.json").read_text())
    ending = declaration["file_ending"]
    cases = sorted(path.name.removesuffix(ending) for path in (source / "labelsTr").glob(f"*{ending}"))
    own_test = (source / "labelsTs").is_dir()
    facts = _facts(source)
    aside = set() if own_test else set_aside(cases, {row["case"]: row["group"] for row in facts if row.get("group")})
    training = [case for case in cases if case not in aside]
    wanted = declaration | {"numTraining": len(training), "set_aside": sorted(aside)}
    mark = parted.dataset / "dataset.json"  # written last
    if mark.exists() and json.loads(mark.read_text()) == wanted:
        return parted
    for folder in (parted.dataset, parted.images, parted.labels):
        shutil.rmtree(folder, ignore_errors=True)
    _link(source, "Tr", training, ending, parted.dataset / "imagesTr", parted.dataset / "labelsTr")
    kept = sorted(path.name.removesuffix(ending) for path in (source / "labelsTs").glob(f"*{ending}"))
    _link(source, *(("Ts", kept) if own_test else ("Tr", sorted(aside))), ending, parted.images, parted.labels)
    for folder, members in ((parted.dataset, training), (parted.images, sorted(aside))):
        _write_facts(folder / "cases.csv", [row for row in facts if row["case"] in members])
    mark.write_text(json.dumps(wanted, indent=1))
    return parted


def set_aside(cases: Sequence[str], groups: Mapping[str, str]) -> set[str]:
    """Return the cases that are set aside; a case that is not in `groups` has its group in its name or is its own."""
    members: dict[str, list[str]] = defaultdict(list)
    for case in cases:
        members[groups.get(case) or _EYE.sub(r"\1", case)].append(case)
    result: set[str] = set()
    for number, group in enumerate(_drawn(list(members))):
        if number >= _MIN_GROUPS and len(result) >= _SHARE * len(cases):
            break
        result.update(members[group])
    return result


def _drawn(groups: Sequence[str]) -> list[str]:
    """Return groups in the order of their hashes, such that any number of the first has the kinds in proportion."""
    found = {group: _GENOTYPE.search(group) for group in groups}
    kinds = {group: match[1] if match else "" for group, match in found.items()}
    totals, taken, places = Counter(kinds.values()), Counter[str](), {}
    by_hash = sorted(groups, key=lambda group: hashlib.sha256(group.encode()).hexdigest())
    for group in by_hash:
        kind = kinds[group]
        places[group] = (taken[kind] + 0.5) / totals[kind]
        taken[kind] += 1
    return sorted(by_hash, key=places.__getitem__)


def _facts(source: Path) -> list[dict[str, str]]:
    """Return the rows of ``cases.csv``, if there is one."""
    table = source / "cases.csv"
    if not table.exists():
        return []
    with table.open(newline="") as lines:
        return list(csv.DictReader(lines))


def _write_facts(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Write a table beside the images of these cases; none without rows."""
    if rows:
        with path.open("w", newline="") as lines:
            table = csv.DictWriter(lines, list(rows[0]))
            table.writeheader()
            table.writerows(rows)


def _link(source: Path, part_: str, cases: Sequence[str], ending: str, images: Path, labels: Path) -> None:
    """Link the files of cases of `imagesTr` and `labelsTr` (or `Ts`)."""
    wanted = set(cases)
    images.mkdir(parents=True)
    labels.mkdir(parents=True)
    for path in sorted((source / f"images{part_}").glob(f"*{ending}")):
        if path.name.removesuffix(ending).rpartition("_")[0] in wanted:
            (images / path.name).symlink_to(path.resolve())
    for case in cases:
        (labels / f"{case}{ending}").symlink_to((source / f"labels{part_}" / f"{case}{ending}").resolve())
