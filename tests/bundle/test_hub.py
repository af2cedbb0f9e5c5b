"""Models of the Hugging Face hub: which addresses are taken, and that what is fetched is opened. The hub is a fake."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from test_bundle import manifest, states

from segfit.bundle.bundle import write_bundle
from segfit.cli.main import run
from segfit.errors import InputError
from segfit.inference.model import load_model
from segfit.inference.open_model import is_model, open_model

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the hub was asked for; it has one model."""
    write_bundle(tmp_path / "cache", manifest(), states())
    calls: list[dict[str, Any]] = []

    def snapshot_download(name: str, **how: Any) -> str:
        calls.append({"name": name, **how})
        if name != "lab/livers":
            raise OSError("Repository Not Found for url")
        return str(tmp_path / "cache")

    module = ModuleType("huggingface_hub")
    module.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return calls


def test_a_model_of_the_hub_is_fetched(asked: list[dict[str, Any]], tmp_path: Path) -> None:
    address = f"hf://lab/livers@{REVISION}"
    model = load_model(address, "cpu")
    assert model.name == "Livers"
    assert asked[0]["name"] == "lab/livers"
    assert asked[0]["revision"] == REVISION
    assert set(asked[0]["allow_patterns"]) == {"model.json", "card.md", "*.safetensors"}  # nothing that is code
    assert model.source is not None
    assert model.source.paths == (tmp_path / "cache",)  # where workers find it
    assert is_model(Path(address))  # as the command line has it: with one slash
    assert open_model(Path(address)).manifest == model.manifest
    assert run(["info", address]) == 0
    assert run(["verify", address]) == 0
    assert len(open_model([address, "hf://lab/livers@v1.0"]).manifest.members) == 2
    with pytest.raises(InputError, match="cannot be fetched"):
        load_model("hf://lab/kidneys@v1", "cpu")


@pytest.mark.parametrize(
    "address",
    ["hf://lab/livers", "hf://lab/livers@main", "hf://lab/livers@HEAD", "hf://lab/livers@", "hf://livers@v1", "hf://a/b/c@v1",
     "hf://lab/../x@v1", "hf:///lab/livers@v1", "hf://lab/livers@v1 --x",
     "hf://../..@v1", "hf://lab/livers@../../v1"],
)  # fmt: skip
def test_addresses_that_name_no_state_are_refused(asked: list[dict[str, Any]], address: str) -> None:
    with pytest.raises(InputError, match="REVISION") as refused:
        load_model(address, "cpu")
    assert "hf://ORG/NAME@REVISION" in refused.value.action
    assert asked == []


def test_without_the_package_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match="huggingface-hub") as refused:
        load_model(f"hf://lab/livers@{REVISION}", "cpu")
    assert "segfit[hub]" in refused.value.action
