"""A hand-written MoE block read as one of ours: structure proposes, numbers prove.

``read_block(block)`` gives a ``Reading`` (what the block computes, and how to build the same from its tensors) or a
``Refusal``.  It works on a float64 copy whose tensors are drawn anew: a router that is still zero, a correction bias
that nobody has updated or an expert that is never chosen would let a wrong reading pass.  The reading must be the only
one that explains the copy's output, and what is built from it must give the copy's outputs and gradients for several
shapes of the input, in training mode too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moepass import errors
from moepass.nn.moe import MoE
from moepass.nn.shared import combine_shared
from moepass.spec import ExpertSpec, MoESpec
from moepass.upcycle.existing import prove
from moepass.upcycle.existing.experts import guesses, module_list, stacked
from moepass.upcycle.existing.search import TOKENS, Beside, Found, Gate, search
from moepass.upcycle.init import MoEWeights
from moepass.upcycle.modules import build_moe, is_plain, mode, tensor_at

#: Shapes of the proof, in front of D: one token, a few, two sequences.
_SHAPES = ((1, 1), (1, 7), (2, 16))


@dataclass(frozen=True)
class Refusal:
    """A reason code of ``upcycle.report.REASONS`` and what was seen."""

    code: str
    detail: str = ""


@dataclass(frozen=True)
class Form:
    """What a block takes and returns.  ``flat``: [T, D] whatever the input's shape; ``logits``: (y, logits)."""

    takes_rows: bool  # only [T, D], no [B, S, D]
    flat: bool
    logits: bool
    flat_logits: bool = True


class ExistingMoE(nn.Module):
    """A block around ``MoE`` that keeps what stood beside the experts, and the form of what is returned."""

    def __init__(self, moe: MoE, form: Form, shared: nn.Module | None, gate: nn.Module | None) -> None:
        super().__init__()
        self.moe, self.shared, self.shared_gate = moe, shared, gate
        self.flat, self.returns_logits, self.flat_logits = form.flat, form.logits, form.flat_logits

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """``[..., D] -> [..., D]``, or ``[T, D]``, and the router's logits where the block returned them."""
        y = self.moe(x)
        if self.shared is not None:
            gate = None if self.shared_gate is None else self.shared_gate(x)
            how = "sum" if gate is None else "gated"
            y = combine_shared(y, self.shared(x), how, top_k=self.moe.spec.router.top_k, gate=gate)
        D = x.shape[-1]
        if self.flat:
            y = y.reshape(-1, D)
        if not self.returns_logits:
            return y  # type: ignore[no-any-return]
        logits = self.moe.router.logits(x.reshape(-1, D)).to(x.dtype)
        return y, logits if self.flat_logits else logits.reshape(*x.shape[:-1], -1)


@dataclass(frozen=True)
class Reading:
    """What a block was proved to be.  ``error``: the largest relative difference that the proof saw."""

    found: Found
    form: Form
    error: float

    def build(self, block: nn.Module) -> nn.Module:
        """The block's replacement over the block's own tensors."""
        return _build(self.found, self.form, block)


def proposes(block: nn.Module) -> list[Gate]:
    """Where the logits of a block may come from; empty for modules that do not look like an MoE block."""
    if isinstance(block, nn.ModuleList | nn.ModuleDict | MoE):
        return []
    listed = module_list(block)
    inside = "" if listed is None else f"{listed}."
    E_listed = None if listed is None else len(list(block.get_submodule(listed).children()))
    found: list[Gate] = []
    for name, p in block.named_parameters():
        if p.dim() != 2 or (listed is not None and name.startswith(inside)) or p.shape[0] < 2:
            continue
        E, D = p.shape
        if E_listed not in (None, E) or (listed is None and len(stacked(block, E, D, name)) not in (2, 3)):
            continue
        found += _gates(block, name, E)
    return found


def _gates(block: nn.Module, weight: str, E: int) -> list[Gate]:
    owner = weight.rpartition(".")[0]
    vectors = [name for name, t in (*block.named_parameters(), *block.named_buffers())
               if t.is_floating_point() and t.numel() == E and t.dim() <= 2]  # fmt: skip
    own = f"{owner}.bias" if owner else "bias"
    linear = own if isinstance(block.get_submodule(owner), nn.Linear) and own in vectors else None
    others = [name for name in vectors if name != linear]
    gates = [Gate(weight, linear, bias) for bias in (None, *others)]
    if linear is None and not isinstance(block.get_submodule(owner), nn.Linear):
        gates += [Gate(weight, name, bias) for name in others for bias in (None, *others) if bias != name]
    return gates


