"""Frozen values of expert-parallel planning: the forms, their prices, and the choice among them.

``local``         one rank holds all experts: no collective
``replicated``    every rank holds the same tokens; its own experts' share of the output; all-reduce
``all_gather``    all-gather of tokens and routing, own experts, reduce-scatter (MaxText's ring of experts)
``all_to_all``    each routed row goes to the rank of its expert and comes back; exact splits, read by the host
``ragged``        the same with static buffers of ``buffer_factor`` times the mean rows: no host read; may drop rows
``hierarchical``  two levels: rows first to the node of their expert, then to its rank: fewer, larger messages
``deduplicated``  the same, but a token crosses once to each distinct node (DeepEP): not built, priced as a what-if

Times are seconds, sizes are bytes; volumes are of one rank, one block, in one direction (it receives as much).
"""

from __future__ import annotations

from pydantic import Field

from moepass.frozen import Frozen
from moepass.lowering.plan import Plan, TokenRange, Workload

LOCAL, REPLICATED, ALL_GATHER, ALL_TO_ALL, RAGGED, HIERARCHICAL, DEDUPLICATED = (
    "local",
    "replicated",
    "all_gather",
    "all_to_all",
    "ragged",
    "hierarchical",
    "deduplicated",
)
#: In the order in which ties are decided.
FORMS = (LOCAL, REPLICATED, ALL_GATHER, ALL_TO_ALL, RAGGED, HIERARCHICAL, DEDUPLICATED)


class Traffic(Frozen):
    """Bytes that a rank sends over one dimension of the mesh, on average over ranks.

    ``dispatch``  towards the experts and ``combine`` back, forward; ``backward``: both ways of the backward pass
    """

    dim: str
    link: str
    dispatch: float
    combine: float
    backward: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return self.dispatch + self.combine + self.backward


class Overlap(Frozen):
    """The tokens cut into chunks, so that collectives and experts work at the same time (``parallelize(chunks=...)``).

    ``chunks``  1 where cutting does not pay, for the ``reason``; ``total`` the block's seconds then, ``hidden`` the
    communication behind the experts' work
    """

    chunks: int = Field(ge=1)
    total: float
    hidden: float
    reason: str


class FormPrice(Frozen):
    """What one block costs in one form on the busiest rank: forward, or forward and backward where the workload trains.

    ``total``          seconds of the block: compute + communication + overhead, one after the other, and what a shared
                       expert takes beyond the dispatch that it runs under: ``shared - hidden``
    ``compute``        the experts of the busiest rank, by the ``lowering`` that the planner chose for them
    ``communication``  the collectives, of which ``latency`` does not depend on the bytes
    ``overhead``       permutes beside those of the lowering, and what the host waits for
    ``overlap``        what cutting the tokens into chunks hides; ``total`` is without
    ``shared``         seconds of the shared expert, of which ``hidden`` under the dispatch; 0 where there is none
    ``rows``           mean rows that a rank's experts compute; ``busiest``: of the busiest rank
    ``buffer_bytes``   communication buffers alive at once; ``saved_bytes``: kept for backward;
    ``weight_bytes``   this block's experts on one rank
    """

    total: float
    compute: float
    communication: float
    latency: float
    overhead: float
    overlap: Overlap
    rows: float
    busiest: float
    lowering: str
    traffic: tuple[Traffic, ...]
    buffer_bytes: float
    saved_bytes: float
    weight_bytes: float
    shared: float = 0.0
    hidden: float = 0.0


class FormOption(Frozen):
    """One form that was considered.  An illegal one has a price too, where its cost is defined."""

    form: str
    legal: bool
    reason: str | None = None
    detail: str | None = None
    predicted: FormPrice | None = None


class FormPlan(Frozen):
    """The form for one block over one range of T.

    ``form``     None where no form is legal
    ``options``  best first, illegal last
    ``local``    the plan of one rank's own experts in the chosen form: its workload has a row for every routed pair
    """

    form: str | None
    tokens: TokenRange
    workload: Workload
    options: tuple[FormOption, ...]
    local: Plan | None
    hardware: str

    @property
    def chosen(self) -> FormOption | None:
        """The option that was chosen."""
        return next((option for option in self.options if option.form == self.form), None)
