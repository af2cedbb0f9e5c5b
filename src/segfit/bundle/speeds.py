"""Ways to predict with a model that cost less, and what each was found to cost in time and Dice."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from segfit.files import Record
from segfit.options import SMALLEST_TILE_STEP

__all__ = ["Speed", "SpeedName"]

SpeedName = Literal["fast", "balanced", "accurate"]


class Speed(Record):
    """How a model predicts, and what that was found to cost on cases that its networks had not seen."""

    mirror: bool | None = None  # False: no mirrored views; None, here and below: as the model says
    tile_step: Annotated[float, Field(ge=SMALLEST_TILE_STEP, le=1)] | None = None
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    time: float = Field(1.0, gt=0)  # of a case, as a share of what the model's own way takes
    dice: dict[str, float] = {}  # mean by class; 1 in a case where it is rightly not found
    least: dict[str, float] = {}  # lower 95 % bound of the mean change of Dice, by class

    @property
    def words(self) -> str:
        """What is done differently."""
        parts = [
            "no mirrored views" if self.mirror is False else "",
            "" if self.tile_step is None else f"steps of {self.tile_step:g} of the patch",
            self.precision or "",
        ]
        return ", ".join(part for part in parts if part) or "the model's own way"
