"""Steps of nnU-Net's network and loss on ready tensors, a program of its own for an environment with nnunetv2.

    python benchmarks/reference_network.py TASK

TASK is JSON: device, patch, batch, channels, features, outputs, steps, limit_s; see `gpu.py`. On CUDA in half
precision, as it trains there, with and without `torch.compile`. The last line of stdout is JSON.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from typing import Any

import torch

try:
    from dynamic_network_architectures.architectures.unet import PlainConvUNet
    from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
    from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
    from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
except ImportError as error:
    print(json.dumps({"skipped": f"nnunetv2 cannot be imported: {error}"}))
    sys.exit()

SETTLING = 8  # steps until a GPU has chosen its kernels


def main() -> None:
    task = json.loads(sys.argv[1])
    torch.backends.cudnn.benchmark = True
    result: dict[str, Any] = {"nnunetv2": version("nnunetv2"), "step_s": step_seconds(task, compiled=False)}
    if torch.device(task["device"]).type == "cuda":
        try:
            result["compiled_step_s"] = step_seconds(task, compiled=True)
        except Exception as error:  # noqa: BLE001 - whatever a compiler raises, the other figure stands
            result["problem"] = f"not compiled: {type(error).__name__}"
    print(json.dumps(result))


def step_seconds(task: dict[str, Any], *, compiled: bool) -> float:
    device, stages = torch.device(task["device"]), len(task["features"])
    on_gpu, flat = device.type == "cuda", len(task["patch"]) == 2
    network = PlainConvUNet(
        task["channels"],
        stages,
        task["features"],
        torch.nn.Conv2d if flat else torch.nn.Conv3d,
        3,
        [1] + [2] * (stages - 1),
        2,
        task["outputs"],
        2,
        conv_bias=True,
        norm_op=torch.nn.InstanceNorm2d if flat else torch.nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=torch.nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        deep_supervision=True,
    ).to(device)
    weights = [1 / 2**stage for stage in range(stages - 1)]
    weights[-1] = 0
    dice = {"batch_dice": True, "smooth": 1e-5, "do_bg": False, "ddp": False}
    whole = DC_and_CE_loss(
        dice, {}, weight_ce=1, weight_dice=1, ignore_label=None, dice_class=MemoryEfficientSoftDiceLoss
    )
    loss = DeepSupervisionWrapper(whole, [weight / sum(weights) for weight in weights])
    optimizer = torch.optim.SGD(network.parameters(), 1e-2, weight_decay=3e-5, momentum=0.99, nesterov=True)
    scaler = torch.amp.GradScaler("cuda", enabled=on_gpu)
    number = task["batch"]
    data = torch.randn((number, task["channels"], *task["patch"]), device=device)
    target = [
        torch.randint(task["outputs"], (number, 1, *(n // 2**stage for n in task["patch"])), device=device).float()
        for stage in range(stages - 1)
    ]
    model = torch.compile(network) if compiled else network

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", enabled=on_gpu):
            value = loss(model(data), target)
        scaler.scale(value).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(network.parameters(), 12)
        scaler.step(optimizer)
        scaler.update()
        value.detach().cpu()  # waits for the GPU

    for _ in range(SETTLING if on_gpu else 1):
        step()
    started, done = time.perf_counter(), 0
    while done < task["steps"] and time.perf_counter() - started < task["limit_s"]:
        step()
        done += 1
    return round((time.perf_counter() - started) / done, 6)


if __name__ == "__main__":
    main()
