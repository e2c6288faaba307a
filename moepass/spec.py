"""What a mixture-of-experts block means, without tensors: ``MoESpec = RouterSpec + ExpertSpec + DispatchSpec``.

Specs are frozen pydantic values: comparable, hashable, JSON-serialisable.  ``moepass.reference.moe`` is the
definition of what they compute; every lowering, kernel and converted checkpoint is tested against it.
"""

from __future__ import annotations

import hashlib
import math
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from moepass import errors, pointwise

#: Names of the initialisation methods that turn one dense FFN into E experts (see ``moepass.upcycle.init``).
InitMethod = Literal["virtual_groups", "copy", "split", "copy+noise", "drop"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @property
    def digest(self) -> str:
        """Short stable hash of all fields."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:12]


class RouterSpec(_Frozen):
    """How a token chooses its K experts and their weights.  Always computed in float32.

    ``score``            function from logits to scores.
    ``score_first``      True: score all experts, then take the top k (Mixtral, OLMoE); False: take the top k logits,
                         then score only those (GPT-OSS, GraniteMoE).
    ``normalize``        p of the Lp norm that the K weights are divided by (1.0: they sum to 1); None leaves them.
    ``scale``            routed scaling factor, multiplied in last (DeepSeek-V3).
    """

    top_k: int = Field(2, ge=1)
    score: Literal["softmax", "sigmoid"] = "softmax"
    score_first: bool = True
    normalize: float | None = Field(1.0, gt=0)
    scale: float = 1.0

    @model_validator(mode="after")
    def _router_can_learn(self) -> Self:
        saturates = self.normalize is not None or (self.score == "softmax" and not self.score_first)
        if self.top_k == 1 and saturates:
            raise errors.DeadRouter(normalize=self.normalize, where="RouterSpec")
        return self


class ExpertSpec(_Frozen):
    """E feed-forward experts of width F: ``w_out @ activation(w_in @ x + b_in) + b_out``.

    ``intermediate_size`` (F) and ``activation`` may be None where a dense FFN supplies them (convert, backend).
    ``activation`` is a known name (``swiglu``, ``gelu`` ...) or a pointwise expression over ``g`` (and ``u``).
    """

    num_experts: int = Field(8, ge=1)
    intermediate_size: int | None = Field(None, ge=1)
    activation: str | None = None
    bias_in: bool = False
    bias_out: bool = False
    dropout: float = Field(0.0, ge=0.0, lt=1.0)

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
    """

    capacity_factor: float | None = Field(None, gt=0)
    drop_policy: Literal["position", "probability"] = "position"

    @property
    def drops_tokens(self) -> bool:
        """Whether a token may lose an expert."""
        return self.capacity_factor is not None


def capacity(capacity_factor: float, tokens: int, top_k: int, num_experts: int) -> int:
    """Rows per expert: ``max(1, ceil(cf*T*K/E))`` (GShard; Switch Transformer)."""
    return max(1, math.ceil(capacity_factor * tokens * top_k / num_experts))


class MoESpec(_Frozen):
    """The semantics of one MoE block."""

    router: RouterSpec = RouterSpec()
    experts: ExpertSpec = ExpertSpec()
    dispatch: DispatchSpec = DispatchSpec()

    @model_validator(mode="after")
    def _enough_experts(self) -> Self:
        if self.router.top_k > self.experts.num_experts:
            raise errors.TopKTooLarge(top_k=self.router.top_k, experts=self.experts.num_experts, where="MoESpec")
        return self


class InitSpec(_Frozen):
    """How the weights of E experts are made from one dense FFN.

    ``granularity``  virtual_groups: shards G that one dense FFN is cut into (F_expert = F/G; top_k % G == 0).
    ``noise_std``    copy+noise: standard deviation relative to the weight's own.
    ``drop_ratio``   drop: share of intermediate channels that are re-initialised (Drop-Upcycling).
    """

    method: InitMethod = "virtual_groups"
    granularity: int = Field(2, ge=1)
    noise_std: float = Field(0.05, ge=0)
    drop_ratio: float = Field(0.5, ge=0, le=1)
    seed: int = 0
