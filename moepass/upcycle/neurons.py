"""Which neurons of a dense FFN go together.  The answer is an order: after it, every cut is a cut by index.

Contract
    in    input projections [F, D] of one dense FFN, or what its neurons did on T tokens: a_TF, the output projection's
          input, and x_TD, the block's; counts; a seed and the block's name
    out   ``order [F]``, int64 on the CPU, a permutation: neuron ``order[i]`` takes place i; rows of routers, float32
    A sum over neurons does not mind their order, so no order changes the dense function: what a method loses, it loses
    by the experts that a token leaves out.
Sources: ``reference/upcycling.md`` section 1.6: MoEfication and LLaMA-MoE (clusters of weights), CMoE (the neurons that
are most active go to a shared expert), Cluster-aware Upcycling (clusters of activations, routers from centroids).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from moepass import errors

#: Elements that are worked on at a time.
_PIECE = 1 << 22
_TINY = 1e-30


def by_weights(dense: Sequence[Tensor], keep: Tensor | None = None) -> Tensor:
    """What the neurons ``keep`` (None: all) look at, ``[F, n*D]``: their rows of every projection, each of length 1."""
    F, D = dense[0].shape[0] if keep is None else len(keep), dense[0].shape[1]
    out = torch.empty(F, len(dense) * D)
    for p, weight in enumerate(dense):
        for at in torch.arange(F).split(max(1, _PIECE // D)):
            neurons = at if keep is None else keep[at]
            out[at, p * D : (p + 1) * D] = _unit_rows(weight[neurons.to(weight.device)].detach().float().cpu())
    return out


def by_activations(a_TF: Tensor, keep: Tensor | None = None) -> Tensor:
    """When the neurons ``keep`` are active, ``[F, T]``: |activation| on every token, rows of length 1.

    Without the sign: that of a gated neuron says what it adds, not whether it matters to the token.
    """
    T, F = a_TF.shape
    neurons = torch.arange(F) if keep is None else keep
    out = torch.empty(len(neurons), T)
    for at in torch.arange(len(neurons)).split(max(1, _PIECE // T)):
        out[at] = _unit_rows(a_TF[:, neurons[at].to(a_TF.device)].detach().float().cpu().T.abs().contiguous())
    return out


def clustered(features: Tensor, E: int, seed: int, name: str) -> Tensor:
    """Order in which the clusters follow each other, F/E neurons each, ascending within: balanced k-means of features.

    ``features [F, P]`` is used up.  Raises ``MissingPackage``, and ``BadOption`` for features that are not finite.
    """
    if not bool(torch.isfinite(features).all()):
        detail = f"the neurons of {name} are not all finite, so they have no distances; cut by index with 'split'"
        raise errors.BadOption(name="init", value="cluster", detail=detail)
    from moepass.upcycle.balanced import balanced_labels  # which needs numpy, as nothing else here does

    drawn = int.from_bytes(hashlib.sha256(f"{seed}/{name}/cluster".encode()).digest()[:4], "big")
    return torch.argsort(balanced_labels(features, E, drawn), stable=True)


def most_active(a_TF: Tensor, N: int) -> Tensor:
    """The N neurons with the highest mean |activation|, ascending; ties go to the lower index."""
    mean = a_TF.detach().abs().mean(0, dtype=torch.float64)
    return torch.argsort(mean, descending=True, stable=True)[:N].sort().values.cpu()


def rest_of(chosen: Tensor, F: int) -> Tensor:
    """The other neurons, ascending."""
    left = torch.ones(F, dtype=torch.bool)
    left[chosen] = False
    return left.nonzero().flatten()


def input_centroids(x_TD: Tensor, a_TF: Tensor, order: Tensor, E: int, length: float) -> Tensor:
    """Router rows ``[E, D]`` of this length: the mean input of each expert, tokens weighted by its mean |activation|.

    Centred: what all experts share would move all logits alike.
    """
    active_ET = torch.stack([a_TF[:, part].abs().mean(1) for part in order.chunk(E)]).double()
    rows = (active_ET / active_ET.sum(1, keepdim=True).clamp_min(_TINY)) @ x_TD.double()
    return length * _unit_rows((rows - rows.mean(0)).float())


def row_centroids(gate: Tensor, order: Tensor, E: int, length: float) -> Tensor:
    """Router rows ``[E, D]`` of this length: the mean row of each expert's first input projection ``gate [F, D]``."""
    rows = torch.stack([gate.index_select(0, part).double().mean(0) for part in order.chunk(E)])
    return length * _unit_rows(rows.float())


def _unit_rows(rows: Tensor) -> Tensor:
    """Each divided by its length; rows of zeros stay.  torch shares rows among threads, never one row's sum."""
    wide = rows.double()
    return (wide / wide.square().sum(1, keepdim=True).sqrt().clamp_min(_TINY)).float()
