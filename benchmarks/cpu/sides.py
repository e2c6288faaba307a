"""Who is measured: every lowering of moepass, pinned by a plan, and HF's experts, plain and under Inductor.

Each side has its own copy of equal weights, and its own code object (``common.own_forward``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import moepass
from benchmarks import common
from benchmarks.cpu import cells
from benchmarks.cpu.cells import Cell, Shape
from moepass.explain.report import PlanReport, SitePlan
from moepass.kernels.rows_linear import FEW_ROWS
from moepass.lowering.plan import TokenRange

#: HF's implementations; the compiled ones have ``INDUCTOR`` behind their name.
HF = ("grouped_mm", "batched_mm", "eager")
INDUCTOR = ", Inductor"
OURS = "moepass "
#: ``batched_mm`` gathers weights; past this many bytes it is not run.
GATHER_LIMIT = 2 << 30
#: Norm of a side's difference over the norm of the result.  In bfloat16 every eighth token of 128 experts has a tie at
#: the border of its top-k, which another order of summation decides otherwise; a wrong expert gives 0.5 to 1.4.
TOLERANCE = {torch.float32: 5e-5, torch.bfloat16: 0.3}

Step = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Side:
    """A block that computes what the others compute.  ``family``: "moepass" or "HF"."""

    name: str
    family: str
    module: nn.Module
    call: Callable[[Tensor], Tensor]

    def step(self, cell: Cell) -> Step:
        """One forward pass, or one with the gradients of the input and of every weight; returns all results."""
        x, dy = cells.inputs(cell)

        def run() -> tuple[Tensor, ...]:
            if not cell.train:
                with torch.no_grad():
                    return (self.call(x),)
            y = self.call(x)
            return (y.detach(), *torch.autograd.grad(y, [x, *self.module.parameters()], dy))

        return run

    def refuses(self, cell: Cell) -> str | None:
        """Why this side is not even tried in a cell."""
        if "batched_mm" in self.name and cell.pair_bytes > GATHER_LIMIT:
            return f"it would gather {cell.pair_bytes / 2**30:.1f} GiB of weights (limit 2 GiB)"
        return None


@functools.lru_cache(maxsize=1)
def _original(shape: Shape, dtype: torch.dtype) -> nn.Module:
    """One block for a group: sides are clones."""
    return cells.block(shape, dtype)


def make(shape: Shape, dtype: torch.dtype, lowerings: Sequence[str], inner: str) -> list[Side]:
    """The sides of one block; the two that are always fast enough to time come first.  ``inner``: "inductor"."""
    original = _original(shape, dtype)
    made = [_pinned(original, name, shape.K, inner) for name in lowerings]
    for name in HF:
        made.append(_hf(original, name, inner))
        made.append(_hf(original, name, None))
    first = {OURS + "grouped": 0, "grouped_mm" + INDUCTOR: 1}
    return sorted(made, key=lambda side: first.get(side.name, 2))


def reference(shape: Shape, dtype: torch.dtype) -> Side:
    """HF's plain loop over experts in float32, from the same values: what is right, without bfloat16's rounding."""
    module = cells.clone(_original(shape, dtype), "eager").float()
    return Side("reference", "HF", module, lambda x: module(x.float()).to(dtype))


def choices(shape: Shape, dtype: torch.dtype, tokens: Sequence[int], train: bool) -> dict[int, SitePlan]:
    """The planner's decision at every T, as one compiled block makes it: read from ``moepass.last_plan()``.

    ``inner="eager"`` generates no code, and does not enter the decision.
    """
    module = common.own_forward(cells.clone(_original(shape, dtype), "grouped_mm"), "planned")
    call = torch.compile(module, backend="moepass", options={"inner": "eager"})
    found: dict[int, SitePlan] = {}
    made: list[PlanReport] = []
    for T in tokens:
        x, _ = cells.inputs(Cell(shape, T, dtype, train))
        with torch.set_grad_enabled(train):
            call(x)
        report = moepass.last_plan()
        if report is not None and report not in made:
            made.insert(0, report)
        found[T] = next(s for r in made for s in r.sites if T in (s.tokens or TokenRange()))
        if found[T].status != "lowered":
            raise SystemExit(f"{shape.name}: moepass left the block as it was: {found[T].detail}")
    return found


def pin(lowering: str, K: int) -> PlanReport:
    """A plan that gives the block's experts this lowering at every T.

    ``gathered`` in two ranges: where the planner chooses it, it is for a few tokens, and the kernels know that.
    """
    few = FEW_ROWS // K
    cut = [TokenRange(low=1, high=few), TokenRange(low=few + 1)] if lowering == "gathered" else [None]
    sites = [SitePlan(id="experts", kind="moe", status="lowered", lowering=lowering, tokens=tokens) for tokens in cut]
    return PlanReport(hardware="pinned", device="cpu", sites=tuple(sites))


def error(mine: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """Greatest difference over the results of a step, by norms."""
    pairs = zip(mine, theirs, strict=True)
    return max(float((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-30)) for a, b in pairs)


def _pinned(original: nn.Module, lowering: str, K: int, inner: str) -> Side:
    module = common.own_forward(cells.clone(original, "grouped_mm"), f"moepass_{lowering}")
    options = {"plan": pin(lowering, K), "strict": True, "inner": inner}
    call = torch.compile(module, backend="moepass", options=options)
    return Side(OURS + lowering, "moepass", module, call)


def _hf(original: nn.Module, experts: str, inner: str | None) -> Side:
    module = common.own_forward(cells.clone(original, experts), f"hf_{experts}")
    if inner is None:
        return Side(experts, "HF", module, module)
    return Side(experts + INDUCTOR, "HF", module, torch.compile(module, backend=inner))
