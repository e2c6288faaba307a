"""Which tensors can be the hidden tensor of a feed-forward block, and which are none of its business.

One pass over the graph gives each node one of
    CONSTANT  parameters and what is computed from them
    HIDDEN    computed from projections, row by row or nearly so: the inside of a block, or of a near miss
    OTHER     everything else: inputs, embeddings, attention, and residual streams
A residual stream is a sum in which one term feeds a projection under the other (``h + o_proj(attention(h))``).  Output
projections are looked for behind HIDDEN tensors only, so that ``o_proj``, ``q_proj`` after a norm and LM heads are
not even candidates.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from torch.fx import Node

from moepass.graph import values
from moepass.graph.dataflow import Dataflow
from moepass.graph.projection import Projections
from moepass.graph.vocabulary import CASTS, CUTS, DROPOUTS, MOVES, POINTWISE, REDUCTIONS, VIEWS, name_of

_MAX_SOURCES = 4  # projections remembered per hidden tensor: only residual detection asks for them


class Kind(Enum):
    """What a tensor is to a feed-forward block."""

    CONSTANT = "constant"
    HIDDEN = "hidden"
    OTHER = "other"


@dataclass(frozen=True)
class Stream:
    """The kind of a node and, where it is HIDDEN, the latest projections it came from."""

    kind: Kind
    sources: tuple[Node, ...] = ()


_CONSTANT, _OTHER = Stream(Kind.CONSTANT), Stream(Kind.OTHER)
_ROWWISE = VIEWS | CASTS | CUTS | DROPOUTS | MOVES | frozenset(POINTWISE)


def classify(flow: Dataflow, projections: Projections) -> dict[Node, Stream]:
    """The stream of every node."""
    streams: dict[Node, Stream] = {}
    for node in flow.graph.nodes:
        if node in flow.constants:
            streams[node] = _CONSTANT
        elif projections.at(node) is not None:
            streams[node] = Stream(Kind.HIDDEN, (node,))
        else:
            streams[node] = _merge(node, streams, flow)
    return streams


def _merge(node: Node, streams: dict[Node, Stream], flow: Dataflow) -> Stream:
    inputs = [source for source in node.all_input_nodes if streams[source].kind is not Kind.CONSTANT]
    hidden = [source for source in inputs if streams[source].kind is Kind.HIDDEN]
    if not hidden or node.op == "output":
        return _OTHER
    name = name_of(node)
    rowwise = name in _ROWWISE
    if not rowwise and (len(inputs) > 1 or not _keeps_extent(node, hidden[0], name)):
        return _OTHER
    if name in ("add", "sub") and _is_residual(inputs, streams, flow):
        return _OTHER
    sources = {s for source in hidden for s in streams[source].sources}
    latest = sorted(sources, key=flow.position.__getitem__, reverse=True)[:_MAX_SOURCES]
    return Stream(Kind.HIDDEN, tuple(latest))


def _keeps_extent(node: Node, source: Node, name: str | None) -> bool:
    """Whether an operation that is not row by row may still stand inside a near miss (a norm, an unknown function)."""
    before, after = values.tensor(source), values.tensor(node)
    if name in REDUCTIONS:
        return True
    return before is not None and after is not None and values.same_sizes(before, after)


def _is_residual(inputs: list[Node], streams: dict[Node, Stream], flow: Dataflow) -> bool:
    return any(
        flow.feeds(term, source)
        for term in inputs
        for branch in inputs
        if branch is not term
        for source in streams[branch].sources
        if flow.position[term] < flow.position[source]
    )
