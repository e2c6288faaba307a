"""What runs while rows travel: the shared expert, and the experts of other chunks of the tokens.

Contract
    A form is a number of ``Part``s, one for each chunk: a generator that yields when its rows have left for the experts
    and again when they have left for home, and returns their results.  Between two steps of one part anything may run.
    ``in_turn`` takes them in the order that the price assumes (``lowering.ep_volume.pipeline``):

        begin 0 | beside | begin 1 | wait 0, experts 0, send back 0 | begin 2 | wait 1, experts 1, send back 1 | ...

    Autograd runs the adjoints in the opposite order, in which they overlap just so.
Sources: Megatron-Core (shared experts over the dispatch), DeepSpeed-MoE and Tutel (chunks).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Sequence

from torch import Tensor

Part = Generator[None, None, Tensor]
#: What needs nothing of the other ranks.
Beside = Callable[[], None]


def in_turn(parts: Sequence[Part], beside: Beside) -> list[Tensor]:
    """Their results, in order; ``beside`` runs once."""
    next(parts[0])
    beside()
    for part, following in itertools.zip_longest(parts, parts[1:]):
        if following is not None:
            next(following)
        next(part)
    return [_result(part) for part in parts]


def _result(part: Part) -> Tensor:
    try:
        next(part)
    except StopIteration as end:
        y: Tensor = end.value
        return y
    raise AssertionError("a part has two stops")
