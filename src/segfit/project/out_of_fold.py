"""Predictions of cases that networks never saw: what is chosen from, and what the chosen model makes of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import combinations
from pathlib import Path

from segfit.connected_components import PostprocessingStep, apply_steps
from segfit.dataset.manifest import Dataset
from segfit.errors import StageError
from segfit.evaluation.pairs import Pair
from segfit.evaluation.quality import QualityFit, mean_traits
from segfit.evaluation.summary import Summary, summarize
from segfit.images.formats import read_label, write_labels
from segfit.images.image import LabelMap
from segfit.preprocessing.store import StoredAnnotation
from segfit.project.preparation import Preparation
from segfit.project.trainings import Validation
from segfit.project.validation import probabilities_path, read_traits, validation_pairs
from segfit.records import Key, seal
from segfit.selection.ensemble import EnsembleMember, StoredProbabilities, evaluate_ensembles, merged_pairs
from segfit.selection.select import Candidate, Selection

__all__ = ["candidates_of", "has_own_predictions", "pairs_of", "quality_of", "write_predictions"]


def candidates_of(
    project: Preparation, summaries: Mapping[str, Mapping[int, Summary]], validations: Sequence[Validation]
) -> list[Candidate]:
    """Return every configuration and every pair of them with cross-validated metrics."""
    classes, configurations = project.dataset.labels.classes, project.plan().configurations
    networks = {name: 1 if configurations[name].previous_stage is None else 2 for name in summaries}
    singles = [
        Candidate(
            (name,),
            summarize([case for summary in folds.values() for case in summary.cases], classes),
            networks[name],
        )
        for name, folds in summaries.items()
    ]
    if len(singles) < 2:
        return singles
    members = [_member(validations, name) for name in summaries]
    references = pairs_of(project, validations, singles[0].members)
    scored = evaluate_ensembles(members, references, project.dataset.labels, execution=project.execution)
    couples = combinations(summaries, 2)
    return [*singles, *(Candidate(names, scored[names], sum(networks[name] for name in names)) for names in couples)]


def _member(validations: Sequence[Validation], name: str) -> EnsembleMember:
    """Return a configuration with its validation probabilities, read slab by slab."""
    found = {
        case: StoredProbabilities(probabilities_path(item.folder, case))
        for item in validations
        if item.training.name == name
        for case in item.cases
    }
    return EnsembleMember(name, found)


def pairs_of(project: Preparation, validations: Sequence[Validation], names: Sequence[str]) -> list[Pair]:
    """Return the validation predictions of a configuration, or an ensemble of some, with their references."""
    first = [
        pair
        for item in validations
        if item.training.name == names[0]
        for pair in validation_pairs(project.dataset, item.folder, _references(project, item))
    ]
    if len(names) == 1:
        return first
    members = [_member(validations, name) for name in names]
    return merged_pairs(members, first, project.dataset.labels)


def _references(project: Preparation, item: Validation) -> dict[str, StoredAnnotation | None]:
    """Return the annotations of validation cases; None for one that has to be read from the dataset."""
    keys = project.case_keys(project.plan().configurations[item.training.name])
    found: dict[str, StoredAnnotation | None] = dict.fromkeys(item.cases)
    for case in item.cases:
        with suppress(StageError):  # the store may have been emptied since
            found[case] = project.stored(keys[case]).annotation
    return found


def write_predictions(
    project: Preparation, validations: Sequence[Validation], selection: Selection, folder: Path, key: Key
) -> None:
    """Write what the chosen model makes of the validation cases, its networks averaged and after its post-processing.

    A single configuration without post-processing makes what its validations hold: then nothing is written.
    """
    if not has_own_predictions(selection):
        return
    files = {case: item.folder for item in validations for case in item.cases}  # of any member: all have its grid
    work = partial(_write, project.dataset, selection.steps, folder, files)
    pairs = pairs_of(project, validations, selection.winner)
    written = project.execution.map(
        work, pairs, description="writing validation cases", name=lambda pair: pair.case, size=Pair.predicted_bytes
    )
    seal(folder, key, [name for _, name in written])


def quality_of(
    validations: Sequence[Validation], selection: Selection, summary: Summary, groups: Mapping[str, str]
) -> dict[str, QualityFit]:
    """Learn by class how good predictions are likely to be; `summary` is of the predictions after post-processing."""
    folders: dict[str, list[Path]] = defaultdict(list)
    for item in validations:
        for case in item.cases if item.training.name in selection.winner else ():
            folders[case].append(item.folder)
    traits = {case: mean_traits([read_traits(folder, case) for folder in every]) for case, every in folders.items()}
    found: dict[str, QualityFit] = {}
    for name in summary.mean:
        metrics = {case.case: case.metrics[name] for case in summary.cases}
        known = {case: traits[case][name] for case in metrics if name in traits.get(case, {})}
        dice = {case: one.dice for case, one in metrics.items() if one.dice is not None}
        always = all(one.n_ref > 0 for one in metrics.values())
        fit = QualityFit.of(known, dice, groups, always=always)
        if fit is not None:
            found[name] = fit
    return found


def has_own_predictions(selection: Selection) -> bool:
    """Whether the chosen model makes of validation cases what no single configuration does."""
    return len(selection.winner) > 1 or bool(selection.steps)


def _write(
    dataset: Dataset, steps: Sequence[PostprocessingStep], folder: Path, files: Mapping[str, Path], pair: Pair
) -> str:
    """Write the label map of a case and return the name of its file."""
    name = f"{pair.case}{dataset.file_ending}"
    labels = dataset.labels.to_stored(apply_steps(pair.load_prediction(), steps))
    grid = read_label(files[pair.case] / name).grid
    write_labels(folder / name, LabelMap(labels, grid, dataset.labels, dataset.case(pair.case).images))
    return name
