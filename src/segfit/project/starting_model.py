"""A model that a training starts from: read whatever it is, kept in the project, and what of its plan is taken over.

    PROJECT/starts/<identity>/
      start.json            StartingModel
      weights.safetensors   of one network, float32, under our names

The identity is a hash of the content. It takes the place of the path in the options of the project, so that a result
counts wherever the model lay and whatever it was called, and the model itself is not needed any more.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from segfit.dataset.manifest import Dataset
from segfit.errors import InputError
from segfit.files import Document, content_hash, new_folder, read_json, require_there, write_bytes
from segfit.fingerprint.fingerprint import Fingerprint
from segfit.labels import LabelScheme
from segfit.nnunet.plans_reader import read_configurations
from segfit.options import CONFIGURATION_NAMES, ConfigurationName, ConfigurationOptions, Options
from segfit.planning.plan import Plan
from segfit.planning.taken_over import NETWORK_OPTIONS, name_here, network_values, values_of, with_values
from segfit.project.folder import ProjectFolder
from segfit.specs import Configuration, NetworkSpec
from segfit.text import count

if TYPE_CHECKING:
    from segfit.training.initial import InitialWeights

__all__ = ["OTHER", "StartingModel", "initial_weights", "kept_model", "planned_like", "resolved", "taken_values"]

_IDENTITY = re.compile(r"[0-9a-f]{16}")
OTHER = "give another model"
"""What to do about a model that nothing can start from."""
_FILE, _WEIGHTS = "start.json", "weights.safetensors"
_MOST_SCALE = 4.0  # times larger or smaller voxels than the data have: beyond it, a model is for something else


class StartingModel(Document):
    """``start.json``: what a model is that a training starts from."""

    name: str  # for people
    kind: Literal["segfit", "nnunet", "nnssl", "weights"]
    network: NetworkSpec
    configuration: Configuration | None = None  # None: nothing is known but the weights
    labels: LabelScheme | None = None  # None: not known
    channel_names: tuple[str, ...] | None = None
    checksum: str = ""  # of the weights
    data: str = ""  # hash of the fingerprint that it was trained on; empty: not known

    @property
    def has_heads(self) -> bool:
        """Whether its outputs are classes."""
        return self.kind != "nnssl"

    @property
    def configuration_name(self) -> ConfigurationName:
        """Name of the configuration that it becomes in a plan."""
        return name_here(self.network.ndim)

    @property
    def values(self) -> dict[str, Any]:
        """What of its plan is taken over, as options of its configuration."""
        return network_values(self.network) if self.configuration is None else values_of(self.configuration)

    def unfit(self, fingerprint: Fingerprint, dataset: str) -> str:
        """Return why no more than its network can be taken over for a dataset, empty if all can.

        Raises `InputError` where not even that can.
        """
        ndim, spec = fingerprint.ndim, None if self.configuration is None else self.configuration.preprocessing
        kinds = {2: "pictures", 3: "volumes"}
        if self.network.ndim > ndim:
            raise InputError(f"{self.name} is made for volumes, {dataset} has pictures", OTHER)
        if spec is None:
            return ""
        if spec.image_ndim != ndim:
            return f"{self.name} is made for {kinds[spec.image_ndim]}, {dataset} has {kinds[ndim]}"
        typical = [fingerprint.typical_spacing[axis] for axis in spec.transpose]
        for own, there in zip(spec.spacing_mm, typical, strict=True):
            if own is not None and not 1 / _MOST_SCALE <= own / there <= _MOST_SCALE:
                return (
                    f"{self.name} sees voxels of {own:.3g} {fingerprint.unit} where those of {dataset} have {there:.3g}"
                )
        return ""

    @property
    def identity(self) -> str:
        """16 hex digits that name its content."""
        return content_hash(self.model_dump(mode="json", exclude={"name", "schema_version"}))


def resolved(root: Path, options: Options, dataset: Dataset, settings: Sequence[str] = ()) -> Options:
    """Return the options with the model and the plan that they name taken into the project in `root`.

    Parameters
    ----------
    settings : what was asked for last, which goes before what is taken over

    Raises `InputError` for a model or plan that cannot be used; then nothing was written.
    """
    asked = options.training.start_from
    if options.planning.plan_from is not None:
        if asked is not None:
            raise InputError("--plan-from and --from both bring a plan", "leave one out")
        return _with_plan(options, Path(options.planning.plan_from), dataset, settings)
    if asked is None:
        return options
    known = kept_model(root, asked)
    if known is not None:
        _require_consistent(options, known.configuration_name)
        return options
    from segfit.project.read_starting_model import read_starting_model, serialized

    model, state = read_starting_model(Path(asked).expanduser().absolute(), options)
    _require_consistent(options, model.configuration_name)
    _require_fitting(model, dataset)
    if kept_model(root, model.identity) is None:
        with new_folder(_folder(root, model.identity)) as new:
            write_bytes(new / _WEIGHTS, serialized(state))
            model.save(new / _FILE)
    training = options.training.model_copy(update={"start_from": model.identity})
    return options.model_copy(update={"training": training})


def _folder(root: Path, identity: str) -> Path:
    return ProjectFolder(root).starts / identity


def kept_model(root: Path, identity: str) -> StartingModel | None:
    """Return the model of this identity if the project in `root` keeps it; `InputError` if it is damaged."""
    folder = _folder(root, identity)
    if not _IDENTITY.fullmatch(identity) or not (folder / _FILE).is_file():
        return None
    model = StartingModel.load(folder / _FILE)
    if model.identity != identity or not (folder / _WEIGHTS).is_file():
        raise InputError(f"{folder} is damaged", "give the model again with --from")
    return model


def initial_weights(root: Path, model: StartingModel) -> InitialWeights:
    """Return the weights of a model that the project in `root` keeps."""
    from segfit.training.initial import InitialWeights

    path = _folder(root, model.identity) / _WEIGHTS
    return InitialWeights(
        identity=model.identity, path=path, checksum=model.checksum, labels=model.labels, heads=model.has_heads
    )


def taken_values(asked: Options, planned: Options) -> set[str]:
    """Return the names of the values that `planned_like` brought to options."""
    (name,) = planned.planning.configurations or ()
    own, found = asked.planning.of(name), planned.planning.of(name)
    return {leaf for leaf in ConfigurationOptions.model_fields if getattr(own, leaf) != getattr(found, leaf)}


def planned_like(options: Options, model: StartingModel | None, *, network_only: bool = False) -> Options:
    """Return the options with what of a model's plan is taken over; what is set there already stays."""
    if model is None:
        return options
    name, planning = model.configuration_name, options.planning
    update: dict[str, Any] = {"configurations": (name,)}
    spec = None if model.configuration is None else model.configuration.preprocessing
    if planning.orientation is None and spec is not None and spec.image_ndim == 3:
        update["orientation"] = spec.orientation
    values = network_values(model.network) if network_only else model.values
    planning = with_values(planning, name, values).model_copy(update=update)
    return options.model_copy(update={"planning": planning})


