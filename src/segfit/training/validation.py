"""Online validation: Dice over a fixed set of validation patches, pooled ("pseudo Dice" of the reference).

It shows that a training learns; it is not the quality of predictions on whole images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import numpy as np
import torch

from segfit.labels import LabelScheme
from segfit.training.learner import Learner
from segfit.training.loss import hard_counts
from segfit.training.result import ValidationPoint
from segfit.training.sampler import PatchSampler
from segfit.training.schedule import pseudo_dice

__all__ = ["OnlineValidation", "ValidationSchedule", "validate"]

_MOST_VALIDATIONS = 20  # one per 5 % of the budget
_MOST_BATCHES = 50  # the reference's number per epoch
_FORWARD_COST = 1 / 3  # of a training step: no backward pass, no augmentation (assumption)


@dataclass(frozen=True, slots=True)
class ValidationSchedule:
    """How often and on how many batches a training is validated."""

    count: int  # validations over the whole budget, evenly spread, the last one at its end; 0: none
    batches: int  # per validation, always the same ones

    @classmethod
    def within(cls, share: float, steps: float) -> ValidationSchedule:
        """Return the schedule that costs about `share` of `steps` training steps, at least one batch at the end."""
        if share <= 0:
            return cls(0, 0)
        affordable = share * steps / _FORWARD_COST
        count = int(min(_MOST_VALIDATIONS, max(1.0, affordable)))
        return cls(count, int(min(_MOST_BATCHES, max(1.0, affordable / count))))

    def is_due(self, done: int, share: float) -> bool:
        """Whether the next validation is due when `done` were made and `share` of the budget is used."""
        return done < self.count and share >= (done + 1) / self.count


class OnlineValidation:
    """The validations of one training: when they are due, what they cost and what they found.

    Parameters
    ----------
    sampler : draws the validation patches; None where there are no validation cases, then nothing is ever due
    share : of the training's steps that all validations together may cost
    """

    def __init__(self, learner: Learner, sampler: PatchSampler | None, labels: LabelScheme, share: float) -> None:
        self.seconds = 0.0  # that the last one took
        self.curve: list[ValidationPoint] = []
        self._learner = learner
        self._sampler = sampler
        self._labels = labels
        self._share = share
        self._schedule = ValidationSchedule(0, 0) if sampler is None else None

    @property
    def is_planned(self) -> bool:
        """Whether it is known how often and on how much to validate."""
        return self._schedule is not None

    def plan(self, steps: float) -> None:
        """Decide how often and on how much to validate in a training of so many steps."""
        self._schedule = ValidationSchedule.within(self._share, steps)

    def is_due(self, share: float) -> bool:
        """Whether to validate when `share` of the budget is used."""
        return self._schedule is not None and self._schedule.is_due(len(self.curve), share)

    def is_missing_at_end(self, steps: int) -> bool:
        """Whether a training that ends after `steps` steps is still to be validated."""
        if not self.is_planned:
            self.plan(steps)
        assert self._schedule is not None
        return self._schedule.count > 0 and (not self.curve or self.curve[-1].step != steps)

    def measure(self) -> tuple[dict[str, float | None], float | None]:
        """Return what `validate` returns on the patches of the schedule, and remember how long it took."""
        assert self._schedule is not None
        assert self._sampler is not None
        started = perf_counter()
        result = validate(self._learner, self._sampler, self._labels, self._schedule.batches)
        self.seconds = perf_counter() - started
        return result

    def facts(self) -> dict[str, Any]:
        """Return what a training needs to go on, as JSON values."""
        return {
            "schedule": None if self._schedule is None else asdict(self._schedule),
            "curve": [point.model_dump(mode="json") for point in self.curve],
        }

    def restore(self, facts: Mapping[str, Any]) -> None:
        """Go on from saved facts."""
        self._schedule = None if facts["schedule"] is None else ValidationSchedule(**facts["schedule"])
        self.curve = [ValidationPoint.model_validate(point) for point in facts["curve"]]


def validate(
    learner: Learner, sampler: PatchSampler, labels: LabelScheme, batches: int
) -> tuple[dict[str, float | None], float | None]:
    """Return Dice by target name over the sampler's first `batches` batches, and the mean; None where undefined."""
    counts = torch.zeros((3, len(labels.targets)), dtype=torch.int64, device=learner.device)
    with learner.evaluating() as network:
        for index in range(batches):
            batch = sampler.batch(index)
            target = batch.labels.to(learner.device).clamp_(min=0)  # outside the image is background
            with learner.precision():
                logits = network(learner.to_device(batch.image))
            counts += hard_counts(logits, target, labels)
    dice, mean = pseudo_dice(counts.cpu().numpy())
    values = (None if np.isnan(value) else float(value) for value in (*dice, mean))
    *by_target, overall = values
    return dict(zip((target.name for target in labels.targets), by_target, strict=True)), overall
