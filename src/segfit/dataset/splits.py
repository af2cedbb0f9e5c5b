"""Which cases train and which validate.

Two ways to make folds, and one to read them:

balanced    segfit's own. Cases of one group stay together, sites and classes are spread evenly, there are as many
            folds as there are groups, at most five. Whole-number arithmetic and SHA-256 decide, so that the same
            dataset is split alike on every machine, in whichever order its cases come.
nnunet      five folds of scikit-learn's shuffled ``KFold`` on the sorted case ids, seed 12345, exactly
            (``splits_final.json``). Where nnU-Net gives up (fewer than five cases), fewer folds are made.
a file      nnU-Net's ``splits_final.json``, or a ``splits.json`` of segfit.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator

from segfit.dataset.layouts.common import CHANNEL_NUMBER
from segfit.dataset.manifest import Case, Dataset
from segfit.errors import InputError, Problem, nearest, warning
from segfit.files import Document, Record, content_hash, read_json
from segfit.images.formats import known_ending
from segfit.text import listing

__all__ = [
    "MAX_FOLDS",
    "SPLITS_FILE",
    "Fold",
    "Splits",
    "asked_splits",
    "balanced_splits",
    "covering",
    "fallback_split",
    "faults_of",
    "make_splits",
    "nnunet_splits",
    "read_splits",
    "splits_problems",
    "with_copies",
]

SPLITS_FILE = "splits_final.json"  # nnU-Net's name; one in the dataset's folder is used
MAX_FOLDS = 5  # nnU-Net's
_SEED = 12345  # nnU-Net's
_FALLBACK_SHARE = 0.8  # nnU-Net's share of training cases for a fold that its file does not list
_Way = Literal["balanced", "nnunet"] | Path
_SCALE = 10**12  # of the weights of `_deal`, which are whole numbers


class Fold(Record):
    """Case ids of one cross-validation fold."""

    train: tuple[str, ...]
    validation: tuple[str, ...]


class Splits(Document):
    """The folds of a dataset.

    `source` is the way they were made, "balanced" or "nnunet", or the file they were read from; `seal` is a hash of
    the folds, by which an edit by hand is noticed. Both are empty in folds that never were in a project.
    """

    SHARED = True
    folds: tuple[Fold, ...]
    source: Annotated[str, BeforeValidator(lambda value: "nnunet" if value == "reference" else value)] = ""  # old name
    seal: str = ""

    def sealed(self, source: str) -> Splits:
        """Return the folds as a project keeps them."""
        return self.model_copy(update={"source": source, "seal": self._hash()})

    @property
    def intact(self) -> bool:
        """Whether the folds are those that were sealed."""
        return self.seal == self._hash()

    def _hash(self) -> str:
        return content_hash(self.model_dump(mode="json", include={"folds"}))

    def to_nnunet(self) -> list[dict[str, list[str]]]:
        """Return the content of nnU-Net's ``splits_final.json``."""
        return [{"train": list(fold.train), "val": list(fold.validation)} for fold in self.folds]


