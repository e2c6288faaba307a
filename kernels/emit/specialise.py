"""Partial evaluation: a library kernel and its constants -> the kernel of one plan.

Constants are folded, branches that they decide are gone, absent buffers leave the signature, helper functions are
specialised in the same way (or written in place, where they are one expression or return nothing and are given the
caller's own names), and what nobody reads is dropped.
The result is ordinary Triton (or Python) code that computes what the library's kernel computes, bit for bit.

A parameter is a constant if it is annotated ``tl.constexpr`` (``Const`` in plain Python code) and the caller gives one.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from moepass.kernels.emit import library
from moepass.kernels.emit.fold import fold, is_constant
from moepass.kernels.emit.prune import parameters_read, prune

_CONST = ("tl.constexpr", "Const")
#: ``tl.static_range`` over at most so many values is written out.
MAX_UNROLL = 8


@dataclass
class Specialiser:
    """Specialised functions of one file, in the order in which they must stand.

    ``given``  names that stand for functions written elsewhere in the file (the activation); they may be called
    """

    given: frozenset[str] = frozenset()
    functions: dict[str, ast.FunctionDef] = field(default_factory=dict)
    _made: dict[tuple[str, str, str], tuple[str, tuple[int, ...]]] = field(default_factory=dict)

    def function(
        self, module: str, name: str, constants: Mapping[str, object], refer: Mapping[str, str] | None = None
    ) -> ast.FunctionDef:
        """A function with parameters bound: to literals or, by ``refer``, to functions of the file."""
        found = library.find(module, name)
        assert found is not None, f"{module} has no function {name}"
        env: dict[str, ast.expr] = {key: ast.Constant(value) for key, value in constants.items()}  # type: ignore[arg-type]
        env |= {key: ast.Name(function, ast.Load()) for key, function in (refer or {}).items()}
        made = self._specialise(*found, env)
        self.functions[made.name] = made
        return made

    def _specialise(self, module: str, source: ast.FunctionDef, env: Mapping[str, ast.expr]) -> ast.FunctionDef:
        made = copy.deepcopy(source)
        made.args.args = [a for a in made.args.args if a.arg not in env]
        made.args.kwonlyargs = [a for a in made.args.kwonlyargs if a.arg not in env]
        made.args.kw_defaults = [None for _ in made.args.kwonlyargs]
        made.args.defaults = []
        present = frozenset(a.arg for a in made.args.args if a.annotation is None or module.endswith(".plain"))
        made.body = _Body(self, module, dict(env), present).block(made.body)
        prune(made, frozenset(self.functions))
        return made

    def call(self, module: str, node: ast.Call) -> ast.expr:
        """A call whose arguments are folded: of one of our helpers, or of anything else (left alone)."""
        if not isinstance(node.func, ast.Name) or node.func.id in self.given:
            return node
        found = library.find(module, node.func.id)
        if found is None:
            return node
        home, source = found
        bound = _bind(source, node)
        constants = {
            a.arg: bound[a.arg] for a in _parameters(source) if _is_const(a) and _is_static(bound[a.arg], self.given)
        }
        constants |= {name: value for name, value in bound.items() if _is_none(value)}
        inlined = self._inline(home, source, bound, constants)
        return inlined or self._refer(home, source, bound, constants)

    def _inline(
        self, module: str, source: ast.FunctionDef, bound: dict[str, ast.expr], constants: dict[str, ast.expr]
    ) -> ast.expr | None:
        """The body's one expression with arguments in place; None where there is more, or an argument is read twice."""
        if not source.decorator_list:  # plain Python: names of its comprehensions could capture the arguments'
            return None
        scratch = Specialiser(self.given, dict(self.functions), dict(self._made))
        made = scratch._specialise(module, source, constants)
        body = [s for s in made.body if not _is_docstring(s)]
        if len(body) != 1 or not isinstance(body[0], ast.Return) or body[0].value is None:
            return None
        reads = [n.id for n in ast.walk(body[0].value) if isinstance(n, ast.Name)]
        rest = {name: value for name, value in bound.items() if name not in constants}
        if any(
            reads.count(name) > 1 and not isinstance(value, ast.Name | ast.Constant) for name, value in rest.items()
        ):
            return None
        self.functions, self._made = scratch.functions, scratch._made
        return fold(body[0].value, rest)

    def in_place(self, module: str, node: ast.Call) -> list[ast.stmt] | None:
        """The statements of a helper that returns nothing, where its parameters are the caller's names."""
        found = library.find(module, node.func.id) if isinstance(node.func, ast.Name) else None
        if found is None:
            return None
        home, source = found
        bound = _bind(source, node)
        env = {a.arg: bound[a.arg] for a in _parameters(source) if _is_static(bound[a.arg], self.given)}
        own = all(isinstance(v, ast.Name) and v.id == name for name, v in bound.items() if name not in env)
        if not own or any(isinstance(n, ast.Return) for n in ast.walk(source)):
            return None
        body = [s for s in copy.deepcopy(source).body if not _is_docstring(s)]
        return _Body(self, home, env, frozenset(bound) - set(env)).block(body)

    def _refer(
        self, module: str, source: ast.FunctionDef, bound: dict[str, ast.expr], constants: dict[str, ast.expr]
    ) -> ast.expr:
        """A call of the specialised function, which is made if it is new."""
        key = (module, source.name, repr(sorted((n, ast.unparse(v)) for n, v in constants.items())))
        if key not in self._made:
            made = self._specialise(module, source, constants)
            free = [a.arg for a in _parameters(made)]
            kept = parameters_read(made)
            made.args.args = [a for a in made.args.args if a.arg in kept]
            made.name = self._free_name(source.name)
            self.functions[made.name] = made
            self._made[key] = (made.name, tuple(i for i, name in enumerate(free) if name in kept))
        name, order = self._made[key]
        arguments = [value for parameter, value in bound.items() if parameter not in constants]
        return ast.Call(ast.Name(name, ast.Load()), [arguments[i] for i in order], [])

    def _free_name(self, name: str) -> str:
        number, candidate = 2, name
        while candidate in self.functions:
            candidate, number = f"{name}_{number}", number + 1
        return candidate


