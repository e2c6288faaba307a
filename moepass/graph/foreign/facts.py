"""What a node may be known to hold.

Letters: T tokens, K choices a token, R = T*K pairs, E experts.  Pair ``p = t*K + k`` is choice k of token t.  A tensor
of rows has its rows in an ``Order``: row r belongs to pair r, or to pair ``perm[r]``.  A fact speaks of the elements in
row-major order, so every view of a node shares its fact; whoever relies on a shape asks the node for it.

``source`` and ``key`` are nodes with nothing but views between them and what was read (``walk.Walk.origin``): two
tensors of expert ids are the same ids if their key is the same node.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.fx import Node

from moepass.graph.projection import Refusal
from moepass.pointwise import Expr

Size = int | torch.SymInt


@dataclass(frozen=True)
class Order:
    """``perm=None``: pair order.  Else row r belongs to pair ``perm[r]``, and the ids of ``key`` ascend.

    ``every``: no pairs at all; row ``e*T + t`` belongs to expert e and token t.
    """

    perm: Node | None = None
    key: Node | None = None
    every: bool = False


PAIRS, EVERY = Order(), Order(every=True)


# --- bookkeeping -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Iota:
    """``0, 1, ..., size - 1``."""

    size: Size


@dataclass(frozen=True)
class Filled:
    """One number everywhere; ``number=None``: memory that was never written."""

    number: float | None


@dataclass(frozen=True)
class PairNumber:
    """The pair of each row: the permutation that sorts by expert."""

    order: Order


@dataclass(frozen=True)
class Inverse:
    """The row of each pair: the inverse of an order's permutation."""

    order: Order


@dataclass(frozen=True)
class PairValue:
    """``source.reshape(-1)[pair]`` for the pair of each row, cast along the way."""

    order: Order
    source: Node
    casts: tuple[torch.dtype, ...] = ()


@dataclass(frozen=True)
class TokenNumber:
    """``pair // K`` for the pair of each row."""

    order: Order
    K: int


@dataclass(frozen=True)
class Wide:
    """``TokenNumber`` of each row, repeated for every feature: the index of gather and scatter_add."""

    tokens: TokenNumber


@dataclass(frozen=True)
class OneHot:
    """``[..., experts]``: one where the last dimension equals the id."""

    key: Node
    experts: int


@dataclass(frozen=True)
class Histogram:
    """How often each of the ids ``0 .. experts-1`` occurs in ``key``."""

    key: Node
    experts: int


@dataclass(frozen=True)
class Offsets:
    """Running sum of a ``Histogram``: where each expert's rows end."""

    key: Node
    experts: int


# --- operands and rows -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stack:
    """Weights of all experts: ``node [E, fan_out, fan_in]``, or ``[E, fan_in, fan_out]`` where ``flipped``."""

    node: Node
    flipped: bool
    experts: int
    fan_in: int
    fan_out: int


@dataclass(frozen=True)
class Picked:
    """``node[ids]`` for each row: a stack of weights or biases by the ids of ``key``; ``swapped``: transposed."""

    order: Order
    key: Node
    node: Node
    swapped: bool = False


@dataclass(frozen=True)
class Step:
    """One thing that happened to rows: a cast to ``dtype``, or a product with a weight per pair."""

    dtype: torch.dtype | None = None
    weight: PairValue | None = None


@dataclass(frozen=True)
class Rows:
    """``x[token]`` for the token of each row; ``steps`` happened to them since."""

    order: Order
    x: Node
    K: int
    steps: tuple[Step, ...] = ()


@dataclass(frozen=True)
class Gemm:
    """One projection of rows by their own expert's weights, bias included."""

    node: Node
    rows: object  # Rows, EveryRow or Hidden
    stack: Stack
    key: Node | None
    bias: Node | None = None


@dataclass(frozen=True)
class Part:
    """Output features ``start:stop:step`` of a projection: what a variable of a program stands for."""

    gemm: Gemm
    start: int
    stop: int
    step: int = 1

    @property
    def width(self) -> int:
        """How many features."""
        return len(range(self.start, self.stop, self.step))

    @property
    def whole(self) -> bool:
        """Whether nothing was cut."""
        return (self.start, self.stop, self.step) == (0, self.gemm.stack.fan_out, 1)


@dataclass(frozen=True)
class Hidden:
    """A pointwise program over parts of input projections; ``parts`` are the variables of ``expr`` by name.

    ``dropout`` and ``weight`` (a product with a weight per pair) come after the program, and nothing after them.
    """

    order: Order
    expr: Expr
    parts: tuple[tuple[str, Part], ...]
    dropout: float = 0.0
    weight: PairValue | None = None

    @property
    def closed(self) -> bool:
        """Whether nothing pointwise may follow."""
        return self.dropout > 0 or self.weight is not None


@dataclass(frozen=True)
class Outcome:
    """What the experts give, row by row; ``weight`` once the rows have been multiplied by their routing weights."""

    order: Order
    gemm: Gemm
    weight: PairValue | Sparse | None = None


@dataclass(frozen=True)
class Pieces:
    """A tuple of results: chunks, splits, sorts."""

    items: tuple[object, ...]


@dataclass(frozen=True)
class Ending:
    """The rows ``outcome`` have been summed over the choices of each token, onto ``base`` where there is one."""

    outcome: Outcome
    K: Size | None
    base: Node | None = None

    @property
    def gemms(self) -> frozenset[Node]:
        """The projections behind it."""
        return gemms_of(self.outcome)


@dataclass(frozen=True)
class Ended:
    """The result of a site: an ordinary tensor again.  Never kept; it tells the walk that nothing was lost."""


@dataclass(frozen=True)
class Lost:
    """Rows of a would-be site about which nothing is known any more, with the reason and the projections so far."""

    refusal: Refusal
    gemms: frozenset[Node] = field(default=frozenset())


def gemms_of(fact: object) -> frozenset[Node]:
    """The projections that a fact's rows have come through."""
    match fact:
        case Hidden(parts=parts):
            return frozenset(part.gemm.node for _, part in parts)
        case Outcome(gemm=gemm):
            return gemms_of(gemm.rows) | {gemm.node}
        case Pieces(items=items):
            return frozenset().union(*map(gemms_of, items))
        case Lost(gemms=gemms):
            return gemms
    return frozenset()


# --- every expert on every token (Llama-4) ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Sparse:
    """``[T, E]`` scores, zero but at ``index [T, K]`` (or, ``minus_inf``, minus infinity); ``turned``: ``[E, T]``."""

    index: Node
    scores: Node
    minus_inf: bool = False
    turned: bool = False


@dataclass(frozen=True)
class Copies:
    """``[E*T, D]``: x once for each expert, expert by expert."""

    x: Node
    experts: int


@dataclass(frozen=True)
class EveryRow:
    """``Copies`` times the ``Sparse`` score of each (expert, token)."""

    x: Node
    experts: int
    scores: Sparse
    steps: tuple[torch.dtype, ...] = ()  # dtype of the product, and of what it was cast to
