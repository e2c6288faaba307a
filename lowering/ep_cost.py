"""What a block costs when its experts are spread over the ranks of a mesh: one price for each form.

    total = counts + permutes + dispatch + experts + combine + reduce, forward and, where the workload trains, backward

Every form sends as much backward as forward: the adjoint of each collective moves what the collective moved.
Experts: the planner's own prices for what one rank holds, E/P experts, and the rows of the *busiest* rank
(``lowering.ranks``), for which the others wait.  Forms that see all tokens move rows that are not theirs, too.
Chunks are priced beside it: cutting the tokens hides communication behind experts (``ep_volume.pipeline``), at the
price of more latency, smaller GEMMs and weights that are read again; on a CPU both want the same cores.
A shared expert runs under the dispatch, and counts for what it takes beyond that.
Tensor parallelism: each rank has F/tp of its experts; the all-reduce of ``[T, D]`` over tp, and backward those of the
gradients of the tokens and the routing weights, come on top (the output bias's is not counted).
Not counted: data-parallel traffic of other mesh dimensions, congestion of switches, SMs that collectives take away.

Letters and volumes: ``ep_exchange``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from moepass.lowering import ep_volume as volume
from moepass.lowering import planner
from moepass.lowering.cost import TRAIN_PASSES
from moepass.lowering.ep_exchange import Exchange
from moepass.lowering.ep_exchange import exchange as exchange_of
from moepass.lowering.ep_legal import NO_COST, legal, mesh_of, tokens
from moepass.lowering.ep_volume import Way
from moepass.lowering.forms import LOCAL, FormPrice, Overlap, Traffic
from moepass.lowering.hardware import Hardware
from moepass.lowering.mesh import MeshDim
from moepass.lowering.plan import Plan, Price, TokenRange, Workload
from moepass.lowering.registry import lowerings

#: The lowerings that take rows of which some are nobody's, as the forms hand them over (``moepass.lowering.ep``).
ROWWISE = ("grouped",)
#: Numbers of chunks that are considered.
CHUNKS = (1, 2, 4, 8)
#: More chunks are taken only where they save this part of the time.
WORTH = 0.02


def price(form: str, work: Workload, hw: Hardware) -> FormPrice | None:
    """The price of ``form``; None where its cost is not defined.

    An illegal form has a price where the same tokens could be served by it in another layout.
    """
    if legal(form, work).code in NO_COST:
        return None
    exchange = exchange_of(form, work, hw)
    plan = _local_plan(work, hw, exchange, 1)
    once = _once(work, hw, exchange)
    computes = _computes(plan, work, hw, exchange, 1)
    reduces = _reduces(work)
    moving = _passes(work) * (exchange.dispatch.seconds + exchange.combine.seconds) + sum(r.seconds for r in reduces)
    shared, hidden = _shared(work, hw, exchange)
    saved = _predicted(plan).saved_bytes * _moved(plan, exchange) + exchange.kept_bytes
    return FormPrice(
        total=once + sum(computes) + moving + shared - hidden,
        compute=sum(computes),
        communication=moving,
        latency=_passes(work) * (exchange.dispatch.latency + exchange.combine.latency)
        + sum(r.latency for r in reduces),
        overhead=once,
        overlap=_overlap(form, work, hw, exchange),
        rows=exchange.rows,
        busiest=exchange.busiest,
        lowering=plan.lowering,
        traffic=_traffic(work, exchange, reduces),
        buffer_bytes=exchange.buffer_bytes,
        saved_bytes=saved if work.train else 0.0,
        weight_bytes=float(work.E // mesh_of(work).P * work.weight_elements * work.itemsize) / mesh_of(work).tp_size,
        shared=shared,
        hidden=hidden,
    )


def local_plan(form: str, work: Workload, hw: Hardware) -> Plan:
    """The planner's choice for what the busiest rank's own experts have to do.  Raises ``NoLegalLowering``."""
    return _local_plan(work, hw, exchange_of(form, work, hw), 1)


def _overlap(form: str, work: Workload, hw: Hardware, exchange: Exchange) -> Overlap:
    """The best of ``CHUNKS``, fewest first; more only where they pay."""
    counts = (1,) if form == LOCAL or hw.device == "cpu" else CHUNKS
    own = max(1, tokens(work) // mesh_of(work).P)
    totals = {c: _chunked(work, hw, exchange, c) for c in counts if c <= own}
    chunks = min(totals, key=totals.__getitem__)
    if totals[chunks] > (1 - WORTH) * totals[1]:
        chunks = 1
    serial = totals[1] - _serial(work, hw, exchange, 1) + _serial(work, hw, exchange, chunks)
    return Overlap(
        chunks=chunks,
        total=totals[chunks],
        hidden=max(0.0, serial - totals[chunks]) if chunks > 1 else 0.0,
        reason=_why(form, hw, chunks, totals),
    )


def _serial(work: Workload, hw: Hardware, exchange: Exchange, chunks: int) -> float:
    """Seconds of exchanges and experts in so many chunks, one after the other."""
    ways = exchange.dispatch.cut(chunks) + exchange.combine.cut(chunks)
    done = sum(_computes(_local_plan(work, hw, exchange, chunks), work, hw, exchange, chunks))
    return chunks * (done + _passes(work) * ways)


def _chunked(work: Workload, hw: Hardware, exchange: Exchange, chunks: int) -> float:
    """Seconds of the block in so many chunks, forward and then backward."""
    plan = _local_plan(work, hw, exchange, chunks)
    there, back = exchange.dispatch.cut(chunks), exchange.combine.cut(chunks)
    computes = _computes(plan, work, hw, exchange, chunks)
    around = _once(work, hw, exchange) + sum(reduce.seconds for reduce in _reduces(work))
    shared, hidden = _shared(work, hw, exchange, chunks)
    return around + shared - hidden + sum(volume.pipeline(chunks, there, each, back) for each in computes)


def _computes(plan: Plan, work: Workload, hw: Hardware, exchange: Exchange, chunks: int) -> list[float]:
    """Seconds of one chunk's experts: forward and, where the workload trains, backward."""
    forward = _seconds(plan, work.model_copy(update={"train": False}), hw, exchange, chunks)
    return [forward, max(0.0, _seconds(plan, work, hw, exchange, chunks) - forward)] if work.train else [forward]


