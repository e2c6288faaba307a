"""A recipe: how many experts, made how, routed how; what it promises is known before anything runs.

Contract
    in    ``Recipe`` (what the user asked for) and the host's routing rule
    out   ``Plan``: the specs that ``upcycle.init`` and ``upcycle.exactness`` understand, the verdict, warnings
Verdicts: EXACT (the same function at step 0) or APPROX (the report says how far).  What cannot be done raises.
Source: ``reference/upcycling.md`` section 1.0 for scales and for what does not train.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from moepass import errors
from moepass.nn.router import LOGIT_STD
from moepass.spec import ExpertSpec, InitMethod, InitSpec, MoESpec, RouterSpec
from moepass.upcycle.exactness import Exactness, exactness, parts, rounds_nothing, zero_router
from moepass.upcycle.hf import methods
from moepass.upcycle.hf.hosts import HOSTS, Host
from moepass.upcycle.hf.routers import ROUTERS

#: Names on the command line -> names in ``InitSpec``.
METHODS: dict[str, InitMethod] = {
    "copy": "copy",
    "virtual-groups": "virtual_groups",
    "noise": "copy+noise",
    "drop": "drop",
    "split": "split",
    "cluster": "cluster",
}

#: Dtype code -> codes that hold its values exactly.
_EXACT_CASTS = {
    "F64": {"F64"},
    "F32": {"F32", "F64"},
    "BF16": {"BF16", "F32", "F64"},
    "F16": {"F16", "F32", "F64"},
}

#: Standard deviation of logits above which a softmax over all experts is no longer nearly uniform (factor 1.13 on E/k).
_SHARP = 0.25

#: Virtual groups: router_std / (learning rate * D) is about the number of steps in which Adam can move a router row by
#: its own length.  It alone decided, for D = 32 to 128, how many tokens kept whole groups after 50 steps: 24 % at 1,
#: 92 % at 10, 97 % at 30, where the bump is nearly that of copies (docs/upcycle.md, "What it does to quality").
_STEADY_STD, _STEADY_STEPS = 3.0, 30.0


@dataclass(frozen=True)
class Recipe:
    """What the user asks for.

    ``experts``, ``top_k``  E experts in all, K of them per token
    ``method``       a key of ``METHODS``
    ``granularity``  virtual-groups: shards per dense block; noise_std, drop_ratio: as in ``InitSpec``
    ``drop_indices`` drop: as in ``InitSpec``
    ``cluster_on``   cluster: ``weights`` or ``activations`` (which need a calibration)
    ``shared``       split, cluster: so many neurons, the most active ones on a calibration, become the shared expert
    ``router``       a key of ``routers.ROUTERS``
    ``router_std``   standard deviation of the logits at step 0, on inputs of root mean square 1
    ``renormalize``  the K weights sum to 1; False: as the softmax (or sigmoid) leaves them
    """

    method: str = "copy"
    experts: int = 8
    top_k: int = 2
    granularity: int = 2
    noise_std: float = 0.05
    drop_ratio: float = 0.5
    drop_indices: str = "shared"
    cluster_on: str = "weights"
    shared: int = 0
    router: str = "orthogonal"
    router_std: float = LOGIT_STD
    renormalize: bool = True
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for the report."""
        return asdict(self)


@dataclass(frozen=True)
class Plan:
    """A recipe that fits its host.

    ``verdict.scale``  factor on output projections; ``shared_scale``: on that of the shared expert
    ``cut``            shards per block; ``width``: neurons of one
    """

    recipe: Recipe
    spec: MoESpec
    init: InitSpec
    verdict: Exactness
    cut: int
    width: int
    warnings: tuple[str, ...]
    shared_scale: float = 1.0

    @property
    def zero_router(self) -> bool:
        """Whether all experts get equal weights: a split whose tokens use every expert."""
        return zero_router(self.spec, self.init)


def plan(recipe: Recipe, host: Host, F: int, difference: str | None = None) -> Plan:
    """Check a recipe against its host and the dense width F.

    ``difference``: why the weights that the experts are made from are not the dense ones (several parents).
    Raises ``BadOption``, ``NotDivisible``, ``TopKTooLarge``, and ``DeadRouter`` for a router that could never learn.
    """
    _check_options(recipe, host)
    init = InitSpec(
        method=METHODS[recipe.method],
        granularity=recipe.granularity,
        noise_std=recipe.noise_std,
        drop_ratio=recipe.drop_ratio,
        drop_indices=recipe.drop_indices,
        seed=recipe.seed,
    )
    spec = MoESpec(router=_router(recipe, host), experts=ExpertSpec(num_experts=recipe.experts))
    verdict, cut = exactness(spec, init), parts(spec, init)
    if difference is not None:
        verdict = replace(verdict, exact=False, reason=difference)
    if recipe.shared:
        methods.check_shared(recipe.shared, recipe.experts, host, F)
    elif F % cut:
        remedy = f"choose a divisor of {F}"
        by = "granularity" if recipe.method == "virtual-groups" else "experts"
        raise errors.NotDivisible(what="the width", value=F, by_what=by, by=cut, where="the model", remedy=remedy)
    if recipe.router == "zero" and not zero_router(spec, init):
        detail = "every token would use the same experts, and the others get no gradient; leave it out"
        raise errors.BadOption(name="router", value="zero", detail=detail)
    width = (F - recipe.shared) // cut
    warnings, scale = tuple(_warnings(recipe, spec, verdict, width)), 1.0
    if recipe.shared and host.shared is not None:
        verdict = replace(verdict, reason=f"{recipe.shared} of {F} neurons in the shared expert; {verdict.reason}")
        scale = 1.0 / host.shared.weight
    return Plan(recipe, spec, init, verdict, cut, width, warnings, scale)


