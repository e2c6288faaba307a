"""Which function a MoE block computes: guesses at its routing and experts, and the one that its own numbers confirm.

``search(block, guesses...)`` runs a float64 copy of the block on random tokens and looks for the one combination of

    experts   ``existing.experts.Guess``
    routing   score, order of score and top-k, norm, K, correction bias, groups, weight on the output or the input
    beside    nothing, a module of the block on the same tokens (a shared expert), or one behind a sigmoid gate

that explains its output up to a common scale.  ``Found`` is a claim, not a proof: ``existing.blocks`` builds the module
and compares gradients too.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moepass import errors, pointwise, reference
from moepass.spec import RouterSpec
from moepass.upcycle.existing import prove
from moepass.upcycle.existing.experts import Guess
from moepass.upcycle.modules import tensor_at

#: Attributes that hold K; where a block has none of them, every K up to ``MAX_K`` is tried.
TOP_K_NAMES = ("top_k", "topk", "num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_top_k",
               "moe_topk", "moe_k", "num_selected_experts", "num_activated_experts", "n_activated_experts",
               "k")  # fmt: skip
MAX_K = 16
_GROUP_NAMES = (("n_group", "topk_group"), ("num_group", "topk_group"), ("num_expert_groups", "num_limited_groups"),
                ("moe_router_num_groups", "moe_router_group_topk"))  # fmt: skip
TOKENS = 24


@dataclass(frozen=True)
class Gate:
    """Where the logits come from: ``weight [E, D]``, ``linear_bias [E]`` added to them, ``bias [E]`` for the choice."""

    weight: str
    linear_bias: str | None = None
    bias: str | None = None


@dataclass(frozen=True)
class Beside:
    """What is added to the routed output: ``shared(x)``, times ``sigmoid(gate(x))`` where there is a gate."""

    shared: str | None = None
    gate: str | None = None

    def __call__(self, block: nn.Module, x: Tensor) -> Tensor:
        """The addend, where there is one."""
        assert self.shared is not None
        y: Tensor = block.get_submodule(self.shared)(x)
        return y if self.gate is None else torch.sigmoid(block.get_submodule(self.gate)(x)) * y


@dataclass(frozen=True)
class Found:
    """One explanation of a block's output."""

    gate: Gate
    experts: Guess
    router: RouterSpec
    beside: Beside
    error: float

    @property
    def words(self) -> str:
        """The routing rule for a reader."""
        return in_words(self.router)


@torch.no_grad()
def search(block: nn.Module, gates: Sequence[Gate], guesses: Sequence[Guess], out: Tensor, x: Tensor) -> list[Found]:
    """Every explanation of ``out = block(x)`` to the best accuracy that any reaches; ``block`` a float64 copy."""
    for on in ("output", "input"):
        tables = [_table(block, gate, x, on) for gate in gates]
        found = [f for table in tables for guess in guesses for f in _explanations(block, table, guess, out, x)]
        for bound in (prove.EXACT, prove.ROUNDED):
            if fits := [each for each in found if each.error <= bound]:
                return fits
    return []


@dataclass(frozen=True)
class _Table:
    """All routing rules of a gate, applied to the probe: ``weight_HTE`` is zero where ``chosen_HTE`` is False."""

    gate: Gate
    rules: list[RouterSpec]
    weight_HTE: Tensor
    chosen_HTE: Tensor


def _table(block: nn.Module, gate: Gate, x: Tensor, on: str) -> _Table:
    weight = tensor_at(block, gate.weight)
    logits = F.linear(x, weight, None if gate.linear_bias is None else tensor_at(block, gate.linear_bias).reshape(-1))
    bias = None if gate.bias is None else tensor_at(block, gate.bias).reshape(-1)
    rules = [rule for rule in _rules(block, gate, weight.shape[0]) if rule.weight_on == on]
    weights, chosen = [], []
    for rule in rules:
        index_TK, weight_TK = reference.route(logits, rule, bias=bias)
        zeros = torch.zeros_like(logits)
        weights.append(zeros.scatter(1, index_TK, weight_TK.to(logits.dtype)))
        chosen.append(zeros.scatter(1, index_TK, 1.0))
    return _Table(gate, rules, torch.stack(weights), torch.stack(chosen).bool())


def _explanations(block: nn.Module, table: _Table, guess: Guess, out: Tensor, x: Tensor) -> Iterator[Found]:
    experts = reference.ExpertWeights(*guess.read(block))
    x_TED = x[:, None].expand(-1, guess.E, -1)
    if table.rules[0].weight_on == "output":
        y_HTD = torch.einsum("jte,ted->jtd", table.weight_HTE, _all_experts(x_TED, experts, guess.activation))
    else:
        x_RED = (table.weight_HTE[..., None] * x_TED).flatten(0, 1)
        y_HTED = _all_experts(x_RED, experts, guess.activation).unflatten(0, table.weight_HTE.shape[:2])
        y_HTD = torch.where(table.chosen_HTE[..., None], y_HTED, 0).sum(2)
    for beside in _besides(block, table.gate, guess):
        addend = _addend(beside, block, x, out)
        if addend is None:
            continue
        target = out - addend
        scale_H = (y_HTD * target).sum((1, 2)) / (y_HTD * y_HTD).sum((1, 2)).clamp(min=1e-30)
        miss_H = (scale_H[:, None, None] * y_HTD - target).abs().amax((1, 2)) / target.abs().max().clamp(min=1e-30)
        for h in torch.nonzero(miss_H <= 10 * prove.ROUNDED).flatten().tolist():
            scored = _scaled(table.rules[h], float(scale_H[h]), y_HTD[h], target)
            if scored is not None:
                yield Found(table.gate, guess, scored[0], beside, scored[1])