def read_block(block: nn.Module) -> Reading | Refusal:
    """See the module docstring.  ``block`` is one that ``proposes`` something."""
    parameters = dict(block.named_parameters())
    if any(t.is_meta for t in parameters.values()):
        return Refusal("no_data", "nothing can be proved on the meta device")
    for name, parameter in parameters.items():
        if (code := is_plain(parameter)) is not None:
            return Refusal(code, name)
    if any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in block.modules()):
        return Refusal("has_hooks")
    for dtype in (torch.float64, torch.float32):  # grouped_mm does not take float64
        wide = _drawn_anew(prove.wide_copy(block, dtype))
        verdict = _read(wide)
        if not isinstance(verdict, Refusal) or verdict.code != "not_runnable":
            return verdict
    return verdict


def _read(wide: nn.Module) -> Reading | Refusal:
    gates = proposes(wide)
    weights = dict.fromkeys(gate.weight for gate in gates)
    seen = [_explain(wide, [g for g in gates if g.weight == w], *wide.get_parameter(w).shape) for w in weights]
    readings = [each for each in seen if not isinstance(each, Refusal)]
    if len(readings) == 1:
        return _proved(readings[0], wide)
    if readings:
        return Refusal("ambiguous_routing", " or ".join(r.found.words for r in readings))
    refusals = [each for each in seen if isinstance(each, Refusal)]
    return next((r for r in refusals if r.code != "not_reproduced"), refusals[0])


