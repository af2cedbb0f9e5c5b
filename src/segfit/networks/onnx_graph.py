"""A U-Net written as an ONNX model, for runtimes other than torch. Needs the package onnx.

The graph is written from the modules, node by node, and not traced: it says what the network is, whatever layout or
kernels torch runs it with, and is the same with every version of torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from segfit.networks.blocks import EPSILON, SLOPE, BatchNorm, ConvUnit, MedNeXtBlock, ResidualBlock
from segfit.networks.unet import UNet

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["INPUT", "OUTPUT", "as_onnx"]

INPUT, OUTPUT = "views", "logits"
_OPSET, _IR = 17, 8  # of 2022: read by all runtimes of today


def as_onnx(network: UNet, patch: Sequence[int], batch: int | None = None) -> ModelProto:
    """Return a network with one output as a model of `batch` views ``(b, c, *patch)``, any number where it is None.

    The model maps `INPUT` to `OUTPUT`, logits ``(b, num_outputs, *patch)``, in float32.
    """
    from onnx import TensorProto, checker, helper

    spec, graph = network.spec, _Graph()
    logits = graph.unet(network)
    graph.nodes[-1].output[0] = OUTPUT
    assert logits == graph.last
    number = "b" if batch is None else batch
    given, wanted = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [number, channels, *patch])
        for name, channels in ((INPUT, spec.in_channels), (OUTPUT, spec.num_outputs))
    )
    whole = helper.make_graph(graph.nodes, "network", [given], [wanted], graph.weights)
    model = helper.make_model(whole, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR)
    checker.check_model(model)
    return model


class _Graph:
    """Nodes in the order in which they are computed, each with one output, and the weights they take."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.weights: list[Any] = []

    @property
    def last(self) -> str:
        """Name of the output of the last node as it was added."""
        return f"x{len(self.nodes)}"

    def add(self, kind: str, *inputs: str | Tensor, **attributes: Any) -> str:
        """Add a node that takes outputs of others and weights; return the name of its output."""
        from onnx import helper, numpy_helper

        names = []
        for item in inputs:
            if isinstance(item, Tensor):
                self.weights.append(numpy_helper.from_array(item.detach().cpu().float().contiguous().numpy()))
                self.weights[-1].name = f"w{len(self.weights)}"
                names.append(self.weights[-1].name)
            else:
                names.append(item)
        output = f"x{len(self.nodes) + 1}"
        self.nodes.append(helper.make_node(kind, names, [output], **attributes))
        return output

    def unet(self, network: UNet) -> str:
        """Add what `UNet.forward` does."""
        x, skips, mednext = self.block(INPUT, network.stem), [], network.spec.kind == "mednext"
        for stage in network.encoder:
            for block in stage.children():
                x = self.block(x, block)
            skips.append(x)
        skips.pop()
        for upsample, blocks in zip(network.upsample, network.decoder, strict=True):
            x = self.block(x, upsample)
            x = self.add("Add", x, skips.pop()) if mednext else self.add("Concat", x, skips.pop(), axis=1)
            for block in blocks.children():
                x = self.block(x, block)
        head: Any = network.heads[-1]
        return self.add("Conv", x, head.weight, head.bias)

    def block(self, x: str, block: Any) -> str:
        """Add a convolution, a unit of it with normalisation and rectifier, or a residual or MedNeXt's block."""
        if isinstance(block, ResidualBlock):
            main = self.block(self.block(x, block.first), block.second)
            if any(step != 1 for step in block.stride):
                x = self.add("AveragePool", x, kernel_shape=list(block.stride), strides=list(block.stride))
            return self.add("LeakyRelu", self.add("Add", main, self.block(x, block.shortcut)), alpha=SLOPE)
        if isinstance(block, MedNeXtBlock):
            wide = self.block(self.normalized(self.block(x, block.conv), block.norm), block.expand)
            main = self.block(self.gelu(wide), block.compress)
            return self.add("Add", main, self.block(x, block.shortcut))
        if isinstance(block, ConvUnit):
            x = self.normalized(self.block(x, block.conv), block.norm)
            return self.add("LeakyRelu", x, alpha=SLOPE) if block.activate else x
        if isinstance(block, nn.Identity):
            return x
        parameters = (block.weight,) if block.bias is None else (block.weight, block.bias)
        how = {"strides": list(block.stride), "pads": [*block.padding, *block.padding], "group": block.groups}
        if not block.transposed:
            return self.add("Conv", x, *parameters, **how)
        return self.add("ConvTranspose", x, *parameters, **how, output_padding=list(block.output_padding))

    def normalized(self, x: str, norm: Any) -> str:
        """Add a normalisation."""
        if isinstance(norm, BatchNorm):
            statistics = norm.weight, norm.bias, norm.running_mean, norm.running_var
            return self.add("BatchNormalization", x, *statistics, epsilon=EPSILON)
        return self.add("InstanceNormalization", x, norm.weight, norm.bias, epsilon=EPSILON)

    def gelu(self, x: str) -> str:
        """Add a Gaussian error linear unit, which is no operator of its own yet."""
        share = self.add("Add", self.add("Erf", self.add("Mul", x, torch.tensor(sqrt(0.5)))), torch.tensor(1.0))
        return self.add("Mul", self.add("Mul", x, torch.tensor(0.5)), share)
