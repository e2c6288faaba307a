"""The MoE block in plain PyTorch, in float64, expert by expert: what an emitted file compares its kernels with.

The emitter specialises these functions like the kernels and writes them into the file, so that it needs torch and
triton only.  ``Const`` marks parameters that are constants of the file.  Gradients come from torch.autograd.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Const = Any


def program(g: Tensor, u: Tensor) -> Tensor:
    """The block's pointwise program; this one, silu(g)*u, stands where the emitter writes the file's own."""
    return torch.nn.functional.silu(g) * u


def example(
    T: int,
    device: str,
    dtype: torch.dtype,
    D: Const,
    F: Const,
    E: Const,
    K: Const,
    N: Const,
    W_IN: Const,
    W_OUT: Const,
    BIAS_IN: Const,
    BIAS_OUT: Const,
    INDEX: Const,
    WEIGHT: Const,
) -> dict[str, Tensor]:
    """Random tokens, routing with a pair that has no expert, and weights of the experts that are used."""
    torch.manual_seed(0)
    index_R = torch.rand(T, E).argsort(1)[:, :K].reshape(-1)
    if T > 1:
        index_R[-1] = E
    given = {
        "x_TD": torch.randn(T, D, dtype=torch.float64),
        "dy_TD": torch.randn(T, D, dtype=torch.float64),
        "weight_R": torch.rand(T * K, dtype=torch.float64),
    }
    given = {name: value.to(device, dtype) for name, value in given.items()}
    given["weight_R"] = given["weight_R"].to(getattr(torch, WEIGHT))
    given["index_R"] = index_R.to(device, getattr(torch, INDEX))
    given["w_in"] = torch.empty_strided((E, N * F, D), W_IN, dtype=dtype, device=device)
    given["w_out"] = torch.empty_strided((E, D, F), W_OUT, dtype=dtype, device=device)
    for e in index_R.unique().tolist():
        if e < E:
            given["w_in"][e] = torch.randn(N * F, D, device=device) / D**0.5
            given["w_out"][e] = torch.randn(D, F, device=device) / F**0.5
    if BIAS_IN:
        given["b_in"] = torch.randn(E, N * F, device=device).to(dtype)
    if BIAS_OUT:
        given["b_out"] = torch.randn(E, D, device=device).to(dtype)
    return given


def routing(index_R: Tensor, E: Const, BLOCK_M: Const) -> dict[str, Tensor]:
    """Rows in expert order, and the M-tiles of each expert."""
    index_R = index_R.cpu().long()
    expert_R, row_R = torch.sort(torch.where((index_R < 0) | (index_R >= E), E, index_R), stable=True)
    offset_E = torch.searchsorted(expert_R, torch.arange(E + 1))
    position_R = torch.empty_like(row_R)
    position_R[row_R] = torch.arange(row_R.numel())
    position_R[index_R.ne(index_R.clamp(0, E - 1))] = -1
    tile_expert, tile_row = [], []
    for e in range(E):
        for start in range(int(offset_E[e]), int(offset_E[e + 1]), BLOCK_M):
            tile_expert.append(e)
            tile_row.append(start)
    made = {"row_R": row_R[: int(offset_E[E])], "position_R": position_R, "offset_E": offset_E}
    made["tile_expert"], made["tile_row"] = torch.tensor(tile_expert), torch.tensor(tile_row)
    return made


def block(
    given: dict[str, Tensor],
    D: Const,
    F: Const,
    E: Const,
    K: Const,
    N: Const,
    INTERLEAVED: Const,
    BIAS_IN: Const,
    BIAS_OUT: Const,
) -> tuple[dict[str, Tensor], dict[str, dict[int, Tensor]]]:
    """Every tensor of the forward and the backward pass by name; gradients of weights by name and expert."""
    index_R, dy_TD = given["index_R"].long(), given["dy_TD"].double()
    row_R = torch.sort(torch.where((index_R < 0) | (index_R >= E), E, index_R), stable=True)[1]
    rows: dict[str, list[Tensor]] = {}
    weights: dict[str, dict[int, Tensor]] = {"dw_in": {}, "dw_out": {}, "db_in": {}, "db_out": {}}
    y_TD, dx_TD = torch.zeros_like(dy_TD), torch.zeros_like(dy_TD)
    dweight_R = torch.zeros_like(given["weight_R"], dtype=torch.float64)
    for e in index_R.unique().tolist():
        if e < 0 or e >= E:
            continue
        r = row_R[index_R[row_R] == e]
        token = r // K
        x = given["x_TD"][token].double().requires_grad_()
        s = given["weight_R"][r].double().requires_grad_()
        w_in = given["w_in"][e].double().requires_grad_()
        w_out = given["w_out"][e].double().requires_grad_()
        z = x @ w_in.T
        leaves = {"dx_RD": x, "dw_in": w_in, "dw_out": w_out, "dweight_R": s}
        if BIAS_IN:
            leaves["db_in"] = given["b_in"][e].double().requires_grad_()
            z = z + leaves["db_in"]
        if N == 2 and INTERLEAVED:
            z = torch.cat([z[:, ::2], z[:, 1::2]], 1)
        if N == 2:
            h = program(z[:, :F], z[:, F:])
        else:
            h = program(z, z)
        y = h @ w_out.T
        if BIAS_OUT:
            leaves["db_out"] = given["b_out"][e].double().requires_grad_()
            y = y + leaves["db_out"]
        grads = torch.autograd.grad(s[:, None] * y, [z, *leaves.values()], dy_TD[token])
        grad = dict(zip(["dz_RN", *leaves], grads, strict=True))
        made = {
            "z_RN": z,
            "h_RF": h,
            "y_RD": y,
            "sy_RD": s[:, None] * y,
            "sh_RF": s[:, None] * h,
            "dz_RN": grad["dz_RN"],
            "dx_RD": grad["dx_RD"],
        }
        made["partial_RP"] = ((dy_TD[token] @ w_out) * h).sum(1, keepdim=True)
        for name, value in made.items():
            rows.setdefault(name, []).append(value.detach())
        for name, by_expert in weights.items():
            if name in grad:
                by_expert[e] = grad[name]
        dweight_R[r] = grad["dweight_R"]
        y_TD.index_add_(0, token, (s[:, None] * y).detach())
        dx_TD.index_add_(0, token, grad["dx_RD"])
    made = {name: torch.cat(parts) for name, parts in rows.items()}
    return {**made, "y_TD": y_TD, "dx_TD": dx_TD, "dweight_R": dweight_R}, weights


def bound(
    given: dict[str, Tensor],
    plain: dict[str, Tensor],
    maps: dict[str, Tensor],
    TILES: int,
    dtype: torch.dtype,
    PARTS: Const,
    STREAMED: Const,
) -> dict[str, Tensor]:
    """Buffers as the kernels see them: rows and tiles that nobody needs hold what must not matter."""
    R, device = given["index_R"].numel(), given["index_R"].device
    buffers = dict(given)
    for name, value in plain.items():
        whole = torch.full((R if name[-2] == "R" else len(value), value[0].numel()), float("nan"), dtype=torch.float64)
        whole[: len(value)] = value.reshape(len(value), -1)
        buffers[name] = whole.to(device, dtype)
    if STREAMED:
        return buffers | streamed(plain, maps["row_R"], R, PARTS, device, dtype)
    partial_RP = torch.zeros(R, PARTS, device=device)
    partial_RP[:, 0] = buffers["partial_RP"][:, 0]
    buffers["partial_RP"] = partial_RP
    for name, value in maps.items():
        size = {"tile_expert": TILES, "tile_row": TILES, "row_R": R}.get(name, len(value))
        whole = torch.full((size,), -1 if name == "tile_expert" else 0)
        whole[: len(value)] = value
        buffers[name] = whole.to(device, torch.int32)
    return buffers


def streamed(
    plain: dict[str, Tensor], row_R: Tensor, R: int, PARTS: Const, device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Rows that are not in expert order: each at its routed row; a sum has all of it in the first of its parts."""
    made = {}
    for name, source in (("hidden_RF", "h_RF"), ("z_SRN", "z_RN"), ("y_SRD", "y_RD")):
        whole = torch.full((R, plain[source].shape[1]), float("nan"), dtype=torch.float64)
        whole[row_R] = plain[source].cpu()
        made[name] = whole.to(device, dtype)
        if name != "hidden_RF":
            made[name] = torch.cat([whole[None], torch.zeros(PARTS - 1, *whole.shape)]).to(device, torch.float32)
    return made


