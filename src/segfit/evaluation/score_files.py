"""Metrics as files: segfit's own JSON, a table (CSV), or nnU-Net's ``summary.json``."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Literal

from segfit.errors import InputError
from segfit.evaluation.summary import Summary
from segfit.files import write_text

__all__ = ["ScoreForm", "require_writable", "write_scores"]

ScoreForm = Literal["segfit", "nnunet"]
_COUNTS = ("tp", "fp", "fn", "tn", "n_pred", "n_ref")
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def require_writable(path: Path, form: ScoreForm = "segfit", *more: str) -> None:
    """Raise `InputError` where the ending of a file is none of those that metrics are written as, nor of `more`."""
    endings = (".json",) if form == "nnunet" else (".json", ".csv", *more)
    if path.suffix.lower() not in endings:
        page = "" if form == "nnunet" else "; a page of them ends in .html"
        raise InputError(f"metrics are written to a file that ends in {' or '.join(endings)}, got {path.name}{page}")


def write_scores(summary: Summary, path: Path, form: ScoreForm = "segfit") -> None:
    """Write metrics: all of them as JSON, those of cases and classes as CSV, or as nnU-Net has them."""
    require_writable(path, form)
    if form == "nnunet":  # NaN stands in it as it is, which strict JSON has not
        write_text(path, json.dumps(summary.to_nnunet(), indent=4, sort_keys=True))
    elif path.suffix.lower() == ".csv":
        write_text(path, _table(summary))
    else:
        summary.save(path)


def _table(summary: Summary) -> str:
    """Return a row per case and class; a cell is empty where there is no value."""
    names = list(dict.fromkeys(key for class_ in summary.classes for key in summary.values(class_.name)))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["case", "class", *_COUNTS, *names])
    for case in summary.cases:
        for name, one in case.metrics.items():
            values = one.values
            counts = [getattr(one, key) for key in _COUNTS]
            writer.writerow([_cell(case.case), _cell(name), *counts, *(values.get(key) for key in names)])
    return text.getvalue()


def _cell(text: str) -> str:
    """Return text that a spreadsheet takes for a formula with a quote before it."""
    return f"'{text}" if text.startswith(_FORMULA) else text
