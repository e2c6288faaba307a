"""Syntax trees -> formatted source: lines of at most ``WIDTH``, double quotes, and the comments of the original."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Sequence

from moepass.kernels.emit.library import ABOVE, BEHIND, BLANK

WIDTH = 120


def function(node: ast.FunctionDef) -> str:
    """A function definition, decorators and docstring included."""
    lines = [f"@{_text(d)}" for d in node.decorator_list]
    parameters = [_text_arg(a) for a in node.args.args]
    if node.args.kwonlyargs:
        parameters += ["*", *(_text_arg(a) for a in node.args.kwonlyargs)]
    returns = f" -> {_text(node.returns)}" if node.returns else ""
    lines += bracketed(f"def {node.name}(", parameters, f"){returns}:", 0)
    return "\n".join([*lines, *_block(node.body, 1)]) + "\n"


def returned(text: str, depth: int) -> list[str]:
    """``return`` of an expression, without needless brackets."""
    return _wrapped("return ", ast.parse(text, mode="eval").body, depth)


def _block(body: Sequence[ast.stmt], depth: int) -> list[str]:
    pad = "    " * depth
    lines: list[str] = []
    for statement in body:
        lines += [""] if getattr(statement, BLANK, False) and lines and lines[-1] else []
        lines += [f"{pad}{comment}" for comment in getattr(statement, ABOVE, [])]
        made = _statement(statement, depth)
        behind = getattr(statement, BEHIND, None)
        if behind and len(made[0]) + 2 + len(behind) <= WIDTH:
            made[0] += f"  {behind}"
        elif behind:
            lines.append(f"{pad}{behind}")
        lines += made
    return lines


def _statement(node: ast.stmt, depth: int) -> list[str]:
    pad = "    " * depth
    match node:
        case ast.If(test=test, body=body, orelse=orelse):
            return _if("if", test, body, orelse, depth)
        case ast.For(target=target, iter=iterator, body=body):
            return [f"{pad}for {_text(target)} in {_text(iterator)}:", *_block(body, depth + 1)]
        case ast.While(test=test, body=body):
            return [f"{pad}while {_text(test)}:", *_block(body, depth + 1)]
        case ast.With(items=items, body=body):
            return [f"{pad}with {', '.join(map(_text, items))}:", *_block(body, depth + 1)]
        case ast.Expr(value=ast.Constant(value=str() as text)):
            return [f'{pad}"""{text}"""']
        case ast.Assign(targets=[target], value=value):
            return _wrapped(f"{_text(target)} = ", value, depth)
        case ast.AugAssign(target=target, op=op, value=value):
            return _wrapped(f"{_text(target)} {_OPERATORS[type(op)]}= ", value, depth)
        case ast.Return(value=ast.expr() as value):
            return _wrapped("return ", value, depth)
        case ast.Expr(value=value):
            return _wrapped("", value, depth)
    return [pad + line for line in _double_quoted(ast.unparse(node)).splitlines()]


_OPERATORS: dict[type[ast.operator], str] = {
    ast.Add: "+",
    ast.Sub: "-",
    ast.Mult: "*",
    ast.Div: "/",
    ast.FloorDiv: "//",
    ast.BitAnd: "&",
    ast.BitOr: "|",
}


def _if(word: str, test: ast.expr, body: list[ast.stmt], orelse: list[ast.stmt], depth: int) -> list[str]:
    pad = "    " * depth
    lines = [f"{pad}{word} {_text(test)}:", *_block(body, depth + 1)]
    match orelse:
        case []:
            return lines
        case [ast.If(test=other, body=inner, orelse=rest)]:
            return [*lines, *_if("elif", other, inner, rest, depth)]
    return [*lines, f"{pad}else:", *_block(orelse, depth + 1)]


def _wrapped(head: str, value: ast.expr, depth: int) -> list[str]:
    """``head`` and an expression; over several lines where one is too long."""
    pad = "    " * depth
    line = f"{pad}{head}{_text(value)}"
    if len(line) <= WIDTH:
        return [line]
    if isinstance(value, ast.Call):
        arguments = [*map(_text, value.args), *(f"{k.arg}={_text(k.value)}" for k in value.keywords)]
        return bracketed(f"{head}{_text(value.func)}(", arguments, ")", depth)
    if isinstance(value, ast.Tuple):
        return bracketed(f"{head}(", [_text(element) for element in value.elts], ")", depth)
    if isinstance(value, ast.Dict):
        pairs = [f"{_text(k)}: {_text(v)}" for k, v in zip(value.keys, value.values, strict=True) if k]
        return bracketed(f"{head}{{", pairs, "}", depth)
    if isinstance(value, ast.BinOp):
        return [f"{pad}{head}(", *_terms(value, depth + 1), f"{pad})"]
    return [line]


def _terms(value: ast.BinOp, depth: int) -> list[str]:
    """A chain of one operator, a term a line."""
    pad = "    " * depth
    operator = _OPERATORS.get(type(value.op))
    left, right = ast.unparse(ast.BinOp(ast.Name("x"), value.op, value.right)), value.left
    rest = _double_quoted(left).removeprefix("x ")
    if operator is None or not isinstance(right, ast.BinOp) or type(right.op) is not type(value.op):
        return [f"{pad}{_text(value.left)}" if _binds(value) else f"{pad}({_text(value.left)})", f"{pad}{rest}"]
    return [*_terms(right, depth), f"{pad}{rest}"]


def _binds(value: ast.BinOp) -> bool:
    """Whether the left side needs no brackets."""
    text = ast.unparse(ast.BinOp(value.left, value.op, ast.Name("x")))
    return text.startswith(ast.unparse(value.left))


def bracketed(head: str, parts: Sequence[str], tail: str, depth: int) -> list[str]:
    """``head``, the parts and ``tail`` on one line, on three, or with a line for each part."""
    pad = "    " * depth
    line = f"{pad}{head}{', '.join(parts)}{tail}"
    if len(line) <= WIDTH:
        return [line]
    inner = f"{pad}    {', '.join(parts)}"
    if len(inner) <= WIDTH:
        return [f"{pad}{head}", inner, f"{pad}{tail}"]
    return [f"{pad}{head}", *(f"{pad}    {part}," for part in parts), f"{pad}{tail}"]


def _text_arg(node: ast.arg) -> str:
    return node.arg if node.annotation is None else f"{node.arg}: {_text(node.annotation)}"


def _text(node: ast.AST) -> str:
    text = _double_quoted(ast.unparse(node))
    bare = isinstance(node, ast.Tuple) and text.startswith("(") and text.endswith(")") and len(node.elts) > 1
    return text[1:-1] if bare else text


def _double_quoted(text: str) -> str:
    """The same code with plain strings in double quotes."""
    if "'" not in text:
        return text
    lines = text.splitlines(keepends=True)
    for token in reversed(list(tokenize.generate_tokens(io.StringIO(text).readline))):
        body = token.string[1:-1]
        if token.type == tokenize.STRING and token.string[0] == "'" and not set(body) & {'"', "\\", "'"}:
            row, start = token.start
            line = lines[row - 1]
            lines[row - 1] = f'{line[:start]}"{body}"{line[token.end[1] :]}'
    return "".join(lines)
