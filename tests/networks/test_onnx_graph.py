from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch
from torch import nn

from segfit.networks.unet import build_network
from segfit.specs import NetworkSpec

onnxruntime = pytest.importorskip("onnxruntime", exc_type=ImportError)


@pytest.mark.parametrize("norm", ["instance", "batch"])
@pytest.mark.parametrize("kind", ["plain", "residual", "mednext"])
@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("batch", [None, 3])
def test_the_graph_computes_what_the_network_does(
    kind: Literal["plain", "residual", "mednext"],
    norm: Literal["instance", "batch"],
    ndim: Literal[2, 3],
    batch: int | None,
) -> None:
    from segfit.networks.onnx_graph import INPUT, OUTPUT, as_onnx

    axis = (1, 2) if ndim == 2 else (1, 2, 2)
    spec = NetworkSpec(
        kind=kind,
        norm=norm,
        ndim=ndim,
        in_channels=2,
        num_outputs=3,
        features=(4, 6, 8),
        strides=((1,) * ndim, axis, (2,) * ndim),
        kernels=((3,) * (ndim - 1) + (5,), (1,) + (3,) * (ndim - 1), (3,) * ndim),
        encoder_convs=(1, 2, 1),
        decoder_convs=(2, 1),
    )
    generator = torch.Generator().manual_seed(0)
    network = build_network(spec, deep_supervision=False, generator=generator).eval()
    for module in network.modules():
        if type(module).__name__ == "BatchNorm":
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    for parameter in network.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, generator=generator)
    patch = (8, 16, 8)[:ndim]
    views = torch.randn(3, 2, *patch, generator=generator)
    with torch.inference_mode():
        expected = network(views).numpy()
    session = onnxruntime.InferenceSession(as_onnx(network, patch, batch).SerializeToString())
    (found,) = session.run([OUTPUT], {INPUT: views.numpy()})
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
