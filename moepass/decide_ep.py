"""Expert parallelism in a graph: what is reported of its blocks, and that all ranks compile the same.

Contract
    The form was chosen before the graph existed (``moepass.parallelize``), from facts that are equal on all ranks: a
    choice by this rank's T could differ from another's, and the collectives would not meet.  So the op stays in the
    graph; AOTAutograd decomposes it into the form's collectives and the local experts.
    ``same_on_all_ranks`` is collective, once for each process group: at the first compile of a graph that uses it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from moepass import _compat, errors, workloads
from moepass.decide import Left, Situation
from moepass.explain.report import SitePlan
from moepass.graph import values
from moepass.graph.names import parameter_fqn, site_id
from moepass.graph.semantic import SemanticExperts
from moepass.lowering.forms import LOCAL
from moepass.lowering.plan import Workload
from moepass.parallel.agreement import compare


@dataclass(frozen=True)
class Parallel:
    """A block whose experts live on several ranks.  ``workload`` has this rank's T, its E/P experts and its F/tp.

    ``slices``  the ranks of tensor parallelism, ``shared`` the width of the shared expert; 0 where there is none
    """

    id: str
    form: str
    ranks: int
    groups: tuple[str, ...]
    workload: Workload
    activation: str
    buffer_factor: float
    tokens: int
    chunks: int
    slices: int
    shared: int

    def report(self) -> SitePlan:
        """The line in the plan report."""
        buffer = f", buffer_factor={self.buffer_factor:g}" if self.buffer_factor else ""
        where = f"expert parallel over {self.ranks} ranks: {self.form}{buffer}" if self.form != LOCAL else LOCAL
        where += f" in {self.chunks} chunks" if self.chunks > 1 else ""
        where += f", beside a shared expert of width {self.shared}" if self.shared else ""
        parts = ["E is this rank's"] if self.form != LOCAL else []
        parts += [f"F is this rank's part of {self.slices} ranks' (tensor parallel)"] if self.slices > 1 else []
        hint = "; ".join([where, *parts])
        return SitePlan(
            id=self.id, kind="moe", status="lowered", lowering=self.form, workload=self.workload,
            activation=self.activation, hint=hint,
        )  # fmt: skip

    def facts(self) -> dict[str, str]:
        """What must be equal on all ranks of its groups."""
        work = self.workload.model_dump(exclude={"tokens", "routing"})
        said: dict[str, Any] = {"form": self.form, "buffer_factor": self.buffer_factor, "tokens": self.tokens,
                                "chunks": self.chunks, "tp": self.slices, "shared": self.shared, **work}  # fmt: skip
        return {f"{self.id}.{name}": str(value) for name, value in (said | {"activation": self.activation}).items()}


def decide_parallel(site: SemanticExperts, index: int, where: Situation) -> Parallel | Left:
    """What becomes of one ``moepass::experts_ep`` node."""
    name = _name(site, where) or f"moe_ep_{index}"
    given = site.operands
    scalars = ("dropout", "capacity_factor", "buffer_factor")
    if any(not isinstance(given[scalar], int | float) for scalar in scalars):
        return Left(name, "moe", "symbolic_scalar", "a float argument is symbolic; Dynamo will trace again", "fallback")
    shared = given["shared"]
    return Parallel(
        id=name, form=given["form"], ranks=_ranks(given["groups"]), groups=(*given["groups"], *given["tp"]),
        workload=workloads.semantic(site, train=where.train)[0], activation=given["activation"],
        buffer_factor=given["buffer_factor"], tokens=given["tokens"], chunks=given["chunks"],
        slices=_ranks(given["tp"]),
        shared=_width(shared[2]) if shared else 0,
    )  # fmt: skip


def _width(w_out: Node) -> int:
    """Of the shared expert."""
    held = values.tensor(w_out)
    return 0 if held is None else int(held.shape[1])


def _ranks(groups: Iterable[str]) -> int:
    return math.prod(_compat.group_size_and_rank(group)[0] for group in groups)


def _name(site: SemanticExperts, where: Situation) -> str | None:
    """The module that holds the weights; a DTensor's local part is made of the parameter by one call."""
    capture, names = where.capture, []
    for operand in (site.operands["w_in"], site.operands["w_out"]):
        for chain in capture.chains(site.path)[:1]:
            node = capture.outer(site.path, chain, operand)
            while node.op == "call_method" and node.target in ("to_local", "flatten"):
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
