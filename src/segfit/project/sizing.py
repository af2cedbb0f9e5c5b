"""From a plan and a clock to what is trained: the written rules choose among candidates that are measured.

`segfit.planning.budget` holds the rules; here they meet what `Measurer` finds.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from math import ceil, inf, prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from segfit.errors import InputError, MemoryShortageError
from segfit.fingerprint.fingerprint import Fingerprint
from segfit.labels import LabelScheme
from segfit.options import Options
from segfit.planning.budget import (
    ENOUGH_STEPS,
    FEWEST_STEPS,
    MANY_STEPS,
    NARROW,
    TOLERABLE_STEPS,
    WANTED_STEPS,
    WIDE_STEPS,
    candidates,
    coarser,
    short_recipe,
    shrunk,
)
from segfit.preprocessing.coarsening import kept_dice, mean_kept_dice
from segfit.progress import Progress
from segfit.project.candidate import SLACK, Candidate, ValidationCost, Workload
from segfit.project.measuring import Measurer, smallest
from segfit.specs import Configuration, TrainingSpec
from segfit.text import duration

__all__ = ["Sizer"]

_SPARE = 1.25  # on top of the smallest budget that a refusal names
_VALIDATION_SHARE = 0.1  # of all time may go into predicting validation cases, in `auto`
_COARSE_ENOUGH = ((WANTED_STEPS, 0.95), (MANY_STEPS, 0.99))
"""So many steps are worth a coarser spacing that leaves so much Dice of the labels (docs/decisions/time-budget.md)."""
_COARSENINGS = (2, 4, 8, 16, 32, 64, 128)  # times larger voxels
_COST_BY_WIDTH = {8: 0.7, 16: 1.0, 24: 1.5, 32: 2.2}  # of a step, in that of 16 features; a first guess only
_NEARLY = 0.8  # of the steps that are wanted are enough for what was measured: clocks differ by as much
_MOST_GROWTHS = 3  # of a patch that was guessed far too small


class Sizer:
    """Chooses the version of a configuration that is worth the time."""

    def __init__(
        self,
        fingerprint: Fingerprint,
        labels: LabelScheme,
        options: Options,
        device: torch.device,
        workload: Workload,
        progress: Progress,
        *,
        budget: float,
        shares: int,
        processes: int = 1,
    ) -> None:
        """`budget` is all the time there is in seconds, divided among `shares` trainings that were asked for."""
        self._options = options
        self._workload = workload
        self._budget, self._shares = budget, shares
        self.measurer = Measurer(fingerprint, labels, options, device, progress, processes)

    def best(self, planned: Configuration, recipe: TrainingSpec, seconds: float) -> Candidate:
        """Return the largest version of a configuration that still gets enough steps in `seconds`.

        What a step costs is guessed from a small one first, so that nothing is run that is far too slow.
        """
        options = self._options
        if options.preset != "auto":
            return self.measurer.planned(planned, recipe)
        ladder = candidates(planned, options)
        recipe = self.measurer.arithmetic(planned, short_recipe(recipe, options))
        _, per_voxel = self.measurer.cheapest(planned, recipe)
        free = options.planning.of(planned.name).patch_size is None

        def guess(item: Configuration) -> float:
            """Return the steps that are probably possible."""
            width = item.network.features[0]
            near = min(_COST_BY_WIDTH, key=lambda known: abs(known - width))
            cost = per_voxel * _COST_BY_WIDTH[near] * item.batch_size * prod(item.patch_size)
            return seconds / (cost * SLACK)

        wanted = [WANTED_STEPS]
        for smaller, larger in pairwise(ladder):
            wider = larger.network.features[0] > smaller.network.features[0]
            wanted.append(WIDE_STEPS if wider else MANY_STEPS)
        lowest = next((rung for rung, item in enumerate(ladder) if item.network.features[0] >= NARROW), len(ladder) - 1)
        rungs = range(lowest, len(ladder))
        begin = next((rung for rung in reversed(rungs) if guess(ladder[rung]) >= wanted[rung]), lowest)
        start = ladder[begin]
        if free and guess(start) < TOLERABLE_STEPS:
            start = shrunk(start, guess(start) / TOLERABLE_STEPS) or smallest(start)
        best = self.grown(self.measurer.fitting(start, recipe), ladder[begin], seconds)
        if best.configuration.patch_size != planned.patch_size or self.steps(best, seconds) < TOLERABLE_STEPS:
            return self._reduced(best, ladder[0], seconds, shrink=free)
        if begin > lowest and self.steps(best, seconds) < _NEARLY * wanted[begin]:  # more was guessed
            return self._lowered(best, ladder[lowest:begin], wanted[lowest:begin], seconds)
        for rung in range(begin + 1, len(ladder)):
            if self.steps(best, seconds) < wanted[rung] * 1.2:
                break
            limit = self.measurer.available_gb()
            try:
                tried = self.measurer.measure(ladder[rung], recipe)
            except MemoryShortageError:
                return best.model_copy(update={"memory_gb": limit})
            if self.steps(tried, seconds) < wanted[rung]:
                break
            best = tried
        return best

    def _lowered(
        self, best: Candidate, cheaper: Sequence[Configuration], wanted: Sequence[int], seconds: float
    ) -> Candidate:
        """Return the costliest of the `cheaper` versions that gets the steps `wanted` of it, else the cheapest."""
        for configuration, least in zip(reversed(cheaper), reversed(wanted), strict=True):
            best = self.measurer.measure(configuration, best.recipe).model_copy(update={"memory_gb": best.memory_gb})
            if self.steps(best, seconds) >= _NEARLY * least:
                break
        return best

    def grown(self, best: Candidate, whole: Configuration, seconds: float) -> Candidate:
        """Return a version with a larger patch, at most that of `whole`, where the guess was far too low."""
        for _ in range(_MOST_GROWTHS):
            patch, steps = best.configuration.patch_size, self.steps(best, seconds)
            if best.memory_gb is not None or patch == whole.patch_size or steps < 2 * TOLERABLE_STEPS:
                break
            share = prod(patch) / prod(whole.patch_size) * steps / (1.3 * TOLERABLE_STEPS)
            larger = whole if share >= 1 else shrunk(whole, share)
            if larger is None or prod(larger.patch_size) <= prod(patch):
                break
            try:
                tried = self.measurer.measure(larger, best.recipe)
            except MemoryShortageError:
                break
            if self.steps(tried, seconds) < TOLERABLE_STEPS:
                break
            best = tried
        return best

    def _reduced(self, best: Candidate, narrowest: Configuration, seconds: float, *, shrink: bool) -> Candidate:
        """Return a version with enough steps if there is one: a smaller patch, then a narrower network."""
        while (steps := self.steps(best, seconds)) < _NEARLY * TOLERABLE_STEPS:
            configuration = best.configuration
            smaller = shrunk(configuration, max(0.3, min(0.9, steps / TOLERABLE_STEPS))) if shrink else None
            network = configuration.network  # which lost stages with the patch
            narrow = network.model_copy(update={"features": narrowest.network.features[: network.num_stages]})
            if smaller is None and network != narrow:
                smaller = configuration.model_copy(update={"network": narrow, "batch_size": narrowest.batch_size})
            if smaller is None:
                break
            tried = self.measurer.measure(smaller, best.recipe).model_copy(update={"memory_gb": best.memory_gb})
            if self.steps(tried, seconds) <= steps:
                break  # smaller patches mean more tiles to predict
            best = tried
        return best

    def coarser(
        self, configuration: Configuration, recipe: TrainingSpec, seconds: float, labels: Sequence[NDArray[np.int16]]
    ) -> tuple[float, ...]:
        """Return a spacing at which a patch with enough steps sees the whole image; () if none is sensible.

        Parameters
        ----------
        labels : of some cases at the spacing of the configuration, to see how much of them a coarser grid keeps
        """
        _, per_voxel = self.measurer.cheapest(configuration, recipe)
        voxels = prod(configuration.median_shape) * min(2, configuration.batch_size)

        @cache
        def kept(times: int) -> float:
            target = coarser(configuration.spacing_mm, times)
            return mean_kept_dice(kept_dice(array, _grid(array, configuration, target)) for array in labels)

        chosen = 1
        for steps, least in _COARSE_ENOUGH:
            affordable = seconds / (steps * SLACK * per_voxel)
            for times in _COARSENINGS:
                if kept(times) < least:
                    break
                chosen = max(chosen, times)
                if voxels / times <= affordable:
                    break
        return coarser(configuration.spacing_mm, chosen) if chosen > 1 else ()

    def enough(self, candidate: Candidate, seconds: float) -> bool:
        """Whether as much training is possible as the rules plan; then nothing needs to be tried."""
        return self.steps(candidate, seconds) >= ENOUGH_STEPS

    def sees(self, candidate: Candidate) -> float:
        """Return the share of the median image that the patch sees, at most 1."""
        configuration = candidate.configuration
        return prod(min(1.0, p / n) for p, n in zip(configuration.patch_size, configuration.median_shape, strict=True))

    def leaves_enough(self, found: Sequence[Candidate], seconds: float, took: float) -> bool:
        """Return whether one more candidate can be measured, which takes about as long as the first `took`.

        It must leave what was found the fewest steps; where nothing has them even now, another one may be faster.
        """
        left = (seconds, seconds - took)
        now, then = (any(self.steps(one, s / self._shares) >= FEWEST_STEPS for one in found) for s in left)
        return seconds > 0 and (then or not now)

    def require(self, candidate: Candidate, seconds: float) -> None:
        """Raise `InputError` where fewer than `FEWEST_STEPS` steps would be left, naming a budget that works."""
        if self.steps(candidate, seconds) >= FEWEST_STEPS:
            return
        missing = FEWEST_STEPS * candidate.step.seconds_per_step * SLACK + self._predicting(candidate) - seconds
        smallest = _SPARE * (self._budget + missing * self._shares)
        raise InputError(
            f"{duration(self._budget)} are too short for {candidate.name}: fewer than {FEWEST_STEPS} training "
            f"steps would be left",
            f"the smallest budget that works here is --time {ceil(smallest / 60)}m",
        )

    def validation(self, candidate: Candidate) -> ValidationCost:
        """Return how one fold is validated, in at most its share of the time."""
        limit = _VALIDATION_SHARE * self._budget / self._shares if self._options.preset == "auto" else inf
        return candidate.validation(self._workload, limit)

    def _predicting(self, candidate: Candidate) -> float:
        return self.validation(candidate).seconds + candidate.testing(1, self._workload)

    def steps(self, candidate: Candidate, seconds: float) -> float:
        """Return the training steps that are possible in so many seconds, predictions included."""
        left = seconds - self._predicting(candidate)
        return max(0.0, left) / (candidate.step.seconds_per_step * SLACK)


def _grid(array: NDArray[Any], configuration: Configuration, spacing_mm: Sequence[float]) -> list[int]:
    """Return the shape of an array at another spacing; a 2D network leaves the slices of a volume as they are."""
    slices, sizes = array.shape[: -configuration.ndim], array.shape[-configuration.ndim :]
    factors = [old / new for old, new in zip(configuration.spacing_mm, spacing_mm, strict=True)]
    return [*slices, *(max(1, round(n * factor)) for n, factor in zip(sizes, factors, strict=True))]
