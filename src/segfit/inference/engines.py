"""What runs a network on a processor in place of torch, with the same results but for rounding.

An engine is a function of views as `Predictor` calls it, made of a network of torch. On other devices torch runs all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Lock
from time import perf_counter
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from segfit.errors import InputError, reason_of, warning
from segfit.inference.predictor import Predictor
from segfit.networks.unet import UNet
from segfit.plugins import package_version
from segfit.progress import LOGGED

__all__ = ["Engine", "FasterOf", "Remembering", "engage", "openvino_network", "require_engine"]

Engine = Literal["auto", "torch", "openvino"]

Network = Callable[[Tensor], Tensor]

_PATIENCE_S = 5.0  # of work by torch, from which compiling for another engine may pay (assumption)
_TRIED = 3  # calls by which two ways are compared; the first one of an engine also sets it up
_GAIN = 0.03  # of the time, for which another engine is taken
_ROUNDING = 3e-5  # of the largest logit: what may differ between engines that compute the same in float32
_MOST_KEPT = 2**27  # bytes of remembered logits


def require_engine(engine: Any, device: torch.device) -> Engine:
    """Return the engine; `InputError` where it is none, or cannot run on this machine or device."""
    if engine not in get_args(Engine):
        raise InputError(f"an engine is one of {', '.join(get_args(Engine))}, got {engine!r}")
    if engine == "openvino":
        if device.type != "cpu":
            raise InputError(f"openvino runs networks on the processor, not on {device}", "add --device cpu")
        if missing := _missing():
            raise InputError(f"the engine openvino needs the package {missing}", 'pip install "segfit[openvino]"')
    return engine  # type: ignore[no-any-return]


def engage(predictor: Predictor, engine: Engine) -> None:
    """Have the networks of a predictor on a processor run by an engine, and views of one value be computed once.

    auto is torch at first, then what takes less time where OpenVINO is installed. Networks of plug-ins are run by
    torch; so is one that OpenVINO fails to take, with a warning.
    """
    if predictor.device.type != "cpu":
        return
    if engine == "auto" and _missing():
        engine = "torch"

    def run_by(network: Network) -> Network:
        if engine == "torch" or not isinstance(network, UNet):
            return network
        low = predictor.dtype is not None  # bf16, which alone there is on a processor
        if engine == "auto":
            return FasterOf(network, lambda: openvino_network(network, predictor.patch, predictor.batch, bf16=low))
        try:
            return openvino_network(network, predictor.patch, predictor.batch, bf16=low)
        except Exception as error:  # noqa: BLE001 - whatever another program's compiler raises
            _tell_failure(error)
            return network

    predictor.networks = [Remembering(run_by(network)) for network in predictor.networks]


def _missing() -> str:
    """Return a package that OpenVINO's engine needs and that is not installed; nothing if all are."""
    return next((name for name in ("openvino", "onnx") if not package_version(name)), "")


def _tell_failure(error: Exception) -> None:
    LOGGED.warn(warning("engine", f"OpenVINO cannot run this network ({reason_of(error)}); torch runs it"))


def openvino_network(network: UNet, patch: Sequence[int], batch: int, *, bf16: bool = False) -> Network:
    """Return a U-Net compiled by OpenVINO for the processor, for at most `batch` views of `patch` voxels at once.

    It computes in float32, with `bf16` in that where torch would. OpenVINO adds up the voxels of a channel one by one,
    so that logits are off by up to 1e-3 of the largest where patches have a million voxels.
    """
    import openvino

    from segfit.networks.onnx_graph import as_onnx

    core = openvino.Core()
    model = core.read_model(as_onnx(network, patch, batch).SerializeToString())
    settings = {
        "INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    outputs, one_at_a_time = network.spec.num_outputs, Lock()

    def run(views: Tensor) -> Tensor:
        number = len(views)
        given = views.float().contiguous()
        if number < batch:  # the shape is fixed; views do not see each other
            given = torch.cat([given, given.new_zeros(batch - number, *given.shape[1:])])
        result = torch.empty(batch, outputs, *patch)
        with one_at_a_time:
            request.set_input_tensor(openvino.Tensor(given.numpy(), shared_memory=True))
            request.set_output_tensor(openvino.Tensor(result.numpy(), shared_memory=True))
            request.infer()
        return result[:number]

    return run


class FasterOf:
    """A network run by torch until that has taken a while; then by another way if it takes less time and agrees.

    The other way is what `make` returns. It is measured on the next views, whose results are used, and agrees where the
    logits of one of them differ by rounding.
    """

    def __init__(self, network: nn.Module, make: Callable[[], Network], patience_s: float = _PATIENCE_S) -> None:
        self._ways: list[Network] = [network]
        self._make = make
        self._patience_s = patience_s
        self._seconds: list[list[float]] = [[]]  # per view, of the calls of each way
        self._spent = 0.0
        self._settled = False

    def __call__(self, views: Tensor) -> Tensor:
        """Return the logits of views."""
        if self._settled:
            return self._ways[-1](views)
        started = perf_counter()
        result = self._ways[-1](views)
        seconds = perf_counter() - started
        self._spent += seconds
        self._seconds[-1].append(seconds / len(views))
        if len(self._ways) == 1 and self._spent >= self._patience_s and len(self._seconds[0]) >= _TRIED:
            self._take_up()
        elif len(self._ways) == 2 and len(self._seconds[1]) >= _TRIED:
            first, second = map(min, self._seconds)
            if second > (1 - _GAIN) * first or not self._agrees(views, result):
                self._ways.pop()
            self._settled = True
        return result

    def _agrees(self, views: Tensor, result: Tensor) -> bool:
        expected = self._ways[0](views)
        return bool((result - expected).abs().max() <= _ROUNDING * expected.abs().max())

    def _take_up(self) -> None:
        try:
            self._ways.append(self._make())
            self._seconds.append([])
        except Exception as error:  # noqa: BLE001 - whatever another program's compiler raises
            _tell_failure(error)
            self._settled = True


class Remembering:
    """A network that computes views of one value a channel once: padding, air that is clipped, empty slices.

    Equal views have equal logits, so that nothing changes but the time.
    """

    def __init__(self, network: Network) -> None:
        self._network = network
        self._kept: tuple[tuple[float, ...], Tensor] | None = None

    def __call__(self, views: Tensor) -> Tensor:
        """Return the logits of views."""
        low, high = torch.aminmax(views.flatten(2), dim=2)
        if not torch.equal(low, high):  # also of NaN
            return self._network(views)
        return torch.cat(
            [self._of(view[None], tuple(values)) for view, values in zip(views, low.tolist(), strict=True)]
        )

    def _of(self, view: Tensor, values: tuple[float, ...]) -> Tensor:
        kept = self._kept
        if kept is not None and kept[0] == values:
            return kept[1]
        result = self._network(view)
        if result.nbytes <= _MOST_KEPT:
            self._kept = values, result
        return result
