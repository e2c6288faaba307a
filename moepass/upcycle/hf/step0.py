"""How far an approximate recipe starts from the dense model, measured on the first block that it converts.

Contract
    in    the source that the recipes read, the ``Block`` (whose functions also make the tensors that are written), a
          ``Calibration`` if one was given
    out   ``Measured``: |moe(x) - dense(x)| / |dense(x)| over ``TOKENS`` tokens (Frobenius norms, float32)
    x is what the block sees on the calibration's first tokens, or else Gaussian of root mean square 1, seeded, as
    after a norm without weights.  In one thread and to three digits: the number belongs to the plan.
    Memory: one dense matrix, one matrix of one expert, some rows in float32.
The routing is ``moepass.reference.route``; the sum over experts is that of ``reference.moe``, one expert at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from moepass.reference import route
from moepass.upcycle.checkpoint.source import Source
from moepass.upcycle.hf.block import Block
from moepass.upcycle.hf.calibration import Calibration, observed, single_threaded
from moepass.upcycle.hf.pieces import Piece
from moepass.upcycle.one_expert import generator

TOKENS = 256
#: Elements of a weight that are in float32 at a time.
_PIECE = 1 << 22

Act = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Measured:
    """``error``: relative, of the block of ``layer``; ``inputs``: "gaussian" or "calibration"."""

    error: float
    layer: int
    tokens: int
    inputs: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for the report."""
        return asdict(self)

    def __str__(self) -> str:
        of = "Gaussian inputs of root mean square 1" if self.inputs == "gaussian" else "inputs from the calibration"
        return f"relative error {self.error:.3g} of the feed-forward block of layer {self.layer} on {self.tokens} {of}"


@torch.no_grad()
def measure_step0(source: Source, block: Block, calibration: Calibration | None = None) -> Measured:
    """Raises the errors of ``checkpoint.observe`` with a calibration."""
    with single_threaded():
        x_TD = _inputs(source, block, calibration)
        act = _activation(block.found.config)
        gate, up = (_linear(x_TD, _read(source, piece)) for piece in block.ins)
        dense = _linear(act(gate) * up, _read(source, block.down))
        error = relative_error(_moe(x_TD, source, block, act), dense)
    return Measured(error, block.layer, len(x_TD), "gaussian" if calibration is None else "calibration")


def relative_error(made: Tensor, dense: Tensor) -> float:
    """|made - dense| / |dense| to three digits; a finite number where the dense block gives zeros."""
    error = (made - dense).norm() / dense.norm().clamp_min(torch.finfo(torch.float32).tiny)
    return float(f"{float(error):.3g}")


def _inputs(source: Source, block: Block, calibration: Calibration | None) -> Tensor:
    if calibration is None:
        return torch.randn(TOKENS, block.D, generator=generator(block.plan.recipe.seed, f"{block.name}/step0"))
    seen: list[Tensor] = []
    observed(source.folder, calibration, [block.layer], lambda _, found: seen.append(found.x_TD[:TOKENS].clone()))
    return seen[0]


def _read(source: Source, piece: Piece) -> Tensor:
    return source.read(piece.source, *(piece.rows or ()))


def _moe(x_TD: Tensor, source: Source, block: Block, act: Act) -> Tensor:
    routing = route(_linear(x_TD, block.router_weight()), block.plan.spec.router)
    y_TD = torch.zeros_like(x_TD)
    block.learn_deviations(source.pieces)
    for e in range(block.E):
        *ins, out = block.matrices(e)
        chosen_TK = routing.index_TK == e
        tokens = chosen_TK.any(1).nonzero().flatten()
        gate, up = (_linear(x_TD[tokens], block.expert_in([_read(source, ins[p])] * 2, p, e)) for p in range(2))
        weight = (routing.weight_TK * chosen_TK).sum(1)[tokens, None]
        y_TD[tokens] += weight * _linear(act(gate) * up, block.expert_out(_read(source, out), e))
    if block.shared:
        gate, up = (_linear(x_TD, block.shared_in(_read(source, piece))) for piece in block.ins)
        y_TD += _linear(act(gate) * up, block.shared_out(_read(source, block.down))) / block.plan.shared_scale
    return y_TD


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T`` in float32; the weight is widened some rows at a time."""
    rows = max(1, _PIECE // max(1, weight.shape[1]))
    return torch.cat([x @ part.float().T for part in weight.split(rows)], dim=1)


def _activation(config: Any) -> Act:
    from transformers.activations import ACT2FN

    return ACT2FN[config.hidden_act]  # type: ignore[no-any-return]
