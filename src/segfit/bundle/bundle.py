"""The model that users share: one folder, or one zip of it, with everything prediction needs, and nothing else.

    model/
      model.json                                   ModelManifest: labels, channels, members, post-processing, origin
      weights-<configuration>-<fold>.safetensors   float32, one file per trained network
      test-case.safetensors                        a small image and what the model made of it where it was made
      card.md                                      the same facts for readers

Checksums of weights and test case stand in the manifest. No case, person or path is named. Importing this module and
reading a manifest needs no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AliasChoices, Field, model_validator

from segfit.bundle.files import BundleFiles, pack
from segfit.bundle.speeds import Speed, SpeedName
from segfit.connected_components import PostprocessingStep
from segfit.errors import InputError
from segfit.evaluation.measurement import Margins
from segfit.evaluation.quality import QualityFit
from segfit.files import (
    Document,
    Record,
    content_hash,
    hash_file,
    new_folder,
    partial_of,
    require_there,
    write_bytes,
    write_text,
)
from segfit.fingerprint.training_images import TrainingImages
from segfit.images.formats import ENDINGS, described
from segfit.labels import Exchange, LabelScheme
from segfit.options import SMALLEST_TILE_STEP
from segfit.specs import Configuration, Millimetres
from segfit.text import extent, printable, value_in_words

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "MANIFEST",
    "TEST_CASE",
    "Bundle",
    "Member",
    "ModelManifest",
    "TestCase",
    "card",
    "open_bundle",
    "weights_name",
    "write_bundle",
    "write_manifest",
    "write_zip",
]

MANIFEST = "model.json"
_CARD = "card.md"
TEST_CASE = "test-case.safetensors"
_UNSEALED = ("seal", "name", "intended_use", "limits", "licence", "authors", "data_origin")  # people may write these
_Share = Annotated[float, Field(ge=0, le=1)]
_WEIGHTS_NAME = re.compile(r"[^/\x00-\x1f]{1,200}\.safetensors")
_MOST_STEPS = 4  # of post-processing, per label; selection takes one for each class, which may be a region


class Member(Record):
    """One configuration of the model: how it sees images, and its networks. Folds are averaged as logits."""

    configuration: Configuration
    weights: dict[str, str] = Field(min_length=1)  # fold -> file name
    mirror_axes: tuple[int, ...] = ()  # network axes flipped at test time
    exchange: Exchange | None = None  # labels that change places in views flipped along its axis
    tile_step: float = Field(0.5, ge=SMALLEST_TILE_STEP, le=1)  # share of the patch
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # of the forward pass, where the device has it
    channels_last: bool = False

    @model_validator(mode="after")
    def _check(self) -> Member:
        axes, ndim = self.mirror_axes, self.configuration.ndim
        if len(set(axes)) < len(axes) or not set(axes) <= set(range(ndim)):
            raise ValueError(f"mirror_axes must be different ones of the axes 0 to {ndim - 1}")
        if self.exchange is not None and not 0 <= self.exchange.axis < ndim:
            raise ValueError(f"the axis of exchange must be 0 to {ndim - 1}")
        return self


class TestCase(Record):
    """The image of a model that shows whether it does elsewhere what it did where it was made."""

    __test__ = False  # to pytest
    kind: Literal["phantom", "case"]  # made up, or one that the user chose to hand on
    spacing_mm: tuple[Millimetres, ...] = Field(min_length=2, max_length=3)
    spacing_known: bool = True
    affine: tuple[tuple[float, float, float, float], ...] | None = None


class ModelManifest(Document):
    """``model.json``: what the model is. Members are averaged as probabilities, post-processing comes last."""

    SHARED = True
    name: str
    labels: LabelScheme
    channel_names: tuple[str, ...] = Field(min_length=1)
    file_ending: str  # of the label maps it was made from, with the leading dot
    image_ending: str = ""  # of the images it was made from, as in `segfit.images.formats`; empty: as the label maps
    spacing_mm: tuple[Millimetres, ...] | None = None  # median voxel size of the training images, array order
    training_images: TrainingImages | None = None  # with which images to predict are compared; None: unknown
    members: tuple[Member, ...] = Field(min_length=1)
    previous_stage: Member | None = None  # predicts the labels that second stages of a cascade take; None: given ones
    postprocessing: tuple[PostprocessingStep, ...] = ()
    speeds: dict[SpeedName, Speed] = {}  # ways to predict that were measured; none: it was not tuned
    margins: Margins = {}  # of measurements of predictions, by class
    quality: dict[str, QualityFit] = {}  # how good predictions are likely to be, by class
    # Cross-validated mean by class; None where it is undefined; "scores" is its old name.
    dice: dict[str, Annotated[float, Field(ge=0, le=1)] | None] = Field(
        {}, validation_alias=AliasChoices("dice", "scores")
    )
    verdict: dict[str, Any] = {}  # whether it is to be trusted: "level", "headline", "findings" in sentences
    selection: dict[str, Any] = {}  # how members and post-processing were chosen
    training: dict[str, Any] = {}  # summary of data and training: number of cases, preset, budget
    provenance: dict[str, Any] = {}  # versions, hashes of plan and data
    requires: dict[str, str] = {}  # packages of plug-ins without which its networks cannot be built, and their versions
    intended_use: str = "Research. Not a medical device."
    limits: str = ""
    licence: str = "not stated"
    authors: str = "not stated"
    data_origin: str = "not stated"
    test_case: TestCase | None = None
    checksums: dict[str, str] = {}  # SHA-256 by file name; `write_bundle` fills it
    seal: str = ""  # hash of the rest of the file but what people may edit; `write_bundle` fills it

    @property
    def stages(self) -> tuple[Member, ...]:
        """What predicts first, if there is a previous stage, and all members, one of which it may be again."""
        return self.members if self.previous_stage is None else (self.previous_stage, *self.members)

    @property
    def files(self) -> tuple[str, ...]:
        """Names of all weight files."""
        return tuple(dict.fromkeys(name for member in self.stages for name in member.weights.values()))

    @property
    def sealed_files(self) -> tuple[str, ...]:
        """Names of all files that have a checksum."""
        return self.files if self.test_case is None else (*self.files, TEST_CASE)

    @property
    def identity(self) -> str:
        """Hash of what predicts and what is known of it; weights count by their checksums, if it has any."""
        told = self.model_dump(mode="json")
        return content_hash({key: value for key, value in told.items() if key not in (*_UNSEALED, "speeds")})

    @property
    def input_ending(self) -> str:
        """Ending of the images it was made from."""
        return self.image_ending or self.file_ending

    @model_validator(mode="after")
    def _check(self) -> ModelManifest:
        files = [name for member in self.members for name in member.weights.values()]
        if len(set(files)) != len(files):
            raise ValueError("two networks share one weight file")
        for name in self.files:
            if Path(name).name != name or not _WEIGHTS_NAME.fullmatch(name):
                raise ValueError(f"{name!r} is not a plain file name")
        if not self.labels.is_consecutive:
            raise ValueError("the values of labels must be consecutive from 0, the ignore value last")
        own = ENDINGS.get(self.file_ending.lower())
        if own is None or own.write is None:
            raise ValueError(f"file_ending must be that of label maps, such as .nii.gz, got {self.file_ending!r}")
        if self.image_ending and self.image_ending.lower() not in ENDINGS:
            raise ValueError(f"image_ending must be one that is known, such as .nii.gz, got {self.image_ending!r}")
        ndims = {member.configuration.preprocessing.image_ndim for member in self.members}
        if len(ndims) > 1 or (self.spacing_mm is not None and {len(self.spacing_mm)} != ndims):
            raise ValueError("members and spacing_mm must be of images with the same axes")
        known = self.training_images
        if known is not None and ({len(known.spacing_mm.low)} != ndims or known.channel_names != self.channel_names):
            raise ValueError("training_images must have the axes and channels of the model")
        first = {} if self.previous_stage is None else {"previous_stage": self.previous_stage}
        for where, member in (first | {f"members.{number}": one for number, one in enumerate(self.members)}).items():
            try:
                self._check_member(member)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
        taken = {member.configuration.previous_stage for member in self.members}
        if self.previous_stage is not None and (
            self.previous_stage.configuration.previous_stage is not None
            or self.previous_stage.configuration.name not in taken
        ):
            raise ValueError("previous_stage must be the one that members take the labels of")
        foreground = set(self.labels.foreground_values)
        steps = [frozenset(step.values) for step in self.postprocessing]
        if not all(step and step <= foreground for step in steps) or len(steps) > _MOST_STEPS * len(foreground):
            raise ValueError("postprocessing must have few steps, each of values of labels")
        if self.verdict and not (_is_texts([self.verdict.get("headline")]) and _is_texts(self.verdict.get("findings"))):
            raise ValueError("verdict must have a headline and findings, which are sentences")
        return self

    def _check_member(self, member: Member) -> None:
        """Raise `ValueError` if a member does not fit the channels and the labels."""
        configuration, labels = member.configuration, self.labels
        channels, network = len(self.channel_names), configuration.network
        cascade = configuration.previous_stage is not None
        if network.in_channels != channels + (len(labels.foreground_values) if cascade else 0):
            raise ValueError(f"a network of {network.in_channels} inputs does not fit {channels} channels")
        if network.num_outputs != labels.num_outputs:
            raise ValueError(f"a network of {network.num_outputs} outputs does not fit {labels.num_outputs} classes")
        normalization = configuration.preprocessing.normalization
        if len(normalization) != channels:
            raise ValueError(f"normalization must have {channels} entries, one per channel")
        for how in normalization:
            known = how.statistics
            if how.scheme == "ct" and (known is None or known.std < 0 or known.percentile_00_5 > known.percentile_99_5):
                raise ValueError("normalization by ct needs statistics: a std above zero and percentiles in order")
        if member.exchange is not None:
            pairs = member.exchange.pairs
            values = [value for pair in pairs for value in pair]
            if len(set(values)) < len(values) or not set(values) <= set(labels.foreground_values):
                raise ValueError("exchange must have pairs of different labels")
            try:
                labels.exchanged_outputs(pairs)
            except ValueError:
                raise ValueError("exchange makes a region none of the regions") from None


@dataclass(frozen=True, slots=True, eq=False)
class Bundle:
    """A model ready to be loaded: its manifest and the way to its weights.

    `states` holds the weights of models that come from elsewhere; None: they are in `files`, those of `source`.
    """

    manifest: ModelManifest
    source: Path
    states: Mapping[str, Mapping[str, Tensor]] | None = None
    files: BundleFiles | None = None

    def stored(self, name: str) -> Path | Mapping[str, Tensor]:
        """Return one weight file as `write_bundle` takes it: the file itself where there is one."""
        if self.states is None and self.files is not None and not self.files.is_zip:
            return self.source / name
        return self.weights(name)

    def weights(self, name: str) -> dict[str, Tensor]:
        """Return the state dict of one weight file, float32 on the CPU; `InputError` if it cannot be read."""
        if self.states is not None:
            return {key: tensor.float() for key, tensor in self.states[name].items()}
        from safetensors import SafetensorError
        from safetensors.torch import load, load_file

        assert self.files is not None
        path = self.source / name
        try:
            return load(self.files.read(name)) if self.files.is_zip else load_file(path)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} cannot be read ({error})", "copy the model again") from None


def _is_texts(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)


def weights_name(configuration: str, fold: int | str) -> str:
    """Return the name of a weight file."""
    return f"weights-{configuration}-{fold}.safetensors"


def write_bundle(
    folder: Path, manifest: ModelManifest, weights: Mapping[str, Path | Mapping[str, Tensor]], test_case: bytes = b""
) -> ModelManifest:
    """Write a bundle; return its manifest with the checksums filled in.

    Parameters
    ----------
    folder : replaced as a whole if it holds a bundle; `InputError` if it holds anything else
    weights : for each of `manifest.files` a safetensors file to copy, or a state dict, stored as float32
    test_case : the content of the file that `manifest.test_case` describes

    The bundle is built beside `folder` and moved into place, so that a crash leaves the old one or none.
    """
    assert set(weights) == set(manifest.files), (set(weights), manifest.files)
    if folder.exists() and not (folder / MANIFEST).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not a segfit model", "choose another folder")
    with new_folder(folder) as partial:
        for name, content in weights.items():
            write_bytes(partial / name, content.read_bytes() if isinstance(content, Path) else _serialize(content))
        if manifest.test_case is not None:
            write_bytes(partial / TEST_CASE, test_case)
        return write_manifest(partial, manifest)


def with_speeds(folder: Path, speeds: Mapping[SpeedName, Speed]) -> ModelManifest:
    """Write into a bundle how it may be predicted with; return its manifest."""
    return write_manifest(folder, open_bundle(folder).manifest.model_copy(update={"speeds": dict(speeds)}))


def write_manifest(folder: Path, manifest: ModelManifest) -> ModelManifest:
    """Write the manifest of the files in a folder, with their checksums, and the card; return it."""
    checksums = {name: hash_file(folder / name) for name in sorted(manifest.sealed_files)}
    manifest = manifest.model_copy(update={"checksums": checksums})
    manifest = manifest.model_copy(update={"seal": _seal(manifest.model_dump(mode="json"))})
    write_text(folder / _CARD, card(manifest))
    manifest.save(folder / MANIFEST)
    return manifest


def write_zip(
    path: Path, manifest: ModelManifest, weights: Mapping[str, Path | Mapping[str, Tensor]], test_case: bytes = b""
) -> None:
    """Write a bundle as one zip, whole or not at all; `InputError` if there is anything already."""
    if path.exists():
        raise InputError(f"{path} exists already", "choose another name")
    with partial_of(path) as partial:
        write_bundle(partial / "model", manifest, weights, test_case)
        pack(partial / "model", partial / "model.zip")
        (partial / "model.zip").rename(path)


def _seal(raw: Mapping[str, Any]) -> str:
    return content_hash({key: value for key, value in raw.items() if key not in _UNSEALED})


def _serialize(state: Mapping[str, Tensor]) -> bytes:
    from safetensors.torch import save

    return save({name: tensor.detach().cpu().float().contiguous() for name, tensor in state.items()})


def open_bundle(path: Path, *, verify: bool = True) -> Bundle:
    """Open a bundle, a folder or a zip; `verify` compares its files with their checksums.

    Raises `InputError` if it is no bundle, comes from a newer segfit, or misses or damaged a file.
    """
    require_there(path, "model")
    files = BundleFiles.of(path, MANIFEST)
    if files is None:
        raise InputError(f"{path} is not a segfit model: it has no {MANIFEST}", "give the folder that segfit wrote")
    raw = files.json(MANIFEST)
    manifest = ModelManifest.of_json(raw, path / MANIFEST)
    try:
        seal = _seal(raw)
    except ValueError:
        problem = f"{path / MANIFEST} is damaged: it has a number that is not finite"
        raise InputError(problem, "copy the model again") from None
    if manifest.seal not in ("", seal):
        raise InputError(f"{path / MANIFEST} is damaged: it is not what was written", "copy the model again")
    for name in manifest.sealed_files:
        if not files.has(name):
            raise InputError(f"{path} lacks {name}", "copy the model again")
        if verify and files.hash(name) != manifest.checksums.get(name):
            problem = f"{path / name} is damaged: its checksum is not the one in {MANIFEST}"
            raise InputError(problem, "copy the model again")
    return Bundle(manifest, path, files=files)


def card(manifest: ModelManifest) -> str:
    """Return the model card, Markdown."""
    return "\n".join(_card_lines(manifest)) + "\n"


_MARKS = re.compile(r"[\\`*\[\]<>|#~&]|(?<![^\W_])_|_(?![^\W_])")


def _markdown(text: str) -> str:
    """Return text of people and files so that Markdown shows it as it is, in one line."""
    return _MARKS.sub(r"\\\g<0>", " ".join(printable(text).split()))


def _card_lines(manifest: ModelManifest) -> Iterator[str]:
    yield f"# {_markdown(manifest.name)}"
    classes = ", ".join(_markdown(class_.name) for class_ in manifest.labels.classes)
    channels = " + ".join(_markdown(name) for name in manifest.channel_names)
    yield f"\nSegments {classes} in images of {channels}."
    if manifest.verdict:
        yield f"\n**Verdict: {_markdown(manifest.verdict['headline'])}.**\n"
        yield from (f"- {_markdown(finding)}" for finding in manifest.verdict["findings"])
    yield "\n## Use\n"
    yield f"Intended use: {_markdown(manifest.intended_use)}\n"
    limits = manifest.limits or "not stated; check results on your own data before relying on them"
    yield f"Known limits: {_markdown(limits)}\n"
    yield f"Licence: {_markdown(manifest.licence)}\n"
    yield f"Authors: {_markdown(manifest.authors)}\n"
    yield f"Origin of the training data: {_markdown(manifest.data_origin)}"
    for package, version in manifest.requires.items():
        yield f"\nNeeds the package {_markdown(package)} {_markdown(version)}."
    yield "\n## Input\n"
    yield "| channel | content |\n| --- | --- |"
    for index, name in enumerate(manifest.channel_names):
        yield f"| {index} | {_markdown(name)} |"
    canonical = manifest.members[0].configuration.preprocessing.orientation == "canonical"
    yield f"\nMade from {described(manifest.input_ending, 'files')}. " + (
        "Images may lie in any orientation that their file declares."
        if canonical
        else "Images must be stored in the same orientation as the training data."
    )
    yield "\n## Output\n"
    yield "| class | label values | cross-validated Dice |\n| --- | --- | --- |"
    for class_ in manifest.labels.classes:
        dice = manifest.dice.get(class_.name)
        values = ", ".join(str(manifest.labels.stored_values[value]) for value in class_.values)
        yield f"| {_markdown(class_.name)} | {values} | {'-' if dice is None else f'{dice:.3f}'} |"
    for step in manifest.postprocessing:
        yield f"\nAfterwards: {_markdown(step.text)}."
    yield "\n## Networks\n"
    unit = "mm" if manifest.training_images is None else manifest.training_images.unit
    yield f"| configuration | patch (voxels) | spacing ({unit}) | folds | mirrored axes |"
    yield "| --- | --- | --- | --- | --- |"
    for member in manifest.stages:
        configuration = member.configuration
        patch, spacing = extent(configuration.patch_size), extent(configuration.spacing_mm)
        mirrored = ", ".join(str(axis) for axis in member.mirror_axes) or "none"
        if member.exchange is not None and member.exchange.axis in member.mirror_axes:
            mirrored += f" (left and right labels exchanged along {member.exchange.axis})"
        yield f"| {_markdown(configuration.name)} | {patch} | {spacing} | {len(member.weights)} | {mirrored} |"
    for member in manifest.members:
        if (previous := member.configuration.previous_stage) is not None:
            source = "which is predicted first" if manifest.previous_stage else "which must be given (--previous-stage)"
            yield f"\n{_markdown(member.configuration.name)} also sees the labels of {_markdown(previous)}, {source}."
    yield from _speed_lines(manifest)
    sections = {"Training": manifest.training, "Selection": manifest.selection, "Origin": manifest.provenance}
    for title, facts in sections.items():
        if facts:
            yield f"\n## {title}\n"
            yield from (
                f"- {_markdown(key.replace('_', ' '))}: {_markdown(value_in_words(value, key))}"
                for key, value in facts.items()
            )


def _speed_lines(manifest: ModelManifest) -> Iterator[str]:
    if manifest.speeds:
        yield "\n## Speeds\n\n| --speed | what is done differently | time | mean Dice |\n| --- | --- | --- | --- |"
    for name, speed in manifest.speeds.items():
        mean = sum(speed.dice.values()) / max(1, len(speed.dice))
        yield f"| {name} | {speed.words} | {speed.time:.2f} | {mean:.3f} |"
