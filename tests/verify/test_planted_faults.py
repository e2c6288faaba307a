"""Every fault that a MoE compiler is known for, planted in the real code: ``moepass.verify`` fails and names the check.

The sound models of ``test_verify.py`` pass the same checks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import faults_planted
import pytest
import torch
from tiny import D, Net, fresh  # noqa: F401 -- fresh is a fixture
from torch import nn

import moepass
from moepass import attach, ops, reference
from moepass.kernels import grouped_linear, rows, sorting
from moepass.kernels.cpu import grouped as own
from moepass.lowering import base, capacity
from moepass.nn import metrics, moe, router
from moepass.spec import DispatchSpec, ExpertSpec, LossSpec, MoESpec, RouterSpec
from moepass.upcycle import init
from moepass.verify import models
from moepass.verify.report import VerifyReport


def block(capacity_factor: float | None = None) -> tuple[nn.Module, torch.Tensor]:
    """A small model with a block of ours: biases, an attached loss, a few tokens."""
    spec = MoESpec(
        router=RouterSpec(top_k=2),
        experts=ExpertSpec(num_experts=4, intermediate_size=6, activation="swiglu", bias_in=True, bias_out=True),
        dispatch=DispatchSpec(capacity_factor=capacity_factor),
        losses=LossSpec(load_balance="hf"),
    )
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), spec.build(8)), torch.randn(2, 6, 8)


def dense() -> tuple[nn.Module, torch.Tensor]:
    """A small dense model for the one-line form."""
    torch.manual_seed(0)
    return Net(1), torch.randn(20, D)


@dataclass(frozen=True)
class Fault:
    """``old`` becomes ``new`` in ``function``; ``model`` shows it, and the check ``(subject, name)`` is named."""

    function: Callable[..., Any]
    old: str
    new: str
    model: Callable[[], tuple[nn.Module, torch.Tensor]]
    subject: str
    name: str
    words: str = ""
    train: bool = False


FAULTS = {
    "detached routing weights, in the module": Fault(
        router.Router._weighed, "weigh(value_TE, index_TK, self.rule)", "weigh(value_TE, index_TK, self.rule).detach()",
        block, "1", "reference: gradients", "router.weight",
    ),
    "detached routing weights, in the definition itself": Fault(
        reference.weigh_all, "value_TK = value_TE.gather(1, index_TK)",
        "value_TK = value_TE.gather(1, index_TK).detach()", block, "1", "finite differences", "router.weight",
    ),
    "detached routing weights, in the op of the one-line form": Fault(
        ops._route, "return reference.route(logits_TE, spec)",
        "return tuple(t.detach() for t in reference.route(logits_TE, spec))",
        dense, "compiled", "gradients", "layers.0.router.weight",
    ),
    "detached routing weights, in the combine": Fault(
        rows._Combine.backward, "(grad_T1D * y_TKD).sum(-1) if needs_weight else None", "None",
        block, "grouped in 1", "random routing: gradients", "routing weights",
    ),
    "dropped auxiliary loss": Fault(
        moe.MoE.forward, "losses.attach_loss(y, functools.reduce(torch.add, found.values()))", "y",
        block, "1", "attached losses", "load_balance", train=True,
    ),
    "stale weights after an in-place update": Fault(
        attach.Attached.sync, "elif self.stamp != (stamp := _stamp(dense)):", "elif (stamp := None) is not None:",
        dense, "in-place update: dense function", "outputs", "output 0", train=True,
    ),
    "stale weights after an optimizer step": Fault(
        attach.Attached.operands, "moe.w_in,",
        "moe.w_in.detach() * 0 + moe.__dict__.setdefault('_old', moe.w_in.detach().clone()) "
        "+ (moe.w_in - moe.w_in.detach()),",
        dense, "second step", "outputs", train=True,
    ),
    "bias on padding rows": Fault(
        capacity.FixedCapacity.build, "row_S, valid=kept_R, back_valid=filled_S)", "row_S, valid=kept_R)",
        lambda: block(1.0), "capacity in 1, position", "random routing: gradients", "b_",
    ),
    "uninitialised tail rows": Fault(
        grouped_linear._linear_loop, "y[groups[-1].plain.stop if groups else 0 :].zero_()", "pass",
        block, "grouped in 1", "poisoned rows: output",
    ),
    "uninitialised gradients of idle experts": Fault(
        grouped_linear._outer_loop, "dw_END[expert].zero_()", "pass",
        block, "grouped in 1", "idle experts: gradients", "gradient of w_",
    ),
    "unstable sort of rows": Fault(
        sorting._sort_by_expert, "E, expert_R), stable=True)",
        "E, expert_R).flip(0), stable=True); order_R = expert_R.numel() - 1 - order_R",
        block, "stable sorts", "rows of an expert",
    ),
    "unstable order of routing ties": Fault(
        reference._stable_order, "return torch.sort(values, dim=-1, descending=True, stable=True).indices",
        "return values.shape[-1] - 1 - torch.sort(values.flip(-1), dim=-1, descending=True, stable=True).indices",
        block, "stable sorts", "routing: ties",
    ),
    "unstable ranks over capacity": Fault(
        sorting.rank_in_group, "order_R = torch.argsort(key_R, stable=True)",
        "order_R = key_R.numel() - 1 - torch.argsort(key_R.flip(0), stable=True)",
        lambda: block(1.0), "capacity in 1, position", "over capacity: output",
    ),
    "a metric counted twice under recompute": Fault(
        metrics.Recorder.forward, "self.tokens_per_expert.copy_(count_E)", "self.tokens_per_expert.add_(count_E)",
        block, "1", "recompute: metrics", "tokens_per_expert", train=True,
    ),
    "wrong scale of virtual groups": Fault(
        init.initialise, "verdict.scale, init", "1.0, init",
        dense, "compiled: dense function", "outputs", "output 0",
    ),
    "swapped gate and up, when weights are made": Fault(
        attach.make_weights, "zip(recipe.ups, dense.ups, strict=True)",
        "zip(recipe.ups[::-1], dense.ups[::-1], strict=True)", dense, "compiled: dense function", "outputs",
    ),
    "swapped gate and up, in the lowerings": Fault(
        base.activate, "args.activation, h, dim", "args.activation, h.roll(h.shape[dim] // 2, dim), dim",
        block, "dense in 1", "random routing: output",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_verify_fails_and_names_the_check(fault: Fault, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(models, "_others", lambda plan: [])  # whole models under every lowering: test_verify.py
    monkeypatch.setattr(own, "takes", lambda dtype: False)  # the products that can be tampered with are in Python
    faults_planted.plant(monkeypatch, fault.function, fault.old, fault.new)
    model, x = fault.model()
    report: VerifyReport = moepass.verify(model, x, train=fault.train)
    assert not report.ok
    found = {(c.subject, c.name): c for c in report.failures}
    assert (fault.subject, fault.name) in found, report.to_text()
    assert fault.words in found[fault.subject, fault.name].detail


@pytest.mark.parametrize("model", [block, lambda: block(1.0), dense], ids=["block", "capacity", "dense"])
def test_without_a_fault_the_same_models_pass(model: Callable[[], tuple[nn.Module, torch.Tensor]]):
    report = moepass.verify(*model())
    assert report.ok, report.to_text()