def check(
    launch: Any,
    T: int,
    TILES: int,
    device: str,
    dtype: torch.dtype,
    D: Const,
    F: Const,
    E: Const,
    K: Const,
    N: Const,
    W_IN: Const,
    W_OUT: Const,
    BIAS_IN: Const,
    BIAS_OUT: Const,
    INDEX: Const,
    WEIGHT: Const,
    INTERLEAVED: Const,
    BLOCK_M: Const,
    PARTS: Const,
    STREAMED: Const,
    TAKES: Const,
    GIVES: Const,
) -> bool:
    """Whether one step, fed with plain PyTorch's tensors, gives plain PyTorch's results on T random tokens."""
    given = example(T, device, dtype, D, F, E, K, N, W_IN, W_OUT, BIAS_IN, BIAS_OUT, INDEX, WEIGHT)
    plain, weights = block(given, D, F, E, K, N, INTERLEAVED, BIAS_IN, BIAS_OUT)
    maps = routing(given["index_R"], E, BLOCK_M)
    buffers = bound(given, plain, maps, TILES, dtype, PARTS, STREAMED)
    names = TAKES
    results = launch(T, *(buffers[name] for name in names))
    good = True
    for name, got in zip(GIVES, results, strict=True):
        if name in weights:
            good &= same_weights(name, got, weights[name], TOLERANCE[dtype])
            continue
        if STREAMED and name != "y_TD":
            want = plain[{"hidden_RF": "h_RF", "z_SRN": "z_RN", "y_SRD": "y_RD"}[name]]
            got = got if name == "hidden_RF" else got.sum(0)
            good &= same(name, got[maps["row_R"].to(got.device)], want, TOLERANCE[dtype])
            continue
        want = maps[name] if name in maps else plain[name]
        if name == "partial_RP":
            got = got.sum(1, keepdim=True)
        good &= same(name, got[: len(want)], want, TOLERANCE[dtype])
        if name == "tile_expert":
            good &= bool((got[len(want) :] == -1).all())
    return good