def _once(work: Workload, hw: Hardware, exchange: Exchange) -> float:
    """Seconds that do not depend on chunks: counts, the host's read, permutes."""
    permutes = (TRAIN_PASSES if work.train else 1) * exchange.permutes * work.itemsize / hw.bandwidth
    return exchange.once + permutes


def _reduces(work: Workload) -> list[Way]:
    """All-reduces over the ranks that share each expert: of results, and of gradients of tokens and weights."""
    slices = mesh_of(work).slices
    tokens_bytes, weights_bytes = work.tokens * work.D * work.itemsize, work.tokens * work.K * 4
    return [volume.reduce(slices, float(m)) for m in (tokens_bytes, tokens_bytes, weights_bytes)[: 1 + 2 * work.train]]


def _shared(work: Workload, hw: Hardware, exchange: Exchange, chunks: int = 1) -> tuple[float, float]:
    """Seconds of the shared expert, as a block of one expert, and how many of them pass while the first chunk travels.

    Where nothing is dispatched (``replicated``) it runs over the sum.
    """
    if not work.shared:
        return 0.0, 0.0
    alone = {"mesh": None, "same_tokens": False, "buffer_factor": None, "capacity_factor": None, "shared": 0}
    one = work.model_copy(update={**alone, "E": 1, "K": 1, "F": work.shared})
    passes = [one.model_copy(update={"train": False}), *([one] if work.train else [])]
    totals = [lowerings()["dense"].price(each, hw).total for each in passes]
    spent = [totals[0], *(max(0.0, both - totals[0]) for both in totals[1:])]
    way = exchange.dispatch if any(exchange.dispatch.sent) else exchange.combine
    under = 0.0 if hw.device == "cpu" else way.cut(chunks)
    return sum(spent), sum(min(each, under) for each in spent)


