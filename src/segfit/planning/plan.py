"""The plan: everything that is derived by rule before anything is trained. Pure data, no torch.

Axis order is array order throughout. For a 2D configuration on 3D data the first axis is the slice axis: it is kept
as it is and the network sees the other two.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import model_validator

from segfit.files import Document, Record
from segfit.fingerprint.fingerprint import IntensityStatistics
from segfit.labels import Exchange
from segfit.notebook import html_table
from segfit.options import NormalizationScheme
from segfit.words import listing

__all__ = [
    "AugmentationSpec",
    "Configuration",
    "Decision",
    "Extension",
    "NetworkSpec",
    "Normalization",
    "Plan",
    "PreprocessingSpec",
    "RaceEntry",
    "ResamplingSpec",
    "RunSpec",
    "StageForecast",
    "TrainingSpec",
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


class Normalization(Record):
    """How one channel is normalised."""

    scheme: NormalizationScheme
    use_mask: bool = False  # zscore only: statistics and assignment inside the non-zero mask
    statistics: IntensityStatistics | None = None  # ct only


class ResamplingSpec(Record):
    """How one kind of volume is resampled. `method` "spline" is the reference's default, "torch" its alternative."""

    method: Literal["spline", "torch", "none"] = "spline"
    order: int = 3
    order_separate_axis: int = 0
    force_separate: bool | None = None
    separate_threshold: float = 3.0


class PreprocessingSpec(Record):
    """Everything that determines the preprocessed arrays; its hash identifies them.

    `spacing_mm` has one entry per image axis after transposition; None keeps the case's own spacing on that axis
    (the slice axis of a 2D configuration on 3D data).
    """

    orientation: Literal["canonical", "stored"]
    transpose: tuple[int, ...]  # axis i of the result is axis transpose[i] of the image
    spacing_mm: tuple[float | None, ...]
    normalization: tuple[Normalization, ...]
    resample_image: ResamplingSpec = ResamplingSpec(order=3)
    resample_label: ResamplingSpec = ResamplingSpec(order=1)
    resample_scores: ResamplingSpec = ResamplingSpec(order=1)

    @property
    def image_ndim(self) -> int:
        """Spatial axes of the preprocessed arrays (a 2D configuration on 3D data has 3)."""
        return len(self.transpose)

    @model_validator(mode="after")
    def _check(self) -> PreprocessingSpec:
        if sorted(self.transpose) != list(range(len(self.transpose))) or len(self.spacing_mm) != len(self.transpose):
            raise ValueError("transpose must be a permutation with one spacing per axis")
        return self


class NetworkSpec(Record):
    """A U-Net, plain or with a residual encoder. Lists run from full resolution to the bottleneck.

    `decoder_convs[0]` belongs to the lowest resolution, as in the reference. `strides[0]` is all ones.
    """

    kind: Literal["plain", "residual"]
    ndim: Literal[2, 3]
    in_channels: int
    num_outputs: int
    features: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    kernels: tuple[tuple[int, ...], ...]
    encoder_convs: tuple[int, ...]  # convolutions (plain) or residual blocks (residual) per stage
    decoder_convs: tuple[int, ...]

    @property
    def num_stages(self) -> int:
        """Resolution levels, bottleneck included."""
        return len(self.features)

    @property
    def divisor(self) -> tuple[int, ...]:
        """Input sizes must be multiples of this, per axis."""
        total = [1] * self.ndim
        for stride in self.strides:
            total = [a * b for a, b in zip(total, stride, strict=True)]
        return tuple(total)

    @model_validator(mode="after")
    def _check(self) -> NetworkSpec:
        stages = len(self.features)
        if not (len(self.strides) == len(self.kernels) == len(self.encoder_convs) == stages):
            raise ValueError("features, strides, kernels and encoder_convs must have one entry per stage")
        if len(self.decoder_convs) != stages - 1:
            raise ValueError("decoder_convs must have one entry less than there are stages")
        if any(len(v) != self.ndim for v in (*self.strides, *self.kernels)):
            raise ValueError("strides and kernels must have one entry per axis")
        return self


