"""What a network takes over from the weights of another one."""

from __future__ import annotations

import pytest
import torch

from segfit.errors import InputError
from segfit.labels import LabelScheme
from segfit.networks.transfer import Transfer, network_of, transfer
from segfit.networks.unet import UNet, build_network
from segfit.nnunet.weights import our_names, to_nnunet
from segfit.specs import NetworkSpec

OLD = LabelScheme.from_declaration({"background": 0, "Liver": 1, "tumour": 2})
NEW = LabelScheme.from_declaration({"background": 0, "spleen": 1, "liver": 2, "kidney": 3})
REGIONS = LabelScheme.from_declaration({"background": 0, "whole": [1, 2], "core": [2]}, [1, 2])


def spec(
    *, kind: str = "plain", ndim: int = 2, outputs: int = 3, features: tuple[int, ...] = (4, 6, 8), channels: int = 1
) -> NetworkSpec:
    """Three stages, with strides and kernels that differ by axis."""
    return NetworkSpec(
        kind=kind,
        ndim=ndim,
        in_channels=channels,
        num_outputs=outputs,
        features=features,
        strides=((1,) * ndim, (1,) * (ndim - 1) + (2,), (2,) * ndim),
        kernels=((1,) * (ndim - 1) + (3,), (3,) * ndim, (3,) * ndim),
        encoder_convs=(1, 2, 2),
        decoder_convs=(2, 1),
    )


def network(item: NetworkSpec, seed: int = 0) -> UNet:
    return build_network(item, deep_supervision=True, generator=torch.Generator().manual_seed(seed))


def taken(old: LabelScheme | None, new: LabelScheme, *, heads: bool = True) -> tuple[UNet, UNet, Transfer]:
    """Return a network, another one that starts from it, and what that takes over."""
    before = network(spec(outputs=3 if old is None else old.num_outputs), seed=1)
    after = network(spec(outputs=new.num_outputs), seed=2)
    return before, after, transfer(before.state_dict(), after, new, source=old, heads=heads)


def test_rows_of_heads_come_by_the_name_of_their_class() -> None:
    before, after, found = taken(OLD, NEW)
    for part in ("weight", "bias"):
        for level in range(2):
            name = f"heads.{level}.{part}"
            head, source, own = found.tensors[name], before.state_dict()[name], after.state_dict()[name]
            assert torch.equal(head[0], source[0])  # background
            assert torch.equal(head[2], source[1])  # liver
            assert torch.equal(head[[1, 3]], own[[1, 3]])
    assert (found.kept, found.added, found.dropped) == (("liver",), ("spleen", "kidney"), ("tumour",))
    assert found.anew == ("heads.0", "heads.1")
    body = {name: tensor for name, tensor in before.state_dict().items() if not name.startswith("heads.")}
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in body.items())
    assert len(found.fitted) == len({name.rpartition(".")[0] for name in body})


def test_equal_labels_take_all_over() -> None:
    before, _, found = taken(OLD, OLD)
    assert found.anew == ()
    assert {name: tensor.tolist() for name, tensor in found.tensors.items()} == {
        name: tensor.tolist() for name, tensor in before.state_dict().items()
    }


@pytest.mark.parametrize(
    ("old", "new", "heads"),
    [
        (OLD, REGIONS, True),  # exclusive labels and regions mean other things
        (OLD, LabelScheme.from_declaration({"background": 0, "spleen": 1}), True),  # background alone is no head
        (OLD, OLD, False),
    ],
)
def test_heads_that_mean_something_else_start_anew(old: LabelScheme, new: LabelScheme, heads: bool) -> None:
    _, _, found = taken(old, new, heads=heads)
    assert not any(name.startswith("heads.") for name in found.tensors)
    assert found.anew == ("heads.0", "heads.1")
    assert found.kept == ()
    assert found.added == tuple(one.name for one in new.classes)


def test_regions_come_by_name() -> None:
    fewer = LabelScheme.from_declaration({"background": 0, "core": [1, 2]}, [1])
    before, _, found = taken(REGIONS, fewer)
    assert torch.equal(found.tensors["heads.1.weight"], before.state_dict()["heads.1.weight"][[1]])
    assert (found.kept, found.dropped) == (("core",), ("whole",))


def test_unknown_outputs_are_taken_as_they_are() -> None:
    before, _, found = taken(None, OLD)
    assert torch.equal(found.tensors["heads.1.bias"], before.state_dict()["heads.1.bias"])
    assert found.kept == ("Liver", "tumour")


def test_of_another_network_comes_what_has_the_same_shape() -> None:
    before, after = network(spec(), seed=1), network(spec(features=(4, 6, 10)), seed=2)
    found = transfer(before.state_dict(), after, OLD, source=OLD)
    assert {"encoder.0.0.conv", "encoder.1.1.norm", "decoder.1.0.conv", "heads.1"} <= set(found.fitted)
    lowest = {f"encoder.2.{unit}.{part}" for unit in range(2) for part in ("conv", "norm")}
    assert set(found.anew) == {*lowest, "upsample.0"}


@pytest.mark.parametrize("kind", ["plain", "residual"])
@pytest.mark.parametrize("ndim", [2, 3])
def test_a_network_is_told_from_its_weights(kind: str, ndim: int) -> None:
    asked = spec(kind=kind, ndim=ndim, outputs=4, channels=2)
    state = network(asked).state_dict()
    assert network_of(state) == asked
    theirs = our_names({f"module.{name}": tensor for name, tensor in to_nnunet(state, asked).items()})
    assert theirs.keys() == state.keys()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in state.items())
    assert our_names(state).keys() == state.keys()


def test_an_encoder_gets_a_decoder() -> None:
    asked = spec(kind="residual")
    encoder = {name: t for name, t in network(asked).state_dict().items() if name.startswith(("stem", "encoder"))}
    found = network_of(encoder)
    assert found.features == asked.features
    assert found.strides == ((1, 1), (2, 2), (2, 2))
    assert found.decoder_convs == (1, 1)


def test_weights_of_another_kind_are_refused() -> None:
    state = network(spec()).state_dict()
    for wrong in (
        {},
        {"layer.weight": torch.zeros(3)},
        {name: t for name, t in state.items() if "encoder.1" not in name},
    ):
        with pytest.raises(InputError, match="not those of a U-Net"):
            network_of(wrong)
