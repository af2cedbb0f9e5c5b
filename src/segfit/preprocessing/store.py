"""Preprocessed cases on disk: compressed in chunks, read in part, checksummed, there whole or not at all.

A case is a folder named after the content it was made from::

    <root>/<key>/image.b2nd       (c, *spatial) float32
                 labels.b2nd      (*spatial) int16, if there is a label
                 annotation.b2nd  (*stored) the labels on the grid of the image, for who scores predictions
                 locations.npy    (n, axes) int32, the classes one after the other
                 case.json        properties, with the record of it and of the other files (`segfit.records`)
    <root>/hashes.json            hashes of source files by path, size and time

It is written under a hidden name and renamed when complete, so that killed and competing processes do no harm: a
folder without a valid case.json does not exist for a reader.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from segfit.dataset.contents import FileHashes
from segfit.dataset.manifest import Case
from segfit.errors import InputError, StageError
from segfit.files import (
    Document,
    content_hash,
    flush_to_disk,
    partial_folder,
    read_json,
)
from segfit.labels import LabelScheme
from segfit.preprocessing.locations import Region
from segfit.preprocessing.pipeline import CaseProperties, Preprocessed
from segfit.records import RECORD, ResultRecord, faults, stored, write
from segfit.specs import PreprocessingSpec

__all__ = ["CaseStore", "DamagedCase", "StoredAnnotation", "StoredCase", "compressed", "legible_name"]

_VERSION = 3  # of what preprocessing computes: a change makes stored cases stale, and all trainings on them
_BLOCK = 1 << 15  # elements that are decompressed together: what a processor core has close at hand
_CHUNK_BLOCKS = 2  # blocks per axis in a chunk
_ANNOTATION = "annotation.b2nd"
_ANNOTATION_BYTES = 8  # per voxel, of a label map that is read and compared


class _CaseFile(Document):
    """case.json. A new schema has cases stored anew, under their keys, and trainings on them stay."""

    SCHEMA: ClassVar[int] = 3
    schema_version: int = 3
    properties: CaseProperties
    channels: int
    location_counts: dict[str, int]  # rows of locations.npy per class, in order
    sizes: dict[str, int]  # bytes of the other files: what was cut short is found without reading it


@dataclass(frozen=True, slots=True)
class DamagedCase:
    """A folder of a store that does not hold what was written."""

    name: str  # case id, or the key where that is not legible
    folder: Path
    problem: str


@contextmanager
def _damage_is_told(case: str) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        raise StageError(
            f"the preprocessed case {case} cannot be read ({error})", "preprocess again to have it made anew"
        ) from error


@dataclass(frozen=True, slots=True)
class StoredAnnotation:
    """Loads the annotation of a case as its files have it: small, for any process (`evaluation.pairs.Stored`)."""

    case: str
    path: Path
    sha256: str
    voxels: int

    def __call__(self) -> NDArray[np.integer[Any]]:
        """Return the inner label values on the grid of the image, (*spatial)."""
        import blosc2

        with _damage_is_told(self.case):
            content = self.path.read_bytes()
            if hashlib.sha256(content).hexdigest() != self.sha256:
                raise ValueError(f"{self.path.name} is not what was written")
            result: NDArray[np.integer[Any]] = blosc2.ndarray_from_cframe(content)[:]
        return result

    def predicted_bytes(self) -> int:
        """Return what loading and comparing it takes, about."""
        return self.voxels * _ANNOTATION_BYTES


@dataclass(frozen=True, slots=True, eq=False)
class StoredCase:
    """A case in a store, read in part. Every read opens the file anew, so any number of threads may read."""

    folder: Path
    properties: CaseProperties
    channels: int
    has_labels: bool
    annotation: StoredAnnotation | None  # None for a case without label
    locations: Mapping[str, NDArray[np.int32]]  # (n, spatial axes) by name of the class, mapped from disk
    previous: Path | None = None  # what the previous stage of a cascade predicted on this grid, as `compressed`

    @property
    def id(self) -> str:
        """Case id."""
        return self.properties.case

    @property
    def shape(self) -> tuple[int, ...]:
        """Spatial shape."""
        return self.properties.shape

    def __reduce__(self) -> tuple[Any, ...]:
        return _opened, (self.folder, self.previous)  # not with all locations

    def image(self, region: Region | None = None) -> NDArray[np.float32]:
        """Return the image, (c, *spatial) float32, or a spatial region of it."""
        return self._read(self.folder / "image.b2nd", (slice(None), *(region or self._whole)))

    def labels(self, region: Region | None = None) -> NDArray[np.int16] | None:
        """Return the label map, (*spatial) int16, or a region of it; None for a case without label."""
        return self._read(self.folder / "labels.b2nd", region or self._whole) if self.has_labels else None

    def previous_stage(self, region: Region | None = None) -> NDArray[np.int16] | None:
        """Return what the previous stage predicted, like `labels`; None for a case outside of a cascade."""
        return None if self.previous is None else self._read(self.previous, region or self._whole)

    @property
    def _whole(self) -> Region:
        return (slice(None),) * len(self.shape)

    def _read(self, path: Path, region: Region) -> NDArray[Any]:
        import blosc2

        with _damage_is_told(self.id):
            stored = blosc2.open(str(path), mode="r", dparams=blosc2.DParams(nthreads=1))
            result: NDArray[Any] = stored[region]
        return result


def _opened(folder: Path, previous: Path | None) -> StoredCase:
    return replace(CaseStore(folder.parent).open(folder.name), previous=previous)


class CaseStore:
    """A folder of preprocessed cases, shared by all plans that preprocess alike. Safe for several processes."""

    def __init__(self, root: Path, hashes: FileHashes | None = None) -> None:
        self.root = root
        self.hashes = FileHashes(root / "hashes.json") if hashes is None else hashes

    def made_of(self, case: Case, spec: PreprocessingSpec, scheme: LabelScheme) -> dict[str, Any]:
        """Return what a preprocessed case is made of: its files, the preprocessing, and the labels' meaning."""
        return {
            "version": _VERSION,
            "case": case.id,
            "files": self.hashes.case(case),
            "spec": spec.model_dump(mode="json", exclude={"resample_logits"}),  # applies to predictions only
            "labels": scheme.model_dump(mode="json"),
        }

    def key(self, case: Case, spec: PreprocessingSpec, scheme: LabelScheme) -> str:
        """Return what names a preprocessed case: a hash of what it is made of."""
        return content_hash(self.made_of(case, spec, scheme))

    def has(self, key: str) -> bool:
        """Return whether a complete case is there; its content is not read, see `verify`."""
        return self._load(key) is not None

    def verify(self, key: str) -> bool:
        """Return whether a case is there and every byte of it is what was written."""
        return self.damage(key) is None

    def was_verified(self, key: str, since: float) -> bool:
        """Return whether every byte of a case was written or read since a time, and none of its files changed after.

        That is when ``case.json`` was touched; times are those of the file system.
        """
        found, folder = self._load(key), self.root / key
        if found is None:
            return False
        try:
            touched = (folder / "case.json").stat().st_mtime_ns
            changed = max((folder / name).stat().st_mtime_ns for name in found[1].files)
        except OSError:
            return False
        return touched > changed and touched >= since * 1e9

    def damage(self, key: str) -> DamagedCase | None:
        """Read every byte of a case and return what is wrong with it, if anything is; see `was_verified`."""
        found = self._damage(key)
        with suppress(OSError):  # it may not be there, or may not be written
            os.utime(self.root / key / "case.json", None if found is None else (0, 0))
        return found

    def _damage(self, key: str) -> DamagedCase | None:
        folder, found = self.root / key, self._load(key)
        if found is None:
            return DamagedCase(legible_name(folder), folder, "it is incomplete, another case, or case.json is damaged")
        problems = [f"{name} {fault}" for name, fault in faults(folder, found[1].files).items()]
        return DamagedCase(found[0].properties.case, folder, problems[0]) if problems else None

    def is_outdated(self, key: str) -> bool:
        """Return whether a case was stored by an earlier version, which did not keep all that is needed now."""
        try:
            raw = read_json(self.root / key / "case.json")
            return bool(raw["schema_version"] < _CaseFile.SCHEMA) and RECORD not in raw
        except (InputError, KeyError, TypeError):
            return False

    def keys(self) -> list[str]:
        """Return the keys of all cases, whole and damaged ones."""
        if not self.root.is_dir():
            return []
        return sorted(path.name for path in self.root.iterdir() if path.is_dir() and path.name[0] != ".")

    def open(self, key: str) -> StoredCase:
        """Open a case; raise `StageError` if it is not there."""
        found = self._load(key)
        if found is None:
            raise StageError(f"{self.root} holds no preprocessed case {key}", "run the preprocessing again")
        (case, record), folder = found, self.root / key
        counts, properties = case.location_counts, case.properties
        rows = np.zeros((0, len(properties.shape)), dtype=np.int32)
        if any(counts.values()):  # an empty file cannot be mapped
            with _damage_is_told(properties.case):
                rows = np.asarray(np.load(folder / "locations.npy", mmap_mode="r"))
        parts = np.split(rows, np.cumsum(list(counts.values()))[:-1]) if counts else []
        locations = dict(zip(counts, parts, strict=True))
        annotation, digest = None, record.files.get(_ANNOTATION)
        if digest is not None:
            voxels = prod(properties.stored_shape)
            annotation = StoredAnnotation(properties.case, folder / _ANNOTATION, digest, voxels)
        has_labels = "labels.b2nd" in record.files
        return StoredCase(folder, properties, case.channels, has_labels, annotation, locations)

    def add(
        self,
        key: str,
        case: Preprocessed,
        *,
        made_of: Mapping[str, Any] | None = None,
        annotation: bytes | None = None,
        slicewise: bool = False,
    ) -> None:
        """Write a case with its record, `made_of` this; one that is already there is kept.

        `annotation` is what `compressed` makes of the labels on the grid of the image. `slicewise` lays the arrays out
        for reading single slices along axis 0. Raises `StageError` if the disk is full or not writable; nothing is left
        behind then.
        """
        partial: Path | None = None
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            partial = partial_folder(self.root)
            record = ResultRecord.of(key, "preprocess", made_of or {}, files={})
            _write_case(partial, record, case, annotation, slicewise=slicewise)
            self._move_in(partial, key)
        except OSError as error:
            reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror
            raise StageError(
                f"case {case.properties.case} cannot be stored in {self.root} ({reason})",
                "make room or choose another folder, then start again: finished cases are kept",
            ) from error
        finally:
            if partial is not None:
                shutil.rmtree(partial, ignore_errors=True)

    def discard(self, key: str) -> None:
        """Remove a case; it disappears at once and whole."""
        folder = self.root / key
        aside = partial_folder(self.root)
        try:
            if not folder.is_symlink():
                with suppress(OSError):  # a folder that may not be written cannot be moved
                    folder.chmod(0o700)
            folder.rename(aside / key)
        except FileNotFoundError:
            pass
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def _load(self, key: str) -> tuple[_CaseFile, ResultRecord] | None:
        folder = self.root / key
        try:
            found = stored(_CaseFile, folder / "case.json")
            if found is None or found[1].key != key:  # content in the wrong place is damage too
                return None
            complete = all((folder / name).stat().st_size == size for name, size in found[0].sizes.items())
        except OSError:
            return None
        return found if complete else None

    def _move_in(self, partial: Path, key: str) -> None:
        """Rename a complete folder to its place, unless another process was first."""
        while not self.has(key):
            try:
                partial.rename(self.root / key)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
                if not self.has(key):  # an incomplete folder, or something else, stands in the way
                    self.discard(key)
            else:
                _flush_folder(self.root)
                return


