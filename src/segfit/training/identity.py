"""What names a training: everything that its weights depend on but the time that it was given."""

from __future__ import annotations

from collections.abc import Sequence

from segfit.files import content_hash
from segfit.labels import LabelScheme
from segfit.specs import Configuration, TrainingSpec

__all__ = ["training_identity"]


def training_identity(
    *,
    configuration: Configuration,
    recipe: TrainingSpec,
    labels: LabelScheme,
    cases_train: Sequence[str],
    cases_validation: Sequence[str],
    seed: int,
    steps: int | None = None,
    weights: Sequence[float] | None = None,
    data: str = "",
    start: str | None = None,
) -> str:
    """Return 16 hex digits.

    Parameters
    ----------
    cases_train, cases_validation : ids, in their order
    steps : of a training by steps; one by time goes on when it is given more of it, and keeps its name
    weights : how often each training case is drawn
    data : names the content of the cases
    start : identity of the training that it starts from
    """
    seen = configuration.model_dump(mode="json")
    preprocessing = seen["preprocessing"]
    preprocessing["resample_scores"] = preprocessing.pop("resample_logits")  # the name in the identities there are
    return content_hash(
        {
            "configuration": seen,
            "recipe": recipe.model_dump(mode="json"),
            "labels": labels.model_dump(mode="json"),
            "train": list(cases_train),
            "validation": list(cases_validation),
            "steps": steps,
            "seed": seed,
            "data": data if weights is None else [data, list(weights)],
            "start": start,
        }
    )
