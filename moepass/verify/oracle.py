"""The reference side: a copy of the model that runs nothing of ours but ``moepass.reference``.

Contract
    in    any module; blocks of ours (``nn.MoE``) and blocks of other libraries
    out   a copy in float64 (or in its own dtype) whose ``nn.MoE`` blocks call ``reference.moe`` and hand their losses
          to a list instead of hanging them on their output, and whose transformers experts run transformers' own loop
    The routing is the reference's in both; ``verify.blocks`` checks its derivative by finite differences.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moepass import reference
from moepass.nn import losses
from moepass.nn.moe import MoE
from moepass.spec import MoESpec


def moe_blocks(model: nn.Module) -> dict[str, MoE]:
    """The blocks of ours by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MoE)}


def random_in_training(spec: MoESpec) -> bool:
    """Whether two forwards of a training block may differ by design: then it is verified in evaluation mode."""
    return spec.experts.dropout > 0 or spec.router.jitter > 0


def random_always(spec: MoESpec) -> bool:
    """Whether the block draws its experts: nothing can be compared."""
    return spec.router.assignment in ("random", "balanced")


def set_modes(model: nn.Module) -> None:
    """Evaluation mode, except in blocks of ours without randomness: their losses exist in training only."""
    model.eval()
    for block in moe_blocks(model).values():
        block.train(not random_in_training(block.spec))


def reference_copy(model: nn.Module, dtype: torch.dtype | None) -> tuple[nn.Module, list[Tensor]]:
    """The copy, floating tensors in ``dtype`` (None: as they are), and the list its blocks add their losses to."""
    copied: Any = copy.deepcopy(model)
    sink: list[Tensor] = []
    if dtype is not None:
        copied.to(dtype)
    if hasattr(copied, "set_experts_implementation"):
        copied.set_experts_implementation("eager")
    set_modes(copied)
    for block in moe_blocks(copied).values():
        block.forward = functools.partial(reference_forward, block, sink)  # type: ignore[method-assign]
    return copied, sink


def reference_forward(
    block: MoE,
    sink: list[Tensor],
    x: Tensor,
    mask: Tensor | None = None,
    *,
    loss_div_factor: Tensor | float | None = None,
    return_losses: bool = False,
) -> Any:
    """``nn.MoE.forward`` by its definition; attached losses go to ``sink``."""
    spec, sequences = block.spec, _sequences(x)
    x_TD = x.reshape(-1, x.shape[-1])
    wide = reference.wide(x.dtype)
    bias = block.router.linear_bias
    clean_TD = x_TD if mask is None else torch.where(mask.reshape(-1, 1).bool(), x_TD, 0)
    logits_TE = F.linear(clean_TD.to(wide), block.router.weight.to(wide), None if bias is None else bias.to(wide))
    y = reference.moe(x, logits_TE, _weights(block), spec, _extras(block, mask, sequences)).reshape(x.shape)
    found = block_losses(block, logits_TE, mask, sequences, loss_div_factor)
    if return_losses:
        return y, found
    if spec.losses.attach and block.training:
        sink.extend(found.values())
    return y


def block_losses(
    block: MoE,
    logits_TE: Tensor,
    mask: Tensor | None,
    sequences: tuple[int, int],
    loss_div_factor: Tensor | float | None = None,
) -> dict[str, Tensor]:
    """The losses that a block's spec asks for, from its logits, coefficients included."""
    spec, router = block.spec.losses, block.spec.router
    found: dict[str, Tensor] = {}
    convention = spec.load_balance
    if convention is not None and spec.load_balance_weight > 0:
        P_TE = losses.balance_scores(logits_TE, convention, router, bias_E=block.router.bias)
        chosen_TK = reference.choose(reference.choice_values(logits_TE, router), router, bias=block.router.bias)
        if router.assignment == "uniform":
            chosen_TK = torch.arange(chosen_TK.numel(), device=chosen_TK.device).view_as(chosen_TK) % P_TE.shape[1]
        index_TK = losses.balance_index(P_TE, chosen_TK, convention, router)
        value = losses.load_balancing_loss(
            P_TE, index_TK, convention, sequences=sequences, mask=mask, loss_div_factor=loss_div_factor
        )
        found["load_balance"] = spec.load_balance_weight * value
    if spec.z_weight > 0:
        way = losses.z_convention(convention)
        z = losses.router_z_loss(logits_TE, way, mask=mask, loss_div_factor=loss_div_factor)
        found["z"] = spec.z_weight * z
    return found


def objective(outputs: Sequence[Tensor], weights: Sequence[Tensor], extra: Sequence[Tensor]) -> Tensor:
    """What is differentiated: the weighted sum of all outputs, and the losses."""
    terms = [(o * w).sum() for o, w in zip(outputs, weights, strict=True)] + list(extra)
    return functools.reduce(torch.add, terms)


def _weights(block: MoE) -> reference.ExpertWeights:
    return reference.ExpertWeights(block.w_in, block.w_out, block.b_in, block.b_out)


def _extras(block: MoE, mask: Tensor | None, sequences: tuple[int, int]) -> reference.Extras:
    shared = None
    if block.shared_in is not None and block.shared_out is not None:
        shared = reference.SharedWeights(block.shared_in, block.shared_out, gate=block.shared_gate)
    return reference.Extras(
        bias=block.router.bias, output_scale=block.output_scale, shared=shared, latent_in=block.latent_in,
        latent_out=block.latent_out, mask=mask, sequences=sequences,
    )  # fmt: skip


def _sequences(x: Tensor) -> tuple[int, int]:
    """``(B, S)`` as ``nn.MoE`` reads them off its input."""
    S = x.shape[-2]
    return (x.numel() // (S * x.shape[-1]) if x.numel() else 0), S
