"""Notice an optimizer that holds dense weights but not the MoE weights that were attached to them.

``AdamW(model.parameters())`` on a model of the one-line form trains none of its feed-forward blocks: their MoE weights
are no parameters of the model.  Nothing fails, so somebody has to say it.

Contract
    a hook on the steps of ``torch.optim``'s optimizers, installed with the first trainable state, looks at the states
    that nobody has trained yet.  It warns at the second step of an optimizer that holds a state's dense weight without
    a gradient while the MoE weight has one: by then another optimizer would have trained it.
    Evaluation, and training with ``moepass.moe_parameters(model)``, hear nothing; each state is named at most once.
"""

from __future__ import annotations

import functools
import logging
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

log = logging.getLogger("moepass.attach")


class Trainee(Protocol):
    """What is watched: an attached state."""

    @property
    def site(self) -> str:
        """The block's name."""

    @property
    def trained(self) -> bool:
        """Whether anybody has written its weights."""

    def pair(self) -> tuple[Tensor, Tensor] | None:
        """The dense output weight and the MoE's in its place; None once the dense one is gone."""


#: States that nobody has trained yet, with the optimizer steps that passed them by.
_untrained: weakref.WeakKeyDictionary[Trainee, int] = weakref.WeakKeyDictionary()


def watch(state: Trainee) -> None:
    """Warn if an optimizer forgets this state."""
    _install()
    _untrained[state] = 0


@functools.cache
def _install() -> None:
    register_optimizer_step_pre_hook(_before_step)


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:  # noqa: ARG001 -- a hook's signature
    if torch.compiler.is_compiling() or not _untrained:
        return
    for state in [state for state in _untrained if state.trained]:
        del _untrained[state]
    waiting = [(state, pair) for state in _untrained if (pair := state.pair()) is not None and _starves(*pair)]
    if not waiting:
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    passed = [state for state, (dense, moe) in waiting if id(dense) in held and id(moe) not in held]
    for state in passed:
        _untrained[state] += 1
    forgotten = [state for state in passed if _untrained[state] > 1]
    for state in forgotten:
        del _untrained[state]
    if forgotten:
        log.warning(
            "%s steps without the MoE weights of %s%s, which the dense weights it holds were replaced by: they get "
            "gradients and are never updated. Give it moepass.moe_parameters(model) too, or use moepass.convert before "
            "building the optimizer.",
            type(optimizer).__name__,
            forgotten[0].site,
            f" and {len(forgotten) - 1} more" if len(forgotten) > 1 else "",
        )


def _starves(dense: Tensor, moe: Tensor) -> bool:
    return dense.requires_grad and dense.grad is None and moe.grad is not None
