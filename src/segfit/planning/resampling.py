"""How the cases are prepared for one configuration: axes, spacing and resampling."""

from __future__ import annotations

from typing import Literal

from segfit.errors import InputError
from segfit.planning.trace import Asked
from segfit.specs import Normalization, PreprocessingSpec, ResamplingSpec

__all__ = ["preprocessing_of"]

_KINDS = ("resample_image", "resample_label", "resample_logits")
_NNUNET = {name: ResamplingSpec(order=3 if name == "resample_image" else 1) for name in _KINDS}
_FIXED = {"torch": {"order": 1, "order_separate_axis": 0}, "none": {"order": 0, "order_separate_axis": 0}}
"""What a method leaves no choice of."""


def preprocessing_of(
    ndim: int,
    orientation: Literal["canonical", "stored"],
    transpose: tuple[int, ...],
    spacing_mm: tuple[float, ...],
    normalization: tuple[Normalization, ...],
    asked: Asked,
) -> PreprocessingSpec:
    """Return how cases are prepared; a 2D configuration keeps the slices of a volume as they are.

    `transpose` and `spacing_mm` are of the axes that the network sees; `ndim` are those of the images.
    """
    spacing: tuple[float | None, ...] = spacing_mm
    if ndim == 2:
        transpose = (0, 1)
    elif len(spacing) == 2:
        spacing = (None, *spacing)
    resampling = {name: _resampling(name, spacing, asked) for name in _KINDS}
    without = [name for name, how in resampling.items() if how.method == "none"]
    if len(without) not in (0, len(resampling)):
        raise InputError(
            f"{asked.name}: {', '.join(asked.key(f'{name}.method') for name in without)} cannot be none alone: image, "
            f"label and logits share one grid",
            f"set {asked.key('resample_image.method')} and leave the others",
        )
    return PreprocessingSpec(
        orientation=orientation, transpose=transpose, spacing_mm=spacing, normalization=normalization, **resampling
    )


def _resampling(name: str, spacing: tuple[float | None, ...], asked: Asked) -> ResamplingSpec:
    """Return how one kind of volume is resampled; without resampling of images there is none at all."""
    wanted = getattr(asked.values, name).model_dump(exclude_none=True)
    options = [asked.option(f"{name}.{leaf}") for leaf in wanted]
    if asked.values.resample_image.method == "none":
        wanted.setdefault("method", "none")
    if wanted.get("force_separate") == "auto":
        wanted["force_separate"] = None
    method = wanted.get("method", "spline")
    for leaf, value in _FIXED.get(method, {}).items():
        if wanted.setdefault(leaf, value) != value:
            how = "is linear, and nearest along a separate axis" if method == "torch" else "interpolates nothing"
            raise InputError(
                f"{asked.key(f'{name}.{leaf}')} is {wanted[leaf]}, but the method {method} {how}",
                f"leave {leaf} out, or use the method spline",
            )
    spec = ResamplingSpec.model_validate(_NNUNET[name].model_dump() | wanted) if wanted else _NNUNET[name]
    said = {leaf: asked.note(f"{name}.{leaf}", "auto" if value is None else value) for leaf, value in spec}
    asked.trace.decide(
        f"{asked.name}.{name}",
        said,
        name,
        "volumes" if len(spacing) == 3 else "pictures",
        *options,
        target_spacing_mm=["the case's own" if mm is None else mm for mm in spacing],
        separate_threshold=spec.separate_threshold,
    )
    return spec
