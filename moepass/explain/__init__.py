"""The plan report and its views; calling this package explains a model.

``moepass.explain`` is two things under one name: the package that holds `PlanReport`, and the public function::

    report = moepass.explain(model, hardware="H100")(*args)      # -> PlanReport

Both work whichever is imported first, because the module object itself is callable.  torch imports this file when
``TORCH_LOGS`` names moepass, so it stays light: nothing here imports torch.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moepass.explain.report import PlanReport


def explain(model_or_fn: Callable[..., Any], **options: Any) -> Callable[..., PlanReport]:
    """A callable that plans ``model_or_fn`` for the arguments it is given; see ``moepass.preview.model``.

    The options are those of ``torch.compile(..., backend="moepass", options=...)``.
    """
    from moepass.preview import model

    return model.explain(model_or_fn, **options)


class _CallableModule(types.ModuleType):
    """A module that can be called like the function of the same name."""

    def __call__(self, model_or_fn: Callable[..., Any], **options: Any) -> Callable[..., PlanReport]:
        return explain(model_or_fn, **options)


sys.modules[__name__].__class__ = _CallableModule
