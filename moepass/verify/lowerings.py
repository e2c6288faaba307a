"""Every lowering that may serve a workload, against ``reference.experts`` in float64, on the awkward inputs.

Cases (T tokens; every one with outputs and the gradients of x, the routing weights, the matrices and the biases)
    random routing     distinct random experts
    idle experts       the last experts get no token: their gradients must be zero, to the bit
    poisoned rows      pairs without an expert whose weights, and tokens without any whose values, are NaN, in memory
                       that holds NaN until it is written (``compare.poisoned_memory``)
    few tokens         T = 0 and T = 1
    over capacity      half the rows have no room, where the spec drops tokens
    two runs           the same bits twice
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moepass import pointwise, reference
from moepass.lowering.base import ExpertArgs, Lowering
from moepass.lowering.plan import Workload
from moepass.lowering.registry import lowerings
from moepass.spec import DispatchSpec, ExpertSpec, MoESpec, RouterSpec
from moepass.verify.compare import (
    TOLERANCES,
    cotangents,
    equal_bits,
    poisoned_memory,
    worst_gradient,
    worst_output,
)
from moepass.verify.report import Check, guarded

#: Tokens of a case: odd, more than the experts of most models, no multiple of any tile.
TOKENS = 37
#: Float64 weights beyond this are not worth the time: the widths are cut instead.
_MAX_BYTES = 48 << 20
_NARROW = 48


@dataclass(frozen=True)
class Case:
    """Operands of ``moepass::experts`` in the dtype under test, with the values that float64 shares."""

    name: str
    x_TD: Tensor
    index_TK: Tensor
    weight_TK: Tensor
    args: ExpertArgs

    def leaves(self) -> dict[str, Tensor]:
        """What gradients are taken of."""
        a = self.args
        named = {"x": self.x_TD, "routing weights": self.weight_TK, "w_in": a.w_in, "w_out": a.w_out}
        biases = {"b_in": a.b_in, "b_out": a.b_out}
        return named | {name: bias for name, bias in biases.items() if bias is not None}

    def to(self, dtype: torch.dtype) -> Case:
        """The same values in another dtype (the routing weights stay float32 at least), as fresh leaves."""

        def leaf(t: Tensor, dtype: torch.dtype = dtype) -> Tensor:
            return t.detach().to(dtype).requires_grad_()

        a, wide = self.args, torch.promote_types(dtype, torch.float32)
        b_in, b_out = (None if b is None else leaf(b) for b in (a.b_in, a.b_out))
        args = replace(a, w_in=leaf(a.w_in), w_out=leaf(a.w_out), b_in=b_in, b_out=b_out)
        return replace(self, x_TD=leaf(self.x_TD), weight_TK=leaf(self.weight_TK, wide), args=args)


@dataclass(frozen=True)
class Run:
    """One forward and backward: the output, and gradients by name."""

    output: Tensor
    gradients: dict[str, Tensor | None]

    def tensors(self) -> list[Tensor | None]:
        """Everything, in order."""
        return [self.output, *self.gradients.values()]


def check_lowerings(subject: str, work: Workload, activation: str) -> Iterator[Check]:
    """Checks of every registered lowering for the kind of block that ``work`` describes."""
    work = affordable(work)
    for name, lowering in lowerings().items():
        verdict = lowering.legal(work)
        if verdict.legal:
            steps = _check(f"{name} in {subject}", lowering, work, activation)
            yield from guarded(f"{name} in {subject}", "all", lambda steps=steps: steps)  # type: ignore[misc]
        else:
            yield Check.skipped(f"{name} in {subject}", "all", f"{verdict.code}: {verdict.detail}")


def affordable(work: Workload) -> Workload:
    """The workload with widths that a check can pay for; rows of a large model cost too much in float64."""
    if work.E * work.weight_elements * 8 <= _MAX_BYTES:
        return work
    return work.model_copy(update={"D": min(work.D, _NARROW), "F": min(work.F, _NARROW)})


def _check(subject: str, lowering: Lowering, work: Workload, activation: str) -> Iterator[Check]:
    dtype = getattr(torch, work.dtype)
    tolerance = TOLERANCES[dtype]
    policies = ("position", "probability") if work.capacity_factor is not None else ("position",)
    for policy in policies:
        where = subject if len(policies) == 1 else f"{subject}, {policy}"
        for case in cases(work, activation, policy):
            case = case.to(dtype)
            with poisoned_memory():
                ours, expected = run_lowering(lowering, case), run_reference(case.to(torch.float64))
            wrong = worst_output([ours.output], [expected.output])
            yield Check.within(where, f"{case.name}: output", wrong.error, tolerance.outputs, "the output")
            wrong = worst_gradient(ours.gradients, expected.gradients)
            yield Check.within(where, f"{case.name}: gradients", wrong.error, tolerance.gradients, wrong.where)
            if case.name == "idle experts":
                yield _idle_is_zero(where, ours, case)
            if case.name == "random routing":
                again = run_lowering(lowering, case)
                same = equal_bits(ours.tensors(), again.tensors())
                yield Check.holds(where, "two runs", same, "the second run gave other bits")


def _idle_is_zero(subject: str, run: Run, case: Case) -> Check:
    idle_E = torch.ones(case.args.E, dtype=torch.bool).index_fill(0, case.index_TK.flatten().unique().cpu(), False)
    left = [
        name
        for name in ("w_in", "w_out", "b_in", "b_out")
        if (g := run.gradients.get(name)) is not None and torch.count_nonzero(g.cpu()[idle_E])
    ]
    return Check.holds(subject, "idle experts: zero gradient", not left, f"experts without a token moved {left}")


def run_lowering(lowering: Lowering, case: Case) -> Run:
    """The lowering's own program."""
    return _differentiated(lowering.build(case.x_TD, case.index_TK, case.weight_TK, case.args), case)


