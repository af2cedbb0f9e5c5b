"""What the labels of a dataset mean: names, values, regions, the ignore value, and the network's outputs.

Rules and error cases follow the reference's ``dataset.json`` (label semantics). Pure numpy; no file is touched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import model_validator

from segfit.errors import InputError
from segfit.files import Record

__all__ = ["LabelScheme", "Target"]


class Target(Record):
    """One structure that is predicted and evaluated: a label, or a region made of several labels."""

    name: str
    values: tuple[int, ...]  # label values whose union is the structure


class LabelScheme(Record):
    """Names, values and regions of a dataset's labels.

    `labels` keeps the declaration order of ``dataset.json``: a name with one value, or (regions) with several.
    Background is always 0. With at least one entry of more than one value the dataset is region based: each region
    is one sigmoid output, and `region_order` says which value is painted for each, later over earlier.
    """

    labels: tuple[Target, ...]  # everything declared except the ignore label, background included
    region_order: tuple[int, ...] | None = None
    ignore_value: int | None = None

    @classmethod
    def from_declaration(
        cls, labels: Mapping[str, Any], regions_class_order: Sequence[int] | None = None
    ) -> LabelScheme:
        """Build the scheme from the `labels` and `regions_class_order` entries of a ``dataset.json``.

        Raises `InputError` with one sentence for every rule that is broken.
        """
        if not isinstance(labels, Mapping) or not labels:
            raise InputError('"labels" must map names to values, for example {"background": 0, "tumour": 1}')
        if labels.get("background") != 0 or isinstance(labels.get("background"), bool):
            raise InputError('"labels" must contain "background": 0')
        targets: list[Target] = []
        ignore: int | None = None
        for name, value in labels.items():
            if name == "ignore":
                if not isinstance(value, int) or isinstance(value, bool):
                    raise InputError(f'the label "ignore" must be one integer, got {value!r}')
                ignore = value
                continue
            values = tuple(value) if isinstance(value, list | tuple) else (value,)
            if not values or not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
                raise InputError(f'label "{name}" must be an integer or a list of integers, got {value!r}')
            targets.append(Target(name=name, values=values))
        if all(set(target.values) == {0} for target in targets):
            raise InputError('"labels" must declare at least one structure besides "background"')
        highest = max(v for target in targets for v in target.values)
        if ignore is not None and ignore != highest + 1:
            raise InputError(f'the label "ignore" must be the highest value + 1 = {highest + 1}, got {ignore}')
        has_regions = any(len(target.values) > 1 for target in targets)
        order: tuple[int, ...] | None = None
        if has_regions:
            foreground = [target for target in targets if set(target.values) != {0}]
            if regions_class_order is None or len(regions_class_order) != len(foreground):
                got = "nothing" if regions_class_order is None else f"{len(regions_class_order)} values"
                raise InputError(
                    f'"regions_class_order" must list one value for each of the {len(foreground)} regions, got {got}'
                )
            declared = {v for target in targets for v in target.values}
            unknown = [v for v in regions_class_order if isinstance(v, bool) or v not in declared]
            if unknown:
                raise InputError(f'"regions_class_order" must list declared label values, got {unknown[0]!r}')
            order = tuple(regions_class_order)
        else:
            owner: dict[int, str] = {}
            for target in targets:
                first = owner.setdefault(target.values[0], target.name)
                if first != target.name:
                    raise InputError(f'labels "{first}" and "{target.name}" share the value {target.values[0]}')
        scheme = cls(labels=tuple(targets), region_order=order, ignore_value=ignore)
        values = scheme.all_values + ((ignore,) if ignore is not None else ())
        if values != tuple(range(len(values))):
            raise InputError(f"label values must be consecutive from 0, got {list(values)}")
        return scheme

    @model_validator(mode="after")
    def _check(self) -> LabelScheme:
        if not any(target.values == (0,) for target in self.labels):
            raise ValueError("a label scheme needs a background label with value 0")
        return self

    @property
    def has_regions(self) -> bool:
        """Whether outputs are overlapping regions (sigmoid) instead of exclusive labels (softmax)."""
        return any(len(target.values) > 1 for target in self.labels)

    @property
    def all_values(self) -> tuple[int, ...]:
        """All distinct label values, ascending, with background and without the ignore value."""
        return tuple(sorted({value for target in self.labels for value in target.values}))

    @property
    def foreground_values(self) -> tuple[int, ...]:
        """All distinct label values except background, ascending."""
        return tuple(value for value in self.all_values if value != 0)

    @property
    def targets(self) -> tuple[Target, ...]:
        """Structures that are predicted, evaluated and oversampled.

        Region based: the foreground regions in declaration order. Otherwise: foreground labels by ascending value.
        """
        foreground = [target for target in self.labels if set(target.values) != {0}]
        if self.has_regions:
            return tuple(foreground)
        return tuple(sorted(foreground, key=lambda target: target.values[0]))

    @property
    def num_outputs(self) -> int:
        """Output channels of the network: labels with background (softmax), or foreground regions (sigmoid)."""
        return len(self.targets) if self.has_regions else len(self.all_values)

    @property
    def num_declared(self) -> int:
        """Entries in ``dataset.json``'s `labels`, ignore included: what the reference's memory estimate counts."""
        return len(self.labels) + (self.ignore_value is not None)

    def to_labels(
        self, scores: NDArray[np.floating[Any]], *, activated: bool = False
    ) -> NDArray[np.unsignedinteger[Any]]:
        """Turn network outputs into a label map.

        Parameters
        ----------
        scores : (num_outputs, *spatial) logits, or probabilities with ``activated=True``

        Exclusive labels: argmax, the lowest label wins ties. Regions: every region above probability 0.5 (strict) is
        painted with its value of `region_order`, later over earlier.
        """
        dtype = np.uint8 if max(self.all_values) < 255 else np.uint16
        if self.region_order is None:
            winner: NDArray[np.intp] = scores.argmax(0)
            if self.all_values == tuple(range(len(self.all_values))):
                return winner.astype(dtype)
            return np.take(np.asarray(self.all_values, dtype=dtype), winner)
        threshold = 0.5 if activated else 0.0
        result: NDArray[np.unsignedinteger[Any]] = np.zeros(scores.shape[1:], dtype=dtype)
        for score, value in zip(scores, self.region_order, strict=True):
            result[score > threshold] = value
        return result
