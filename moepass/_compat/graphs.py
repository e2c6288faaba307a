"""Graphs that Dynamo owns, and the fake tensors in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode


def copy_dynamo_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """An owned copy of a graph that Dynamo handed over, sub-graphs included.

    Keeps ``node.meta``, ``_dynamo_source`` of placeholders, ``gm.meta`` and ``_param_name_to_source``: without them
    AOTAutograd demotes parameters from static inputs (reference/compiler.md, finding 7).
    """
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(gm.graph, mapping))
    for old, new in mapping.items():
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
        new.meta = dict(old.meta)
    copied = fx.GraphModule(gm, graph, class_name=type(gm).__name__)
    copied.meta = dict(gm.meta)
    for name in ("_param_name_to_source", "_checkpoint_context_fn"):
        if hasattr(gm, name):
            setattr(copied, name, getattr(gm, name))
    for name, child in gm.named_children():
        if isinstance(child, fx.GraphModule) and hasattr(copied, name):
            setattr(copied, name, copy_dynamo_graph(child))
    return copied


def add_static_placeholder(graph: fx.Graph, name: str, example: FakeTensor | None, *, top_level: bool) -> fx.Node:
    """A new input after the existing ones, counted as static (a weight) by AOTAutograd and CUDA graphs."""
    last = [n for n in graph.nodes if n.op == "placeholder"]
    anchor = last[-1] if last else None
    with graph.inserting_after(anchor) if anchor is not None else graph.inserting_before(next(iter(graph.nodes))):
        node = graph.placeholder(name)
    if top_level:
        node._dynamo_source = None
        node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    if example is not None:
        node.meta["example_value"] = example
    return node


def graph_fake_mode(gm: fx.GraphModule) -> FakeTensorMode | None:
    """The fake mode of the graph's own example values (not the backend's fresh one: finding 8)."""
    for node in gm.graph.nodes:
        value = node.meta.get("example_value")
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return None


def fake_like(mode: FakeTensorMode, tensor: Tensor) -> FakeTensor:
    """A fake of ``tensor`` with static shape in ``mode``."""
    return mode.from_tensor(tensor, static_shapes=True)


def static_example(tensor: Tensor) -> Tensor:
    """An example input with static shape for the backend (by default dimensions without a source become symbols)."""
    context = TracingContext.try_get()
    if context is None or context.fake_mode is None:
        return tensor
    return fake_like(context.fake_mode, tensor)


def readable(gm: fx.GraphModule) -> str:
    """The graph as annotated Python source."""
    return str(gm.print_readable(print_output=False))


def is_fake(value: object) -> bool:
    """Whether a value is a FakeTensor."""
    return isinstance(value, FakeTensor)


def recompute_meta(node: fx.Node, mode: FakeTensorMode) -> None:
    """Set ``meta["example_value"]`` of a new call_function node by running it on its arguments' example values."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["example_value"])
    with mode, torch.enable_grad():
        node.meta["example_value"] = cast(Callable[..., Any], node.target)(*args, **kwargs)


def trace_function(fn: Callable[[Tensor], Any], example: Tensor) -> fx.Graph:
    """The aten graph of ``fn(example)``, run for real; ``meta["val"]`` holds the values' shapes."""
    from torch.fx.experimental.proxy_tensor import make_fx

    # A function of exactly one argument: bound methods and modules confuse the tracer.
    return make_fx(lambda x: fn(x))(example).graph
