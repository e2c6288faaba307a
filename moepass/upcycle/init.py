"""Init methods: pure functions from one dense FFN to the weights of E experts and a router.

Contract
    in    one dense FFN: w_in [n*F, D] (gate rows first), w_out [D, F], b_in [n*F]?, b_out [D]?; specs; a name
    out   MoEWeights in the dense dtype and on the dense device (meta stays meta)
    Deterministic from (seed, name): every tensor has its own generator, drawn on the CPU in float32 and then cast, so
    the values are the same on every rank and device and in every order of conversion.
Methods (sources in ``reference/upcycling.md`` sections 1.1 to 1.3)
    virtual_groups  F cut into G shards, E/G copies of each; the G router rows of a group are tied, so a token always
                    chooses whole groups (He et al. 2024).  Experts of a group stand side by side.
    copy            E copies (Komatsuzaki et al. 2022)
    split           E distinct shards of width F/E
    copy+noise      copies, plus N(0, noise_std * std(W)) on both matrices
    drop            copies; per expert a share of the channels is redrawn from N(mean, std) of the entries it replaces,
                    one index set for gate, up and down (Drop-Upcycling, Nakamura et al. 2025)
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor

from moepass import errors, pointwise
from moepass.nn.router import LOGIT_STD
from moepass.spec import InitSpec, MoESpec
from moepass.upcycle.exactness import check, exactness, parts, zero_router

__all__ = ["MoEWeights", "complete", "exactness", "initialise", "router_rows"]


class MoEWeights(NamedTuple):
    """``router_weight [E, D]``, ``w_in [E, n*F, D]``, ``w_out [E, D, F]``, ``b_in [E, n*F]``, ``b_out [E, D]``."""

    router_weight: Tensor
    w_in: Tensor
    w_out: Tensor
    b_in: Tensor | None = None
    b_out: Tensor | None = None


def complete(
    spec: MoESpec,
    *,
    F: int,
    D: int,
    program: str,
    init: InitSpec,
    bias_in: bool,
    bias_out: bool,
    dropout: float = 0.0,
    where: str = "the dense block",
) -> MoESpec:
    """Fill in what a dense FFN of widths D and F decides: F per expert, activation, bias flags, dropout.

    Raises ``NotDivisible`` where widths or counts do not divide, ``SpecContradictsDense`` where the spec differs.
    A bias that the spec asks for and the dense FFN lacks starts at zero; the spec's own dropout wins if it has one.
    """
    check(spec, init, where)
    cut = parts(spec, init)
    if F % cut:
        by_what = "granularity" if init.method == "virtual_groups" else "num_experts"
        remedy = f"choose a divisor of {F} (the block is {D} -> {F} -> {D})"
        raise errors.NotDivisible(what="the width F", value=F, by_what=by_what, by=cut, where=where, remedy=remedy)
    given = spec.experts
    _agree("intermediate_size", given.intermediate_size, F // cut, where)
    _agree("activation", given.activation, pointwise.canonical(program), where)
    experts = given.model_copy(
        update={
            "intermediate_size": F // cut,
            "activation": pointwise.canonical(program),
            "bias_in": given.bias_in or bias_in,
            "bias_out": given.bias_out or bias_out,
            "dropout": given.dropout or dropout,
        }
    )
    return spec.model_copy(update={"experts": experts})


def _agree(field: str, value: object, dense: object, where: str) -> None:
    if value is not None and value != dense:
        raise errors.SpecContradictsDense(field=field, value=value, dense=dense, where=where)


@torch.no_grad()
def initialise(
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    spec: MoESpec,
    init: InitSpec,
    name: str,
) -> MoEWeights:
    """Weights of the MoE that ``spec`` (completed) describes, in fresh memory.  Raises the errors of ``complete``.

    ``w_in [n*F, D]`` gate rows first, ``w_out [D, F]``, ``b_in [n*F]``, ``b_out [D]``.  ``name`` is the site's name; it
    seeds the draws.
    """
    E, n, cut = spec.experts.num_experts, spec.experts.n_projections, parts(spec, init)
    _agree("intermediate_size", spec.experts.intermediate_size, w_out.shape[1] // cut, name)
    verdict = exactness(spec, init)
    W_in, W_out, B_in = _expert_weights(w_in, w_out, b_in, n, E, cut)
    if spec.experts.bias_in and B_in is None:
        B_in = w_in.new_zeros(W_in.shape[:2])
    if init.method == "copy+noise" and not w_in.is_meta:
        W_in, W_out = _with_noise(W_in, init, f"{name}/w_in"), _with_noise(W_out, init, f"{name}/w_out")
    if init.method == "drop" and not w_in.is_meta:
        W_in, W_out, B_in = _dropped(W_in, W_out, B_in, n, init, name)
    B_out = None
    if spec.experts.bias_out:
        B_out = w_out.new_zeros(E, w_out.shape[0]) if b_out is None else _scaled(b_out.repeat(E, 1), verdict.out_scale)
    return MoEWeights(router_rows(spec, init, name, w_in), W_in, _scaled(W_out, verdict.scale), B_in, B_out)


def _expert_weights(
    w_in: Tensor, w_out: Tensor, b_in: Tensor | None, n: int, E: int, cut: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Expert e is shard ``e % cut`` of the dense FFN: ``[E, n*F/cut, D]``, ``[E, D, F/cut]``, ``[E, n*F/cut]``."""
    D, F = w_out.shape
    f, copies = F // cut, E // cut
    shards_in = w_in.reshape(n, cut, f, D).transpose(0, 1).reshape(cut, n * f, D)
    shards_out = w_out.reshape(D, cut, f).transpose(0, 1)
    shards_b = None if b_in is None else b_in.reshape(n, cut, f).transpose(0, 1).reshape(cut, n * f)
    return (
        shards_in.repeat(copies, 1, 1),
        shards_out.repeat(copies, 1, 1),
        None if shards_b is None else shards_b.repeat(copies, 1),
    )