def _require_consistent(options: Options, name: str) -> None:
    """Raise `InputError` for options that say which network is trained: the model does."""
    if options.preset != "auto":
        raise InputError(
            f"--from brings a network, and so does --preset {options.preset}", "leave one out, or give --preset auto"
        )
    asked = options.planning
    for prefix, values in (
        ("planning", asked),
        *((f"planning.{key}", own) for key, own in asked.by_configuration.items()),
    ):
        for leaf in NETWORK_OPTIONS:
            if getattr(values, leaf) is not None:
                raise InputError(f"--from brings a network, and so does {prefix}.{leaf}", "leave one out")
    if asked.configurations not in (None, (name,)):
        raise InputError(
            f"--from brings the configuration {name}, planning.configurations is {', '.join(asked.configurations)}",
            "leave planning.configurations out",
        )


def _require_fitting(model: StartingModel, dataset: Dataset) -> None:
    """Raise `InputError` where the channels are others in number, or the outputs and nobody knows what they are."""
    there, wanted = model.network.in_channels, len(dataset.channel_names)
    if there != wanted:
        raise InputError(
            f"{model.name} takes images of {count(there, 'channel')}, {dataset.name} has {wanted}: "
            f"{', '.join(dataset.channel_names)}",
            "give a model for these channels",
        )
    from segfit.networks.transfer import output_names

    outputs, labels = model.network.num_outputs, dataset.labels
    if model.kind == "weights" and outputs != labels.num_outputs:
        raise InputError(
            f"{model.name} has {count(outputs, 'output')} and no names for them, {dataset.name} needs "
            f"{labels.num_outputs}: {', '.join(output_names(labels))}",
            "give the model folder, which has the names",
        )


def _with_plan(options: Options, path: Path, dataset: Dataset, settings: Sequence[str]) -> Options:
    """Return the options with the values of a plan from elsewhere; what `settings` say of a configuration stays."""
    path = path.expanduser().absolute()
    require_there(path, "plan")
    files = [path / name for name in ("plan.json", "plans.json")] if path.is_dir() else [path]
    file = next((item for item in files if item.is_file()), None)
    if file is None:
        raise InputError(f"{path} has no plan", "give a project, or a plans.json of nnU-Net")
    planning = options.planning.model_copy(update={"plan_from": None, "by_configuration": {}})
    for name, item in _configurations(file, dataset).items():
        planning = with_values(planning, name, {**values_of(item), "batch_size": item.batch_size})
        if item.preprocessing.image_ndim == 3:
            planning = planning.model_copy(update={"orientation": item.preprocessing.orientation})
    options = options.model_copy(update={"planning": planning})
    keys = tuple(f"planning.{name}." for name in CONFIGURATION_NAMES)
    return options.with_settings([setting for setting in settings if setting.startswith(keys)])


def _configurations(file: Path, dataset: Dataset) -> dict[ConfigurationName, Configuration]:
    """Return the configurations of a plan of segfit or nnU-Net that a plan here may have."""
    content, channels = read_json(file), dataset.channel_names
    found: Mapping[str, Configuration]
    if isinstance(content, dict) and "schema_version" in content:
        plan = Plan.load(file)
        found = plan.configurations
        if len(plan.channel_names) != len(channels):
            raise InputError(
                f"{file} is for {count(len(plan.channel_names), 'channel')}, {dataset.name} has {len(channels)}",
                "give a plan for these channels",
            )
    else:
        named = {"channel_names": {str(number): name for number, name in enumerate(channels)}}
        try:
            found = read_configurations(content, {**named, "labels": {"background": 0, "any": 1}})
        except InputError as error:
            raise InputError(f"{file}: {error}") from None
    return {name: found[name] for name in CONFIGURATION_NAMES if name in found}
