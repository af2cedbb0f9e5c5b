"""Predicting the cases that a trained network never saw, from their preprocessed arrays, and scoring them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray

from segfit.dataset.manifest import Dataset
from segfit.errors import CasesFailedError, InputError, Problem
from segfit.evaluation.evaluate import evaluate
from segfit.evaluation.pairs import Pair, Stored
from segfit.evaluation.quality import Traits
from segfit.evaluation.summary import Summary
from segfit.execution.execution import LOCAL, Execution
from segfit.files import read_json, write_bytes, write_file, write_json
from segfit.images.formats import write_labels
from segfit.images.image import CASE_FAILURES, LabelMap, failure_of
from segfit.inference.predictor import Predictor
from segfit.inference.quality import traits_of
from segfit.inference.to_input_grid import LogitField, labels_on_grid_of, merged_labels, merged_probabilities
from segfit.labels import LabelScheme
from segfit.networks.unet import build_network
from segfit.preprocessing.pipeline import CaseProperties, with_previous_stage
from segfit.preprocessing.store import StoredCase, compressed
from segfit.progress import messages_only
from segfit.specs import Configuration, TrainingSpec

__all__ = [
    "NEXT_STAGE",
    "PROBABILITIES",
    "SUMMARY",
    "next_stage_path",
    "probabilities_path",
    "read_traits",
    "traits_path",
    "validate_fold",
    "validation_pairs",
]

SUMMARY = "summary.json"
PROBABILITIES = "probabilities"
NEXT_STAGE = "next-stage"


def validate_fold(
    configuration: Configuration,
    recipe: TrainingSpec,
    dataset: Dataset,
    cases: Sequence[StoredCase],
    weights: Path,
    folder: Path,
    *,
    device: torch.device,
    mirror: bool,
    tile_step: float,
    probabilities: bool,
    title: str,
    next_stage: Mapping[str, CaseProperties] | None = None,
    execution: Execution = LOCAL,
) -> Summary:
    """Predict the validation cases of one fold into ``folder/CASE.ENDING`` and score them.

    Parameters
    ----------
    cases : preprocessed validation cases
    weights : safetensors of the trained network
    probabilities : also keep them, half precision on the stored grid, for ensembles with other configurations
    next_stage : also keep the labels on these grids, by case: those of the second stage of a cascade

    A finished fold (``summary.json`` is written last) is not predicted again; an interrupted one goes on. Cases that
    cannot be predicted do not stop the others; one `StageError` names them at the end.
    """
    grids = next_stage or {}
    kept = {case.id: _kept(folder, case.id, probabilities, case.id in grids) for case in cases}
    done = _finished(folder, kept)
    if done is not None:
        return done
    predictor = _predictor(configuration, recipe, dataset, weights, device=device, mirror=mirror, tile_step=tile_step)
    failed: list[Problem] = []
    with execution.progress.task(title, len(cases)) as task:
        for case in cases:
            path = folder / f"{case.id}{dataset.file_ending}"
            if not all(item.exists() for item in (path, *kept[case.id])):
                try:
                    logits = predictor.logits(
                        with_previous_stage(case.image(), case.previous_stage(), dataset.labels),
                        progress=messages_only(execution.progress),
                    )
                    if case.id in grids:
                        _write_next_stage(folder, case, logits, configuration, grids[case.id], dataset.labels)
                    field = LogitField(logits, case.properties, configuration)
                    _write_prediction(folder, case, field, dataset, probabilities=probabilities)
                except CASE_FAILURES as error:
                    failed.append(failure_of(case.id, error))
            task.advance(1, case.id)
    if failed:
        raise CasesFailedError(title, failed, len(cases), "correct these cases or leave them out, then rerun")
    pairs = validation_pairs(dataset, folder, {case.id: case.annotation for case in cases})
    summary = evaluate(pairs, dataset.labels, execution=execution)
    summary.save(folder / SUMMARY)
    return summary


def validation_pairs(dataset: Dataset, folder: Path, references: Mapping[str, Stored | None]) -> list[Pair]:
    """Return predictions and references of validation cases; None: the reference is read from the dataset."""
    return [
        Pair.of_case(case, folder / f"{case.id}{dataset.file_ending}", dataset.labels, references[case.id])
        for case in dataset.cases(references)
    ]


def probabilities_path(folder: Path, case_id: str) -> Path:
    """Where the probabilities of a validation case lie."""
    return folder / PROBABILITIES / f"{case_id}.npy"


def traits_path(folder: Path, case_id: str) -> Path:
    """Where the traits lie of the prediction of a validation case."""
    return folder / f"{case_id}.traits.json"


def read_traits(folder: Path, case_id: str) -> dict[str, Traits]:
    """Return the traits of the prediction of a validation case by class; none where they were not kept."""
    try:
        return {name: Traits(**found) for name, found in read_json(traits_path(folder, case_id)).items()}
    except InputError:
        return {}


def next_stage_path(folder: Path, case_id: str) -> Path:
    """Where the labels of a validation case lie that the second stage of a cascade sees."""
    return folder / NEXT_STAGE / f"{case_id}.b2nd"


def _kept(folder: Path, case_id: str, *wanted: bool) -> list[Path]:
    """Return what is kept of a case beside its label map."""
    return [traits_path(folder, case_id)] + [
        path(folder, case_id) for path, keep in zip((probabilities_path, next_stage_path), wanted, strict=True) if keep
    ]


def _finished(folder: Path, kept: Mapping[str, Sequence[Path]]) -> Summary | None:
    """Return the metrics if all cases are done, with what is to be kept of each."""
    if not (folder / SUMMARY).exists():
        return None
    try:
        summary = Summary.load(folder / SUMMARY)
    except InputError:
        return None
    complete = {case.case for case in summary.cases} == set(kept)
    return summary if complete and all(path.exists() for paths in kept.values() for path in paths) else None


def _predictor(
    configuration: Configuration,
    recipe: TrainingSpec,
    dataset: Dataset,
    weights: Path,
    *,
    device: torch.device,
    mirror: bool,
    tile_step: float,
) -> Predictor:
    from safetensors.torch import load_file

    network = build_network(configuration.network, deep_supervision=False)
    state: Mapping[str, torch.Tensor] = load_file(weights)
    network.load_state_dict(dict(state))
    return Predictor(
        configuration,
        dataset.labels,
        [network.requires_grad_(False)],
        recipe.augmentation.mirror_axes if mirror else (),
        device,
        tile_step,
        precision=recipe.precision,
        channels_last=recipe.channels_last,
        exchange=recipe.augmentation.exchange,
        deterministic=recipe.deterministic,
    )


def _write_next_stage(
    folder: Path,
    case: StoredCase,
    logits: torch.Tensor,
    configuration: Configuration,
    grid: CaseProperties,
    labels: LabelScheme,
) -> None:
    found = labels_on_grid_of(grid, logits, case.properties, configuration, labels)
    write_bytes(next_stage_path(folder, case.id), compressed(found.astype(np.int16), found.ndim))


def _write_prediction(
    folder: Path, case: StoredCase, field: LogitField, dataset: Dataset, *, probabilities: bool
) -> None:
    """Write the label map, last: its presence says that the case is done."""
    traits = traits_of(field, dataset.labels)
    write_json(traits_path(folder, case.id), {name: one.model_dump() for name, one in traits.items()})
    if probabilities:
        _write_array(probabilities_path(folder, case.id), merged_probabilities([field], dataset.labels))
    labels = dataset.labels.to_stored(merged_labels([field], dataset.labels))
    found = LabelMap(labels, case.properties.grid, dataset.labels, dataset.case(case.id).images)
    write_labels(folder / f"{case.id}{dataset.file_ending}", found)


def _write_array(path: Path, array: NDArray[Any]) -> None:
    def fill(handle: BinaryIO) -> None:
        np.save(handle, array.astype(np.float16), allow_pickle=False)

    write_file(path, fill)