def balanced_splits(cases: Sequence[Case], classes: Mapping[str, Collection[int]]) -> Splits:
    """Return folds in which every case validates exactly once and no group is on both sides.

    Parameters
    ----------
    cases : training cases, in any order; a case without `group` is a group of its own
    classes : label values that occur in a case, by case id; nothing is known of cases that are absent

    There are as many folds as groups, at most `MAX_FOLDS`; a single group trains and validates itself. Folds differ by
    no more cases than the largest group has: by one if there are no groups. Raises `InputError` without any case.

    Groups are dealt in rounds, one to each fold: large groups before small ones, those with a rare class or site
    first among equals. Of all ways to deal a round the one is taken that brings the fewest cases of a kind (class,
    site, any) together in a fold; a kind counts with the inverse square of its cases, so that rare ones matter most.
    """
    if not cases:
        raise InputError("a split needs at least one case", "add training cases")
    groups = _groups(cases, classes)
    num_folds = min(MAX_FOLDS, len(groups))
    members: list[list[str]] = [[] for _ in range(num_folds)]
    dealt: list[Counter[_Kind]] = [Counter() for _ in range(num_folds)]
    totals = sum((group.kinds for group in groups), Counter[_Kind]())
    weights = {kind: _SCALE // total**2 for kind, total in totals.items()}
    groups.sort(key=lambda group: (-len(group.cases), min((totals[kind], kind) for kind in group.kinds), group.lot))
    for start in range(0, len(groups), num_folds):
        group_round = groups[start : start + num_folds]
        for group, fold in zip(group_round, _deal(group_round, dealt, weights), strict=True):
            members[fold] += group.cases
            dealt[fold] += group.kinds
    return _folds_of(members)


def with_copies(cases: Sequence[Case], copies: Collection[tuple[str, str]]) -> dict[str, str]:
    """Return groups in which copies of one image stay together, by case id; whole groups are joined if need be.

    Parameters
    ----------
    cases : training cases
    copies : ids of two cases each; what is not among the cases is not looked at
    """
    by_id = {case.id: case for case in cases}
    joined = {_group_of(case): _group_of(case) for case in cases}
    for one, two in copies:
        if one in by_id and two in by_id:
            pair = {joined[_group_of(by_id[name])] for name in (one, two)}
            kept = min(pair, key=lambda group: (group[0] == "case", group[1]))
            joined = {group: kept if now in pair else now for group, now in joined.items()}
    sizes = Counter(joined.values())
    return {
        case.id: name if kind == "group" else f"copies of {name}"
        for case in cases
        for kind, name in [joined[_group_of(case)]]
        if (kind, name) != _group_of(case) or (kind == "case" and sizes[kind, name] > 1)
    }


def asked_splits(asked: _Way | None, dataset: Dataset) -> _Way | None:
    """Return the way to split that was asked for: a file of folds in the dataset's folder counts as asked for."""
    beside = dataset.folder / SPLITS_FILE
    return beside if asked is None and (beside.exists() or beside.is_symlink()) else asked


def splits_problems(asked: _Way | None, dataset: Dataset) -> tuple[Problem, ...]:
    """Return why a file of folds that is asked for, as in `asked_splits`, cannot be used, or what is doubtful in it."""
    way = asked_splits(asked, dataset)
    if not (isinstance(way, Path) and dataset.training):
        return ()
    try:
        splits = make_splits(way, dataset.training, {})
    except InputError as error:
        return (Problem("dataset", error.problem, f"{error.action}, or give --splits balanced"),)
    faults, action = faults_of(splits, dataset.training), f"correct {way}, or give --splits balanced"
    return tuple(replace(item, case="dataset", action=action) for item in faults)


def make_splits(way: _Way, cases: Sequence[Case], classes: Mapping[str, Collection[int]]) -> Splits:
    """Return sealed folds made in one of the ways, or read from a file.

    Parameters
    ----------
    cases, classes : as in `balanced_splits`

    Raises `InputError` as the ways do, and for a fold that would train on nothing but cases with the weight 0.
    """
    ids, drawn = [case.id for case in cases], {case.id for case in cases if case.weight > 0}
    if way == "nnunet":
        splits = nnunet_splits(ids)
    else:
        splits = balanced_splits(cases, classes) if way == "balanced" else read_splits(way, ids)
    for number, fold in enumerate(splits.folds):
        if not drawn.intersection(fold.train):
            problem = f"no training case of fold {number} has a weight above 0"
            raise InputError(problem, "give more cases a weight or make other folds")
    return splits.sealed(str(way))


_Kind = tuple[str, str]
"""What is spread evenly: ("case", ""), ("site", name) or ("class", label value)."""


@dataclass(frozen=True, slots=True)
class _Group:
    cases: tuple[str, ...]
    kinds: Counter[_Kind]  # cases of each kind
    lot: str  # a hash: decides where nothing else does


def _group_of(case: Case) -> tuple[str, str]:
    """Return what a case must not be parted from; a group may be named like a case of another."""
    return ("case", case.id) if case.group is None else ("group", case.group)


def _groups(cases: Sequence[Case], classes: Mapping[str, Collection[int]]) -> list[_Group]:
    members: dict[tuple[str, str], list[Case]] = defaultdict(list)
    for case in cases:
        members[_group_of(case)].append(case)
    result = []
    for name, together in members.items():
        kinds: Counter[_Kind] = Counter()
        for case in together:
            kinds["case", ""] += 1
            kinds.update(("class", str(value)) for value in set(classes.get(case.id, ())))
            if case.site is not None:
                kinds["site", case.site] += 1
        lot = hashlib.sha256("\0".join(name).encode()).hexdigest()
        result.append(_Group(tuple(case.id for case in together), kinds, lot))
    return result


def _deal(groups: Sequence[_Group], dealt: Sequence[Counter[_Kind]], weights: Mapping[_Kind, int]) -> tuple[int, ...]:
    """Return a fold of its own for each group, given what the folds have; the first of equally good ways is taken.

    A sum of squares over the folds measures how unevenly a kind is spread. Putting x cases where c are raises it by
    2 c x + x^2, of which only c x depends on the fold.
    """
    costs = [
        [sum(weights[kind] * have[kind] * count for kind, count in group.kinds.items()) for have in dealt]
        for group in groups
    ]
    ways = permutations(range(len(dealt)), len(groups))
    return min(ways, key=lambda way: sum(cost[fold] for cost, fold in zip(costs, way, strict=True)))


def _folds_of(validation: Sequence[Sequence[str]]) -> Splits:
    """Return the folds with these validation cases; a single one trains on its own."""
    everything = sorted(case for part in validation for case in part)
    if len(validation) == 1:
        return Splits(folds=(Fold(train=tuple(everything), validation=tuple(everything)),))
    folds = []
    for part in map(set, validation):
        train = tuple(case for case in everything if case not in part)
        folds.append(Fold(train=train, validation=tuple(sorted(part))))
    return Splits(folds=tuple(folds))


def nnunet_splits(case_ids: Sequence[str], num_folds: int = MAX_FOLDS, seed: int = _SEED) -> Splits:
    """Return nnU-Net's `num_folds` folds; every case validates in exactly one of them.

    With fewer cases than folds each case is left out once; a single case trains and validates itself. The order of
    `case_ids` does not matter. Raises `InputError` without any case.
    """
    ids = _sorted_unique(case_ids)
    # Legacy generator: only it reproduces nnU-Net's folds.
    shuffled = np.arange(len(ids))
    np.random.RandomState(seed).shuffle(shuffled)
    parts = np.array_split(shuffled, min(num_folds, len(ids)))
    return _folds_of([[ids[i] for i in part.tolist()] for part in parts])


def fallback_split(case_ids: Sequence[str], fold: int, seed: int = _SEED) -> Fold:
    """Return nnU-Net's 80:20 split for a fold number that a splits file does not list; `train` is as drawn."""
    ids = _sorted_unique(case_ids)
    generator = np.random.RandomState(seed + fold)  # legacy, as above
    drawn = generator.choice(len(ids), int(_FALLBACK_SHARE * len(ids)), replace=False)
    train = tuple(ids[i] for i in drawn)
    return Fold(train=train, validation=tuple(name for name in ids if name not in set(train)))


def read_splits(path: Path, case_ids: Collection[str]) -> Splits:
    """Read folds that somebody made: nnU-Net's ``splits_final.json`` or a ``splits.json``, any number of folds.

    Raises `InputError` if the file is in neither form, names unknown cases, or has an empty part.
    """
    raw: Any = read_json(path)
    if isinstance(raw, dict) and "folds" in raw:
        raw = Splits.load(path).to_nnunet()
    form = '[{"train": [CASE, ...], "val": [CASE, ...]}, ...]'
    known = set(case_ids)
    folds: list[Fold] = []
    for number, entry in enumerate(raw if isinstance(raw, list) else ()):
        parts = [entry.get(key) if isinstance(entry, dict) else None for key in ("train", "val")]
        for part in parts:
            if not isinstance(part, list) or not part or not all(isinstance(name, str) for name in part):
                raise InputError(f"fold {number} of {path} must be like {form}", "correct it or delete the file")
            unknown = [name for name in part if name not in known]
            if unknown:
                problem = f"fold {number} of {path} names the case {unknown[0]!r}, which is not in the dataset"
                raise InputError(problem, _right_name(unknown[0], known))
        folds.append(Fold(train=tuple(parts[0] or ()), validation=tuple(parts[1] or ())))
    if not folds:
        raise InputError(f"{path} must hold folds like {form}", "correct it or delete the file")
    return Splits(folds=tuple(folds))


def _right_name(name: str, known: Collection[str]) -> str:
    """Return what to do about a name that no case has: the file name of one is often written instead."""
    case = name.removesuffix(known_ending(name))
    if case not in known and (match := CHANNEL_NUMBER.fullmatch(case)):
        case = match[1]
    if case in known:
        return f"write the names of cases without channel and ending: {case!r}"
    return f"correct the name, remove it, or delete the file{nearest(name, sorted(known))}"


def covering(cases: Sequence[str], classes: Mapping[str, Collection[int]], count: int) -> tuple[str, ...]:
    """Return `count` of the cases, in their order, that hold as many classes as possible, else spread evenly.

    Greedily: each is the one with the most classes that those before it lack. `classes` as in `balanced_splits`.
    """
    left = [*cases[:: max(1, len(cases) // max(1, count))][:count], *cases]
    chosen: set[str] = set()
    seen: set[int] = set()
    while len(chosen) < min(count, len(cases)):
        best = max((case for case in left if case not in chosen), key=lambda case: len({*classes.get(case, ())} - seen))
        chosen.add(best)
        seen.update(classes.get(best, ()))
    return tuple(case for case in cases if case in chosen)


def faults_of(splits: Splits, cases: Sequence[Case]) -> tuple[Problem, ...]:
    """Return what makes validation with these folds doubtful, as warnings; none for `balanced_splits`.

    That is groups (and cases) that a fold both trains on and validates with, cases that it lists twice, and cases in no
    fold.
    """
    faults: list[Problem] = []
    groups = {case.id: _group_of(case) for case in cases}
    for number, fold in enumerate(splits.folds):
        shared = sorted({groups[case] for case in fold.train} & {groups[case] for case in fold.validation})
        if shared:
            names = listing([name for _, name in shared], 4)
            problem = f"fold {number} trains and validates on {names}: its Dice will be too high"
            faults.append(warning("group_on_both_sides", problem))
        twice = [case for part in (fold.train, fold.validation) for case, times in Counter(part).items() if times > 1]
        if twice:
            faults.append(warning("twice_in_a_fold", f"fold {number} lists {listing(twice, 4)} twice: it counts more"))
    used = {case for fold in splits.folds for case in (*fold.train, *fold.validation)}
    left = sorted(set(groups) - used)
    if left:
        faults.append(warning("in_no_fold", f"no fold uses {listing(left, 4)}"))
    return tuple(faults)


def _sorted_unique(case_ids: Sequence[str]) -> tuple[str, ...]:
    ids = tuple(sorted(set(case_ids)))
    if not ids:
        raise InputError("a split needs at least one case", "add training cases")
    return ids
