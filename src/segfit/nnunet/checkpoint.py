"""Checkpoints of torch read for their weights and plain values, whatever else they hold.

A checkpoint is a zip with a pickle, and pickles run what they name. Here nothing runs: a name stands for a tensor or a
number of numpy, or for a `Foreign` that keeps the name and does nothing. So an array, a path or code where nobody looks
refuses no model, and where it is needed the refusal names it.
"""

from __future__ import annotations

import collections
import io
import pickle
import pickletools
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from segfit.errors import InputError, reason_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

__all__ = ["EXPORT_WEIGHTS", "Foreign", "foreign_name", "read_checkpoint", "read_pickle"]

_TYPES = {  # of the storages that weights have, by torch's name
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
_LEFT_OUT = frozenset({"optimizer_state", "grad_scaler_state"})  # of nnU-Net: as large as the weights, and unused
EXPORT_WEIGHTS = "copy it again, or export plain weights"
_DAMAGE = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    NotImplementedError,
    OSError,
    RecursionError,
    RuntimeError,
    TypeError,
    ValueError,
)


class Foreign:
    """What a pickle names and nobody here makes. It takes whatever it is given and does nothing."""

    called = ""  # module and name

    def __new__(cls, *_: Any, **__: Any) -> Foreign:
        """Make one without running anything."""
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...

    def __setitem__(self, _: Any, __: Any) -> None: ...

    def append(self, _: Any) -> None:
        """Take an item of a list."""

    def extend(self, _: Any) -> None:
        """Take items of a list."""

    def add(self, _: Any) -> None:
        """Take an item of a set."""


def foreign_name(value: Any) -> str | None:
    """Return what a pickle called a value that was not made; None for all that was."""
    kind = value if isinstance(value, type) else type(value)
    return kind.called if issubclass(kind, Foreign) else None


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return what a file of torch holds: plain values, and tensors at the top and one level below.

    Raises `InputError` if it is missing or damaged, or holds no names.
    """
    if not path.is_file():
        raise InputError(f"{path} is missing", "choose among the folds that are there")
    with _damage_is_told(path), zipfile.ZipFile(path) as archive:
        content = _Checkpoint(archive, path.stat().st_size).content()
    if (named := foreign_name(content)) is not None:
        raise InputError(f"{path} cannot be read safely (it is {named}, which is code)", EXPORT_WEIGHTS)
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a checkpoint: it holds no names")
    return content


def read_pickle(path: Path) -> Any:
    """Return the plain values of a pickle that is no file of torch; `InputError` if it is damaged."""
    with _damage_is_told(path), path.open("rb") as handle:
        return _unpickled(handle, _Plain)


@contextmanager
def _damage_is_told(path: Path) -> Iterator[None]:
    try:
        yield
    except _DAMAGE as error:
        raise InputError(f"{path} cannot be read safely ({reason_of(error)})", EXPORT_WEIGHTS) from None


class _Checkpoint:
    """The zip of a checkpoint: ``NAME/data.pkl``, and ``NAME/data/KEY`` for each storage."""

    def __init__(self, archive: zipfile.ZipFile, size: int) -> None:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("it is compressed, which files of torch are not")
        if sum(entry.file_size for entry in entries) > size:
            raise ValueError("it declares more than the file holds")
        pickles = [entry.filename for entry in entries if entry.filename.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("it has no data.pkl as files of torch have since version 1.6")
        self._archive, self._pickle = archive, pickles[0]
        self._root = self._pickle.removesuffix("data.pkl")
        order = self._root + "byteorder"
        if order in archive.namelist() and archive.read(order) != b"little":
            raise ValueError("its numbers are big-endian")
        self._storages: dict[str, Tensor] = {}

    def content(self) -> Any:
        with self._archive.open(self._pickle) as handle:
            content = _unpickled(handle, _WithTensors)
        if not isinstance(content, dict):
            return content
        return {name: self._loaded(value) for name, value in content.items() if name not in _LEFT_OUT}

    def _loaded(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: self._tensor(one) for name, one in value.items()}
        return self._tensor(value)

    def _tensor(self, value: Any) -> Any:
        return value.of(self._storage(value.storage)) if isinstance(value, _Described) else value

    def _storage(self, storage: _Storage) -> Tensor:
        import torch

        if storage.key not in self._storages:
            content = bytearray(self._archive.read(f"{self._root}data/{storage.key}"))
            self._storages[storage.key] = torch.frombuffer(content, dtype=getattr(torch, storage.dtype))
        return self._storages[storage.key]


@dataclass(frozen=True, slots=True)
class _Storage:
    """Where the numbers of tensors lie; a kind of storage where there is no key."""

    dtype: str
    key: str = ""


@dataclass(frozen=True, slots=True)
class _Described:
    """A tensor before its numbers are read."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def of(self, storage: Tensor) -> Tensor:
        numbers = (self.offset, *self.size, *self.stride)
        if not all(type(number) is int and number >= 0 for number in numbers) or len(self.size) != len(self.stride):
            raise ValueError("a tensor has an impossible shape")
        if prod(self.size) > len(storage):  # no more than the file holds, whatever the strides
            raise ValueError("a tensor is larger than its numbers")
        return storage.as_strided(self.size, self.stride, self.offset)