def rounding(plan: Plan, sources: Iterable[str], experts: str, wanted: str | None) -> str | None:
    """Why the weights on disk are not those of the maths, or None.

    Codes of safetensors: of the floating tensors of the source, of the output's experts, and what the user wants.
    """
    lossy = sorted(code for code in set(sources) if wanted is not None and wanted not in _EXACT_CASTS[code])
    if lossy:
        return f"weights are rounded from {', '.join(lossy)} to {wanted}"
    if experts in {"BF16", "F16"} and not rounds_nothing(plan.verdict.scale):
        return f"the scale {plan.verdict.scale:g} is not a power of two, so output projections are rounded to {experts}"
    return None


def _router(recipe: Recipe, host: Host) -> RouterSpec:
    update: dict[str, Any] = {"top_k": recipe.top_k}
    if not recipe.renormalize:
        update |= {"normalize": None, "normalize_eps": 0.0}
    return RouterSpec(**(host.router.model_dump() | update))


def _check_options(recipe: Recipe, host: Host) -> None:
    if recipe.method not in METHODS:
        raise errors.BadOption(name="init", value=recipe.method, detail=f"choose one of {', '.join(METHODS)}")
    if recipe.router not in ROUTERS:
        raise errors.BadOption(name="router", value=recipe.router, detail=f"choose one of {', '.join(ROUTERS)}")
    methods.check_options(recipe)
    for name in ("experts", "top_k", "granularity"):
        value = getattr(recipe, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise errors.BadOption(name=name, value=value, detail="give a whole number of at least 1")
    if recipe.experts < 2:
        raise errors.BadOption(name="experts", value=recipe.experts, detail="one expert is the dense model")
    if recipe.top_k > recipe.experts:
        raise errors.TopKTooLarge(top_k=recipe.top_k, experts=recipe.experts, where="the recipe")
    if not (0 <= recipe.noise_std < math.inf):
        raise errors.BadOption(name="noise_std", value=recipe.noise_std, detail="give a number of at least 0")
    if not 0 <= recipe.drop_ratio <= 1:
        raise errors.BadOption(name="drop_ratio", value=recipe.drop_ratio, detail="give a share between 0 and 1")
    if not 0 < recipe.router_std < math.inf:
        raise errors.BadOption(name="router_std", value=recipe.router_std, detail="give a number above 0")
    if not 0 <= recipe.seed < 2**63:
        raise errors.BadOption(name="seed", value=recipe.seed, detail="give a whole number from 0 on")
    if not recipe.renormalize and not host.can_leave:
        able = ", ".join(name for name, h in HOSTS.items() if h.can_leave)
        detail = f"{host.model_type} always renormalises; hosts that need not are {able}"
        raise errors.BadOption(name="renormalize", value=False, detail=detail)
    if recipe.top_k == 1 and recipe.renormalize:
        detail = "its only weight would always be 1, so the router could never learn; choose 2, or --no-renormalize"
        raise errors.BadOption(name="top_k", value=1, detail=detail + " where the host allows it")


def _warnings(recipe: Recipe, spec: MoESpec, verdict: Exactness, width: int) -> list[str]:
    warnings = []
    if spec.router.normalize is None and recipe.router_std > _SHARP:
        warnings.append(
            f"router_std={recipe.router_std:g} with weights that are not renormalised: the total weight depends on the "
            f"token, so outputs are off by more than a little; 0.1 keeps it near {spec.router.top_k}/{recipe.experts}"
        )
    if verdict.exact and recipe.method in {"copy", "noise", "drop"}:
        warnings.append(
            "identical experts: the router learns only once they differ, after the first steps (use a load-balancing "
            "loss)"
        )
    if recipe.method == "virtual-groups" and recipe.granularity > 1:
        warnings.append(_keep_groups(recipe, verdict))
    if width % methods.ALIGNED:
        warnings.append(
            f"experts of width {width}, not a multiple of {methods.ALIGNED}: grouped_mm, which transformers runs by "
            f"default, may refuse them; load with experts_implementation='eager', or choose other widths"
        )
    if recipe.method in methods.ARRANGED and verdict.exact and recipe.router not in {"orthogonal", "zero"}:
        warnings.append(f"the router starts at zero, not {recipe.router}: that makes a split over all experts exact")
    return warnings


def _keep_groups(recipe: Recipe, verdict: Exactness) -> str:
    """How to train virtual groups without a bump at the start."""
    sharpen = verdict.exact and recipe.router_std < _STEADY_STD
    std = _STEADY_STD if sharpen else recipe.router_std
    rate = f"a router learning rate of at most {std / _STEADY_STEPS:.2g} / hidden_size"
    remedy = f"router_std={std:g} (as exact) and {rate} avoid" if sharpen else f"{rate} avoids"
    return (
        "virtual groups bump the loss if the router's first steps take groups apart before the experts have adapted: "
        f"{remedy} it, perhaps at the price of some later gain"
    )
