"""A case ready for the networks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from segfit.bundle.bundle import Member, ModelManifest
from segfit.errors import InputError, Problem, warning
from segfit.fingerprint.appearance import measured
from segfit.fingerprint.fingerprint import ImageFingerprint
from segfit.fingerprint.training_images import Fact
from segfit.geometry import AxisMap, Grid, canonical_map
from segfit.images.formats import find_format, read_grid
from segfit.images.image import Image, Regions
from segfit.images.image_checks import extreme_problems
from segfit.images.regions import read_regions
from segfit.inference.predictor import Predictor
from segfit.inference.room import Room, forecast_gb
from segfit.inference.to_input_grid import LogitField, LogitStream
from segfit.inference.window import Rows
from segfit.preprocessing.by_region import CaseByRegion, Survey, survey, why_whole
from segfit.preprocessing.pipeline import CaseProperties, network_axes, require_kind
from segfit.progress import Progress
from segfit.text import gigabytes

__all__ = ["Prepared", "RegionalCase", "logit_fields", "regional_case", "streaming", "why_read_whole"]


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """A case ready for the networks: one array and its way back for each member, in order.

    Where the model has the first stage of a cascade, which is to predict the input of the second one, the array is that
    of the first stage, and `image` is what all members are going to see. Of one that is `streamed` in this room, arrays
    may be made row by row.
    """

    grid: Grid
    source: tuple[Path, ...]  # its files
    inputs: tuple[tuple[Rows, CaseProperties], ...]
    warnings: tuple[Problem, ...]
    name: str = ""  # of the case
    image: Image | None = None
    streamed: Room | None = None
    facts: tuple[Fact, ...] = ()


def why_read_whole(manifest: ModelManifest, grid: Grid) -> str:
    """Say why an image cannot be read row by row for a model; nothing where it can."""
    if manifest.previous_stage is not None or any(one.configuration.previous_stage for one in manifest.members):
        return "it goes through a cascade"
    specs = [one.configuration.preprocessing for one in manifest.members]
    reasons = [why_whole(spec, network_axes(grid, spec).permute(grid.spacing_mm)) for spec in specs]
    return next(filter(None, reasons), "")


def streaming(name: str, needed_gb: float, room: Room, reason: str, file: str | Path) -> Problem:
    """Return what is told of a case that is streamed; `reason`: why it is read whole before that, if it is."""
    problem = (
        f"{name} would take about {gigabytes(needed_gb)} of {gigabytes(room.gb)} of memory: it is predicted row by row"
    )
    if reason:
        problem += f", but read whole, as {reason}"
    return warning("streamed", problem, file=file)


class RegionalCase:
    """The files of a case that are read by region, and what passes over them found."""

    def __init__(self, regions: Regions, paths: Sequence[Path], name: str) -> None:
        self.regions, self._paths, self._name = regions, tuple(paths), name
        self._surveys: dict[AxisMap, Survey] = {}

    def _survey(self, axes: AxisMap) -> Survey:
        if axes not in self._surveys:
            self._surveys[axes] = survey(self.regions, axes, self._name)
        return self._surveys[axes]

    def measured(self, orientation: str) -> ImageFingerprint:
        """Return the image in a few numbers, as `segfit.fingerprint.appearance.measure_image` does."""
        grid = self.regions.grid
        axes = canonical_map(grid) if orientation == "canonical" else AxisMap.identity(grid.ndim)
        found = self._survey(axes)
        shape = tuple(high - low for low, high in found.box)
        return measured(grid, axes, shape, found.extremes, found.sampled)

    def problems(self) -> list[Problem]:
        """Return what is odd in the voxels; `InputError` for what leaves nothing to compute with."""
        extremes = self._survey(AxisMap.identity(self.regions.grid.ndim)).extremes
        colours = find_format(self._paths[0]).channel_kind is not None
        found = extreme_problems(extremes, self._name, colours=colours)
        for item in found:
            if item.fatal:
                raise InputError(item.problem, item.action)
        return found

    def input(self, member: Member, room: Room) -> tuple[CaseByRegion, CaseProperties]:
        """Return what a member sees of it."""
        spec = member.configuration.preprocessing
        require_kind(self.regions.grid, self.regions.channels, spec, self._name)
        found = self._survey(network_axes(self.regions.grid, spec))
        case = CaseByRegion(self.regions, found, spec, room.scratch, self._name, self._paths)
        return case, case.properties

    def sized(self, grid: Grid) -> RegionalCase:
        """Return the case with another voxel size, before any pass over it."""
        if grid is self.regions.grid:
            return self
        return RegionalCase(self.regions._replace(grid=grid), self._paths, self._name)

    def stand_in(self) -> Image:
        """Return an image of the same shape that takes no memory, for those who look at its grid."""
        shape = (self.regions.channels, *self.regions.grid.shape)
        voxels: NDArray[np.uint8] = np.broadcast_to(np.uint8(0), shape)
        return Image(voxels, self.regions.grid)


def regional_case(
    manifest: ModelManifest, paths: Sequence[Path], spacing_mm: Sequence[float] | None, room: Room
) -> RegionalCase | None:
    """Return the files of a case as one that is read by region; None where that is not needed or cannot be."""
    if not paths or any(find_format(path).regions is None for path in paths):
        return None
    grid = read_grid(paths[0], spacing_mm)
    if any(one.configuration.preprocessing.image_ndim != grid.ndim for one in manifest.members):
        return None  # refused with its name by preprocessing
    if forecast_gb(manifest, grid) <= room.gb or why_read_whole(manifest, grid):
        return None
    regions = read_regions(paths, spacing_mm)
    return None if regions is None else RegionalCase(regions, paths, str(paths[0]))


def logit_fields(
    predictors: Sequence[Predictor],
    members: Sequence[Member],
    inputs: Sequence[tuple[Rows, CaseProperties]],
    room: Room | None,
    progress: Progress,
) -> tuple[LogitField, ...]:
    """Return the logits of a case, of each member; in a room they are computed when they are asked for."""
    fields: list[LogitField] = []
    for predictor, member, (rows, properties) in zip(predictors, members, inputs, strict=True):
        if room is None:
            assert isinstance(rows, np.ndarray)
            logits = predictor.logits(rows, progress=progress)
            fields.append(LogitField(logits, properties, member.configuration))
            continue
        shape = (predictor.num_outputs, *properties.shape)
        held = room.rows(predictor.num_outputs, rows.shape)
        blocks = predictor.stream(rows, rows=held, scratch=room.scratch, progress=progress)
        stream = LogitStream(shape, blocks, predictor.device)
        field = LogitField(stream, properties, member.configuration)
        if fields and field.slab_axis != fields[0].slab_axis:  # rows are not asked for in their order
            field = LogitField(stream.whole(room.scratch), properties, member.configuration)
        fields.append(field)
    return tuple(fields)
