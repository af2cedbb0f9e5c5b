"""States of a training: whole or absent, checked, two generations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from segfit.training.checkpoint import Checkpoints, State


def state(step: int) -> State:
    tensors = {
        "network/weight": torch.arange(12.0).reshape(3, 4).T + step,  # not contiguous
        "optimizer/step/weight": torch.tensor(float(step)),
        "half": torch.full((3,), 0.5, dtype=torch.bfloat16),
    }
    return State(step, tensors, {"seconds": 1.25, "curve": [{"mean": None}]})


def test_round_trip(tmp_path: Path) -> None:
    Checkpoints(tmp_path / "state", "me").save(state(7))
    loaded, complaints = Checkpoints(tmp_path / "state", "me").load()
    assert loaded is not None
    assert complaints == ()
    assert loaded.step == 7
    assert loaded.facts == state(7).facts
    assert loaded.tensors.keys() == state(7).tensors.keys()
    for name, tensor in state(7).tensors.items():
        assert torch.equal(loaded.tensors[name], tensor)
        assert loaded.tensors[name].dtype == tensor.dtype


def test_two_generations_are_kept_and_the_newest_is_loaded(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, "me")
    for step in (5, 90, 1000):
        checkpoints.save(state(step))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-000000090.safetensors",
        "step-000001000.safetensors",
    ]
    loaded, _ = checkpoints.load()
    assert loaded is not None
    assert loaded.step == 1000


@settings(max_examples=40)
@given(data=st.data())
def test_any_flipped_byte_or_cut_is_noticed(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("state")
    checkpoints = Checkpoints(folder, "me")
    checkpoints.save(state(1))
    checkpoints.save(state(2))
    newest = folder / "step-000000002.safetensors"
    content = bytearray(newest.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[position] ^= data.draw(st.integers(1, 255))
    else:
        content = content[:position]
    newest.write_bytes(content)
    loaded, complaints = checkpoints.load()
    assert loaded is not None
    # A flip in the spaces that pad the header changes nothing and may pass; nothing else may.
    if complaints:
        assert loaded.step == 1
        assert [(item.code, item.file) for item in complaints] == [("damaged_state", str(newest))]
        assert not newest.exists()
    else:
        assert loaded.step == 2
        assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in state(2).tensors.items())


def test_all_damaged_is_no_state(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, "me")
    checkpoints.save(state(1))
    checkpoints.save(state(2))
    for path in tmp_path.iterdir():
        path.write_bytes(b"")
    loaded, complaints = checkpoints.load()
    assert loaded is None
    assert len(complaints) == 2


def test_another_identity_is_not_loaded_and_makes_room(tmp_path: Path) -> None:
    Checkpoints(tmp_path, "other").save(state(3))
    assert Checkpoints(tmp_path, "me").load() == (None, ())
    assert list(tmp_path.iterdir()) == []


def test_looking_changes_nothing(tmp_path: Path) -> None:
    Checkpoints(tmp_path, "other").save(state(3))
    (tmp_path / ".partial-x").touch()  # of whoever writes just now
    (tmp_path / "step-000000009.safetensors").write_bytes(b"torn")
    assert Checkpoints(tmp_path, "me").peek() is None
    found = Checkpoints(tmp_path, "other").peek()
    assert found is not None
    assert found.step == 3
    assert len(list(tmp_path.iterdir())) == 3


def test_a_state_replaces_later_ones_when_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path, "me")
    checkpoints.save(state(7))
    checkpoints.save(state(9))
    with monkeypatch.context() as patch:
        patch.setattr("segfit.training.checkpoint.write_bytes", full_disk)
        with pytest.raises(OSError, match="full"):
            checkpoints.replace(state(5))
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-00000000{step}.safetensors" for step in (7, 9)]
    checkpoints.replace(state(5))
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000005.safetensors"]


def full_disk(*_: object) -> None:
    raise OSError("full")


def test_a_failed_save_keeps_the_older_state(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, "me")
    checkpoints.save(state(1))
    with pytest.raises(ValueError, match="not JSON compliant"):
        checkpoints.save(State(2, {}, {"loss": float("nan")}))
    loaded, _ = checkpoints.load()
    assert loaded is not None
    assert loaded.step == 1


def test_delete_leaves_nothing(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "state", "me")
    checkpoints.delete()
    checkpoints.save(state(1))
    checkpoints.delete()
    assert not (tmp_path / "state").exists()
