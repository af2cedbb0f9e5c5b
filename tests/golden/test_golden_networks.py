"""Networks against the reference: names, shapes, counts, outputs, initialisation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from segfit.networks.unet import UNet, build_network
from segfit.nnunet.weights import from_nnunet, nnunet_keys, to_nnunet
from segfit.specs import NetworkSpec

pytestmark = pytest.mark.golden("networks")


def spec_of(entry: dict[str, Any]) -> NetworkSpec:
    arguments = entry["architecture"]["arch_kwargs"]
    residual = "ResidualEncoder" in entry["architecture"]["network_class_name"]
    return NetworkSpec(
        kind="residual" if residual else "plain",
        ndim=len(arguments["strides"][0]),
        in_channels=entry["input_channels"],
        num_outputs=entry["num_classes"],
        features=tuple(arguments["features_per_stage"]),
        strides=tuple(tuple(v) for v in arguments["strides"]),
        kernels=tuple(tuple(v) for v in arguments["kernel_sizes"]),
        encoder_convs=tuple(arguments["n_blocks_per_stage" if residual else "n_conv_per_stage"]),
        decoder_convs=tuple(arguments["n_conv_per_stage_decoder"]),
    )


def read(path: Path) -> dict[str, Any]:
    entry: dict[str, Any] = json.loads(path.read_text())
    return entry


def with_aliases(entry: dict[str, Any], weights: Any) -> dict[str, Tensor]:
    aliases = entry["aliases"]
    return {key: torch.from_numpy(weights[aliases.get(key, key)]) for key, _ in entry["state_dict"]}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.golden_each("networks/*_io.npz")
def test_outputs(path: Path, channels_last: bool) -> None:
    name = path.name.removesuffix("_io.npz")
    entry = read(path.with_name(f"{name}.json"))
    spec = spec_of(entry)
    network = build_network(spec, deep_supervision=True)
    with np.load(path.with_name(f"{name}_weights.npz")) as weights:
        network.load_state_dict(from_nnunet(with_aliases(entry, weights), spec))
    with np.load(path) as arrays:
        image = torch.from_numpy(arrays["input"])
        expected = [torch.from_numpy(arrays[f"output_{i}"]) for i in range(len(entry["output_shapes"]))]
    if channels_last:
        memory_format = torch.channels_last if spec.ndim == 2 else torch.channels_last_3d
        network, image = network.to(memory_format=memory_format), image.contiguous(memory_format=memory_format)
    outputs = network(image)
    assert [list(output.shape) for output in outputs] == entry["output_shapes"]
    for output, reference in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, reference, rtol=0, atol=1e-4)
    network.deep_supervision = False
    torch.testing.assert_close(network.eval()(image), expected[0], rtol=0, atol=1e-4)


@pytest.mark.golden_each("networks/**/[!i]*.json")
def test_keys_shapes_and_counts(path: Path) -> None:
    entry = read(path)
    spec = spec_of(entry)
    with torch.device("meta"):
        network = UNet(spec, deep_supervision=True)
    state = to_nnunet(network.state_dict(), spec)
    assert [[key, list(tensor.shape)] for key, tensor in state.items()] == entry["state_dict"]
    assert sum(tensor.numel() for tensor in network.parameters()) == entry["parameters"]
    keys = nnunet_keys(spec)
    assert all(keys[alias] == keys[original] for alias, original in entry["aliases"].items())
    # the reference's distinct parameters in first-seen order are ours in order
    assert list(dict.fromkeys(keys.values())) == list(network.state_dict())
    assert [name for name, _ in network.named_parameters()] == list(network.state_dict())


def test_initialisation_statistics(golden: Path) -> None:
    for entry in json.loads((golden / "networks" / "initialisation_statistics.json").read_text()):
        spec = spec_of(entry)
        network = build_network(spec, deep_supervision=True, generator=torch.Generator().manual_seed(1))
        state = to_nnunet(network.state_dict(), spec)
        for row in entry["tensors"]:
            tensor = state[row["key"]]
            assert list(tensor.shape) == row["shape"]
            if row["constant"]:
                assert tensor.eq(row["mean"]).all(), row["key"]
            elif tensor.numel() > 1000:
                assert float(tensor.std()) == pytest.approx(row["std"], rel=0.05), row["key"]
                assert abs(float(tensor.mean())) < 5 * row["std"] / tensor.numel() ** 0.5, row["key"]
