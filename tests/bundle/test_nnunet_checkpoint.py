"""Checkpoints that run nothing: what torch wrote is read, what a stranger made up ends in one sentence."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from segfit.errors import InputError
from segfit.nnunet.checkpoint import foreign_name, read_checkpoint, read_pickle

KINDS = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16]
KINDS += [torch.int8, torch.uint8, torch.bool]


class Code:
    """Code as a pickle holds it."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call[0], self.call[1:]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_tensors_are_those_that_torch_wrote(tmp_path: Path, kind: torch.dtype) -> None:
    whole = torch.arange(24).reshape(2, 3, 4).to(kind)
    parameter = torch.nn.Parameter(whole.float())
    weights = {"whole": whole, "turned": whole.transpose(0, 2), "part": whole[1, 1:], "one": whole[0, 0, 0]}
    torch.save({"weights": weights, "parameter": parameter, "empty": whole[:0]}, tmp_path / "a.pth")
    found = read_checkpoint(tmp_path / "a.pth")
    for name, tensor in weights.items():
        assert torch.equal(found["weights"][name], tensor)
        assert found["weights"][name].dtype == kind
    assert torch.equal(found["parameter"], parameter.detach())
    assert found["empty"].shape == (0, 3, 4)
    assert found["weights"]["whole"].data_ptr() == found["weights"]["turned"].data_ptr()  # one storage, read once


def test_plain_values_and_numbers_of_numpy(tmp_path: Path) -> None:
    numbers = [np.float32(1.5), np.float64(-2), np.int64(3), np.uint8(4), np.bool_(True), np.dtype(">i4").type(5)]
    content = {"text": "a", "list": [1, 2.0, None], "nested": {"a": (1, {"b": b"c"})}, "numbers": numbers}
    for protocol in (2, 5):
        torch.save(content, tmp_path / "a.pth", pickle_protocol=protocol)
        assert read_checkpoint(tmp_path / "a.pth") == content


def test_what_is_foreign_is_a_name(tmp_path: Path) -> None:
    foreign = {"path": tmp_path, "array": np.zeros(3), "set": {1, 2}, "module": torch.nn.Linear(1, 1), "type": Path}
    torch.save({**foreign, "weights": {"a": torch.ones(1)}}, tmp_path / "a.pth")
    found = read_checkpoint(tmp_path / "a.pth")
    names = {name: foreign_name(found[name]) for name in foreign}
    assert names["path"] == names["type"].replace("Path", type(tmp_path).__name__)
    assert names["module"] == "torch.nn.modules.linear.Linear"
    assert names["set"] == "set"
    assert names["array"] is not None
    assert names["array"].startswith("numpy")
    assert torch.equal(found["weights"]["a"], torch.ones(1))


def pickled(content: Any) -> bytes:
    return pickle.dumps(content, protocol=2)


def archive(path: Path, data: bytes, **entries: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/data.pkl", data)
        for name, content in entries.items():
            file.writestr(f"a/{name.replace('__', '/')}", content)
    return path


def tensor_of(size: tuple[Any, ...], stride: tuple[Any, ...], offset: Any = 0) -> bytes:
    """Return the pickle of a tensor with a storage of two numbers, of any declared shape."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", 2) if value is Code else None

    class Rebuilt:
        def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
            rebuild = torch._utils._rebuild_tensor_v2  # type: ignore[attr-defined]
            return rebuild, (Code, offset, size, stride, False, None)

    stream = io.BytesIO()
    Pickler(stream, protocol=2).dump({"a": Rebuilt()})
    return stream.getvalue()


STORAGE = {"data__0": np.float32([1, 2]).tobytes()}


def test_a_made_up_tensor_is_read_where_it_is_one(tmp_path: Path) -> None:
    found = read_checkpoint(archive(tmp_path / "a.pth", tensor_of((2,), (1,)), **STORAGE))
    assert found["a"].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("size", "stride", "offset"),
    [
        ((2**40,), (0,), 0),
        ((3,), (1,), 0),
        ((2,), (1,), 1),
        ((2,), (5,), 0),
        ((-1,), (1,), 0),
        ((2, 2), (1,), 0),
        ((2.0,), (1,), 0),
        ((2,), (1,), -1),
        ((None,), (1,), 0),
    ],
)
def test_tensors_that_their_numbers_cannot_fill(tmp_path: Path, size: Any, stride: Any, offset: Any) -> None:
    with pytest.raises(InputError, match="cannot be read safely"):
        read_checkpoint(archive(tmp_path / "a.pth", tensor_of(size, stride, offset), **STORAGE))


NUMBERED = b"\x80\x02}r\xff\xff\xff\xff."  # LONG_BINPUT: room for 2^32 values
CHANGED = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x01\x00\x00\x00aK\x01sb."  # BUILD on what reads it


@pytest.mark.parametrize("data", [NUMBERED, CHANGED, b"", b"garbage", pickled(1)[:-1], b"\x80\x02" + b"(" * 1000])
def test_pickles_that_ask_for_too_much_or_are_none(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(InputError, match="cannot be read safely"):
        read_checkpoint(archive(tmp_path / "a.pth", data))


def test_archives_that_are_none_of_torch(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a/data.pkl", pickled({}) + b"\0" * 10**6)
    for content in (path.read_bytes(), b"", b"PK", pickled({"a": 1})):
        path.write_bytes(content)
        with pytest.raises(InputError, match="cannot be read safely"):
            read_checkpoint(path)
    with pytest.raises(InputError, match="cannot be read safely"):
        read_checkpoint(archive(path, pickled({}), byteorder=b"big"))
    with pytest.raises(InputError, match="cannot be read safely"):
        read_checkpoint(archive(path, tensor_of((2,), (1,))))  # its numbers are missing
    with pytest.raises(InputError, match="holds no names"):
        read_checkpoint(archive(path, pickled([1])))
    with pytest.raises(InputError, match="is missing"):
        read_checkpoint(tmp_path / "b.pth")


CALLS: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
    (os.system, ("touch {}",)),
    (eval, ("open({!r}, 'w')",)),
    (exec, ("open({!r}, 'w')",)),
    (open, ("{}", "w")),
    (getattr, (os, "system")),
    (torch.load, ("{}",)),
    (os.mkdir, ("{}",)),
]


@pytest.mark.parametrize(("function", "arguments"), CALLS[:4] + CALLS[5:], ids=lambda one: getattr(one, "__name__", ""))
def test_nothing_that_a_pickle_names_runs(tmp_path: Path, function: Callable[..., Any], arguments: Any) -> None:
    made = tmp_path / "made"
    code = Code(function, *(one.format(str(made)) for one in arguments))
    torch.save({"a": {"b": code}, "c": [code], code.call[1]: 1}, tmp_path / "a.pth")
    found = read_checkpoint(tmp_path / "a.pth")
    assert foreign_name(found["a"]["b"]) is not None
    torch.save(code, tmp_path / "a.pth")
    with pytest.raises(InputError, match="which is code"):
        read_checkpoint(tmp_path / "a.pth")
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(code))
    assert foreign_name(read_pickle(tmp_path / "a.pkl")) is not None
    assert not made.exists()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_changed_checkpoint_is_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    stream = io.BytesIO()
    torch.save({"weights": {"a": torch.ones(3), "b": torch.zeros(2, 2)}, "n": np.float32(1), "p": tmp_path}, stream)
    content = bytearray(stream.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "a.pth").write_bytes(content)
    try:
        found = read_checkpoint(tmp_path / "a.pth")
    except InputError:
        return
    assert isinstance(found, dict)
