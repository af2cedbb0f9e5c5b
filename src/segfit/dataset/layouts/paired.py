"""Paired folders: images in one, labels in another, matched by their names.

``images/CASE.END`` and ``labels/CASE.END``, of any known endings; the folders may have other usual names. A name may
end in ``_image`` or ``_0000`` on the one side and in ``_seg``, ``.seg``, ``_label`` or ``_mask`` on the other. Instead
of one label file a case may have a folder ``labels/CASE/`` with one file per class. Both may also lie in one folder, as
Cellpose keeps them: ``CASE_img.END`` or ``CASE.END`` beside ``CASE_masks.END``.

A ``dataset.json`` beside the folders may name channels and classes (keys "channel_names" and "labels", as in the
nnU-Net v2 layout); without it the channel is called "image" and the classes "label 1", "label 2", ... after the
values that the label files hold, or as those name them (3D Slicer, TotalSegmentator).

Files of one class each are merged so: they are painted in the order of the declared classes (without a
declaration: by name), later ones over earlier ones, each where it is not 0. A class without a file is absent.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from segfit.dataset.layouts.common import (
    CHANNEL_NUMBER,
    WHOLE,
    channel_problems,
    declared_channels,
    declared_dataset,
    declared_labels,
    endings_found,
    found_channels,
    found_labels,
    grouped,
    hidden_files,
    label_ending,
    visible_files,
)
from segfit.dataset.layouts.names import composed, likely_partners
from segfit.dataset.manifest import Case, Dataset, Mask, by_number
from segfit.errors import Problem
from segfit.images.formats import known_ending, split_ending
from segfit.labels import LabelScheme

__all__ = ["masks_of", "read", "recognises", "scheme_of"]

_IMAGES = ("images", "image", "imgs", "img", "scans", "volumes", "imagestr")
_LABELS = (
    *("labels", "label", "masks", "mask", "segmentations", "segmentation", "segs", "seg"),
    *("annotations", "annotation", "ground_truth", "gt", "labelstr"),
)
_IMAGE_SUFFIX = re.compile(r"(?<=.)[_-](?:image|img|scan|volume)\Z", re.IGNORECASE)
_LABEL_SUFFIX = re.compile(
    r"(?<=.)[_.-](?:labels?|masks?|segs?|segmentations?|gt|annotations?|ground_?truth)\Z", re.IGNORECASE
)
_LABEL_BESIDE = re.compile(r"(?<=.)(?:_cp)?_(?:masks?|labels?|segs?|gt)\Z", re.IGNORECASE)  # its image, in one folder
_BY_PRODUCT = re.compile(r".+_(?:flows|(?:cp_)?outlines)", re.IGNORECASE)  # of Cellpose


def recognises(path: Path, declared: Mapping[str, Any]) -> bool:
    """Whether a folder holds one folder of images and one of labels, under any of the usual names, or pairs of files.

    imagesTr and labelsTr count too, but only without a ``dataset.json`` and without channel numbers.
    """
    found = _folders(path)
    if found is None or not set(declared) <= {"labels", "channel_names", "regions_class_order", "name"}:
        return False
    if found[0].name.lower() == "imagestr":
        return not (path / "dataset.json").exists() and not any(
            map(CHANNEL_NUMBER.fullmatch, _stems(found[0]).values())
        )
    return True


def read(root: Path, raw: Mapping[str, Any], problems: list[Problem]) -> Dataset | None:
    """Match images with labels; None if no class or channel can be told."""
    folders = _folders(root)
    assert folders is not None
    images, labels = folders
    beside = images == labels
    image_stems, label_stems = _pairs(root) if beside else (_stems(images), _stems(labels))
    numbered, annotated = _image_files(image_stems), _label_files(labels, label_stems, problems)
    annotated |= {} if beside else _mask_folders(labels, annotated)
    if not numbered:
        found = endings_found(visible_files(images))
        problems.append(Problem(WHOLE, f"{images.name} has no readable image{found}", "add images"))
    classes = list(dict.fromkeys(name for entry in annotated.values() if isinstance(entry, dict) for name in entry))
    scheme = scheme_of(raw, sorted(classes), problems)
    expected = max((len(files) for files in numbered.values()), default=1)
    cases: list[Case] = []
    partners = likely_partners(set(numbered) - set(annotated), set(annotated) - set(numbered))
    for name, files in sorted(numbered.items()):
        problems += channel_problems(name, files, expected)
        label = annotated.get(name)
        if label is None:
            action = "add it or remove the case"
            if name in partners:
                action = f"rename {partners[name]} to it"
            problems.append(Problem(name, f"its label {labels.name}/{name} is missing", action))
        paths = by_number(files, expected)
        masks = masks_of(name, label, scheme, problems) if isinstance(label, dict) else ()
        cases.append(Case(id=name, channels=paths, label=None if isinstance(label, dict) else label, masks=masks))
    for name in sorted(set(annotated) - set(numbered) - set(partners.values())):
        problem = f"has a label in {labels.name} but no image in {images.name}"
        problems.append(Problem(name, problem, "add the image; the label is ignored without it", fatal=False))
    problems += hidden_files(dict.fromkeys(folders))
    if scheme is None and "labels" not in raw:
        scheme = found_labels(cases, problems)
    channels = declared_channels(raw, problems) if "channel_names" in raw else found_channels(cases)
    ending = label_ending(cases, problems)
    return declared_dataset(root, "paired", raw, scheme, channels, ending, tuple(cases), ())


def masks_of(
    case: str, files: Mapping[str, Path], scheme: LabelScheme | None, problems: list[Problem]
) -> tuple[Mask, ...]:
    """Return the masks of a case in the order in which they are painted: that of the declared classes."""
    if scheme is None:
        return ()
    values = {class_.name: class_.values[0] for class_ in scheme.labels if len(class_.values) == 1}
    for name in sorted(set(files) - set(values)):
        problem = f'{files[name].name} is a mask of the class "{name}", which is not declared'
        problems.append(Problem(case, problem, f"declare it or remove it; declared are {', '.join(values)}"))
    return tuple(Mask(path=files[name], value=value) for name, value in values.items() if name in files)


def scheme_of(raw: Mapping[str, Any], classes: Sequence[str], problems: list[Problem]) -> LabelScheme | None:
    """Return the declared classes, or those that have files of their own; None: the label files must tell.

    Classes with files of their own have the values 1, 2, ... in their order.
    """
    if "labels" in raw:
        return declared_labels(raw, problems)
    values = {name: value for value, name in enumerate(classes, 1)}
    return LabelScheme.from_declaration({"background": 0} | values) if classes else None


def _folders(root: Path) -> tuple[Path, Path] | None:
    """Return the folders of images and of labels, if there is one of each; twice the folder that has pairs of files."""
    if not root.is_dir():
        return None
    inside = {path.name.lower(): path for path in sorted(root.iterdir()) if path.is_dir()}
    images = [inside[name] for name in _IMAGES if name in inside]
    labels = [inside[name] for name in _LABELS if name in inside]
    if not (images and labels):
        beside, masks = _pairs(root)
        return (root, root) if {*map(_case_of, beside.values())} & {*masks.values()} else None
    return images[0], labels[0]


def _stems(folder: Path) -> dict[Path, str]:
    """Return the names of the image files in a folder without their endings."""
    return {path: split_ending(path)[0] for path in visible_files(folder) if known_ending(path)}


def _pairs(folder: Path) -> tuple[dict[Path, str], dict[Path, str]]:
    """Return the names of images and of the cases of labels among the files of one folder."""
    files = [path for path in sorted(folder.iterdir()) if path.name[0] != "." and known_ending(path.name)]
    stems = {path: split_ending(path.name)[0] for path in files if path.is_file()}
    labels = {path: stem for path, stem in stems.items() if _LABEL_BESIDE.search(stem)}
    images = {path: stem for path, stem in stems.items() if path not in labels and not _BY_PRODUCT.fullmatch(stem)}
    return images, {path: _case_of(_LABEL_BESIDE.sub("", stem)) for path, stem in labels.items()}


def _case_of(stem: str) -> str:
    return _IMAGE_SUFFIX.sub("", stem)


def _image_files(stems: Mapping[Path, str]) -> dict[str, dict[int, Path]]:
    """Return case -> channel number -> file; numbers count as channels if all files have one."""
    matches = {path: match for path, stem in stems.items() if (match := CHANNEL_NUMBER.fullmatch(stem))}
    numbers = {int(match[2]) for match in matches.values()}
    if len(matches) == len(stems) and numbers == set(range(len(numbers))):
        return grouped((path, match[1], int(match[2])) for path, match in matches.items())
    return grouped((path, _case_of(stem), 0) for path, stem in stems.items())


def _label_files(folder: Path, stems: Mapping[Path, str], problems: list[Problem]) -> dict[str, Path | dict[str, Path]]:
    """Return case -> label file."""
    cases: dict[str, Path | dict[str, Path]] = {}
    for path, stem in stems.items():
        name = composed(_LABEL_SUFFIX.sub("", stem))
        if name in cases:
            problem = f"has two label files in {folder.name}: {path.name} is the second"
            problems.append(Problem(name, problem, "remove one of them"))
        cases.setdefault(name, path)
    return cases


def _mask_folders(folder: Path, known: Container[str]) -> dict[str, dict[str, Path]]:
    """Return case -> class -> file of the cases that are not known."""
    cases: dict[str, dict[str, Path]] = {}
    for inside in sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != "."):
        masks = {stem: path for path, stem in _stems(inside).items()}
        if masks and composed(inside.name) not in known:
            cases.setdefault(composed(inside.name), masks)
    return cases