def _scaled(router: RouterSpec, scale: float, y: Tensor, target: Tensor) -> tuple[RouterSpec, float] | None:
    """The rule with its scale, and how well it explains the target; None where it does not."""
    if router.weight_on == "input":
        return (router, prove.relative(y, target)) if abs(scale - 1.0) < 1e-4 else None
    # A scale is a number that somebody wrote down, or a quotient of such: the short one if it explains as much.
    short = round(scale, 6)
    errors_of = {each: prove.relative(each * y, target) for each in (short, scale)}
    best = short if errors_of[short] <= max(prove.EXACT, 2 * errors_of[scale]) else scale
    if abs(best) < 1e-6 or errors_of[best] > prove.ROUNDED:
        return None
    return router.model_copy(update={"scale": best}), errors_of[best]


def _all_experts(x_TED: Tensor, w: reference.ExpertWeights, activation: str) -> Tensor:
    h = torch.einsum("ted,efd->tef", x_TED, w.w_in)
    h = pointwise.apply(activation, h if w.b_in is None else h + w.b_in)
    y = torch.einsum("tef,edf->ted", h, w.w_out)
    return y if w.b_out is None else y + w.b_out


# --- what may be ----------------------------------------------------------------------------------------------------


def _rules(block: nn.Module, gate: Gate, E: int) -> Iterator[RouterSpec]:
    """Routing rules that differ as functions: softmax over the top k is softmax over all, normalised."""
    norms: tuple[float | None, ...] = (None, 1.0, 2.0)
    for K, score, norm, groups, on in itertools.product(
        _top_ks(block, E), ("softmax", "sigmoid", "sqrtsoftplus"), norms, _groups(block, E), ("output", "input")
    ):
        if (K == 1 and norm is not None) or (K == E and score == "softmax" and norm is None) or K > E:
            continue
        try:
            yield RouterSpec(top_k=K, score=score, normalize=norm, weight_on=on, bias=gate.bias is not None,
                             linear_bias=gate.linear_bias is not None, **groups)  # fmt: skip
        except errors.MoepassError:
            continue


def _top_ks(block: nn.Module, E: int) -> list[int]:
    holders = [*block.modules(), *(m.config for m in block.modules() if hasattr(m, "config"))]
    named = {getattr(h, name, None) for h in holders for name in TOP_K_NAMES}
    known = sorted(k for k in named if isinstance(k, int) and not isinstance(k, bool) and 1 <= k <= E)
    return known or list(range(1, min(E, MAX_K) + 1))


def _groups(block: nn.Module, E: int) -> list[dict[str, object]]:
    rules: list[dict[str, object]] = [{}]
    for module in block.modules():
        for groups_name, kept_name in _GROUP_NAMES:
            groups, kept = getattr(module, groups_name, None), getattr(module, kept_name, None)
            if isinstance(groups, int) and isinstance(kept, int) and 1 <= kept < groups and E % groups == 0:
                for score in ("top2", "max"):
                    rules.append({"groups": groups, "kept_groups": kept, "group_score": score})
                return rules
    return rules


def _besides(block: nn.Module, gate: Gate, guess: Guess) -> Iterator[Beside]:
    """Nothing, or a child that owns all parameters that neither the experts nor the gate use, maybe behind another."""
    used = {*guess.names, gate.weight, gate.linear_bias, gate.bias}
    left = [name for name, _ in block.named_parameters() if name not in used]
    if not left:
        yield Beside()
        return
    children = list(dict.fromkeys(name.split(".")[0] for name in left if "." in name))
    if len(children) == 1:
        yield Beside(children[0])
    if len(children) == 2:
        yield Beside(children[0], children[1])
        yield Beside(children[1], children[0])


def _addend(beside: Beside, block: nn.Module, x: Tensor, out: Tensor) -> Tensor | None:
    """What stands beside the routed output for tokens x; None where it is no such thing."""
    if beside.shared is None:
        return torch.zeros_like(out)
    try:
        y = beside(block, x)
    except Exception:  # the child does not take tokens: then it is no shared expert
        return None
    return y if isinstance(y, Tensor) and y.shape == out.shape else None


def in_words(router: RouterSpec) -> str:
    """``softmax, top-2 of all, divided by their sum`` and the like."""
    parts = [f"{router.score}, top-{router.top_k}"]
    if router.bias:
        parts.append("chosen by scores plus a correction bias")
    if router.groups > 1:
        parts.append(f"from the best {router.kept_groups} of {router.groups} groups ({router.group_score})")
    if router.normalize == 1.0:
        parts.append("weights divided by their sum")
    elif router.normalize is not None:
        parts.append(f"weights divided by their L{router.normalize:g} norm")
    if router.scale != 1.0:
        parts.append(f"times {router.scale:g}")
    if router.weight_on == "input":
        parts.append("multiplied into the experts' input")
    if router.linear_bias:
        parts.append("with a bias on the logits")
    return ", ".join(parts)
