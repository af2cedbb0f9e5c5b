"""A U-Net written as an ONNX model, for runtimes other than torch. Needs the package onnx.

The graph is written from the modules, node by node, and not traced: it says what the network is, whatever layout or
kernels torch runs it with, and is the same with every version of torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from segfit.networks.blocks import EPSILON, SLOPE, BatchNorm, ConvUnit, ResidualBlock
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
        x = INPUT if isinstance(network.stem, nn.Identity) else self.block(INPUT, network.stem)
        skips = []
        for stage in network.encoder:
            for block in stage.children():
                x = self.block(x, block)
            skips.append(x)
        skips.pop()
        for upsample, blocks in zip(network.upsample, network.decoder, strict=True):
            x = self.add("ConvTranspose", x, *_parameters(upsample), strides=list(upsample.stride))  # type: ignore[arg-type]
            x = self.add("Concat", x, skips.pop(), axis=1)
            for block in blocks.children():
                x = self.block(x, block)
        head: Any = network.heads[-1]
        return self.add("Conv", x, head.weight, head.bias)

    def block(self, x: str, block: nn.Module) -> str:
        """Add a unit of convolution, normalisation and rectifier, or a residual block of two."""
        if isinstance(block, ResidualBlock):
            main = self.block(self.block(x, block.first), block.second)
            if any(step != 1 for step in block.stride):
                x = self.add("AveragePool", x, kernel_shape=list(block.stride), strides=list(block.stride))
            if not isinstance(block.shortcut, nn.Identity):
                x = self.block(x, block.shortcut)
            return self.add("LeakyRelu", self.add("Add", main, x), alpha=SLOPE)
        assert isinstance(block, ConvUnit), block
        conv: Any = block.conv
        pads = [*conv.padding, *conv.padding]
        x = self.add("Conv", x, *_parameters(conv), strides=list(conv.stride), pads=pads)
        norm: Any = block.norm
        if isinstance(norm, BatchNorm):
            statistics = norm.weight, norm.bias, norm.running_mean, norm.running_var
            x = self.add("BatchNormalization", x, *statistics, epsilon=EPSILON)
        else:
            x = self.add("InstanceNormalization", x, norm.weight, norm.bias, epsilon=EPSILON)
        return self.add("LeakyRelu", x, alpha=SLOPE) if block.activate else x


def _parameters(layer: Any) -> tuple[Tensor, ...]:
    """Return weight and, where there is one, bias."""
    return (layer.weight,) if layer.bias is None else (layer.weight, layer.bias)
