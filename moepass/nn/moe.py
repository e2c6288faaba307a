"""The MoE block as a module: a router, E feed-forward experts, and what the spec puts beside them.

Contract
    in    x [..., S, D], a sequence of S tokens for each index in front (x [T, D] is one sequence); mask [..., S], False
          on padding, which no expert computes
    out   [..., S, D] in x's dtype (the autocast dtype under autocast); ``moepass.reference.moe`` defines the value
    state ``router.weight [E, D]``, ``w_in [E, n*F, D]`` (gate rows first), ``w_out [E, D, F]``, and where the spec asks
          ``b_in [E, n*F]``, ``b_out [E, D]``, ``output_scale [E]``, ``shared_in [n*F', D]``, ``shared_out [D, F']``,
          ``shared_gate [1, D]``, ``latent_in [L, D]``, ``latent_out [D, L]`` (L then is the D of the experts)
    Parameters may be exchanged for DTensors or FSDP shards: nothing is cached.  Dropout acts on the hidden activations
    and only in training mode.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moepass.ops
from moepass import errors, pointwise
from moepass.nn import dispatch, expert_choice, losses, sharded, shared
from moepass.nn.counting import Counts, moe_counts
from moepass.nn.metrics import Metrics, Recorder, capacity_drops, score_entropy
from moepass.nn.origin import Origin
from moepass.nn.router import Router, RouterOutput
from moepass.nn.sharded import ExpertParallel
from moepass.spec import MoESpec, capacity

Sequences = tuple[int, int]
#: What the routed experts say, and what the shared one does, if that was computed beside them.
Outputs = tuple[Tensor, Tensor | None]


class MoE(nn.Module):
    """A mixture-of-experts feed-forward block of model width D.  ``spec`` must name F and the activation."""

    def __init__(
        self,
        D: int,
        spec: MoESpec,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        experts = spec.experts
        hidden = experts.intermediate_size
        if hidden is None or experts.activation is None:
            raise errors.IncompleteSpec(missing="intermediate_size" if hidden is None else "activation", where="nn.MoE")
        E, n, width = experts.num_experts, experts.n_projections, experts.latent_size or D

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        self.D, self.spec = D, spec
        self.drops_before, capacity_factor = _who_drops(spec)
        # Numbers as text: under dynamic=True Dynamo makes symbols of the floats that it finds on modules, and traces
        # everything again when it sees what they are used for.
        self._dropout = repr(experts.dropout) if experts.dropout else None
        self._capacity_factor = None if capacity_factor is None else repr(capacity_factor)
        self._loss_weights = {name: repr(weight) for name, weight in _loss_weights(spec).items()}
        self.router = Router(D, E, spec.router, dispatch=spec.dispatch, device=device, dtype=dtype)
        self.w_in = empty(E, n * hidden, width)
        self.w_out = empty(E, width, hidden)
        self.b_in = empty(E, n * hidden) if experts.bias_in else None
        self.b_out = empty(E, width) if experts.bias_out else None
        self.output_scale = empty(E) if experts.output_scale else None
        S, L = experts.shared_intermediate_size, experts.latent_size
        self.shared_in = empty(n * S, D) if S else None
        self.shared_out = empty(D, S) if S else None
        self.shared_gate = empty(1, D) if experts.shared_combine == "gated" else None
        self.latent_in = empty(L, D) if L else None
        self.latent_out = empty(D, L) if L else None
        self.recorder: Recorder | None = None
        self.origin: Origin | None = None  # set by conversion
        self.parallel: ExpertParallel | None = None  # set by moepass.parallelize
        self._reset_experts(None)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw every matrix as ``nn.Linear`` would, and a nearly uniform router.  No-op on the meta device."""
        self.router.reset_parameters(generator)
        self._reset_experts(generator)

    @torch.no_grad()
    def _reset_experts(self, generator: torch.Generator | None) -> None:
        around = (self.shared_in, self.shared_out, self.shared_gate, self.latent_in, self.latent_out)
        for weight, bias in ((self.w_in, self.b_in), (self.w_out, self.b_out), *((w, None) for w in around)):
            for parameter in (weight, bias):
                if parameter is not None and weight is not None and not parameter.is_meta:
                    bound = 1.0 / math.sqrt(weight.shape[-1])
                    parameter.uniform_(-bound, bound, generator=generator)
        if self.output_scale is not None and not self.output_scale.is_meta:
            self.output_scale.fill_(1.0)

    # --- forward -----------------------------------------------------------------------------------------------------

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        loss_div_factor: Tensor | float | None = None,
        return_losses: bool = False,
    ) -> Any:
        """``[..., D] -> [..., D]``: each token goes to its top K experts, whose outputs are summed with its weights.

        The losses of a spec with ``attach=True`` join the graph of the result in training mode.  ``return_losses=True``
        attaches nothing and returns ``(y, {"load_balance": ..., "z": ...})`` instead, coefficients multiplied in, in
        evaluation too.  ``loss_div_factor`` is the losses' (OLMo-core's conventions only).
        """
        x_TD = x.reshape(-1, x.shape[-1])
        sequences = _sequences(x)
        routing = self.router(x_TD, mask, sequences)
        y, s_TD = self._routed(x_TD, routing, mask, sequences)
        if self.shared_in is not None:
            y = self._with_shared(x_TD, y, s_TD)
        y = y.reshape(x.shape)
        if not (return_losses or (self._loss_weights and self.spec.losses.attach and self.training)):
            return y
        found = self._losses(routing, mask, sequences, loss_div_factor)
        return (y, found) if return_losses else losses.attach_loss(y, functools.reduce(torch.add, found.values()))

    def _routed(self, x_TD: Tensor, routing: RouterOutput, mask: Tensor | None, sequences: Sequences) -> Outputs:
        """The routed experts alone, between the latent projections where there are any; see ``_experts``."""
        inner = x_TD if self.latent_in is None else F.linear(x_TD, self.latent_in)
        if routing.token_EC is not None:
            y, s_TD = self._by_experts(inner, routing, mask, x_TD)
        else:
            y, s_TD = self._by_tokens(inner, routing, mask, sequences, x_TD)
        return (y if self.latent_out is None else F.linear(y, self.latent_out)), s_TD

    def _by_tokens(
        self, x_TD: Tensor, routing: RouterOutput, mask: Tensor | None, sequences: Sequences, whole_TD: Tensor
    ) -> Outputs:
        index_TK, weight_TK, lost = routing.index_TK, routing.weight_TK, None
        if self.drops_before:
            index_TK, lost = dispatch.drop(index_TK, weight_TK, self.w_in.shape[0], self.spec.dispatch, sequences)
        if self.recorder is not None:
            self._record(routing, mask, lost)
        if self.spec.router.weight_on != "input":
            return self._experts(x_TD, index_TK, self._scaled(weight_TK, index_TK), whole_TD)
        out_R1 = self._scaled(torch.ones_like(weight_TK), index_TK).reshape(-1, 1)
        x_RD = shared.weighed_rows(x_TD, weight_TK)
        y_RD, s_TD = self._experts(x_RD, index_TK.reshape(-1, 1), out_R1, whole_TD)
        return shared.summed_rows(y_RD, weight_TK.shape[1]), s_TD

    def _by_experts(self, x_TD: Tensor, routing: RouterOutput, mask: Tensor | None, whole_TD: Tensor) -> Outputs:
        assert routing.token_EC is not None
        token_EC = routing.token_EC
        if self.recorder is not None:
            self._record(routing, mask, None)
        weight_R1 = expert_choice.weights(routing.weight_TK, token_EC)
        x_RD, index_R1 = expert_choice.gather(x_TD, token_EC)
        if self.spec.router.weight_on == "input":
            x_RD, weight_R1 = (x_RD * weight_R1).to(x_TD.dtype), torch.ones_like(weight_R1)
        y_RD, s_TD = self._experts(x_RD, index_R1, self._scaled(weight_R1, index_R1), whole_TD)
        return expert_choice.combine(y_RD, token_EC, x_TD.shape[0]), s_TD

    def _scaled(self, weight_TK: Tensor, index_TK: Tensor) -> Tensor:
        """Weights times ``output_scale``.  A sentinel gets some expert's, which its pair, not computed, never shows."""
        if self.output_scale is None:
            return weight_TK
        return weight_TK * self.output_scale.to(weight_TK.dtype)[index_TK.clamp(max=self.w_in.shape[0] - 1)]

    def _experts(self, x_RD: Tensor, index_RK: Tensor, weight_RK: Tensor, whole_TD: Tensor) -> Outputs:
        """The semantic op with this block's weights: over the ranks that hold them, where they are shared out.

        The second result is the shared expert's of ``whole_TD``, which the ranks compute while the rows travel.
        """
        settings: dict[str, Any] = {
            "activation": str(self.spec.experts.activation),
            "dropout": float(self._dropout) if self._dropout and self.training else 0,
            "capacity_factor": float(self._capacity_factor) if self._capacity_factor else None,
            "drop_policy": self.spec.dispatch.drop_policy,
        }
        weights = (self.w_in, self.w_out, self.b_in, self.b_out)
        if self.parallel is None:
            return moepass.ops.experts(x_RD, index_RK, weight_RK, *weights, **settings), None
        settings |= self.parallel.arguments()
        own = sharded.local(weights)
        beside = (
            [] if self.shared_in is None or self.shared_out is None else [whole_TD, self.shared_in, self.shared_out]
        )
        y_RD, dropped, s_TD = moepass.ops.experts_ep_beside(x_RD, index_RK, weight_RK, *own, shared=beside, **settings)
        if self.recorder is not None:
            self.recorder.add_dropped(dropped)
        return y_RD, s_TD

    def _with_shared(self, x_TD: Tensor, y_TD: Tensor, s_TD: Tensor | None) -> Tensor:
        """Routed output and shared output, which is computed unless it is there already."""
        assert self.shared_in is not None
        assert self.shared_out is not None
        spec = self.spec.experts
        if s_TD is None:
            dropout = float(self._dropout) if self._dropout and self.training else 0
            s_TD = shared.feed_forward(x_TD, self.shared_in, self.shared_out, str(spec.activation), dropout)
        gate_T1 = None if self.shared_gate is None else F.linear(x_TD, self.shared_gate)
        return shared.combine_shared(y_TD, s_TD, spec.shared_combine, top_k=self.spec.router.top_k, gate=gate_T1)

    # --- losses, metrics, counts -------------------------------------------------------------------------------------

    def _losses(
        self,
        routing: RouterOutput,
        mask: Tensor | None,
        sequences: Sequences,
        loss_div_factor: Tensor | float | None,
    ) -> dict[str, Tensor]:
        """The spec's losses by name, coefficients included."""
        found, convention = {}, self.spec.losses.load_balance
        groups: tuple[str, ...] = ()
        ranks = 1
        if self.parallel is not None and self.spec.losses.scope == "global":
            groups, ranks = self.parallel.loss_groups, self.parallel.loss_ranks
        if convention is not None and "load_balance" in self._loss_weights:
            P_TE = losses.balance_scores(routing.logits_TE, convention, self.router.rule, bias_E=self.router.bias)
            index_TK = losses.balance_index(P_TE, routing.index_TK, convention, self.spec.router)
            found["load_balance"] = losses.load_balancing_loss(
                P_TE, index_TK, convention, sequences=sequences, mask=mask, loss_div_factor=loss_div_factor,
                groups=groups, ranks=ranks,
            )  # fmt: skip
        if "z" in self._loss_weights:
            found["z"] = losses.router_z_loss(
                routing.logits_TE,
                losses.z_convention(convention),
                mask=mask,
                loss_div_factor=loss_div_factor,
                groups=groups,
                ranks=ranks,
            )
        return {name: float(self._loss_weights[name]) * loss for name, loss in found.items()}

    def _record(self, routing: RouterOutput, mask: Tensor | None, lost: Tensor | None) -> None:
        """Measure a routing, sentinels left out; ``lost`` of its pairs were dropped before the op."""
        assert self.recorder is not None
        (T, K), E = routing.index_TK.shape, self.w_in.shape[0]
        count_E = losses.expert_counts(routing.index_TK, E)[0]
        dropped, padding = torch.zeros_like(count_E[0]) if lost is None else lost, torch.zeros_like(count_E[0])
        if self._capacity_factor is not None:
            C = capacity(float(self._capacity_factor), T, K, E)
            if lost is None:
                dropped, _ = capacity_drops(count_E, C)
            padding = E * C - (count_E.sum() - dropped)
        self.recorder(count_E, dropped, padding, score_entropy(routing.scores_TE, mask))

    @property
    def recording(self) -> bool:
        """Whether forwards leave their metrics."""
        return self.recorder is not None

    def record_metrics(self, on: bool = True) -> MoE:
        """Switch the recording that ``metrics()`` reads, off by default; returns the module."""
        if on != self.recording:
            self.recorder = Recorder(self.w_in.shape[0], device=self.w_in.device) if on else None
        return self

    def metrics(self) -> Metrics:
        """Metrics of the last forward, detached; reading them does not synchronise."""
        if self.recorder is None:
            raise errors.NotRecorded(where="this MoE block")
        return self.recorder.metrics()

    def counts(self) -> Counts:
        """Parameters and FLOPs (``moepass.nn.counting``)."""
        return moe_counts(self.D, self.spec)

    @property
    def num_params(self) -> int:
        """All parameters."""
        return self.counts().num_params

    @property
    def num_active_params(self) -> int:
        """Parameters that one token meets: K experts, and whatever every token uses."""
        return self.counts().num_active_params

    def flops_per_token(self, seq_len: int | None = None, *, backward: bool = True) -> int:
        """FLOPs of a token's matrix products, 6 per active weight (2 without backward); the same at every length."""
        return self.counts().flops_per_token(seq_len, backward=backward)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        E, width, hidden = self.w_out.shape
        spec = self.spec.experts
        parts = [f"D={self.D}, F={hidden}, E={E}, {pointwise.display_name(str(spec.activation))}"]
        if self.latent_in is not None:
            parts.append(f"latent={width}")
        if spec.shared_intermediate_size:
            parts.append(f"shared={spec.shared_intermediate_size} ({spec.shared_combine})")
        if self.spec.dispatch.capacity_factor is not None:
            parts.append(f"capacity_factor={self.spec.dispatch.capacity_factor:g} ({self.spec.dispatch.drop_policy})")
        if spec.dropout:
            parts.append(f"dropout={spec.dropout:g}")
        if self.spec.losses.load_balance is not None:
            parts.append(f"load_balance={self.spec.losses.load_balance_weight:g} ({self.spec.losses.load_balance})")
        return ", ".join(parts)


