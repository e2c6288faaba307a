"""An MoE block whose experts live on several ranks: what ``moepass.parallelize`` sets on it.

Contract
    Frozen and made of plain values, so that compiled code guards on them and layers share it.
    The expert weights of such a block are DTensors; the op is given this rank's part of each.
    Under tensor parallelism each rank has rows of the gate and the same rows of the up projection, which do not follow
    one another in ``[E, n*F, D]``: ``w_in`` is then a parameter ``[E, n, F, D]`` and ``b_in`` one ``[E, n, F]``, of
    which Shard(2) is a part like any other; the op is given ``[E, n*F/tp, D]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

#: Parameters of ``nn.MoE`` whose first dimension is E and which are sharded.  ``output_scale`` weighs pairs before the
#: op, on the rank of the token, and stays whole.
EXPERT_WEIGHTS = ("w_in", "w_out", "b_in", "b_out")
#: Those that hold n projections one behind the other.
STACKED = ("w_in", "b_in")
#: The dimension of F where they are apart.
F_DIM = 2


@dataclass(frozen=True)
class ExpertParallel:
    """Arguments of ``moepass.ops.experts_ep``, and whose tokens a loss of ``LossSpec(scope="global")`` is about.

    ``buffer_factor`` is text: Dynamo would make a symbol of a number.  ``loss_groups`` have ``loss_ranks`` in all.
    ``tp`` holds no group, or one.  ``places``: ``_compat.places`` of groups and tp.
    """

    groups: tuple[str, ...]
    form: str
    buffer_factor: str | None = None
    tokens: int = 0
    mean: bool = True
    loss_groups: tuple[str, ...] = ()
    loss_ranks: int = 1
    tp: tuple[str, ...] = ()
    chunks: int = 1
    places: tuple[int, ...] = ()

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of ``moepass.ops.experts_ep``."""
        factor = None if self.buffer_factor is None else float(self.buffer_factor)
        return {
            "groups": list(self.groups), "form": self.form, "buffer_factor": factor, "tokens": self.tokens,
            "mean": self.mean, "tp": list(self.tp), "chunks": self.chunks,
            "places": list(self.places),
        }  # fmt: skip


def local(weights: Sequence[Tensor | None]) -> list[Any]:
    """This rank's parts of w_in, w_out, b_in and b_out, None for None, in the op's layout."""
    w_in, w_out, b_in, b_out = (w.to_local() if isinstance(w, DTensor) else w for w in weights)
    if w_in is not None and w_in.dim() == 4:
        w_in, b_in = w_in.flatten(1, 2), None if b_in is None else b_in.flatten(1, 2)
    return [w_in, w_out, b_in, b_out]
