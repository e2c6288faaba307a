"""The price of every lowering over token counts: what the charts and the what-if tables are drawn from.

Estimates only.  One sweep is one block on one machine; ``ranges`` is what the planner would choose over all T.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from moepass.lowering.hardware import Hardware
from moepass.lowering.plan import Choice, Curve, Sweep, TokenRange, Workload
from moepass.lowering.planner import legal, ranges
from moepass.lowering.registry import lowerings

#: Token counts of a sweep where the user names none.
TOKENS = tuple(1 << i for i in range(17))


def sweep(work: Workload, hw: Hardware, tokens: Sequence[int] = TOKENS) -> Sweep:
    """Price ``work`` at each of ``tokens``, ascending.  Raises ``NoLegalLowering``."""
    whole = work.model_copy(update={"tokens": 0})
    plans = ranges(whole, hw, TokenRange(low=min(tokens)))
    curves = (_curve(name, whole, hw, tokens) for name in lowerings())
    return record(whole, hw, tokens, curves, ((plan.tokens, plan.lowering) for plan in plans))


def record(
    work: Workload,
    hw: Hardware,
    tokens: Sequence[int],
    curves: Iterable[Curve],
    choices: Iterable[tuple[TokenRange, str | None]],
) -> Sweep:
    """A sweep of ``work`` (its T is 0) on ``hw``; ranges without a choice are left out."""
    return Sweep(
        hardware=hw.name,
        workload=work,
        peak=hw.peak(work.dtype),
        bandwidth=hw.bandwidth,
        tokens=tuple(tokens),
        curves=tuple(curves),
        choices=tuple(Choice(tokens=span, lowering=name) for span, name in choices if name is not None),
    )


def _curve(name: str, work: Workload, hw: Hardware, tokens: Sequence[int]) -> Curve:
    lowering = lowerings()[name]
    at = [work.model_copy(update={"tokens": T}) for T in tokens]
    prices = [lowering.price(w, hw) if legal(lowering, w, hw).legal else None for w in at]
    return Curve(
        lowering=name,
        seconds=tuple(None if p is None else p.total for p in prices),
        flops=tuple(None if p is None else p.flops for p in prices),
        bytes=tuple(None if p is None else p.bytes for p in prices),
    )
