"""Which expert-parallel form serves a block on a mesh, and where the answer changes with the number of tokens.

``form_plan``    every form with its legality and its price; the cheapest legal one is chosen
``form_ranges``  the same over a domain of T, by the planner's own cutting of ranges
``choose_form``  the name only, remembered
``form_sweep``   every form's seconds over T: what tables and charts are drawn from

T is what one rank's graph sees: its own tokens, or all of them where every rank holds the same.  Deterministic: ties go
to the form that ``forms.FORMS`` lists first.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

from moepass import errors
from moepass.lowering import planner
from moepass.lowering.ep_cost import local_plan, price
from moepass.lowering.ep_legal import legal, mesh_of
from moepass.lowering.forms import FORMS, FormOption, FormPlan, FormPrice
from moepass.lowering.hardware import Hardware
from moepass.lowering.mesh import MeshSpec
from moepass.lowering.plan import Curve, Sweep, TokenRange, Workload
from moepass.lowering.sweep import record


def on_mesh(
    work: Workload, mesh: MeshSpec, *, same_tokens: bool = False, buffer_factor: float | None = None
) -> Workload:
    """The workload with its experts spread over ``mesh``."""
    return work.model_copy(update={"mesh": mesh, "same_tokens": same_tokens, "buffer_factor": buffer_factor})


def form_plan(work: Workload, hw: Hardware, tokens: TokenRange | None = None) -> FormPlan:
    """Choose a form for ``work`` (its T stands for the range ``tokens``); none where none is legal."""
    options = sorted((_consider(form, work, hw) for form in FORMS), key=_order)
    chosen = options[0].form if options[0].legal else None
    return _assemble(work, hw, tokens or TokenRange(low=work.tokens, high=work.tokens), options, chosen)


def form_ranges(work: Workload, hw: Hardware, domain: TokenRange, max_ranges: int = 3) -> list[FormPlan]:
    """Cut ``domain`` into at most ``max_ranges`` ranges of T with one form each, as ``planner.ranges``.

    Raises ``NoLegalForm``.
    """
    seconds = functools.cache(lambda form, T: _seconds(form, _at(work, T), hw))
    for T in planner.token_grid(domain):
        if all(math.isinf(seconds(form, T)) for form in FORMS):
            raise no_legal_form(form_plan(_at(work, T), hw))
    plans = []
    for tokens, form in planner.cut(seconds, FORMS, domain, max_ranges):
        inside = work.tokens in tokens and work.tokens > 0
        at = _at(work, work.tokens if inside else planner.middle(tokens))
        options = sorted((_consider(each, at, hw) for each in FORMS), key=_order)
        plans.append(_assemble(at, hw, tokens, options, form))
    return plans


@functools.lru_cache(maxsize=4096)
def choose_form(work: Workload, mesh: MeshSpec, hw: Hardware) -> str:
    """Name of the cheapest legal form of ``work`` on ``mesh``; ``work`` says whether ranks hold the same tokens.

    Raises ``NoLegalForm``.
    """
    found = form_plan(work.model_copy(update={"mesh": mesh}), hw)
    if found.form is None:
        raise no_legal_form(found)
    return found.form


def form_sweep(work: Workload, hw: Hardware, tokens: Sequence[int]) -> Sweep:
    """Price every form of ``work`` at each of ``tokens``, ascending; where none is legal there is no choice."""
    whole = _at(work, 0)
    try:
        plans = form_ranges(whole, hw, TokenRange(low=min(tokens)))
    except errors.NoLegalForm:
        plans = []
    curves = (_curve(form, whole, hw, tokens) for form in FORMS)
    return record(whole, hw, tokens, curves, ((plan.tokens, plan.form) for plan in plans))


def no_legal_form(plan: FormPlan) -> errors.NoLegalForm:
    """The error that says why no form is legal."""
    work = plan.workload
    told = dict.fromkeys(
        f"{o.reason} ({o.detail})" for o in plan.options if not o.legal and o.reason != "several_ranks"
    )
    where = f"T={work.tokens} D={work.D} F={work.F} E={work.E} K={work.K} {work.dtype}"
    return errors.NoLegalForm(where=where, mesh=mesh_of(work), reasons="; ".join(told))


def _consider(form: str, work: Workload, hw: Hardware) -> FormOption:
    verdict = legal(form, work)
    return FormOption(
        form=form,
        legal=verdict.legal,
        reason=verdict.code,
        detail=verdict.detail,
        predicted=price(form, work, hw),
    )


def _assemble(
    work: Workload, hw: Hardware, tokens: TokenRange, options: Sequence[FormOption], chosen: str | None
) -> FormPlan:
    predicted = next((o.predicted for o in options if o.form == chosen), None)
    local = None if predicted is None or chosen is None else local_plan(chosen, work, hw)
    return FormPlan(form=chosen, tokens=tokens, workload=work, options=tuple(options), local=local, hardware=hw.name)


def _order(option: FormOption) -> tuple[bool, float, int]:
    seconds = math.inf if option.predicted is None else option.predicted.total
    return (not option.legal, seconds, FORMS.index(option.form))


def _seconds(form: str, work: Workload, hw: Hardware) -> float:
    predicted = price(form, work, hw) if legal(form, work).legal else None
    return math.inf if predicted is None else predicted.total


def _curve(form: str, work: Workload, hw: Hardware, tokens: Sequence[int]) -> Curve:
    """Seconds where the form is legal; FLOPs and bytes belong to lowerings, not to forms."""
    found: list[FormPrice | None] = [
        price(form, _at(work, T), hw) if legal(form, _at(work, T)).legal else None for T in tokens
    ]
    none = (None,) * len(tokens)
    return Curve(lowering=form, seconds=tuple(None if p is None else p.total for p in found), flops=none, bytes=none)


def _at(work: Workload, tokens: int) -> Workload:
    return work.model_copy(update={"tokens": tokens})
