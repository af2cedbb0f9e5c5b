"""Online validation: Dice over a fixed set of validation patches, pooled ("pseudo Dice" of the reference).

It shows that a training learns; it is not the quality of predictions on whole images.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from segfit.labels import LabelScheme
from segfit.training.learner import Learner
from segfit.training.loss import hard_counts
from segfit.training.sampler import PatchSampler
from segfit.training.schedule import pseudo_dice

__all__ = ["ValidationSchedule", "validate"]

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
