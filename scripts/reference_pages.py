"""Write the generated pages of the documentation: docs/api.md, docs/commands.md, docs/plan.md and docs/rules.md.

    python scripts/reference_pages.py

A test compares the pages with what this makes.
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel

import segfit
from segfit import errors
from segfit.cli.help_pages import MODELS, PIPELINE, PROJECTS
from segfit.cli.main import app
from segfit.dataset.manifest import Dataset
from segfit.evaluation.summary import Summary
from segfit.fingerprint.fingerprint import Fingerprint
from segfit.planning.explain import Filling
from segfit.planning.plan import Plan
from segfit.planning.rules import TABLE
from segfit.project.status import ProjectStatus
from segfit.selection.select import Selection
from segfit.selection.verdict import Verdict

DOCS = Path(__file__).resolve().parents[1] / "docs"
_GENERATED = "<!-- made by scripts/reference_pages.py -->"
_WIDEST = 100  # characters of a signature in one line

_USED = ("open_dataset", "Project", "load_model", "Model", "Prediction", "evaluate", "Image", "Execution", "Options")
_RETURNED = (Dataset, Fingerprint, Plan, Selection, Summary, Verdict, ProjectStatus)
_STAGES = (
    "create",
    "open",
    "status",
    "check",
    "fingerprint",
    "splits",
    "plan",
    "size",
    "preprocess",
    "train",
    "select",
    "predict",
    "evaluate",
    "verdict",
    "report",
    "run",
)
_METHODS = {"Project": _STAGES, "Execution": ("by",)}
"""Those that are shown; of other classes all public ones."""


def pages() -> dict[str, str]:
    """Return the content of the generated pages by file name."""
    made = {"api.md": _api(), "commands.md": _commands(), "plan.md": _plan(), "rules.md": _rules()}
    return {name: _joined(lines) for name, lines in made.items()}


def _joined(lines: Iterator[str]) -> str:
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _api() -> Iterator[str]:
    yield from ("# Python", "", _GENERATED, "", *_text(segfit.__doc__))
    for name in _USED:
        yield from _entry(f"segfit.{name}", getattr(segfit, name), _METHODS.get(name))
    yield from (
        "## Results",
        "",
        "What the functions above return, frozen.",
        "",
    )
    for kind in _RETURNED:
        yield from (f"### {kind.__name__}", "", *_text(kind.__doc__), *_fields(kind))
    yield from ("## Errors", "", "```", inspect.cleandoc(errors.__doc__ or ""), "```", "")
    yield from ("`segfit.Problem` is one row of the table of a `DatasetError`:", "", *_fields(errors.Problem))
    yield from ("## segfit.nnunet", "", *_text(segfit.nnunet.__doc__))
    for name in segfit.nnunet.__all__:
        yield from _entry(f"segfit.nnunet.{name}", getattr(segfit.nnunet, name), (), level=3)


def _entry(title: str, value: Any, names: tuple[str, ...] | None, *, level: int = 2) -> Iterator[str]:
    yield from ("#" * level + f" {title}", "")
    if not isinstance(value, type):
        yield from (*_signature(title, value), *_text(value.__doc__))
        return
    yield from (*_text(value.__doc__), *_fields(value))
    public = [name for name in vars(value) if name[0] != "_" and name not in getattr(value, "__dataclass_fields__", ())]
    for name in names if names is not None else public:
        member = inspect.getattr_static(value, name)
        if isinstance(member, property):
            yield from (f"- `.{name}`: {_text(member.__doc__)[0]}", "")
        elif callable(getattr(value, name)):
            yield from (*_signature(f".{name}", getattr(value, name)), *_text(member.__doc__))


def _fields(kind: type) -> list[str]:
    """Return a list of the fields of a record or dataclass; [] where its docstring has them."""
    if "Parameters\n" in (kind.__doc__ or ""):
        return []
    known = getattr(kind, "model_fields", None) or getattr(kind, "__dataclass_fields__", {})
    rows = []
    for name in known:
        if name in getattr(kind, "__annotations__", {}):
            described = getattr(known[name], "description", None)
            rows.append(f"- `{name}: {kind.__annotations__[name]}`" + (f": {described}" if described else ""))
    return [*rows, ""] if rows else []


def _signature(name: str, function: Any) -> list[str]:
    signature = inspect.signature(function)
    parameters = [item for item in signature.parameters.values() if item.name != "self"]
    given = [_parameter(item) for item in parameters]
    kinds = [item.kind for item in parameters]
    if inspect.Parameter.KEYWORD_ONLY in kinds:
        given.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), "*")
    end = f" -> {signature.return_annotation}"
    line = f"{name}({', '.join(given)}){end}"
    lines = [line] if len(line) <= _WIDEST else [f"{name}(", *(f"    {part}," for part in given), f"){end}"]
    return ["```python", *lines, "```", ""]


def _parameter(item: inspect.Parameter) -> str:
    if item.default is inspect.Parameter.empty:
        return f"{item.name}: {item.annotation}"
    plain = item.default is None or isinstance(item.default, bool | int | float | str | tuple)
    return f"{item.name}: {item.annotation} = {item.default!r}" if plain else f"{item.name}: {item.annotation} = ..."


def _text(docstring: str | None) -> list[str]:
    """Return a docstring as Markdown: parameters as a list, indented programs as code."""
    text = inspect.cleandoc(docstring or "").replace("``", "`")
    before, _, rest = text.partition("Parameters\n----------\n")
    parameters, _, after = rest.partition("\n\n")
    lines = before.splitlines()
    for line in parameters.splitlines():
        name, colon, words = line.partition(" : ")
        lines.append(f"- `{name}`: {words}" if colon and not line.startswith(" ") else f"  {line.strip()}")
    return [*lines, *(["", *after.splitlines()] if after else []), ""]


def _commands() -> Iterator[str]:
    yield from ("# Commands", "", _GENERATED, "")
    yield "Results go to stdout, progress and messages to stderr. [Exit codes, options and files](reference.md)."
    verbs = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for group in (PIPELINE, PROJECTS, MODELS):
        yield from ("", f"## {group}")
        for name, verb in verbs.items():
            if verb.rich_help_panel == group and not verb.hidden:
                yield from _verb(name, verb)


def _verb(name: str, verb: Any) -> Iterator[str]:
    arguments = [item for item in verb.params if item.param_type_name == "argument"]
    options = [item for item in verb.params if item.param_type_name == "option" and not item.hidden]
    usage = " ".join(item.metavar if item.required else f"[{item.metavar}]" for item in arguments)
    first, _, rest = inspect.cleandoc(verb.help).partition("\n")
    yield from ("", f"### segfit {name} {usage}".rstrip(), "", first, *rest.splitlines(), "")
    yield from ("| | |", "| --- | --- |")
    for item in arguments:
        yield f"| `{_cell(item.metavar)}` | {item.help} |"
    for item in options:
        names = ", ".join(sorted((*item.opts, *item.secondary_opts), key=len))
        value = "" if item.is_flag else f" {item.metavar}"
        wanted = " (required)" if item.required else ""
        yield f"| `{_cell(names + value)}` | {item.help}{wanted} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _rules() -> Iterator[str]:
    """Yield the whole table of rules, with the names of the inputs in its sentences."""
    yield from ("# Rules", "", _GENERATED, "")
    yield "What `segfit plan --explain` and the report say of the decisions of a plan, by rule, from the table in"
    yield "`segfit.planning.rules`. *Words in italics* stand for what was measured."
    for name, rule in TABLE.items():
        says = rule.says.format_map(Filling())
        bounds = [text.format_map(Filling()) for text in rule.bounds.values()]
        yield from ("", f"## {name}", "", f"{says[0].upper()}{says[1:]}.", "")
        yield from (f"- bounds: {' | '.join(bounds)}", f"- source: {rule.source}", f"- changes with: {rule.changes}")
        if rule.again:
            yield f"- followed again with more {' and with more '.join(rule.again)}, to say what changes"


def _plan() -> Iterator[str]:
    """Yield all records that a plan is made of, each field with its type, default and the comment behind it."""
    yield from ("# The plan", "", _GENERATED, "")
    yield "What `plan.json` holds, from the plan down; `segfit plan --explain` says why each value is what it is"
    yield "([rules](rules.md)). Lengths are in mm (pixels, where pictures have no size), axes in array order (z, y, x)."
    for kind in _records_of(Plan):
        yield from ("", f"## {kind.__name__}", "", *_text(kind.__doc__))
        yield from ("| field | type | default | meaning |", "| --- | --- | --- | --- |")
        yield from _rows(kind)


def _records_of(kind: type[BaseModel]) -> list[type[BaseModel]]:
    """Return a record and those that its fields are made of, in the order of the fields."""
    found = [kind]
    for one in found:
        for field in one.model_fields.values():
            found += [part for part in _parts(field.annotation) if part not in found]
    return found


def _parts(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _parts(inner)


def _rows(kind: type[BaseModel]) -> Iterator[str]:
    lines = textwrap.dedent(inspect.getsource(kind)).splitlines()
    (body,) = ast.parse("\n".join(lines)).body
    assert isinstance(body, ast.ClassDef)
    ends = {ast.unparse(item.target): item.end_lineno for item in body.body if isinstance(item, ast.AnnAssign)}
    for name, field in kind.model_fields.items():
        shown = "" if field.is_required() or field.default_factory else f"`{_cell(_value(field.default))}`"
        told = lines[(ends.get(name) or 1) - 1].partition("  # ")[2]
        meaning = "" if told.startswith("noqa") else told
        yield f"| `{name}` | `{_cell(_type(field.annotation))}` | {shown} | {meaning} |"


def _value(value: Any) -> str:
    return f"{type(value).__name__}(...)" if isinstance(value, BaseModel) else repr(value)


def _type(annotation: Any) -> str:
    """Return a type without what it demands of its values, which the reading of a plan checks."""
    kind, parts = get_origin(annotation), get_args(annotation)
    if kind is Annotated:
        return _type(parts[0])
    if kind is Literal:
        return " | ".join(map(repr, parts))
    if kind in (Union, UnionType):
        return " | ".join(map(_type, parts))
    if kind is not None:
        return f"{kind.__name__}[{', '.join(map(_type, parts))}]"
    names = {Ellipsis: "...", NoneType: "None"}
    return names.get(annotation) or annotation.__name__


def main() -> None:
    """Write the pages."""
    for name, text in pages().items():
        (DOCS / name).write_text(text, encoding="utf-8")
        sys.stdout.write(f"{DOCS / name}\n")


if __name__ == "__main__":
    main()
