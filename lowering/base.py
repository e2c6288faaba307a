"""What a lowering is: a name, a legality check, a price, and a differentiable PyTorch program."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from moepass import pointwise
from moepass.lowering.plan import Price, Verdict, Workload

if TYPE_CHECKING:
    from moepass.lowering.hardware import Hardware


@dataclass(frozen=True)
class ExpertArgs:
    """Operands of ``moepass::experts`` besides the tokens and the routing.

    ``w_in [E, n*F, D]``, ``w_out [E, D, F]``, ``b_in [E, n*F]``, ``b_out [E, D]``; ``activation`` is an expression.
    """

    w_in: Tensor
    w_out: Tensor
    b_in: Tensor | None
    b_out: Tensor | None
    activation: str
    dropout: float = 0.0  # probability on the hidden activations; 0.0 when not training
    capacity_factor: float = 0.0  # 0.0: dropless
    drop_policy: str = "position"
    interleaved: bool = False  # gate and up rows alternate (GPT-OSS)

    @property
    def E(self) -> int:
        """Experts."""
        return self.w_in.shape[0]


class Lowering(ABC):
    """One way to compute the experts.  Stateless; registered once by name in ``moepass.lowering.registry``."""

    name: ClassVar[str]
    #: The lowering that takes its place where nothing is differentiated, if it has one: a plan may name this one there.
    inference: ClassVar[str | None] = None

    @abstractmethod
    def legal(self, work: Workload) -> Verdict:
        """Whether this lowering computes exactly what the workload's spec says, with a reason code if not."""

    @abstractmethod
    def price(self, work: Workload, hw: Hardware) -> Price:
        """Estimated cost: forward, or forward and backward if ``work.train``."""

    def computed_rows(self, load_E: Sequence[int], work: Workload) -> int:  # noqa: ARG002
        """Rows that its GEMMs compute where expert e was sent ``load_E[e]`` assignments, padding included."""
        return sum(load_E)

    @abstractmethod
    def build(self, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor, args: ExpertArgs) -> Tensor:
        """``y_TD`` in x's dtype, summed over experts in float32; plain differentiable torch code.

        ``index_TK`` int32 or int64.  A pair whose index lies outside ``0..E-1`` (we write E) is not computed: it adds
        nothing, takes no capacity, and neither its weight (gradient zero) nor its token's values matter.
        """


def keeps_all_tokens(work: Workload) -> Verdict:
    """Legality shared by the lowerings that never drop an assignment."""
    if work.capacity_factor is not None:
        return Verdict.no("drops_tokens", "the spec drops tokens over capacity; this lowering keeps them all")
    return Verdict.yes()


def computed_weights(index_TK: Tensor, weight_TK: Tensor, E: int) -> Tensor:
    """The weights, zero and without a gradient where the pair is not computed, whatever stands there."""
    return torch.where(index_TK.clamp(0, E - 1) == index_TK, weight_TK, 0.0)


def activate(h: Tensor, args: ExpertArgs, dim: int = -1) -> Tensor:
    """Pointwise program and dropout on stacked pre-activations; ``dim`` holds the features: n*F in, F out."""
    h = pointwise.apply(args.activation, h, dim=dim, interleaved=args.interleaved)
    return F.dropout(h, args.dropout, training=True) if args.dropout > 0.0 else h
