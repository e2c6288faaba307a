"""The definition of what an ``MoESpec`` means, in plain PyTorch: slow, readable, exact in float64.

Contract
    Every lowering, kernel, expert-parallel strategy and converted checkpoint is tested against ``moe``, forward and
    backward.  The routing (``route`` to ``choose_tokens``) is also what models run: plain tensor operations with static
    control flow.  The rest is only ever the oracle.
    An index >= E (we write E) marks a pair that is not computed: it adds nothing, takes no capacity, and its weight
    gets a zero gradient.

Shapes: T tokens, D model width, F expert width, E experts, K top-k, n input projections, G windows of L tokens.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moepass import pointwise
from moepass.spec import DispatchSpec, ExpertSpec, MoESpec, RouterSpec, capacity


class ExpertWeights(NamedTuple):
    """Expert parameters.  Rows are output features, as in nn.Linear; gate rows stand before up rows.

    ``w_in [E, n*F, D]``, ``w_out [E, D, F]``, ``b_in [E, n*F]`` or None, ``b_out [E, D]`` or None.
    """

    w_in: Tensor
    w_out: Tensor
    b_in: Tensor | None = None
    b_out: Tensor | None = None


class SharedWeights(NamedTuple):
    """The shared expert: ``w_in [n*F, D]``, ``w_out [D, F]``, ``b_in [n*F]``?, ``b_out [D]``?, ``gate [1, D]``?."""

    w_in: Tensor
    w_out: Tensor
    b_in: Tensor | None = None
    b_out: Tensor | None = None
    gate: Tensor | None = None


class Extras(NamedTuple):
    """What ``moe`` needs beside logits and expert weights, where the spec asks for it.

    ``bias [E]``            correction bias, zero if None
    ``output_scale [E]``    ``ExpertSpec.output_scale``
    ``shared``              ``ExpertSpec.shared_intermediate_size``
    ``latent_in [L, D]``, ``latent_out [D, L]``  ``ExpertSpec.latent_size``
    ``mask [T]``            bool, False on tokens that no expert computes; any shape of T elements
    ``sequences``           ``(B, S)`` with T = B*S, for scopes of sequences
    ``index_TK``            experts chosen elsewhere (replay, benchmarks); their weights come from the logits
    """

    bias: Tensor | None = None
    output_scale: Tensor | None = None
    shared: SharedWeights | None = None
    latent_in: Tensor | None = None
    latent_out: Tensor | None = None
    mask: Tensor | None = None
    sequences: tuple[int, int] | None = None
    index_TK: Tensor | None = None


class Routing(NamedTuple):
    """Each token's experts and their weights, both ``[T, K]``, best first."""

    index_TK: Tensor
    weight_TK: Tensor


class Rule(NamedTuple):
    """The routing part of a ``RouterSpec`` for modules that are traced.

    Numbers are text: under ``dynamic=True`` Dynamo makes symbols of the floats that it finds on modules, and traces
    everything again when it sees them compared.
    """

    top_k: int
    score: str
    score_first: bool
    normalize: str | None
    normalize_eps: str
    scale: str
    groups: int
    kept_groups: int
    group_score: str

    @staticmethod
    def of(spec: RouterSpec) -> Rule:
        """The rule of a spec."""
        normalize = None if spec.normalize is None else repr(spec.normalize)
        return Rule(
            spec.top_k, spec.score, spec.score_first, normalize, repr(spec.normalize_eps), repr(spec.scale),
            spec.groups, spec.kept_groups, spec.group_score,
        )  # fmt: skip


# --- routing: what models run ----------------------------------------------------------------------------------------


def route(logits_TE: Tensor, spec: RouterSpec | Rule, *, bias: Tensor | None = None) -> Routing:
    """Choose K experts a token (Shazeer et al. 2017; names as in HF and DeepSeek-V3).

    Computed in float32, or float64 if the logits are.  ``bias [E]`` moves the choice and never the weights.  Ties go to
    the lower expert index, which keeps the virtual groups of an upcycled block whole; ``torch.topk`` promises no order
    among equals.
    """
    value_TE = choice_values(logits_TE, spec)
    index_TK = choose(value_TE, spec, bias=bias)
    return Routing(index_TK, weigh_all(value_TE, index_TK, spec))


def scores(logits: Tensor, spec: RouterSpec | Rule) -> Tensor:
    """Scores of all experts in float32 (float64 for float64 logits): ``[..., E] -> [..., E]``, no bias, no top-k."""
    logits = logits.to(wide(logits.dtype))
    if spec.score == "softmax":
        return torch.softmax(logits, dim=-1)
    return torch.sigmoid(logits) if spec.score == "sigmoid" else F.softplus(logits).sqrt()


