"""Transfer rules of the bookkeeping around the experts: integers, histograms, gathers.

Sorting need not be stable: within an expert every row still belongs to its own pair, which is all that the proof needs.
Ids outside ``0 .. E-1`` have no rows in any of the forms that are recognised (HF leaves what they hold undefined).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from moepass.graph import shapes, values
from moepass.graph.foreign.facts import (
    PAIRS,
    Filled,
    Hidden,
    Histogram,
    Inverse,
    Iota,
    Offsets,
    OneHot,
    Order,
    Outcome,
    PairNumber,
    PairValue,
    Picked,
    Pieces,
    Rows,
    TokenNumber,
    Wide,
)
from moepass.graph.foreign.walk import INTEGERS, Walk, is_view, known_equal, piece, same_shape, shape, whole
from moepass.graph.vocabulary import CASTS, argument

_NEW = {"empty": None, "zeros": 0.0, "ones": 1.0}
_BY_PAIR = (Rows, Hidden, Outcome, PairValue, Picked, TokenNumber)  # facts that know their order


def transfer(walk: Walk, node: Node, name: str) -> object | None:
    """The fact of a bookkeeping node."""
    source = shapes.first(node)
    fact: object = walk.fact(source)
    if source is not None and fact is not None and is_view(node) and not isinstance(fact, Pieces):
        return fact
    if name in CASTS:
        return _cast(fact, node)
    if name in ("getitem", "index", "index_select"):
        return _gather(walk, node, name, source, fact)
    if (made := _created(node, name)) is not None:
        return made
    rule = _RULES.get(name)
    found: object | None = rule(walk, node, source, fact) if rule is not None else None
    return found


# --- new tensors -----------------------------------------------------------------------------------------------------


def _created(node: Node, name: str) -> object | None:
    kind = name.removeprefix("new_").removesuffix("_like")
    if kind in _NEW:
        return Filled(_NEW[kind])
    if kind == "full":
        held = argument(node, 1 if name != "new_full" else 2, "fill_value")
        return Filled(float(held)) if isinstance(held, (int, float)) else None
    if name == "arange":
        held = values.tensor(node)
        start, end = (0, node.args[0]) if len(node.args) == 1 else (*node.args[:2], None, None)[:2]
        start, end = node.kwargs.get("start", start), node.kwargs.get("end", end)
        step = argument(node, 2, "step", default=1)
        if held is None or held.dtype not in INTEGERS or (start, step) != (0, 1) or end is None:
            return None
        return Iota(held.shape[0])
    return None


def _cast(fact: object, node: Node) -> object | None:
    """Integers stay what they are under casts among integers; histograms and ids are exact in float32 too."""
    held = values.tensor(node)
    if held is None or fact is None:
        return None
    if isinstance(fact, PairValue):
        before = values.tensor(shapes.first(node))
        same = before is not None and before.dtype == held.dtype
        return fact if same else replace(fact, casts=(*fact.casts, held.dtype))
    if isinstance(fact, (Histogram, Offsets, OneHot)):
        return fact if held.dtype in (*INTEGERS, torch.float32, torch.float64) else None
    if isinstance(fact, (PairNumber, TokenNumber, Inverse, Iota, Wide)):
        return fact if held.dtype in (torch.int64, torch.int32) else None
    if isinstance(fact, Filled):
        return fact
    return None


# --- orders ----------------------------------------------------------------------------------------------------------


def _sort(walk: Walk, node: Node, source: Node | None, fact: object) -> object | None:
    """``sort`` and ``argsort`` of a vector: of ids, or of a permutation (which inverts it)."""
    held = values.tensor(source)
    descending = argument(node, 2, "descending", default=False)
    if source is None or held is None or held.dim() != 1 or descending is not False:
        return None
    if isinstance(fact, PairNumber):
        return _sorted(node, None, Inverse(fact.order))
    ids = walk.ids(source)
    if ids is None or ids.order != PAIRS:
        return None
    order = Order(node, ids.source)
    return _sorted(node, PairValue(order, ids.source), PairNumber(order))


def _sorted(node: Node, first: object, second: object) -> object:
    return second if isinstance(values.value(node), torch.Tensor) else Pieces((first, second))


def _token(walk: Walk, node: Node, source: Node | None, fact: object) -> object | None:  # noqa: ARG001
    rounding = argument(node, 2, "rounding_mode", default="floor")
    K = whole(argument(node, 1, "other", "divisor"))
    if not isinstance(fact, PairNumber) or not isinstance(K, int) or rounding not in ("floor", "trunc"):
        return None
    return TokenNumber(fact.order, K)


def _div(walk: Walk, node: Node, source: Node | None, fact: object) -> object | None:
    return _token(walk, node, source, fact) if node.kwargs.get("rounding_mode") in ("floor", "trunc") else None


def _repeat_interleave(walk: Walk, node: Node, source: Node | None, fact: object) -> object | None:  # noqa: ARG001
    times, dim = whole(argument(node, 1, "repeats")), argument(node, 2, "dim")
    before = shape(source)
    if (
        source is None
        or not isinstance(times, int)
        or not before
        or not (dim == 0 or (dim is None and len(before) == 1))
    ):
        return None
    if isinstance(fact, Iota):
        return TokenNumber(PAIRS, times)
    return Rows(PAIRS, source, times) if len(before) == 2 and fact is None else None


def _expand(walk: Walk, node: Node, source: Node | None, fact: object) -> object | None:
    """``x[:, None].expand(T, K, D)``, ``arange(T)[:, None].expand(T, K)``, ``tokens[:, None].expand(R, D)``."""
    before, after = shape(source), shape(node)
    if source is None or len(before) != len(after) or len(before) < 2 or not known_equal(before[0], after[0]):
        return None
    times = values.static(after[1])
    if isinstance(fact, TokenNumber) and len(before) == 2 and known_equal(before[1], 1):
        return Wide(fact)
    if times is None or not known_equal(before[1], 1) or not same_shape(before[2:], after[2:]):
        return None
    if isinstance(fact, Iota) and len(before) == 2:
        return TokenNumber(PAIRS, times)
    origin = walk.origin(source)
    if fact is None and len(before) == 3 and len(shape(origin)) >= 2 and known_equal(shape(origin)[-1], before[2]):
        return Rows(PAIRS, origin, times)
    return None


# --- histograms ------------------------------------------------------------------------------------------------------


def _histc(walk: Walk, node: Node, source: Node | None, fact: object) -> object | None:  # noqa: ARG001
    """Bins of width one (``max=E``), or a little less (``max=E-1``): integer i falls into bin i either way."""
    experts = whole(argument(node, 1, "bins", default=100))
    low, high = argument(node, 2, "min", default=0), argument(node, 3, "max", default=0)
    ids = walk.ids(source)
    if ids is None or not isinstance(experts, int) or low != 0 or high not in (experts, experts - 1) or high == 0:
        return None
    return Histogram(ids.source, experts)


def _bincount(walk: Walk, node: Node, source: Node | None, fact: object) -> object | None:  # noqa: ARG001
    experts, ids = whole(argument(node, 2, "minlength", default=0)), walk.ids(source)
    weighted = argument(node, 1, "weights") is not None
    return Histogram(ids.source, experts) if ids is not None and isinstance(experts, int) and not weighted else None


def _one_hot(walk: Walk, node: Node, source: Node | None, fact: object) -> object | None:  # noqa: ARG001
    experts, ids = whole(argument(node, 1, "num_classes", default=-1)), walk.ids(source)
    return OneHot(ids.source, experts) if ids is not None and isinstance(experts, int) and experts > 0 else None


def _sum(walk: Walk, node: Node, source: Node | None, fact: object) -> object | None:  # noqa: ARG001
    """A one-hot summed over everything but its last dimension."""
    if not isinstance(fact, OneHot):
        return None
    rank = len(shape(source))
    dims = argument(node, 1, "dim")
    dims = dims if isinstance(dims, (list, tuple)) else (dims,)
    summed = {d % rank for d in dims if isinstance(d, int)}
    known = summed == set(range(rank - 1)) and known_equal(shape(source)[-1], fact.experts)
    return Histogram(fact.key, fact.experts) if known else None


def _scatter(walk: Walk, node: Node, source: Node | None, fact: object) -> object | None:
    """``zeros(E).scatter_add(0, ids, ones)`` counts; ``empty.scatter(0, perm, arange)`` inverts."""
    dim, index = argument(node, 1, "dim"), argument(node, 2, "index")
    value = argument(node, 3, "src", "value")
    size = shape(source)
    if not isinstance(fact, Filled) or dim not in (0, -1) or len(size) != 1:
        return None
    adds = "add" in str(node.target)
    if not adds:
        return _inverted(walk, source, index, value)
    ids, ones = walk.ids(index), walk.fact(value)
    if fact.number != 0 or ids is None or ones != Filled(1.0) or not same_shape(shape(index), shape(value)):
        return None
    experts = whole(size[0])
    return Histogram(ids.source, experts) if isinstance(experts, int) else None


def _setitem(walk: Walk, node: Node, source: Node | None, fact: object) -> object | None:
    """``inverse[perm] = arange(R)``."""
    index, value = argument(node, 1, "indices"), argument(node, 2, "values")
    index = index[0] if isinstance(index, (list, tuple)) and len(index) == 1 else index
    accumulates = argument(node, 3, "accumulate", default=False)
    return _inverted(walk, source, index, value) if isinstance(fact, Filled) and accumulates is False else None


def _inverted(walk: Walk, target: Any, index: Any, value: Any) -> object | None:
    perm, rows = walk.fact(index), walk.fact(value)
    if not isinstance(perm, PairNumber) or not isinstance(rows, Iota):
        return None
    covers = same_shape(shape(target), shape(index)) and same_shape(shape(target), (rows.size,))
    return Inverse(perm.order) if covers else None


def _cumsum(walk: Walk, node: Node, source: Node | None, fact: object) -> object | None:  # noqa: ARG001
    if not isinstance(fact, Histogram) or argument(node, 1, "dim") not in (0, -1) or len(shape(source)) != 1:
        return None
    return Offsets(fact.key, fact.experts)


# --- gathers ---------------------------------------------------------------------------------------------------------


def _gather(walk: Walk, node: Node, name: str, source: Node | None, fact: object) -> object | None:
    if name == "getitem" and isinstance(fact, Pieces):
        return piece(fact, node.args[1])
    index = _index(node, name)
    if source is None or index is None:
        return None
    return gathered(walk, source, fact, index)


def _index(node: Node, name: str) -> Node | None:
    """The one integer tensor that picks along the first dimension (new dimensions may follow it)."""
    if name == "index_select":
        return argument(node, 2, "index") if argument(node, 1, "dim") == 0 else None
    given = node.args[1] if len(node.args) > 1 else None
    items = tuple(given) if isinstance(given, (list, tuple)) else (given,)
    first, rest = items[0] if items else None, items[1:]
    if not isinstance(first, Node) or any(i is not None and i is not Ellipsis for i in rest):
        return None
    held = values.tensor(first)
    return first if held is not None and held.dtype in INTEGERS else None


def gathered(walk: Walk, source: Node, fact: Any, index: Node) -> object | None:
    """``source[index]`` along the first dimension."""
    by = walk.fact(index)
    rows = shape(source)
    if isinstance(by, (PairNumber, Inverse)) and isinstance(fact, _BY_PAIR):
        before, after = (PAIRS, by.order) if isinstance(by, PairNumber) else (by.order, PAIRS)
        fits = fact.order == before and known_equal(rows[0], shape(index)[0])
        return replace(fact, order=after) if fits else None
    if isinstance(by, PairNumber) and fact is None:
        if not rows or not known_equal(rows[0], shape(index)[0]):
            return None
        if all(known_equal(size, 1) for size in rows[1:]):
            return PairValue(by.order, walk.origin(source))
        return Rows(by.order, source, 1) if len(rows) == 2 and _floating(source) else None  # one choice a token
    if isinstance(by, TokenNumber):
        if isinstance(fact, Iota):
            return by
        return Rows(by.order, source, by.K) if fact is None and len(rows) == 2 else None
    ids = walk.ids(index)
    if ids is None or fact is not None or len(rows) not in (2, 3) or not _floating(source):
        return None
    return Picked(ids.order, ids.source, source)


def _floating(node: Node) -> bool:
    held = values.tensor(node)
    return held is not None and held.dtype.is_floating_point


def _gather_wide(walk: Walk, node: Node, source: Node | None, fact: object) -> object | None:
    """``x.gather(0, tokens[:, None].expand(-1, D))``."""
    wide = walk.fact(argument(node, 2, "index"))
    fits = fact is None and isinstance(wide, Wide) and argument(node, 1, "dim") == 0 and len(shape(source)) == 2
    if source is None or not fits or not known_equal(shape(source)[-1], shape(node)[-1]):
        return None
    assert isinstance(wide, Wide)
    return Rows(wide.tokens.order, source, wide.tokens.K)


_RULES = {
    "sort": _sort,
    "argsort": _sort,
    "floor_divide": _token,
    "div": _div,
    "repeat_interleave": _repeat_interleave,
    "expand": _expand,
    "histc": _histc,
    "bincount": _bincount,
    "one_hot": _one_hot,
    "sum": _sum,
    "scatter": _scatter,
    "scatter_add": _scatter,
    "setitem": _setitem,
    "index_put": _setitem,
    "cumsum": _cumsum,
    "gather": _gather_wide,
}
