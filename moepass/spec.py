"""What a mixture-of-experts block means, without tensors: routers, experts, dispatch and losses make an ``MoESpec``.

Specs are frozen pydantic values: comparable, hashable, JSON-serialisable.  ``moepass.reference.moe`` is the
definition of what they compute; every lowering, kernel and converted checkpoint is tested against it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from moepass import errors, pointwise

if TYPE_CHECKING:
    from moepass.nn.moe import MoE

#: Names of the initialisation methods that turn one dense FFN into E experts (see ``moepass.upcycle.init``).
InitMethod = Literal["virtual_groups", "copy", "split", "cluster", "copy+noise", "drop"]


#: Conventions of load-balancing losses; their formulas and scales are in ``moepass.nn.losses``.
LoadBalance = Literal["olmo_core_local", "olmo_core_instance", "maxtext", "hf", "automodel", "megatron"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @property
    def digest(self) -> str:
        """Short stable hash of all fields."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:12]


def _refuser(spec: _Frozen, where: str) -> Callable[[str, bool, str, str], None]:
    """``refuse(field, wrong, detail, remedy)`` raises ``SpecConflict`` for a field that is not at its default."""

    def refuse(field: str, wrong: bool, detail: str, remedy: str) -> None:
        value = getattr(spec, field)
        if wrong and value != type(spec).model_fields[field].default:
            raise errors.SpecConflict(field=field, value=value, where=where, detail=detail, remedy=remedy)

    return refuse


class RouterSpec(_Frozen):
    """How a token chooses its K experts and their weights.  Always computed in float32.

    ``score``            function from logits to scores; ``sqrtsoftplus`` is sqrt(log(1 + exp(logit))) (DeepSeek-V4).
    ``score_first``      True: score all experts, then take the top k (Mixtral, OLMoE); False: take the top k logits,
                         then score only those (GPT-OSS, GraniteMoE).
    ``normalize``        p of the Lp norm that the K weights are divided by (1.0: they sum to 1); None leaves them.
    ``normalize_eps``    added to that norm (1e-20 in DeepSeek-V3).  Not Ernie's clamp of the sum at 1e-12, which acts
                         only where less than that of the softmax was chosen: use 0 for it.
    ``scale``            routed scaling factor, multiplied in last (DeepSeek-V3).
    ``bias``             a correction per expert is added where experts are chosen, never to their weights (Wang et al.
                         2024, "auxiliary-loss-free"); ``bias_update_rate`` is what ``post_batch`` moves it by, and
                         ``bias_centred`` takes the mean of the step off (torchtitan).
    ``linear_bias``      the router's projection has a bias of its own (GPT-OSS).
    ``groups``           experts fall into this many groups of neighbours, and a token may use ``kept_groups`` of them:
                         those of the highest ``group_score`` (``top2``: sum of the two best scores, DeepSeek-V3;
                         ``max``: DeepSeek-V2; ``top_k_per_group``: sum of the K/kept_groups best, Megatron).
    ``jitter``           in training the input is multiplied by U[1-jitter, 1+jitter] (Switch Transformer, OLMo-core).
    ``assignment``       ``learned``, or for benchmarks: ``uniform`` (slot j of the T*K gets expert j mod E) and
                         ``random`` with the scores' weights; ``balanced`` with made-up weights and ``assignment_noise``
                         of unevenness (Automodel's FakeBalancedGate).
    ``weight_on``        ``output``: expert outputs are multiplied by the weights; ``input``: expert inputs are, and
                         outputs are summed as they are (Llama-4).
    ``choice``           ``expert``: experts choose tokens (Zhou et al. 2022), each the ``capacity`` best; needs
                         DispatchSpec.capacity_factor.
    """

    top_k: int = Field(2, ge=1)
    score: Literal["softmax", "sigmoid", "sqrtsoftplus"] = "softmax"
    score_first: bool = True
    normalize: float | None = Field(1.0, gt=0)
    normalize_eps: float = Field(0.0, ge=0)
    scale: float = 1.0
    bias: bool = False
    bias_update_rate: float = Field(0.0, ge=0)
    bias_centred: bool = False
    linear_bias: bool = False
    groups: int = Field(1, ge=1)
    kept_groups: int = Field(1, ge=1)
    group_score: Literal["top2", "max", "top_k_per_group"] = "top2"
    jitter: float = Field(0.0, ge=0, lt=1)
    assignment: Literal["learned", "uniform", "random", "balanced"] = "learned"
    assignment_noise: float = Field(0.0, ge=0, le=1)
    weight_on: Literal["output", "input"] = "output"
    choice: Literal["token", "expert"] = "token"

    @model_validator(mode="after")
    def _router_can_learn(self) -> Self:
        saturates = self.normalize is not None or (self.score == "softmax" and not self.score_first)
        if self.top_k == 1 and saturates:
            raise errors.DeadRouter(normalize=self.normalize, where="RouterSpec")
        return self

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        refuse = _refuser(self, "RouterSpec")
        refuse("normalize_eps", self.normalize is None, "has no norm to be added to", "give RouterSpec.normalize")
        refuse("bias_update_rate", not self.bias, "has no bias to update", "set RouterSpec.bias=True")
        refuse("bias_centred", not self.bias_update_rate, "centres no update", "give RouterSpec.bias_update_rate")
        refuse("assignment_noise", self.assignment != "balanced", "belongs to another assignment",
               "set RouterSpec.assignment='balanced'")  # fmt: skip
        refuse("kept_groups", self.kept_groups > self.groups, f"exceeds groups={self.groups}",
               "keep no more groups than there are")  # fmt: skip
        if self.groups > 1 and self.group_score == "top_k_per_group" and self.top_k % self.kept_groups:
            remedy = "choose a multiple, or another RouterSpec.group_score"
            raise errors.NotDivisible(what="top_k", value=self.top_k, by_what="kept_groups", by=self.kept_groups,
                                      where="RouterSpec", remedy=remedy)  # fmt: skip
        return self

    @model_validator(mode="after")
    def _expert_choice_stands_alone(self) -> Self:
        if self.choice == "token":
            return self
        refuse = _refuser(self, "RouterSpec")
        why = "means nothing where experts choose their tokens"
        if self.normalize is not None:
            detail = f"{why}: nobody knows yet who else will choose the token"
            raise errors.SpecConflict(
                field="normalize", value=self.normalize, where="RouterSpec", detail=detail, remedy="set it to None"
            )
        refuse("score_first", True, f"{why}: there is no top-k to score after", "set it to True")
        for field in ("bias", "groups", "assignment"):
            refuse(field, True, why, "leave it out, or use choice='token'")
        return self


