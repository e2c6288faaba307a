"""Which lowering serves a workload, and where the answer changes with the number of tokens.

``plan``    every candidate with its legality and its price; the cheapest legal one is chosen
``ranges``  the same over a domain of T: the fewest ranges such that no T pays more than a few percent for the merging
``choose``  the name only, remembered, for eager calls
``regret``  the planner's score: time of the chosen lowering over the best measured one

What was measured on this machine before (``Hardware.facts``) is preferred to estimates: for the same workload as it is,
for the same block near by as a correction of them.  The plan says so (``decided_by``, ``evidence``).

Deterministic: ties go to the lowering that ``registry.lowerings`` lists first.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

from moepass import errors
from moepass.lowering.base import Lowering
from moepass.lowering.facts import Corrections, Point
from moepass.lowering.hardware import Hardware
from moepass.lowering.measure import Timings
from moepass.lowering.plan import Alternative, Plan, TokenRange, Verdict, Workload
from moepass.lowering.registry import lowerings
from moepass.lowering.segments import Segment, segment

#: An unbounded range is searched for crossovers up to here (tokens).
HORIZON = 1 << 20
#: Ranges are merged while no examined T pays more than this for it: a guard is not spent on noise.
TOLERANCE = 0.04

Decision = Literal["estimate", "measurement", "learned", "pin"]


def plan(
    work: Workload,
    tokens: TokenRange,
    hw: Hardware,
    *,
    pin: str | None = None,
    measured: Mapping[str, float] | None = None,
    candidates: Mapping[str, Lowering] | None = None,
) -> Plan:
    """Choose a lowering for ``work`` (its T stands for the range ``tokens``).

    ``measured``  seconds by lowering, from ``measure``: the fastest legal one is chosen; what did not run is illegal.
    ``pin``       this lowering, whatever it costs.
    Raises ``NoLegalLowering``, and ``BadPin`` for a pin that does not exist or is not legal.
    """
    pool = _candidates(candidates)
    known = corrections(work, hw, pool) if measured is None else Corrections()
    limit = _limit(work, hw, pool)
    alternatives = [_consider(lowering, work, hw, measured, known, limit) for lowering in pool.values()]
    if pin is not None:
        _check_pin(pin, work, alternatives)
        return _assemble(work, tokens, hw, alternatives, pin, "pin")
    possible = [a for a in alternatives if a.legal]
    if not possible:
        raise _none_legal(work, alternatives)
    timed = [a for a in possible if a.measured is not None]
    chosen = min(timed or possible, key=_seconds)
    return _assemble(work, tokens, hw, alternatives, chosen.lowering, _decided_by(alternatives), known)


def corrections(work: Workload, hw: Hardware, pool: Mapping[str, Lowering]) -> Corrections:
    """What measurements on this machine say of a workload's block."""
    points = []
    for fact in hw.facts_of(work):
        estimates = {name: _price(low, _at(work, fact.work.tokens), hw) for name, low in pool.items()}
        points.append(Point.of(fact, {name: s for name, s in estimates.items() if math.isfinite(s)}))
    return Corrections.of(points)


def ranges(
    work: Workload,
    hw: Hardware,
    domain: TokenRange,
    max_ranges: int = 3,
    *,
    candidates: Mapping[str, Lowering] | None = None,
) -> list[Plan]:
    """Cut ``domain`` into at most ``max_ranges`` ranges of T with one lowering each; they tile the domain in order.

    Evaluates every legal lowering on a grid of powers of two and their midpoints, takes the fewest ranges whose regret
    is within ``TOLERANCE`` everywhere on it (or the least regret that ``max_ranges`` allow), and bisects the borders to
    exact integers.  Raises ``NoLegalLowering``.
    """
    pool = _candidates(candidates)
    known = corrections(work, hw, pool)
    limit = functools.cache(lambda T: _limit(_at(work, T), hw, pool))
    price = functools.cache(
        lambda name, T: _price(pool[name], _at(work, T), hw, limit(T)) * (known.factor(name, T) or 1.0)
    )
    for T in token_grid(domain):
        if all(math.isinf(price(name, T)) for name in pool):
            at = _at(work, T)
            raise _none_legal(at, [_consider(low, at, hw, None, known, limit(T)) for low in pool.values()])
    return [_range_plan(work, tokens, hw, name, pool, known) for tokens, name in cut(price, pool, domain, max_ranges)]


