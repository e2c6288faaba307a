"""An MoE block whose experts live on several ranks: what ``moepass.parallelize`` sets on it.

Contract
    Frozen and made of plain values, so that compiled code guards on them and layers share it.
    The expert weights of such a block are DTensors; the op is given this rank's part of each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

#: Parameters of ``nn.MoE`` whose first dimension is E and which are sharded.  ``output_scale`` weighs pairs before the
#: op, on the rank of the token, and stays whole.
EXPERT_WEIGHTS = ("w_in", "w_out", "b_in", "b_out")


@dataclass(frozen=True)
class ExpertParallel:
    """Arguments of ``moepass.ops.experts_ep``, and whose tokens a loss of ``LossSpec(scope="global")`` is about.

    ``buffer_factor`` is text: Dynamo would make a symbol of a number.  ``loss_groups`` have ``loss_ranks`` in all.
    """

    groups: tuple[str, ...]
    form: str
    buffer_factor: str | None = None
    tokens: int = 0
    mean: bool = True
    loss_groups: tuple[str, ...] = ()
    loss_ranks: int = 1

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of ``moepass.ops.experts_ep``."""
        factor = None if self.buffer_factor is None else float(self.buffer_factor)
        return {
            "groups": list(self.groups), "form": self.form, "buffer_factor": factor, "tokens": self.tokens,
            "mean": self.mean,
        }  # fmt: skip


def local(weight: Tensor | None) -> Any:
    """This rank's part of an expert weight, or None."""
    return weight.to_local() if isinstance(weight, DTensor) else weight