def _rebuild(storage: _Storage, offset: int, size: Sequence[int], stride: Sequence[int], *_: Any) -> _Described:
    if not isinstance(storage, _Storage):
        raise TypeError("a tensor has no storage")
    return _Described(storage, offset, tuple(size), tuple(stride))


def _parameter(data: Any, *_: Any) -> Any:
    return data


class _Dtype:
    """A type of numpy, as pickles make it."""

    def __init__(self, code: str, *_: Any) -> None:
        self.name, self.order = str(code), "<"

    def __setstate__(self, state: Any) -> None:
        self.order = str(state[1])


def _scalar(dtype: _Dtype, content: bytes) -> Any:
    """Return a number of numpy as a plain one."""
    kind = np.dtype(dtype.name)
    if kind.kind not in "fiub":
        raise ValueError(f"a number is of type {dtype.name}")
    return np.frombuffer(content, kind.newbyteorder(">" if dtype.order == ">" else "<"), count=1)[0].item()


def _bytes(text: str, *_: Any) -> bytes:
    """Return bytes, which pickles of old protocols hold as text."""
    return text.encode("latin1")


class _Maker:
    """A function that a pickle may call, and not change."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, _: Any) -> None:
        raise pickle.UnpicklingError("it changes what reads it")


_PLAIN = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("_codecs", "encode"): _Maker(_bytes),
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "scalar"): _Maker(_scalar),
    ("numpy._core.multiarray", "scalar"): _Maker(_scalar),
}
_TENSORS = {
    ("torch._utils", "_rebuild_tensor"): _Maker(_rebuild),
    ("torch._utils", "_rebuild_tensor_v2"): _Maker(_rebuild),
    ("torch._utils", "_rebuild_parameter"): _Maker(_parameter),
}


class _Plain(pickle.Unpickler):
    known: Mapping[tuple[str, str], Any] = _PLAIN

    def find_class(self, module_name: str, global_name: str) -> Any:
        """Return what stands for a name; nothing is imported."""
        found = self.known.get((module_name, global_name))
        called = f"{module_name}.{global_name}".removeprefix("builtins.").removeprefix("__builtin__.")
        return found or type("Foreign", (Foreign,), {"called": called})


class _WithTensors(_Plain):
    known = _PLAIN | _TENSORS

    def find_class(self, module_name: str, global_name: str) -> Any:
        """Return what stands for a name; nothing is imported."""
        if module_name == "torch" and global_name in _TYPES:
            return _Storage(_TYPES[global_name])
        return super().find_class(module_name, global_name)

    def persistent_load(self, pid: Any) -> Any:
        """Return the storage that a tensor lies in."""
        word, kind, key, *_ = pid
        if word != "storage" or not isinstance(key, str):
            raise pickle.UnpicklingError("it holds something other than storages")
        return replace(kind, key=key) if isinstance(kind, _Storage) else kind()


def _unpickled(handle: IO[bytes], kind: type[_Plain]) -> Any:
    """Unpickle what does not ask for more memory than it has bytes."""
    content = handle.read()
    for code, argument, _ in pickletools.genops(content):
        if code.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > len(content):
            raise pickle.UnpicklingError("it numbers more values than it has")
    return kind(io.BytesIO(content)).load()
