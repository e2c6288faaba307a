"""``moepass.verify(model, *args)``: does moepass compute what the model computes, outputs and gradients?

The package holds the checks; the module object is callable, like ``moepass.explain``::

    report = moepass.verify(model, ids)
    report.ok, print(report)

Nothing here imports torch: the checks load when the function is called.
"""

from __future__ import annotations

import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moepass.verify.report import VerifyReport


def verify(model: Any, *args: Any, **kwargs: Any) -> VerifyReport:
    """See ``moepass.verify.run.verify``, whose arguments these are."""
    from moepass.verify import run

    return run.verify(model, *args, **kwargs)


class _CallableModule(types.ModuleType):
    """A module that can be called like the function of the same name."""

    def __call__(self, model: Any, *args: Any, **kwargs: Any) -> VerifyReport:
        return verify(model, *args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
