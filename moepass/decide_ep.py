"""Expert parallelism in a graph: what is reported of its blocks, and that all ranks compile the same.

Contract
    The form was chosen before the graph existed (``moepass.parallelize``), from facts that are equal on all ranks: a
    choice by this rank's T could differ from another's, and the collectives would not meet.  So the op stays in the
    graph; AOTAutograd decomposes it into the form's collectives and the local experts.
    ``same_on_all_ranks`` is collective, once for each process group: at the first compile of a graph that uses it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from moepass import _compat, errors, pointwise
from moepass.decide import Left, Situation
from moepass.explain.report import SitePlan
from moepass.graph.names import parameter_fqn, site_id
from moepass.graph.semantic import SemanticExperts
from moepass.lowering.plan import Workload
from moepass.parallel.agreement import compare


@dataclass(frozen=True)
class Parallel:
    """A block whose experts live on several ranks.  ``workload`` has this rank's T and its E/P experts."""

    id: str
    form: str
    ranks: int
    groups: tuple[str, ...]
    workload: Workload
    activation: str
    buffer_factor: float
    tokens: int

    def report(self) -> SitePlan:
        """The line in the plan report."""
        buffer = f", buffer_factor={self.buffer_factor:g}" if self.buffer_factor else ""
        hint = f"expert parallel over {self.ranks} ranks: {self.form}{buffer}; E is this rank's"
        return SitePlan(
            id=self.id, kind="moe", status="lowered", lowering=self.form, workload=self.workload,
            activation=self.activation, hint=hint,
        )  # fmt: skip

    def facts(self) -> dict[str, str]:
        """What must be equal on all ranks of its groups."""
        work = self.workload.model_dump(exclude={"tokens", "routing"})
        said: dict[str, Any] = {"form": self.form, "buffer_factor": self.buffer_factor, "tokens": self.tokens, **work}
        return {f"{self.id}.{name}": str(value) for name, value in (said | {"activation": self.activation}).items()}


def decide_parallel(site: SemanticExperts, index: int, where: Situation) -> Parallel | Left:
    """What becomes of one ``moepass::experts_ep`` node."""
    name = _name(site, where) or f"moe_ep_{index}"
    given = site.operands
    scalars = ("dropout", "capacity_factor", "buffer_factor")
    if any(not isinstance(given[scalar], int | float) for scalar in scalars):
        return Left(name, "moe", "symbolic_scalar", "a float argument is symbolic; Dynamo will trace again", "fallback")
    w_in, K, activation = site.tensor("w_in"), site.tensor("index_TK").shape[1], given["activation"]
    n = pointwise.n_inputs(activation)
    work = Workload(
        tokens=_compat.size_hint(site.tensor("x_TD").shape[0]) or 0,
        D=int(w_in.shape[2]), F=int(w_in.shape[1]) // n, E=int(w_in.shape[0]), K=int(K), n=n,
        dtype=str(site.dtype).removeprefix("torch."), device=w_in.device.type, train=where.train,
        bias=given["b_in"] is not None or given["b_out"] is not None,
        activation_flops=pointwise.flops_per_element(activation),
        capacity_factor=given["capacity_factor"] or None,
    )  # fmt: skip
    groups = tuple(given["groups"])
    ranks = 1
    for group in groups:
        ranks *= _compat.group_size_and_rank(group)[0]
    return Parallel(name, given["form"], ranks, groups, work, activation, given["buffer_factor"], given["tokens"])


def _name(site: SemanticExperts, where: Situation) -> str | None:
    """The module that holds the weights; a DTensor's local part is made of the parameter by one call."""
    capture, names = where.capture, []
    for operand in (site.operands["w_in"], site.operands["w_out"]):
        for chain in capture.chains(site.path)[:1]:
            node = capture.outer(site.path, chain, operand)
            if node.op == "call_method" and node.target == "to_local":
                node = node.args[0]  # type: ignore[assignment]
            names.append(parameter_fqn(node))
    return site_id([n for n in names if n]) if any(names) else None


#: Groups whose ranks have been compared and agree; a process compares once.
_compared: set[tuple[str, ...]] = set()


def same_on_all_ranks(blocks: Iterable[Parallel], shared: Mapping[str, str]) -> None:
    """Raise ``RanksDiffer`` where ranks compile different plans, options or sources; on all ranks, naming them."""
    by_groups: dict[tuple[str, ...], list[Parallel]] = {}
    for block in blocks:
        by_groups.setdefault(block.groups, []).append(block)
    for groups, members in sorted(by_groups.items()):
        if groups in _compared:
            continue
        said = dict(shared)
        for block in members:
            said |= block.facts()
        if differences := compare(_compat.everyones(said, groups)):
            raise errors.RanksDiffer(differences="; ".join(differences[:8]))
        _compared.add(groups)
