"""Straight-line code under construction: named values, each distinct expression bound once.

``Tape.bind`` names an expression, or finds the name it has.  ``body`` writes what a result needs and no more: a value
read once is written where it is read, unless the line grows too long; products with one and sums with negatives are
tidied.  Only syntax trees go in and come out, so precedence is never a matter of brackets in a template.
"""

from __future__ import annotations

import ast
import copy
from collections import Counter
from collections.abc import Mapping, Sequence

#: A value read once is inlined while the reading expression stays this short.
MAX_INLINE = 80
#: No right-hand side is longer, unless it reads that many names.
MAX_LINE = 100


class Tape:
    """Named values in the order in which they were bound."""

    def __init__(self, reserved: Sequence[str] = ()) -> None:
        self.values: dict[str, ast.expr] = {}
        self._hints: dict[str, str] = {}
        self._by_text: dict[str, str] = {}
        self._reserved = frozenset(reserved)

    def bind(self, hint: str, value: ast.expr) -> ast.expr:
        """The name of ``value``; atoms stand for themselves."""
        value = tidy(value)
        if _is_atom(value):
            return value
        text = ast.unparse(value)
        if text not in self._by_text:
            name = f"_{len(self.values)}"
            self._by_text[text], self.values[name], self._hints[name] = name, value, hint
        return ast.Name(self._by_text[text])

    def body(self, **results: ast.expr) -> list[str]:
        """Assignments and ``return``; several results are assigned to their names first."""
        needed = self._needed(list(results.values()))
        uses = Counter(name for value in (*needed.values(), *results.values()) for name in _names(value))
        lines = _Lines(_Names({*self._reserved, *results}), self._hints)
        wanted = _names_of(results)
        for name, value in needed.items():
            whole = lines.fit(value)
            if uses[name] == 1 and (name in wanted or len(ast.unparse(whole)) <= MAX_INLINE):
                lines.stands_for[name] = whole
            else:
                lines.assign(name, whole)
        finals = {name: ast.unparse(lines.fit(result)) for name, result in results.items()}
        if len(finals) == 1:
            return [*lines.text, *(f"return {final}" for final in finals.values())]
        return [*lines.text, *(f"{name} = {final}" for name, final in finals.items()), f"return {', '.join(finals)}"]

    def _needed(self, results: Sequence[ast.expr]) -> dict[str, ast.expr]:
        live = {name for result in results for name in _names(result)}
        for name in reversed(self.values):
            if name in live:
                live.update(_names(self.values[name]))
        return {name: value for name, value in self.values.items() if name in live}


class _Lines:
    """Assignments as they are written, and what each bound name stands for in them: a final name, or itself inlined."""

    def __init__(self, names: _Names, hints: Mapping[str, str]) -> None:
        self.names = names
        self.hints = hints
        self.text: list[str] = []
        self.stands_for: dict[str, ast.expr] = {}

    def assign(self, name: str, whole: ast.expr) -> None:
        final = self.names.fresh(self.hints[name])
        self.stands_for[name] = ast.Name(final)
        self.text.append(f"{final} = {ast.unparse(whole)}")

    def fit(self, value: ast.expr) -> ast.expr:
        """``value`` with names replaced; the longest of the inlined parts get lines of their own until it fits."""
        while True:
            whole = tidy(_inline(value, self.stands_for))
            inlined = [n for n in _names(value) if n in self.stands_for and not _is_atom(self.stands_for[n])]
            if len(ast.unparse(whole)) <= MAX_LINE or not inlined:
                return whole
            longest = max(inlined, key=lambda n: len(ast.unparse(self.stands_for[n])))
            self.assign(longest, self.stands_for[longest])


class _Names:
    """Distinct names made of hints."""

    def __init__(self, taken: set[str]) -> None:
        self.taken = taken

    def fresh(self, hint: str) -> str:
        name, number = hint, 2
        while name in self.taken:
            name, number = f"{hint}_{number}", number + 1
        self.taken.add(name)
        return name


def substitute(template: str, values: Mapping[str, ast.expr]) -> ast.expr:
    """The expression that ``template`` says, with names replaced."""
    return _Substitute(values).visit(ast.parse(template, mode="eval").body)  # type: ignore[no-any-return]


def _inline(value: ast.expr, written: Mapping[str, ast.expr]) -> ast.expr:
    return _Substitute(written).visit(copy.deepcopy(value))  # type: ignore[no-any-return]


def tidy(value: ast.expr) -> ast.expr:
    """``1.0*x -> x``, ``-1.0*x -> -x``, ``x + -y -> x - y``; exact in floating point."""
    return _Tidy().visit(copy.deepcopy(value))  # type: ignore[no-any-return]


class _Substitute(ast.NodeTransformer):
    def __init__(self, values: Mapping[str, ast.expr]) -> None:
        self.values = values

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return copy.deepcopy(self.values[node.id]) if node.id in self.values else node


class _Tidy(ast.NodeTransformer):
    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        self.generic_visit(node)
        match node:
            case ast.BinOp(left=ast.Constant(value=1.0), op=ast.Mult(), right=x):
                return x
            case ast.BinOp(left=x, op=ast.Mult() | ast.Div(), right=ast.Constant(value=1.0)):
                return x
            case ast.BinOp(left=ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=1.0)), op=ast.Mult(), right=x):
                return ast.UnaryOp(ast.USub(), x)
            case ast.BinOp(left=x, op=ast.Mult(), right=ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=1.0))):
                return ast.UnaryOp(ast.USub(), x)
            case ast.BinOp(left=x, op=ast.Add(), right=ast.UnaryOp(op=ast.USub(), operand=y)):
                return ast.BinOp(x, ast.Sub(), y)
            case ast.BinOp(left=ast.UnaryOp(op=ast.USub(), operand=y), op=ast.Add(), right=x):
                return ast.BinOp(x, ast.Sub(), y)
        return node


def _is_atom(value: ast.expr) -> bool:
    inner = value.operand if isinstance(value, ast.UnaryOp) else value
    return isinstance(inner, ast.Constant) or isinstance(value, ast.Name)


def _names_of(results: Mapping[str, ast.expr]) -> set[str]:
    return {result.id for result in results.values() if isinstance(result, ast.Name)}


def _names(value: ast.expr) -> list[str]:
    return [node.id for node in ast.walk(value) if isinstance(node, ast.Name)]