def _scaled(weight: Tensor, scale: float) -> Tensor:
    """One rounding, to the weight's own dtype."""
    if scale == 1.0:
        return weight
    return (weight.to(torch.promote_types(weight.dtype, torch.float32)) * scale).to(weight.dtype)


def router_rows(spec: MoESpec, init: InitSpec, name: str, like: Tensor) -> Tensor:
    """Router weight ``[E, D]`` in the dtype and on the device of ``like [..., D]``.

    Rows of length 0.1, tied within a virtual group and orthogonal between groups (per block of D groups): logits of
    standard deviation 0.1 on normalised inputs as N(0, 0.1/sqrt(D)) would give, but spread evenly over the directions,
    so that no two experts compete for the same tokens.  Zero for a split that uses all experts (``zero_router``).
    """
    E, D = spec.experts.num_experts, like.shape[-1]
    if like.is_meta or zero_router(spec, init):
        return like.new_zeros(E, D)
    tied = init.granularity if init.method == "virtual_groups" else 1
    draw = torch.randn(E // tied, D, generator=_generator(init.seed, f"{name}/router"), dtype=torch.float32)
    rows = torch.cat([_orthonormal(block) for block in draw.double().split(D)])
    return (LOGIT_STD * rows).float().repeat_interleave(tied, 0).to(like)


def _orthonormal(rows: Tensor) -> Tensor:
    """Rows made orthonormal (Gram-Schmidt by QR with a positive diagonal, hence unique)."""
    q, r = torch.linalg.qr(rows.T)
    unique: Tensor = (q * torch.sign(torch.diagonal(r))).T
    return unique


def _generator(seed: int, key: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _normal(shape: torch.Size, init: InitSpec, key: str) -> Tensor:
    return torch.randn(shape, generator=_generator(init.seed, key), dtype=torch.float32)


def _with_noise(weight: Tensor, init: InitSpec, key: str) -> Tensor:
    """Each expert gets its own noise, relative to the standard deviation of the dense matrix."""
    if init.noise_std == 0.0:
        return weight
    std = float(weight[0].detach().cpu().double().std(correction=0)) * init.noise_std
    for e in range(weight.shape[0]):
        noise = _normal(weight[e].shape, init, f"{key}/{e}").to(weight.device)
        weight[e] = (weight[e].to(torch.promote_types(weight.dtype, torch.float32)) + std * noise).to(weight.dtype)
    return weight


def _dropped(
    w_in: Tensor, w_out: Tensor, b_in: Tensor | None, n: int, init: InitSpec, name: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Redraw the same channels of gate, up and down; the bias of a redrawn channel is redrawn likewise."""
    E, _, F = w_out.shape
    count = round(init.drop_ratio * F)
    for e in range(E if count else 0):
        order = torch.randperm(F, generator=_generator(init.seed, f"{name}/drop/{e}"))
        channels = order[:count].sort().values.to(w_in.device)
        for p in range(n):
            w_in[e, channels + p * F] = _redrawn(w_in[e, channels + p * F], init, f"{name}/w_in/{e}/{p}")
            if b_in is not None:
                b_in[e, channels + p * F] = _redrawn(b_in[e, channels + p * F], init, f"{name}/b_in/{e}/{p}")
        w_out[e][:, channels] = _redrawn(w_out[e][:, channels], init, f"{name}/w_out/{e}")
    return w_in, w_out, b_in


def _redrawn(old: Tensor, init: InitSpec, key: str) -> Tensor:
    """N(mean, std) of the entries it replaces; the statistics are taken on the CPU, to be the same everywhere."""
    values = old.detach().cpu().double()
    new = values.mean() + values.std(correction=0) * _normal(old.shape, init, key)
    return new.to(old)
