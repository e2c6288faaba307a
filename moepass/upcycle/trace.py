"""Tracing modules of a live model, to look for feed-forward blocks with the recogniser of the backend.

``trace`` exports one module in training mode (so that dropout shows), whatever its device: nothing is computed.
``Traced`` gives the recogniser's graph with the way back: nodes to submodules, placeholders to parameters.
``Memo`` traces structurally equal modules once.
"""

from __future__ import annotations

import logging
import types
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.fx import Node

from moepass import errors
from moepass.upcycle.modules import mode

T = TypeVar("T")

#: Attributes that number the layers: they index caches, so equal layers differ in them.
LAYER_NUMBERS = {"layer_idx", "layer_id", "layer_number", "layer_index"}


@dataclass(frozen=True)
class Traced:
    """The graph of ``module(x)``.  Names are relative to the module."""

    gm: fx.GraphModule
    parameter_of: dict[str, str]  # placeholder name -> parameter name
    inputs: tuple[str, ...]  # placeholder names of x
    output: Node | None  # the returned tensor; None unless the forward returns exactly one

    def parameter(self, node: Node) -> str | None:
        """The parameter that a node holds, if it is one."""
        return self.parameter_of.get(node.name) if node.op == "placeholder" else None

    def stack(self, node: Node) -> tuple[str, ...]:
        """Names of the submodules whose forward the node stands in, outermost first; "" is the module itself."""
        return tuple(path.split("@")[0] for path, _ in (node.meta.get("nn_module_stack") or {}).values())


def sample(D: int | None, tokens: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Input of a trace: normal ``[1, tokens, D]`` on the device of ``like``, or zero token ids ``[1, tokens]``."""
    if D is None:
        return torch.zeros(1, tokens, dtype=torch.int64, device=like.device)
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randn(1, tokens, D, generator=generator, dtype=torch.promote_types(dtype, torch.float32)).to(
        like.device, dtype
    )


def trace(module: nn.Module, D: int | None, like: Tensor) -> Traced | str:
    """Export ``module(x)``; the error's text if it fails.  x: ``sample`` of three tokens in the dtype of ``like``."""
    x = sample(D, 3, like, like.dtype)
    try:
        with mode(module, training=True), torch.no_grad(), _quiet():
            program = torch.export.export(module, (x,), strict=False)
    except Exception as error:  # a module may fail on a lone tensor in any way: then its parent is asked
        return f"{type(error).__name__}: {errors.first_line(error)}"
    signature = program.graph_signature
    (returned,) = program.graph.output_node().args
    single = isinstance(returned, tuple) and len(returned) == 1 and program.call_spec.out_spec.is_leaf()
    node = returned[0] if single and isinstance(returned, tuple) else None
    inputs = tuple(name for name in signature.user_inputs if isinstance(name, str))
    output = node if isinstance(node, Node) else None
    return Traced(program.graph_module, dict(signature.inputs_to_parameters), inputs, output)


@contextmanager
def _quiet() -> Iterator[None]:
    """Failed attempts are part of the search; torch's own messages about them are not for the user."""
    loggers = [logging.getLogger(name) for name in ("torch.export", "torch._subclasses.fake_tensor")]
    disabled = [logger.disabled for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.disabled = True
            yield
        finally:
            for logger, was in zip(loggers, disabled, strict=True):
                logger.disabled = was


@dataclass
class Memo(Generic[T]):
    """Answers per structure.  ``is_empty`` ones are shared even between modules that differ in their layer number."""

    is_empty: Callable[[T], bool]
    exact: dict[Hashable, T] = field(default_factory=dict)
    loose: dict[Hashable, T] = field(default_factory=dict)

    def get(self, module: nn.Module, extra: Hashable, compute: Callable[[], T]) -> T:
        """The answer for a module like this one, computed at most once."""
        loose, exact = (extra, fingerprint(module, own_number=False)), (extra, fingerprint(module, own_number=True))
        if exact in self.exact:
            return self.exact[exact]
        if loose in self.loose:
            return self.loose[loose]
        answer = self.exact[exact] = compute()
        if self.is_empty(answer):
            self.loose[loose] = answer
        return answer


def fingerprint(module: nn.Module, *, own_number: bool) -> Hashable:
    """Equal for modules that trace alike: classes, settings, shapes, dtypes and devices of the whole subtree.

    Layer numbers below the module are left out; the module's own counts where ``own_number`` says so.
    """
    return tuple(
        (name, type(m), _tensors(m), _settings(m, keep_numbers=own_number and m is module))
        for name, m in module.named_modules()
    )


def _tensors(module: nn.Module) -> Hashable:
    named = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return tuple((name, tuple(t.shape), t.dtype, t.device, type(t)) for name, t in named)


def _settings(module: nn.Module, *, keep_numbers: bool) -> Hashable:
    items = module.__dict__.items()
    return tuple(
        (name, _frozen(value))
        for name, value in items
        if not name.startswith("_") and name != "training" and (keep_numbers or name not in LAYER_NUMBERS)
    ) + tuple((name, id(value)) for name, value in items if name.endswith("_hooks") and value)


def _frozen(value: Any) -> Hashable:
    """Plain values by value, everything else (functions, configs) by identity."""
    if isinstance(value, (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)):
        return (type(value).__name__, value)
    if isinstance(value, (tuple, list)):
        return (type(value).__name__, *map(_frozen, value))
    if isinstance(value, types.MethodType):
        return id(value.__func__)
    return id(value)
