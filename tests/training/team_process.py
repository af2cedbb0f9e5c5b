"""Trainings by one process or several: what is trained, and the program that each of several runs.

python team_process.py FOLDER JOB,... [RANK STEP]    trains the jobs; process RANK is killed after STEP steps
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from training_fakes import MemoryCase, disc_cases, tiny_configuration, tiny_recipe

from segfit.errors import StageError, StoppedError
from segfit.labels import Exchange, LabelScheme
from segfit.owner import Owner
from segfit.progress import SILENT, Progress
from segfit.specs import AugmentationSpec
from segfit.training import loop
from segfit.training.budget import TimeBudget
from segfit.training.distributed import Ranks
from segfit.training.job import TrainingJob
from segfit.training.learner import Learner
from segfit.training.loop import train_fold
from segfit.training.result import TrainingResult
from segfit.training.team import Team, follow, learner_of

CPU = torch.device("cpu")
STOPPED = 143

LABELS = LabelScheme.from_declaration({"background": 0, "disc": 1, "ring": 2})
REGIONS = LabelScheme.from_declaration({"background": 0, "disc": [1, 2], "ring": 2}, regions_class_order=[1, 2])
IGNORING = LabelScheme.from_declaration({"background": 0, "disc": 1, "ring": 2, "ignore": 3})
IGNORED_REGIONS = LabelScheme.from_declaration(
    {"background": 0, "disc": [1, 2], "ring": 2, "ignore": 3}, regions_class_order=[1, 2]
)
STRONG = {name: 0.5 for name in AugmentationSpec.model_fields if name.endswith("_probability")}


def cases(scheme: LabelScheme, *, previous: bool = False) -> list[MemoryCase]:
    """Discs with a ring of their own, of which some samples have nothing; the parts of a batch differ much."""
    result = []
    for number, case in enumerate(disc_cases(4)):
        case.label[: 4 + 3 * number][case.label[: 4 + 3 * number] == 1] = 2
        if scheme.ignore_value is not None:
            case.label[:, : 2 + 4 * number] = 3  # as the inner values have it, which are as declared
        case.locations = {
            name: np.argwhere(case.label == value).astype(np.int32) for name, value in (("disc", 1), ("ring", 2))
        }
        case.previous = np.roll(case.label, 1, 0) if previous else None
        result.append(case)
    return result


def job(
    scheme: LabelScheme = LABELS,
    *,
    batch: int = 3,
    batch_dice: bool = True,
    cascade: bool = False,
    norm: str = "instance",
    **recipe: Any,
) -> TrainingJob:
    tiny = tiny_configuration()
    network = {"in_channels": 3 if cascade else 1, "num_outputs": 2 if scheme.has_regions else 3, "norm": norm}
    inner = tiny.network.model_copy(update=network)
    changed = {"batch_size": batch, "batch_dice": batch_dice, "network": inner}
    changed |= {"previous_stage": "first"} if cascade else {}
    steps = recipe.pop("steps", 10)
    exchange = None if scheme.has_regions else Exchange(axis=0, pairs=((1, 2),))
    augmentation = AugmentationSpec(**STRONG, sample_patch=(20, 20), mirror_axes=(0, 1), exchange=exchange)
    return TrainingJob(
        configuration=tiny.model_copy(update=changed),
        recipe=tiny_recipe(**{"augmentation": augmentation} | recipe),
        labels=scheme,
        cases_train=[case.id for case in cases(scheme)],
        cases_validation=[],
        seed=3,
        budget=TimeBudget(None, steps),
    )


def chosen(turned: float) -> AugmentationSpec:
    """Samples are turned with a probability, and nothing else is done to them."""
    return AugmentationSpec(**dict.fromkeys(STRONG, 0.0) | {"rotation_probability": turned}, sample_patch=(20, 20))


JOBS = {
    "batch Dice": job(),
    "turned": job(augmentation=chosen(1.0)),
    "only cropped": job(augmentation=chosen(0.0)),
    "in parts": job(),
    "Dice by sample": job(batch_dice=False, batch=2),
    "regions": job(REGIONS, batch_dice=False),
    "ignored": job(IGNORING, loss="dice+ce+focal"),
    "ignored regions": job(IGNORED_REGIONS),
    "worst voxels": job(loss="tversky+topk", oversampling="probabilistic"),
    "centre lines": job(loss="cldice+focal", batch_dice=False),
    "pooled centre lines": job(loss="cldice+ce"),
    "cascade": job(cascade=True),
    "averaged": job(weight_average=0.9),
    "adamw": job(optimizer="adamw", momentum=0.9, learning_rate=1e-3),
    "muon": job(optimizer="muon", momentum=0.95, learning_rate=0.02),
    "half precision": job(precision="fp16"),
    "batch norm": job(norm="batch"),
    "elsewhere": job(),
    "far too fast": job(learning_rate=1000.0, steps=60),
    "long": job(steps=20),
}


def train(
    name: str, folder: Path, *, team: Team | None = None, progress: Progress = SILENT, saved_s: float = 1000.0
) -> TrainingResult:
    asked = JOBS[name]
    given: list[MemoryCase] = cases(asked.labels, previous=asked.configuration.previous_stage is not None)
    if name == "elsewhere":
        given = [_CaseOfTheFirst(**vars(case)) for case in given]
    with patch.object(loop, "learner_of", _in_parts) if name == "in parts" else nullcontext():
        return train_fold(
            asked, given, [], folder / name, CPU, checkpoint_seconds=saved_s, progress=progress, team=team
        )


def _in_parts(*given: Any) -> Learner:
    """A learner whose steps ran out of memory before."""
    learner = learner_of(*given)
    learner.gradients.at_once = 1
    return learner


class _CaseOfTheFirst(MemoryCase):
    """A case that is not where the other processes are."""

    @property
    def shape(self) -> tuple[int, ...]:
        if os.environ.get("RANK", "0") != "0":
            raise StageError(f"case {self.id} is not here", "share the folder")
        return super().shape


class _Killer:
    """Progress that kills a process after some steps."""

    def __init__(self, owner: str, step: int) -> None:
        self._owner, self._left = Owner.of_name(owner), step + 1

    @contextmanager
    def task(self, *_: object) -> Any:
        yield self

    def advance(self, *_: object) -> None:
        self._left -= 1
        if self._left == 0:
            assert self._owner is not None
            os.kill(self._owner.pid, signal.SIGKILL)

    def note(self, *_: object) -> None: ...

    warn = note


def main(folder: Path, names: Sequence[str], killed: int | None = None, step: int = 0) -> int:
    torch.set_num_threads(1)
    try:
        with Ranks.joined() as ranks:
            if ranks.rank:
                follow(ranks, local_rank=ranks.rank)
            else:
                with Team(ranks) as team:
                    lead(team, folder, names, killed, step)
    except StoppedError as error:
        (folder / f"told by {os.environ['RANK']}").write_text(str(error), encoding="utf-8")
        return STOPPED
    return 0


def lead(team: Team, folder: Path, names: Sequence[str], killed: int | None, step: int) -> None:
    progress = SILENT if killed is None else _Killer(team.ranks.owners[killed], step)
    for name in names:
        try:
            train(name, folder, team=team, progress=progress, saved_s=1000.0 if killed is None else 0.0)
        except StageError as error:
            (folder / f"{name} failed").write_text(str(error), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2].split(","), *map(int, sys.argv[3:])))