class ExpertSpec(_Frozen):
    """E feed-forward experts of width F: ``w_out @ activation(w_in @ x + b_in) + b_out``.

    ``intermediate_size`` (F) and ``activation`` may be None where a dense FFN supplies them (convert, backend).
    ``activation`` is a known name (``swiglu``, ``gelu`` ...) or a pointwise expression over ``g`` (and ``u``).
    ``output_scale``     a learned scale per expert on what it puts out (Gemma-4).
    ``latent_size``      tokens are projected to this width before the experts and back after them (no biases); the
                         router and the shared experts see the token itself (Megatron, Automodel).
    ``shared_intermediate_size``  width of one more FFN of the same activation that every token uses: s below.
    ``shared_combine``   ``sum``: y + s (DeepSeek); ``gated``: y + sigmoid(x @ w_g) * s (Qwen2-MoE); ``mixed``:
                         (s + K*y) / (K+1) (OLMo-core).
    """

    num_experts: int = Field(8, ge=1)
    intermediate_size: int | None = Field(None, ge=1)
    activation: str | None = None
    bias_in: bool = False
    bias_out: bool = False
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    output_scale: bool = False
    latent_size: int | None = Field(None, ge=1)
    shared_intermediate_size: int | None = Field(None, ge=1)
    shared_combine: Literal["sum", "gated", "mixed"] = "sum"

    @model_validator(mode="after")
    def _something_is_shared(self) -> Self:
        alone = self.shared_intermediate_size is None
        _refuser(self, "ExpertSpec")("shared_combine", alone, "combines no shared expert",
                                     "give ExpertSpec.shared_intermediate_size")  # fmt: skip
        return self

    @field_validator("activation")
    @classmethod
    def _canonical_activation(cls, text: str | None) -> str | None:
        return None if text is None else pointwise.canonical(text)

    @property
    def n_projections(self) -> int:
        """Input projections per expert: 2 when gated, 1 when not."""
        if self.activation is None:
            raise errors.BadActivation(text=None, detail="the spec has none yet", known=pointwise.known_names())
        return pointwise.n_inputs(self.activation)


