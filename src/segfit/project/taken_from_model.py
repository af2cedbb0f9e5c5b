"""What the networks of a run take over from the model that they start from: found out, and told."""

from __future__ import annotations

from segfit.errors import warning
from segfit.networks.unet import build_network
from segfit.planning.plan import Initial
from segfit.project.preparation import Preparation
from segfit.specs import NetworkSpec

__all__ = ["taken_from_model"]


def taken_from_model(project: Preparation, spec: NetworkSpec) -> Initial | None:
    """Return what a network takes over from the model that trainings start from, and tell it; None: there is none."""
    model, weights = project.start, project.initial
    if model is None or weights is None:
        return None
    labels = project.dataset.labels
    found = weights.for_network(build_network(spec, deep_supervision=False), labels)
    result = Initial(
        identity=model.identity,
        model=model.name,
        saw_cases=model.data == project.fingerprint().content_hash(),
        layers=len(found.fitted) + len(found.anew),
        fitted=len(found.fitted),
        anew=found.anew,
        kept=found.kept,
        added=found.added,
        dropped=found.dropped,
    )
    tell = project.progress
    tell.note(result.words)
    known, own = model.channel_names or (), project.dataset.channel_names
    if known and [name.casefold() for name in known] != [name.casefold() for name in own]:
        named = f"{' + '.join(known)}, the dataset has {' + '.join(own)}"
        tell.warn(warning("other_channels", f"{model.name} was trained on {named}"))
    if result.fits_badly:
        tell.warn(warning("few_layers", f"only {result.fitted} of {result.layers} layers of {model.name} fit"))
    return result