def _write_case(
    folder: Path, record: ResultRecord, case: Preprocessed, annotation: bytes | None, *, slicewise: bool
) -> None:
    axes = len(case.properties.shape)
    arrays = {"image.b2nd": compressed(case.image, axes, slicewise=slicewise)}
    if case.labels is not None:
        arrays["labels.b2nd"] = compressed(case.labels, axes, slicewise=slicewise)
    if annotation is not None:
        arrays[_ANNOTATION] = annotation
    rows = io.BytesIO()
    np.save(rows, np.concatenate([np.zeros((0, axes), np.int32), *case.locations.values()]), allow_pickle=False)
    arrays["locations.npy"] = rows.getvalue()
    document = _CaseFile(
        properties=case.properties,
        channels=case.image.shape[0],
        location_counts={name: len(found) for name, found in case.locations.items()},
        sizes={name: len(content) for name, content in arrays.items()},
    )
    for name, content in arrays.items():
        with (folder / name).open("wb") as handle:
            handle.write(content)
            handle.flush()
            flush_to_disk(handle.fileno())
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in arrays.items()}
    write(document, folder / "case.json", record.model_copy(update={"files": digests}))
    _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    """Make the names in a folder durable, where the system can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            flush_to_disk(descriptor)
        finally:
            os.close(descriptor)


def compressed(array: NDArray[Any], axes: int, *, slicewise: bool = False) -> bytes:
    """Return the bytes of a b2nd file; the last `axes` axes are spatial.

    Compressed in memory and written by us, so that a full disk shows as the error it is.
    """
    import blosc2

    lead, spatial = (1,) * (array.ndim - axes), array.shape[array.ndim - axes :]
    block = _block_shape(spatial, slicewise=slicewise)
    chunk = tuple(min(n, _CHUNK_BLOCKS * b) for n, b in zip(spatial, block, strict=True))
    # Labels compress well. Images hardly do: measured on CT and MR, higher levels win 1 % and take 10 times as long.
    parameters = blosc2.CParams(
        codec=blosc2.Codec.ZSTD,
        clevel=3 if array.dtype == np.int16 else 1,
        filters=[blosc2.Filter.SHUFFLE],
        typesize=array.itemsize,
        nthreads=1,
    )
    try:
        packed = blosc2.asarray(
            np.ascontiguousarray(array), chunks=(*lead, *chunk), blocks=(*lead, *block), cparams=parameters
        )
        content: bytes = packed.to_cframe()
    except RuntimeError as error:  # in memory nothing else can go wrong
        raise MemoryError(f"for {array.nbytes / 2**20:.0f} MiB to compress: {error}") from error
    return content


def _block_shape(spatial: Sequence[int], *, slicewise: bool) -> tuple[int, ...]:
    """Return a block of about `_BLOCK` elements, as cubic as the array allows; one slice thick if slicewise.

    The sides are powers of two or the whole axis; short axes leave room to the others.
    """
    block = [1] * len(spatial)
    growing = [axis for axis, n in enumerate(spatial) if n > 1 and not (slicewise and axis == 0)]
    while growing:
        axis = min(growing, key=lambda a: (block[a], -a))
        if prod(block) * 2 > _BLOCK:
            break
        block[axis] *= 2
        if block[axis] >= spatial[axis]:
            block[axis] = spatial[axis]
            growing.remove(axis)
    return tuple(block)


def legible_name(folder: Path) -> str:
    """Return the case id that a damaged record still tells, or the name of its folder."""
    try:
        return str(read_json(folder / "case.json")["properties"]["case"])
    except (InputError, OSError, KeyError, TypeError):
        return folder.name