def _who_drops(spec: MoESpec) -> tuple[bool, float | None]:
    """Whether pairs are dropped before the op, and the capacity factor that the op itself applies.

    The op counts capacity over the batch, and its priorities are the weights it is given: those must be the router's.
    """
    rule, router = spec.dispatch, spec.router
    if router.choice == "expert" or not rule.drops_tokens:
        return False, None
    reweighed = spec.experts.output_scale and rule.drop_policy == "probability"
    by_op = rule.capacity_factor is not None and rule.scope == "batch" and router.weight_on == "output"
    by_op = by_op and not reweighed
    return not by_op or rule.ragged_buffer_factor is not None, rule.capacity_factor if by_op else None


def _loss_weights(spec: MoESpec) -> dict[str, float]:
    """Coefficients of the losses that are asked for."""
    asked = spec.losses
    balance = asked.load_balance_weight if asked.load_balance is not None else 0.0
    return {name: weight for name, weight in (("load_balance", balance), ("z", asked.z_weight)) if weight}


def _sequences(x: Tensor) -> Sequences:
    """``(B, S)``: everything in front of the last two dimensions is batch."""
    B = 1
    for d in range(x.dim() - 2):  # not math.prod(x.shape[:-2]): a trace keeps a node for the slice
        B *= x.shape[d]
    return B, x.shape[-2] if x.dim() > 1 else 1
