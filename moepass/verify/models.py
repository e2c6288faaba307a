"""The whole model, compiled, against the reference: at step 0, under every lowering, and after its weights changed.

The one-line form puts new weights in the place of dense ones, so it has two references: the *dense* model itself, whose
outputs (and gradients of everything but the blocks) it must reproduce where the init is exact; and the model that
``moepass.convert`` makes, run by ``moepass.reference``, which has the same new weights.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from moepass import errors
from moepass.explain.report import PlanReport
from moepass.lowering.registry import lowerings
from moepass.options import Options
from moepass.upcycle.convert import convert
from moepass.verify.compare import TOLERANCES, Tolerance, equal_bits, worst_gradient, worst_output
from moepass.verify.oracle import moe_blocks, random_always
from moepass.verify.report import Check, guarded
from moepass.verify.subject import Compiled, Inputs, Reference, Result, pinned, step, with_plan


@dataclass(frozen=True)
class Setting:
    """What all checks of a model share.  ``wide``: dtype of the reference; None: the model's own."""

    model: nn.Module
    inputs: Inputs
    options: Options
    wide: torch.dtype | None
    tolerance: Tolerance
    train: bool

    def converted(self, model: nn.Module) -> tuple[nn.Module, dict[str, str]]:
        """What ``convert`` makes of a copy of ``model``, and its module of each site; unchanged where it may not."""
        copied = copy.deepcopy(model)
        init = self.options.init
        if init is None or (self.options.convert == "auto" and moe_blocks(model)):
            return copied, {}
        try:
            with warnings.catch_warnings(action="ignore"):
                report = convert(copied, self.options.spec, init=init)
        except errors.MoepassError:
            return copy.deepcopy(model), {}
        return copied, {site.id: site.where for site in report.converted}

    @functools.cached_property
    def twin(self) -> tuple[nn.Module, dict[str, str]]:
        """``converted`` of the model itself, made once."""
        return self.converted(self.model)

    def references(self, model: nn.Module) -> References:
        """Both references of a model in its present state."""
        twin, _ = self.twin if model is self.model else self.converted(model)
        return References(Reference(model, self.wide), Reference(twin, self.wide), self.inputs)


class References:
    """The dense model and what ``convert`` makes of it, each run once, when it is asked for."""

    def __init__(self, dense: Reference, twin: Reference, inputs: Inputs) -> None:
        self.dense, self.twin, self._inputs = dense, twin, inputs

    @functools.cached_property
    def of_dense(self) -> Result:
        """The model as it is."""
        return self.dense.run(self._inputs)

    @functools.cached_property
    def of_twin(self) -> Result:
        """The converted model."""
        return self.twin.run(self._inputs)


def tolerance_for(model: nn.Module) -> Tolerance:
    """By the widest error that the model's floating dtype explains."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()} or {torch.float32}
    return max(TOLERANCES.get(dtype, TOLERANCES[torch.float32]) for dtype in dtypes)


class ModelChecks:
    """The checks of the whole model, in two parts: the first run, which makes the plan, and what follows from it."""

    def __init__(self, where: Setting, names: dict[str, str]) -> None:
        self.where, self.names = where, names
        self.compiled = Compiled(where.model, where.options, names=names)
        self.expected = where.references(where.model)

    def first_run(self) -> Iterator[Check]:
        """Outputs, gradients, determinism, and that no block fell back."""
        where, compiled = self.where, self.compiled
        first = compiled.run(where.inputs)
        yield Check.holds("plan", "blocks lowered", self._lowers(), f"nothing to verify: {compiled.plan.headline}")
        fallen = [f"{s.id}: {s.reason} {s.detail or ''}".strip() for s in compiled.plan.sites if s.status == "fallback"]
        yield Check.holds("plan", "no block fell back", not fallen, "; ".join(fallen))
        yield from _agree("compiled", where, compiled, first, self.expected)
        again = compiled.run(where.inputs)
        same = equal_bits(first.tensors(), again.tensors())
        yield Check.holds("compiled", "two runs", same, "the second run gave other bits")

    def rest(self) -> Iterator[Check]:
        """Under every other lowering; recompute, an update and an optimizer step where training is checked.

        In guarded steps, so that one failure hides no other.
        """
        where, compiled, expected = self.where, self.compiled, self.expected
        if not self._lowers():
            return
        for name in _others(compiled.plan):
            other = Compiled(where.model, with_plan(where.options, pinned(compiled.plan, name)), names=self.names)
            check = functools.partial(_with_lowering, where, other, expected, name)
            yield from guarded(f"compiled with {name}", "run", check)
        if where.train:
            yield from guarded("recompute", "run", lambda: _recompute(where, compiled))
            yield from guarded("in-place update", "run", lambda: _updated(where, compiled))

    @property
    def plan(self) -> PlanReport | None:
        """The plan, once ``first_run`` compiled."""
        return self.compiled.plan if self.compiled.reports else None

    def _lowers(self) -> bool:
        return self.plan is not None and self.plan.summary["lowered"] > 0


def is_random(model: nn.Module) -> bool:
    """Whether two runs differ by design: a router draws its experts."""
    return any(random_always(block.spec) for block in moe_blocks(model).values())


def _agree(subject: str, where: Setting, compiled: Compiled, found: Result, expected: References) -> Iterator[Check]:
    """``found`` against the references of the compiled copy's present weights."""
    new = _new_weights(compiled)
    if not new:
        yield from _compare(subject, where, found, expected.of_dense)
        return
    if _all_exact(compiled.plan):
        dense = expected.of_dense
        shared = {n: g for n, g in dense.gradients.items() if g is None or found.gradients.get(n) is not None}
        yield from _compare(f"{subject}: dense function", where, found, Result(dense.outputs, shared))
    else:
        yield Check.skipped(f"{subject}: dense function", "outputs", "the init method is not exact at step 0")
    if missing := _missing(new, expected):
        yield Check.skipped(subject, "gradients of new weights", missing)
        return
    yield from _compare(subject, where, found, expected.of_twin)


