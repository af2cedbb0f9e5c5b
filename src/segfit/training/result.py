"""What a finished training says about itself."""

from __future__ import annotations

from segfit.files import Document, Record

__all__ = ["TrainingResult", "ValidationPoint"]


class ValidationPoint(Record):
    """One online validation: Dice pooled over a fixed set of patches ("pseudo Dice"), None where undefined."""

    step: int
    seconds: float
    share: float  # share of the budget that was used
    dice: dict[str, float | None]  # by target name
    mean: float | None  # mean of the defined ones


class TrainingResult(Document):
    """``training.json``: written last, so a training is finished when it is there."""

    identity: str  # hash of everything that determines the training
    configuration: str
    device: str
    steps: int
    seconds: float  # spent training, summed over interruptions
    seconds_per_step: float  # median of the last steps, without validation and saving
    skipped_steps: int  # steps whose gradient was not finite
    final_loss: float | None  # mean of the last steps
    curve: tuple[ValidationPoint, ...] = ()
    peak_memory_gb: float  # device memory, or memory of the process on a CPU

    @property
    def dice(self) -> float | None:
        """Mean pseudo Dice at the end."""
        return self.curve[-1].mean if self.curve else None
