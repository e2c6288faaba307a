"""Routing capture and replay: the experts of one pass, used again in another.

Reinforcement learning computes the gradient of tokens that another engine produced; where the two choose different
experts the gradient is of another function (NeMo's ``enable_routing_replay``).  Replay takes the recorded experts and
computes their weights from the present scores, so the router still learns.

Rules
    one list per router, in the order of its calls; masked tokens are recorded as nobody's
    one record      serves every call of that router, recomputation under activation checkpointing included
    several records each call takes the next; recomputation in a backward cannot know which, and is refused
    entering and leaving recompiles what torch.compile made, once; several calls in one context compile once each.
    Under CUDA graphs (``mode="reduce-overhead"``) clone what was captured before the next call.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moepass import _compat, errors
from moepass.nn.routing_bias import routers


class Route(NamedTuple):
    """One call of one router: ``index_TK`` int64, and ``weight_TK`` float32 without gradient if it was asked for."""

    index_TK: Tensor
    weight_TK: Tensor | None = None


#: What ``capture_routing`` fills: router name -> its calls.
Routes = dict[str, list[Route]]


class Tape:
    """What a router records to or replays from.  Compiled code guards on it: no tape, another tape, another count."""

    def __init__(self, where: str, routes: list[Route], *, replays: bool, weights: bool = False) -> None:
        self.where, self.routes, self.replays, self.weights = where, routes, replays, weights
        self.calls = 0

    def record(self, index_TK: Tensor, weight_TK: Tensor) -> None:
        """Keep a call, unless it is a repetition or a replay."""
        if self.replays or _recomputing():
            return
        self.routes.append(Route(index_TK, weight_TK.detach() if self.weights else None))

    def next(self, T: int, device: torch.device) -> Tensor:
        """The experts of this call.  Raises ``ReplayMismatch`` if there are none, or for another number of tokens."""
        index_TK = self._index()
        if index_TK.shape[0] != T:
            detail = f"{index_TK.shape[0]} tokens were recorded and {T} arrive"
            raise errors.ReplayMismatch(where=self.where, detail=detail, remedy="replay the batch that was captured")
        return index_TK.to(device)

    def _index(self) -> Tensor:
        if len(self.routes) == 1:
            self.calls = 1
            return self.routes[0].index_TK
        if _recomputing():
            detail = f"activation checkpointing runs again one of {len(self.routes)} calls, and does not say which"
            raise errors.ReplayMismatch(where=self.where, detail=detail, remedy="replay one forward in a context")
        if self.calls >= len(self.routes):
            detail = f"it was called {len(self.routes)} times in the capture and is called once more"
            raise errors.ReplayMismatch(where=self.where, detail=detail, remedy="repeat the calls of the capture")
        self.calls += 1
        return self.routes[self.calls - 1].index_TK


def _recomputing() -> bool:
    return not torch.compiler.is_compiling() and _compat.inside_backward()


@contextmanager
def capture_routing(model: nn.Module, *, weights: bool = False) -> Iterator[Routes]:
    """Record every router of ``model``: ``with capture_routing(model) as routes: model(x)``.

    Raises ``NoRouters`` for a model without any, ``ReplayMismatch`` inside another context.
    """
    found = _found(model, "capture_routing")
    routes: Routes = {name: [] for name in found}
    with _taped(found, {name: Tape(name, routes[name], replays=False, weights=weights) for name in found}):
        yield routes


@contextmanager
def replay_routing(model: nn.Module, routes: Mapping[str, Sequence[Route]]) -> Iterator[None]:
    """Use recorded experts in every router of ``model``, with weights from the present scores.

    Raises ``ReplayMismatch`` where a router has no record, where a call finds none or another number of tokens, and at
    the end where some were not used.
    """
    found = _found(model, "replay_routing")
    for name in found:
        if not routes.get(name):
            detail = f"there is no record of it among {sorted(routes)}"
            raise errors.ReplayMismatch(where=name, detail=detail, remedy="capture the same model")
    tapes = {name: Tape(name, [Route(r[0]) for r in routes[name]], replays=True) for name in found}
    with _taped(found, tapes):
        yield
    for name, tape in tapes.items():
        if tape.calls < len(tape.routes):
            detail = f"{tape.calls} of {len(tape.routes)} recorded calls were used"
            raise errors.ReplayMismatch(where=name, detail=detail, remedy="repeat the calls of the capture")


def _found(model: nn.Module, what: str) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = dict(routers(model))
    if not found:
        raise errors.NoRouters(what=what, where=type(model).__name__)
    return found


@contextmanager
def _taped(found: Mapping[str, nn.Module], tapes: Mapping[str, Tape]) -> Iterator[None]:
    for name, router in found.items():
        if router.tape is not None:
            raise errors.ReplayMismatch(where=name, detail="it is in a capture or a replay already",
                                        remedy="leave that context first")  # fmt: skip
    try:
        for name, router in found.items():
            router.tape = tapes[name]  # type: ignore[assignment]
        with _compat.side_effects_once():
            yield
    finally:
        for router in found.values():
            router.tape = None  # type: ignore[assignment]
