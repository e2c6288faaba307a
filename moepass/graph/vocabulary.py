"""The vocabulary: FX nodes of Dynamo's torch IR and of torch.export's training IR under one name each.

``name_of``     the canonical name of a call, whatever its spelling: ``torch._C._nn.gelu``, ``aten.gelu.default``,
                ``Tensor.relu_``, ``operator.imul`` are ``gelu``, ``gelu``, ``relu``, ``mul``
``POINTWISE``   one row per operation: canonical name -> builder of a ``moepass.pointwise`` expression
Operations outside torch's own namespaces have no name: a user function called ``silu`` is not silu.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import Node

# ruff: noqa: ARG001, ARG005 -- a row lists all parameters of its operation, ``inplace`` changes no value
from moepass import pointwise as pw
from moepass.pointwise import Call, Const, Expr, Var


class Unsupported(Exception):
    """A spelling that the vocabulary does not cover; the text says what."""


_ALIASES = {
    "absolute": "abs",
    "clip": "clamp",
    "concat": "cat",
    "divide": "div",
    "multiply": "mul",
    "negative": "neg",
    "special_erf": "erf",
    "special_expit": "sigmoid",
    "special_log1p": "log1p",
    "subtract": "sub",
    "true_divide": "div",
    "truediv": "div",
    "_unsafe_view": "view",
    "_softmax": "softmax",
    "_to_copy": "to",
}

_OPERATORS = {getattr(operator, n): n.strip("_") for n in ("add", "sub", "mul", "truediv", "pow", "neg", "matmul")}
_OPERATORS |= {operator.getitem: "getitem", operator.pos: "positive", operator.abs: "abs", operator.setitem: "setitem"}
_OPERATORS |= {operator.floordiv: "floor_divide"}
_IN_PLACE_OPERATORS = {getattr(operator, f"i{n}"): n for n in ("add", "sub", "mul", "truediv", "pow", "matmul")}


#: The class of ``torch.ops.aten.add.Tensor``.
OpOverload: type[Any] = type(torch.ops.aten.add.Tensor)
#: The class of ``torch.ops.aten.add``.
OpOverloadPacket: type[Any] = type(torch.ops.aten.add)


def raw_name(node: Node) -> str | None:
    """The torch name of a call as spelled (``relu_``), or None for anything outside torch's namespaces."""
    target = node.target
    if node.op == "call_method":
        return str(target)
    if node.op != "call_function":
        return None
    if isinstance(target, OpOverload):
        return target.overloadpacket.__name__ if target.namespace == "aten" else None
    if isinstance(target, OpOverloadPacket):
        space, _, name = target._qualified_op_name.partition("::")
        return name if space == "aten" else None
    known: Mapping[Any, str] = _OPERATORS
    if target in known:
        return known[target]
    if target in _IN_PLACE_OPERATORS:
        return _IN_PLACE_OPERATORS[target] + "_"
    if target is getattr:
        return f"get_{node.args[1]}"
    module = getattr(target, "__module__", None)
    if module is None and not hasattr(torch.Tensor, getattr(target, "__name__", "")):
        return None
    if module is not None and module != "torch" and not module.startswith("torch."):
        return None
    return getattr(target, "__name__", None)


def name_of(node: Node) -> str | None:
    """The canonical name: in-place and reflected spellings lose their marks (``mutates`` tells them apart)."""
    name = raw_name(node)
    if name is None:
        return None
    if name.startswith("__") and name.endswith("__"):
        name = _undecorated(name.strip("_"))
    elif name.endswith("_"):
        name = name.rstrip("_")
    return _ALIASES.get(name, name)


def _undecorated(name: str) -> str:
    """``imul`` and ``rmul`` without their mark; ``rsub`` is an operation of its own."""
    plain = _ALIASES.get(name[1:], name[1:])
    return plain if name[:1] in ("i", "r") and plain in POINTWISE and name not in POINTWISE else name


def argument(node: Node, position: int, *names: str, default: Any = None) -> Any:
    """One argument by position or by any of its keyword names."""
    if len(node.args) > position:
        return node.args[position]
    return next((node.kwargs[name] for name in names if name in node.kwargs), default)


def mutated(node: Node) -> tuple[Node, ...]:
    """The tensors that a node changes in place: ``relu_``, ``relu(inplace=True)``, ``+=``, ``x[i] = y``, ``out=``."""
    target, name = node.target, raw_name(node)
    if isinstance(target, OpOverload):
        return _mutated_by_schema(node, target)
    found = [node.kwargs["out"]] if node.kwargs.get("out") is not None else []
    method_in_place = name is not None and name.endswith("_") and not name.endswith("__")
    dunder_in_place = name is not None and name.startswith("__i") and name[3:].rstrip("_") in POINTWISE
    if node.args and (method_in_place or dunder_in_place or name == "setitem" or _inplace_flag(node)):
        found.append(node.args[0])
    return tuple(item for item in found if isinstance(item, Node))


