"""A trained model in memory: `load_model`, and `Model.predict` for one image.

Prediction happens in this process and writes nothing by itself; many cases: `segfit.inference.predict_folder`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import inf
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from segfit.bundle.bundle import Bundle, Member, ModelManifest
from segfit.bundle.speeds import Speed, SpeedName
from segfit.connected_components import apply_steps
from segfit.device import resolve_device
from segfit.errors import InputError, Problem, warning
from segfit.evaluation.measurement import Margins, Measurement, measure
from segfit.evaluation.quality import ClassQuality
from segfit.execution.memory import free_memory_gb
from segfit.execution.scratch import IN_MEMORY
from segfit.files import path_of, write_arrays
from segfit.fingerprint.appearance import measure_image, oriented_crop
from segfit.fingerprint.training_images import Fact, Range, impossible_size
from segfit.geometry import Grid
from segfit.images.formats import write_labels
from segfit.images.image import Image, LabelMap, voxels_in_words
from segfit.images.open_files import OpenFiles
from segfit.inference.engines import Engine, engage, require_engine
from segfit.inference.open_model import chosen_folds, load_network, model_paths, open_model
from segfit.inference.predictor import Precision, Predictor, require_options
from segfit.inference.prepared import Prepared, RegionalCase, logit_fields, regional_case, streaming, why_read_whole
from segfit.inference.quality import TraitSums, low_quality, predicted_quality
from segfit.inference.room import Room, forecast_gb, with_less_each_time
from segfit.inference.sources import (
    Array,
    Source,
    as_spacing,
    header_warnings,
    read_previous_stage,
    read_source,
    source_files,
)
from segfit.inference.to_input_grid import LogitField, merged, merged_labels, stored_labels
from segfit.inference.window import Rows
from segfit.labels import LabelScheme
from segfit.plugins import package_version
from segfit.preprocessing.pipeline import CaseProperties, preprocess, with_previous_stage
from segfit.progress import LOGGED, SILENT, KeptWarnings, Progress
from segfit.text import count, listing, numbers, printable

__all__ = ["Model", "ModelSource", "Prediction", "load_model"]

Spacing = float | Sequence[float] | NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True, eq=False)
class Prediction:
    """What a model found in one image.

    Parameters
    ----------
    label_map : on the grid of the input, in the order of its file
    probabilities : (num_outputs, *labels.shape) float32 if they were asked for, before post-processing
    warnings : what the user should know about this result
    margins : by what factors measurements may be off, as the model has them
    quality : predicted Dice of each class; none where the model does not know, as of few groups of cases
    facts : numbers of the image beside those of the training images, where the model knows them
    """

    label_map: LabelMap
    probabilities: NDArray[np.float32] | None = None
    warnings: tuple[Problem, ...] = ()
    margins: Margins = field(default_factory=dict)
    quality: tuple[ClassQuality, ...] = ()
    facts: tuple[Fact, ...] = ()

    @property
    def labels(self) -> NDArray[np.integer[Any]]:
        """Label values as stored, (z, y, x) or (y, x)."""
        return self.label_map.array

    @property
    def grid(self) -> Grid:
        """Geometry of the input."""
        return self.label_map.grid

    @property
    def measurements(self) -> list[Measurement]:
        """Volume (area in pictures) of every class, and diameter and circumference where it is convex in pictures.

        With the interval that holds the true one in 95 % of new cases like those of the training, or in 90 %; without
        one where the model was validated on too few groups of cases (9 and 19 are needed).
        """
        scheme = self.label_map.scheme
        assert scheme is not None  # predictions know what they mean
        return measure(scheme.to_inner(self.labels), self.grid, scheme.classes, self.margins)

    def __repr__(self) -> str:
        probabilities = "" if self.probabilities is None else ", with probabilities"
        warnings = f", {count(len(self.warnings), 'warning')}" if self.warnings else ""
        return f"Prediction({voxels_in_words(self.labels, self.grid)}{probabilities}{warnings})"

    def save(self, path: str | Path) -> None:
        """Write the label map to `path` in the format of its ending, on the grid of the input."""
        write_labels(path_of(path, "label map"), self.label_map)

    def save_probabilities(self, path: str | Path) -> None:
        """Write the probabilities as compressed ``.npz`` with the key ``probabilities``."""
        if self.probabilities is None:
            raise InputError("this prediction has no probabilities", "predict with probabilities=True")
        write_arrays(path_of(path, "probabilities"), {"probabilities": self.probabilities})


class ModelSource(NamedTuple):
    """What a model was loaded from and how, as in `load_model`."""

    paths: tuple[Path, ...]
    device: str
    options: tuple[tuple[str, Any], ...]

    def load(self) -> Model:
        """Load it again."""
        return load_model(self.paths, self.device, **dict(self.options))


def load_model(
    path: str | Path | Sequence[str | Path],
    device: str = "auto",
    folds: Sequence[int | str] | None = None,
    *,
    checkpoint: str | None = None,
    mirror: bool | None = None,
    tile_step: float | None = None,
    precision: Precision | None = None,
    speed: SpeedName | None = None,
    deterministic: bool = False,
    engine: Engine = "auto",
) -> Model:
    """Load a model of segfit or of nnU-Net v2, or several as one that averages their probabilities.

    Parameters
    ----------
    path : a model (folder, zip, or ``hf://ORG/NAME@REVISION``) or a project; of nnU-Net a model folder, the folder of a
        dataset, or an exported zip; or several
    device : auto, cpu, cuda, cuda:N or mps
    folds : which networks of each configuration to use; None: all
    checkpoint : of nnU-Net's models: best, final, latest or a file name; None: final
    mirror : False switches test-time mirroring off (2^axes times faster); None: as the model says
    tile_step, precision : None: as the model says
    speed : fast, balanced or accurate: a way to predict that `segfit tune` found to lose nothing; what is given with
        `mirror`, `tile_step` and `precision` comes before it
    deterministic : use only kernels that give the same bits again; on CUDA the environment variable
        CUBLAS_WORKSPACE_CONFIG=:4096:8 must be set before
    engine : what runs the networks on a processor: torch, openvino (``segfit[openvino]``), or auto: torch, and after
        some seconds openvino where it is installed and measured to be faster. Results differ by rounding only

    Raises `InputError` if one is no model, is damaged, lacks a fold, or does not fit the others.
    """
    located = model_paths(path)
    bundle = open_model(located, folds, checkpoint=checkpoint)
    how: dict[str, Any] = {"mirror": mirror, "tile_step": tile_step, "precision": precision}
    if speed is not None:
        way = _speed_of(bundle, speed)
        how = {name: getattr(way, name) if value is None else value for name, value in how.items()}
    how |= {"folds": None if folds is None else tuple(folds), "deterministic": deterministic, "engine": engine}
    model = Model(bundle, resolve_device(device), **how)
    paths = tuple(one.absolute() for one in located)
    model.source = ModelSource(paths, device, (*how.items(), ("checkpoint", checkpoint)))
    return model


def _speed_of(bundle: Bundle, name: SpeedName) -> Speed:
    speeds = bundle.manifest.speeds
    if name not in get_args(SpeedName):
        raise InputError(f"speed is {', '.join(get_args(SpeedName))} or None, got {name!r}")
    if name not in speeds:
        problem = f"what faster ways to predict lose was not measured for the model {bundle.manifest.name}"
        raise InputError(problem, "measure one model of segfit with segfit tune, or leave the speed out")
    return speeds[name]


class Model:
    """A model with the weights of all members and folds on its device."""

    def __init__(
        self,
        bundle: Bundle,
        device: torch.device,
        folds: Sequence[int | str] | None = None,
        *,
        mirror: bool | None = None,
        tile_step: float | None = None,
        precision: Precision | None = None,
        deterministic: bool = False,
        engine: Engine = "auto",
    ) -> None:
        require_options(mirror, tile_step, precision)
        require_engine(engine, device)
        for package, version in bundle.manifest.requires.items():
            if not package_version(package):
                problem = f"{bundle.source} needs the package {package} {version}, whose network it has"
                raise InputError(problem, "install it if you trust it: its code would run")
        self.manifest: ModelManifest = bundle.manifest
        self.device = device
        self.source: ModelSource | None = None  # of one that lies in a folder

        def predictor(member: Member) -> Predictor:
            made = Predictor(
                member.configuration,
                self.labels,
                [load_network(bundle, member, fold) for fold in chosen_folds(bundle, member, folds)],
                () if mirror is False else member.mirror_axes,
                device,
                member.tile_step if tile_step is None else tile_step,
                precision=member.precision if precision is None else precision,
                channels_last=member.channels_last,
                exchange=member.exchange,
                deterministic=deterministic,
            )
            engage(made, "torch" if engine == "auto" and deterministic else engine)
            return made

        first = self.manifest.previous_stage
        self.predictors = tuple(predictor(member) for member in self.manifest.members)
        # What predicts the labels that a second stage sees: one or none.
        self._first: tuple[tuple[Predictor, Member], ...] = () if first is None else ((predictor(first), first),)

    def __repr__(self) -> str:
        networks = ", ".join(
            f"{len(predictor.networks)} x {member.configuration.name}"
            for predictor, member in (*self._first, *zip(self.predictors, self.manifest.members, strict=True))
        )
        classes = listing([one.name for one in self.labels.classes])
        channels = " + ".join(self.channel_names)
        return printable(f"Model({self.name!r}: {networks} on {self.device}; {channels} to {classes})")

    @property
    def name(self) -> str:
        """Name of the model."""
        return self.manifest.name

    @property
    def labels(self) -> LabelScheme:
        """What the label values of predictions mean."""
        return self.manifest.labels

    @property
    def channel_names(self) -> tuple[str, ...]:
        """Channels an image must have, in order."""
        return self.manifest.channel_names

    @property
    def file_ending(self) -> str:
        """Ending of the label maps the model was made from."""
        return self.manifest.file_ending

    @property
    def image_ending(self) -> str:
        """Ending of the images the model was made from; "/" for folders of DICOM series."""
        return self.manifest.input_ending

    @property
    def takes_previous_stage(self) -> bool:
        """Whether it is the second stage of a cascade."""
        return any(member.configuration.previous_stage is not None for member in self.manifest.members)

    @property
    def spacing_mm(self) -> tuple[float, ...]:
        """Voxel size that an image is taken to have which does not say its own, array order.

        That of the training images, else what the model works at: the finest of all members, 1 where any will do.
        """
        if self.manifest.spacing_mm is not None:
            return self.manifest.spacing_mm
        sizes: list[list[float]] = []
        for member in self.manifest.members:
            spec = member.configuration.preprocessing
            sizes.append([spec.spacing_mm[spec.transpose.index(axis)] or inf for axis in range(spec.image_ndim)])
        finest = [min(axis) for axis in zip(*sizes, strict=True)]
        return tuple(1.0 if size == inf else size for size in finest)

    def predict(
        self,
        source: Source,
        spacing_mm: Spacing | None = None,
        *,
        previous_stage: str | Path | Array | None = None,
        probabilities: bool = False,
        memory_gb: float | None = None,
        progress: Progress = LOGGED,
    ) -> Prediction:
        """Segment one image; the result lies on its grid.

        Parameters
        ----------
        source : a file, a list of files (one per channel, in order), an `Image`, an array or tensor (z, y, x) or
            (c, z, y, x) (2D: without z), or ``(array, geometry)`` with its spacing in mm (array order), 4x4 affine
            (x, y, z voxels to RAS+ mm) or `Grid`
        spacing_mm : voxel size of arrays and of files that do not say theirs (pictures), one number for all axes or one
            per axis in array order; without it 2D ones are taken to be like those the model was made from, with a
            warning
        previous_stage : label map of the previous stage on the same grid, for second stages of a cascade only; a model
            that has the first stage too predicts it when it is not given
        probabilities : also keep them
        memory_gb : memory that this may take, about; None: what is free. An image that would take more is predicted row
            by row, its files read by region where they can be, and large arrays, the result among them, are mapped from
            files without a name in the system's folder for temporary ones; so it is, in less, when memory runs out

        Where the image differs from those that the model was made from, in voxel size, extent, order of axes or
        channels, or intensities, warnings say so. Raises `InputError` if it cannot be of their kind.
        """

        def attempt(gb: float | None) -> Prediction:
            prepared = self.prepare(source, spacing_mm, previous_stage=previous_stage, memory_gb=gb)
            for item in prepared.warnings:
                progress.warn(item)
            kept = KeptWarnings(progress)
            fields = self.logits(prepared, progress=kept)
            return self.finish(prepared, fields, probabilities=probabilities, warnings=kept.warnings)

        return with_less_each_time(attempt, memory_gb, progress)

    def prepare(
        self,
        source: Source,
        spacing_mm: Spacing | None = None,
        *,
        previous_stage: str | Path | Array | None = None,
        memory_gb: float | None = None,
        scratch: Path | None = None,
    ) -> Prepared:
        """Read and preprocess one image: the first step of `predict`; runs on the CPU, in any thread.

        `scratch` is the folder for files of arrays that do not fit into `memory_gb`.
        """
        if previous_stage is not None and not self.takes_previous_stage:
            raise InputError(f"{self.name} is not the second stage of a cascade", "leave previous_stage out")
        ndim = self.manifest.members[0].configuration.preprocessing.image_ndim
        sizeless = self.spacing_mm == (1.0, 1.0)  # made from pictures whose pixels had no size
        paths, room = source_files(source), Room.of(memory_gb, scratch)
        file = paths[0] if paths else ""
        given = as_spacing(spacing_mm)
        size = None if sizeless else given
        with OpenFiles() as files:
            regional = regional_case(self.manifest, paths, size, room) if previous_stage is None else None
            if regional is None:
                image, name, warnings = read_source(source, ndim, len(self.channel_names), size, files)
            else:
                image, name = regional.stand_in(), str(file)
                warnings = header_warnings(paths, image, files)
        earlier: Image | None = None
        if previous_stage is not None:
            earlier = read_previous_stage(previous_stage, image.grid, name, self.labels)
        sized = self._sized(image, name, file, given, warnings)
        needed = forecast_gb(self.manifest, sized.grid)
        streamed = room if needed > room.gb else None
        if streamed is not None:
            unread = regional is None and paths
            reason = why_read_whole(self.manifest, sized.grid) or "such files are not read by region" if unread else ""
            warnings.insert(0, streaming(name, needed, room, reason, file))
        if regional is not None:
            regional = regional.sized(sized.grid)
            warnings += [replace(item, file=str(file)) for item in regional.problems()]
        differences, facts = self._differences(sized, regional, name, file)
        warnings += differences
        first = self.manifest.previous_stage if earlier is None else None
        inputs: tuple[tuple[Rows, CaseProperties], ...]
        if regional is not None:
            inputs = tuple(regional.input(member, room) for member in self.manifest.members)
        elif first is None:
            inputs = self._inputs(sized, earlier, name)
        else:
            inputs = (self._member_input(first, sized, None, name),)
        waiting = None if first is None else sized
        return Prepared(image.grid, paths, inputs, tuple(warnings), name, waiting, streamed, facts)

    def forecast_gb(self, grid: Grid) -> float:
        """Return the memory in GiB that predicting an image takes, about, if all of it is held."""
        return forecast_gb(self.manifest, grid)

    def _sized(
        self, image: Image, name: str, file: str | Path, given: tuple[float, ...] | None, warnings: list[Problem]
    ) -> Image:
        """Return an image with a voxel size, and add what is to be told of its grid to the warnings."""
        ndim = self.manifest.members[0].configuration.preprocessing.image_ndim
        canonical = any(m.configuration.preprocessing.orientation == "canonical" for m in self.manifest.members)
        if canonical and ndim == 3 and image.grid.affine is None:
            problem = f"{name} has no orientation; RAS+ (z, y, x) is assumed"
            warnings.append(warning("no_orientation", problem, file=file))
        if self.spacing_mm == (1.0, 1.0) and given is not None:
            problem = f"the pixel size of {name} is ignored: the model was trained on images without one"
            warnings.append(warning("pixel_size_ignored", problem, file=file))
        sized = image
        if not image.grid.spacing_known and image.grid.ndim == ndim and image.grid.spacing_mm != self.spacing_mm:
            sized = Image(image.array, replace(image.grid, spacing_mm=self.spacing_mm))
            problem = f"{name} has no voxel size; {numbers(self.spacing_mm)} mm is assumed, as in training"
            warnings.append(warning("no_voxel_size", problem, file=file))
        return sized

    def _differences(
        self, image: Image, regional: RegionalCase | None, name: str, file: str | Path
    ) -> tuple[list[Problem], tuple[Fact, ...]]:
        """Return in what an image differs from those the model was made from, and the numbers that are compared.

        `InputError` if it is of another kind.
        """
        ndim, known = self.manifest.members[0].configuration.preprocessing.image_ndim, self.manifest.training_images
        if image.grid.ndim != ndim or len(image.array) != len(self.channel_names):
            return [], ()  # refused with its name by preprocessing
        deep = all(member.configuration.ndim == 3 for member in self.manifest.members)
        if deep and 1 in image.grid.shape:
            raise InputError(f"{name} is a single slice, {self.name} takes volumes", "give the whole volume")
        facts: tuple[Fact, ...] = ()
        if known is None:
            usual = (min(self.spacing_mm),) * ndim, (max(self.spacing_mm),) * ndim  # whatever the order of axes
            found = impossible_size(image.grid.spacing_mm, Range(*usual))
        else:
            if regional is not None:
                measured = regional.measured(known.orientation)
            else:
                axes, _, cropped = oriented_crop(image, known.orientation)
                measured = measure_image(image, axes, cropped)
            kind, size = image.array.dtype.kind, image.array.dtype.itemsize
            facts = known.facts(measured)
            bits = 8 * size if kind == "u" else None
            found = known.differences(measured, absolute=_absolute(self.manifest.members), bits=bits)
        for item in found:
            if item.fatal:
                raise InputError(f"{name}: {item.problem}", item.action)
        return [replace(item, problem=f"{name}: {item.problem}", file=str(file)) for item in found], facts

    def _inputs(
        self, image: Image, earlier: Image | None, name: str
    ) -> tuple[tuple[NDArray[np.float32], CaseProperties], ...]:
        return tuple(self._member_input(member, image, earlier, name) for member in self.manifest.members)

    def _member_input(
        self, member: Member, image: Image, earlier: Image | None, name: str
    ) -> tuple[NDArray[np.float32], CaseProperties]:
        previous, spec = member.configuration.previous_stage, member.configuration.preprocessing
        if previous is None:
            earlier = None
        elif earlier is None:
            action = f"predict {name} with {previous} first and give the label map as previous_stage"
            raise InputError(f"{self.name} is the second stage of a cascade", action)
        case = preprocess(image, earlier, spec, self.labels, name, room=free_memory_gb() * 2**30)
        return with_previous_stage(case.image, case.labels, self.labels), case.properties

    def logits(self, prepared: Prepared, *, progress: Progress = SILENT) -> tuple[LogitField, ...]:
        """Run the networks: the second step of `predict`; runs on the model's device."""
        inputs = prepared.inputs
        if prepared.image is not None:
            [(predictor, first)] = self._first
            fields = logit_fields([predictor], [first], inputs, prepared.streamed, progress)
            earlier = Image(merged_labels(fields, self.labels)[None], prepared.grid)
            inputs = self._inputs(prepared.image, earlier, prepared.name)
        return logit_fields(self.predictors, self.manifest.members, inputs, prepared.streamed, progress)

    def finish(
        self,
        prepared: Prepared,
        fields: Sequence[LogitField],
        *,
        probabilities: bool = False,
        warnings: Sequence[Problem] = (),
    ) -> Prediction:
        """Bring the logits back to the grid of the image and decide: the last step of `predict`; any thread."""
        scratch = IN_MEMORY if prepared.streamed is None else prepared.streamed.scratch
        traits = [TraitSums(field, self.labels) for field in fields if self.manifest.quality]
        inner, kept = merged(fields, self.labels, probabilities=probabilities, scratch=scratch)
        inner = apply_steps(inner, self.manifest.postprocessing)
        stored = stored_labels(inner, self.labels, scratch)
        found = LabelMap(stored, prepared.grid, self.labels, prepared.source)
        quality = predicted_quality(traits, self.manifest.quality)
        file = prepared.source[0] if prepared.source else ""
        told = (*prepared.warnings, *warnings, *low_quality(quality, prepared.name, file))
        return Prediction(found, kept, told, self.manifest.margins, quality, prepared.facts)


def _absolute(members: Sequence[Member]) -> list[bool]:
    """Return by channel whether a network sees values as they are, and not scaled image by image."""
    schemes = zip(*(member.configuration.preprocessing.normalization for member in members), strict=True)
    return [any(how.scheme not in ("zscore", "rescale_to_0_1") for how in channel) for channel in schemes]
