"""Small graphs for the recogniser's tests: a traced function whose nodes carry example values, as Dynamo's do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import GraphModule, Node

from moepass import pointwise
from moepass.graph.dense import recognise_all
from moepass.graph.site import DenseFFN, Projection, Rejected

D, F = 8, 16


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


class _Record(fx.Interpreter):
    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n.op != "output":
            n.meta["val"] = result
        return result


def traced(fn: Callable[..., Any], *inputs: Any) -> GraphModule:
    """The graph of ``fn``; ``nn.Parameter`` inputs become parameter placeholders."""
    gm = fx.symbolic_trace(fn)
    with torch.no_grad():
        _Record(gm).run(*inputs)
    return gm


def captured(model: Callable[..., Any], *args: Any, dynamic: bool | None = None, **kwargs: Any) -> list[GraphModule]:
    """The graphs that torch.compile hands to a backend, with their verdicts in ``gm.meta["found"]``."""
    graphs: list[GraphModule] = []

    def backend(gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        gm.meta["found"] = recognise_all(gm)
        gm.meta["inputs"] = example_inputs
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(model, backend=backend, dynamic=dynamic)(*args, **kwargs)
    return graphs


def verdicts(model: Callable[..., Any], *args: Any, **kwargs: Any) -> list[DenseFFN | Rejected]:
    """Everything found in all graphs of ``model``, without paths."""
    return [found for gm in captured(model, *args, **kwargs) for _, found in gm.meta["found"]]


class _Keep(fx.Interpreter):
    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm)
        self.values: dict[Node, Any] = {}

    def run_node(self, n: Node) -> Any:
        self.values[n] = super().run_node(n)
        return self.values[n]


def error_of(gm: GraphModule, inputs: Sequence[Any], sites: Sequence[DenseFFN]) -> float:
    """Largest relative difference between what the graph computes and what its sites say it computes."""
    run = _Keep(gm)
    with torch.no_grad():
        run.run(*inputs)
        errors = [_error(site, run.values) for site in sites]
    return max(errors, default=0.0)


def _error(site: DenseFFN, held: dict[Node, Any]) -> float:
    h = torch.cat([_project(held[site.x], p, held) for p in site.ups], -1)
    y = _project(pointwise.apply(site.program, h), site.down, held)
    expected = held[site.output].nan_to_num()  # log1p and sqrt of a negative number
    return float((y.reshape(expected.shape).nan_to_num() - expected).abs().max() / expected.abs().max().clamp(min=1e-9))


def _project(x: Tensor, p: Projection, held: dict[Node, Any]) -> Tensor:
    w = held[p.weight].T if p.transposed else held[p.weight]
    b = None if p.bias is None else held[p.bias][slice(*p.rows)]
    return torch.nn.functional.linear(x, w[slice(*p.rows)], b)


def codes(found: list[DenseFFN | Rejected]) -> list[str]:
    """``site`` or the reason code of each verdict."""
    return [item.code if isinstance(item, Rejected) else "site" for item in found]
