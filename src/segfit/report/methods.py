"""A paragraph on methods, with references, to paste into a paper: from the plan and what was trained and chosen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import metadata

from segfit.fingerprint.fingerprint import Fingerprint
from segfit.labels import LabelScheme
from segfit.planning.plan import Plan
from segfit.selection.select import Selection
from segfit.specs import AugmentationSpec, Configuration, TrainingSpec
from segfit.text import by_axis, count, listing
from segfit.training.result import TrainingResult

__all__ = ["methods_of"]

_REFERENCES = {
    "nnunet": "Isensee F. et al. nnU-Net: a self-configuring method for deep learning-based biomedical image "
    "segmentation. Nature Methods 18, 203-211 (2021). doi:10.1038/s41592-020-01008-z",
    "unet2d": "Ronneberger O., Fischer P., Brox T. U-Net: convolutional networks for biomedical image segmentation. "
    "MICCAI 2015. doi:10.1007/978-3-319-24574-4_28",
    "unet3d": "Cicek O. et al. 3D U-Net: learning dense volumetric segmentation from sparse annotation. MICCAI 2016. "
    "doi:10.1007/978-3-319-46723-8_49",
    "residual": "Isensee F. et al. nnU-Net revisited: a call for rigorous validation in 3D medical image segmentation. "
    "MICCAI 2024. doi:10.1007/978-3-031-72114-4_47",
    "muon": "Jordan K. et al. Muon: an optimizer for hidden layers in neural networks (2024). "
    "https://kellerjordan.github.io/posts/muon",
    "adamw": "Loshchilov I., Hutter F. Decoupled weight decay regularization. ICLR 2019. arXiv:1711.05101",
}
_SCHEMES = {
    "ct": "clipping to the 0.5 and 99.5 percentiles of the foreground of all training images, subtracting its mean and "
    "dividing by its standard deviation",
    "zscore": "subtracting the mean of each image and dividing by its standard deviation",
    "rescale_to_0_1": "scaling each image to 0 to 1",
    "rgb_to_0_1": "dividing by 255",
    "none": "leaving intensities as they are",
}
_LOSSES = {"dice": "soft Dice", "ce": "cross-entropy", "topk": "top-k cross-entropy", "focal": "focal"}
_OPTIMIZERS = {"sgd": "SGD with Nesterov momentum", "adamw": "AdamW", "muon": "Muon"}


def methods_of(
    plan: Plan,
    fingerprint: Fingerprint,
    labels: LabelScheme,
    selection: Selection,
    results: Sequence[TrainingResult],
) -> str:
    """Return the paragraph and, numbered as they are cited, the references; `results` are of all trainings."""
    cited: list[str] = []

    def cite(key: str) -> str:
        if key not in cited:
            cited.append(key)
        return f"[{cited.index(key) + 1}]"

    classes = listing([one.name for one in labels.classes])
    sentences = [
        f"Images were segmented with segfit {metadata.version('segfit')}, which configures itself by the rules of "
        f"nnU-Net {cite('nnunet')}.",
        f"It was trained on {count(len(fingerprint.cases), 'case')} ({listing(fingerprint.channel_names)}) to find "
        f"{classes}.",
    ]
    for name in selection.winner:
        one, recipe = plan.configurations[name], plan.training[name]
        sentences += [_preprocessed(one, plan.unit), _network(one, cite("unet2d" if one.ndim == 2 else "unet3d"))]
        if one.network.kind == "residual":
            sentences.append(f"Its encoder is residual {cite('residual')}.")
        optimizer = _OPTIMIZERS[recipe.optimizer]
        if recipe.optimizer != "sgd":
            optimizer += f" {cite(recipe.optimizer)}"
        steps = min((item.steps for item in results if item.configuration == name), default=0)
        sentences += [_trained(recipe, steps, optimizer), _augmented(recipe.augmentation)]
    sentences += _validated(selection)
    return "\n".join([" ".join(sentences), "", *(f"[{n}] {_REFERENCES[key]}" for n, key in enumerate(cited, 1))])


def _preprocessed(one: Configuration, unit: str) -> str:
    by_scheme: dict[str, list[str]] = {}
    for channel, item in enumerate(one.preprocessing.normalization):
        by_scheme.setdefault(_SCHEMES[item.scheme], []).append(str(channel))
    parts = [
        words if len(by_scheme) == 1 else f"{words} (channel {', '.join(channels)})"
        for words, channels in by_scheme.items()
    ]
    size = f"{by_axis(one.spacing_mm)} {'mm' if unit == 'mm' else 'pixels'}"
    return f"Images were resampled to voxels of {size} and normalised by {'; '.join(parts)}."


def _network(one: Configuration, reference: str) -> str:
    spec = one.network
    return (
        f"A {one.ndim}D U-Net {reference} of {spec.num_stages} resolutions with {spec.features[0]} to "
        f"{max(spec.features)} features was trained on patches of {by_axis(one.patch_size)} voxels in batches of "
        f"{one.batch_size}."
    )


def _trained(recipe: TrainingSpec, steps: int, optimizer: str) -> str:
    losses = [_LOSSES.get(part, part) for part in recipe.loss.split("+")]
    loss = f"{losses[0]} loss" if len(losses) == 1 else f"The sum of {' and '.join(losses)} loss"
    loss = f"{loss[0].upper()}{loss[1:]}"
    falls = "a cosine" if recipe.schedule == "cosine" else f"a polynomial of exponent {recipe.poly_exponent:g}"
    when = "" if recipe.cooldown_share >= 1 else f" in the last {recipe.cooldown_share:.0%} of the training"
    return (
        f"{loss} was minimised for {count(steps, 'step')} by {optimizer} (learning rate {recipe.learning_rate:g}, "
        f"falling as {falls}{when}; weight decay {recipe.weight_decay:g})."
    )


def _augmented(spec: AugmentationSpec) -> str:
    kinds = {
        "rotation": spec.rotation_probability,
        "scaling": spec.scaling_probability,
        "noise": spec.noise_probability,
        "blur": spec.blur_probability,
        "brightness": spec.brightness_probability,
        "contrast": spec.contrast_probability,
        "low resolution": spec.low_resolution_probability,
        "gamma": spec.gamma_probability + spec.inverted_gamma_probability,
        "mirroring": len(spec.mirror_axes),
    }
    used = [name for name, much in kinds.items() if much]
    return f"Samples were varied by {', '.join(used)}." if used else "Samples were not augmented."


def _validated(selection: Selection) -> Iterator[str]:
    folds, value = len(selection.folds), selection.dice_after_steps
    reached = "" if value is None else f"; the mean Dice over classes was {value:.3f}"
    each = "one network" if folds == 1 else f"{folds} networks"
    yield f"By cross-validation, {each} per configuration predicted cases that had not been trained on{reached}."
    if len(selection.winner) > 1:
        yield f"The probabilities of {' and '.join(selection.winner)} were averaged."
    for step in selection.steps:
        yield f"Post-processing: {step.text}."
