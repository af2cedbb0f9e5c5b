"""A step that runs out of memory is done again with less: no cases on the GPU, then fewer samples at once."""

from __future__ import annotations

from torch import Tensor

from segfit.device import is_memory_shortage
from segfit.errors import warning
from segfit.progress import Progress
from segfit.training.batch import Batch
from segfit.training.device_cases import DeviceCases
from segfit.training.events import EventLog
from segfit.training.learner import Learner
from segfit.training.sampler import stream

__all__ = ["learn"]


def learn(
    learner: Learner,
    batch: Batch,
    learning_rate: float,
    seed: int,
    on_device: DeviceCases,
    events: EventLog,
    progress: Progress,
) -> Tensor:
    """Do a step, again where memory does not suffice: same samples, same augmentation.

    It stays so for the steps that follow. Returns what `Learner.step` does.
    """
    while True:
        try:
            return learner.step(batch, learning_rate=learning_rate, rng=stream(seed, "augmentation", batch.step))
        except (RuntimeError, MemoryError) as error:
            if not (is_memory_shortage(error) and learner.can_repeat()):
                raise
            if on_device.give_back():
                continue
            if not learner.can_divide():
                raise
        learner.gradients.divide()  # not before: the error held what the step had made
        _tell(learner, batch, events, progress)


def _tell(learner: Learner, batch: Batch, events: EventLog, progress: Progress) -> None:
    step, samples = batch.step + 1, len(batch.image)
    at_once, exact = learner.gradients.at_once, learner.gradients.divides_exactly
    events.write("out_of_memory", step=step, batch=samples, samples_at_once=at_once, exact=exact)
    told = "with the same gradient" if exact else "which are normalised by themselves"
    progress.warn(
        warning(
            "out_of_memory",
            f"step {step} ran out of memory on {learner.device}: from now on {at_once} of the "
            f"{samples} samples of a batch are computed at once, {told}",
            "a step takes about a third longer; free memory there, or plan again with a smaller --memory",
        )
    )
