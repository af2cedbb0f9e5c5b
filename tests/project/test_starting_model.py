"""A run that starts from a model, and one that takes over a plan."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from segfit.cli.main import run
from segfit.cli.outcome import print_outcome
from segfit.dataset.phantom import make_phantom
from segfit.files import write_json
from segfit.networks.unet import build_network
from segfit.nnunet.weights import to_nnunet
from segfit.options import Options
from segfit.planning.plan import Plan
from segfit.project import Project
from segfit.project.starting_model import kept_model
from segfit.project.upkeep import unneeded
from segfit.specs import NetworkSpec
from segfit.training.online_validation import CaseValidation, ValidationSchedule
from segfit.training.result import TrainingResult

TINY = ["training.steps=6", "planning.base_features=4", "planning.batch_size=2", "planning.folds=0"]
FINE = ["training.steps=8", "planning.batch_size=2", "planning.folds=0"]
NETWORK = NetworkSpec(
    kind="plain",
    ndim=3,
    in_channels=1,
    num_outputs=3,
    features=(4, 8, 16),
    strides=((1, 1, 1), (1, 2, 2), (2, 2, 2)),
    kernels=((1, 3, 3), (3, 3, 3), (3, 3, 3)),
    encoder_convs=(2, 2, 2),
    decoder_convs=(2, 2),
)


def phantom(folder: Path, labels: Mapping[str, int], seed: int = 0) -> Path:
    """Five volumes with an organ (1) and a lesion (2) under these names."""
    make_phantom(folder, cases=5, test_cases=0, shape=(14, 28, 28), seed=seed, spacing_mm=(2.5, 1.2, 1.2))
    declared = json.loads((folder / "dataset.json").read_text())
    write_json(folder / "dataset.json", declared | {"labels": {"background": 0, **labels}})
    return folder


@pytest.fixture(scope="session")
def source(volumes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished project, whose model knows organ and lesion."""
    root = tmp_path_factory.mktemp("source") / "p"
    Project.create(root, volumes, settings=TINY).run()
    return root


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset with a class that the model knows and one that it does not."""
    return phantom(tmp_path_factory.mktemp("other") / "Dataset003_Other", {"vessel": 1, "lesion": 2}, seed=5)


def started(root: Path, dataset: Path, model: Path, *settings: str) -> Project:
    return Project.create(root, dataset, settings=[*FINE, f"training.start_from={model}", *settings])


def saved(root: Path) -> Options:
    return Options.model_validate(json.loads((root / "project.json").read_text())["options"])


@pytest.fixture(scope="session")
def tuned(source: Path, other: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A finished run that started from the model of `source`."""

    def plan(self: CaseValidation, step_seconds: float, seconds: float) -> None:
        self.schedule = ValidationSchedule(2, project.splits().folds[0].validation, 0.0)

    project = started(tmp_path_factory.mktemp("tuned") / "p", other, source)
    with pytest.MonkeyPatch.context() as patch:  # validate, however long a step takes
        patch.setattr(CaseValidation, "plan", plan)
        project.run()
    return project


def test_the_plan_of_the_model_is_taken_over(tuned: Project, source: Path) -> None:
    before, plan = Plan.load(source / "plan.json"), tuned.plan()
    assert list(plan.configurations) == ["3d_fullres"]
    old, new = before.configurations["3d_fullres"], plan.configurations["3d_fullres"]
    assert new.network == old.network
    assert (new.patch_size, new.spacing_mm) == (old.patch_size, old.spacing_mm)
    assert new.preprocessing == old.preprocessing
    told = {item.key: item.rule for item in plan.decisions}
    for key in ("patch_size", "spacing_mm", "network.features", "network.strides"):
        assert told[f"3d_fullres.{key}"] == "taken_over"
    assert not any("set by you" in change for change in plan.changes if "training" not in change)


