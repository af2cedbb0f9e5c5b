"""The plan: everything that is derived by rule before anything is trained. Pure data, no torch."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator

from segfit.files import Document, Record, Warned
from segfit.fingerprint.fingerprint import Unit
from segfit.notebook import html_table
from segfit.specs import Acceleration, Configuration, TrainingSpec
from segfit.text import by_axis, listing

__all__ = [
    "Decision",
    "Extension",
    "Initial",
    "Outcome",
    "Plan",
    "RaceEntry",
    "RunSpec",
    "StageForecast",
    "Unfinished",
    "candidate_words",
]


_Named = Annotated[str, AfterValidator(lambda name: name.replace("resample_scores", "resample_logits"))]
"""Text of a plan with the present name of an option, where the file has the old one."""


class Outcome(Record):
    """What the same rules decide under other circumstances."""

    memory_gb: float | None = None  # with this memory target, or
    cases: int | None = None  # with so many training cases
    preset: str = ""  # whose rules apply then, where `auto` takes other ones
    state: Literal["planned", "absent", "refused"]  # absent: nothing to decide; refused: what was set does not fit
    value: Any = None


class Decision(Record):
    """Why a value is what it is, as data; `segfit.planning.rules` has the sentences."""

    key: _Named  # dotted name of the value, e.g. "3d_fullres.patch_size"
    value: Any  # JSON-able
    rule: _Named  # in the table of rules; empty: there is none, the value was set
    bound: str = ""  # of the rule, that was active
    inputs: dict[str, Any] = {}  # what the rule went by, by name
    options: tuple[_Named, ...] = ()  # that set the value; rule, bound and inputs are then those of `by_rule`
    by_rule: Any = None  # the value without these options
    outcomes: tuple[Outcome, ...] = ()  # what would change it


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
    dice: dict[str, float | None]  # by name of the class
    mean: float | None
    winner: bool = False
    unit: Unit = "mm"  # of the spacing
    diverged: bool = False  # later, in its training, which was given up


def candidate_words(entry: RaceEntry) -> str:
    """Return which candidate of a race an entry is about, in a few words."""
    return f"{entry.configuration} with voxels of {by_axis(entry.spacing_mm)} {entry.unit}"


class Extension(Record):
    """What a run goes on with: the training of an earlier, shorter one, up to its cool-down."""

    time_s: float  # of the earlier run, all in all
    step: int  # that it is gone on from


class Unfinished(Record):
    """A state of a training that is handed over before that has ended."""

    training: str  # identity
    steps: int  # done, those of a training that it started from left out
    seconds: float  # spent training


class Initial(Record):
    """What the networks of a run take over from the model that they start from."""

    identity: str  # of the model
    model: str  # its name, for people
    layers: int  # of the network
    fitted: int  # of them, that come as they are
    anew: tuple[str, ...] = ()  # layers that do not, or not as a whole
    kept: tuple[str, ...] = ()  # classes whose rows of the heads come
    added: tuple[str, ...] = ()  # classes that the model does not know
    dropped: tuple[str, ...] = ()  # classes of the model that the dataset does not have
    saw_cases: bool = False  # the model is known to be trained on these cases, those that validate among them

    @property
    def fits_badly(self) -> bool:
        """Whether more than the heads, and most of the layers, start from nothing."""
        return self.fitted < self.layers / 2

    @property
    def words(self) -> str:
        """What is taken over, in a sentence."""
        parts = [f"{self.fitted} of {self.layers} layers come from {self.model}"]
        for names, what in ((self.kept, "keeps"), (self.added, "learns anew"), (self.dropped, "does without")):
            if names:
                parts.append(f"{what} {listing(names)}")
        return "; ".join([parts[0], f"the network {', '.join(parts[1:])}"] if parts[1:] else parts)


class RunSpec(Record):
    """What is trained with the time there is: decided by rule from a measured step."""

    configurations: tuple[str, ...]
    folds: tuple[int, ...]
    steps: int | None = None  # steps per training, or None: by time
    seconds_per_training: float | None = None  # wall-clock budget of each training, or None: by steps
    expected_steps: dict[str, int] = {}  # per training, by configuration
    seconds_per_step: dict[str, float] = {}  # measured, by configuration
    peak_memory_gb: dict[str, float] = {}  # of a step, measured, by configuration: RAM on a CPU, device memory else
    acceleration: dict[str, Acceleration] = {}  # of steps on a GPU, measured, by configuration
    forecast: dict[str, StageForecast] = {}  # by stage, the whole run
    race: tuple[RaceEntry, ...] = ()  # what was tried before it was decided; () if nothing was
    start: str | None = None  # folder, in that of the project, of the training that the first one goes on from
    start_identity: str | None = None  # of that training
    start_fold: int | None = None  # whose training cases it was trained on: no other fold may go on from it
    extends: Extension | None = None  # the earlier run that it belongs to; None if it belongs to the race
    time_s: float | None = None  # that all of it may take, what an earlier run took included; None: by steps
    course: str = ""  # hash of all that the plan is derived from but the time: equal in runs that can be extended
    settings: tuple[str, ...] = ()  # asked of the planner beside the options, for a coarser spacing
    validation_cases: int | None = None  # of each fold, that are predicted to validate it; None: all
    initial: Initial | None = None  # None: the networks start from nothing
    validation_mirror: bool = True  # validation predicts mirrored views too
    unfinished: dict[str, Unfinished] = {}  # trainings whose states count as they are, by "configuration/fold"

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
    """The plan file. One of schema 1 is read without its reasons, which were sentences."""

    SCHEMA: ClassVar[int] = 2
    schema_version: int = 2
    dataset: str
    preset: str
    stock: bool  # True: every decision is nnU-Net's
    changes: tuple[_Named, ...] = ()  # how it differs from the preset
    fingerprint_hash: str
    machine: str = ""  # device it was made for; on another one it is made anew as long as nothing is trained
    channel_names: tuple[str, ...]
    unit: Unit = "mm"  # in which sizes are told
    configurations: dict[str, Configuration]
    training: dict[str, TrainingSpec]  # by configuration
    run: RunSpec | None = None  # None until a step was measured or the user decided
    decisions: tuple[Decision, ...] = ()
    warnings: tuple[Warned, ...] = ()

    @classmethod
    def migrate(cls, content: dict[str, Any], version: int) -> dict[str, Any]:
        """Return the content of a file without the sentences of schema 1, and without what names no plan any more."""
        reasons = {"schema_version": 2, "decisions": ()} if version == 1 else {}
        return {key: value for key, value in content.items() if key != "basis"} | reasons

    def __repr__(self) -> str:
        run = "not sized yet" if self.run is None else self._run_words(self.run)
        return f"Plan({self.dataset!r}, preset {self.preset}: {', '.join(self.configurations)}; {run})"

    __str__ = __repr__

    def table(self) -> list[tuple[str, str, str, str, str]]:
        """Return a heading, then a row for each configuration."""
        return [
            ("configuration", f"spacing ({self.unit})", "patch", "batch", "network"),
            *(
                (
                    name,
                    by_axis(item.spacing_mm),
                    by_axis(item.patch_size),
                    str(item.batch_size),
                    f"{item.network.plugin or item.network.kind}, {item.network.num_stages} stages"
                    f" from {item.network.features[0]} features",
                )
                for name, item in self.configurations.items()
            ),
        ]

    def _repr_html_(self) -> str:
        columns, *rows = self.table()
        run = () if self.run is None else (self._run_words(self.run),)
        notes = (*run, *self.changes, *map(str, self.warnings))
        return html_table(f"{self.dataset}, preset {self.preset}", columns, rows, notes)

    @staticmethod
    def _run_words(run: RunSpec) -> str:
        folds = listing([str(fold) for fold in run.folds])
        return f"trains {listing(run.configurations)}, fold {folds}"
