"""nnU-Net's plans file read into configurations of ours.

Understood are the present and the older format, inheritance, and everything that nnU-Net 2.8.1's own planners can
produce; architectures and functions that segfit does not have are refused by name.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError

from segfit.errors import InputError
from segfit.feature_maps import network_elements
from segfit.files import first_fault
from segfit.labels import LabelScheme
from segfit.nnunet.plans_writer import (
    NETWORK_CLASSES,
    RESAMPLING_FUNCTIONS,
    SCHEME_CLASSES,
    configuration_entry,
    nnunet_layers,
)
from segfit.specs import (
    Configuration,
    IntensityStatistics,
    NetworkSpec,
    Normalization,
    PreprocessingSpec,
    ResamplingSpec,
)

__all__ = [
    "READERS",
    "READER_OF_ENDING",
    "PlansFile",
    "channel_names_of",
    "read_configurations",
    "read_plans_file",
    "write_plans_file",
]

READERS: dict[str, Literal["stored", "canonical"]] = {
    "NaturalImage2DIO": "stored",
    "SimpleITKIO": "stored",
    "Tiff3DIO": "stored",
    "NibabelIO": "stored",
    "NibabelIOWithReorient": "canonical",
    "SimpleITKIOWithReorient": "canonical",
}
"""nnU-Net's readers, and the axes that a network sees of images that they read."""
READER_OF_ENDING = {
    ".png": "NaturalImage2DIO",
    ".bmp": "NaturalImage2DIO",
    ".tif": "NaturalImage2DIO",
    ".nii.gz": "SimpleITKIO",
    ".nrrd": "SimpleITKIO",
    ".mha": "SimpleITKIO",
    ".gipl": "SimpleITKIO",
    ".tiff": "Tiff3DIO",
    ".nii": "NibabelIO",
}
"""The reader that nnU-Net tries first, by file ending."""
_MARKER_RATIO = 500
"""nnU-Net marks 2D images by a first spacing 999 times the others; medians over cases come near to that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlansFile:
    """A plans file of nnU-Net, read: its configurations are ours, whatever the file's format was."""

    header: Mapping[str, Any]  # everything beside the configurations, as it is in the file
    configurations: Mapping[str, Configuration]
    identifiers: Mapping[str, str]  # by configuration, the name of its preprocessed data


def read_plans_file(plans: Mapping[str, Any], dataset_json: Mapping[str, Any]) -> PlansFile:
    """Return the content of a plans file; arguments and errors as in `read_configurations`."""
    configurations = read_configurations(plans, dataset_json)
    entries = {name: _inherited(plans["configurations"], name) for name in configurations}
    default = _get(plans, "plans_name", str, "the plans") if "plans_name" in plans else "nnUNetPlans"
    return PlansFile(
        header={key: value for key, value in plans.items() if key != "configurations"},
        configurations=configurations,
        identifiers={name: str(entry.get("data_identifier", f"{default}_{name}")) for name, entry in entries.items()},
    )


def write_plans_file(file: PlansFile) -> dict[str, Any]:
    """Return the content of a plans file in the present format; every configuration is complete in itself.

    Reading it again gives an equal `PlansFile`. Raises `InputError` for configurations on canonical axes whose
    reader does not reorient.
    """
    entries: dict[str, Any] = {}
    reoriented = READERS.get(str(file.header.get("image_reader_writer"))) == "canonical"
    for name, item in file.configurations.items():
        entry = configuration_entry(item, file.identifiers[name], reoriented=reoriented)
        following = [other.name for other in file.configurations.values() if other.previous_stage == name]
        if following:
            entry["next_stage"] = following[0] if len(following) == 1 else following
        if item.previous_stage is not None:
            entry["previous_stage"] = item.previous_stage
        entries[name] = entry
    return copy.deepcopy({**file.header, "configurations": entries})