def _passes(work: Workload) -> int:
    return 2 if work.train else 1


def _local_plan(work: Workload, hw: Hardware, exchange: Exchange, chunks: int) -> Plan:
    pool = lowerings() if mesh_of(work).P == 1 else {name: lowerings()[name] for name in ROWWISE}
    return planner.plan(_local(work, exchange, chunks), TokenRange(low=0), hw, candidates=pool)


def _local(work: Workload, exchange: Exchange, chunks: int) -> Workload:
    """One rank's experts with a row, and hence a token with K=1, for each pair that is theirs.

    With one rank: the block itself.  What a capacity drops has been dropped before the rows arrive.
    """
    P, F = mesh_of(work).P, work.F // mesh_of(work).tp_size
    if P == 1:
        return work.model_copy(update={"mesh": None, "shared": 0, "F": F, "tokens": math.ceil(work.tokens / chunks)})
    alone = {"mesh": None, "same_tokens": False, "buffer_factor": None, "capacity_factor": None, "shared": 0, "F": F}
    rows = math.ceil(exchange.busiest / chunks)
    return work.model_copy(update={**alone, "tokens": rows, "E": work.E // P, "K": 1})


def _seconds(plan: Plan, work: Workload, hw: Hardware, exchange: Exchange, chunks: int) -> float:
    """One chunk in the planned lowering, rows that pass through without being computed included.

    ``grouped`` gathers such rows, applies the activation to them and gathers them back: ``4*D + (n+1)*F`` elements.
    """
    local = plan.workload.model_copy(update={"train": work.train})
    passing = (_moved(plan, exchange) - 1.0) * exchange.busiest / chunks
    elements = (TRAIN_PASSES if work.train else 1) * passing * (4 * work.D + (work.n + 1) * local.F)
    return lowerings()[plan.lowering].price(local, hw).total + elements * work.itemsize / hw.bandwidth


def _moved(plan: Plan, exchange: Exchange) -> float:
    """Rows that pass through the lowering over those that it computes; 1 where it moves only its own."""
    if plan.lowering != "grouped" or exchange.busiest == 0:
        return 1.0
    return max(1.0, exchange.moved / exchange.busiest)


def _traffic(work: Workload, exchange: Exchange, reduces: Sequence[Way]) -> tuple[Traffic, ...]:
    levels: tuple[MeshDim, ...] = mesh_of(work).levels
    forth, *back = (sum(way.sent) for way in reduces)
    sums = [
        Traffic(dim=dim.name, link=dim.link.name, dispatch=0.0, combine=forth, backward=sum(back))
        for dim in mesh_of(work).slices
    ]
    return tuple(
        Traffic(
            dim=level.name,
            link=level.link.name,
            dispatch=there,
            combine=back,
            backward=there + back if work.train else 0.0,
        )
        for level, there, back in zip(levels, exchange.dispatch.sent, exchange.combine.sent, strict=True)
    ) + tuple(sums)


def _predicted(plan: Plan) -> Price:
    return plan.chosen.predicted or Price()


def _why(form: str, hw: Hardware, chunks: int, totals: Mapping[int, float]) -> str:
    """Why this many chunks."""
    if form == LOCAL:
        return "nothing to hide"
    if hw.device == "cpu":
        return "collectives and experts want the same cores"
    if len(totals) == 1:
        return "one token cannot be cut"
    if chunks > 1:
        return f"{chunks} chunks would save {1 - totals[chunks] / totals[1]:.0%}"
    best = min(c for c in totals if c > 1)
    gain = 1 - totals[best] / totals[1]
    told = f"would save only {gain:.0%}" if gain > 0 else f"would cost {-gain:.0%} more"
    return f"{best} chunks {told}: more latency, weights read again, smaller GEMMs"
