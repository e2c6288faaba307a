"""How far an approximate recipe in our own format starts from the dense model: its first block, on Gaussian inputs.

As ``hf.step0``, by the module that will run: ``nn.MoE`` over the weights that would be written, in float32.
Memory: one block, dense and with all its experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moepass import pointwise
from moepass.nn.moe import MoE
from moepass.nn.origin import dense_matrices
from moepass.upcycle.accept import make
from moepass.upcycle.checkpoint.source import Source
from moepass.upcycle.hf.calibration import single_threaded
from moepass.upcycle.hf.routers import router_weight
from moepass.upcycle.hf.step0 import TOKENS, Measured, relative_error
from moepass.upcycle.init import MoEWeights
from moepass.upcycle.modules import build_moe
from moepass.upcycle.one_expert import generator
from moepass.upcycle.own.plan import Draft, layer_number


@torch.no_grad()
def measure_step0(source: Source, draft: Draft) -> Measured:
    """Relative error of the first block (Frobenius norms), to three digits: the number belongs to the plan."""
    moe = next(module for module in draft.model.modules() if isinstance(module, MoE))
    origin = moe.origin
    assert origin is not None
    with single_threaded():
        read: dict[str, Tensor] = {}

        def get(name: str) -> Tensor:
            disk = draft.on_disk[name]
            if disk not in read:
                read[disk] = source.read(disk)
            return read[disk]

        x_TD = torch.randn(TOKENS, moe.D, generator=generator(origin.init.seed, f"{origin.site}/step0"))
        place = origin.places[0]
        dense = _dense(x_TD, dense_matrices(place.ups, place.down, get), str(moe.spec.experts.activation))
        rows = router_weight(draft.plan, origin.site, moe.D, torch.float32)
        weights = make(moe, place, get)._replace(router_weight=rows)
        moe = build_moe(_wide(weights), moe.spec, requires_grad=False).eval()
        error = relative_error(moe(x_TD), dense)
    return Measured(error, layer_number(origin.site) or 0, TOKENS, "gaussian")


def _wide(weights: MoEWeights) -> MoEWeights:
    b_in, b_out = (None if b is None else b.float() for b in (weights.b_in, weights.b_out))
    return MoEWeights(weights.router_weight.float(), weights.w_in.float(), weights.w_out.float(), b_in, b_out)


def _dense(x_TD: Tensor, matrices: tuple[Tensor, Tensor, Tensor | None, Tensor | None], activation: str) -> Tensor:
    w_in, w_out, b_in, b_out = (None if m is None else m.float() for m in matrices)
    assert w_in is not None
    assert w_out is not None
    return F.linear(pointwise.apply(activation, F.linear(x_TD, w_in, b_in)), w_out, b_out)
