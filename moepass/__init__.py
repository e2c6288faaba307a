"""moepass: a torch.compile backend that turns dense feed-forward layers into mixture-of-experts and plans them.

Importing the package is light and has no side effect: every public name below is loaded when it is first used
(PEP 562), and the backend is found by name through the entry point ``torch_dynamo_backends: moepass``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moepass import errors, nn, parallel, reference, spec
    from moepass.attach import materialize, moe_parameters
    from moepass.explain import explain
    from moepass.explain.report import PlanReport
    from moepass.explain.store import last_plan
    from moepass.parallel.placement import parallelize
    from moepass.spec import DispatchSpec, ExpertSpec, InitSpec, MoESpec, RouterSpec
    from moepass.upcycle.accept import accept_dense
    from moepass.upcycle.command import UpcycleReport, upcycle_checkpoint
    from moepass.upcycle.convert import convert
    from moepass.upcycle.own.load import load
    from moepass.upcycle.own.save import save
    from moepass.upcycle.report import ConversionReport
    from moepass.verify import verify

__version__ = "0.1.0"

#: Public name -> (module, attribute); attribute None: the module itself.
_PUBLIC: dict[str, tuple[str, str | None]] = {
    "ConversionReport": ("moepass.upcycle.report", "ConversionReport"),
    "DispatchSpec": ("moepass.spec", "DispatchSpec"),
    "ExpertSpec": ("moepass.spec", "ExpertSpec"),
    "InitSpec": ("moepass.spec", "InitSpec"),
    "MoESpec": ("moepass.spec", "MoESpec"),
    "PlanReport": ("moepass.explain.report", "PlanReport"),
    "RouterSpec": ("moepass.spec", "RouterSpec"),
    "UpcycleReport": ("moepass.upcycle.command", "UpcycleReport"),
    "accept_dense": ("moepass.upcycle.accept", "accept_dense"),
    "convert": ("moepass.upcycle.convert", "convert"),
    "errors": ("moepass.errors", None),
    "explain": ("moepass.explain", None),
    "last_plan": ("moepass.explain.store", "last_plan"),
    "load": ("moepass.upcycle.own.load", "load"),
    "materialize": ("moepass.attach", "materialize"),
    "moe_parameters": ("moepass.attach", "moe_parameters"),
    "nn": ("moepass.nn", None),
    "parallel": ("moepass.parallel", None),
    "parallelize": ("moepass.parallel.placement", "parallelize"),
    "reference": ("moepass.reference", None),
    "save": ("moepass.upcycle.own.save", "save"),
    "spec": ("moepass.spec", None),
    "upcycle_checkpoint": ("moepass.upcycle.command", "upcycle_checkpoint"),
    "verify": ("moepass.verify", None),
}

__all__ = [
    "ConversionReport",
    "DispatchSpec",
    "ExpertSpec",
    "InitSpec",
    "MoESpec",
    "PlanReport",
    "RouterSpec",
    "UpcycleReport",
    "__version__",
    "accept_dense",
    "convert",
    "errors",
    "explain",
    "last_plan",
    "load",
    "materialize",
    "moe_parameters",
    "nn",
    "parallel",
    "parallelize",
    "reference",
    "save",
    "spec",
    "upcycle_checkpoint",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Load a public name on first use and keep it (PEP 562)."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'moepass' has no attribute {name!r}")
    module_name, attribute = _PUBLIC[name]
    module = importlib.import_module(module_name)
    value = module if attribute is None else getattr(module, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