class _Body:
    """Folds statements, with what is known where they stand."""

    def __init__(self, owner: Specialiser, module: str, env: dict[str, ast.expr], present: frozenset[str]) -> None:
        self.owner, self.module, self.env, self.present = owner, module, env, present

    def block(self, body: Sequence[ast.stmt]) -> list[ast.stmt]:
        made: list[ast.stmt] = []
        for statement in body:
            made += self.statement(statement)
            if made and isinstance(made[-1], ast.Return | ast.Continue | ast.Break):
                break
        return made

    def statement(self, node: ast.stmt) -> list[ast.stmt]:
        match node:
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value) if _is_const(node):
                folded = self.expr(value)
                if is_constant(folded):
                    self.env[name] = folded
                    return []
                return [_replaced(node, value=folded)]
            case ast.If():
                return self._if(node)
            case ast.For():
                return self._for(node)
            case ast.While():
                return [_replaced(node, test=self.expr(node.test), body=self.block(node.body))]
            case ast.With():
                return [_replaced(node, items=[self._item(i) for i in node.items], body=self.block(node.body))]
            case ast.Expr(value=ast.Constant()):
                return [node]
            case ast.Expr(value=ast.Call(func=ast.Name()) as call):
                arguments = ast.Call(call.func, [self.expr(a) for a in call.args], call.keywords)
                return self.owner.in_place(self.module, arguments) or self._simple(node)
        return self._simple(node)

    def _simple(self, node: ast.stmt) -> list[ast.stmt]:
        if hasattr(node, "body"):
            raise TypeError(f"{type(node).__name__} is no statement that kernels use")
        fields = {k: self.expr(v) for k, v in ast.iter_fields(node) if isinstance(v, ast.expr) and k != "annotation"}
        lists = {
            k: [self.expr(i) for i in v]
            for k, v in ast.iter_fields(node)
            if isinstance(v, list) and v and all(isinstance(i, ast.expr) for i in v)
        }
        return [_replaced(node, **fields, **lists)]

    def _item(self, item: ast.withitem) -> ast.withitem:
        return ast.withitem(self.expr(item.context_expr), item.optional_vars)

    def _if(self, node: ast.If) -> list[ast.stmt]:
        test = self.expr(node.test)
        if not isinstance(test, ast.Constant):
            return [
                _replaced(node, test=test, body=self.block(node.body) or [ast.Pass()], orelse=self.block(node.orelse))
            ]
        taken = self.block(node.body if test.value else node.orelse)
        if taken:
            taken[0] = copy.copy(taken[0])
            above = [*getattr(node, library.ABOVE, []), *getattr(taken[0], library.ABOVE, [])]
            setattr(taken[0], library.ABOVE, above)
            setattr(taken[0], library.BLANK, getattr(node, library.BLANK, False))
        return taken

    def _for(self, node: ast.For) -> list[ast.stmt]:
        values = _static_values(self.expr(node.iter))
        if values is None or len(values) > MAX_UNROLL or not isinstance(node.target, ast.Name):
            return [_replaced(node, iter=self.expr(node.iter), body=self.block(node.body) or [ast.Pass()])]
        made: list[ast.stmt] = []
        outer = self.env
        for value in values:
            self.env = {**outer, node.target.id: ast.Constant(value)}
            made += self.block(node.body)
        self.env = outer
        return made

    def expr(self, node: ast.expr) -> ast.expr:
        return _Calls(self).visit(fold(node, self.env, self.present))  # type: ignore[no-any-return]


class _Calls(ast.NodeTransformer):
    """Specialises the calls in a folded expression, innermost first."""

    def __init__(self, body: _Body) -> None:
        self.body = body

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        return self.body.owner.call(self.body.module, node)


def _replaced(node: ast.stmt, **fields: object) -> ast.stmt:
    made = copy.copy(node)
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def _static_values(node: ast.expr) -> list[int] | None:
    match node:
        case ast.Call(func=ast.Attribute(value=ast.Name(id="tl"), attr="static_range"), args=args, keywords=[]):
            bounds = [a.value for a in args if isinstance(a, ast.Constant) and isinstance(a.value, int)]
            return list(range(*bounds)) if len(bounds) == len(args) else None
    return None


def _parameters(function: ast.FunctionDef) -> list[ast.arg]:
    return [*function.args.args, *function.args.kwonlyargs]


def _bind(source: ast.FunctionDef, call: ast.Call) -> dict[str, ast.expr]:
    """Parameter -> argument, in the order of the parameters."""
    names = [a.arg for a in _parameters(source)]
    given = dict(zip(names, call.args, strict=False)) | {k.arg: k.value for k in call.keywords if k.arg}
    return {name: given[name] for name in names}


def _is_const(node: ast.arg | ast.AnnAssign) -> bool:
    return node.annotation is not None and ast.unparse(node.annotation) in _CONST


def _is_static(value: ast.expr, given: frozenset[str]) -> bool:
    return is_constant(value) or (isinstance(value, ast.Name) and value.id in given)


def _is_none(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and value.value is None


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