class Configuration(Record):
    """One way to see the data: a resolution, a patch, a network."""

    name: str
    ndim: Literal[2, 3]
    patch_size: tuple[int, ...]
    batch_size: int
    spacing_mm: tuple[float, ...]  # target spacing of the axes the network sees
    median_shape: tuple[float, ...]  # median image size at that spacing, may end in .5
    batch_dice: bool
    preprocessing: PreprocessingSpec
    network: NetworkSpec
    memory_estimate: int  # feature-map elements of the closed-form estimate
    previous_stage: str | None = None
    next_stage: str | None = None


class AugmentationSpec(Record):
    """Probabilities and ranges of the augmentation; the defaults are the reference's."""

    rotation_probability: float = 0.2
    rotation_degrees: float = 30.0  # symmetric range, per axis in 3D
    scaling_probability: float = 0.2
    scaling_range: tuple[float, float] = (0.7, 1.4)
    dummy_2d: bool = False  # spatial transforms in the plane only
    sample_patch: tuple[int, ...] = ()  # enlarged patch that is cut out before the spatial transform; () = patch
    noise_probability: float = 0.1
    noise_std_range: tuple[float, float] = (0.0, 0.1)
    blur_probability: float = 0.2
    blur_channel_probability: float = 0.5
    blur_sigma_range: tuple[float, float] = (0.5, 1.0)
    brightness_probability: float = 0.15
    brightness_range: tuple[float, float] = (0.75, 1.25)
    contrast_probability: float = 0.15
    contrast_range: tuple[float, float] = (0.75, 1.25)
    low_resolution_probability: float = 0.25
    low_resolution_channel_probability: float = 0.5
    low_resolution_range: tuple[float, float] = (0.5, 1.0)
    inverted_gamma_probability: float = 0.1
    gamma_probability: float = 0.3
    gamma_range: tuple[float, float] = (0.7, 1.5)
    mirror_axes: tuple[int, ...] = ()  # network axes, each flipped with probability 0.5
    exchange: Exchange | None = None  # labels that change places in the samples flipped along its axis
    masked_channels: tuple[int, ...] = ()  # image channels set to 0 outside the non-zero mask afterwards


class TrainingSpec(Record):
    """The training recipe of one configuration; the defaults are the reference's."""

    optimizer: Literal["sgd", "adamw", "muon"] = "sgd"
    learning_rate: float = 1e-2
    momentum: float = 0.99
    weight_decay: float = 3e-5
    poly_exponent: float = 0.9
    warmup_share: float = 0.0  # share of the budget with a linearly rising learning rate
    cooldown_share: float = 1.0  # share of the budget, its end, with a falling learning rate; constant before
    gradient_clip: float = 12.0
    foreground_share: float = 0.33
    deep_supervision: bool = True
    weight_average: float = 0.0  # decay of the exponential moving average of the weights; 0 = off
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    channels_last: bool = False
    validation_share: float = 0.05  # share of the time spent on validation during training
    augmentation: AugmentationSpec = AugmentationSpec()


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

    def __repr__(self) -> str:
        run = "not sized yet" if self.run is None else self._run_words(self.run)
        return f"Plan({self.dataset!r}, preset {self.preset}: {', '.join(self.configurations)}; {run})"

    __str__ = __repr__

    def _repr_html_(self) -> str:
        rows = [
            (
                name,
                "x".join(f"{value:.4g}" for value in item.spacing_mm),
                "x".join(map(str, item.patch_size)),
                str(item.batch_size),
                f"{item.network.kind}, {item.network.num_stages} stages from {item.network.features[0]} features",
            )
            for name, item in self.configurations.items()
        ]
        run = () if self.run is None else (self._run_words(self.run),)
        columns = ("configuration", "spacing (mm)", "patch", "batch", "network")
        return html_table(f"{self.dataset}, preset {self.preset}", columns, rows, (*run, *self.changes, *self.warnings))

    @staticmethod
    def _run_words(run: RunSpec) -> str:
        folds = listing([str(fold) for fold in run.folds])
        return f"trains {listing(run.configurations)}, fold {folds}"
