"""Weights of one network for another: which layers fit, and what of the heads belongs to which class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from segfit.errors import InputError
from segfit.labels import LabelScheme
from segfit.specs import NetworkSpec

__all__ = ["Transfer", "network_of", "output_names", "transfer"]

_HEADS = "heads."


@dataclass(frozen=True, slots=True, eq=False)
class Transfer:
    """What a network takes over.

    Parameters
    ----------
    tensors : by name, in full: rows of heads that came stand among those that were there
    fitted, anew : layers that came as a whole, and those that did not; a head that got the rows of some classes counts
        as `anew`
    kept, added, dropped : classes whose rows came, that have none, and that the network does not have any more
    """

    tensors: Mapping[str, Tensor]
    fitted: tuple[str, ...]
    anew: tuple[str, ...]
    kept: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()


def output_names(labels: LabelScheme) -> tuple[str, ...]:
    """Return the class of every output, background by that name."""
    return (*(() if labels.has_regions else ("background",)), *(one.name for one in labels.classes))


def _compared(labels: LabelScheme) -> tuple[str, ...]:
    return tuple(name.strip().casefold() for name in output_names(labels))


def transfer(
    state: Mapping[str, Tensor],
    network: nn.Module,
    labels: LabelScheme,
    *,
    source: LabelScheme | None,
    heads: bool = True,
) -> Transfer:
    """Return what a network takes of the weights of another one; it is not changed.

    A tensor comes if there is one of its name and shape. Rows of heads come by the name of their class, if both
    networks have exclusive labels, or both regions.

    Parameters
    ----------
    state : of the other network, by the names of ours
    labels : of the network
    source : labels of the other one; None: they are not known, and its outputs are taken to be the same
    heads : False: the outputs of the other network are no classes, and none comes
    """
    own = network.state_dict()
    rows = _rows(labels, source) if heads else {}
    tensors: dict[str, Tensor] = {}
    partial: set[str] = set()
    for name, tensor in own.items():
        came = state.get(name)
        if came is None or not name.startswith(_HEADS):
            if came is not None and came.shape == tensor.shape:
                tensors[name] = came
            continue
        if not rows or came.shape[1:] != tensor.shape[1:] or max(rows.values()) >= len(came):
            continue
        if len(rows) < len(tensor):
            partial.add(_layer(name))
        merged = tensor.clone()
        merged[list(rows)] = came[list(rows.values())].to(merged)
        tensors[name] = merged
    layers = dict.fromkeys(_layer(name) for name in own)
    whole = {layer for layer in layers if all(name in tensors for name in own if _layer(name) == layer)} - partial
    given = () if source is None or not heads else zip(output_names(source), _compared(source), strict=True)
    names = output_names(labels)
    foreground = range(0 if labels.has_regions else 1, len(names))
    kept = any(name.startswith(_HEADS) for name in tensors)
    return Transfer(
        tensors=tensors,
        fitted=tuple(layer for layer in layers if layer in whole),
        anew=tuple(layer for layer in layers if layer not in whole),
        kept=tuple(names[row] for row in foreground if row in rows and kept),
        added=tuple(names[row] for row in foreground if row not in rows or not kept),
        dropped=tuple(name for name, compared in given if compared not in _compared(labels)),
    )


def _rows(labels: LabelScheme, source: LabelScheme | None) -> dict[int, int]:
    """Return for outputs of a network which one of another network they are."""
    names = _compared(labels)
    if source is None:
        return {row: row for row in range(len(names))}
    if labels.has_regions != source.has_regions:
        return {}
    places = {name: row for row, name in enumerate(_compared(source))}
    rows = {row: places[name] for row, name in enumerate(names) if name in places}
    return rows if labels.has_regions or len(rows) > 1 else {}  # background alone is no head


def _layer(name: str) -> str:
    return name.rpartition(".")[0]


def network_of(state: Mapping[str, Tensor]) -> NetworkSpec:
    """Return the network that weights belong to, told by their names (ours) and shapes.

    An encoder alone gets a decoder of one convolution a level, and halves the size at every stage. Raises `InputError`
    for weights of another kind.
    """
    try:
        return _network_of(state)
    except (KeyError, ValueError, IndexError):
        raise InputError("the weights are not those of a U-Net as nnU-Net and segfit build it") from None


def _network_of(state: Mapping[str, Tensor]) -> NetworkSpec:
    stages = _count(state, "encoder")
    residual = "stem.conv.weight" in state
    inner = "first.conv.weight" if residual else "conv.weight"
    first = [state[f"encoder.{stage}.0.{inner}"] for stage in range(stages)]
    kernels = [tuple(tensor.shape[2:]) for tensor in first]
    ndim = len(kernels[0])
    decoder = _count(state, "decoder")
    whole = decoder == stages - 1
    strides: list[Sequence[int]] = [(1,) * ndim]
    for stage in range(1, stages):
        up = state.get(f"upsample.{stages - 1 - stage}.weight") if whole else None
        strides.append((2,) * ndim if up is None else tuple(up.shape[2:]))
    last = state.get(f"heads.{stages - 2}.weight")
    return NetworkSpec(
        kind="residual" if residual else "plain",
        ndim=2 if ndim == 2 else 3,
        in_channels=(state["stem.conv.weight"] if residual else first[0]).shape[1],
        num_outputs=2 if last is None else len(last),
        features=tuple(len(tensor) for tensor in first),
        strides=tuple(strides),
        kernels=tuple(kernels),
        encoder_convs=tuple(_count(state, f"encoder.{stage}") for stage in range(stages)),
        decoder_convs=tuple(_count(state, f"decoder.{level}") for level in range(decoder))
        if whole
        else (1,) * (stages - 1),
    )


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    """Return how many numbered modules there are; `ValueError` if one is missing."""
    found = {int(name.removeprefix(f"{prefix}.").partition(".")[0]) for name in state if name.startswith(f"{prefix}.")}
    if found != set(range(len(found))):
        raise ValueError(prefix)
    return len(found)
