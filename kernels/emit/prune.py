"""Drops what a specialised function computes and nobody reads."""

from __future__ import annotations

import ast

#: Calls of ``tl`` that do more than give a value.
_EFFECTS = (
    "store",
    "atomic",
    "debug_barrier",
    "device_print",
    "device_assert",
    "static_print",
    "static_assert",
    "assume",
)


def prune(function: ast.FunctionDef, ours: frozenset[str] = frozenset()) -> None:
    """Remove assignments, in place, whose names are never read and whose right side has no effect.

    ``ours``: helper functions of the file; the ones that return something are taken to have no effect.
    """
    while True:
        read = _read(function)
        before = ast.dump(function)
        function.body = _kept(function.body, read, ours) or [ast.Pass()]
        if ast.dump(function) == before:
            return


def parameters_read(function: ast.FunctionDef) -> set[str]:
    """Names of parameters that the body reads."""
    return _read(function) & {a.arg for a in function.args.args}


def _read(function: ast.FunctionDef) -> set[str]:
    nodes = [n for statement in function.body for n in ast.walk(statement)]
    return {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}


def _kept(body: list[ast.stmt], read: set[str], ours: frozenset[str]) -> list[ast.stmt]:
    kept = []
    for statement in body:
        if isinstance(statement, ast.If | ast.For | ast.While):
            statement.body = _kept(statement.body, read, ours) or [ast.Pass()]
            statement.orelse = _kept(statement.orelse, read, ours)
        if not _is_dead(statement, read, ours):
            kept.append(statement)
    return kept


def _is_dead(statement: ast.stmt, read: set[str], ours: frozenset[str]) -> bool:
    match statement:
        case ast.Assign(targets=[target], value=value) | ast.AugAssign(target=target, value=value):
            names = target.elts if isinstance(target, ast.Tuple) else [target]
            unread = all(isinstance(n, ast.Name) and n.id not in read for n in names)
            return unread and not _has_effect(value, ours)
        case ast.If(body=[ast.Pass()], orelse=[], test=test):
            return not _has_effect(test, ours)
        case ast.For(body=[ast.Pass()]):
            return True
    return False


def _has_effect(value: ast.expr, ours: frozenset[str]) -> bool:
    return any(_may_act(node, ours) for node in ast.walk(value) if isinstance(node, ast.Call))


def _may_act(call: ast.Call, ours: frozenset[str]) -> bool:
    match call.func:
        case ast.Attribute(value=ast.Name(id="tl"), attr=name):
            return name.startswith(_EFFECTS)
        case ast.Attribute():  # a method of a block, such as .to
            return False
        case ast.Name(id=name):
            return name not in ours
    return True
