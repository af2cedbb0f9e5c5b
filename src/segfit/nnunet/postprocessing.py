"""What nnU-Net found to be useful for finished label maps, from the file beside the predictions of cross-validation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from segfit.connected_components import PostprocessingStep
from segfit.errors import InputError
from segfit.files import read_json
from segfit.labels import LabelScheme
from segfit.nnunet.checkpoint import foreign_name, read_pickle
from segfit.text import listing, printable

__all__ = ["KEEP_LARGEST", "read_postprocessing"]

KEEP_LARGEST = "remove_all_but_largest_component_from_segmentation"
_WAY_OUT = "copy it again, or remove it and have no post-processing"


def read_postprocessing(folder: Path, labels: LabelScheme) -> tuple[PostprocessingStep, ...]:
    """Return what nnU-Net found to be useful for predictions, from the file beside those of cross-validation.

    None if there is no ``postprocessing.json`` or ``.pkl``. Raises `InputError` for steps that segfit does not have.
    """
    path = folder / "postprocessing.json"
    try:
        if path.is_file():
            content = read_json(path)
            functions, arguments = content["postprocessing_fns"], content["postprocessing_kwargs"]
        elif (path := folder / "postprocessing.pkl").is_file():
            kinds, arguments = read_pickle(path)
            functions = [(foreign_name(kind) or str(kind)).rpartition(".")[2] for kind in kinds]
        else:
            return ()
        steps = [(name, dict(given)) for name, given in zip(functions, arguments, strict=True)]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is damaged ({error})", _WAY_OUT) from None
    return tuple(_step(name, given, labels, path) for name, given in steps)


def _step(function: Any, given: dict[str, Any], labels: LabelScheme, path: Path) -> PostprocessingStep:
    asked = given.pop("labels_or_regions", None)
    if function != KEEP_LARGEST or given.pop("background_label", 0) != 0 or given:
        problem = (
            f"{path} asks for {printable(str(function))} with {printable(str({'labels_or_regions': asked, **given}))}"
        )
        raise InputError(f"{problem}, which segfit does not have", _WAY_OUT)
    stored = set(_flat(asked))
    if not stored or not stored <= set(labels.stored_values[1:]):
        raise InputError(f"{path} names labels that dataset.json does not have: {asked!r}", _WAY_OUT)
    values = tuple(sorted(labels.stored_values.index(value) for value in stored))
    own = next((one.name for one in labels.classes if set(one.values) == set(values)), None)
    return PostprocessingStep.largest_of(own or f"labels {listing([str(value) for value in sorted(stored)])}", values)


def _flat(asked: Any) -> list[Any]:
    """Return the labels of a label, of labels, or of regions."""
    return [one for item in asked for one in _flat(item)] if isinstance(asked, list | tuple) else [asked]
