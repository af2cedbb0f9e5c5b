from __future__ import annotations

import copy
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file

from segfit.bundle.bundle import (
    MANIFEST,
    Member,
    ModelManifest,
    TestCase,
    card,
    open_bundle,
    weights_name,
    write_bundle,
    write_zip,
)
from segfit.connected_components import PostprocessingStep
from segfit.errors import InputError
from segfit.files import content_hash, read_json, write_json
from segfit.labels import Exchange, LabelScheme
from segfit.networks.unet import build_network
from segfit.specs import Configuration, NetworkSpec, Normalization, PreprocessingSpec

CONFIGURATION = Configuration(
    name="2d",
    ndim=2,
    patch_size=(16, 16),
    batch_size=2,
    spacing_mm=(0.5, 0.5),
    median_shape=(30.5, 40.0),
    batch_dice=True,
    preprocessing=PreprocessingSpec(
        orientation="canonical",
        transpose=(0, 1, 2),
        spacing_mm=(None, 0.5, 0.5),
        normalization=(Normalization(scheme="zscore"),),
    ),
    network=NetworkSpec(
        kind="plain",
        ndim=2,
        in_channels=1,
        num_outputs=2,
        features=(2, 4),
        strides=((1, 1), (2, 2)),
        kernels=((3, 3), (3, 3)),
        encoder_convs=(1, 1),
        decoder_convs=(1,),
    ),
    memory_estimate=0,
)


def manifest(**fields: Any) -> ModelManifest:
    member = Member(
        configuration=CONFIGURATION,
        weights={"0": weights_name("2d", 0), "1": weights_name("2d", 1)},
        mirror_axes=(0,),
    )
    values: dict[str, Any] = {
        "name": "Livers",
        "labels": LabelScheme.from_declaration({"background": 0, "liver": 1}),
        "channel_names": ("CT",),
        "file_ending": ".nii.gz",
        "members": (member,),
    }
    return ModelManifest(**(values | fields))


