"""Experts of transformers that have no experts interface: small modules that take their places.

Each adapter keeps the routers and shared experts it finds, under their names, and computes the routed experts by
``moepass::experts``.  The class's path says which adapter to try; numbers decide whether it stays (``prove``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import moepass.ops
from moepass import reference
from moepass.nn.shared import summed_rows, weighed_rows
from moepass.upcycle.existing import prove
from moepass.upcycle.existing.activation import Activation, read_activation

_TOKENS = 9


@dataclass(frozen=True)
class Adapted:
    """What an adapter made: the module, and in words how it routes and what became of the weights."""

    module: nn.Module
    routing: str
    weights: str
    E: int
    K: int | None
    D: int
    F: int
    activation: str
    error: float = 0.0  # the largest relative difference that the proof saw


def has_adapter(module: nn.Module) -> bool:
    """Whether the class of a module is known here."""
    return any(_is_a(module, path) for path in _MAKERS)


def adapt(module: nn.Module) -> Adapted | str:
    """The adapter of a module that has one, proved; the reason if it does not compute what the module computes."""
    make = next(make for path, make in _MAKERS.items() if _is_a(module, path))
    first = next(module.parameters())
    if first.is_meta:
        return "it is on the meta device, where nothing can be proved; load the weights first"
    made = make(module)
    if isinstance(made, str):
        return made
    again = make(wide := prove.wide_copy(module))
    if isinstance(again, str):
        return again
    args, wrt = _PROBES[type(made.module)](wide, made, next(wide.parameters()))
    error = prove.mismatch(prove.observe(again.module.eval(), args, wrt), prove.observe(wide, args, wrt))
    if error > prove.ROUNDED:
        return f"the adapter for its class differs from it by {error:.1e}; its class has changed"
    made.module.training = module.training
    return replace(made, error=error)


def _is_a(module: nn.Module, path: str) -> bool:
    return any(f"{cls.__module__}.{cls.__qualname__}" == path for cls in type(module).__mro__)


def _two_halves(act: Callable[[Tensor], Tensor], F: int) -> Activation | str:
    """The activation of experts that gate by the first half."""
    return read_activation(lambda h: act(h[:, :F]) * h[:, F:], 2 * F)


# --- DBRX: w1, v1, w2 stacked to [E*F, D] ----------------------------------------------------------------------------


class DbrxExperts(nn.Module):
    """``experts(hidden_states [..., D], index [T, K], weight [T, K])``; ``w_in`` is w1 and v1 stacked, w_out is w2."""

    def __init__(self, w_in: nn.Parameter, w_out: nn.Parameter, activation: str) -> None:
        super().__init__()
        self.w_in, self.w_out, self.activation = w_in, w_out, activation

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sum of each token's experts, in the shape of ``hidden_states``."""
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        y_TD = moepass.ops.experts(
            x_TD,
            top_k_index,
            top_k_weights.to(reference.wide(top_k_weights.dtype)),
            self.w_in,
            self.w_out.transpose(1, 2),
            activation=self.activation,
        )
        return y_TD.reshape(hidden_states.shape).to(hidden_states.dtype)


def _dbrx(module: Any) -> Adapted | str:
    glu = module.mlp
    E, F, D = glu.moe_num_experts, glu.ffn_hidden_size, glu.hidden_size
    activation = _two_halves(glu.activation_fn, F)
    if isinstance(activation, str):
        return activation
    stacked = [glu.get_parameter(name) for name in ("w1", "v1", "w2")]
    w1, v1, w2 = (p.detach().view(E, F, D) for p in stacked)
    learns = any(p.requires_grad for p in stacked)
    w_in = nn.Parameter(torch.cat([w1, v1], dim=1), requires_grad=learns)
    experts = DbrxExperts(w_in, nn.Parameter(w2, requires_grad=learns), activation.text)
    return Adapted(experts, "its own router", "w1 and v1 copied into w_in, w2 in place", E, None, D, F, activation.text)


def _dbrx_probe(_: nn.Module, made: Adapted, like: Tensor) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    x = prove.probe(1, _TOKENS, made.D, like=like)
    weight, index = prove.probe(_TOKENS, made.E, like=like, seed=1).detach().topk(min(2, made.E))
    weight.requires_grad_()
    return (x, index, weight), [x, weight]


# --- Llama 4: sigmoid weights on the experts' inputs -----------------------------------------------------------------


