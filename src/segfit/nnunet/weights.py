"""State dicts of nnU-Net's networks, there and back.

nnU-Net registers its encoder twice and every normalised convolution twice more, so its files hold each encoder
tensor under four names and each decoder tensor under two. Writing gives all of them, sharing one storage, because the
reference loads strictly; reading takes any of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from segfit.errors import InputError
from segfit.networks.unet import UNet
from segfit.specs import NetworkSpec

__all__ = ["from_nnunet", "nnunet_keys", "our_names", "to_nnunet"]

_AFFINE, _RUNNING = ("weight", "bias"), ("running_mean", "running_var")
_COUNTER = ".num_batches_tracked"  # beside the running statistics of a batch normalisation; nothing depends on it
_WRAPPERS = re.compile(r"^((module|_orig_mod)\.)+")  # before every key of data-parallel and of compiled modules


def nnunet_keys(spec: NetworkSpec) -> dict[str, str]:
    """Return nnU-Net's key -> our key for every tensor and alias, in the order of nnU-Net's state dict."""
    keys: dict[str, str] = {}
    encoder = tuple(_encoder_units(spec))
    norm = _AFFINE if spec.norm == "instance" else _AFFINE + _RUNNING
    for root in ("encoder.", "decoder.encoder."):
        for theirs, ours, bias in encoder:
            keys.update(_unit(root + theirs, ours, norm, bias=bias))
    for level, convs in enumerate(spec.decoder_convs):
        for unit in range(convs):
            keys.update(_unit(f"decoder.stages.{level}.convs.{unit}", f"decoder.{level}.{unit}", norm, bias=True))
    for theirs, ours in (("transpconvs", "upsample"), ("seg_layers", "heads")):
        for level in range(len(spec.decoder_convs)):
            for tensor in ("weight", "bias"):
                keys[f"decoder.{theirs}.{level}.{tensor}"] = f"{ours}.{level}.{tensor}"
    return keys


def _encoder_units(spec: NetworkSpec) -> Iterator[tuple[str, str, bool]]:
    """Yield (reference's prefix, our prefix, has a bias) of the encoder's convolution units."""
    if spec.kind == "plain":
        for stage, convs in enumerate(spec.encoder_convs):
            for unit in range(convs):
                yield f"stages.{stage}.0.convs.{unit}", f"encoder.{stage}.{unit}", True
        return
    yield "stem.convs.0", "stem", True
    width = spec.features[0]
    for stage, (features, blocks) in enumerate(zip(spec.features, spec.encoder_convs, strict=True)):
        for block in range(blocks):
            theirs, ours = f"stages.{stage}.blocks.{block}", f"encoder.{stage}.{block}"
            yield f"{theirs}.conv1", f"{ours}.first", True
            yield f"{theirs}.conv2", f"{ours}.second", True
            if width != features:
                position = int(any(step != 1 for step in spec.strides[stage]))  # after the pooling, if there is one
                yield f"{theirs}.skip.{position}", f"{ours}.shortcut", False
            width = features


def _unit(theirs: str, ours: str, norm: tuple[str, ...], *, bias: bool) -> Iterator[tuple[str, str]]:
    conv = ("weight", "bias") if bias else ("weight",)
    for names in (("conv", "norm"), ("all_modules.0", "all_modules.1")):
        for tensor in conv:
            yield f"{theirs}.{names[0]}.{tensor}", f"{ours}.conv.{tensor}"
        for tensor in norm:
            yield f"{theirs}.{names[1]}.{tensor}", f"{ours}.norm.{tensor}"


def our_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights of an unknown network under our keys; what is not of a U-Net is left out.

    They may be named as nnU-Net's or as ours.
    """
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        name = _WRAPPERS.sub("", name)
        name = re.sub(r"^decoder\.encoder\.", "encoder.", name)
        name = re.sub(r"\ball_modules\.0\.", "conv.", name)
        name = re.sub(r"\ball_modules\.1\.", "norm.", name)
        for theirs, ours in _THEIR_NAMES:
            name = theirs.sub(ours, name)
        if _OUR_NAME.fullmatch(name):
            result.setdefault(name, tensor)
    return result


_THEIR_NAMES = [
    (re.compile(theirs), ours)
    for theirs, ours in (
        (r"^encoder\.stem\.convs\.0\.", "stem."),
        (r"^encoder\.stages\.(\d+)\.0\.convs\.(\d+)\.", r"encoder.\1.\2."),
        (r"^encoder\.stages\.(\d+)\.blocks\.(\d+)\.conv1\.", r"encoder.\1.\2.first."),
        (r"^encoder\.stages\.(\d+)\.blocks\.(\d+)\.conv2\.", r"encoder.\1.\2.second."),
        (r"^encoder\.stages\.(\d+)\.blocks\.(\d+)\.skip\.[01]\.", r"encoder.\1.\2.shortcut."),
        (r"^decoder\.stages\.(\d+)\.convs\.(\d+)\.", r"decoder.\1.\2."),
        (r"^decoder\.transpconvs\.(\d+)\.", r"upsample.\1."),
        (r"^decoder\.seg_layers\.(\d+)\.", r"heads.\1."),
    )
]
_OUR_NAME = re.compile(
    r"(stem|encoder\.\d+\.\d+(\.(first|second|shortcut))?|decoder\.\d+\.\d+)\.(conv|norm)\.(weight|bias)"
    r"|(upsample|heads)\.\d+\.(weight|bias)"
)


def to_nnunet(state: Mapping[str, Tensor], spec: NetworkSpec) -> dict[str, Tensor]:
    """Return the state dict under nnU-Net's keys, aliases included; tensors are shared, not copied."""
    result: dict[str, Tensor] = {}
    for theirs, ours in nnunet_keys(spec).items():
        result[theirs] = state[ours]
        if theirs.endswith("." + _RUNNING[-1]):
            result[theirs.rpartition(".")[0] + _COUNTER] = torch.zeros((), dtype=torch.int64)
    return result


def from_nnunet(state: Mapping[str, Tensor], spec: NetworkSpec) -> dict[str, Tensor]:
    """Return the state dict under our keys; raise `InputError` if it does not belong to this network."""
    keys = nnunet_keys(spec)
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        ours = keys.get(_WRAPPERS.sub("", name))
        if ours is None and spec.norm == "batch" and name.endswith(_COUNTER):
            continue
        if ours is None:
            raise InputError(f"the weights hold {name!r}, which this {spec.kind} {spec.ndim}D U-Net does not have")
        result.setdefault(ours, tensor)
    with torch.device("meta"):
        expected = UNet(spec, deep_supervision=False).state_dict()
    names = {ours: theirs for theirs, ours in reversed(keys.items())}
    for ours, tensor in expected.items():
        if ours not in result:
            raise InputError(f"the weights lack {names[ours]!r}, which this {spec.kind} {spec.ndim}D U-Net needs")
        came, asked = tuple(result[ours].shape), tuple(tensor.shape)
        if came != asked:
            raise InputError(f"the weights {names[ours]!r} have shape {came}, the plans ask for {asked}")
    return {name: result[name] for name in expected}
