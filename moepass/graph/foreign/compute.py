"""Transfer rules of the arithmetic: expert GEMMs, biases, the pointwise program, routing weights, the sum over choices.

A node that completes a site leaves an ``Ending`` with the walk.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch.fx import Node

from moepass.graph import shapes, values, vocabulary
from moepass.graph.foreign import gemms, slices
from moepass.graph.foreign.facts import (
    PAIRS,
    Ended,
    Ending,
    Filled,
    Hidden,
    Lost,
    Order,
    Outcome,
    PairNumber,
    PairValue,
    Picked,
    Rows,
    Sparse,
    Step,
    TokenNumber,
    Wide,
    gemms_of,
)
from moepass.graph.foreign.walk import Walk, known_equal, same_shape, shape
from moepass.graph.projection import Refusal
from moepass.graph.vocabulary import CASTS, DROPOUTS, POINTWISE, VIEWS, argument
from moepass.pointwise import Expr


def transfer(walk: Walk, node: Node, name: str) -> object | None:
    """The fact of an arithmetic node, or a loss with its reason."""
    if name in gemms.GROUPED:
        return gemms.grouped(walk, node)
    if (turned := gemms.swapped(walk, node)) is not None:
        return turned
    if name in ("bmm", "matmul", "einsum", "baddbmm"):
        return _combined_by_product(walk, node) or gemms.batched(walk, node, name)
    facts = [walk.fact(source) for source in node.all_input_nodes]
    if any(isinstance(fact, Hidden) for fact in facts):
        return _settled(walk, node, _hidden_step(walk, node, name))
    if any(isinstance(fact, Outcome) for fact in facts):
        return _settled(walk, node, _outcome_step(walk, node, name))
    rows = next((fact for fact in facts if isinstance(fact, Rows)), None)
    return None if rows is None else _rows(walk, node, name, rows)


def _settled(walk: Walk, node: Node, result: object | Refusal) -> object:
    """A fact as it is; a refusal becomes a loss that the projections behind it know of."""
    if not isinstance(result, tuple):
        return result
    behind = frozenset().union(*(gemms_of(walk.fact(source)) for source in node.all_input_nodes))
    walk.refuse(behind, result)
    return Lost(result, behind)


def _ordered(walk: Walk, node: Node, kind: type) -> tuple[Any, Any]:
    """The operands of a sum or product, one with a fact of the kind first."""
    one, other = argument(node, 0), argument(node, 1)
    return (one, other) if isinstance(walk.fact(one), kind) else (other, one)


# --- rows before the first projection --------------------------------------------------------------------------------


def _rows(walk: Walk, node: Node, name: str, rows: Rows) -> Rows | None:
    """Casts, and weights on the input (torchtitan's ``score_before_experts``)."""
    before, after = values.tensor(shapes.first(node)), values.tensor(node)
    if before is None or after is None or not after.is_floating_point():
        return None
    moves = walk.fact(shapes.first(node)) is not rows or before.device != after.device
    if name in CASTS and not moves:
        return rows if before.dtype == after.dtype else replace(rows, steps=(*rows.steps, Step(dtype=after.dtype)))
    if name == "mul" and len(node.args) == 2:
        other = next((i for i in node.args if walk.fact(i) is not rows), None)
        weight = _weight(walk, node, other, rows.order)
        if isinstance(weight, PairValue) and not any(step.weight for step in rows.steps):
            return replace(rows, steps=(*rows.steps, Step(weight=weight)))
    return None


def _weight(walk: Walk, node: Node, other: Any, order: Order) -> PairValue | Refusal:
    """``other`` as one factor for each row of the product ``node``."""
    held = values.tensor(other)
    if not isinstance(other, Node) or held is None or not held.dtype.is_floating_point:
        return "moe_combine", f"{node.name} multiplies the rows by {other}, not by a weight for each"
    out, own = shape(node), shape(other)
    if len(own) != len(out) or not same_shape(own[:-1], out[:-1]) or not known_equal(own[-1], 1):
        return "moe_combine", f"{node.name} multiplies rows of shape {out} by {own}"
    fact = walk.fact(other)
    if isinstance(fact, PairValue):
        return fact if fact.order == order else ("unknown_order", f"{other} is in another order than the rows")
    if fact is None and order == PAIRS:
        return PairValue(PAIRS, walk.origin(other))
    return "unknown_order", f"nothing proves that {other.name} is in the order of the rows"


# --- between the projections -----------------------------------------------------------------------------------------


def _hidden_step(walk: Walk, node: Node, name: str) -> object | Refusal:
    source = shapes.first(node)
    fact = walk.fact(source)
    if isinstance(fact, Hidden) and name in CASTS and shapes.same_cast(node):
        return fact
    if name in CASTS:
        return "cast_in_program", f"{vocabulary.spelled(node)} changes the dtype or the device"
    if isinstance(fact, Hidden) and name in DROPOUTS:
        return _dropped(node, fact)
    if isinstance(fact, Hidden) and (cut := slices.cut(node, name, fact)) is not None:
        return cut
    if name in ("add", "mul") and len(node.args) == 2 and node.kwargs.get("alpha", 1) == 1:
        one, other = _ordered(walk, node, Hidden)
        if name == "add" and isinstance(picked := walk.fact(other), Picked):
            return _biased_hidden(walk.fact(one), other, picked)
        if name == "mul" and not isinstance(walk.fact(other), Hidden) and values.tensor(other) is not None:
            return _weighted_hidden(walk, node, walk.fact(one), other)
    if name not in POINTWISE:
        known = name in VIEWS or vocabulary.is_torch_pointwise(node) is False
        return "not_pointwise" if known else "unknown_activation", f"{vocabulary.spelled(node)} between the experts"
    return _pointwise(walk, node)


def _dropped(node: Node, fact: Hidden) -> Hidden | Refusal:
    probability = argument(node, 1, "p", default=0.5)
    training = argument(node, 2, "training", "train", default=True)
    if training is False or probability == 0:
        return fact
    if fact.closed or training is not True or not isinstance(probability, float):
        return "not_pointwise", "dropout inside the activation"
    return replace(fact, dropout=probability)


def _biased_hidden(fact: Hidden, bias: Node, picked: Picked) -> Hidden | Refusal:
    part = slices.bare(fact)
    if part is None or not part.whole or part.gemm.bias is not None:
        return "tensor_in_program", f"{bias.name} is added inside the activation"
    if (picked.order, picked.key) != (fact.order, part.gemm.key) or len(shape(picked.node)) != 2:
        return "unknown_order", f"nothing proves that {bias.name} is the bias of the rows' own experts"
    return slices.variable(replace(part.gemm, bias=picked.node), fact.order)


def _weighted_hidden(walk: Walk, node: Node, fact: Hidden, other: Any) -> Hidden | Refusal:
    """Weights on the hidden rows (Megatron): the output projection is linear, so they may as well come after it."""
    weight = _weight(walk, node, other, fact.order)
    if not isinstance(weight, PairValue) or fact.weight is not None:
        spoken = weight[1] if isinstance(weight, tuple) else f"{node.name} multiplies by a second weight"
        return "tensor_in_program", spoken
    return replace(fact, weight=weight)


def _pointwise(walk: Walk, node: Node) -> Hidden | Refusal:
    operands = [f for source in node.all_input_nodes if isinstance(f := walk.fact(source), Hidden)]
    if any(f.closed for f in operands):
        return "not_pointwise", f"{vocabulary.spelled(node)} follows dropout or the routing weight"
    if len({f.order for f in operands}) > 1:
        return "unknown_order", f"{node.name} mixes rows of different orders"
    after = values.tensor(node)
    for source in node.all_input_nodes:
        before = values.tensor(source)
        if not isinstance(walk.fact(source), Hidden) or before is None or after is None:
            continue
        if before.dtype != after.dtype:
            return "cast_in_program", f"{vocabulary.spelled(node)} turns {before.dtype} into {after.dtype}"
        if not same_shape(tuple(before.shape), tuple(after.shape)):
            return "shape_not_understood", f"{vocabulary.spelled(node)} broadcasts {source.name}"
    try:
        expr = vocabulary.build(node, lambda item: _lift(walk, item))
    except vocabulary.Unsupported as error:
        return "unknown_activation", str(error)
    except _Foreign as error:
        return "tensor_in_program", f"{vocabulary.spelled(node)} reads {error.args[0]}"
    parts = dict(pair for f in operands for pair in f.parts)
    return Hidden(operands[0].order, expr, tuple(sorted(parts.items(), key=lambda item: item[0])))


class _Foreign(Exception):
    """A tensor that is no part of the program."""


def _lift(walk: Walk, item: Any) -> Expr | Any:
    fact = walk.fact(item)
    if isinstance(fact, Hidden):
        return fact.expr
    if isinstance(item, Node) and values.tensor(item) is not None:
        raise _Foreign(item.name)
    return item if item is None or isinstance(item, (bool, str)) else values.number(item)


# --- after the output projection -------------------------------------------------------------------------------------


def _outcome_step(walk: Walk, node: Node, name: str) -> object | Refusal:
    source = shapes.first(node)
    fact = walk.fact(source)
    held = values.tensor(node)
    if isinstance(fact, Outcome) and name in CASTS and held is not None and held.is_floating_point():
        return fact
    if name in ("add", "mul") and len(node.args) == 2 and node.kwargs.get("alpha", 1) == 1:
        one, other = _ordered(walk, node, Outcome)
        return (_biased if name == "add" else _weighted)(walk, node, walk.fact(one), other)
    if name == "sum" and isinstance(fact, Outcome):
        return _summed(walk, node, source, fact)
    if name in ("index_add", "scatter_add"):
        return _scattered(walk, node, name)
    if name in ("setitem", "index_put"):
        return _put_back(walk, node)
    if name in ("getitem", "index", "index_select"):
        return "unknown_order", f"{node.name} picks rows in an order that nothing proves"
    return "moe_combine", f"{vocabulary.spelled(node)} between the experts and the sum over choices"


def _biased(walk: Walk, node: Node, fact: Outcome, other: Any) -> Outcome | Refusal:
    picked = walk.fact(other)
    if not isinstance(picked, Picked) or fact.weight is not None or fact.gemm.bias is not None:
        return "moe_combine", f"{node.name} adds {other} to the experts' rows"
    if (picked.order, picked.key) != (fact.order, fact.gemm.key) or len(shape(picked.node)) != 2:
        return "unknown_order", f"nothing proves that {other} is the bias of the rows' own experts"
    return replace(fact, gemm=replace(fact.gemm, bias=picked.node))


def _weighted(walk: Walk, node: Node, fact: Outcome, other: Any) -> Outcome | Refusal:
    scores = walk.fact(other)
    if fact.order.every and isinstance(scores, Sparse) and covers(node, other, scores):
        weight: PairValue | Sparse | Refusal = scores
    else:
        weight = _weight(walk, node, other, fact.order)
    if isinstance(weight, tuple):
        return weight
    if fact.weight is not None:
        return "moe_combine", f"{node.name} multiplies the rows by a second weight"
    return replace(fact, weight=weight)


def covers(product: Node, factor: Node, scores: Sparse) -> bool:
    """Whether each row of a product over all experts is multiplied by its own score."""
    own, out = shape(factor), shape(product)
    return scores.turned and not scores.minus_inf and known_equal(own[-1], 1) and same_shape(own[:-1], out[:-1])


def _summed(walk: Walk, node: Node, source: Node | None, fact: Outcome) -> object | Refusal:
    """``view(T, K, D).sum(1)`` in pair order; ``view(E, T, D).sum(0)`` where every expert saw every token."""
    sizes, dims = shape(source), argument(node, 1, "dim")
    dims = dims[0] if isinstance(dims, (list, tuple)) and len(dims) == 1 else dims
    keeps = argument(node, 2, "keepdim", default=False)
    if len(sizes) != 3 or not isinstance(dims, int) or keeps is not False:
        return "moe_combine", f"{node.name} sums over {dims} of {sizes}"
    dims %= 3
    if fact.order == PAIRS and dims == 1:
        return _end(walk, node, Ending(fact, sizes[1]))
    if fact.order.every and dims == 0 and known_equal(sizes[0], fact.gemm.stack.experts):
        return _end(walk, node, Ending(fact, None))
    return "unknown_order", f"{node.name} sums rows that are not in pair order"


def _scattered(walk: Walk, node: Node, name: str) -> object | Refusal:
    """``zeros.index_add(0, token, rows)``, ``base.scatter_add(0, token[:, None].expand(R, D), rows)``."""
    base, dim, index = shapes.first(node), argument(node, 1, "dim"), argument(node, 2, "index")
    rows = argument(node, 3, "source" if name == "index_add" else "src", "src")
    fact, by = walk.fact(rows), walk.fact(index)
    tokens = by.tokens if isinstance(by, Wide) else TokenNumber(by.order, 1) if isinstance(by, PairNumber) else by
    plain = dim == 0 and argument(node, 4, "alpha", default=1) == 1 and isinstance(by, Wide) == (name == "scatter_add")
    if base is None or not isinstance(fact, Outcome) or not isinstance(tokens, TokenNumber) or not plain:
        return "moe_combine", f"{node.name} adds rows into a tensor by {index}"
    if tokens.order != fact.order or len(shape(rows)) != 2:
        return "unknown_order", f"{index} is in another order than the rows"
    empty = walk.fact(base) == Filled(0.0)
    if not empty and vocabulary.mutated(node):
        return "mutated", f"{node.name} adds into {base.name}, which is not new"
    return _end(walk, node, Ending(fact, tokens.K, None if empty else base))


def _put_back(walk: Walk, node: Node) -> Outcome | Refusal:
    """``unsorted[perm] = rows``: every pair is written once, so what was there before does not matter."""
    target, index, rows = (argument(node, i, *n) for i, n in enumerate((("self",), ("indices",), ("values",))))
    index = index[0] if isinstance(index, (list, tuple)) and len(index) == 1 else index
    fact, by = walk.fact(rows), walk.fact(index)
    sorts = isinstance(fact, Outcome) and isinstance(by, PairNumber) and by.order == fact.order
    if not sorts or not isinstance(walk.fact(target), Filled) or not same_shape(shape(target), shape(rows)):
        return "unknown_order", f"{node.name} writes rows in an order that nothing proves"
    if argument(node, 3, "accumulate", default=False) is not False:
        return "moe_combine", f"{node.name} adds rows into {target}"
    assert isinstance(fact, Outcome)
    return replace(fact, order=PAIRS)


def _combined_by_product(walk: Walk, node: Node) -> object | None:
    """``bmm(weight [T, 1, K], rows [T, K, D])`` (torchtitan)."""
    if len(node.args) != 2 or not isinstance(fact := walk.fact(node.args[1]), Outcome):
        return None
    weight, rows = node.args
    own, sizes = shape(weight), shape(rows)
    raw = isinstance(weight, Node) and walk.fact(weight) is None and fact.order == PAIRS and fact.weight is None
    if not raw or len(own) != 3 or len(sizes) != 3 or not known_equal(own[1], 1) or not known_equal(own[2], sizes[1]):
        return None
    assert isinstance(weight, Node)
    return _end(walk, node, Ending(replace(fact, weight=PairValue(PAIRS, walk.origin(weight))), sizes[1]))


def _end(walk: Walk, node: Node, ending: Ending) -> object:
    walk.endings.append((node, ending))
    return Ended()