class Llama4Moe(nn.Module):
    """The block of Llama 4: every chosen pair is a row of its own, multiplied by its weight before the expert."""

    router: nn.Module
    experts: Any
    shared_expert: nn.Module

    def __init__(self, block: Any, activation: str) -> None:
        super().__init__()
        self.router, self.experts, self.shared_expert = block.router, block.experts, block.shared_expert
        self.top_k, self.activation = block.top_k, activation

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """``(y [T, D], router_logits [T, E])``."""
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        scores_TE, logits_TE = self.router(x_TD)  # zero, without a gradient, where an expert is not chosen
        weight_TK, index_TK = torch.topk(scores_TE, self.top_k, dim=-1)
        x_RD, index_R1 = weighed_rows(x_TD, weight_TK), index_TK.reshape(-1, 1)
        ones_R1 = torch.ones_like(index_R1, dtype=torch.float32)
        w_in, w_out = self.experts.gate_up_proj.transpose(1, 2), self.experts.down_proj.transpose(1, 2)
        y_RD = moepass.ops.experts(x_RD, index_R1, ones_R1, w_in, w_out, activation=self.activation)
        return self.shared_expert(x_TD) + summed_rows(y_RD, self.top_k), logits_TE


def _llama4(block: Any) -> Adapted | str:
    E, D, rows = block.experts.gate_up_proj.shape
    activation = _two_halves(block.experts.act_fn, rows // 2)
    if isinstance(activation, str):
        return activation
    routing = f"top-{block.top_k} of the logits, then sigmoid, on the experts' input"
    moe = Llama4Moe(block, activation.text)
    return Adapted(moe, routing, "in place", E, block.top_k, D, rows // 2, activation.text)


# --- JetMoE: two stacked linear maps and a bias on the sum -----------------------------------------------------------


class JetMoeMoE(nn.Module):
    """The feed-forward block of JetMoE without its loop over sorted slices, which needs their lengths on the host."""

    router: Any
    input_linear: Any
    output_linear: Any
    bias: Tensor

    def __init__(self, block: Any, activation: str) -> None:
        super().__init__()
        self.input_linear, self.output_linear = block.input_linear, block.output_linear
        self.router, self.bias, self.activation = block.router, block.bias, activation

    def forward(self, layer_input: Tensor) -> Tensor:
        """``[..., D] -> [..., D]``."""
        x_TD = layer_input.reshape(-1, layer_input.shape[-1])
        # The router counts tokens on the host: it is called as a whole only where somebody listens to what it returns.
        heard = len(self.router._forward_hooks) > 0
        logits_TE = self.router(x_TD)[4] if heard else self.router.layer(x_TD).float()
        top_TK, index_TK = torch.topk(logits_TE, self.router.top_k, dim=-1)
        weight_TK = torch.softmax(top_TK, dim=-1).type_as(x_TD)
        w_in, w_out = self.input_linear.weight, self.output_linear.weight
        y_TD = moepass.ops.experts(
            x_TD, index_TK, weight_TK.to(reference.wide(weight_TK.dtype)), w_in, w_out, activation=self.activation
        )
        return y_TD.reshape(layer_input.shape).to(layer_input.dtype) + self.bias


def _jetmoe(block: Any) -> Adapted | str:
    E, rows, D = block.input_linear.weight.shape
    activation = _two_halves(block.activation, rows // 2)
    if isinstance(activation, str):
        return activation
    K = block.router.top_k
    routing = f"top-{K} of the logits, then softmax"
    moe = JetMoeMoE(block, activation.text)
    return Adapted(moe, routing, "in place", E, K, D, rows // 2, activation.text)


def _block_probe(wide: nn.Module, made: Adapted, like: Tensor) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """Blocks are compared with their parameters' gradients: both hold the same ones."""
    x = prove.probe(1, _TOKENS, made.D, like=like)
    return (x,), [x, *wide.parameters()]


_MAKERS: dict[str, Callable[[nn.Module], Adapted | str]] = {
    "transformers.models.dbrx.modeling_dbrx.DbrxExperts": _dbrx,
    "transformers.models.llama4.modeling_llama4.Llama4TextMoe": _llama4,
    "transformers.models.jetmoe.modeling_jetmoe.JetMoeMoE": _jetmoe,
}
_PROBES = {DbrxExperts: _dbrx_probe, Llama4Moe: _block_probe, JetMoeMoE: _block_probe}
