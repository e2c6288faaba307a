"""The blocks whose launches have a budget: published models at token counts of each tile size, training and not."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

from moepass.kernels.fused import schedule, schedule_backward, select, tma
from moepass.kernels.fused.launch import Launch
from moepass.kernels.fused.problem import Needs, Problem, Target, Tiles, contiguous_strides


class Case(NamedTuple):
    """One launch of one block."""

    key: str
    launch: Launch


class Shape(NamedTuple):
    """Sizes of a published model's block, bfloat16; ``decode``: token counts at which it does not train."""

    D: int
    F: int
    E: int
    K: int
    tokens: tuple[int, ...]
    decode: tuple[int, ...] = ()
    activation: str = "silu(g)*u"
    train: bool = True
    bias: bool = False
    interleaved: bool = False

    def problem(self, tokens: int, *, train: bool = True) -> Problem:
        """The block at T = ``tokens``; interleaved ones have GPT-OSS's layout [E, D, 2F]."""
        w_in, w_out = contiguous_strides(self.D, self.F, 2, transposed=self.interleaved)
        return Problem(
            tokens=tokens,
            D=self.D,
            F=self.F,
            E=self.E,
            K=self.K,
            n=2,
            dtype="bfloat16",
            activation=self.activation,
            w_in=w_in,
            w_out=w_out,
            bias_in=self.bias,
            bias_out=self.bias,
            interleaved=self.interleaved,
            save=train and self.train,
        )


SHAPES = {
    "olmoe": Shape(2048, 1024, 64, 8, (8, 64, 512, 4096), decode=(1, 4)),
    "qwen3-30b-a3b": Shape(2048, 768, 128, 8, (1024, 32768)),
    "mixtral": Shape(4096, 14336, 8, 2, (64, 4096)),
    "deepseek-v3": Shape(7168, 2048, 256, 8, (64, 4096), train=False),
    "gpt-oss": Shape(2880, 2880, 32, 4, (64, 4096), (1,), "gpt_oss", bias=True, interleaved=True),
}
#: Forms that no rule chooses and a tuner may, compiled for one shape on targets that have TMA: fields of its tiles.
OPTIONAL = "olmoe"
FORMS: dict[str, dict[str, Any]] = {
    "persistent": {"persistent": 1},
    "tma": {"tma": tma.ROWS},
    "persistent-tma": {"persistent": 1, "tma": tma.ROWS},
}


def cases(target: Target, shapes: tuple[str, ...] = tuple(SHAPES)) -> Iterator[Case]:
    """Every distinct launch that the schedule selects for the shapes on a target; the first key names it."""
    seen: set[Launch] = set()
    for name in shapes:
        shape = SHAPES[name]
        for tokens, train in itertools.product((*shape.decode, *shape.tokens), (False, True)):
            if train and (not shape.train or tokens in shape.decode):
                continue
            for launch in launches(shape.problem(tokens, train=train), target, train=train):
                if launch not in seen:
                    seen.add(launch)
                    yield Case(f"{name}/T{tokens}/{'train' if train else 'infer'}/{launch.name}", launch)
    if OPTIONAL in shapes and target.name in tma.TARGETS:
        yield from _optional(target)


def _optional(target: Target) -> Iterator[Case]:
    """The forms that a tuner may choose, with the tiles that the rule chose."""
    for tokens, (form, fields) in itertools.product(SHAPES[OPTIONAL].tokens[1::2], FORMS.items()):
        problem = SHAPES[OPTIONAL].problem(tokens)
        plain = schedule.tiles(problem, target)
        changed = {name: tile._replace(**fields) for name, tile in plain._asdict().items() if name != "dw"}
        if "persistent" in fields:
            changed["up"] = changed["up"]._replace(n=64)  # two wider accumulators beside the next tile's loads spill
        made = launches(problem, target, train=True, tiles=plain._replace(**changed))
        known = launches(problem, target, train=True)
        for launch in made:
            if launch not in known and launch.name != "combine":
                yield Case(f"{OPTIONAL}/T{tokens}/train/{launch.name}+{form}", launch)


@functools.lru_cache(maxsize=256)
def launches(problem: Problem, target: Target, *, train: bool, tiles: Tiles | None = None) -> tuple[Launch, ...]:
    """Forward, and backward where the block trains; with the schedule's tiles, or others."""
    forward = select.forward(problem, target, tiles).launches
    if not train:
        return forward
    tiles = tiles or schedule.tiles(problem, target)
    needs = Needs(b_in=problem.bias_in, b_out=problem.bias_out)
    return forward + schedule_backward.backward(problem, tiles, target, needs).launches