def run_reference(case: Case) -> Run:
    """``reference.experts`` on the same operands."""
    a = case.args
    K, n = case.index_TK.shape[1], pointwise.n_inputs(a.activation)
    spec = MoESpec(
        router=RouterSpec(top_k=K, normalize=None),
        experts=ExpertSpec(
            num_experts=a.E, intermediate_size=a.w_in.shape[1] // n, activation=a.activation,
            bias_in=a.b_in is not None, bias_out=a.b_out is not None,
        ),
        dispatch=DispatchSpec(capacity_factor=a.capacity_factor, drop_policy=a.drop_policy)
        if a.capacity_factor else DispatchSpec(),
    )  # fmt: skip
    weights = reference.ExpertWeights(a.w_in, a.w_out, a.b_in, a.b_out)
    routing = reference.Routing(case.index_TK, case.weight_TK)
    return _differentiated(reference.experts(case.x_TD, routing, weights, spec), case)


def _differentiated(y_TD: Tensor, case: Case) -> Run:
    leaves, (weights,) = case.leaves(), cotangents([y_TD])
    grads = torch.autograd.grad(y_TD, list(leaves.values()), weights, allow_unused=True)
    return Run(y_TD.detach(), dict(zip(leaves, grads, strict=True)))


def cases(work: Workload, activation: str, policy: str) -> Iterator[Case]:
    """The inputs of the module docstring, in float64."""
    args = _weights(work, activation, policy)
    for name, T, experts in (
        ("random routing", TOKENS, work.E),
        ("idle experts", TOKENS, max(work.K, work.E - max(1, work.E // 4))),
        ("one token", 1, work.E),
        ("no token", 0, work.E),
    ):
        x_TD, index_TK, weight_TK = _routed(work, T, experts)
        yield Case(name, x_TD, index_TK, weight_TK, args)
    if args.capacity_factor:
        yield Case("over capacity", *_routed(work, TOKENS, work.E), replace(args, capacity_factor=0.5))
    x_TD, index_TK, weight_TK = _routed(work, TOKENS, work.E)
    gone_TK = torch.rand(index_TK.shape, generator=_seeded(5)) < 0.3
    gone_TK[::9] = True
    index_TK = torch.where(gone_TK.to(index_TK.device), work.E, index_TK).to(torch.int32)
    off_T1 = (index_TK == work.E).all(1, keepdim=True)
    yield Case(
        "poisoned rows", torch.where(off_T1, math.nan, x_TD), index_TK,
        torch.where(index_TK == work.E, math.nan, weight_TK), args,
    )  # fmt: skip


def _routed(work: Workload, T: int, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random tokens, and K distinct experts among the first ``experts`` for each, with weights in (0, 1)."""
    generator = _seeded(T)
    x_TD = torch.randn(T, work.D, generator=generator, dtype=torch.float64)
    weight_TK, index_TK = torch.rand(T, experts, generator=generator, dtype=torch.float64).topk(work.K, dim=-1)
    device = _device(work)
    return x_TD.to(device), index_TK.to(device), weight_TK.to(device)


def _weights(work: Workload, activation: str, policy: str) -> ExpertArgs:
    generator, device = _seeded(1), _device(work)

    def draw(*shape: int, scale: float) -> Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(device)

    E, D, F, rows = work.E, work.D, work.F, work.n * work.F
    return ExpertArgs(
        w_in=draw(E, rows, D, scale=D**-0.5),
        w_out=draw(E, D, F, scale=F**-0.5),
        b_in=draw(E, rows, scale=0.3) if work.bias else None,
        b_out=draw(E, D, scale=0.3) if work.bias else None,
        activation=activation,
        capacity_factor=work.capacity_factor or 0.0,
        drop_policy=policy,
    )


def _device(work: Workload) -> str:
    return "cpu" if work.device == "meta" else work.device


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


__all__ = ["TOKENS", "Case", "Run", "cases", "check_lowerings", "run_lowering", "run_reference"]