def _mutated_by_schema(node: Node, target: Any) -> tuple[Node, ...]:
    if not target._schema.is_mutable:
        return ()
    found = []
    for position, spec in enumerate(target._schema.arguments):
        if spec.alias_info is not None and spec.alias_info.is_write:
            found.append(argument(node, position, spec.name))
    return tuple(item for item in found if isinstance(item, Node))


def _inplace_flag(node: Node) -> bool:
    if node.kwargs.get("inplace"):
        return True
    if node.op != "call_function" or not inspect.isfunction(node.target):
        return False
    try:
        return bool(inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments.get("inplace", False))
    except (TypeError, ValueError):
        return False


# --- pointwise operations --------------------------------------------------------------------------------------------

Term = Expr | float


def _e(x: Term | None) -> Expr:
    """A term as an expression."""
    if isinstance(x, (Var, Const, Call)):
        return x
    return Const(_n(x))


def _t(x: Term | None) -> Expr:
    """A term that must read a tensor."""
    if isinstance(x, (Var, Call)):
        return x
    raise Unsupported(f"{x!r} stands where a tensor is expected")


def _n(x: Term | None) -> float:
    """A term that must be a number."""
    if isinstance(x, (int, float)) and not isinstance(x, bool):
        return float(x)
    raise Unsupported(f"{x!r} stands where a number is expected")


def _call(op: str, *args: Expr) -> Expr:
    return Call(op, args)


def _unary(op: str) -> Callable[..., Expr]:
    return lambda input, inplace=False: _call(op, _t(input))


def _gelu(input: Term, approximate: str = "none") -> Expr:
    if approximate not in ("none", "tanh"):
        raise Unsupported(f"gelu(approximate={approximate!r})")
    return _call("gelu" if approximate == "none" else "gelu_tanh", _t(input))


def _pow(input: Term, exponent: Term) -> Expr:
    return pw.power(_t(input), _n(exponent))


def _div(input: Term, other: Term, rounding_mode: str | None = None) -> Expr:
    if rounding_mode is not None:
        raise Unsupported(f"div(rounding_mode={rounding_mode!r})")
    return pw.div(_e(input), _e(other))


def _clamp(input: Term, min: Term | None = None, max: Term | None = None) -> Expr:
    if min is None and max is None:
        raise Unsupported("clamp without bounds")
    if max is None:
        return _call("clamp_min", _t(input), Const(_n(min)))
    if min is None:
        return _call("clamp_max", _t(input), Const(_n(max)))
    return _call("clamp", _t(input), Const(_n(min)), Const(_n(max)))


def _elu(
    input: Term, alpha: float = 1.0, scale: float | bool = 1, input_scale: float = 1, inplace: bool = False
) -> Expr:
    if not isinstance(scale, bool) and (scale, input_scale) != (1, 1):  # a bool is F.elu's third argument, inplace
        raise Unsupported("elu with a scale")
    return _call("elu", _t(input), Const(_n(alpha)))


def _softplus(input: Term, beta: float = 1, threshold: float = 20) -> Expr:
    if (beta, threshold) != (1, 20):
        raise Unsupported(f"softplus(beta={beta}, threshold={threshold})")
    return _call("softplus", _t(input))


def _threshold(input: Term, threshold: float, value: float, inplace: bool = False) -> Expr:
    if (threshold, value) != (0, 0):
        raise Unsupported(f"threshold({threshold}, {value})")
    return _call("relu", _t(input))


#: Canonical name -> builder.  Tensor arguments arrive as expressions, numbers as numbers.
POINTWISE: dict[str, Callable[..., Expr]] = {
    **{op: _unary(op) for op, row in pw.OPS.items() if row.tensors == 1 and row.constants == 0 and op != "gelu_tanh"},
    "add": lambda input, other, alpha=1: pw.add(_e(input), pw.mul(Const(_n(alpha)), _e(other))),
    "addcmul": lambda input, tensor1, tensor2, value=1: pw.add(
        _e(input), pw.mul(Const(_n(value)), _e(tensor1), _e(tensor2))
    ),
    "clamp": _clamp,
    "clamp_max": lambda input, max: _call("clamp_max", _t(input), Const(_n(max))),
    "clamp_min": lambda input, min: _call("clamp_min", _t(input), Const(_n(min))),
    "div": _div,
    "elu": _elu,
    "gelu": _gelu,
    "hardtanh": lambda input, min_val=-1.0, max_val=1.0, inplace=False: _clamp(input, min_val, max_val),
    "leaky_relu": lambda input, negative_slope=0.01, inplace=False: _call(
        "leaky_relu", _t(input), Const(_n(negative_slope))
    ),
    "max": lambda input, other: _call("maximum", _t(input), _t(other)),
    "maximum": lambda input, other: _call("maximum", _t(input), _t(other)),
    "min": lambda input, other: _call("minimum", _t(input), _t(other)),
    "minimum": lambda input, other: _call("minimum", _t(input), _t(other)),
    "mul": lambda input, other: pw.mul(_e(input), _e(other)),
    "neg": lambda input: pw.neg(_t(input)),
    "positive": lambda input: _t(input),
    "pow": _pow,
    "reciprocal": lambda input: pw.div(pw.ONE, _t(input)),
    "rsqrt": lambda input: pw.div(pw.ONE, _call("sqrt", _t(input))),
    "rsub": lambda input, other, alpha=1: pw.sub(_e(other), pw.mul(Const(_n(alpha)), _e(input))),
    "softplus": _softplus,
    "softsign": lambda input: pw.div(_t(input), pw.add(_call("abs", _t(input)), pw.ONE)),
    "square": lambda input: pw.power(_t(input), 2.0),
    "sub": lambda input, other, alpha=1: pw.sub(_e(input), pw.mul(Const(_n(alpha)), _e(other))),
    "tanhshrink": lambda input: pw.sub(_t(input), _call("tanh", _t(input))),
    "threshold": _threshold,
}