class DispatchSpec(_Frozen):
    """Which (token, expert) pairs are computed.

    ``capacity_factor``  None: dropless.  Otherwise each expert takes at most ``max(1, ceil(cf*T*K/E))`` tokens.
    ``drop_policy``      ``position``: later tokens are dropped first; ``probability``: the lowest routing weights.
    ``scope``            the T tokens over which capacity is counted: the whole ``batch``, each ``sequence`` (MaxText),
                         or each ``subsequence`` of ``subsequence_length`` tokens (it must divide the sequence).
    ``ragged_buffer_factor``  a buffer of ``ceil(factor*R)`` rows for all experts together (R = T*K; under expert
                         parallelism the rows of one rank): rows beyond it are dropped in expert order (MaxText).
    """

    capacity_factor: float | None = Field(None, gt=0)
    drop_policy: Literal["position", "probability"] = "position"
    scope: Literal["batch", "sequence", "subsequence"] = "batch"
    subsequence_length: int | None = Field(None, ge=1)
    ragged_buffer_factor: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _scope_is_complete(self) -> Self:
        refuse, dropless = _refuser(self, "DispatchSpec"), self.capacity_factor is None
        refuse("scope", dropless, "counts no capacity", "give DispatchSpec.capacity_factor")
        lonely = self.scope != "subsequence"
        refuse("subsequence_length", lonely, f"is not used by scope={self.scope!r}", "set scope='subsequence'")
        refuse("scope", not lonely and self.subsequence_length is None, "has no length to cut sequences to",
               "give DispatchSpec.subsequence_length")  # fmt: skip
        return self

    @property
    def drops_tokens(self) -> bool:
        """Whether a token may lose an expert."""
        return self.capacity_factor is not None or self.ragged_buffer_factor is not None

    def windows(self, tokens: int, sequences: tuple[int, int] | None, where: str = "dispatch") -> tuple[int, int]:
        """``(G, L)`` with G*L = T: capacity is counted in each of G windows of L neighbouring tokens.

        ``sequences=(B, S)`` with T = B*S; raises ``NoSequences`` where a scope needs it and it is missing.
        """
        if self.scope == "batch":
            return 1, tokens
        if sequences is None:
            raise errors.NoSequences(scope=self.scope, where=where)
        B, S = sequences
        L = self.subsequence_length
        if L is None:
            return B, S
        if S % L:
            remedy = "pad the sequences, or choose a divisor"
            raise errors.NotDivisible(what="the sequence length", value=S, by_what="subsequence_length", by=L,
                                      where=where, remedy=remedy)  # fmt: skip
        return B * S // L, L


def capacity(capacity_factor: float, tokens: int, top_k: int, num_experts: int) -> int:
    """Rows per expert: ``max(1, ceil(cf*T*K/E))`` (GShard; Switch Transformer)."""
    return max(1, math.ceil(capacity_factor * tokens * top_k / num_experts))


class LossSpec(_Frozen):
    """What is added to the training loss: ``load_balance_weight * balance + z_weight * z`` (``moepass.nn.losses``).

    ``load_balance``  the convention, which fixes the scale: a coefficient means something only together with it.
    ``z_weight``      coefficient of the router z-loss (ST-MoE, Zoph et al. 2022).
    ``scope``         ``local``: over this rank's tokens; ``global``: over those of all ranks of the mesh that was given
                      to ``moepass.parallelize``, so that the mean over ranks is the loss of one rank with all tokens
    ``attach``        the loss hangs on the graph of the block's output, whose value does not change; False: it is
                      returned to who asks for it.
    """

    load_balance: LoadBalance | None = None
    load_balance_weight: float = Field(0.01, ge=0)
    z_weight: float = Field(0.0, ge=0)
    scope: Literal["local", "global"] = "local"
    attach: bool = True

    @model_validator(mode="after")
    def _something_is_weighed(self) -> Self:
        alone = self.load_balance is None and self.load_balance_weight > 0
        refuse = _refuser(self, "LossSpec")
        refuse("load_balance_weight", alone, "weighs no loss", "choose LossSpec.load_balance")
        return self

    @property
    def active(self) -> bool:
        """Whether there is any loss."""
        return (self.load_balance is not None and self.load_balance_weight > 0) or self.z_weight > 0