def cut(
    price: Callable[[str, int], float], names: Iterable[str], domain: TokenRange, max_ranges: int
) -> list[tuple[TokenRange, str]]:
    """The ranges that tile ``domain``, each with the name that serves it.

    ``price(name, T)`` is infinite where the name must not serve.  Every T of ``token_grid`` needs a finite price.
    """
    grid = token_grid(domain)
    segments = segment({name: [price(name, T) for T in grid] for name in names}, max_ranges, TOLERANCE)
    lows = [domain.low] + [_border(price, grid, before, after) for before, after in itertools.pairwise(segments)]
    highs = [low - 1 for low in lows[1:]] + [domain.high]
    return [(TokenRange(low=low, high=high), s.lowering) for low, high, s in zip(lows, highs, segments, strict=True)]


@functools.lru_cache(maxsize=4096)
def choose(work: Workload, hw: Hardware) -> str:
    """Name of the cheapest legal lowering at the workload's own T; remembered."""
    return plan(work, TokenRange(low=work.tokens, high=work.tokens), hw).lowering


def served_by(pin: str | None, work: Workload) -> str | None:
    """The pinned lowering, or what takes its place where the workload has no backward pass."""
    known = lowerings().get(pin or "")
    return known.inference if known is not None and known.inference is not None and not work.train else pin


def regret(plan: Plan) -> float:
    """Measured time of the chosen lowering over the best measured one; 1.0 is perfect.  Raises ``NotMeasured``."""
    chosen = plan.chosen.measured
    if chosen is None:
        raise errors.NotMeasured(where=str(plan.tokens), lowering=plan.lowering)
    return chosen / min(a.measured for a in plan.alternatives if a.measured is not None)


