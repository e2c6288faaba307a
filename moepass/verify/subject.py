"""One way of running a model: what it puts out, and the gradient of everything, by name.

``Reference``  a copy that runs ``moepass.reference`` and other libraries' own code (``verify.oracle``)
``Compiled``   a copy under ``torch.compile(backend="moepass")``; the one-line form's new weights have the names that
               ``moepass.convert`` would give them, so both sides name the same things alike
Neither touches the model that was given.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from moepass import _compat
from moepass.attach import attached_states
from moepass.backend import compile_graph
from moepass.explain.report import PlanReport
from moepass.explain.store import last_plan
from moepass.options import Options
from moepass.upcycle.verify import tensors
from moepass.verify.compare import cotangents
from moepass.verify.oracle import objective, reference_copy, set_modes


@dataclass(frozen=True)
class Inputs:
    """Arguments of the model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def to(self, dtype: torch.dtype | None) -> Inputs:
        """Fresh leaves: floating tensors in ``dtype`` (None: their own), with gradients."""

        def leaf(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.is_floating_point():
                return value
            return value.detach().to(dtype or value.dtype).clone().requires_grad_()

        return Inputs(tuple(map(leaf, self.args)), {name: leaf(v) for name, v in self.kwargs.items()})

    def leaves(self) -> dict[str, Tensor]:
        """The floating arguments by name."""
        named = {f"argument {i}": v for i, v in enumerate(self.args)} | self.kwargs
        return {name: v for name, v in named.items() if isinstance(v, Tensor) and v.requires_grad}


@dataclass(frozen=True)
class Result:
    """Outputs in order, gradients by name."""

    outputs: tuple[Tensor, ...]
    gradients: dict[str, Tensor | None]

    def tensors(self) -> list[Tensor | None]:
        """Everything, in order."""
        return [*self.outputs, *self.gradients.values()]


class Reference:
    """See the module docstring.  ``dtype=None``: the model's own."""

    def __init__(self, model: nn.Module, dtype: torch.dtype | None) -> None:
        self.dtype = dtype
        self.model, self._losses = reference_copy(model, dtype)

    def parameters(self) -> dict[str, nn.Parameter]:
        """All parameters by name."""
        return dict(self.model.named_parameters())

    def run(self, inputs: Inputs) -> Result:
        """Forward and backward."""
        self._losses.clear()
        given = inputs.to(self.dtype)
        return _differentiated(self.model, given, self.parameters, self._losses)


class Compiled:
    """See the module docstring.  ``reports`` gathers the plan of every graph that was compiled."""

    def __init__(self, model: nn.Module, options: Options, *, names: Mapping[str, str] | None = None) -> None:
        self.model = copy.deepcopy(model)
        set_modes(self.model)
        self.reports: list[PlanReport] = []
        self.names = names or {}
        self._fn = torch.compile(self.model, backend=functools.partial(self._backend, options))

    def _backend(self, options: Options, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        compiled = compile_graph(gm, inputs, options)
        report = last_plan()
        assert report is not None
        self.reports.append(report)
        return compiled

    @property
    def plan(self) -> PlanReport:
        """The plan of all graphs."""
        return functools.reduce(PlanReport.merge, self.reports)

    def parameters(self) -> dict[str, nn.Parameter]:
        """The model's own parameters, and those that hang on dense weights under ``{module}.{parameter}``."""
        named = dict(self.model.named_parameters())
        for _, state in attached_states(self.model):
            where = self.names.get(state.site, state.site)
            named.update({f"{where}.{name}": p for name, p in state.moe.named_parameters()})
        return named

    def run(self, inputs: Inputs, *, recompute: bool = False) -> Result:
        """Forward and backward; ``recompute``: activation checkpointing runs the whole forward twice."""
        given = inputs.to(None)
        call = functools.partial(checkpoint, self._fn, use_reentrant=False) if recompute else self._fn
        with _compat.many_recompiles():
            return _differentiated(call, given, self.parameters, ())


def _differentiated(
    call: Callable[..., Any],
    given: Inputs,
    parameters: Callable[[], Mapping[str, nn.Parameter]],
    losses: Sequence[Tensor],
) -> Result:
    outputs = [t for t in tensors(call(*given.args, **given.kwargs)) if t.is_floating_point() and t.requires_grad]
    # Asked for after the forward: the one-line form makes its new weights there.
    wanted: dict[str, Tensor] = {**given.leaves(), **{n: p for n, p in parameters().items() if p.requires_grad}}
    grads: Sequence[Tensor | None] = [None] * len(wanted)
    if outputs and wanted:
        total = objective(outputs, cotangents(outputs), losses)
        grads = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)
    return Result(tuple(o.detach() for o in outputs), dict(zip(wanted, grads, strict=True)))


def pinned(report: PlanReport, lowering: str) -> PlanReport:
    """The plan with ``lowering`` for every block that it may serve."""
    sites = tuple(
        site.model_copy(update={"lowering": lowering})
        if site.status == "lowered" and any(a.lowering == lowering and a.legal for a in site.alternatives)
        else site
        for site in report.sites
    )
    return report.model_copy(update={"sites": sites})


def with_plan(options: Options, plan: PlanReport) -> Options:
    """Options that replay a plan, compiled by the quick inner compiler."""
    return replace(options, plan=plan, inner="aot_eager", inductor={}, measure=False)


def step(subjects: Sequence[Mapping[str, nn.Parameter]], gradients: Mapping[str, Tensor | None]) -> None:
    """The same optimizer step, in place, on the parameters of each subject: two percent along each gradient."""
    for parameters in subjects:
        moved = list(_moved(parameters, gradients))
        if moved:
            torch.optim.SGD(moved, lr=1.0).step()


def _moved(parameters: Mapping[str, nn.Parameter], gradients: Mapping[str, Tensor | None]) -> Iterator[nn.Parameter]:
    for name, gradient in gradients.items():
        p = parameters.get(name)
        if p is None or gradient is None or not float(gradient.abs().max() if gradient.numel() else 0.0):
            continue
        size = float(p.detach().abs().max()) or 1.0
        p.grad = (gradient.double() * (0.02 * size / float(gradient.abs().max()))).to(p.dtype)
        yield p