def states(kind: torch.dtype = torch.float32) -> dict[str, dict[str, torch.Tensor]]:
    return {
        name: build_network(CONFIGURATION.network, deep_supervision=False).to(kind).state_dict()
        for name in manifest().files
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_bundle(tmp_path / "model", manifest(), states())
    return tmp_path / "model"


def test_round_trip(tmp_path: Path) -> None:
    weights = states()
    save_file(weights["weights-2d-1.safetensors"], tmp_path / "trained.safetensors")
    sources = {**weights, "weights-2d-1.safetensors": tmp_path / "trained.safetensors"}
    written = write_bundle(tmp_path / "model", manifest(dice={"liver": 0.91}), sources)
    assert set(written.checksums) == set(written.files)
    names = sorted(path.name for path in (tmp_path / "model").iterdir())
    assert names == ["card.md", "model.json", "weights-2d-0.safetensors", "weights-2d-1.safetensors"]
    bundle = open_bundle(tmp_path / "model")
    assert bundle.manifest == written
    for name, state in weights.items():
        read = bundle.weights(name)
        assert read.keys() == state.keys()
        for key, tensor in state.items():
            np.testing.assert_array_equal(read[key].numpy(), tensor.numpy())


def test_the_exchange_of_labels_survives_and_is_told(tmp_path: Path) -> None:
    (plain,) = manifest().members
    assert plain.exchange is None
    exchange = Exchange(axis=0, pairs=((1, 2),))
    network = CONFIGURATION.network.model_copy(update={"num_outputs": 3})
    sided = plain.model_copy(
        update={"exchange": exchange, "configuration": CONFIGURATION.model_copy(update={"network": network})}
    )
    labels = LabelScheme.from_declaration({"background": 0, "left": 1, "right": 2})
    written = write_bundle(tmp_path / "m", manifest(members=(sided,), labels=labels), states())
    assert open_bundle(tmp_path / "m").manifest.members[0].exchange == exchange
    assert "| 2 | 0 (left and right labels exchanged along 0) |" in card(written)
    older = plain.model_dump()
    del older["exchange"]
    assert Member.model_validate(older) == plain


def test_weights_are_stored_as_float32(tmp_path: Path) -> None:
    write_bundle(tmp_path / "model", manifest(), states(torch.float16))
    weights = open_bundle(tmp_path / "model").weights("weights-2d-0.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_a_bundle_is_replaced_but_nothing_else(folder: Path) -> None:
    write_bundle(folder, manifest(name="Second"), states())
    assert open_bundle(folder).manifest.name == "Second"
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    (folder / MANIFEST).unlink()
    with pytest.raises(InputError, match="is not a segfit model; choose another folder"):
        write_bundle(folder, manifest(), states())
    assert (folder / "card.md").is_file()


def test_a_failed_write_leaves_the_old_bundle(folder: Path) -> None:
    sources = {**states(), "weights-2d-1.safetensors": folder / "absent.safetensors"}
    with pytest.raises(FileNotFoundError):
        write_bundle(folder, manifest(name="Second"), sources)
    assert open_bundle(folder).manifest.name == "Livers"
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_damaged_bundles_are_refused(folder: Path) -> None:
    weights = folder / "weights-2d-1.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    with pytest.raises(InputError, match=r"weights-2d-1\.safetensors is damaged"):
        open_bundle(folder)
    weights.write_bytes(content[:40])
    with pytest.raises(InputError, match=r"weights-2d-1\.safetensors cannot be read"):
        open_bundle(folder, verify=False).weights(weights.name)
    weights.unlink()
    with pytest.raises(InputError, match=r"lacks weights-2d-1\.safetensors"):
        open_bundle(folder)
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text.replace('"schema_version": 1', '"schema_version": 2'))
    with pytest.raises(InputError, match="newer segfit"):
        open_bundle(folder)
    (folder / MANIFEST).write_text(text.replace('"tile_step": 0.5', '"tile_step": 0.6'))
    with pytest.raises(InputError, match=r"model\.json is damaged"):
        open_bundle(folder)
    (folder / MANIFEST).write_text(text[:100])
    with pytest.raises(InputError, match="not valid JSON"):
        open_bundle(folder)
    with pytest.raises(InputError, match=r"is not a segfit model: it has no model\.json"):
        open_bundle(folder.parent)


def test_weight_files_lie_in_the_folder() -> None:
    outside = Member(configuration=CONFIGURATION, weights={"0": "../weights.safetensors"})
    with pytest.raises(ValidationError, match="not a plain file name"):
        manifest(members=(outside,))
    with pytest.raises(ValidationError, match="share one weight file"):
        manifest(members=(manifest().members * 2))


def test_the_card_tells_what_a_reader_needs() -> None:
    text = card(
        manifest(
            dice={"liver": 0.9123},
            postprocessing=(PostprocessingStep(values=(1,), text="keep only the largest component of liver"),),
            training={"cases": 12, "preset": "stock"},
            licence="CC-BY-4.0",
            limits="adults only",
        )
    )
    for line in (
        "# Livers",
        "Segments liver in images of CT.",
        "Licence: CC-BY-4.0",
        "Known limits: adults only",
        "| liver | 1 | 0.912 |",
        "| 2d | 16 × 16 | 0.5 × 0.5 | 2 | 0 |",
        "Afterwards: keep only the largest component of liver.",
        "- cases: 12",
    ):
        assert line in text.splitlines(), line


def test_the_card_shows_names_as_they_are() -> None:
    """No name makes a link, a heading, HTML or a column of its own, or steers a terminal."""
    name = "<b>left_*|kidney* [x](http://y)\x1b[31m\n# head"
    shown = r"\<b\>left\_\*\|kidney\* \[x\](http://y)" + "\\" * 2 + r"u001b\[31m \# head"
    labels = LabelScheme.from_declaration({"background": 0, name: 1})
    step = PostprocessingStep(values=(1,), text=name)
    text = card(manifest(name=name, labels=labels, channel_names=(name,), postprocessing=(step,), training={"a": name}))
    for line in (f"# {shown}", f"Segments {shown} in images of {shown}.", f"| 0 | {shown} |", f"| {shown} | 1 | - |"):
        assert line in text.splitlines(), line
    assert text.count(shown) == text.count("# head") == 7
    assert "left_kidney" in card(manifest(name="left_kidney"))


def test_metadata_needs_no_torch(folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from segfit.bundle.bundle import open_bundle;"
        f"print(open_bundle(Path({str(folder)!r})).manifest.name, 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "Livers False\n"


_WITHOUT = """
import sys
import numpy as np

ROOMS = {"planning", "project", "selection", "training", "report", "cli"}

class Missing:
    def find_spec(self, name, *_):
        parts = name.split(".")
        if (parts[0] == "segfit" and len(parts) > 1 and parts[1] in ROOMS) or name == "segfit.fingerprint.measure":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
import segfit

for path in sys.argv[1:]:
    model = segfit.load_model(path, "cpu")
    print(*model.predict((np.random.default_rng(0).random((2, 16, 16), np.float32), (1.0, 0.5, 0.5))).labels.shape)
"""


def test_prediction_needs_neither_planner_nor_project(folder: Path, tmp_path: Path) -> None:
    """A fresh process that cannot import them loads and predicts, a folder and a zip."""
    bundle = open_bundle(folder)
    packed = tmp_path / "m.zip"
    write_zip(packed, bundle.manifest, {name: bundle.stored(name) for name in bundle.manifest.files})
    command = [sys.executable, "-c", _WITHOUT, str(folder), str(packed)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout == "2 16 16\n2 16 16\n"


@pytest.mark.parametrize(("ending", "shown"), [("", ".nii.gz files"), (".mha", ".mha files"), ("/", "DICOM series")])
def test_a_bundle_knows_its_images(tmp_path: Path, ending: str, shown: str) -> None:
    write_bundle(tmp_path / "model", manifest(image_ending=ending), states())
    found = open_bundle(tmp_path / "model").manifest
    assert (found.input_ending, found.file_ending) == (ending or ".nii.gz", ".nii.gz")
    assert f"Made from {shown}. " in (tmp_path / "model" / "card.md").read_text()


def test_models_of_other_versions_are_read(tmp_path: Path) -> None:
    written = write_bundle(tmp_path / "model", manifest(dice={"liver": 0.91}), states())
    content = read_json(tmp_path / "model" / MANIFEST)
    content["scores"] = content.pop("dice")  # its old name
    content["colour"] = content["members"][0]["colour"] = "unknown here"
    content["seal"] = ""
    write_json(tmp_path / "model" / MANIFEST, content)
    assert open_bundle(tmp_path / "model").manifest == written.model_copy(update={"seal": ""})


_ABSURD = (
    *(0, -1, -5, 7, True, 2**31, 2**100, 99999, 1e9, 1e30, -0.5, math.inf, math.nan, None, "", "x", "..", "\x1b[31m"),
    *([], [0], [-1], [2**40] * 3, [7], [0] * 1000, [[1]], {}, {"x": 1}, {"headline": 3}, [{}], [None, None], ["\0"]),
)


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the way to every value inside a JSON value, from the outer ones to the inner ones."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from _places(item, (*path, key))


def test_a_model_with_absurd_values_is_refused_or_is_what_its_file_says(folder: Path) -> None:
    """Every value of model.json in turn is replaced by what no model has: it opens as written, or is refused."""
    statistics = dict.fromkeys(("mean", "median", "std", "min", "max", "percentile_00_5", "percentile_99_5"), 1.0)
    normalization = (Normalization(scheme="ct", statistics=statistics),)
    preprocessing = CONFIGURATION.preprocessing.model_copy(update={"normalization": normalization})
    (member,) = manifest().members
    member = member.model_copy(
        update={
            "configuration": CONFIGURATION.model_copy(update={"preprocessing": preprocessing}),
            "exchange": Exchange(axis=0, pairs=()),
        }
    )
    rich = manifest(
        members=(member,),
        image_ending=".png",
        spacing_mm=(3.0, 0.5, 0.5),
        postprocessing=(PostprocessingStep(values=(1,), text="keep the largest"),),
        dice={"liver": 0.9},
        verdict={"level": "good", "headline": "good", "findings": ["all well"]},
        labels=LabelScheme.from_declaration({"background": 0, "liver": 5, "ignore": 9}),
        training={"cases": 3},
        test_case=TestCase(kind="phantom", spacing_mm=(3.0, 0.5, 0.5), affine=np.eye(4).tolist()),
    )
    write_bundle(folder, rich, states())
    good = read_json(folder / MANIFEST) | {"seal": ""}
    refused: list[str] = []
    opened = 0
    for place in _places(good):
        for value in _ABSURD:
            content = copy.deepcopy(good)
            *parents, last = place
            inner = content
            for key in parents:
                inner = inner[key]
            inner[last] = value
            (folder / MANIFEST).write_text(json.dumps(content))
            try:
                found = open_bundle(folder, verify=False).manifest
            except InputError as error:
                refused.append(str(error))
                continue
            card(found)
            # An object may lack what has a default, and have what other versions know.
            assert found.model_dump(mode="json") == content or isinstance(value, dict), place
            opened += 1
    assert all(str(folder) in message and "\n" not in message for message in refused)
    assert len(refused) > 5 * opened > 0


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("schema_version",), 0),
        (("schema_version",), -5),
        (("schema_version",), True),
        (("members", 0, "configuration", "patch_size"), [0, 16]),
        (("members", 0, "configuration", "patch_size"), [2**17, 2**17]),
        (("members", 0, "configuration", "preprocessing", "spacing_mm"), [None, -1, 0.5]),
        (("members", 0, "configuration", "network", "features"), [10**9, 4]),
        (("members", 0, "configuration", "network", "kernels"), [[99999, 3], [3, 3]]),
        (("members", 0, "configuration", "network", "encoder_convs"), [10**9, 1]),
        (("members", 0, "mirror_axes"), [7]),
        (("members", 0, "mirror_axes"), [0] * 1000),
        (("members", 0, "tile_step"), 1e-9),
        (("file_ending",), ".xyz"),
        (("labels", "stored"), [0, 10**30]),
        (("channel_names",), []),
    ],
)
def test_a_damaged_value_is_named_with_its_file(folder: Path, place: tuple[Any, ...], value: object) -> None:
    content = read_json(folder / MANIFEST) | {"seal": ""}
    inner = content
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    write_json(folder / MANIFEST, content)
    with pytest.raises(InputError) as refused:
        open_bundle(folder)
    assert str(folder / MANIFEST) in refused.value.problem
    assert {str(part) for part in place} & set(re.split(r"\W+", refused.value.problem)) - {"0"}
    assert refused.value.action == "copy it again from where it came"


def test_a_model_with_more_labels_than_outputs_is_refused() -> None:
    labels = LabelScheme.from_declaration({"background": 0, "liver": 1, "spleen": 2})
    with pytest.raises(ValidationError, match=r"members\.0: a network of 2 outputs does not fit 3 classes"):
        manifest(labels=labels)
    with pytest.raises(ValidationError, match=r"members\.0: a network of 1 inputs does not fit 2 channels"):
        manifest(channel_names=("CT", "MR"))


def test_a_model_of_older_names_opens(folder: Path) -> None:
    """Before ``resample_logits`` and ``dice`` they were called otherwise; the seal is of the file as it was written."""
    path = folder / MANIFEST
    old = read_json(path) | {"dice": {"liver": 0.9}}
    old = json.loads(json.dumps(old).replace("resample_logits", "resample_scores").replace('"dice"', '"scores"'))
    hand = ("seal", "name", "intended_use", "limits", "licence")
    for later in ("authors", "data_origin", "test_case"):
        del old[later]
    write_json(path, old | {"seal": content_hash({key: value for key, value in old.items() if key not in hand})})
    opened = open_bundle(folder).manifest
    assert opened.members == manifest().members
    assert opened.dice == {"liver": 0.9}