def _explain(wide: nn.Module, gates: Sequence[Gate], E: int, D: int) -> Reading | Refusal:
    like = next(wide.parameters())
    ran = _run(wide, prove.probe(2, TOKENS // 2, D, like=like).detach())
    if isinstance(ran, Refusal):
        return ran
    x, outputs, takes_rows = ran
    x_TD, y = x.reshape(-1, D), outputs[0]
    if len(outputs) > 2 or y.shape not in (x.shape, x_TD.shape):
        return Refusal("return_form", f"it returns tensors of shapes {[tuple(t.shape) for t in outputs]}")
    every = guesses(wide, E, D, gates[0].weight)
    if not every and module_list(wide, E) is not None:
        return Refusal("experts_not_understood", "its experts are modules, but not plain feed-forward blocks")
    found = search(wide, gates, every, y.detach().reshape(-1, D), x_TD)
    if not found:
        return Refusal("not_reproduced", "no known routing rule gives its output")
    best = _only(found)
    if best is None:
        return Refusal("ambiguous_routing", " or ".join(dict.fromkeys(each.words for each in found)))
    form = Form(takes_rows, y.shape != x.shape, len(outputs) == 2)
    if form.logits:
        flat = _returned_logits(best, wide, x_TD, outputs[1])
        if flat is None:
            return Refusal("return_form", "beside its output it returns a tensor that is not the router's logits")
        form = Form(takes_rows, form.flat, True, flat)
    return Reading(best, form, best.error)


def _only(found: Sequence[Found]) -> Found | None:
    """The one reading, or the first of several that say the same and differ in which strides they call it by."""
    rules = {(each.router, each.gate, each.beside, each.experts.activation, each.experts.names) for each in found}
    return min(found, key=lambda each: each.experts.copies) if len(rules) == 1 else None


def _run(wide: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor], bool] | Refusal:
    """The copy's outputs for ``[2, T/2, D]``, or for ``[T, D]`` where it takes no more."""
    before = [b.clone() for b in wide.buffers()]
    seen = []
    for tokens in (x, x.reshape(-1, x.shape[-1])):
        try:
            with torch.no_grad():
                out = wide(tokens.clone())
        except Exception as error:  # a module may refuse in any way; then the next form is tried
            seen.append(f"{type(error).__name__}: {errors.first_line(error)}")
            continue
        if any(not torch.equal(a, b) for a, b in zip(before, wide.buffers(), strict=True)):
            return Refusal("updates_buffers")
        if not isinstance(out, Tensor | tuple | list) or not prove.tensors(out):
            return Refusal("return_form", f"it returns a {type(out).__name__}")
        if isinstance(out, tuple | list) and len(prove.tensors(out)) != len(out):
            return Refusal("return_form", "it returns more than floating tensors")
        return tokens, prove.tensors(out), tokens.dim() == 2
    return Refusal("not_runnable", seen[0])


def _returned_logits(found: Found, wide: nn.Module, x_TD: Tensor, returned: Tensor) -> bool | None:
    """Whether the returned logits are flat; None where they are no logits."""
    weight = wide.get_parameter(found.gate.weight)
    bias = None if found.gate.linear_bias is None else wide.get_parameter(found.gate.linear_bias)
    logits = torch.nn.functional.linear(x_TD, weight, bias)
    if returned.numel() != logits.numel() or prove.relative(returned.reshape(logits.shape), logits) > prove.ROUNDED:
        return None
    return returned.dim() == 2


@torch.no_grad()
def _drawn_anew(wide: nn.Module) -> nn.Module:
    """Random values by shape: matrices that keep the size of what they map, small vectors."""
    generator = torch.Generator().manual_seed(2)
    for _, tensor in sorted([*wide.named_parameters(), *wide.named_buffers()], key=lambda item: item[0]):
        if tensor.is_floating_point():
            fresh = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.copy_(fresh * (tensor.shape[-1] ** -0.5 if tensor.dim() > 1 else 0.2))
    return wide


def _proved(reading: Reading, wide: nn.Module) -> Reading | Refusal:
    """The reading with the error of the whole proof."""
    D, gate = reading.found.experts.D, wide.get_parameter(reading.found.gate.weight)
    built = _build(reading.found, reading.form, wide)
    core = built if isinstance(built, MoE) else built.moe
    bound = prove.EXACT if reading.error <= prove.EXACT else prove.ROUNDED
    error = reading.error
    for training in (False, True):
        for i, shape in enumerate(_SHAPES):
            x = prove.probe(*shape, D, like=gate, seed=10 + i)
            args = (x.reshape(-1, D) if reading.form.takes_rows else x,)
            before = [b.clone() for b in wide.buffers()]
            with mode(wide, training), mode(built, training):
                theirs = prove.observe(wide, args, [x, gate])
                ours = prove.observe(built, args, [x, core.router.weight])  # type: ignore[union-attr,list-item]
            if any(not torch.equal(a, b) for a, b in zip(before, wide.buffers(), strict=True)):
                return Refusal("updates_buffers")
            error = max(error, prove.mismatch(ours, theirs))
            if error > bound:
                where = f"[{', '.join(map(str, shape))}, {D}] in {'training' if training else 'evaluation'}"
                return Refusal("differs_in_training" if training else "not_reproduced", f"by {error:.1e} on {where}")
    return Reading(reading.found, reading.form, error)


def _build(found: Found, form: Form, block: nn.Module) -> nn.Module:
    guess, gate = found.experts, found.gate
    parameters = [block.get_parameter(name) for name in guess.names]
    with torch.no_grad():
        w_in, w_out, b_in, b_out = guess.read(block)
    spec = MoESpec(
        router=found.router,
        experts=ExpertSpec(num_experts=guess.E, intermediate_size=guess.F, activation=guess.activation,
                           bias_in=b_in is not None, bias_out=b_out is not None),
    )  # fmt: skip
    router_weight = block.get_parameter(gate.weight)
    weights = MoEWeights(router_weight, _own(w_in, parameters), _own(w_out, parameters), b_in, b_out)
    moe = build_moe(weights, spec, any(p.requires_grad for p in parameters))
    if gate.linear_bias is not None:
        moe.router.linear_bias = block.get_parameter(gate.linear_bias)
    if gate.bias is not None:
        moe.router.bias = (
            tensor_at(block, gate.bias).detach().reshape(-1).to(torch.promote_types(w_in.dtype, torch.float32))
        )
    moe.train(block.training)
    if found.beside == Beside() and not form.flat and not form.logits:
        return moe
    shared, shared_gate = (
        None if n is None else block.get_submodule(n) for n in (found.beside.shared, found.beside.gate)
    )
    built = ExistingMoE(moe, form, shared, shared_gate)
    built.training = block.training
    return built


def _own(weight: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    """The block's own Parameter where the weight is just that; a view of its memory otherwise stays a view."""
    for p in parameters:
        if p.data_ptr() == weight.data_ptr() and p.shape == weight.shape and p.stride() == weight.stride():
            return p
    return weight
