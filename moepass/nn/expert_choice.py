"""Expert choice: every expert takes the C tokens that it likes best (Zhou et al. 2022).

Contract
    in    ``RouterOutput.token_EC`` int64, rows of x (T: no token), made by ``reference.choose_tokens``
    out   the rows that experts compute, and their sum per token
    Every expert has the same load, no loss is needed, and a token may be chosen by none or by all.  A token's outcome
    depends on the tokens beside it, later ones included: not for autoregressive inference.
``gather`` and ``combine`` compute E*C rows where the token's view has T*E slots, most of them sentinels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moepass import reference


def gather(x_TD: Tensor, token_EC: Tensor) -> tuple[Tensor, Tensor]:
    """``(x_RD, index_R1)`` for ``moepass.ops.experts``: one row per chosen token, expert by expert, R = E*C.

    Where an expert has no token the row is some token's and the index is E.
    """
    E, T = token_EC.shape[0], x_TD.shape[0]
    token_R = token_EC.reshape(-1)
    expert_R = torch.arange(E, device=token_R.device).unsqueeze(-1).expand_as(token_EC).reshape(-1)
    x_RD = x_TD[token_R.clamp(max=max(T - 1, 0))]
    return x_RD, torch.where(token_R < T, expert_R, E).unsqueeze(-1)


def weights(weight_TE: Tensor, token_EC: Tensor) -> Tensor:
    """The weight of each row of ``gather``, ``[R, 1]``, from the token's view; 0 where there is no token."""
    E, T = token_EC.shape[0], weight_TE.shape[0]
    expert_E1 = torch.arange(E, device=token_EC.device).unsqueeze(-1)
    weight_EC = weight_TE[token_EC.clamp(max=max(T - 1, 0)), expert_E1]
    return torch.where(token_EC < T, weight_EC, 0).reshape(-1, 1)


def combine(y_RD: Tensor, token_EC: Tensor, T: int) -> Tensor:
    """Sum the rows of every token in float32: ``[R, D] -> [T, D]`` in y's dtype.

    Deterministic on the CPU, and on accelerators under ``torch.use_deterministic_algorithms``.
    """
    wide = reference.wide(y_RD.dtype)
    out = torch.zeros(T + 1, y_RD.shape[1], dtype=wide, device=y_RD.device)  # row T collects the empty slots
    return out.index_add(0, token_EC.reshape(-1), y_RD.to(wide))[:T].to(y_RD.dtype)
