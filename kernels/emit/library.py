"""The kernels' source as syntax trees with their comments; nothing is imported, so no Triton is needed.

A comment on a line of its own belongs to the statement below it, one behind code to the statement that it stands on.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import io
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

#: Attributes that statements of a parsed module carry.
ABOVE, BEHIND, BLANK = "comments_above", "comment_behind", "blank_above"


@dataclass(frozen=True)
class Module:
    """Functions of a module by name, and the names that it imports from modules of ours."""

    functions: dict[str, ast.FunctionDef]
    imported: dict[str, tuple[str, str]]


@functools.cache
def load(name: str) -> Module:
    """A module of moepass by its dotted name."""
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    return parse(Path(spec.origin).read_text())


def parse(text: str) -> Module:
    """A module's text."""
    tree = ast.parse(text)
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    for function in functions.values():
        _attach(function, text)
    imported = {
        alias.asname or alias.name: (node.module, alias.name)
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("moepass.")
        for alias in node.names
    }
    return Module(functions, imported)


def find(module: str, name: str) -> tuple[str, ast.FunctionDef] | None:
    """A function that ``name`` means in ``module``, with the module that defines it."""
    loaded = load(module)
    if name in loaded.functions:
        return module, loaded.functions[name]
    if name in loaded.imported:
        return find(*loaded.imported[name])
    return None


def defaults(function: ast.FunctionDef) -> dict[str, object]:
    """Parameters that need not be given, with the literals that stand for them."""
    arguments, values = function.args.args, function.args.defaults
    return {a.arg: ast.literal_eval(v) for a, v in zip(arguments[len(arguments) - len(values) :], values, strict=True)}


def _attach(function: ast.FunctionDef, text: str) -> None:
    statements = sorted((n for n in ast.walk(function) if isinstance(n, ast.stmt)), key=lambda n: n.lineno)
    lines = ["", *text.splitlines()]
    for statement in statements[1:]:
        above = statement.lineno - 1
        while lines[above].strip().startswith("#"):
            above -= 1
        setattr(statement, BLANK, not lines[above].strip())
    for line, alone, comment in _comments(text):
        if not function.lineno <= line <= (function.end_lineno or 0):
            continue
        if alone:
            below = next((s for s in statements if s.lineno > line), None)
            if below is not None:
                setattr(below, ABOVE, [*getattr(below, ABOVE, []), comment])
        else:
            on = max((s for s in statements if s.lineno <= line <= (s.end_lineno or 0)), key=lambda s: s.lineno)
            setattr(on, BEHIND, comment)


def _comments(text: str) -> Iterator[tuple[int, bool, str]]:
    """(line, whether it has the line for itself, text) of each comment."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.line.strip().startswith("#"), token.string
