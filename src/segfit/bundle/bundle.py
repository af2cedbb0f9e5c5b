"""The model that users share: one folder with everything prediction needs, and nothing else.

    model/
      model.json                                   ModelManifest: labels, channels, members, post-processing, origin
      weights-<configuration>-<fold>.safetensors   float32, one file per trained network
      card.md                                      the same facts for readers

Checksums of the weights stand in the manifest. Importing this module and reading a manifest needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import AliasChoices, Field, model_validator

from segfit.connected_components import PostprocessingStep
from segfit.errors import InputError
from segfit.files import Document, Record, content_hash, hash_file, new_folder, read_json, write_bytes, write_text
from segfit.images.formats import described
from segfit.labels import Exchange, LabelScheme
from segfit.specs import Configuration
from segfit.words import extent

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["MANIFEST", "Bundle", "Member", "ModelManifest", "card", "open_bundle", "weights_name", "write_bundle"]

MANIFEST = "model.json"
_CARD = "card.md"
_UNSEALED = ("seal", "name", "intended_use", "limits", "licence")  # people may write these


class Member(Record):
    """One configuration of the model: how it sees images, and its networks. Folds are averaged as logits."""

    configuration: Configuration
    weights: dict[str, str] = Field(min_length=1)  # fold -> file name
    mirror_axes: tuple[int, ...] = ()  # network axes flipped at test time
    exchange: Exchange | None = None  # labels that change places in views flipped along its axis
    tile_step: float = Field(0.5, gt=0, le=1)  # share of the patch
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # of the forward pass, where the device has it
    channels_last: bool = False


class ModelManifest(Document):
    """``model.json``: what the model is. Members are averaged as probabilities, post-processing comes last."""

    SHARED = True
    name: str
    labels: LabelScheme
    channel_names: tuple[str, ...]
    file_ending: str  # of the label maps it was made from, with the leading dot
    image_ending: str = ""  # of the images it was made from, as in `segfit.images.formats`; empty: as the label maps
    spacing_mm: tuple[float, ...] | None = None  # median voxel size of the training images, array order
    members: tuple[Member, ...] = Field(min_length=1)
    postprocessing: tuple[PostprocessingStep, ...] = ()
    # Cross-validated mean by class; None where it is undefined; "scores" is its old name.
    dice: dict[str, float | None] = Field({}, validation_alias=AliasChoices("dice", "scores"))
    verdict: dict[str, Any] = {}  # whether it is to be trusted: "level", "headline", "findings" in sentences
    selection: dict[str, Any] = {}  # how members and post-processing were chosen
    training: dict[str, Any] = {}  # summary of data and training: number of cases, preset, budget
    provenance: dict[str, Any] = {}  # versions, hashes of plan and data
    intended_use: str = "Research. Not a medical device."
    limits: str = ""
    licence: str = "not stated"
    checksums: dict[str, str] = {}  # SHA-256 by file name; `write_bundle` fills it
    seal: str = ""  # hash of the rest of the file but what people may edit; `write_bundle` fills it

    @property
    def files(self) -> tuple[str, ...]:
        """Names of all weight files."""
        return tuple(name for member in self.members for name in member.weights.values())

    @property
    def input_ending(self) -> str:
        """Ending of the images it was made from."""
        return self.image_ending or self.file_ending

    @model_validator(mode="after")
    def _check(self) -> ModelManifest:
        if len(set(self.files)) != len(self.files):
            raise ValueError("two networks share one weight file")
        for name in self.files:
            if Path(name).name != name:
                raise ValueError(f"{name!r} is not a plain file name")
        return self


@dataclass(frozen=True, slots=True, eq=False)
class Bundle:
    """A model ready to be loaded: its manifest and the way to its weights.

    `states` holds the weights of models that come from elsewhere; None: they are files in the folder `source`.
    """

    manifest: ModelManifest
    source: Path
    states: Mapping[str, Mapping[str, Tensor]] | None = None

    def weights(self, name: str) -> dict[str, Tensor]:
        """Return the state dict of one weight file, float32 on the CPU; `InputError` if it cannot be read."""
        if self.states is not None:
            return dict(self.states[name])
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self.source / name
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} cannot be read ({error})", "copy the model folder again") from None


def weights_name(configuration: str, fold: int | str) -> str:
    """Return the name of a weight file."""
    return f"weights-{configuration}-{fold}.safetensors"


def write_bundle(
    folder: Path, manifest: ModelManifest, weights: Mapping[str, Path | Mapping[str, Tensor]]
) -> ModelManifest:
    """Write a bundle; return its manifest with the checksums filled in.

    Parameters
    ----------
    folder : replaced as a whole if it holds a bundle; `InputError` if it holds anything else
    weights : for each of `manifest.files` a safetensors file to copy, or a state dict, stored as float32

    The bundle is built beside `folder` and moved into place, so that a crash leaves the old one or none.
    """
    assert set(weights) == set(manifest.files), (set(weights), manifest.files)
    if folder.exists() and not (folder / MANIFEST).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not a segfit model", "choose another folder")
    with new_folder(folder) as partial:
        for name, content in weights.items():
            write_bytes(partial / name, content.read_bytes() if isinstance(content, Path) else _serialize(content))
        checksums = {name: hash_file(partial / name) for name in sorted(weights)}
        manifest = manifest.model_copy(update={"checksums": checksums})
        manifest = manifest.model_copy(update={"seal": _seal(manifest.model_dump(mode="json"))})
        write_text(partial / _CARD, card(manifest))
        manifest.save(partial / MANIFEST)
    return manifest


def _seal(raw: Mapping[str, Any]) -> str:
    return content_hash({key: value for key, value in raw.items() if key not in _UNSEALED})


def _serialize(state: Mapping[str, Tensor]) -> bytes:
    from safetensors.torch import save

    return save({name: tensor.detach().cpu().float().contiguous() for name, tensor in state.items()})


def open_bundle(path: Path, *, verify: bool = True) -> Bundle:
    """Open a bundle folder; `verify` compares the weights with their checksums.

    Raises `InputError` if the folder is no bundle, comes from a newer segfit, or misses or damaged a file.
    """
    if not (path / MANIFEST).is_file():
        raise InputError(f"{path} is not a segfit model: it has no {MANIFEST}", "give the folder that segfit wrote")
    raw = read_json(path / MANIFEST)
    manifest = ModelManifest.of_json(raw, path / MANIFEST)
    if manifest.seal not in ("", _seal(raw)):
        raise InputError(f"{path / MANIFEST} is damaged: it is not what was written", "copy the model folder again")
    for name in manifest.files:
        file = path / name
        if not file.is_file():
            raise InputError(f"{path} lacks {name}", "copy the model folder again")
        if verify and hash_file(file) != manifest.checksums.get(name):
            problem = f"{file} is damaged: its checksum is not the one in {MANIFEST}"
            raise InputError(problem, "copy the model folder again")
    return Bundle(manifest, path)


def card(manifest: ModelManifest) -> str:
    """Return the model card, Markdown."""
    return "\n".join(_card_lines(manifest)) + "\n"


def _card_lines(manifest: ModelManifest) -> Iterator[str]:
    yield f"# {manifest.name}"
    classes = ", ".join(class_.name for class_ in manifest.labels.classes)
    yield f"\nSegments {classes} in images of {' + '.join(manifest.channel_names)}."
    if manifest.verdict:
        yield f"\n**Verdict: {manifest.verdict['headline']}.**\n"
        yield from (f"- {finding}" for finding in manifest.verdict["findings"])
    yield "\n## Use\n"
    yield f"Intended use: {manifest.intended_use}\n"
    yield f"Known limits: {manifest.limits or 'not stated; check results on your own data before relying on them'}\n"
    yield f"Licence: {manifest.licence}"
    yield "\n## Input\n"
    yield "| channel | content |\n| --- | --- |"
    for index, name in enumerate(manifest.channel_names):
        yield f"| {index} | {name} |"
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
        yield f"| {class_.name} | {values} | {'-' if dice is None else f'{dice:.3f}'} |"
    for step in manifest.postprocessing:
        yield f"\nAfterwards: {step.text}."
    yield "\n## Networks\n"
    yield "| configuration | patch (voxels) | spacing (mm) | folds | mirrored axes |\n| --- | --- | --- | --- | --- |"
    for member in manifest.members:
        configuration = member.configuration
        patch, spacing = extent(configuration.patch_size), extent(configuration.spacing_mm)
        mirrored = ", ".join(str(axis) for axis in member.mirror_axes) or "none"
        if member.exchange is not None and member.exchange.axis in member.mirror_axes:
            mirrored += f" (left and right labels exchanged along {member.exchange.axis})"
        yield f"| {configuration.name} | {patch} | {spacing} | {len(member.weights)} | {mirrored} |"
    sections = {"Training": manifest.training, "Selection": manifest.selection, "Origin": manifest.provenance}
    for title, facts in sections.items():
        if facts:
            yield f"\n## {title}\n"
            yield from (f"- {key.replace('_', ' ')}: {value}" for key, value in facts.items())