def test_what_fits_is_told_and_trained(tuned: Project) -> None:
    run_spec = tuned.run_plan()
    initial = run_spec.initial
    assert initial is not None
    assert (initial.layers, initial.fitted, initial.anew) == (24, 22, ("heads.0", "heads.1"))
    assert (initial.kept, initial.added, initial.dropped) == (("lesion",), ("vessel",), ("organ",))
    assert not initial.saw_cases
    assert run_spec.race == ()
    recipe = tuned.plan().training["3d_fullres"]
    assert (recipe.optimizer, recipe.learning_rate, recipe.warmup_share) == ("muon", 0.015, 0.1)


def test_old_classes_are_told_before_and_after(tuned: Project) -> None:
    (folder,) = tuned.folder.runs.glob("3d_fullres/fold-0/*")
    result = TrainingResult.load(folder / "training.json")
    assert result.before is not None
    assert set(result.before.dice) == {"vessel", "lesion"}
    assert result.before.step == 0
    assert result.curve[-1].step == 8


def test_old_classes_are_told_before_and_after_as_json(tuned: Project, capsys: pytest.CaptureFixture[str]) -> None:
    print_outcome(tuned, as_json=True)
    told = json.loads(capsys.readouterr().out)["start"]
    (folder,) = tuned.folder.runs.glob("3d_fullres/fold-0/*")
    result = TrainingResult.load(folder / "training.json")
    assert result.before is not None
    assert (told["kept"], told["added"], told["dropped"]) == (["lesion"], ["vessel"], ["organ"])
    assert (told["layers"], told["fitted"]) == (24, 22)
    assert told["trainings"] == [
        {
            "configuration": "3d_fullres",
            "fold": 0,
            "cases": list(result.validation_cases),
            "before": {"lesion": result.before.dice["lesion"]},
            "after": {"lesion": result.curve[-1].dice["lesion"]},
        }
    ]


