from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor

from segfit.errors import InputError
from segfit.networks.unet import build_network
from segfit.nnunet.weights import from_nnunet, to_nnunet
from segfit.specs import NetworkSpec


def make(
    kind: Literal["plain", "residual"], norm: Literal["instance", "batch"] = "instance"
) -> tuple[NetworkSpec, dict[str, Tensor]]:
    spec = NetworkSpec(
        kind=kind,
        norm=norm,
        ndim=2,
        in_channels=1,
        num_outputs=2,
        features=(4, 8),
        strides=((1, 1), (2, 2)),
        kernels=((3, 3), (3, 3)),
        encoder_convs=(2, 1),
        decoder_convs=(2,),
    )
    return spec, build_network(spec, deep_supervision=False).state_dict()


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", ["plain", "residual"])
def test_there_and_back(kind: Literal["plain", "residual"]) -> None:
    spec, state = make(kind)
    theirs = to_nnunet(state, spec)
    assert same(from_nnunet(theirs, spec), state)
    storages = {tensor.data_ptr() for tensor in theirs.values()}
    assert storages == {tensor.data_ptr() for tensor in state.values()}


def test_any_alias_and_wrappers_are_read() -> None:
    spec, state = make("plain")
    theirs = to_nnunet(state, spec)
    only_aliases = {
        key: value
        for key, value in theirs.items()
        if "all_modules" in key or "transpconvs" in key or "seg_layers" in key
    }
    assert same(from_nnunet(only_aliases, spec), state)
    wrapped = {f"module._orig_mod.{key}": value for key, value in theirs.items()}
    assert same(from_nnunet(wrapped, spec), state)


def test_wrong_weights_are_refused_with_the_name() -> None:
    spec, state = make("residual")
    theirs = to_nnunet(state, spec)
    missing = {key: value for key, value in theirs.items() if "transpconvs.0.bias" not in key}
    with pytest.raises(InputError, match=r"lack 'decoder\.transpconvs\.0\.bias'"):
        from_nnunet(missing, spec)
    with pytest.raises(InputError, match=r"'encoder\.stages\.9\.weight'.*residual 2D"):
        from_nnunet(theirs | {"encoder.stages.9.weight": torch.zeros(1)}, spec)
    with pytest.raises(InputError, match=r"'decoder\.seg_layers\.0\.bias' have shape \(7,\), the plans ask for \(2,\)"):
        from_nnunet(theirs | {"decoder.seg_layers.0.bias": torch.zeros(7)}, spec)


@pytest.mark.parametrize("kind", ["plain", "residual"])
def test_batch_norm_there_and_back(kind: Literal["plain", "residual"]) -> None:
    spec, state = make(kind, "batch")
    theirs = to_nnunet(state, spec)
    norms = {name.rpartition(".")[0] for name in theirs if name.endswith("running_var")}
    assert norms
    for name in norms:
        reference = set(torch.nn.BatchNorm2d(1).state_dict())
        assert {key.rpartition(".")[2] for key in theirs if key.rpartition(".")[0] == name} == reference
    assert same(from_nnunet(theirs, spec), state)
    with pytest.raises(InputError, match="running_mean"):
        from_nnunet(theirs, make(kind)[0])
