"""Router losses in the conventions of five systems, each on its system's own scale.

Contract
    in    P ``scores_TE`` (see ``balance_scores``), ``index_TK``, ``logits_TE``; ``sequences=(B, S)`` with T = B*S;
          ``mask [T]`` or ``[B, S]``, True or 1 on real tokens.  An index >= E counts for nobody.
    out   a float32 scalar (float64 for float64 inputs), without the coefficient; counts carry no gradient
    never synchronises with the host; no token gives the loss 0, not NaN
The formulas, their values at balance and how to port a coefficient: ``docs/losses.md``.

Shapes: T tokens, B sequences, S their length, E experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from moepass import _compat, errors, reference
from moepass.spec import LoadBalance, RouterSpec

ZConvention = Literal["olmo_core", "megatron"]

#: Conventions whose divisor is the caller's to choose (``loss_div_factor``); the others have one of their own.
DIVISIBLE = ("olmo_core_local", "olmo_core_instance")
#: Conventions that are means over sequences: their value depends on where the sequences end.
PER_SEQUENCE = ("olmo_core_instance", "maxtext")
#: Conventions that take the top k of P itself for their counts, whatever bias or groups made the model choose.
OWN_TOP_K = ("hf", "megatron")


def expert_counts(
    index_TK: Tensor, num_experts: int, *, sequences: tuple[int, int] | None = None, mask: Tensor | None = None
) -> Tensor:
    """(token, slot) pairs per sequence and expert: ``[B, E]`` int64; masked tokens and indices >= E are left out."""
    E, (B, S) = num_experts, sequences or (1, index_TK.shape[0])
    bin_TK = index_TK.long().clamp(max=E)
    if mask is not None:
        bin_TK = torch.where(mask.reshape(-1, 1).bool(), bin_TK, E)
    if sequences is not None:
        first_B = torch.arange(B, device=index_TK.device) * (E + 1)
        bin_TK = bin_TK.reshape(B, S, index_TK.shape[1]) + first_B[:, None, None]
    bins = bin_TK.reshape(-1)
    # Not bincount: it asks the host for its length.  Integer atomics add up the same in every order.
    counts = torch.zeros(B * (E + 1), dtype=torch.int64, device=index_TK.device)
    return counts.scatter_add(0, bins, torch.ones_like(bins)).reshape(B, E + 1)[:, :E]


def balance_scores(
    logits_TE: Tensor, convention: LoadBalance, spec: RouterSpec | reference.Rule, *, bias_E: Tensor | None = None
) -> Tensor:
    """P ``[T, E]``, the scores that a convention's loss averages, from the router's logits.

    ``hf``: softmax, always.  ``maxtext``: softmax of the gate's output, which is the logits for softmax routing and
    ``score(logits)`` otherwise, plus the correction bias.  The others: ``score(logits)``, divided by its sum over E
    where that is not 1 (Automodel: only if the routing weights are normalised too and K > 1).
    """
    logits_TE = logits_TE.to(reference.wide(logits_TE.dtype))
    if convention == "maxtext":
        gate_TE = logits_TE if spec.score == "softmax" else reference.scores(logits_TE, spec)
        return torch.softmax(gate_TE if bias_E is None else gate_TE + bias_E.detach(), dim=-1)
    if convention == "hf" or spec.score == "softmax":
        return torch.softmax(logits_TE, dim=-1)
    score_TE = reference.scores(logits_TE, spec)
    if convention in DIVISIBLE:
        score_TE = score_TE + 1e-7  # OLMo-core's floor under its sigmoid
        return score_TE / score_TE.sum(-1, keepdim=True)
    if convention == "automodel" and (spec.normalize is None or spec.top_k == 1):
        return score_TE
    return score_TE / (score_TE.sum(-1, keepdim=True) + 1e-20)


def balance_index(scores_TE: Tensor, index_TK: Tensor, convention: LoadBalance, spec: RouterSpec) -> Tensor:
    """The choices that a convention counts: the model's, or the top k of P in transformers' and Megatron's losses.

    They differ only where a correction bias or expert groups made the model choose otherwise.
    """
    swayed = spec.assignment == "learned" and (spec.bias or spec.groups > 1)
    if not swayed or convention not in OWN_TOP_K:
        return index_TK
    return torch.topk(scores_TE.detach(), index_TK.shape[1], dim=-1).indices


def load_balancing_loss(
    scores_TE: Tensor,
    index_TK: Tensor,
    convention: LoadBalance,
    *,
    sequences: tuple[int, int] | None = None,
    mask: Tensor | None = None,
    loss_div_factor: Tensor | float | None = None,
    groups: Sequence[str] = (),
    ranks: int = 1,
) -> Tensor:
    """How unevenly tokens are spread over experts: ``sum_e (share of the pairs on e) * (mean score of e)``, scaled.

    At perfect balance 1, and K for ``maxtext`` and ``hf``.  ``loss_div_factor`` replaces the token count of the
    OLMo-core conventions (tokens of the whole batch, say, when a step has several micro-batches).  Masks in the
    OLMo-core and MaxText conventions are ours, as those systems have none: masked tokens are left out of counts, means
    and divisors.  ``groups``: process groups by name, of ``ranks`` in all; counts and divisors are then those of all
    ranks, and the mean over them of what is returned is the loss of one rank with all tokens (whose ``loss_div_factor``
    it is, too).

    Raises ``LossDivFactor`` where the convention has a divisor of its own.
    """
    if loss_div_factor is not None and convention not in DIVISIBLE:
        raise errors.LossDivFactor(loss=convention, known=", ".join(DIVISIBLE))
    (T, E), K = scores_TE.shape, index_TK.shape[1]
    P_TE = _masked(_widened(scores_TE), mask)
    if convention not in PER_SEQUENCE:
        sequences = None
    B, S = sequences or (1, T)
    count_BE = expert_counts(index_TK, E, sequences=sequences, mask=mask).to(P_TE.dtype)
    tokens_B1 = _tokens(P_TE, mask, (B, S))
    tokens = _summed(tokens_B1.sum(), groups)
    if convention not in PER_SEQUENCE:
        count_BE, tokens_B1 = _summed(count_BE, groups), tokens.reshape(1, 1)
    # Shares of the sequence's tokens: E of them sum to K, and the mean scores to 1.
    share_BE = count_BE / tokens_B1.clamp(min=1)
    mean_BE = ranks * P_TE.reshape(B, S, E).sum(1) / tokens_B1.clamp(min=1)
    if convention in DIVISIBLE:
        D = tokens.clamp(min=1) if loss_div_factor is None else loss_div_factor
        return (E / K) * (count_BE * mean_BE).sum() / D
    balance_B = (share_BE * mean_BE).sum(-1)
    if convention == "maxtext":
        return E * balance_B.sum() / _summed((tokens_B1 > 0).sum(), groups).clamp(min=1)
    return (E if convention == "hf" else E / K) * balance_B.sum()


def _summed(value: Tensor, groups: Sequence[str]) -> Tensor:
    """Over the ranks; for counts, which have no gradient."""
    for group in groups:
        value = _compat.all_reduce(value, group)
    return value


def hf_load_balancing_loss(scores: Sequence[Tensor], indices: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
    """transformers' ``load_balancing_loss_func`` over all layers at once: their rows are one batch.

    ``scores[l] [T, E]`` softmax scores and ``indices[l] [T, K]`` of layer l; ``mask [T]`` or ``[B, S]``, the same for
    every layer.  Not the mean of the layers' losses: counts and scores of different layers meet in one product.
    """
    if not scores or len(scores) != len(indices):
        raise errors.NoLayers(scores=len(scores), indices=len(indices))
    every = None if mask is None else mask.reshape(-1).repeat(len(scores))
    return load_balancing_loss(torch.cat(list(scores)), torch.cat(list(indices)), "hf", mask=every)


def z_convention(convention: LoadBalance | None) -> ZConvention:
    """The convention of the z-loss beside a load-balancing loss, or alone."""
    return "olmo_core" if convention in (None, *DIVISIBLE) else "megatron"


def router_z_loss(
    logits_TE: Tensor,
    convention: ZConvention = "olmo_core",
    *,
    mask: Tensor | None = None,
    loss_div_factor: Tensor | float | None = None,
    groups: Sequence[str] = (),
    ranks: int = 1,
) -> Tensor:
    """Keeps logits small: ``sum_t logsumexp(logits_t)^2 / D`` (ST-MoE, Zoph et al. 2022).

    D is the number of (unmasked) tokens; in OLMo-core's convention ``loss_div_factor`` may replace it.  ``groups``
    and ``ranks`` as in ``load_balancing_loss``: ranks may then have different numbers of tokens.
    """
    if loss_div_factor is not None and convention != "olmo_core":
        raise errors.LossDivFactor(loss=f"{convention} z-loss", known="olmo_core")
    logits_TE = _widened(logits_TE)
    square_T1 = _masked(torch.logsumexp(_masked(logits_TE, mask), dim=-1, keepdim=True).square(), mask)
    if loss_div_factor is None:
        loss_div_factor = _summed(_tokens(logits_TE, mask, (1, logits_TE.shape[0])).sum(), groups).clamp(min=1)
    return ranks * square_T1.sum() / loss_div_factor


def attach_loss(y: Tensor, loss: Tensor, scale: Tensor | float = 1) -> Tensor:
    """``y``, with the loss on its graph: the backward of whatever is made of y adds ``scale * d loss``.

    The value of y does not change and the loss needs no way out of the model (Megatron's ``MoEAuxLossAutoScaler``,
    OLMo-core's ``AutoAuxiliaryLoss``).  The gradient does not depend on how y is used: one that is divided by the
    number of micro-batches, or multiplied by a ``GradScaler``, needs the same factor as ``scale``.
    """
    y_with_loss: Tensor = _Attach.apply(  # type: ignore[no-untyped-call]
        y, loss if isinstance(scale, int) and scale == 1 else loss * scale
    )
    return y_with_loss


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, loss: Tensor) -> Tensor:
        ctx.loss = loss.dtype, loss.shape
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (grad_y,) = grads
        dtype, shape = ctx.loss
        return grad_y, torch.ones(shape, dtype=dtype, device=grad_y.device)


def _widened(tensor: Tensor) -> Tensor:
    return tensor.to(reference.wide(tensor.dtype))


def _masked(rows: Tensor, mask: Tensor | None) -> Tensor:
    """Rows ``[T, n]`` with zeros where masked; what stood there, NaN included, has no influence."""
    return rows if mask is None else torch.where(mask.reshape(-1, 1).bool(), rows, 0)


def _tokens(rows: Tensor, mask: Tensor | None, sequences: tuple[int, int]) -> Tensor:
    """Unmasked tokens of every sequence, ``[B, 1]``."""
    B, S = sequences
    if mask is None:
        return torch.full((B, 1), S, dtype=rows.dtype, device=rows.device)
    return mask.reshape(B, S).bool().sum(-1, keepdim=True).to(rows.dtype)
