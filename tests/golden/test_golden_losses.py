"""Losses, gradients and optimiser steps against the reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from segfit.labels import LabelScheme
from segfit.networks.unet import build_network
from segfit.nnunet.weights import from_nnunet, to_nnunet
from segfit.specs import NetworkSpec, TrainingSpec
from segfit.training.batch import Batch
from segfit.training.loss import SegmentationLoss, shrink_target
from segfit.training.schedule import poly_learning_rate

pytestmark = pytest.mark.golden("losses")


def entries(folder: Path, name: str) -> list[dict[str, Any]]:
    result: list[dict[str, Any]] = json.loads((folder / "losses" / name).read_text())
    return result


def scheme_of(entry: dict[str, Any], outputs: int) -> LabelScheme:
    regions, ignore = entry.get("regions"), entry["ignore_label"]
    labels: dict[str, Any] = {"background": 0}
    if regions:
        labels |= {f"region {i}": values for i, values in enumerate(regions)}
    else:
        labels |= {f"label {value}": value for value in range(1, outputs)}
    if ignore is not None:
        labels["ignore"] = ignore
    return LabelScheme.from_declaration(labels, list(range(1, len(regions) + 1)) if regions else None)


def assert_gradient(gradient: Tensor, expected: np.ndarray) -> None:
    torch.testing.assert_close(gradient, torch.from_numpy(expected), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("channels_last", [False, True])
def test_values_and_gradients(golden: Path, channels_last: bool) -> None:
    seen = 0
    with np.load(golden / "losses" / "losses.npz") as arrays:
        for entry in entries(golden, "losses.json"):
            name = entry["name"]
            if name.startswith("ds_"):
                continue
            logits = torch.from_numpy(arrays[f"{name}_logits"])
            if channels_last:
                logits = logits.movedim(1, -1).contiguous().movedim(-1, 1)
            logits.requires_grad_()
            target = torch.from_numpy(arrays[f"{name}_labels" if "regions" in entry else f"{name}_target"])
            loss = SegmentationLoss(
                scheme_of(entry, logits.shape[1]), entry["batch_dice"], strides=[(1,) * (logits.ndim - 2)] * 3
            )
            value = loss(logits, Batch(logits, target))
            assert value.item() == pytest.approx(entry["loss"], rel=1e-5), name
            scheme, strides = scheme_of(entry, logits.shape[1]), [(1,) * (logits.ndim - 2)] * 3
            terms = [
                SegmentationLoss(scheme, entry["batch_dice"], strides, TrainingSpec(loss=term))
                for term in ("ce", "dice")
            ]
            apart = sum(term(logits, Batch(logits, target)).item() for term in terms)
            assert apart == pytest.approx(entry["loss"], rel=1e-5), name
            (gradient,) = torch.autograd.grad(value, logits)
            assert_gradient(gradient, arrays[f"{name}_gradient"])
            seen += 1
    assert seen


def test_deep_supervision(golden: Path) -> None:
    seen = 0
    with np.load(golden / "losses" / "losses.npz") as arrays:
        for entry in entries(golden, "losses.json"):
            if not entry["name"].startswith("ds_"):
                continue
            name, levels = entry["name"].removesuffix("_outputs"), len(entry["weights"])
            outputs = [torch.from_numpy(arrays[f"{name}_logits_{i}"]).requires_grad_() for i in range(levels)]
            targets = [torch.from_numpy(arrays[f"{name}_target_{i}"]) for i in range(levels)]
            for shape, target in zip(entry["target_shapes"], targets, strict=True):
                assert torch.equal(shrink_target(targets[0], shape[2:]), target)
            scheme = scheme_of({"ignore_label": None}, outputs[0].shape[1])
            loss = SegmentationLoss(scheme, entry["batch_dice"], entry["strides"])
            assert loss.weights == pytest.approx(entry["weights"][:-1], rel=1e-12)
            value = loss(outputs, Batch(outputs[0], targets[0]))
            assert value.item() == pytest.approx(entry["loss"], rel=1e-5)
            value.backward()
            for i, output in enumerate(outputs):
                assert (output.grad is None) == entry["gradient_is_none"][i]
                if output.grad is not None:
                    assert_gradient(output.grad, arrays[f"{name}_gradient_{i}"])
                assert loss(output, Batch(output, targets[i])).item() == pytest.approx(
                    entry["losses_per_output"][i], rel=1e-5
                )
            seen += 1
    assert seen


@pytest.mark.parametrize("channels_last", [False, True])
def test_five_optimiser_steps(golden: Path, channels_last: bool) -> None:
    entry = json.loads((golden / "losses" / "training_steps.json").read_text())
    arguments = entry["architecture"]
    with np.load(golden / "losses" / "training_steps.npz") as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files}
    heads = arrays["start/decoder.seg_layers.1.bias"].shape[0]
    spec = NetworkSpec(
        kind="plain",
        ndim=3,
        in_channels=arrays["step0/data"].shape[1],
        num_outputs=heads,
        features=tuple(arguments["features_per_stage"]),
        strides=tuple(map(tuple, arguments["strides"])),
        kernels=tuple(map(tuple, arguments["kernel_sizes"])),
        encoder_convs=tuple(arguments["n_conv_per_stage"]),
        decoder_convs=tuple(arguments["n_conv_per_stage_decoder"]),
    )
    start, end = (
        {key.removeprefix(f"{when}/"): value for key, value in arrays.items() if key.startswith(f"{when}/")}
        for when in ("start", "end")
    )
    network = build_network(spec, deep_supervision=True)
    network.load_state_dict(from_nnunet(start, spec))
    if channels_last:
        network = network.to(memory_format=torch.channels_last_3d)
    loss = SegmentationLoss(scheme_of({"ignore_label": None}, heads), arguments.get("batch_dice", False), spec.strides)
    network.num_heads = loss.num_heads
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-2, momentum=0.99, nesterov=True, weight_decay=3e-5)
    for number, step in enumerate(entry["steps"]):
        rate = poly_learning_rate(step["epoch"] / entry["num_epochs"])
        assert rate == pytest.approx(step["lr"], rel=1e-12)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        data = arrays[f"step{number}/data"]
        if channels_last:
            data = data.contiguous(memory_format=torch.channels_last_3d)
        value = loss(network(data), Batch(data, arrays[f"step{number}/target"]))
        assert value.item() == pytest.approx(step["loss"], rel=1e-5 if number == 0 else 1e-3)
        value.backward()
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), 12)
        assert norm.item() == pytest.approx(step["gradient_norm_before_clipping"], rel=1e-4 if number == 0 else 1e-2)
        optimizer.step()
    result = to_nnunet(network.state_dict(), spec)
    parameters = to_nnunet(dict(network.named_parameters()), spec)
    untrained = {key for key, value in parameters.items() if value.grad is None}
    assert untrained == set(entry["parameters_without_gradient"])
    for key, value in end.items():
        torch.testing.assert_close(result[key], value, rtol=0, atol=1e-3, msg=key)