def check_block(
    moe: Any,
    T: int,
    device: str,
    dtype: torch.dtype,
    D: Const,
    F: Const,
    E: Const,
    K: Const,
    N: Const,
    W_IN: Const,
    W_OUT: Const,
    BIAS_IN: Const,
    BIAS_OUT: Const,
    INDEX: Const,
    WEIGHT: Const,
    INTERLEAVED: Const,
    TRAIN: Const,
) -> bool:
    """Whether the steps in order give plain PyTorch's outputs, and its gradients."""
    given = example(T, device, dtype, D, F, E, K, N, W_IN, W_OUT, BIAS_IN, BIAS_OUT, INDEX, WEIGHT)
    plain, weights = block(given, D, F, E, K, N, INTERLEAVED, BIAS_IN, BIAS_OUT)
    index_TK, dy_TD = given.pop("index_R").view(T, K), given.pop("dy_TD")
    given["weight_TK"] = given.pop("weight_R").view(T, K)
    leaves = {name: value.requires_grad_() for name, value in given.items()} if TRAIN else given
    y_TD = moe(index_TK=index_TK, **leaves)
    tolerance = 2.0 * TOLERANCE[dtype]  # two products and their roundings
    good = same("y_TD", y_TD, plain["y_TD"], tolerance)
    if TRAIN:
        grads = torch.autograd.grad(y_TD, list(leaves.values()), dy_TD)
        for name, got in zip(leaves, grads, strict=True):
            if name in ("x_TD", "weight_TK"):
                want = plain["dx_TD"] if name == "x_TD" else plain["dweight_R"].view(T, K)
                good &= same(f"d{name}", got, want, tolerance)
            else:
                good &= same_weights(f"d{name}", got, weights[f"d{name}"], tolerance)
    return good


#: Largest error allowed, of the largest value.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}


def same_weights(name: str, got: Tensor, want: dict[int, Tensor], tolerance: float) -> bool:
    """Each expert's gradient is near what autograd says, and zero for an expert without tokens."""
    good = True
    for e in range(len(got)):
        good &= same(f"{name}[{e}]", got[e], want.get(e, torch.zeros_like(got[e])), tolerance)
    return good


def same(name: str, got: Tensor, want: Tensor, tolerance: float) -> bool:
    """Whether the largest difference is within ``tolerance`` of the largest value; says so where it is not."""
    got, want = got.double(), want.to(got.device).double()
    error, size = (got - want).abs().max().item(), want.abs().max().item()
    if error <= tolerance * size:
        return True
    print(f"{name}: the largest error is {error:.3g}, the largest value {size:.3g}")
    return False
