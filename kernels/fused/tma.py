"""Which operands TMA descriptors can fetch: pure, with the reason where they cannot.

A descriptor wants a base and strides that are multiples of 16 bytes, and neighbours in memory along its last
dimension (CUDA driver API, cuTensorMapEncodeTiled).  Triton checks none of it for descriptors that a kernel makes, so
that the schedule has to.
"""

from __future__ import annotations

from moepass.kernels.fused.problem import Problem, Target

#: Targets that have TMA.
TARGETS = ("sm_90", "sm_100")
#: Bytes that a base and every stride but the last are multiples of.
UNIT = 16
#: What ``Tile.tma`` may be: nothing, weights, and weights and rows (for ``down`` and ``dx``, whose rows are dense).
NONE, WEIGHTS, ROWS = 0, 1, 2
#: The matrices that the kernels read; ``dw`` gathers rows, which TMA cannot do on sm_90.
READS = {"up": "w_in", "down": "w_out", "hidden": "w_out", "dx": "w_in"}
#: The kernels whose rows lie in expert order.
DENSE = ("down", "dx")


def level(kernel: str, wanted: int, problem: Problem, target: Target) -> int:
    """``wanted`` where it is legal, or the most that is; kernels and levels are those of ``Tiles`` and ``Tile.tma``."""
    if wanted == NONE or refused(kernel, problem, target) is not None:
        return NONE
    return ROWS if wanted == ROWS and rows_refused(kernel, problem) is None else WEIGHTS


def refused(kernel: str, problem: Problem, target: Target) -> str | None:
    """Why a kernel of ``Tiles`` cannot fetch its weights by TMA; None where it can."""
    if kernel not in READS:
        return f"{kernel} gathers its operands"
    name = READS[kernel]
    if target.name not in TARGETS and not target.interpreter:
        return f"{target.name} has no TMA"
    if not problem.aligned:
        return f"the weights do not start at multiples of {UNIT} bytes"
    strides = matrix_strides(name, problem)
    if 1 not in strides[2:]:
        return f"{name} has no neighbours in memory: strides {strides[2:]} of rows and columns"
    outer = [*strides[:2], *(s for s in strides[2:] if s != 1)]
    uneven = next((s for s in outer if s <= 0 or s * problem.itemsize % UNIT), None)
    if uneven is not None:
        return f"a stride of {name} is {uneven * problem.itemsize} bytes, no multiple of {UNIT}"
    return None


def rows_refused(kernel: str, problem: Problem) -> str | None:
    """Why the rows of a kernel cannot be fetched by TMA; None where they can."""
    if kernel not in DENSE:
        return f"{kernel} gathers its rows"
    if problem.F * problem.itemsize % UNIT:
        return f"rows of {problem.F * problem.itemsize} bytes are no multiple of {UNIT}"
    return None


def matrix_strides(name: str, problem: Problem) -> tuple[int, int, int, int]:
    """Strides of ``w_in [E, n, F, D]`` or ``w_out [E, 1, D, F]`` in elements, as the kernels' descriptors have them."""
    if name == "w_out":
        expert, row, column = problem.w_out
        return expert, expert, row, column
    expert, row, column = problem.w_in
    if problem.n == 1:
        return expert, expert, row, column
    if problem.interleaved:
        return expert, row, 2 * row, column
    return expert, problem.F * row, row, column
