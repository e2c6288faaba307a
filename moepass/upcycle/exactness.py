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

#: Parts of an MoE block that no init method knows how to fill.
NO_DENSE_WEIGHTS = {
    "latent_size": "its experts read tokens of another width than the dense weights do",
    "shared_intermediate_size": "all of the dense weights go to the routed experts",
}

#: Methods that give every neuron of the dense block to one expert only; they differ in which neurons go together.
SPLITS = frozenset({"split", "cluster"})

#: Weights of equal logits that are divided by ``sum + eps`` sum to 1 within this: float32 cannot tell.
NEGLIGIBLE_EPS = 1e-8


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


def rounds_nothing(scale: float) -> bool:
    """Whether weights are multiplied by it without rounding: a power of two."""
    return abs(math.frexp(scale)[0]) == 0.5


def parts(spec: MoESpec, init: InitSpec) -> int:
    """How many experts one dense FFN is cut over: G for virtual groups, E for split, 1 for copies."""
    if init.method == "virtual_groups":
        return init.granularity
    return spec.experts.num_experts if init.method in SPLITS else 1


def check(spec: MoESpec, init: InitSpec, where: str) -> None:
    """Raise ``NotDivisible`` for counts that a method cannot use, ``BadOption`` for a router that is always zero.

    ``NotFromDense`` for parts that have weights of their own: a dense block gives none.
    """
    if spec.router.scale == 0.0:
        raise errors.BadOption(name="RouterSpec.scale", value=0.0, detail=f"it silences every expert of {where}")
    for field, detail in NO_DENSE_WEIGHTS.items():
        value = getattr(spec.experts, field)
        if value is not None:
            remedy = "leave it out, or build the block with MoESpec.build and train it"
            raise errors.NotFromDense(
                field=f"ExpertSpec.{field}", value=value, where=where, detail=detail, remedy=remedy
            )
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
    score = _score_of_equal_logits(spec)
    if router.choice == "expert":
        return router.scale * score * k, False, "experts choose tokens: one may be chosen by none of them"
    if router.weight_on == "input":
        return 1.0 * k, False, "weights on the input pass through the activation, which is not linear"
    if router.assignment == "balanced":  # made-up weights that sum to 1
        return router.scale, True, "the assignment gives every token the same total weight"
    if router.normalize == 1.0:
        total = k * score / (k * score + router.normalize_eps)
        if router.normalize_eps > NEGLIGIBLE_EPS * k * score:
            why = f"normalize_eps={router.normalize_eps:g} leaves the sum of the weights to the token"
            return router.scale * total, False, why
        return router.scale * total, True, "the chosen weights are normalised to a constant sum"
    if router.normalize is not None:
        norm = math.pow(k, 1.0 / router.normalize) * score
        total = router.scale * k * score / (norm + router.normalize_eps)
        if equal_weights(spec, init) and router.normalize_eps <= NEGLIGIBLE_EPS * norm:
            return total, True, f"equal weights of L{router.normalize:g} norm 1 have a constant sum"
        return total, False, f"an L{router.normalize:g} norm does not fix the sum of the weights"
    if router.score != "softmax":
        total = router.scale * k * score
        if zero_router(spec, init):
            return total, True, f"the {router.score} of a zero router is {score:.3g}"
        return total, False, f"{router.score} scores without normalisation have no fixed sum"
    if not router.score_first or k == E:
        return router.scale, True, "the softmax over the chosen experts sums to 1"
    return router.scale * k / E, False, "the top-k mass of the softmax depends on the token"


def _score_of_equal_logits(spec: MoESpec) -> float:
    router, k, E = spec.router, spec.router.top_k, spec.experts.num_experts
    if router.score == "softmax":
        return 1.0 / (E if router.score_first else k)
    return 0.5 if router.score == "sigmoid" else math.sqrt(math.log(2.0))


def equal_weights(spec: MoESpec, init: InitSpec) -> bool:
    """Whether all experts of a token have the same logit by construction: one tied group, or a zero router."""
    return zero_router(spec, init) or (init.method == "virtual_groups" and spec.router.top_k == init.granularity)


def zero_router(spec: MoESpec, init: InitSpec) -> bool:
    """A split whose tokens use all experts starts from a zero router: every expert differs, so it still learns.

    Nowhere else: with k < E a zero router sends every token to the same k experts.
    """
    return init.method in SPLITS and spec.router.top_k == spec.experts.num_experts


def _whole_and_even(spec: MoESpec, init: InitSpec) -> bool:
    """Whether the assignment gives the shards of one dense block the same weight.  ``uniform`` takes neighbours."""
    noisy = spec.router.assignment == "balanced" and spec.router.assignment_noise > 0
    if init.method == "virtual_groups":
        return not noisy and spec.router.assignment != "random"
    return init.method not in SPLITS or not noisy


def _verdict(spec: MoESpec, init: InitSpec, constant: bool, why: str) -> tuple[bool, str]:
    factor, k, E = spec.dispatch.capacity_factor, spec.router.top_k, spec.experts.num_experts
    ragged, whole = spec.dispatch.ragged_buffer_factor, init.granularity
    if not constant and spec.router.choice == "expert":  # whose capacity drops nothing
        return False, why
    if factor is not None and factor * k < E:
        return False, f"capacity_factor={factor:g} may drop tokens (exact from {E / k:g} on)"
    if ragged is not None and ragged < 1.0:
        return False, f"ragged_buffer_factor={ragged:g} drops rows (exact from 1 on, on one rank)"
    if not _whole_and_even(spec, init):
        return False, f"assignment={spec.router.assignment!r} uses the shards of one block unevenly"
    if init.method == "virtual_groups" and spec.router.groups > 1 and (E // spec.router.groups) % whole:
        return False, f"a virtual group of {whole} lies across the router's groups of {E // spec.router.groups}"
    if init.method in SPLITS and k < E:
        return False, f"a token uses {k} of {E} distinct shards"
    if init.method == "copy+noise" and init.noise_std > 0:
        return False, f"noise of {init.noise_std:g} x the weights' standard deviation"
    if init.method == "drop" and init.drop_ratio > 0:
        own = ", drawn for each matrix on its own" if init.drop_indices == "independent" else ""
        return False, f"{init.drop_ratio:.0%} of the channels are re-initialised{own}"
    if not constant:
        return False, why
    if init.method in SPLITS:
        return True, "every token uses every shard with the same weight"
    if init.method == "virtual_groups":
        groups = k // init.granularity
        return True, f"a token chooses {groups} whole group{'s' if groups > 1 else ''}; {why}"
    return True, f"identical experts; {why} (the router's gradient is zero until the experts differ)"