def build(node: Node, lift: Callable[[Any], Any]) -> Expr:
    """The expression of a pointwise node; ``lift`` maps its arguments (nodes to expressions, numbers to numbers).

    Raises ``Unsupported`` for spellings and arguments outside the vocabulary.
    """
    name = name_of(node)
    if name not in POINTWISE:
        raise Unsupported(f"{spelled(node)} is not in the vocabulary")
    row = POINTWISE[name]
    renamed = {("input" if key == "self" else key): item for key, item in node.kwargs.items()}
    reflected = (raw_name(node) or "").startswith("__r") and name != "rsub" and len(node.args) == 2
    args = node.args[::-1] if reflected else node.args
    try:
        bound = inspect.signature(row).bind(*args, **renamed)
    except TypeError as error:
        raise Unsupported(f"{spelled(node)}: {error}") from None
    return row(**{key: lift(item) for key, item in bound.arguments.items()})


def spelled(node: Node) -> str:
    """A call as a reader would write it, for messages."""
    if node.op != "call_function":
        return str(node.target)
    name = getattr(node.target, "__name__", None)
    return str(node.target) if name is None or isinstance(node.target, OpOverload) else name


def is_torch_pointwise(node: Node) -> bool | None:
    """Whether torch itself tags the operation pointwise; None for functions that torch does not know."""
    name = name_of(node)
    packet = getattr(torch.ops.aten, name, None) if name and name.isidentifier() else None
    if packet is None:
        return False if name in NOT_POINTWISE else None
    return any(torch.Tag.pointwise in getattr(packet, overload).tags for overload in packet.overloads())


# --- everything else -------------------------------------------------------------------------------------------------

#: Keep the values and their order; the last dimension survives where the shapes say so.
VIEWS = frozenset({"view", "reshape", "flatten", "unflatten", "contiguous", "unsqueeze", "squeeze", "clone", "alias",
                   "view_as", "reshape_as"})  # fmt: skip
#: May change the dtype or the device.
CASTS = frozenset({"to", "type", "type_as", "float", "half", "bfloat16", "double", "int", "long", "cpu", "cuda",
                   "to_dtype"})  # fmt: skip
#: Exchange, repeat or pick rows.
MOVES = frozenset({"transpose", "permute", "t", "get_T", "get_mT", "movedim", "swapaxes", "expand", "expand_as",
                   "repeat", "select", "index_select", "flip", "roll", "unbind", "unfold"})  # fmt: skip
#: Cut the last dimension.
CUTS = frozenset({"chunk", "split", "split_with_sizes", "tensor_split", "narrow", "slice", "getitem"})
DROPOUTS = frozenset({"dropout", "native_dropout"})
#: Fewer elements out than in.
REDUCTIONS = frozenset({"mean", "sum", "var", "std", "amax", "amin", "norm", "prod", "logsumexp", "max", "min",
                        "linalg_vector_norm", "vector_norm", "var_mean"})  # fmt: skip
#: torch functions without an aten namesake that are certainly not pointwise.
NOT_POINTWISE = frozenset({"normalize", "multi_head_attention_forward", "local_response_norm", "vector_norm"})
#: Read a shape or a dtype, not the values.
QUERIES = frozenset({"size", "dim", "numel", "sym_size", "sym_numel", "get_shape", "get_dtype", "get_device",
                     "get_ndim", "stride", "is_floating_point", "get_is_cuda"})  # fmt: skip
#: Results share memory with the first argument.
ALIASING = (VIEWS | CASTS | MOVES | CUTS | {"detach", "positive"}) - {"clone"}
#: Borders of autocast and grad-mode regions.
BORDERS = frozenset({"_enter_autocast", "_exit_autocast", "_set_grad_enabled", "set_grad_enabled",
                     "_enter_inference_mode", "_exit_inference_mode"})  # fmt: skip
