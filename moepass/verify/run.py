"""``moepass.verify``: all checks, in the order in which a fault is easiest to place."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import nn

from moepass import errors
from moepass.explain.report import PlanReport
from moepass.lowering.plan import Workload
from moepass.options import Options
from moepass.verify.blocks import check_blocks
from moepass.verify.lowerings import affordable, check_lowerings
from moepass.verify.models import ModelChecks, Setting, is_random, narrowest_run, tolerance_for
from moepass.verify.ordering import check_order
from moepass.verify.ranks import check_ranks
from moepass.verify.report import Check, VerifyReport, guarded
from moepass.verify.subject import Inputs

Against = Literal["eager", "float64"]


def verify(
    model: nn.Module,
    *args: Any,
    against: Against = "float64",
    train: bool = True,
    ep: int = 1,
    options: Mapping[str, Any] | None = None,
    name: str | None = None,
    **kwargs: Any,
) -> VerifyReport:
    """Compare what moepass makes of ``model`` with the definition, on ``model(*args, **kwargs)``.

    ``against``  ``float64``: the reference is a float64 copy; ``eager``: a copy in the model's own dtype.
    ``train``    also check losses, recompute under activation checkpointing, in-place updates and an optimizer step.
    ``ep``       also check every form of expert parallelism over this many processes with gloo between them.
    ``options``  those of ``torch.compile(..., backend="moepass")``; the inner compiler is ``aot_eager`` by default.
    Compared are: the sorts, every legal lowering on awkward inputs, every block of ours, and the compiled model under
    the chosen plan and under each other lowering; outputs and all gradients.  The model is not changed, and is run in
    evaluation mode (blocks of ours in training mode where that is not random).  Models narrower than float32 are
    verified as float32 copies.  Runs on the device of the model.
    Raises ``BadOption`` for a bad option; whatever fails while checking is a failed check of the report.
    """
    if against not in ("eager", "float64"):
        raise errors.BadOption(name="against", value=against, detail="use 'eager' or 'float64'")
    if ep < 1:
        raise errors.BadOption(name="ep", value=ep, detail="give a number of processes, at least 1")
    parsed = Options.parse({"inner": "aot_eager", **(options or {})})
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, nn.Module):
        raise errors.BadOption(name="model", value=model, detail="give an nn.Module")
    wide_model, widened = narrowest_run(model)
    setting = Setting(
        model=wide_model,
        inputs=Inputs(args, kwargs).to(torch.float32 if widened else None),
        options=parsed,
        wide=torch.float64 if against == "float64" else None,
        tolerance=tolerance_for(wide_model),
        train=train,
    )
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    with _quiet():
        checks = tuple(_checks(setting, dtype, ep))
    note = ("the model's own dtype is narrower: the whole model was verified as a float32 copy",) if widened else ()
    return VerifyReport(target=name or type(model).__name__, against=against, checks=checks, notes=note)


def _checks(where: Setting, dtype: torch.dtype, ep: int) -> Iterator[Check]:
    """From the ground up, though the model runs first: its plan says which lowerings there are to check."""
    yield from guarded("stable sorts", "all", check_order)
    converted, names = where.twin
    if is_random(where.model):
        yield from check_blocks(converted, train=where.train)
        yield Check.skipped("model", "compiled", "a router draws its experts at random: two runs differ by design")
        return
    model = ModelChecks(where, names)
    first = list(guarded("compiled", "first run", model.first_run))
    for subject, work, activation in _kinds(model.plan, dtype):
        yield from check_lowerings(subject, work, activation)
        if ep > 1:
            parallel = functools.partial(check_ranks, subject, affordable(work), activation, ep)
            yield from guarded(f"{ep} ranks: {subject}", "all", parallel)
    yield from check_blocks(converted, train=where.train)
    yield from first
    yield from model.rest()


def _kinds(plan: PlanReport | None, dtype: torch.dtype) -> Iterator[tuple[str, Workload, str]]:
    """The distinct kinds of block, each with the name of its first site."""
    seen: set[tuple[Workload, str]] = set()
    for site in plan.sites if plan is not None else ():
        if site.status != "lowered" or site.workload is None or site.activation is None:
            continue
        work = _tested(site.workload, dtype)
        if (work, site.activation) not in seen:
            seen.add((work, site.activation))
            yield site.id, work, site.activation


def _tested(work: Workload, dtype: torch.dtype) -> Workload:
    """The workload in the model's own dtype, whatever T it was planned for."""
    return work.model_copy(update={"tokens": 0, "train": True, "dtype": str(dtype).removeprefix("torch.")})


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What verification does on purpose, such as changing trained weights in place, is no news for the log."""
    loggers = [logging.getLogger(name) for name in ("moepass.attach", "moepass.watch", "moepass.plan")]
    levels = [log.level for log in loggers]
    for log in loggers:
        log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for log, level in zip(loggers, levels, strict=True):
            log.setLevel(level)
