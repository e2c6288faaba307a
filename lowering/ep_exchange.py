"""What each expert-parallel form moves, computes and keeps, on one mesh: a pure function for each form.

Letters: P ranks, N tokens of all ranks (P*T, or T where every rank holds the same), N/P own tokens of a rank, R = N*K/P
own rows, D width, E experts, K top-k, b bytes an element.  Volumes are those that one rank sends in a forward pass:

    replicated     all-reduce of [N, D]                                               2(P-1)/P * N*D*b
    all_gather     all-gather of tokens and routing, reduce-scatter of [N, D]         2(P-1) * N/P*D*b + (P-1)*N/P*K*12
    all_to_all     R rows there and back, each crossing once                          2(1-1/P) * R*D*b, and E counts
    ragged         the same for ``factor * R`` rows of static, equal blocks           2(1-1/P) * factor*R*D*b, and bins
    hierarchical   R rows to the node of their expert, then to its rank               2((1-1/G) + (1-1/L)) * R*D*b
    deduplicated   a token once to each distinct remote node, (G-1)(1-C(E-E/G,K)/C(E,K)) of G nodes, with its routing;
                   then rows inside the node; sums of a token's rows go back to its rank

Sources: reference/kernels.md 2.1 (volumes), reference/moe-systems.md 4.6 (buffers), DeepEP (two levels).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from moepass import spec
from moepass.lowering import ep_volume as volume
from moepass.lowering import ranks
from moepass.lowering.ep_legal import factor, mesh_of, tokens
from moepass.lowering.ep_volume import Way
from moepass.lowering.forms import ALL_GATHER, ALL_TO_ALL, DEDUPLICATED, HIERARCHICAL, LOCAL, RAGGED, REPLICATED
from moepass.lowering.hardware import Hardware
from moepass.lowering.plan import Workload

#: A routed pair travels as an int64 index and a float32 weight.
ROUTING_BYTES = 12
COUNT_BYTES = 8
#: A slot of a static buffer says which expert its row is for.
BIN_BYTES = 8
#: Seconds until the host has read the splits of an exact exchange from an accelerator (assumed: copy and synchronise).
HOST_READ = 10e-6


@dataclass(frozen=True)
class Exchange:
    """A form at work on one workload: what moves, what is computed, what is kept.

    ``rows``      mean and busiest rows of a rank's experts; ``moved``: rows that pass through its lowering
    ``permutes``  elements moved between the lowering and the collectives, forward
    ``once``      seconds before the first dispatch
    """

    dispatch: Way
    combine: Way
    rows: float
    busiest: float
    moved: float
    permutes: float
    buffer_bytes: float
    kept_bytes: float
    once: float = 0.0


def exchange(form: str, work: Workload, hw: Hardware) -> Exchange:
    """What ``form`` does to ``work``, whose mesh has a cost for it (``ep_legal``)."""
    return _FORMS[form](work, hw)


def _local(work: Workload, hw: Hardware) -> Exchange:  # noqa: ARG001 (one signature for all forms)
    rows = float(work.R)
    none = volume.nothing(())
    return Exchange(none, none, rows, rows, moved=rows, permutes=0.0, buffer_bytes=0.0, kept_bytes=0.0)


def _replicated(work: Workload, hw: Hardware) -> Exchange:  # noqa: ARG001
    N, levels, b = tokens(work), mesh_of(work).levels, work.itemsize
    rows, busiest = _rows(work)
    return Exchange(
        volume.nothing(levels),
        volume.reduce(levels, N * work.D * b),
        rows,
        busiest,
        moved=N * work.K,
        permutes=0.0,
        buffer_bytes=N * work.D * b,
        kept_bytes=0.0,
    )


def _all_gather(work: Workload, hw: Hardware) -> Exchange:  # noqa: ARG001
    N, mesh, b = tokens(work), mesh_of(work), work.itemsize
    rows, busiest = _rows(work)
    token, routing = work.D * b, work.K * ROUTING_BYTES
    return Exchange(
        volume.gather(mesh.levels, N / mesh.P * (token + routing), "all_gather"),
        volume.gather(mesh.levels, N / mesh.P * token, "reduce_scatter"),
        rows,
        busiest,
        moved=N * work.K,
        permutes=0.0,
        buffer_bytes=N * (2 * token + routing) + N / mesh.P * token,
        kept_bytes=N * (token + routing),
    )


def _all_to_all(work: Workload, hw: Hardware) -> Exchange:
    rows, busiest = _rows(work)
    way = volume.exchange(mesh_of(work).levels, rows * work.D * work.itemsize, peak=busiest / rows if rows else 1.0)
    return _exchanged(work, way, sent=rows, received=busiest, once=_counts(work) + _host_read(hw))


def _ragged(work: Workload, hw: Hardware) -> Exchange:  # noqa: ARG001
    rows, busiest = _rows(work)
    slots = factor(work) * rows
    row = work.D * work.itemsize
    there = volume.exchange(mesh_of(work).levels, slots * (row + BIN_BYTES))
    found = _exchanged(work, volume.exchange(mesh_of(work).levels, slots * row), sent=slots, received=slots, once=0.0)
    return replace(found, dispatch=there, busiest=min(busiest, slots), moved=slots)


def _hierarchical(work: Workload, hw: Hardware) -> Exchange:
    """Rows to the ranks with the sender's place in the nodes of their experts, and from there to the experts."""
    mesh, b = mesh_of(work), work.itemsize
    node, inner = mesh.levels[0], mesh.levels[1:]
    (rows, busiest), own = _rows(work), tokens(work) / mesh.P
    between = volume.send(node, rows * (1 - 1 / node.size) * work.D * b, _node_peak(work))
    way = volume.in_turn(between, _inside(work))
    counts = volume.exchange((node,), float(work.E * COUNT_BYTES)).seconds
    counts += volume.exchange(inner, float(work.E / node.size * COUNT_BYTES)).seconds
    return Exchange(
        way,
        way,
        rows,
        busiest,
        moved=busiest,
        permutes=2 * (own + 4 * rows) * work.D,
        buffer_bytes=2 * (3 * rows + busiest) * work.D * b,
        kept_bytes=rows * work.D * b,
        once=counts + 2 * _host_read(hw),
    )


