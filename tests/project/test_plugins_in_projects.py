"""A project whose network and loss come from another package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from segfit.bundle.bundle import open_bundle
from segfit.project import Project

CODE = """
from torch import nn

def squared(seen):
    return ((seen.shares - seen.truth.float()) ** 2).mean()

def tiny(spec):
    return nn.Conv2d(spec.in_channels, spec.num_outputs, 3, padding=1)
"""


def test_a_model_says_which_package_its_network_needs(
    tmp_path: Path, pictures: Path, tiny: list[str], plugin_package: Callable[..., Path]
) -> None:
    plugin_package(CODE, losses=["squared"], networks=["tiny"])
    asked = [*tiny, "planning.network=own-things:tiny", "training.loss=ce+own-things:squared"]
    project = Project.create(tmp_path / "own", pictures, settings=asked)
    project.run()
    (recipe,) = project.plan().training.values()
    assert not recipe.deep_supervision
    manifest = open_bundle(tmp_path / "own/model").manifest
    assert manifest.requires == {"own-things": "1.2"}
    assert manifest.members[0].configuration.network.plugin == "own-things:tiny"
    plain = Project.create(tmp_path / "plain", pictures, settings=[*tiny, "training.loss=ce+own-things:squared"])
    plain.run()
    manifest = open_bundle(tmp_path / "plain/model").manifest
    assert manifest.requires == {}
    assert "own-things" not in (tmp_path / "plain/model/model.json").read_text()