def test_what_starts_from_nothing_says_so_as_json(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_outcome(Project.open(source), as_json=True)
    assert json.loads(capsys.readouterr().out)["start"] is None


def test_the_training_begins_with_the_weights_of_the_model(source: Path, other: Path, tmp_path: Path) -> None:
    project = started(tmp_path / "p", other, source, "training.learning_rate=1e-12", "training.steps=1")
    project.train()
    assert project.plan().training["3d_fullres"].learning_rate == 1e-12  # what the user set stays
    (weights,) = project.folder.runs.glob("*/*/*/weights.safetensors")
    (model,) = (source / "model").glob("weights-*")
    found, came = load_file(weights), load_file(model)
    body = [name for name in came if not name.startswith("heads.")]
    assert all(torch.allclose(found[name], came[name], atol=1e-6) for name in body)
    for part in ("weight", "bias"):
        head, source_head = found[f"heads.1.{part}"], came[f"heads.1.{part}"]
        assert torch.allclose(head[[0, 2]], source_head[[0, 2]], atol=1e-6)  # background and lesion
        assert not torch.allclose(head[1], source_head[1], atol=1e-6) or part == "bias"


def test_a_training_counts_for_the_content_of_the_model_wherever_it_lies(
    tuned: Project, source: Path, other: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "under another name"
    shutil.copytree(source / "model", moved)
    again = Project.open(tuned.folder.root, settings=[f"training.start_from={moved}"])
    assert again.plan_key == tuned.plan_key
    assert saved(tuned.folder.root).training.start_from == tuned.start.identity  # type: ignore[union-attr]
    before = tuned.initial
    (weights,) = moved.glob("weights-*")
    state = load_file(weights)
    state["encoder.0.0.conv.bias"] += 1
    save_file(state, tmp_path / "weights.safetensors")
    fresh = started(tmp_path / "q", other, tmp_path / "weights.safetensors")
    assert before is not None
    assert fresh.initial is not None
    assert fresh.initial.identity != before.identity
    assert fresh.plan_key != tuned.plan_key


def test_the_model_is_not_needed_any_more(source: Path, other: Path, tmp_path: Path) -> None:
    shutil.copytree(source / "model", tmp_path / "model")
    started(tmp_path / "p", other, tmp_path / "model")
    shutil.rmtree(tmp_path / "model")
    project = Project.open(tmp_path / "p")
    assert project.plan().configurations["3d_fullres"].network.features == (4, 8, 16)
    shutil.rmtree(tmp_path / "p" / "starts")
    assert run(["plan", "--out", str(tmp_path / "p")]) == 2


def weights(outputs: int = 3, channels: int = 1, seed: int = 3) -> dict[str, torch.Tensor]:
    spec = NETWORK.model_copy(update={"num_outputs": outputs, "in_channels": channels})
    generator = torch.Generator().manual_seed(seed)
    return build_network(spec, deep_supervision=False, generator=generator).state_dict()


def test_a_plain_state_dict_brings_its_network(volumes: Path, tmp_path: Path) -> None:
    torch.save({"state_dict": to_nnunet(weights(), NETWORK)}, tmp_path / "weights.pth")
    project = started(tmp_path / "p", volumes, tmp_path / "weights.pth")
    assert project.start is not None
    assert (project.start.kind, project.start.network) == ("weights", NETWORK)
    initial = project.run_plan().initial
    assert initial is not None
    assert (initial.fitted, initial.anew, initial.kept) == (24, (), ("organ", "lesion"))
    kept = load_file(tmp_path / "p" / "starts" / project.start.identity / "weights.safetensors")
    assert all(torch.equal(kept[name], tensor) for name, tensor in weights().items())


def test_a_checkpoint_of_nnssl_brings_all_but_its_heads(volumes: Path, tmp_path: Path) -> None:
    plan = {
        "architecture_plans": {"arch_class_name": "ResEncL", "arch_kwargs": None},
        "pretrain_num_input_channels": 1,
        "key_to_encoder": "encoder.stages",
        "key_to_stem": "encoder.stem",
    }
    spec = NETWORK.model_copy(update={"kind": "residual", "num_outputs": 1})
    state = build_network(spec, deep_supervision=False, generator=torch.Generator().manual_seed(1)).state_dict()
    content = {"network_weights": to_nnunet(state, spec), "nnssl_adaptation_plan": plan, "citations": []}
    torch.save(content, tmp_path / "checkpoint_final.pth")
    project = started(tmp_path / "p", volumes, tmp_path / "checkpoint_final.pth")
    found = project.run_plan().initial
    assert project.start is not None
    assert found is not None
    assert (project.start.kind, project.start.network.kind) == ("nnssl", "residual")
    assert (found.anew, found.kept, found.added) == (("heads.0", "heads.1"), (), ("organ", "lesion"))
    assert project.plan().configurations["3d_fullres"].network.features == (4, 8, 16)


@pytest.mark.golden("inference/models/Dataset601_TinyBlobs")
@pytest.mark.parametrize("name", ["nnUNetPlans__3d_fullres", "nnUNetResEncUNetMPlans__3d_fullres", "nnUNetPlans__2d"])
def test_a_model_folder_of_nnunet(golden: Path, tmp_path: Path, name: str) -> None:
    model = golden / "inference" / "models" / "Dataset601_TinyBlobs" / f"nnUNetTrainer__{name}"
    declared = json.loads((model / "dataset.json").read_text())["labels"]
    names = [label for label in declared if label != "background"]
    dataset = phantom(tmp_path / "data", {names[1]: 1, "new": 2})
    project = started(tmp_path / "p", dataset, model)
    plans = json.loads((model / "plans.json").read_text())["configurations"]
    plans = plans[name.rpartition("__")[2]]
    (item,) = project.plan().configurations.values()
    assert list(item.network.features) == plans["architecture"]["arch_kwargs"]["features_per_stage"]
    assert list(item.patch_size) == plans["patch_size"]
    assert list(item.spacing_mm) == plans["spacing"]
    assert item.preprocessing.orientation == "stored"
    assert project.initial is not None
    found = project.initial.for_network(build_network(item.network, deep_supervision=True), project.dataset.labels)
    assert found.anew == tuple(f"heads.{level}" for level in range(item.network.num_stages - 1))
    assert (found.kept, found.added, found.dropped) == ((names[1],), ("new",), (names[0],))
    kept = load_file(project.initial.path)
    checkpoint = torch.load(model / "fold_0" / "checkpoint_final.pth", weights_only=False, map_location="cpu")
    last = item.network.num_stages - 2
    assert torch.equal(kept[f"heads.{last}.weight"], checkpoint["network_weights"][f"decoder.seg_layers.{last}.weight"])


class Harmful:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def test_code_in_a_checkpoint_is_not_run(volumes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.pth").write_bytes(pickle.dumps({"state_dict": Harmful(tmp_path / "was here")}))
    torch.save({"network_weights": Harmful(tmp_path / "was here")}, tmp_path / "worse.pth")
    for name in ("bad.pth", "worse.pth"):
        assert run(["run", str(volumes), "--out", str(tmp_path / "p"), "--from", str(tmp_path / name)]) == 2
        assert name in capsys.readouterr().err
    assert not (tmp_path / "was here").exists()
    assert not (tmp_path / "p").exists()


def test_what_contradicts_is_refused_and_nothing_is_lost(
    source: Path, volumes: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, model = tmp_path / "p", str(source / "model")
    save_file(weights(channels=2), tmp_path / "channels.safetensors")
    save_file(weights(outputs=5), tmp_path / "outputs.safetensors")
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    broken = weights()
    broken["upsample.0.bias"][0] = float("nan")
    save_file(broken, tmp_path / "nan.safetensors")
    damaged = {"plans": {}, "configuration": "3d_fullres", "dataset_json": [1]}
    torch.save({"network_weights": to_nnunet(weights(), NETWORK), "init_args": damaged}, tmp_path / "plans.pth")
    (tmp_path / "plans.json").write_text('{"configurations": {"2d": {}}}')
    assert run(["plan", str(volumes), "--out", str(root), "--set", "seed=7"]) == 0
    before = (root / "project.json").read_bytes()
    for arguments, named in (
        (["--from", model, "--preset", "stock"], "--preset stock"),
        (["--from", model, "--set", "planning.features=4,8"], "planning.features"),
        (["--from", model, "--set", "planning.3d_fullres.kind=plain"], "planning.3d_fullres.kind"),
        (["--from", model, "--set", "planning.configurations=2d"], "planning.configurations"),
        (["--from", model, "--plan-from", str(source)], "--plan-from"),
        (["--from", str(tmp_path / "channels.safetensors")], "2 channels"),
        (["--from", str(tmp_path / "outputs.safetensors")], "5 outputs"),
        (["--from", str(tmp_path / "other.safetensors")], "not those of a U-Net"),
        (["--from", str(tmp_path / "nan.safetensors")], "not finite"),
        (["--from", str(tmp_path / "plans.pth")], "plans.pth"),
        (["--from", str(tmp_path / "nothing")], "nothing"),
        (["--from", str(volumes)], "not a model"),
        (["--plan-from", str(volumes)], "no plan"),
        (["--plan-from", str(tmp_path / "plans.json")], "plans.json"),
    ):
        capsys.readouterr()
        assert run(["train", "--out", str(root), *arguments]) == 2, arguments
        error = capsys.readouterr().err
        assert named in error, arguments
        assert error.strip().count("\n") <= 1
        assert (root / "project.json").read_bytes() == before
        assert not (root / "starts").exists()
    assert run(["plan", str(pictures), "--out", str(tmp_path / "q"), "--from", model]) == 2


def test_axes_of_another_kind_are_refused(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(weights(channels=3), tmp_path / "weights.safetensors")
    out = ["--out", str(tmp_path / "p"), "--from", str(tmp_path / "weights.safetensors")]
    assert run(["plan", str(pictures), *out]) == 2
    assert "made for volumes" in capsys.readouterr().err


def test_a_plan_is_moved_to_another_dataset(source: Path, other: Path, tmp_path: Path) -> None:
    before = Plan.load(source / "plan.json").configurations["3d_fullres"]
    assert run(["plan", str(other), "--out", str(tmp_path / "p"), "--plan-from", str(source), "--set", "seed=3"]) == 0
    after = Plan.load(tmp_path / "p" / "plan.json").configurations["3d_fullres"]
    assert after.network == before.network
    assert (after.patch_size, after.batch_size, after.spacing_mm) == (
        before.patch_size,
        before.batch_size,
        before.spacing_mm,
    )
    assert after.preprocessing == before.preprocessing
    assert kept_model(tmp_path / "p", "0" * 16) is None
    own = ["--plan-from", str(source / "plan.json"), "--set", "planning.3d_fullres.batch_size=5"]
    assert run(["plan", "--out", str(tmp_path / "p"), *own]) == 0
    assert Plan.load(tmp_path / "p" / "plan.json").configurations["3d_fullres"].batch_size == 5


def test_only_the_network_comes_where_voxels_are_of_another_kind(source: Path, tmp_path: Path) -> None:
    fine = make_phantom(tmp_path / "fine", cases=5, test_cases=0, shape=(14, 28, 28), spacing_mm=(0.3, 0.1, 0.1))
    plan = started(tmp_path / "p", fine, source).plan()
    before = Plan.load(source / "plan.json").configurations["3d_fullres"]
    item = plan.configurations["3d_fullres"]
    assert item.network == before.network
    assert max(item.spacing_mm) < 0.5
    told = {decision.key: decision.rule for decision in plan.decisions}
    assert told["3d_fullres.network.features"] == "taken_over"
    assert told["3d_fullres.spacing_mm"] == "spacing"


def test_a_model_of_other_options_is_not_needed(tuned: Project, tmp_path: Path) -> None:
    shutil.copytree(tuned.folder.root, tmp_path / "p")
    kept = tmp_path / "p" / "starts" / tuned.start.identity  # type: ignore[union-attr]
    shutil.copytree(kept, kept.parent / ("0" * 16))
    found = {item.path.name: item.what for item in unneeded(Project.open(tmp_path / "p"))}
    assert found == {"0" * 16: "model of other options"}


def test_with_a_time_nothing_races(source: Path, other: Path, tmp_path: Path) -> None:
    settings = ["time_s=3600", "training.steps=null"]
    run_spec = started(tmp_path / "p", other, source, *settings).run_plan()
    assert (run_spec.configurations, run_spec.race, run_spec.start) == (("3d_fullres",), (), None)
    assert run_spec.seconds_per_training is not None
    assert run_spec.initial is not None
    assert run_spec.initial.fitted == 22


@pytest.mark.golden("inference/models/Dataset601_TinyBlobs")
def test_a_checkpoint_of_nnunet_alone(golden: Path, volumes: Path, tmp_path: Path) -> None:
    model = golden / "inference/models/Dataset601_TinyBlobs/nnUNetTrainer__nnUNetPlans__3d_fullres"
    alone = started(tmp_path / "p", volumes, model / "fold_0" / "checkpoint_final.pth")
    whole = started(tmp_path / "q", volumes, model)
    assert alone.start is not None
    assert whole.start is not None
    assert alone.start.kind == whole.start.kind == "nnunet"
    assert alone.start.identity == whole.start.identity


@pytest.mark.golden("inference/models/Dataset601_TinyBlobs")
def test_plans_of_nnunet_are_moved(golden: Path, volumes: Path, tmp_path: Path) -> None:
    file = golden / "inference/models/Dataset601_TinyBlobs/nnUNetTrainer__nnUNetPlans__3d_fullres/plans.json"
    assert run(["plan", str(volumes), "--out", str(tmp_path / "p"), "--plan-from", str(file)]) == 0
    there = json.loads(file.read_text())["configurations"]
    for name, item in Plan.load(tmp_path / "p" / "plan.json").configurations.items():
        assert list(item.patch_size) == there[name]["patch_size"], name
        assert item.batch_size == there[name]["batch_size"], name
        assert list(item.network.features) == there[name]["architecture"]["arch_kwargs"]["features_per_stage"], name


def test_a_model_of_the_same_cases_is_known(source: Path, tmp_path: Path) -> None:
    dataset = Project.open(source).dataset
    project = started(tmp_path / "p", dataset.root, source, "training.steps=2")
    assert project.start is not None
    assert project.start.data == project.fingerprint().content_hash()