def _deduplicated(work: Workload, hw: Hardware) -> Exchange:
    """Tokens to each distinct node with their routing; rows inside it; sums of a token's rows back to its rank."""
    mesh, b = mesh_of(work), work.itemsize
    node, routing = mesh.levels[0], work.K * ROUTING_BYTES
    (rows, busiest), own = _rows(work), tokens(work) / mesh.P
    remote = own * ranks.remote_groups(work.E, work.K, node.size, work.routing)
    here = own * ranks.distinct_groups(work.E, work.K, node.size, work.routing)
    peak, inside = _node_peak(work), _inside(work)
    return Exchange(
        volume.in_turn(volume.send(node, remote * (work.D * b + routing), peak), inside),
        volume.in_turn(volume.send(node, remote * work.D * b, peak), inside),
        rows,
        busiest,
        moved=busiest,
        permutes=2 * (own + 2 * here + 2 * rows) * work.D,
        buffer_bytes=2 * (here * (work.D * b + routing) + (rows + busiest) * work.D * b),
        kept_bytes=rows * work.D * b,
        once=2 * _counts(work) + 2 * _host_read(hw),
    )


def _inside(work: Workload) -> Way:
    """Rows from their forwarders to the ranks of their experts, inside a node."""
    rows, busiest = _rows(work)
    peak = busiest / rows if rows else 1.0
    return volume.exchange(mesh_of(work).levels[1:], rows * work.D * work.itemsize, peak)


def _node_peak(work: Workload) -> float:
    """Rows of the busiest node over the mean; a capacity bounds them as it bounds a rank's."""
    (rows, busiest), node = _rows(work), mesh_of(work).levels[0]
    found = ranks.imbalance(tokens(work), work.E, work.K, node.size, work.routing)
    return min(found, busiest / rows) if rows and work.capacity_factor is not None else found


def _exchanged(work: Workload, way: Way, *, sent: float, received: float, once: float) -> Exchange:
    """Rows sent to the ranks of their experts, and back: gathered before, summed with their weights after."""
    own, (rows, busiest) = tokens(work) / mesh_of(work).P, _rows(work)
    return Exchange(
        way,
        way,
        rows,
        busiest,
        moved=busiest,
        permutes=(own + 2 * sent + rows + own) * work.D,
        buffer_bytes=2 * (sent + received) * work.D * work.itemsize,
        kept_bytes=rows * work.D * work.itemsize,
        once=once,
    )


def _rows(work: Workload) -> tuple[float, float]:
    """Mean rows of a rank's experts, and expected rows of the busiest rank; a capacity bounds the latter."""
    mesh, N = mesh_of(work), tokens(work)
    mean, busiest = N * work.K / mesh.P, ranks.busiest_rows(N, work.E, work.K, mesh.P, work.routing)
    if work.capacity_factor is None:
        return mean, busiest
    most = float(work.E // mesh.P * spec.capacity(work.capacity_factor, N, work.K, work.E))
    return min(mean, most), min(busiest, most)


def _counts(work: Workload) -> float:
    """Seconds of telling every rank how many rows each of its experts will get."""
    return volume.exchange(mesh_of(work).levels, float(work.E * COUNT_BYTES)).seconds


def _host_read(hw: Hardware) -> float:
    return 0.0 if hw.device == "cpu" else HOST_READ


_FORMS: Mapping[str, Callable[[Workload, Hardware], Exchange]] = {
    LOCAL: _local,
    REPLICATED: _replicated,
    ALL_GATHER: _all_gather,
    ALL_TO_ALL: _all_to_all,
    RAGGED: _ragged,
    HIERARCHICAL: _hierarchical,
    DEDUPLICATED: _deduplicated,
}
