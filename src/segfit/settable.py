"""Trees of options: their dotted keys, the texts that values are given as, and faults told with their key."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, get_args

from pydantic import BaseModel, ValidationError

from segfit.errors import InputError, nearest
from segfit.files import Record

__all__ = ["BY_NAME", "Settable", "leaves", "parse_value", "unknown"]

BY_NAME = "by_configuration"
"""The field that holds options by the name of a configuration; it is no part of their keys."""


class Settable(Record):
    """Options: a fault in them is an `InputError` by whatever door they come, with the whole key where they nest."""

    if not TYPE_CHECKING:  # the fields say what there is to give

        def __init__(self, /, **values: Any) -> None:
            with _told(type(self)):
                super().__init__(**values)

        __init__.__pydantic_base_init__ = True  # pydantic makes those inside of others without it

        @classmethod
        def model_validate(cls, *args: Any, **kwargs: Any) -> Any:
            """Return options made from a dictionary."""
            with _told(cls):
                return super().model_validate(*args, **kwargs)

        @classmethod
        def model_validate_json(cls, *args: Any, **kwargs: Any) -> Any:
            """Return options made from JSON."""
            with _told(cls):
                return super().model_validate_json(*args, **kwargs)


@contextmanager
def _told(kind: type[BaseModel]) -> Iterator[None]:
    """Raise `InputError` with the first fault that pydantic found in options."""
    try:
        yield
    except ValidationError as error:
        first, known = error.errors(include_url=False)[0], [key for key, _ in leaves(kind)]
        key = ".".join(str(part) for part in first["loc"] if not isinstance(part, int) and part != BY_NAME)
        if first["type"] == "extra_forbidden":
            raise unknown(key, known) from None
        while key and not any(f"{one}.".startswith(f"{key}.") for one in known):
            key = key.rpartition(".")[0]  # what pydantic tried
        message = first["msg"].removeprefix("Value error, ")
        got = f", got {first['input']!r}" if key and not isinstance(first["input"], dict) else ""
        action = "" if first["type"] == "value_error" else "give such a value, or leave it out"  # ours say what to do
        raise InputError(f"option {key}: {message}{got}" if key else f"options: {message}", action) from None


def leaves(model: type[BaseModel], prefix: str = "") -> list[tuple[str, Any]]:
    """Return dotted key and type of every value."""
    keys: list[tuple[str, Any]] = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            keys += leaves(kind, f"{prefix}{name}.")
        elif name == BY_NAME:
            names, inside = get_args(kind)
            keys += [leaf for one in get_args(names) for leaf in leaves(inside, f"{prefix}{one}.")]
        else:
            keys.append((prefix + name, kind))
    return keys


def unknown(key: str, known: Sequence[str]) -> InputError:
    """Return the error that says what could be meant by a key, and what there is beside it."""
    parent = key
    while parent and not any(one.startswith(parent + ".") for one in known):
        parent = parent.rpartition(".")[0]
    prefix = f"{parent}." if parent else ""
    names = dict.fromkeys(one.removeprefix(prefix).partition(".")[0] for one in known if one.startswith(prefix))
    where = f"known under {parent}" if parent else "known"
    return InputError(f"unknown option {key!r}{nearest(key, known)}", f"{where}: {', '.join(names)}")


def parse_value(text: str) -> Any:
    """Return the value of a setting: JSON, a list of what commas part, or the text itself."""
    if "," in text and not text.startswith(("[", "{", '"')):
        return [parse_value(part.strip()) for part in text.split(",") if part.strip()]
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
