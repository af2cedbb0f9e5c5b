"""The plan: everything that is derived by rule before anything is trained. Pure data, no torch."""

from __future__ import annotations

from typing import Any

from segfit.files import Document, Record
from segfit.specs import Configuration, TrainingSpec

__all__ = [
    "Decision",
    "Extension",
    "Plan",
    "RaceEntry",
    "RunSpec",
    "StageForecast",
]


class Decision(Record):
    """Why a value is what it is."""

    key: str  # dotted name of the value, e.g. "3d_fullres.patch_size"
    value: Any  # JSON-able
    rule: str  # the rule in one sentence
    inputs: dict[str, Any] = {}  # the inputs it used, by name
    bound: str = ""  # the bound that was active, e.g. "memory 8 GB"
    source: str = ""  # where the rule comes from
    would_change: str = ""  # what would change it


class StageForecast(Record):
    """What one stage is expected to need; None where nobody can tell."""

    seconds: float
    memory_gb: float | None = None  # RAM of the process at its peak
    device_memory_gb: float | None = None  # of a GPU
    disk_gb: float | None = None  # of the files that it leaves


class RaceEntry(Record):
    """What one candidate reached while several were tried; whole cases, means of Dice."""

    configuration: str
    spacing_mm: tuple[float, ...]
    patch_size: tuple[int, ...]
    features: int  # of the first stage
    batch_size: int
    steps: int
    seconds: float  # spent training
    dice: dict[str, float | None]  # by target name
    mean: float | None
    winner: bool = False
    diverged: bool = False  # later, in its training, which was given up


class Extension(Record):
    """What a run goes on with: the training of an earlier, shorter one, up to its cool-down."""

    time_s: float  # of the earlier run, all in all
    step: int  # that it is gone on from


class RunSpec(Record):
    """What is trained with the time there is: decided by rule from a measured step."""

    configurations: tuple[str, ...]
    folds: tuple[int, ...]
    steps: int | None = None  # steps per training, or None: by time
    seconds_per_training: float | None = None  # wall-clock budget of each training, or None: by steps
    expected_steps: dict[str, int] = {}  # per training, by configuration
    seconds_per_step: dict[str, float] = {}  # measured, by configuration
    peak_memory_gb: dict[str, float] = {}  # of a step, measured, by configuration: RAM on a CPU, device memory else
    forecast: dict[str, StageForecast] = {}  # by stage, the whole run
    race: tuple[RaceEntry, ...] = ()  # what was tried before it was decided; () if nothing was
    start: str | None = None  # folder, in that of the project, of the training that the first one goes on from
    start_identity: str | None = None  # of that training
    extends: Extension | None = None  # the earlier run that it belongs to; None if it belongs to the race
    time_s: float | None = None  # that all of it may take, what an earlier run took included; None: by steps
    course: str = ""  # hash of all that the plan is derived from but the time: equal in runs that can be extended
    settings: tuple[str, ...] = ()  # asked of the planner beside the options, for a coarser spacing
    validation_cases: int | None = None  # of each fold, that are predicted to validate it; None: all
    validation_mirror: bool = True  # validation predicts mirrored views too

    @property
    def total(self) -> StageForecast:
        """The forecast of the whole run: sums of seconds and disk, the largest memory."""

        def known(name: str) -> list[float]:
            return [value for item in self.forecast.values() if (value := getattr(item, name)) is not None]

        return StageForecast(
            seconds=sum(known("seconds")),
            memory_gb=max(known("memory_gb"), default=None),
            device_memory_gb=max(known("device_memory_gb"), default=None),
            disk_gb=sum(known("disk_gb")) if known("disk_gb") else None,
        )


class Plan(Document):
    """The plan file."""

    basis: str = ""  # hash of what it was derived from: a project plans anew when that changes
    dataset: str
    preset: str
    stock: bool  # True: every decision is the reference's
    changes: tuple[str, ...] = ()  # how it differs from the preset
    fingerprint_hash: str
    channel_names: tuple[str, ...]
    configurations: dict[str, Configuration]
    training: dict[str, TrainingSpec]  # by configuration
    run: RunSpec | None = None  # None until a step was measured or the user decided
    decisions: tuple[Decision, ...] = ()
    warnings: tuple[str, ...] = ()
