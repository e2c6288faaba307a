"""When the upcycled block computes the dense function, and the scale that makes it so.

Notation: y = sum of w_i(x) E_i(x) over the k chosen experts; S is the total weight sum(w_i).  An init method is exact
if and only if every part of the dense FFN receives a total weight that does not depend on x; the inverse of that weight
is then the scale on ``w_out`` (never on the input projections: activations are not homogeneous).
Source: ``reference/upcycling.md`` section 1.0 (He et al. 2024 for virtual groups; Megatron-LM's cube-root split of the
scale over gate, up and down is not exact for SiLU and GELU, so it is not offered).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from moepass import errors
from moepass.spec import InitSpec, MoESpec


@dataclass(frozen=True)
class Exactness:
    """Whether step 0 of the MoE is the dense function.

    ``scale``      factor on ``w_out``
    ``out_scale``  factor on ``b_out`` (every chosen expert adds its bias with its weight)
    """

    exact: bool
    reason: str
    scale: float
    out_scale: float


def parts(spec: MoESpec, init: InitSpec) -> int:
    """How many experts one dense FFN is cut over: G for virtual groups, E for split, 1 for copies."""
    if init.method == "virtual_groups":
        return init.granularity
    return spec.experts.num_experts if init.method == "split" else 1


def check(spec: MoESpec, init: InitSpec, where: str) -> None:
    """Raise ``NotDivisible`` for counts that a method cannot use, ``BadOption`` for a router that is always zero."""
    if spec.router.scale == 0.0:
        raise errors.BadOption(name="RouterSpec.scale", value=0.0, detail=f"it silences every expert of {where}")
    if init.method != "virtual_groups":
        return
    G = init.granularity
    for what, value in (("num_experts", spec.experts.num_experts), ("top_k", spec.router.top_k)):
        if value % G:
            remedy = f"choose a multiple of {G}, or another InitSpec.granularity"
            raise errors.NotDivisible(what=what, value=value, by_what="granularity", by=G, where=where, remedy=remedy)


def exactness(spec: MoESpec, init: InitSpec) -> Exactness:
    """The verdict on a method with a router class.  Raises as ``check``."""
    check(spec, init, "MoESpec")
    total, constant, why = total_weight(spec, init)
    exact, reason = _verdict(spec, init, constant, why)
    return Exactness(exact, reason, parts(spec, init) / total, 1.0 / total)


def total_weight(spec: MoESpec, init: InitSpec) -> tuple[float, bool, str]:
    """``(S, constant, why)``: the total routing weight of a token, and whether it is the same for every token.

    Where it is not constant, S is its value for equal logits.
    """
    router, k, E = spec.router, spec.router.top_k, spec.experts.num_experts
    if router.normalize == 1.0:
        return router.scale, True, "the chosen weights are normalised to a constant sum"
    if router.normalize is not None:
        total = router.scale * math.pow(k, 1.0 - 1.0 / router.normalize)
        if equal_weights(spec, init):
            return total, True, f"equal weights of L{router.normalize:g} norm 1 have a constant sum"
        return total, False, f"an L{router.normalize:g} norm does not fix the sum of the weights"
    if router.score == "sigmoid":
        if zero_router(spec, init):
            return router.scale * k / 2.0, True, "the sigmoid of a zero router is 1/2"
        return router.scale * k / 2.0, False, "sigmoid scores without normalisation have no fixed sum"
    if not router.score_first or k == E:
        return router.scale, True, "the softmax over the chosen experts sums to 1"
    return router.scale * k / E, False, "the top-k mass of the softmax depends on the token"


def equal_weights(spec: MoESpec, init: InitSpec) -> bool:
    """Whether all experts of a token have the same logit by construction: one tied group, or a zero router."""
    return zero_router(spec, init) or (init.method == "virtual_groups" and spec.router.top_k == init.granularity)


def zero_router(spec: MoESpec, init: InitSpec) -> bool:
    """A split whose tokens use all experts starts from a zero router: every expert differs, so it still learns.

    Nowhere else: with k < E a zero router sends every token to the same k experts.
    """
    return init.method == "split" and spec.router.top_k == spec.experts.num_experts


def _verdict(spec: MoESpec, init: InitSpec, constant: bool, why: str) -> tuple[bool, str]:
    factor, k, E = spec.dispatch.capacity_factor, spec.router.top_k, spec.experts.num_experts
    if factor is not None and factor * k < E:
        return False, f"capacity_factor={factor:g} may drop tokens (exact from {E / k:g} on)"
    if init.method == "split" and k < E:
        return False, f"a token uses {k} of {E} distinct shards"
    if init.method == "copy+noise" and init.noise_std > 0:
        return False, f"noise of {init.noise_std:g} x the weights' standard deviation"
    if init.method == "drop" and init.drop_ratio > 0:
        return False, f"{init.drop_ratio:.0%} of the channels are re-initialised"
    if not constant:
        return False, why
    if init.method == "split":
        return True, "every token uses every shard with the same weight"
    if init.method == "virtual_groups":
        groups = k // init.granularity
        return True, f"a token chooses {groups} whole group{'s' if groups > 1 else ''}; {why}"
    return True, f"identical experts; {why} (the router's gradient is zero until the experts differ)"