def token_grid(domain: TokenRange) -> list[int]:
    """Powers of two, their midpoints and the ends of ``domain``; T=0 costs nothing and only counts alone."""
    low = max(domain.low, 1) if domain.high != 0 else 0
    high = max(HORIZON, 4 * low) if domain.high is None else domain.high
    powers = [1 << i for i in range(high.bit_length())]
    inner = {T for p in powers for T in (p, p + p // 2) if low <= T <= high}
    return sorted(inner | {low, high})


def legal(lowering: Lowering, work: Workload, hw: Hardware) -> Verdict:
    """Its verdict; a model on the meta device is planned as if it stood on the hardware's."""
    return lowering.legal(work.model_copy(update={"device": hw.device}) if work.device == "meta" else work)


def _candidates(given: Mapping[str, Lowering] | None) -> Mapping[str, Lowering]:
    return lowerings() if given is None else given


def _at(work: Workload, tokens: int) -> Workload:
    return work.model_copy(update={"tokens": tokens})


def _price(lowering: Lowering, work: Workload, hw: Hardware, limit: float = math.inf) -> float:
    if not legal(lowering, work, hw).legal:
        return math.inf
    price = lowering.price(work, hw)
    return price.total if price.saved_bytes <= limit else math.inf


def _limit(work: Workload, hw: Hardware, pool: Mapping[str, Lowering]) -> float:
    """What a lowering may keep for the backward pass: ``save_limit``, or what the thriftiest keeps if that is more."""
    if work.save_limit is None:
        return math.inf
    kept = (low.price(work, hw).saved_bytes for low in pool.values() if legal(low, work, hw).legal)
    return max(work.save_limit, min(kept, default=0.0))


def _consider(
    lowering: Lowering,
    work: Workload,
    hw: Hardware,
    measured: Mapping[str, float] | None,
    known: Corrections,
    limit: float,
) -> Alternative:
    verdict = legal(lowering, work, hw)
    if not verdict.legal:
        return Alternative(lowering=lowering.name, legal=False, reason=verdict.code, detail=verdict.detail)
    predicted = lowering.price(work, hw)
    if predicted.saved_bytes > limit:
        kept = f"it keeps {predicted.saved_bytes / 2**20:.1f} MiB for the backward pass, more than save_limit allows"
        return Alternative(lowering=lowering.name, legal=False, reason="save_limit", detail=kept, predicted=predicted)
    dropped = measured.dropped if isinstance(measured, Timings) else {}
    if lowering.name in dropped:
        return Alternative(
            lowering=lowering.name,
            legal=False,
            reason="failed_to_run",
            detail=dropped[lowering.name],
            predicted=predicted,
        )
    fact = known.at(work.tokens)
    seconds = (measured or dict(fact.seconds if fact is not None else ())).get(lowering.name)
    factor = known.factor(lowering.name, work.tokens) if fact is None else None
    corrected = None if factor is None else predicted.total * factor
    return Alternative(lowering=lowering.name, legal=True, predicted=predicted, measured=seconds, corrected=corrected)


def _seconds(alternative: Alternative) -> float:
    """Measured where it was timed, else predicted and corrected; illegal ones are infinitely slow."""
    if not alternative.legal or alternative.predicted is None:
        return math.inf
    known = (alternative.measured, alternative.corrected, alternative.predicted.total)
    return next(seconds for seconds in known if seconds is not None)


def _decided_by(alternatives: list[Alternative]) -> Decision:
    """What the choice among these rests on."""
    if any(a.legal and a.measured is not None for a in alternatives):
        return "measurement"
    return "learned" if any(a.corrected is not None for a in alternatives) else "estimate"


def _order(alternative: Alternative) -> tuple[bool, bool, float]:
    """Legal first; timed ones before estimates, which are not comparable with them."""
    return (not alternative.legal, alternative.measured is None, _seconds(alternative))


def _assemble(
    work: Workload,
    tokens: TokenRange,
    hw: Hardware,
    alternatives: list[Alternative],
    chosen: str,
    by: Decision,
    known: Corrections | None = None,
) -> Plan:
    return Plan(
        lowering=chosen,
        tokens=tokens,
        workload=work,
        alternatives=tuple(sorted(alternatives, key=_order)),
        hardware=hw.name,
        decided_by=by,
        evidence=None if known is None else known.evidence(work.tokens),
    )


def _range_plan(
    work: Workload, tokens: TokenRange, hw: Hardware, chosen: str, pool: Mapping[str, Lowering], known: Corrections
) -> Plan:
    """A range's plan, priced at the workload's own T where that lies inside, else at the range's geometric middle."""
    inside = work.tokens in tokens and work.tokens > 0
    at = _at(work, work.tokens if inside else middle(tokens))
    limit = _limit(at, hw, pool)
    alternatives = [_consider(lowering, at, hw, None, known, limit) for lowering in pool.values()]
    return _assemble(at, tokens, hw, alternatives, chosen, _decided_by(alternatives), known)


def middle(tokens: TokenRange) -> int:
    """The T that stands for a range: its geometric middle, or twice the low end of an open one."""
    low = max(tokens.low, 1)
    if tokens.high is None:
        return 2 * low
    return max(tokens.low, min(tokens.high, math.isqrt(low * max(tokens.high, 1))))


def _border(price: Callable[[str, int], float], grid: list[int], before: Segment, after: Segment) -> int:
    """The smallest T, between the grid points around a border, from which ``after`` is not dearer than ``before``."""
    low, high = grid[before.stop - 1], grid[after.start]
    while high - low > 1:
        middle = (low + high) // 2
        if price(after.lowering, middle) <= price(before.lowering, middle):
            high = middle
        else:
            low = middle
    return high


def _check_pin(pin: str, work: Workload, alternatives: list[Alternative]) -> None:
    pinned = next((a for a in alternatives if a.lowering == pin), None)
    if pinned is not None and pinned.legal:
        return
    detail = "there is no such lowering" if pinned is None else f"{pinned.reason}: {pinned.detail}"
    known = ", ".join(a.lowering for a in alternatives)
    raise errors.BadPin(name=pin, where=_where(work), detail=detail, known=known)


def _none_legal(work: Workload, alternatives: list[Alternative]) -> errors.NoLegalLowering:
    reasons = "; ".join(f"{a.lowering}: {a.reason} ({a.detail})" for a in alternatives) or "there are no candidates"
    return errors.NoLegalLowering(where=_where(work), reasons=reasons)


def _where(work: Workload) -> str:
    return f"T={work.tokens} D={work.D} F={work.F} E={work.E} K={work.K} {work.dtype} on {work.device}"
