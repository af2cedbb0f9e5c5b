"""What the labels of a dataset mean: names, values, regions, the ignore value, and the network's outputs.

Rules and error cases follow nnU-Net's ``dataset.json`` (label semantics), except that values on disk need not be
consecutive. Two kinds of values exist: *stored* ones, in files and in what users see, and *inner* ones, consecutive
from 0, everywhere else. `LabelScheme.to_inner` and `LabelScheme.to_stored` are the way there and back. Pure numpy; no
file is touched.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import model_validator

from segfit.errors import InputError
from segfit.files import Record
from segfit.text import count

__all__ = ["Exchange", "LabelClass", "LabelScheme", "smallest_dtype"]


class LabelClass(Record):
    """A class that is predicted and evaluated: one label, or a region made of several labels."""

    name: str
    values: tuple[int, ...]  # inner label values whose union is the class


class Exchange(Record):
    """Labels that change places when an axis is flipped, so that left stays left."""

    axis: int  # as the network counts
    pairs: tuple[tuple[int, int], ...]  # inner label values


_LOWEST, _HIGHEST = -(2**31), 2**31 - 1  # label values that files can hold
_TABLE = 2**16  # up to this value a table tells the inner one, which is faster than searching


class LabelScheme(Record):
    """Names, values and regions of a dataset's labels.

    `labels` keeps the declaration order of ``dataset.json``: a name with one value, or (regions) with several.
    Background is always 0. With at least one entry of more than one value the dataset is region based: each region
    is one sigmoid output, and `region_order` says which value is painted for each, later over earlier.

    All values here are inner ones: consecutive from 0, the ignore value last.
    """

    labels: tuple[LabelClass, ...]  # everything declared except the ignore label, background included
    region_order: tuple[int, ...] | None = None
    ignore_value: int | None = None
    stored: tuple[int, ...] | None = None  # the value on disk of each inner value; None: the same

    @classmethod
    def from_declaration(
        cls, labels: Mapping[str, Any], regions_class_order: Sequence[int] | None = None
    ) -> LabelScheme:
        """Build the scheme from the `labels` and `regions_class_order` entries of a ``dataset.json``.

        The values declared there are those on disk, whole numbers of 32 bits with gaps if need be. Raises
        `InputError` with one sentence for every rule that is broken.
        """
        if not isinstance(labels, Mapping) or not labels:
            raise InputError('"labels" must map names to values, for example {"background": 0, "tumour": 1}')
        if labels.get("background") != 0 or isinstance(labels.get("background"), bool):
            zero = [name for name, value in labels.items() if value == 0 and name not in ("background", "ignore")]
            action = (
                f'call "{zero[0]}" "background"' if zero else 'write "background": 0 into it, for what has no label'
            )
            if "background" in labels:
                action = 'write 0 for "background"; where the label files have another value there, change them too'
            raise InputError('"labels" must contain "background": 0', action)
        if nameless := [value for name, value in labels.items() if not name.strip()]:
            raise InputError(f'in "labels", {nameless[0]!r} has no name', "give it one")
        declared = {name: _values(name, value) for name, value in labels.items() if name != "ignore"}
        if all(set(values) == {0} for values in declared.values()):
            raise InputError('"labels" must declare at least one class besides "background"')
        stored = (0, *sorted({value for values in declared.values() for value in values if value != 0}))
        ignore = labels.get("ignore")
        if "ignore" in labels:
            if not isinstance(ignore, int) or isinstance(ignore, bool):
                raise InputError(f'the label "ignore" must be one integer, got {ignore!r}')
            if ignore in stored:
                raise InputError(f'the label "ignore" must have a value of its own, {ignore} is that of a class')
            stored += _values("ignore", ignore)
        inner = {value: index for index, value in enumerate(stored)}
        order: tuple[int, ...] | None = None
        if any(len(values) > 1 for values in declared.values()):
            order = _region_order(declared, regions_class_order)
        else:
            owner: dict[int, str] = {}
            for name, values in declared.items():
                first = owner.setdefault(values[0], name)
                if first != name:
                    raise InputError(f'labels "{first}" and "{name}" share the value {values[0]}')
        return cls(
            labels=tuple(LabelClass(name=n, values=tuple(inner[v] for v in values)) for n, values in declared.items()),
            region_order=None if order is None else tuple(inner[value] for value in order),
            ignore_value=None if ignore is None else inner[ignore],
            stored=None if stored == tuple(range(len(stored))) else stored,
        )

    @classmethod
    def of_values(cls, values: Iterable[int]) -> LabelScheme:
        """Return a scheme with a class "label V" for every stored value V but 0; raises as `from_declaration` does."""
        return cls.from_declaration({"background": 0} | {f"label {value}": value for value in sorted(values) if value})

    def of_objects(self, *, boundary: bool) -> LabelScheme:
        """Return what is left of the scheme where labels number objects: one class, or interior and boundary.

        One class keeps the name that was declared for it, else it is called "object". Raises `InputError` where the
        ignore value is that of a class.
        """
        own = [class_.name for class_ in self.classes]
        name = own[0] if len(own) == 1 and not self.is_unnamed else "object"
        classes = {"interior": 1, "boundary": 2} if boundary else {name: 1}
        ignore = {} if self.ignore_value is None else {"ignore": self.stored_values[self.ignore_value]}
        return type(self).from_declaration({"background": 0, **classes, **ignore})

    @property
    def is_unnamed(self) -> bool:
        """Whether the classes have no names but those of `of_values`."""
        stored = self.stored_values
        return not (self.has_regions or self.ignore_value) and all(
            class_.name == f"label {stored[class_.values[0]]}" for class_ in self.classes
        )

    @model_validator(mode="after")
    def _check(self) -> LabelScheme:
        if not any(class_.values == (0,) for class_ in self.labels):
            raise ValueError("a label scheme needs a background label with value 0")
        fault = self._fault()
        if fault:
            raise ValueError(fault)
        return self

    def _fault(self) -> str:
        """Return what no scheme has, nothing if all is well."""
        known, paints, stored = self.all_values, self.region_order, self.stored
        own = (*known, *(() if self.ignore_value is None else (self.ignore_value,)))
        if known[0] != 0 or len(known) < 2 or not all(class_.values for class_ in self.labels):
            return "labels must have values from 0, with one besides background"
        if self.ignore_value in known:
            return "ignore_value must be that of no label"
        if len({class_.name for class_ in self.labels}) < len(self.labels):
            return "labels must have names of their own"
        if not self.has_regions and (paints is not None or len(known) < len(self.labels)):
            return "labels must have values of their own, and region_order is for regions only"
        if self.has_regions and (paints is None or len(paints) != len(self.classes) or not set(paints) <= set(known)):
            return "region_order must have a value of labels for each region"
        if stored is None:
            return ""
        if len(stored) != len(own) or len(set(stored)) < len(stored) or stored[0] != 0:
            return "stored must have a value of its own for each label, and 0 for background"
        if not _LOWEST <= min(stored) <= max(stored) <= _HIGHEST:
            return f"stored must have values from {_LOWEST} to {_HIGHEST}"
        return ""

    @property
    def is_consecutive(self) -> bool:
        """Whether the inner values are what they are meant to be: 0, 1, 2 and so on, the ignore value last."""
        known = self.all_values
        return known == tuple(range(len(known))) and self.ignore_value in (None, len(known))

    @property
    def has_regions(self) -> bool:
        """Whether outputs are overlapping regions (sigmoid) instead of exclusive labels (softmax)."""
        return any(len(class_.values) > 1 for class_ in self.labels)

    @property
    def stored_values(self) -> tuple[int, ...]:
        """The values on disk in the order of the inner ones: background first, the ignore value last."""
        ignore = () if self.ignore_value is None else (self.ignore_value,)
        return self.stored if self.stored is not None else (*self.all_values, *ignore)

    @property
    def all_values(self) -> tuple[int, ...]:
        """All distinct label values, ascending, with background and without the ignore value."""
        return tuple(sorted({value for class_ in self.labels for value in class_.values}))

    @property
    def foreground_values(self) -> tuple[int, ...]:
        """All distinct label values except background, ascending."""
        return tuple(value for value in self.all_values if value != 0)

    @property
    def classes(self) -> tuple[LabelClass, ...]:
        """Classes that are predicted, evaluated and oversampled.

        Region based: the foreground regions in declaration order. Otherwise: foreground labels by ascending value.
        """
        foreground = [class_ for class_ in self.labels if set(class_.values) != {0}]
        if self.has_regions:
            return tuple(foreground)
        return tuple(sorted(foreground, key=lambda class_: class_.values[0]))

    @property
    def num_outputs(self) -> int:
        """Output channels of the network: labels with background (softmax), or foreground regions (sigmoid)."""
        return len(self.classes) if self.has_regions else len(self.all_values)

    def exchanged_outputs(self, pairs: Sequence[tuple[int, int]]) -> tuple[int, ...]:
        """Return for every output which one takes its place when pairs of label values change places.

        Raises `ValueError` where a region becomes none of the regions.
        """
        partner = _partners(pairs)
        regions = [class_.values for class_ in self.classes]
        outputs = [set(values) for values in regions] if self.has_regions else [{v} for v in self.all_values]
        return tuple(outputs.index({partner.get(value, value) for value in values}) for values in outputs)

    def exchanged_foreground(self, pairs: Sequence[tuple[int, int]]) -> tuple[int, ...]:
        """Return for each of `foreground_values` the index of the one that takes its place."""
        partner, values = _partners(pairs), self.foreground_values
        return tuple(values.index(partner.get(value, value)) for value in values)

    @property
    def num_declared(self) -> int:
        """Entries in ``dataset.json``'s `labels`, ignore included: what nnU-Net's memory estimate counts."""
        return len(self.labels) + (self.ignore_value is not None)

    def lost_values(self) -> tuple[tuple[int, int], ...]:
        """Return (value, value that it comes back as), as stored, where regions cannot tell a value.

        A voxel of a value lies in some regions; painting these in `region_order` must end in a value of the same
        regions. It does not where a large region is painted over a small one inside it.
        """
        if self.region_order is None:
            return ()
        stored, inside = self.stored_values, _places([class_.values for class_ in self.classes])
        painted = {value: self.region_order[inside[value][-1]] for value in self.foreground_values}
        lost = {value: paint for value, paint in painted.items() if paint == 0 or inside[paint] != inside[value]}
        return tuple((stored[value], stored[paint]) for value, paint in lost.items())

    def lossless_regions(self) -> tuple[tuple[str, ...], tuple[int, ...]] | None:
        """Return an order of the regions, and what to paint for each as stored, that loses no value; None without one.

        The declared order if it can be kept, else large regions before small ones.
        """
        by_size = sorted(self.classes, key=lambda class_: -len(class_.values))
        for ordered in (self.classes, tuple(by_size)):
            painted = _painted([class_.values for class_ in ordered])
            if painted is not None:
                names = tuple(class_.name for class_ in ordered)
                stored = self.stored_values
                return names, tuple(stored[value] for value in painted)
        return None

    def to_inner(self, labels: NDArray[np.integer[Any]]) -> NDArray[np.integer[Any]]:
        """Turn values on disk into inner ones, of any shape.

        A value that was not declared becomes one that no class has: the highest inner value + 1.
        """
        if self.stored is None:
            return labels
        unknown, top = len(self.stored), max(self.stored)
        if min(self.stored) < 0 or top >= _TABLE:
            order = np.argsort(self.stored)
            known = np.asarray(self.stored)[order]
            place = np.searchsorted(known, labels).clip(max=unknown - 1)
            return np.where(known[place] == labels, order[place], unknown).astype(np.int32)
        table: NDArray[np.integer[Any]] = np.full(top + 2, unknown, dtype=np.int16 if unknown < 2**15 else np.int32)
        table[list(self.stored)] = np.arange(unknown)
        index = labels.astype(np.int64)
        index[(index < 0) | (index > top)] = top + 1
        return np.take(table, index)

    def to_stored(self, labels: NDArray[np.unsignedinteger[Any]]) -> NDArray[np.integer[Any]]:
        """Turn inner values of any shape, as `to_labels` gives them, into those on disk.

        The type is uint8, uint16 or int32, as the values need.
        """
        if self.stored is None:
            return labels
        table: NDArray[np.integer[Any]] = np.array(self.stored, smallest_dtype(min(self.stored), max(self.stored)))
        return np.take(table, labels)

    def to_labels(
        self, values: NDArray[np.floating[Any]], *, activated: bool = False
    ) -> NDArray[np.unsignedinteger[Any]]:
        """Turn network outputs into a label map.

        Parameters
        ----------
        values : (num_outputs, *spatial) logits, or probabilities with ``activated=True``

        Exclusive labels: argmax, the lowest label wins ties. Regions: every region above probability 0.5 (strict) is
        painted with its value of `region_order`, later over earlier.
        """
        dtype = np.uint8 if max(self.all_values) < 255 else np.uint16
        if self.region_order is None:
            winner: NDArray[np.intp] = values.argmax(0)
            if self.all_values == tuple(range(len(self.all_values))):
                return winner.astype(dtype)
            return np.take(np.asarray(self.all_values, dtype=dtype), winner)
        threshold = 0.5 if activated else 0.0
        result: NDArray[np.unsignedinteger[Any]] = np.zeros(values.shape[1:], dtype=dtype)
        for channel, value in zip(values, self.region_order, strict=True):
            result[channel > threshold] = value
        return result


def smallest_dtype(low: int, high: int) -> type[np.integer[Any]]:
    """Return what label maps with these extreme values are written as: uint8 and uint16 as nnU-Net, or int32."""
    if low < 0 or high > np.iinfo(np.uint16).max:
        return np.int32
    return np.uint8 if high < 255 else np.uint16


def _partners(pairs: Sequence[tuple[int, int]]) -> dict[int, int]:
    return dict(pairs) | {second: first for first, second in pairs}


def _values(name: str, value: object) -> tuple[int, ...]:
    """Return the values declared for a name; `InputError` unless they are label values."""
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not values or not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
        raise InputError(f'label "{name}" must be an integer or a list of integers, got {value!r}')
    outside = [v for v in values if not _LOWEST <= v <= _HIGHEST]
    if outside:
        raise InputError(f'label "{name}" must have values from {_LOWEST} to {_HIGHEST}, got {outside[0]}')
    return values


def _places(regions: Sequence[Sequence[int]]) -> dict[int, tuple[int, ...]]:
    """Return the numbers of the regions that each value lies in, in order."""
    found: dict[int, list[int]] = {}
    for number, values in enumerate(regions):
        for value in set(values):
            found.setdefault(value, []).append(number)
    return {value: tuple(numbers) for value, numbers in found.items()}


def _painted(regions: Sequence[Sequence[int]]) -> tuple[int, ...] | None:
    """Return a value to paint for each region, later over earlier, that loses none; None where one value cannot do."""
    painted, inside = [], _places(regions)
    for number, values in enumerate(regions):
        seen = [value for value in values if inside[value][-1] == number]
        if len({inside[value] for value in seen}) > 1:
            return None
        painted.append(min(seen or values))
    return tuple(painted)


def _region_order(declared: Mapping[str, Sequence[int]], order: Sequence[int] | None) -> tuple[int, ...]:
    """Return the stored value painted for each foreground region; `InputError` unless there is one for each."""
    regions = sum(set(values) != {0} for values in declared.values())
    if order is not None and not isinstance(order, list | tuple):
        raise InputError(f'"regions_class_order" must be a list of label values, got {order!r}')
    if order is None or len(order) != regions:
        got = "nothing" if order is None else count(len(order), "value")
        raise InputError(f'"regions_class_order" must list one value for each of the {regions} regions, got {got}')
    known = {value for values in declared.values() for value in values} - {0}
    unknown = [value for value in order if not isinstance(value, int) or isinstance(value, bool) or value not in known]
    if unknown:
        raise InputError(f'"regions_class_order" must list declared label values other than 0, got {unknown[0]!r}')
    return tuple(order)
