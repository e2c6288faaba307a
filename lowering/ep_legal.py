"""Which expert-parallel form may serve a workload on its mesh, with a reason code where it may not.

``one_rank``, ``several_ranks``   the mesh has one EP rank, or more than one
``experts_not_divisible``         E/P is not a whole number
``width_not_divisible``           F/tp is not a whole number
``tokens_differ``, ``tokens_same``  the form needs tokens that are, or are not, the same on every rank
``one_level``                     two dimensions are needed
``drops_tokens``                  the form cannot apply the spec's capacity as one rank would
``not_built``                     moepass does not run it
``may_drop``                      a static buffer could overflow, and the spec keeps every assignment
"""

from __future__ import annotations

from moepass.lowering.forms import DEDUPLICATED, HIERARCHICAL, LOCAL, RAGGED, REPLICATED
from moepass.lowering.mesh import MeshSpec
from moepass.lowering.plan import Verdict, Workload

#: Reason codes of forms that have no cost on a mesh at all; the others have one in another layout of the tokens.
NO_COST = ("one_rank", "several_ranks", "experts_not_divisible", "width_not_divisible", "one_level")


def legal(form: str, work: Workload) -> Verdict:
    """May ``form`` serve ``work`` on its mesh?"""
    mesh = mesh_of(work)
    if work.F % mesh.tp_size:
        detail = f"the width F={work.F} does not divide by the {mesh.tp_size} ranks of {mesh.tp}"
        return Verdict.no("width_not_divisible", f"{detail}; choose a dimension whose size divides it")
    if form == LOCAL:
        return Verdict.yes() if mesh.P == 1 else Verdict.no("several_ranks", f"the experts lie on P={mesh.P} ranks")
    if mesh.P == 1:
        return Verdict.no("one_rank", "P=1: there is nothing to exchange")
    if not divisible(work):
        detail = f"E={work.E} experts do not divide by P={mesh.P} ranks; choose EP dimensions whose product divides E"
        return Verdict.no("experts_not_divisible", detail)
    if form in (HIERARCHICAL, DEDUPLICATED) and len(mesh.levels) < 2:
        return Verdict.no("one_level", "the experts lie along one dimension of more than one rank; two are needed")
    if form == REPLICATED and not work.same_tokens:
        return Verdict.no("tokens_differ", f"every rank has its own tokens; priced as if all held {tokens(work):,}")
    if form != REPLICATED and work.same_tokens:
        return Verdict.no("tokens_same", "every rank holds the same tokens; priced as if they were split over ranks")
    if form == HIERARCHICAL and work.capacity_factor is not None:
        return Verdict.no("drops_tokens", "a capacity counts rows in the ranks' order, which two steps do not keep")
    if form == DEDUPLICATED:
        return Verdict.no("not_built", "moepass does not run it; priced for what it would save")
    if form == RAGGED and work.capacity_factor is None and factor(work) < worst_factor(work):
        detail = f"a buffer of {factor(work):g} times the mean rows can overflow; never with {worst_factor(work):g}"
        return Verdict.no("may_drop", f"{detail}, and the spec keeps every assignment")
    return Verdict.yes()


def divisible(work: Workload) -> bool:
    """Whether every rank gets the same number of experts, at least one."""
    return work.E % mesh_of(work).P == 0


def tokens(work: Workload) -> int:
    """N: the distinct tokens of all EP ranks."""
    return work.tokens if work.same_tokens else work.tokens * mesh_of(work).P


def worst_factor(work: Workload) -> float:
    """The buffer that never overflows, over the mean rows: min(P, E/K), as at most min(K, E/P) of a token's rows meet.

    Source: MaxText (reference/moe-systems.md 4.6).
    """
    return min(float(mesh_of(work).P), work.E / work.K)


def factor(work: Workload) -> float:
    """The static buffer's size over the mean rows; at most what never overflows."""
    worst = worst_factor(work)
    return worst if work.buffer_factor is None else min(work.buffer_factor, worst)


def mesh_of(work: Workload) -> MeshSpec:
    """The workload's mesh.  Raises ``ValueError`` where it has none: a mistake of the caller, not of the user."""
    if work.mesh is None:
        raise ValueError("the workload has no mesh; lowering.ep_plan.on_mesh gives it one")
    return work.mesh
