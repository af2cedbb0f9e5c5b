"""Rules of the house that no other tool keeps."""

from __future__ import annotations

import ast
from pathlib import Path

import segfit

LONGEST = 60  # lines of a function


def test_no_function_is_longer_than_a_page() -> None:
    lengths = {
        node.name: node.end_lineno - node.lineno + 1
        for path in Path(segfit.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno >= LONGEST
    }
    assert lengths == {}


def test_verbs_write_through_one_place_that_cleans_what_is_printed() -> None:
    folder = Path(segfit.__file__).parent / "cli"
    ways = ("sys.stdout.write", "sys.stdout.writelines", "sys.stderr.write", "print", "typer.echo")
    writers = {
        path.name
        for path in folder.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ways
    }
    assert writers == set()
