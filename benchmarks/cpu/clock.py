"""How long things take: sides in turns, as often as their time allows, and this machine's own ceilings.

A side is called once before it is timed.  Where that call takes more than ``SLOW`` seconds it is the measurement, and
more than ``LONG`` where the side is behind the fastest by ``FAR``; a quicker one that far behind is timed twice; the
others as often as the cell's share of the budget allows.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from benchmarks.common import Timing
from benchmarks.cpu.cells import Cell
from benchmarks.cpu.sides import Side, Step

SLOW, LONG = 4.0, 0.5
FAR = 3.0
#: A side that is predicted to take longer is not run.
LONGEST = 20.0
#: A side that is predicted to take longer than ``SLOW`` and so many times the fastest of its family is not run; where
#: the fastest is itself over ``SLOW``, one that is not predicted to beat it clearly.
HOPELESS, NO_BETTER = 2.0, 0.8
#: Short cells are timed more often than asked, up to MANY runs of a side within ENOUGH seconds; long ones no less than
#: FEWEST times, whatever is left of the budget: one call may take twice as long as the next.
MANY, ENOUGH, FEWEST = 25, 1.5, 3
#: Width of a GEMM that is quick in any layout.
SMALL = 256


@dataclass
class Group:
    """What is known of a group of cells: one block, dtype and mode.  ``seconds``: by side, of its largest T so far."""

    seconds: dict[str, tuple[int, float]] = field(default_factory=dict)

    def predicted(self, name: str, tokens: int) -> float:
        """Seconds at T, if the work grows with T; 0.0 where T was small or nothing is known."""
        T, seconds = self.seconds.get(name, (0, 0.0))
        return seconds * tokens / T if T >= 4 else 0.0


@dataclass(frozen=True)
class Measured:
    """Timings by side, and why the others have none."""

    timings: dict[str, Timing]
    not_run: dict[str, str]


def measure(sides: Sequence[Side], cell: Cell, group: Group, share: float, repeats: int) -> Measured:
    """Time the sides of one cell in about ``share`` seconds; more where single calls need more."""
    steps: dict[str, Step] = {}
    first: dict[str, float] = {}
    not_run: dict[str, str] = {}
    for side in sides:
        step = side.step(cell)
        rivals = [first[other.name] for other in sides if other.family == side.family and other.name in first]
        reason = side.refuses(cell) or _hopeless(group.predicted(side.name, cell.tokens), rivals)
        try:
            seconds = once(step) if reason is None else 0.0
        except Exception as error:  # out of memory, an operator that is not there: a finding, not the end
            reason = first_line(error)
        if reason is not None:
            not_run[side.name] = reason
            continue
        known = group.predicted(side.name, cell.tokens)
        if seconds < 0.2 or (known and seconds > 4 * known):  # something warmed up, or was compiled
            seconds = min(seconds, once(step))
        steps[side.name], first[side.name] = step, seconds
    counts = runs(first, share, repeats)
    samples = in_turns(steps, counts)
    timings = {name: Timing.of(samples[name] or [seconds]) for name, seconds in first.items()}
    group.seconds |= {name: (cell.tokens, timing.median) for name, timing in timings.items()}
    return Measured(timings, not_run)


def runs(first: Mapping[str, float], share: float, repeats: int) -> dict[str, int]:
    """Timed runs of each side, given the seconds of its first call; 0: that call is the measurement."""
    fastest = min(first.values(), default=0.0)
    near = [s for s in first.values() if s <= min(FAR * fastest, SLOW)]
    turn = sum(near) or 1.0
    most = max(repeats, min(MANY, int(ENOUGH / turn)))
    many = max(FEWEST if fastest < 1.0 else 2, min(most, int(share / turn)))

    def count(seconds: float) -> int:
        far = seconds > FAR * fastest
        if seconds > (LONG if far else SLOW):
            return 0
        return 2 if far else many  # many is never fewer

    return {name: count(seconds) for name, seconds in first.items()}


def in_turns(steps: Mapping[str, Callable[[], object]], counts: Mapping[str, int]) -> dict[str, list[float]]:
    """Seconds of every run; the order is reversed every other turn, and who has had its runs sits out."""
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(max(counts.values(), default=0)):
        for name in list(steps) if turn % 2 == 0 else list(steps)[::-1]:
            if turn < counts[name]:
                samples[name].append(once(steps[name]))
    return samples


def once(step: Callable[[], object]) -> float:
    """Seconds of one call; its results are freed inside the call's own time."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def ceilings(dtype: torch.dtype, width: int = 2048) -> dict[str, float]:
    """FLOP/s of a GEMM (the faster of two layouts of its right operand); bytes/s of reading 64 * width**2 bytes.

    A small GEMM says which layout that is: the other may take a minute (bfloat16 without native instructions).
    """
    small = torch.randn(SMALL, SMALL).to(dtype)
    by_row, by_column = (_median(functools.partial(torch.mm, small, b)) for b in (small, small.t()))
    a, b = (torch.randn(width, width).to(dtype) for _ in range(2))
    gemm = _median(lambda: torch.mm(a, b if by_row < by_column else b.t()))
    large = torch.ones(16 * width**2)
    return {"flops": 2 * width**3 / gemm, "bandwidth": large.nbytes / _median(large.sum)}


def _median(call: Callable[[], object]) -> float:
    if once(call) > 0.3:
        return once(call)
    return statistics.median(once(call) for _ in range(5))


def _hopeless(predicted: float, rivals: Sequence[float]) -> str | None:
    if predicted > LONGEST:
        return f"predicted {predicted:.1f} s from a smaller T (limit {LONGEST:g} s)"
    if not rivals or predicted <= SLOW:
        return None
    best = min(rivals)
    if predicted <= (HOPELESS if best <= SLOW else NO_BETTER) * best:
        return None
    return f"predicted {predicted:.1f} s from a smaller T, {predicted / best:.1f} times the fastest so far"


def first_line(error: BaseException) -> str:
    """Kind and first line of an error."""
    return f"{type(error).__name__}: {error}".strip().partition("\n")[0][:200]