class MoESpec(_Frozen):
    """The semantics of one MoE block."""

    router: RouterSpec = RouterSpec()
    experts: ExpertSpec = ExpertSpec()
    dispatch: DispatchSpec = DispatchSpec()
    losses: LossSpec = LossSpec()

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        check_experts(self.router, self.experts.num_experts, "MoESpec")
        if self.router.choice == "expert":
            check_expert_choice(self.dispatch, "MoESpec")
            balanced = self.losses.load_balance
            _refuser(self.losses, "MoESpec.losses")("load_balance", balanced is not None,
                "has nothing to balance: experts that choose their tokens all choose the same number",
                "leave it out, or use RouterSpec.choice='token'")  # fmt: skip
        return self

    def build(self, D: int, **factory: Any) -> MoE:
        """``moepass.nn.MoE`` of model width D; ``factory`` is ``device`` and ``dtype``."""
        from moepass.nn.moe import MoE

        return MoE(D, self, **factory)


def check_experts(router: RouterSpec, E: int, where: str) -> None:
    """Raise ``TopKTooLarge``, ``NotDivisible`` or ``SpecConflict`` where a router cannot choose among E experts."""
    if router.top_k > E:
        raise errors.TopKTooLarge(top_k=router.top_k, experts=E, where=where)
    if E % router.groups:
        raise errors.NotDivisible(what="num_experts", value=E, by_what="groups", by=router.groups, where=where,
                                  remedy="choose a divisor of the number of experts")  # fmt: skip
    members, refuse = E // router.groups, _refuser(router, where)
    reachable = router.kept_groups * members
    refuse("top_k", router.top_k > reachable, f"exceeds the {reachable} experts of kept_groups={router.kept_groups} "
           f"groups of {members}", "keep more groups")  # fmt: skip
    if router.groups == 1:
        return
    needed = {"top2": 2, "max": 1, "top_k_per_group": router.top_k // router.kept_groups}[router.group_score]
    if members < needed:
        detail = f"sums the {needed} best scores of a group, and a group has {members} expert{'s'[: members > 1]}"
        raise errors.SpecConflict(field="group_score", value=router.group_score, where=where, detail=detail,
                                  remedy="use fewer groups, or group_score='max'")  # fmt: skip


def check_expert_choice(dispatch: DispatchSpec, where: str) -> None:
    """Raise ``SpecConflict`` where experts that choose tokens are not told how many, or more than that."""
    if dispatch.capacity_factor is None:
        raise errors.SpecConflict(field="choice", value="expert", where=where, detail="does not say how many tokens",
                                  remedy="give DispatchSpec.capacity_factor")  # fmt: skip
    refuse = _refuser(dispatch, where)
    for field in ("drop_policy", "ragged_buffer_factor"):
        refuse(field, True, "drops rows, and experts that choose their tokens have none too many", "leave it out")


#: What the one-line form can say with ``moepass::route`` and ``moepass::experts`` in the place of a dense FFN.
ONE_LINE_FIELDS = {
    "router": {"top_k", "score", "score_first", "normalize", "scale"},
    "experts": {"num_experts", "intermediate_size", "activation", "bias_in", "bias_out", "dropout"},
    "dispatch": {"capacity_factor", "drop_policy"},
    "losses": {"load_balance_weight", "attach"},
}


def beyond_one_line(spec: MoESpec) -> str | None:
    """The first field (``router.bias``) that the one-line form cannot carry, though ``moepass.convert`` can."""
    for part, carried in ONE_LINE_FIELDS.items():
        value = getattr(spec, part)
        for name, field in type(value).model_fields.items():
            if name not in carried and getattr(value, name) != field.default:
                return f"{part}.{name}"
    return None


def check_one_line(spec: MoESpec, where: str) -> None:
    """Raise ``NotInOneLine`` for a spec that the backend cannot put in the place of a dense FFN by itself."""
    field = beyond_one_line(spec)
    if field is not None:
        part, _, name = field.partition(".")
        raise errors.NotInOneLine(field=field, value=getattr(getattr(spec, part), name), where=where)


class InitSpec(_Frozen):
    """How the weights of E experts are made from one dense FFN.

    ``granularity``  virtual_groups: shards G that one dense FFN is cut into (F_expert = F/G; top_k % G == 0).
    ``noise_std``    copy+noise: standard deviation relative to the weight's own.
    ``drop_ratio``   drop: share of intermediate channels that are re-initialised (Drop-Upcycling).
    ``drop_indices`` drop: ``shared``, one set of channels for gate, up and down; ``independent``, a set for each, as
                     the code released with the paper draws them (a share of (1 - r)^3 of the channels stays whole).
    """

    method: InitMethod = "virtual_groups"
    granularity: int = Field(2, ge=1)
    noise_std: float = Field(0.05, ge=0)
    drop_ratio: float = Field(0.5, ge=0, le=1)
    drop_indices: Literal["shared", "independent"] = "shared"
    seed: int = 0
