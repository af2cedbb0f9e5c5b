"""Entries of nnU-Net's plans file, key for key as nnU-Net 2.8.1's planners write them."""

from __future__ import annotations

from typing import Any, Literal

from segfit.errors import InputError
from segfit.options import NetworkKind, NormalizationScheme
from segfit.specs import Configuration, NetworkSpec, ResamplingSpec

__all__ = ["NETWORK_CLASSES", "RESAMPLING_FUNCTIONS", "SCHEME_CLASSES", "configuration_entry", "nnunet_layers"]

SCHEME_CLASSES: dict[NormalizationScheme, str] = {
    "ct": "CTNormalization",
    "none": "NoNormalization",
    "zscore": "ZScoreNormalization",
    "rescale_to_0_1": "RescaleTo01Normalization",
    "rgb_to_0_1": "RGBTo01Normalization",
}
"""nnU-Net's class for each normalisation."""
NETWORK_CLASSES: dict[NetworkKind, tuple[str, str]] = {
    "plain": ("PlainConvUNet", "n_conv_per_stage"),
    "residual": ("ResidualEncoderUNet", "n_blocks_per_stage"),
}
"""nnU-Net's class for each network, and its name for the encoder's convolutions or blocks per stage."""
RESAMPLING_FUNCTIONS: dict[Literal["spline", "torch", "none"], str] = {
    "spline": "resample_data_or_seg_to_shape",
    "torch": "resample_torch_fornnunet",
    "none": "no_resampling_hack",
}
"""nnU-Net's function for each method of resampling."""


def configuration_entry(item: Configuration, identifier: str, *, reoriented: bool = False) -> dict[str, Any]:
    """Return a configuration as an entry of nnU-Net's plans file, complete in itself.

    `identifier` names its preprocessed data. What links it to other configurations is for the caller to add. Raises
    `InputError` for a configuration on canonical axes, which nnU-Net does not have unless its reader has `reoriented`.
    """
    preprocessing, network = item.preprocessing, item.network
    if network.plugin is not None or network.kind not in NETWORK_CLASSES:
        found = network.plugin or network.kind
        raise InputError(f"configuration {item.name} has the network {found}, which nnU-Net does not know")
    if preprocessing.orientation != "stored" and not reoriented and item.preprocessing.image_ndim == 3:
        raise InputError(
            f"configuration {item.name} sees canonical axes, which nnU-Net does not know",
            "plan with --preset stock or --set planning.orientation=stored",
        )
    normalization = preprocessing.normalization
    return {
        "data_identifier": identifier,
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": item.batch_size,
        "patch_size": list(item.patch_size),
        "median_image_size_in_voxels": list(item.median_shape),
        "spacing": list(item.spacing_mm),
        "normalization_schemes": [SCHEME_CLASSES[how.scheme] for how in normalization],
        "use_mask_for_norm": [how.use_mask for how in normalization],
        **_resampling(preprocessing.resample_image, preprocessing.resample_label, preprocessing.resample_logits),
        "architecture": _architecture(network),
        "batch_dice": item.batch_dice,
    }


def _resampling(image: ResamplingSpec, label: ResamplingSpec, logits: ResamplingSpec) -> dict[str, Any]:
    """Return functions and arguments in the order of nnU-Net's file."""
    return {
        "resampling_fn_data": RESAMPLING_FUNCTIONS[image.method],
        "resampling_fn_seg": RESAMPLING_FUNCTIONS[label.method],
        "resampling_fn_data_kwargs": _arguments(image, is_label=False),
        "resampling_fn_seg_kwargs": _arguments(label, is_label=True),
        "resampling_fn_probabilities": RESAMPLING_FUNCTIONS[logits.method],
        "resampling_fn_probabilities_kwargs": _arguments(logits, is_label=False),
    }


def _arguments(spec: ResamplingSpec, *, is_label: bool) -> dict[str, Any]:
    if spec.method == "none":
        return {}
    orders = {"order": spec.order, "order_z": spec.order_separate_axis} if spec.method == "spline" else {}
    saving = {"memefficient_seg_resampling": False} if spec.method == "torch" else {}
    other = {} if spec.separate_threshold == 3 else {"separate_z_anisotropy_threshold": spec.separate_threshold}
    return {"is_seg": is_label, **orders, "force_separate_z": spec.force_separate, **saving, **other}


def _architecture(network: NetworkSpec) -> dict[str, Any]:
    class_name, encoder_key = NETWORK_CLASSES[network.kind]
    return {
        "network_class_name": f"dynamic_network_architectures.architectures.unet.{class_name}",
        "arch_kwargs": {
            "n_stages": network.num_stages,
            "features_per_stage": list(network.features),
            "conv_op": f"torch.nn.modules.conv.Conv{network.ndim}d",
            "kernel_sizes": [list(kernel) for kernel in network.kernels],
            "strides": [list(stride) for stride in network.strides],
            encoder_key: list(network.encoder_convs),
            "n_conv_per_stage_decoder": list(network.decoder_convs),
            **nnunet_layers(network.ndim, network.norm),
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def nnunet_layers(ndim: int, norm: Literal["instance", "batch"] = "instance") -> dict[str, Any]:
    """Return the layers that all of nnU-Net's planners write, with another norm if asked: the only ones segfit has."""
    return {
        "conv_bias": True,
        "norm_op": f"torch.nn.modules.{norm}norm.{norm.title()}Norm{ndim}d",
        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
