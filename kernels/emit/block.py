"""A problem on a target -> every file of its block."""

from __future__ import annotations

from dataclasses import dataclass

from moepass.kernels.emit.compose import launcher_file
from moepass.kernels.emit.files import Facts, kernel_file
from moepass.kernels.emit.steps import Step, steps
from moepass.kernels.fused import schedule, schedule_backward, select
from moepass.kernels.fused.problem import Needs, Problem, Target, Tiles

#: Name of the file that calls the others.
LAUNCHER = "moe"


@dataclass(frozen=True)
class Emitted:
    """The files of one block: a kernel file per step, by the step's name, and the launcher."""

    kernels: tuple[tuple[Step, str], ...]
    launcher: str

    @property
    def files(self) -> dict[str, str]:
        """File name -> text."""
        texts = {step.name: text for step, text in self.kernels} | {LAUNCHER: self.launcher}
        return {f"{name}.py": text for name, text in texts.items()}


def emit_block(
    problem: Problem, target: Target, *, train: bool, facts: Facts | None = None, tiles: Tiles | None = None
) -> Emitted:
    """The kernels that the library runs for this problem on this target, specialised; backward where it trains.

    With ``tiles``, they are taken in place of the schedule's.

    Raises ``errors.BadActivation`` for a program that the kernels cannot compute.
    """
    facts = facts or Facts(tokens=max(1, problem.tokens))
    forward = select.forward(problem, target, tiles)
    programs = [(forward, steps(forward, "forward"))]
    if train:
        needs = Needs(b_in=problem.bias_in, b_out=problem.bias_out)
        tiles = tiles or schedule.tiles(problem, target)
        backward = schedule_backward.backward(problem, tiles, target, needs)
        programs.append((backward, steps(backward, "backward")))
    kernels = tuple((step, kernel_file(step, program, problem, facts)) for program, made in programs for step in made)
    return Emitted(kernels, launcher_file(programs[0], programs[1] if train else None, problem, facts))
