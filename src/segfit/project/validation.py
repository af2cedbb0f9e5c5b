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
from segfit.evaluation.summary import Summary
from segfit.execution.execution import LOCAL, Execution
from segfit.files import write_file
from segfit.images.formats import write_labels
from segfit.images.image import CASE_FAILURES, LabelMap, failure_of
from segfit.inference.predictor import Predictor
from segfit.inference.to_input_grid import LogitField, merged_labels, merged_probabilities
from segfit.networks.unet import build_network
from segfit.preprocessing.store import StoredCase
from segfit.progress import messages_only
from segfit.specs import Configuration, TrainingSpec

__all__ = ["PROBABILITIES", "SUMMARY", "probabilities_path", "validate_fold", "validation_pairs"]

SUMMARY = "summary.json"
PROBABILITIES = "probabilities"


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
    execution: Execution = LOCAL,
) -> Summary:
    """Predict the validation cases of one fold into ``folder/CASE.ENDING`` and score them.

    Parameters
    ----------
    cases : preprocessed validation cases
    weights : safetensors of the trained network
    probabilities : also keep them, half precision on the stored grid, for ensembles with other configurations

    A finished fold (``summary.json`` is written last) is not predicted again; an interrupted one goes on. Cases that
    cannot be predicted do not stop the others; one `StageError` names them at the end.
    """
    wanted = [case.id for case in cases]
    done = _finished(folder, wanted, probabilities=probabilities)
    if done is not None:
        return done
    predictor = _predictor(configuration, recipe, dataset, weights, device=device, mirror=mirror, tile_step=tile_step)
    failed: list[Problem] = []
    with execution.progress.task(title, len(cases)) as task:
        for case in cases:
            path = folder / f"{case.id}{dataset.file_ending}"
            written = probabilities_path(folder, case.id)
            if not path.exists() or (probabilities and not written.exists()):
                try:
                    logits = predictor.logits(case.image(), progress=messages_only(execution.progress))
                    fields = [LogitField(logits, case.properties, configuration)]
                    if probabilities:
                        _write_array(written, merged_probabilities(fields, dataset.labels))
                    labels = dataset.labels.to_stored(merged_labels(fields, dataset.labels))
                    images = dataset.case(case.id).images
                    write_labels(path, LabelMap(labels, case.properties.grid, dataset.labels, images))
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
        Pair.of_case(dataset.case(name), folder / f"{name}{dataset.file_ending}", dataset.labels, reference)
        for name, reference in references.items()
    ]


def probabilities_path(folder: Path, case_id: str) -> Path:
    """Where the probabilities of a validation case lie."""
    return folder / PROBABILITIES / f"{case_id}.npy"


def _finished(folder: Path, wanted: Sequence[str], *, probabilities: bool) -> Summary | None:
    if not (folder / SUMMARY).exists():
        return None
    try:
        summary = Summary.load(folder / SUMMARY)
    except InputError:
        return None
    complete = {case.case for case in summary.cases} == set(wanted)
    if probabilities:
        complete = complete and all(probabilities_path(folder, name).exists() for name in wanted)
    return summary if complete else None


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
    )


def _write_array(path: Path, array: NDArray[Any]) -> None:
    def fill(handle: BinaryIO) -> None:
        np.save(handle, array.astype(np.float16), allow_pickle=False)

    write_file(path, fill)