def channel_names_of(dataset_json: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the channel names in file order, also under the older key `modality`; `InputError` if there are none."""
    names = dataset_json.get("channel_names", dataset_json.get("modality"))
    if not isinstance(names, Mapping) or not names or not all(isinstance(name, str) for name in names.values()):
        raise InputError(f'dataset.json needs "channel_names", for example {{"0": "CT"}}, got {names!r}')
    return tuple(names.values())


def read_configurations(
    plans: Mapping[str, Any], dataset_json: Mapping[str, Any], names: Sequence[str] | None = None
) -> dict[str, Configuration]:
    """Return the configurations of a plans file of nnU-Net, by name, on the axes that its reader delivers.

    Parameters
    ----------
    plans, dataset_json : the files' content
    names : configurations to read; all of them when absent

    Datasets of 2D images get two axes, as everywhere in segfit. Raises `InputError` for content that contradicts itself
    and for networks, normalisations or resampling functions that segfit does not have.
    """
    if not isinstance(dataset_json, Mapping):
        raise InputError(f"dataset.json must be a JSON object, got {dataset_json!r}")
    configurations = _get(plans, "configurations", Mapping, "the plans")
    manager = plans.get("label_manager", "LabelManager")
    if manager != "LabelManager":
        raise InputError(f"the plans use the label manager {manager!r}", "segfit has LabelManager only")
    scheme = LabelScheme.from_declaration(dataset_json.get("labels", {}), dataset_json.get("regions_class_order"))
    result: dict[str, Configuration] = {}
    for name in configurations if names is None else names:
        entry = _inherited(configurations, name)
        _check_stages(configurations, name, entry)
        try:
            result[name] = _configuration(name, entry, plans, channel_names_of(dataset_json), scheme)
        except ValidationError as error:
            raise InputError(f"configuration {name} of the plans is damaged: {first_fault(error)}") from None
    return result


def _get(mapping: Any, key: str, kind: type | tuple[type, ...], where: str) -> Any:
    if not isinstance(mapping, Mapping) or key not in mapping:
        raise InputError(f'{where} lack "{key}"', "the file is incomplete")
    value = mapping[key]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise InputError(f'"{key}" of {where} is not what it should be, got {value!r}')
    return value


def _numbers(mapping: Mapping[str, Any], key: str, where: str) -> tuple[Any, ...]:
    values = tuple(_get(mapping, key, (list, tuple), where))
    if not values or not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        raise InputError(f'"{key}" of {where} must be a list of numbers, got {list(values)!r}')
    return values


def _inherited(configurations: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a configuration with everything it inherits; its own keys replace those of its ancestors."""
    chain: list[Mapping[str, Any]] = []
    visited: list[str] = []
    current: str | None = name
    while current is not None:
        if current in visited:
            raise InputError(
                f"configuration {name} of the plans inherits from itself: {' > '.join([*visited, current])}"
            )
        if current not in configurations:
            known = ", ".join(configurations)
            raise InputError(f"the plans have no configuration {current!r} (wanted by {name})", f"they have {known}")
        entry = _get(configurations, current, Mapping, "the plans' configurations")
        chain.append(entry)
        visited.append(current)
        current = _name(entry, "inherits_from", f"configuration {current} of the plans")
    merged: dict[str, Any] = {}
    for entry in reversed(chain):
        merged |= entry
    return merged


def _name(entry: Mapping[str, Any], key: str, where: str) -> str | None:
    name = entry.get(key)
    if name is not None and not isinstance(name, str):
        raise InputError(f'"{key}" of {where} must name a configuration, got {name!r}')
    return name


def _next_stages(entry: Mapping[str, Any]) -> list[Any]:
    following = entry.get("next_stage") or ()
    return list(following) if isinstance(following, list | tuple) else [following]


def _check_stages(configurations: Mapping[str, Any], name: str, entry: Mapping[str, Any]) -> None:
    previous = _name(entry, "previous_stage", f"configuration {name} of the plans")
    if previous is not None and name not in _next_stages(_inherited(configurations, previous)):
        raise InputError(f'configuration {name} follows {previous}, whose "next_stage" does not name it')


def _configuration(
    name: str, entry: Mapping[str, Any], plans: Mapping[str, Any], channels: tuple[str, ...], scheme: LabelScheme
) -> Configuration:
    where = f"configuration {name} of the plans"
    patch, spacing = _numbers(entry, "patch_size", where), _numbers(entry, "spacing", where)
    if len(patch) not in (2, 3) or len(spacing) != len(patch):
        raise InputError(f"{where} has patch_size {list(patch)} and spacing {list(spacing)}", "both need 2 or 3 values")
    previous = _name(entry, "previous_stage", where)
    network = _network(
        entry,
        where,
        ndim=len(patch),
        in_channels=len(channels) + (len(scheme.foreground_values) if previous is not None else 0),
        num_outputs=scheme.num_outputs,
    )
    return Configuration(
        name=name,
        ndim=network.ndim,
        patch_size=patch,
        batch_size=_get(entry, "batch_size", int, where),
        spacing_mm=spacing,
        median_shape=_numbers({"median_image_size_in_voxels": patch, **entry}, "median_image_size_in_voxels", where),
        batch_dice=_get(entry, "batch_dice", bool, where),
        preprocessing=_preprocessing(entry, where, plans, spacing, len(channels)),
        network=network,
        memory_estimate=network_elements(network, patch, scheme.num_declared),
        previous_stage=previous,
        next_stage=next(iter(_next_stages(entry)), None),
    )


def _network(entry: Mapping[str, Any], where: str, *, ndim: int, in_channels: int, num_outputs: int) -> NetworkSpec:
    architecture = entry["architecture"] if "architecture" in entry else _from_old_format(entry, where, ndim)
    if not isinstance(architecture, Mapping):
        raise InputError(f'"architecture" of {where} is not an object')
    class_name = _get(architecture, "network_class_name", str, where).rpartition(".")[2]
    kinds = {known: (kind, key) for kind, (known, key) in NETWORK_CLASSES.items()}
    if class_name not in kinds:
        raise InputError(f"{where} uses the network {class_name}", f"segfit has {' and '.join(kinds)}")
    kind, encoder_key = kinds[class_name]
    kwargs = dict(_get(architecture, "arch_kwargs", Mapping, where))
    stages = _get(kwargs, "n_stages", int, where)
    _check_layers(kwargs, where, ndim)

    def per_stage(key: str, count: int) -> tuple[int, ...]:
        if isinstance(kwargs.get(key), int):  # one number stands for all stages
            return (kwargs[key],) * count
        return _numbers(kwargs, key, where) if count else ()

    def per_axis(key: str) -> tuple[tuple[int, ...], ...]:
        values = _get(kwargs, key, (int, list, tuple), where)
        rows = [values] * stages if isinstance(values, int) else values
        return tuple((row,) * ndim if isinstance(row, int) else _numbers({key: row}, key, where) for row in rows)

    features = per_stage("features_per_stage", stages)
    if kwargs.get("stem_channels") not in (None, features[0] if features else None):
        raise InputError(f"{where} sets stem_channels, which segfit does not have")
    if len(features) != stages or not all(v >= 1 for v in features):
        raise InputError(f"{where} has {stages} stages but features {list(features)}")
    return NetworkSpec(
        kind=kind,
        norm=_norm(kwargs),
        ndim=2 if ndim == 2 else 3,
        in_channels=in_channels,
        num_outputs=num_outputs,
        features=features,
        strides=per_axis("strides"),
        kernels=per_axis("kernel_sizes"),
        encoder_convs=per_stage(encoder_key, stages),
        decoder_convs=per_stage("n_conv_per_stage_decoder", stages - 1),
    )


def _check_layers(kwargs: Mapping[str, Any], where: str, ndim: int) -> None:
    """Refuse layers other than those nnU-Net's planners write."""
    _get(kwargs, "conv_op", str, where)
    expected = {"conv_op": f"torch.nn.modules.conv.Conv{ndim}d", **nnunet_layers(ndim, _norm(kwargs))}
    for key, wanted in expected.items():
        got = kwargs.get(key)
        if isinstance(wanted, str) and isinstance(got, str):
            got, wanted = got.rpartition(".")[2], wanted.rpartition(".")[2]
        if key.startswith("dropout_op") and kwargs.get("dropout_op") is None:
            continue
        if key == "nonlin_kwargs" and isinstance(got, Mapping):
            got, wanted = got.get("negative_slope", 0.01), 0.01  # in place or not makes no difference
        if got != wanted:
            raise InputError(f"{where} sets {key} = {got!r}", f"segfit has {wanted!r} only")
    for key in ("nonlin_first", "bottleneck_channels"):
        if kwargs.get(key):
            raise InputError(f"{where} sets {key}, which segfit does not have")
    block = kwargs.get("block")
    if block is not None and str(block).rpartition(".")[2] != "BasicBlockD":
        raise InputError(f"{where} uses the block {block}", "segfit has BasicBlockD only")


def _norm(kwargs: Mapping[str, Any]) -> Literal["instance", "batch"]:
    return "batch" if "BatchNorm" in str(kwargs.get("norm_op")) else "instance"


def _from_old_format(entry: Mapping[str, Any], where: str, ndim: int) -> dict[str, Any]:
    """Translate a configuration from before the key `architecture` existed."""
    class_name = _get(entry, "UNet_class_name", str, where)
    kinds = dict(NETWORK_CLASSES.values())
    encoder = _numbers(entry, "n_conv_per_stage_encoder", where)
    base = _get(entry, "UNet_base_num_features", int, where)
    most = _get(entry, "unet_max_num_features", int, where)
    return {
        "network_class_name": class_name,
        "arch_kwargs": {
            "n_stages": len(encoder),
            "features_per_stage": [min(base * 2**stage, most) for stage in range(len(encoder))],
            "conv_op": f"Conv{ndim}d",
            "kernel_sizes": _get(entry, "conv_kernel_sizes", (list, tuple), where),
            "strides": _get(entry, "pool_op_kernel_sizes", (list, tuple), where),
            kinds.get(class_name, "n_conv_per_stage"): encoder,
            "n_conv_per_stage_decoder": _get(entry, "n_conv_per_stage_decoder", (list, tuple), where),
            **nnunet_layers(ndim),
        },
    }


def _preprocessing(
    entry: Mapping[str, Any], where: str, plans: Mapping[str, Any], spacing: tuple[float, ...], num_channels: int
) -> PreprocessingSpec:
    preprocessor = entry.get("preprocessor_name", "DefaultPreprocessor")
    if preprocessor != "DefaultPreprocessor":
        raise InputError(f"{where} uses the preprocessor {preprocessor}", "segfit has DefaultPreprocessor only")
    transpose = _numbers(plans, "transpose_forward", "the plans")
    if sorted(transpose) != [0, 1, 2]:
        raise InputError(f"transpose_forward of the plans must be an order of 0, 1, 2, got {list(transpose)}")
    targets: tuple[float | None, ...] = spacing
    if len(spacing) == 2:
        if _pictures(plans, transpose):
            transpose = tuple(axis - 1 for axis in transpose[1:])
        else:
            targets = (None, *spacing)
    return PreprocessingSpec(
        orientation="stored" if len(transpose) == 2 else _orientation(plans),
        transpose=transpose,
        spacing_mm=targets,
        normalization=_normalization(entry, where, plans, num_channels),
        resample_image=_resampling_spec(entry, "resampling_fn_data", where),
        resample_label=_resampling_spec(entry, "resampling_fn_seg", where),
        resample_logits=_resampling_spec(entry, "resampling_fn_probabilities", where),
    )


def _orientation(plans: Mapping[str, Any]) -> Literal["stored", "canonical"]:
    reader = plans.get("image_reader_writer", "SimpleITKIO")
    if not isinstance(reader, str) or reader not in READERS:
        raise InputError(f"the plans use the image reader {reader!r}", f"segfit has {', '.join(READERS)}")
    return READERS[reader]


def _pictures(plans: Mapping[str, Any], transpose: tuple[int, ...]) -> bool:
    """Whether the plans are for 2D images: read as pictures, or as one slice with nnU-Net's marker spacing."""
    if transpose[0] != 0 or any(name.startswith("3d") for name in plans["configurations"]):
        return False
    if plans.get("image_reader_writer") == "NaturalImage2DIO":
        return True
    if "original_median_spacing_after_transp" not in plans:
        return False
    spacing = _numbers(plans, "original_median_spacing_after_transp", "the plans")
    return len(spacing) == 3 and spacing[0] > _MARKER_RATIO * max(spacing[1:])


def _normalization(
    entry: Mapping[str, Any], where: str, plans: Mapping[str, Any], num_channels: int
) -> tuple[Normalization, ...]:
    names = _get(entry, "normalization_schemes", (list, tuple), where)
    masks = _get(entry, "use_mask_for_norm", (list, tuple), where)
    if not len(names) == len(masks) == num_channels:
        raise InputError(f"{where} normalises {len(names)} channels, dataset.json names {num_channels}")
    schemes = {known: scheme for scheme, known in SCHEME_CLASSES.items()}
    statistics = plans.get(
        "foreground_intensity_properties_per_channel", plans.get("foreground_intensity_properties_by_modality", {})
    )
    result: list[Normalization] = []
    for channel, (name, mask) in enumerate(zip(names, masks, strict=True)):
        if not isinstance(name, str) or name not in schemes:
            raise InputError(f"{where} uses the normalisation {name!r}", f"segfit has {', '.join(schemes)}")
        if not isinstance(mask, bool | None):
            raise InputError(f"use_mask_for_norm of {where} must be true or false, got {mask!r}")
        scheme = schemes[name]
        known: IntensityStatistics | None = None
        if scheme == "ct":
            of_channel = _get(statistics, str(channel), Mapping, "the plans' foreground intensities")
            fields = {key: of_channel[key] for key in IntensityStatistics.model_fields if key in of_channel}
            known = IntensityStatistics.model_validate(fields)
        result.append(Normalization(scheme=scheme, use_mask=bool(mask) and scheme == "zscore", statistics=known))
    return tuple(result)


def _resampling_spec(entry: Mapping[str, Any], key: str, where: str) -> ResamplingSpec:
    methods = {function: method for method, function in RESAMPLING_FUNCTIONS.items()}
    function = _get(entry, key, str, where)
    kwargs = _get(entry, f"{key}_kwargs", Mapping, where)
    if function not in methods:
        raise InputError(f"{where} uses the resampling function {function!r}, which segfit does not have")
    method = methods[function]
    if method == "none":
        return ResamplingSpec(method="none", order=0)
    if method == "torch" and kwargs.get("memefficient_seg_resampling"):
        raise InputError(f"{where} sets memefficient_seg_resampling, which segfit does not have")
    return ResamplingSpec(
        method=method,
        order=_get(kwargs, "order", int, where) if method == "spline" else 1,
        order_separate_axis=kwargs.get("order_z", 0) if method == "spline" else 0,
        force_separate=kwargs.get("force_separate_z"),
        separate_threshold=kwargs.get("separate_z_anisotropy_threshold", 3.0),
    )
