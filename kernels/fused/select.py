"""Which forward program serves a problem: weights streamed for a few tokens (``schedule_decode``), else tiles."""

from __future__ import annotations

from moepass.kernels.fused import schedule, schedule_decode
from moepass.kernels.fused.launch import Program
from moepass.kernels.fused.problem import Problem, Target, Tiles


def forward(problem: Problem, target: Target, tiles: Tiles | None = None) -> Program:
    """The library's forward pass for T near ``problem.tokens``; it serves any T.  With ``tiles``, in these."""
    if tiles is None and schedule_decode.streams(problem):
        return schedule_decode.forward(problem, target)
    return schedule.forward(problem, tiles or schedule.tiles(problem, target), target)
