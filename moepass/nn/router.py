"""The router: one matrix from tokens to expert logits, and everything that decides from them.

Contract
    in    x_TD, any floating dtype; mask [T] or [B, S]; sequences (B, S)
    out   RouterOutput: index_TK int64, weight_TK float32, best expert first; scores_TE and logits_TE float32
    Everything is computed in float32 (float64 for float64 inputs) whatever the parameter's dtype or autocast say:
    bfloat16 logits tie, and ties route tokens by accident (``reference/upcycling.md``, section 1.0).
    A masked token gets the index E (nobody) in all its slots and the weight 0; it may hold anything, NaN included.
    Expert choice has a slot for every expert, K = E, with E where an expert did not choose the token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, Self

import torch
from torch import Tensor, nn

import moepass.ops
from moepass import reference
from moepass.nn import routing
from moepass.nn.losses import expert_counts
from moepass.nn.routing_bias import bias_step, total_counts
from moepass.reference import Rule
from moepass.spec import DispatchSpec, RouterSpec, capacity, check_expert_choice, check_experts

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from moepass.nn.replay import Tape

#: Standard deviation of the logits of a fresh router on an input of root mean square 1: nearly uniform at every width.
LOGIT_STD = 0.1


class RouterOutput(NamedTuple):
    """What a router decides.

    ``index_TK``   int64 experts, best first; E (or above) is nobody
    ``weight_TK``  float32 weights, 0 for nobody
    ``scores_TE``  float32 scores of all experts, without bias: what losses and metrics use
    ``logits_TE``  float32
    ``token_EC``   expert choice only: the tokens of every expert (``moepass.nn.expert_choice``)
    """

    index_TK: Tensor
    weight_TK: Tensor
    scores_TE: Tensor
    logits_TE: Tensor
    token_EC: Tensor | None = None


class Router(nn.Module):
    """``weight [E, D]`` and, where the spec asks, ``linear_bias [E]``; decides by a ``RouterSpec``.

    Buffers: ``bias [E]`` float32, the correction of aux-loss-free balancing; ``tokens_per_expert [E]`` int64, what the
    forwards in training have counted since the last ``post_batch`` (not in the state dict).  ``dispatch`` gives expert
    choice its capacity.
    """

    bias: Tensor | None
    tokens_per_expert: Tensor | None

    def __init__(
        self,
        D: int,
        E: int,
        spec: RouterSpec,
        *,
        dispatch: DispatchSpec | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_experts(spec, E, "nn.Router")
        if spec.choice == "expert":
            check_expert_choice(dispatch or DispatchSpec(), "nn.Router")
        self.spec, self.dispatch = spec, dispatch or DispatchSpec()
        # What a trace may look at: no floats (see ``Rule``).
        self.rule = Rule.of(spec)
        self._jitter, self._jitters = repr(spec.jitter), spec.jitter > 0
        self._noise, self._capacity_factor = repr(spec.assignment_noise), repr(self.dispatch.capacity_factor or 0.0)
        self._counts = spec.bias_update_rate > 0
        self.tape: Tape | None = None  # set by capture_routing and replay_routing
        self.weight = nn.Parameter(torch.empty(E, D, device=device, dtype=dtype))
        self.linear_bias = nn.Parameter(torch.zeros(E, device=device, dtype=dtype)) if spec.linear_bias else None
        self.register_buffer("bias", torch.zeros(E, device=device, dtype=torch.float32) if spec.bias else None)
        counts = torch.zeros(E, device=device, dtype=torch.int64) if self._counts else None
        self.register_buffer("tokens_per_expert", counts, persistent=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw N(0, 0.1/sqrt(D)): logits of standard deviation 0.1 on normalised inputs.  No-op on the meta device.

        Biases and counts start at zero.
        """
        if self.weight.is_meta:
            return
        self.weight.normal_(0.0, LOGIT_STD / math.sqrt(self.weight.shape[1]), generator=generator)
        for tensor in (self.linear_bias, self.bias, self.tokens_per_expert):
            if tensor is not None:
                tensor.zero_()

    def materialise(self) -> None:
        """Zeros on the weight's device for whatever else is still on the meta device (conversion sets the weight)."""
        if self.weight.is_meta:
            return
        for name, tensor in [*self.named_parameters(), *self.named_buffers()]:
            if tensor.is_meta:
                zeros = torch.zeros_like(tensor, device=self.weight.device)
                trained = isinstance(tensor, nn.Parameter)
                setattr(self, name, nn.Parameter(zeros, self.weight.requires_grad) if trained else zeros)

    def logits(self, x_TD: Tensor) -> Tensor:
        """``x @ weight.T + linear_bias`` in float32: ``[T, D] -> [T, E]``."""
        return moepass.ops.router_logits(x_TD, self.weight, self.linear_bias)

    def forward(
        self, x_TD: Tensor, mask: Tensor | None = None, sequences: tuple[int, int] | None = None
    ) -> RouterOutput:
        """Experts and weights of every token, and the scores that they come from."""
        if mask is not None:
            mask = mask.reshape(-1).bool()
            x_TD = torch.where(mask.unsqueeze(-1), x_TD, 0)
        logits_TE = self.logits(self._jittered(x_TD) if self._jitters and self.training else x_TD)
        value_TE = reference.choice_values(logits_TE, self.rule)
        index_TK, weight_TK, token_EC = self._decide(value_TE, mask, sequences)
        if self._counts and self.training and self.tokens_per_expert is not None:
            # Rerun by activation checkpointing it counts twice: the update uses the sign only.
            with torch.no_grad():
                self.tokens_per_expert.add_(expert_counts(index_TK, logits_TE.shape[1])[0])
        if self.tape is not None:
            self.tape.record(index_TK, weight_TK)
        scores_TE = value_TE if self.rule.score_first else reference.scores(logits_TE, self.rule)
        return RouterOutput(index_TK, weight_TK, scores_TE, logits_TE, token_EC)

    def _decide(
        self, value_TE: Tensor, mask: Tensor | None, sequences: tuple[int, int] | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        (T, E), K = value_TE.shape, self.rule.top_k
        if self.tape is not None and self.tape.replays:
            return *self._weighed(value_TE, self.tape.next(T, value_TE.device), mask, sentinels=True), None
        if self.spec.choice == "expert":
            G, L = self.dispatch.windows(T, sequences, "nn.Router")
            C = capacity(float(self._capacity_factor), L, K, E)
            token_EC = reference.choose_tokens(value_TE, C, (G, L), mask)
            return *reference.routing_of_choice(value_TE, token_EC, self.rule), token_EC
        if self.spec.assignment == "balanced":
            index_TK, weight_TK = routing.balanced(T, K, E, self.weight, float(self._noise))
            weight_TK = (weight_TK * float(self.rule.scale)).to(value_TE.dtype)
            return *_masked(index_TK, weight_TK, mask, E), None
        if self.spec.assignment == "uniform":
            index_TK = routing.uniform(T, K, E, value_TE.device)
        elif self.spec.assignment == "random":
            index_TK = routing.random(T, K, E, self.weight)
        else:
            index_TK = reference.choose(value_TE, self.rule, bias=self.bias)
        return *self._weighed(value_TE, index_TK, mask, sentinels=False), None

    def _weighed(
        self, value_TE: Tensor, index_TK: Tensor, mask: Tensor | None, *, sentinels: bool
    ) -> tuple[Tensor, Tensor]:
        weigh = reference.weigh if sentinels else reference.weigh_all
        return _masked(index_TK, weigh(value_TE, index_TK, self.rule), mask, value_TE.shape[1])

    def _jittered(self, x_TD: Tensor) -> Tensor:
        """``x * U[1-jitter, 1+jitter]``, elementwise, in float32 (OLMo-core)."""
        jitter = float(self._jitter)
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        return x_TD.to(wide) * (1.0 - jitter + 2.0 * jitter * torch.rand_like(x_TD, dtype=wide))

    @torch.no_grad()
    def post_batch(self, *, dry_run: bool = False, group: ProcessGroup | None = None) -> Tensor | None:
        """After the optimizer's step: ``bias += rate * sign(mean(c) - c)`` and forget the counts c; returns the step.

        c is summed over ``group``, or over all ranks where torch.distributed is initialised.  ``dry_run`` changes
        nothing and returns what it would do (warm-up, as in OLMo-core).  None where the spec updates nothing.
        Source: Wang et al. 2024; centred as in torchtitan.  ``moepass.nn.post_batch(model)`` needs one all-reduce.
        """
        if self.tokens_per_expert is None:
            return None
        return self.move_bias(total_counts([self.tokens_per_expert], group)[0], dry_run=dry_run)

    @torch.no_grad()
    def move_bias(self, count_E: Tensor, *, dry_run: bool = False) -> Tensor:
        """The update of ``post_batch`` for given counts of the whole batch."""
        step_E = bias_step(count_E, self.spec)
        if not dry_run and self.bias is not None and self.tokens_per_expert is not None:
            self.bias.add_(step_E.to(self.bias.dtype))
            self.tokens_per_expert.zero_()
        return step_E

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """``model.bfloat16()`` leaves the correction bias in float32: steps of 0.001 vanish in bfloat16."""
        bias = self.bias
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if bias is not None and self.bias is not None and self.bias.dtype.itemsize < bias.dtype.itemsize:
            self.bias = bias.to(self.bias.device, torch.float32)
        return self

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        E, D = self.weight.shape
        spec = self.spec
        rule = spec.score if spec.normalize is None else f"{spec.score}/L{spec.normalize:g}"
        parts = [f"{D} -> {E}, top_k={spec.top_k}, {rule}, scale={spec.scale:g}"]
        if spec.groups > 1:
            parts.append(f"groups={spec.kept_groups} of {spec.groups} by {spec.group_score}")
        for name in ("bias", "bias_update_rate", "jitter", "assignment", "weight_on", "choice"):
            if getattr(spec, name) != RouterSpec.model_fields[name].default:
                parts.append(f"{name}={getattr(spec, name)}")
        return ", ".join(parts)


def _masked(index_TK: Tensor, weight_TK: Tensor, mask: Tensor | None, E: int) -> tuple[Tensor, Tensor]:
    if mask is None:
        return index_TK, weight_TK
    mask_T1 = mask.unsqueeze(-1)
    return torch.where(mask_T1, index_TK, E), torch.where(mask_T1, weight_TK, 0)
