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
    split           E distinct shards of width F/E, cut by index
    cluster         the same after balanced k-means of the neurons by their weights (``upcycle.neurons``)
    copy+noise      copies, plus N(0, noise_std * std(W)) on both matrices
    drop            copies; per expert a share of the channels is redrawn from N(mean, std) of the entries it replaces,
                    one index set for gate, up and down, or one for each (Drop-Upcycling, Nakamura et al. 2025)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moepass import errors, pointwise
from moepass.nn.router import LOGIT_STD
from moepass.spec import InitSpec, MoESpec
from moepass.upcycle.exactness import check, exactness, parts, zero_router
from moepass.upcycle.neurons import by_weights, clustered
from moepass.upcycle.one_expert import expert_bias, expert_in, expert_out, generator, moments, scaled

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
    experts: range | None = None,
) -> MoEWeights:
    """Weights of the MoE that ``spec`` (completed) describes, in fresh memory.  Raises the errors of ``complete``.

    ``w_in [n*F, D]`` gate rows first, ``w_out [D, F]``, ``b_in [n*F]``, ``b_out [D]``.  ``name`` is the site's name; it
    seeds the draws.  ``experts``: these alone are made, the router's rows are those of all.  "cluster" also raises
    ``MissingPackage``, and ``BadOption`` for weights that are not finite.
    """
    E, n, cut = spec.experts.num_experts, spec.experts.n_projections, parts(spec, init)
    D, F = w_out.shape
    _agree("intermediate_size", spec.experts.intermediate_size, F // cut, name)
    verdict = exactness(spec, init)
    dense, f = w_in.split(F), F // cut
    made = range(E) if experts is None else experts
    W_in, W_out = w_in.new_empty(len(made), n * f, D), w_out.new_empty(len(made), D, f)
    noisy = init.method == "copy+noise"
    std_in, std_out = (moments(w)[1] if noisy and not w.is_meta else None for w in (w_in, w_out))
    order = None
    if init.method == "cluster" and not w_in.is_meta:
        order = clustered(by_weights(dense), E, init.seed, name)
    for i, e in enumerate(made):
        for p in range(n):
            W_in[i, p * f : (p + 1) * f] = expert_in(dense, p, e, cut, init, name, std_in, order)
        W_out[i] = expert_out(w_out, e, cut, verdict.scale, init, name, std_out, order)
    B_out = None
    if spec.experts.bias_out:
        B_out = (
            w_out.new_zeros(len(made), D) if b_out is None else scaled(b_out.repeat(len(made), 1), verdict.out_scale)
        )
    B_in = _input_biases(b_in, w_in, spec, init, name, order, made)
    return MoEWeights(router_rows(spec, init, name, w_in), W_in, W_out, B_in, B_out)


def _input_biases(
    b_in: Tensor | None, like: Tensor, spec: MoESpec, init: InitSpec, name: str, order: Tensor | None, made: range
) -> Tensor | None:
    """``[len(made), n*F/cut]``: cut, ordered and redrawn as the rows are; none stays zero."""
    n, cut = spec.experts.n_projections, parts(spec, init)
    if b_in is None:
        width = n * (spec.experts.intermediate_size or 0)
        return like.new_zeros(len(made), width) if spec.experts.bias_in else None
    dense = b_in.chunk(n)
    rows = [[expert_bias(dense[p], p, e, cut, init, name, order) for p in range(n)] for e in made]
    return torch.stack([torch.cat(row) for row in rows])


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
    draw = torch.randn(E // tied, D, generator=generator(init.seed, f"{name}/router"), dtype=torch.float32)
    rows = torch.cat([_orthonormal(block) for block in draw.double().split(D)])
    return (LOGIT_STD * rows).float().repeat_interleave(tied, 0).to(like)


def _orthonormal(rows: Tensor) -> Tensor:
    """Rows made orthonormal (Gram-Schmidt by QR with a positive diagonal, hence unique)."""
    q, r = torch.linalg.qr(rows.T)
    unique: Tensor = (q * torch.sign(torch.diagonal(r))).T
    return unique