def choice_values(logits_TE: Tensor, spec: RouterSpec | Rule) -> Tensor:
    """What experts are chosen by, before any bias: scores, or the logits where scores come after the top-k."""
    return scores(logits_TE, spec) if spec.score_first else logits_TE.to(wide(logits_TE.dtype))


def choose(value_TE: Tensor, spec: RouterSpec | Rule, *, bias: Tensor | None = None) -> Tensor:
    """The K experts of the highest values plus bias, among those of the kept groups: int64 ``[T, K]``, best first."""
    value_TE = value_TE.detach()
    if bias is not None:
        value_TE = value_TE + bias.detach().to(value_TE.dtype)
    if spec.groups > 1:
        value_TE = _in_kept_groups(value_TE, spec)
    return _stable_order(value_TE)[:, : spec.top_k]


def _stable_order(values: Tensor) -> Tensor:
    return torch.sort(values, dim=-1, descending=True, stable=True).indices


def _in_kept_groups(value_TE: Tensor, spec: RouterSpec | Rule) -> Tensor:
    """-inf outside the best groups.  Not 0: a negative biased score inside a kept group would lose to it."""
    value_TGM = value_TE.unflatten(-1, (spec.groups, -1))
    best = {"top2": 2, "max": 1, "top_k_per_group": spec.top_k // spec.kept_groups}[spec.group_score]
    group_TG = torch.topk(value_TGM, best, dim=-1).values.sum(-1)
    kept = _stable_order(group_TG)[:, : spec.kept_groups]
    kept_TG = torch.zeros_like(group_TG, dtype=torch.bool).scatter(1, kept, True)
    return torch.where(kept_TG.unsqueeze(-1), value_TGM, -math.inf).flatten(1)


def weigh(value_TE: Tensor, index_TK: Tensor, spec: RouterSpec | Rule) -> Tensor:
    """Weights ``[T, K]`` of given experts from ``choice_values``: scored, normalised, scaled; 0 on sentinels."""
    E = value_TE.shape[1]
    weight_TK = weigh_all(value_TE, index_TK.long().clamp(max=E - 1), spec)
    return torch.where(index_TK < E, weight_TK, 0.0)


def weigh_all(value_TE: Tensor, index_TK: Tensor, spec: RouterSpec | Rule) -> Tensor:
    """``weigh`` where no index is a sentinel."""
    value_TK = value_TE.gather(1, index_TK)
    if not spec.score_first:
        value_TK = scores(value_TK, spec)
    eps, scale = float(spec.normalize_eps), float(spec.scale)
    if spec.normalize is not None:
        p = float(spec.normalize)  # scores are positive: the L1 norm is their sum
        norm_T1 = value_TK.sum(-1, keepdim=True) if p == 1.0 else torch.linalg.vector_norm(value_TK, p, -1, True)
        value_TK = value_TK / (norm_T1 if eps == 0.0 else norm_T1 + eps)
    return value_TK if scale == 1.0 else value_TK * scale


def choose_tokens(value_TE: Tensor, C: int, windows: tuple[int, int], mask: Tensor | None = None) -> Tensor:
    """Expert choice (Zhou et al. 2022): the C tokens of every window that each expert likes best.

    ``windows=(G, L)`` with T = G*L; the result ``[E, G*min(C, L)]`` int64 holds rows of x, best first within a window,
    ties to the earlier token, and T where the window has fewer than C unmasked tokens.
    """
    (T, E), (G, L) = value_TE.shape, windows
    value_TE = value_TE.detach()
    real_T = torch.ones(T, dtype=torch.bool, device=value_TE.device) if mask is None else mask.reshape(-1).bool()
    # Contiguous: a sort keeps strides, and indexing by a transposed tensor has other strides when it is traced.
    value_EGL = torch.where(real_T[:, None], value_TE, -math.inf).T.contiguous().reshape(E, G, L)
    first_G1 = torch.arange(G, device=value_TE.device).unsqueeze(-1) * L
    token_EGC = _stable_order(value_EGL)[..., :C] + first_G1
    return torch.where(real_T[token_EGC], token_EGC, T).flatten(1)


def routing_of_choice(value_TE: Tensor, token_EC: Tensor, spec: RouterSpec | Rule) -> Routing:
    """Expert choice seen by tokens, with a slot for every expert: ``index [T, E]`` is e, or E if e did not choose."""
    T, E = value_TE.shape
    chosen_ET = torch.zeros(E, T + 1, dtype=torch.bool, device=value_TE.device).scatter(1, token_EC, True)
    index_TE = torch.where(chosen_ET[:, :T].T, torch.arange(E, device=value_TE.device), E)
    return Routing(index_TE, weigh(value_TE, index_TE, spec))


# --- the oracle ------------------------------------------------------------------------------------------------------


def keep_mask(
    routing: Routing, num_experts: int, spec: DispatchSpec, *, sequences: tuple[int, int] | None = None
) -> Tensor:
    """Which of the ``[T, K]`` assignments are computed: those within the capacity of their expert in their window.

    ``position``: tokens in order.  ``probability``: highest routing weight first; ties keep token order.  After that,
    of the rows sorted by expert, those that fit the ragged buffer.  Sentinels are never kept.
    """
    (T, K), E = routing.index_TK.shape, num_experts
    keep_R = (routing.index_TK < E).reshape(-1).clone()
    index_R, weight_R = routing.index_TK.reshape(-1), routing.weight_TK.reshape(-1)
    if spec.capacity_factor is not None:
        G, L = spec.windows(T, sequences, "reference.keep_mask")
        limit, window_R = capacity(spec.capacity_factor, L, K, E), torch.arange(T * K, device=index_R.device) // (L * K)
        for expert in range(E):
            for window in range(G):
                rows = torch.nonzero((index_R == expert) & (window_R == window)).squeeze(-1)
                if spec.drop_policy == "probability":
                    rows = rows[torch.sort(weight_R[rows], descending=True, stable=True).indices]
                keep_R[rows[limit:]] = False
    if spec.ragged_buffer_factor is not None:
        rows = torch.cat([torch.nonzero(keep_R & (index_R == e)).squeeze(-1) for e in range(E)])
        keep_R[rows[math.ceil(spec.ragged_buffer_factor * T * K) :]] = False
    return keep_R.view_as(routing.index_TK)


def experts(
    x_TD: Tensor, routing: Routing, weights: ExpertWeights, spec: MoESpec, extras: Extras | None = None
) -> Tensor:
    """``y_t = sum_k weight[t,k] * expert_{index[t,k]}(x_t)`` over the assignments that are kept.

    With ``weight_on="input"`` the sum is of ``expert(weight * x)``.  Of ``extras`` the ``output_scale`` and
    ``sequences`` are used.
    """
    extras, E = extras or Extras(), weights.w_in.shape[0]
    if spec.experts.activation is None:
        raise ValueError("the spec has no activation")
    if spec.router.choice == "expert":  # whose capacity is in the choice
        kept_TK = routing.index_TK < E
    else:
        kept_TK = keep_mask(routing, E, spec.dispatch, sequences=extras.sequences)
    out_TD = torch.zeros(x_TD.shape[0], weights.w_out.shape[1], dtype=wide(x_TD.dtype), device=x_TD.device)
    for e in range(E):
        chosen_TK = kept_TK & (routing.index_TK == e)
        y_TD = _weighted(x_TD, routing.weight_TK, chosen_TK, weights, e, spec)
        out_TD = out_TD + (y_TD if extras.output_scale is None else y_TD * extras.output_scale[e])
    return out_TD.to(x_TD.dtype)


def routed_experts(
    x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor, weights: ExpertWeights, activation: str
) -> Tensor:
    """``experts`` of a routing that is given, without a spec: dropless; an index outside 0..E-1 has no expert."""
    E, K = weights.w_in.shape[0], index_TK.shape[1]
    biases = {"bias_in": weights.b_in is not None, "bias_out": weights.b_out is not None}
    spec = MoESpec(
        router=RouterSpec(top_k=K, normalize=None),
        experts=ExpertSpec(num_experts=E, activation=activation, **biases),
    )
    index_TK = torch.where((index_TK < 0) | (index_TK >= E), E, index_TK)
    return experts(x_TD, Routing(index_TK, weight_TK), weights, spec)


def _weighted(
    x_TD: Tensor, weight_TK: Tensor, chosen_TK: Tensor, weights: ExpertWeights, e: int, spec: MoESpec
) -> Tensor:
    """One expert's share of the sum.  A token that does not choose it may hold anything, NaN included."""
    chosen_T1 = chosen_TK.any(-1, keepdim=True)
    safe_TD = torch.where(chosen_T1, x_TD, 0)
    one = ExpertWeights(*(None if w is None else w[e] for w in weights))  # type: ignore[arg-type]
    gate_TK = torch.where(chosen_TK, weight_TK, 0)
    if spec.router.weight_on == "output":
        return gate_TK.sum(-1, keepdim=True) * _ffn(safe_TD, one, spec)
    total = torch.zeros((), dtype=wide(x_TD.dtype), device=x_TD.device)
    for k in range(gate_TK.shape[1]):  # an expert chosen twice computes twice
        scaled_TD = (safe_TD * gate_TK[:, k : k + 1]).to(x_TD.dtype)
        total = total + torch.where(chosen_TK[:, k : k + 1], _ffn(scaled_TD, one, spec), 0)
    return total


def _ffn(x_TD: Tensor, weights: ExpertWeights | SharedWeights, spec: MoESpec) -> Tensor:
    h = pointwise.apply(str(spec.experts.activation), F.linear(x_TD, weights.w_in, weights.b_in))
    y = F.linear(h, weights.w_out, weights.b_out)
    return y.to(wide(y.dtype))


def wide(dtype: torch.dtype) -> torch.dtype:
    """What routing and sums run in: float64 for float64, else float32."""
    # Not torch.promote_types: torch.export would leave it in the graph as a node that Dynamo cannot read back.
    return torch.float64 if dtype == torch.float64 else torch.float32


def moe(
    x: Tensor, router_logits: Tensor, weights: ExpertWeights, spec: MoESpec, extras: Extras | None = None
) -> Tensor:
    """The MoE block: ``x [..., D]``, ``router_logits [..., E]`` -> ``[..., D]`` in x's dtype.

    Routing and the sum over experts run in float32 (float64 for float64 inputs).  Dropout and jitter are not applied:
    the reference defines the function in evaluation mode.  Raises ValueError for a tensor that the spec asks for and
    ``extras`` lacks.
    """
    extras = extras or Extras()
    _complete(spec, extras)
    x_TD, logits_TE = x.reshape(-1, x.shape[-1]), router_logits.reshape(-1, router_logits.shape[-1])
    routing = _routing(logits_TE, spec, extras)
    inner_TD = x_TD if extras.latent_in is None else F.linear(x_TD, extras.latent_in)
    y_TD = experts(inner_TD, routing, weights, spec, extras)
    y_TD = y_TD if extras.latent_out is None else F.linear(y_TD, extras.latent_out)
    return _with_shared(x_TD, y_TD, spec, extras.shared).reshape(x.shape)


def _routing(logits_TE: Tensor, spec: MoESpec, extras: Extras) -> Routing:
    (T, E), router = logits_TE.shape, spec.router
    if extras.mask is not None:  # where anything may stand
        logits_TE = torch.where(extras.mask.reshape(-1, 1).bool(), logits_TE, 0)
    value_TE = choice_values(logits_TE, router)
    if extras.index_TK is not None:
        index_TK = extras.index_TK
    elif router.choice == "expert":
        G, L = spec.dispatch.windows(T, extras.sequences, "reference.moe")
        C = capacity(spec.dispatch.capacity_factor or 0.0, L, router.top_k, E)
        return routing_of_choice(value_TE, choose_tokens(value_TE, C, (G, L), extras.mask), router)
    elif router.assignment == "uniform":
        index_TK = torch.arange(T * router.top_k, device=logits_TE.device).view(T, router.top_k) % E
    else:
        index_TK = choose(value_TE, router, bias=extras.bias)
    if extras.mask is not None:
        index_TK = torch.where(extras.mask.reshape(-1, 1).bool(), index_TK, E)
    return Routing(index_TK, weigh(value_TE, index_TK, router))


def _with_shared(x_TD: Tensor, y_TD: Tensor, spec: MoESpec, shared: SharedWeights | None) -> Tensor:
    if shared is None:
        return y_TD
    s_TD, y_TD, K = _ffn(x_TD, shared, spec), y_TD.to(wide(x_TD.dtype)), spec.router.top_k
    if spec.experts.shared_combine == "mixed":
        return ((s_TD + K * y_TD) / (K + 1)).to(x_TD.dtype)
    if shared.gate is not None:
        s_TD = torch.sigmoid(F.linear(x_TD, shared.gate)) * s_TD
    return (y_TD + s_TD).to(x_TD.dtype)


def _complete(spec: MoESpec, extras: Extras) -> None:
    """The spec and the extras ask for the same tensors."""
    e, shared = spec.experts, extras.shared
    for name, asked, given in (
        ("output_scale", e.output_scale, extras.output_scale is not None),
        ("shared", e.shared_intermediate_size is not None, shared is not None),
        ("shared.gate", e.shared_combine == "gated", shared is not None and shared.gate is not None),
        ("latent_in", e.latent_size is not None, extras.latent_in is not None),
        ("latent_out", e.latent_size is not None, extras.latent_out is not None),
    ):
        if asked != given:
            raise ValueError(f"the spec {'asks' if asked else 'does not ask'} for {name}; see reference.Extras")
    if spec.router.assignment in ("random", "balanced") and extras.index_TK is None:
        raise ValueError(f"assignment={spec.router.assignment!r} draws its experts: give them as Extras.index_TK")
