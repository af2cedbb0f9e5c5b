"""Closed form of the memory estimate: how many feature-map elements one sample makes in the forward pass.

nnU-Net counts the outputs of convolutions, transposed convolutions and segmentation heads of a built network;
the sums below give the same integers without building one. What the number means in GB is calibrated per preset
(`segfit.planning.presets`).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from segfit.options import NetworkKind
from segfit.specs import NetworkSpec

__all__ = ["feature_map_elements", "network_elements"]


def network_elements(network: NetworkSpec, patch: Sequence[int], heads: int) -> int:
    """Return the number of feature-map elements of one sample of `patch` voxels; `heads` as below."""
    return feature_map_elements(
        network.kind,
        patch,
        features=network.features,
        strides=network.strides,
        encoder_convs=network.encoder_convs,
        decoder_convs=network.decoder_convs,
        heads=heads,
        expansion=network.expansion,
    )


def feature_map_elements(
    kind: NetworkKind,
    patch: Sequence[int],
    *,
    features: Sequence[int],
    strides: Sequence[Sequence[int]],
    encoder_convs: Sequence[int],
    decoder_convs: Sequence[int],
    heads: int,
    deep_supervision: bool = False,
    expansion: int = 2,
) -> int:
    """Return the number of feature-map elements of one sample, an exact integer.

    Parameters
    ----------
    patch : input size in voxels
    features, strides, encoder_convs : per stage, full resolution first
    decoder_convs : per decoder level, lowest resolution first
    heads : channels of the segmentation output; nnU-Net's planner puts the number of declared labels here
    deep_supervision : count every head instead of the top one; nnU-Net's planner counts the top one
    expansion : of features within the blocks of a MedNeXt
    """
    stages = len(features)
    sizes: list[tuple[int, ...]] = []
    size = tuple(patch)
    for stride in strides:
        size = tuple([n // s for n, s in zip(size, stride, strict=True)])
        sizes.append(size)
    voxels = [prod(size) for size in sizes]
    maps = [f * v for f, v in zip(features, voxels, strict=True)]

    if kind == "mednext":
        total = _mednext_elements(features, voxels, encoder_convs, decoder_convs, expansion)
    elif kind == "plain":
        total = sum(n * m for n, m in zip(encoder_convs, maps, strict=True))
    else:
        total = features[0] * prod(patch) + sum(2 * n * m for n, m in zip(encoder_convs, maps, strict=True))
        previous = (features[0], tuple(patch))
        for stage in range(stages):
            current = (features[stage], sizes[stage])
            if current != previous:  # the first block of the stage adapts its skip path
                total += maps[stage]
            previous = current
    if kind != "mednext":
        total += sum((decoder_convs[stages - 2 - stage] + 1) * maps[stage] for stage in range(stages - 1))
    if stages > 1:
        total += heads * sum(voxels[: stages - 1] if deep_supervision else voxels[:1])
    return total


def _mednext_elements(
    features: Sequence[int],
    voxels: Sequence[int],
    encoder_convs: Sequence[int],
    decoder_convs: Sequence[int],
    expansion: int,
) -> int:
    """Return the elements of stem and blocks; a block that changes the resolution has a convolution for its shortcut.

    Stages are taken to differ from the one before in features or size.
    """
    stages = len(features)
    total = features[0] * voxels[0]
    for stage, count in enumerate(encoder_convs):
        blocks = count + (decoder_convs[stages - 2 - stage] if stage < stages - 1 else 0)
        total += blocks * (2 + expansion) * features[stage] * voxels[stage]
        neighbours = [near for near in (stage - 1, stage + 1) if 0 <= near < stages]  # from above, and from below
        total += sum(((1 + expansion) * features[near] + 2 * features[stage]) * voxels[stage] for near in neighbours)
    return total
