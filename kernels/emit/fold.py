"""Constant folding of Python expressions: what a kernel says about its constants becomes numbers.

Only what Python and Triton agree on is folded: arithmetic and comparison of literals, ``is None``, conditional
expressions, ``and``/``or``/``not``, ``cdiv``, ``min`` and ``max``; and ``x*1``, ``x + 0``, ``x // 1`` with integers.
"""

from __future__ import annotations

import ast
import copy
import operator
from collections.abc import Callable, Mapping
from typing import Any

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Div: operator.truediv,
    ast.LShift: operator.lshift,
    ast.RShift: operator.rshift,
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
}
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}
_CALLS: dict[str, Callable[..., Any]] = {
    "tl.cdiv": lambda a, b: -(-a // b),
    "min": min,
    "max": max,
}


def fold(expr: ast.expr, env: Mapping[str, ast.expr], present: frozenset[str] = frozenset()) -> ast.expr:
    """``expr`` with the names of ``env`` replaced and constants folded.  Names in ``present`` are never None."""
    folded = _Fold(env, present).visit(copy.deepcopy(expr))
    assert isinstance(folded, ast.expr)
    return folded


def is_constant(node: ast.AST | None) -> bool:
    """A literal, negative numbers included (fold writes them as one)."""
    return isinstance(node, ast.Constant)


class _Fold(ast.NodeTransformer):
    def __init__(self, env: Mapping[str, ast.expr], present: frozenset[str]) -> None:
        self.env = env
        self.present = present

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if isinstance(node.ctx, ast.Load) and node.id in self.env:
            return copy.deepcopy(self.env[node.id])
        return node

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.expr:
        self.generic_visit(node)
        match node:
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
                return ast.Constant(-value)
            case ast.UnaryOp(op=ast.Not(), operand=ast.Constant(value=value)):
                return ast.Constant(not value)
        return node

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        self.generic_visit(node)
        match node:
            case ast.BinOp(left=ast.Constant(value=a), op=op, right=ast.Constant(value=b)) if type(op) in _BINARY:
                return ast.Constant(_BINARY[type(op)](a, b))
            case ast.BinOp(left=x, op=ast.Mult() | ast.FloorDiv(), right=ast.Constant(value=int(1))):
                return x
            case ast.BinOp(left=ast.Constant(value=int(1)), op=ast.Mult(), right=x):
                return x
            case ast.BinOp(left=x, op=ast.Add() | ast.Sub(), right=ast.Constant(value=int(0))):
                return x
            case ast.BinOp(left=ast.Constant(value=int(0)), op=ast.Add(), right=x):
                return x
        return node

    def visit_Compare(self, node: ast.Compare) -> ast.expr:
        self.generic_visit(node)
        match node:
            case ast.Compare(left=ast.Constant(value=a), ops=[op], comparators=[ast.Constant(value=b)]):
                return ast.Constant(_COMPARE[type(op)](a, b)) if type(op) in _COMPARE else node
            case ast.Compare(left=ast.Name(id=name), ops=[ast.Is() | ast.IsNot() as op], comparators=[other]):
                if name in self.present and isinstance(other, ast.Constant) and other.value is None:
                    return ast.Constant(isinstance(op, ast.IsNot))
        return node

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.expr:
        self.generic_visit(node)
        decides = isinstance(node.op, ast.Or)  # the value that ends the operation
        kept: list[ast.expr] = []
        for value in node.values:
            if not isinstance(value, ast.Constant):
                kept.append(value)
            elif bool(value.value) == decides:
                kept.append(value)
                break
        if not kept:
            return ast.Constant(not decides)
        return kept[0] if len(kept) == 1 else ast.BoolOp(node.op, kept)

    def visit_IfExp(self, node: ast.IfExp) -> ast.expr:
        self.generic_visit(node)
        if isinstance(node.test, ast.Constant):
            return node.body if node.test.value else node.orelse
        return node

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        match node:
            case ast.Call(func=ast.Name(id="getattr"), args=[x, ast.Constant(value=str(name))]):
                return ast.Attribute(x, name, ast.Load())
        called = _CALLS.get(ast.unparse(node.func))
        values = [a.value for a in node.args if isinstance(a, ast.Constant)]
        if called and values and len(values) == len(node.args) and not node.keywords:
            return ast.Constant(called(*values))
        return node