def _new_weights(compiled: Compiled) -> set[str]:
    """Names of the weights that the one-line form made."""
    return compiled.parameters().keys() - dict(compiled.model.named_parameters()).keys()


def _missing(new: set[str], expected: References) -> str | None:
    left = sorted(new - expected.twin.parameters().keys())
    return f"moepass.convert makes no module of the block that has {left[0]}" if left else None


def _compare(subject: str, where: Setting, found: Result, expected: Result) -> Iterator[Check]:
    wrong = worst_output(found.outputs, expected.outputs)
    yield Check.within(subject, "outputs", wrong.error, where.tolerance.outputs, wrong.where)
    wrong = worst_gradient(found.gradients, expected.gradients)
    yield Check.within(subject, "gradients", wrong.error, where.tolerance.gradients, wrong.where)


def _all_exact(plan: PlanReport) -> bool:
    made = [site.init for site in plan.sites if site.status == "lowered" and site.init is not None]
    return all(init.endswith(", exact") for init in made)


def _others(plan: PlanReport) -> list[str]:
    """Lowerings that may serve a block of the plan and were not chosen for all of them."""
    lowered = [site for site in plan.sites if site.status == "lowered"]
    chosen = {site.lowering for site in lowered}
    legal = {a.lowering for site in lowered for a in site.alternatives if a.legal}
    return [name for name in lowerings() if name in legal and chosen != {name}]


def _with_lowering(where: Setting, compiled: Compiled, expected: References, lowering: str) -> Iterator[Check]:
    subject = f"compiled with {lowering}"
    found = compiled.run(where.inputs)
    used = {site.lowering for site in compiled.plan.sites if site.status == "lowered"}
    yield Check.holds(subject, "plan replayed", lowering in used, f"the pinned plan was not followed: {used}")
    yield from _agree(subject, where, compiled, found, expected)


def _recompute(where: Setting, compiled: Compiled) -> Iterator[Check]:
    plain, again = compiled.run(where.inputs), compiled.run(where.inputs, recompute=True)
    wrong = worst_gradient(again.gradients, plain.gradients)
    yield Check.within("recompute", "gradients", wrong.error, where.tolerance.gradients, wrong.where)


def _updated(where: Setting, compiled: Compiled) -> Iterator[Check]:
    """All of the model's own weights change in place, as ``load_state_dict`` does; then comes an optimizer step."""
    with torch.no_grad():
        for p in compiled.model.parameters():
            p.mul_(1.1)
    found, expected = compiled.run(where.inputs), where.references(compiled.model)
    yield from _agree("in-place update", where, compiled, found, expected)
    yield from guarded("second step", "run", lambda: _second_step(where, compiled, expected))


def _second_step(where: Setting, compiled: Compiled, expected: References) -> Iterator[Check]:
    """An optimizer step on every weight in use, new ones included: the next forward must see it."""
    new = _new_weights(compiled)
    if missing := _missing(new, expected):
        yield Check.skipped("second step", "outputs", missing)
        return
    twin, gradients = (expected.twin, expected.of_twin) if new else (expected.dense, expected.of_dense)
    before = compiled.run(where.inputs)
    step([twin.parameters(), compiled.parameters()], gradients.gradients)
    after = compiled.run(where.inputs)
    changed = worst_output(after.outputs, before.outputs).error > where.tolerance.outputs
    yield Check.holds("second step", "output moved", changed, "the step did not change the output")
    yield from _compare("second step", where, after, twin.run(where.inputs))


def narrowest_run(model: nn.Module) -> tuple[nn.Module, bool]:
    """The model as it is verified: bfloat16 and float16 models as float32 copies, and whether that was done.

    In narrow types a token near a tie goes to other experts for a rounding, which no comparison survives; the lowerings
    are verified in the model's own dtype, with the routing given.
    """
    narrow = {torch.bfloat16, torch.float16}
    if not any(p.dtype in narrow for p in model.parameters()):
        return model, False
    return copy.deepcopy(model).to(torch.float32), True
