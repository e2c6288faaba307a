"""The existing MoE blocks of a graph: sites, and near misses with their reasons.

``recognise``      one graph
``recognise_all``  a graph and the bodies of its higher-order ops
Every grouped GEMM and every batched GEMM with gathered parameters ends up in one of the two; so does what an eager
loop over experts leaves behind (``traces``).  Nothing is changed.
"""

from __future__ import annotations

from torch.fx import GraphModule, Node

from moepass.graph import vocabulary
from moepass.graph.capture import Path, bodies
from moepass.graph.dataflow import Dataflow
from moepass.graph.dense import IsParameter
from moepass.graph.foreign import compute, dense_form, routing, traces
from moepass.graph.foreign.facts import EveryRow, Picked
from moepass.graph.foreign.site import ForeignExperts, assemble, holders
from moepass.graph.foreign.walk import Walk
from moepass.graph.site import Rejected

RULES = (routing.transfer, dense_form.transfer, compute.transfer)
Found = ForeignExperts | Rejected


def recognise(gm: GraphModule, is_parameter: IsParameter | None = None) -> list[Found]:
    """Sites and near misses of one graph, graph order.

    ``is_parameter``  tells whether a placeholder holds an ``nn.Parameter``; by default the node's metadata do.
    """
    if not any(_interesting(node) for node in gm.graph.nodes):
        return []
    walk = Walk(Dataflow(gm.graph, is_parameter), RULES).run()
    sites: list[ForeignExperts] = []
    for output, ending in walk.endings:
        verdict = assemble(output, ending, walk.flow)
        if isinstance(verdict, ForeignExperts):
            sites.append(verdict)
        else:
            walk.anchors.update(dict.fromkeys(ending.gemms, verdict))
    taken = frozenset().union(*(site.gemms for site in sites))
    rejected = _near_misses({n: r for n, r in walk.anchors.items() if n not in taken}, walk)
    position = walk.flow.position
    return sorted([*sites, *rejected, *traces.find(walk.flow)], key=lambda found: position[found.output])


def recognise_all(gm: GraphModule, is_parameter: IsParameter | None = None) -> list[tuple[Path, Found]]:
    """``recognise`` for a graph and, by path of sub-module names, every sub-graph."""
    return [(path, found) for path, body in bodies(gm) for found in recognise(body, is_parameter)]


def _interesting(node: Node) -> bool:
    """Whether a node could be an expert GEMM, or belongs to the head of an eager loop: dense graphs need no walk."""
    return node.op in ("call_function", "call_method") and any(
        word in str(node.target) for word in ("grouped_mm", "bmm", "matmul", "einsum", "one_hot", "split", "scatter")
    )


def _near_misses(anchors: dict[Node, tuple[str, str] | None], walk: Walk) -> list[Rejected]:
    """Anchors without a site, those of one reason together (the projections of one block share theirs)."""
    groups: dict[tuple[str, str], list[Node]] = {}
    for node, refusal in anchors.items():
        reason = refusal or ("moe_form", f"nothing sums the rows of {node.name} over the choices of a token")
        groups.setdefault(reason, []).append(node)
    return [
        Rejected(nodes[-1], *reason, weights=holders(nodes))
        for reason, nodes in groups.items()
        if any(_is_experts(node, walk) for node in nodes)
    ]


def _is_experts(anchor: Node, walk: Walk) -> bool:
    """Whether a projection that is in no site is worth a word: batched products serve attention and caches as well."""
    facts = [walk.fact(source) for source in anchor.all_input_nodes]
    stacks = [fact.node for fact in facts if isinstance(fact, Picked)]
    routed = any(isinstance(fact, EveryRow) for fact in facts)
    return (
        routed
        or vocabulary.name_of(anchor) not in ("bmm", "matmul", "einsum", "baddbmm")
        or any(node in walk.flow.constants for node in stacks)
    )
