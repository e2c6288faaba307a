"""Rewriting a forward by torch.fx, for blocks that are neither a module nor a chain of modules of their own.

Example: ``self.drop(self.down(F.silu(self.gate(x)) * self.up(x)))``.  The forward is traced symbolically, the nodes
from the input projections to the output projection become one call of the MoE, and the result becomes the ``forward``
of this one instance: its class, its other modules and its hooks stay.  The projections become ``nn.Identity``.

Only forwards that torch.fx traces to the same graph in training and in evaluation are accepted: ``F.dropout(...,
training=self.training)`` would freeze the mode of the day into the code.
"""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable
from dataclasses import dataclass

from torch import fx, nn

from moepass.nn.moe import MoE

_GRAPH = "moepass_graph"  # attribute of a spliced forward: the graph that it was made from


@dataclass(frozen=True)
class Splice:
    """Names of the projections' modules, relative to the module whose forward is rewritten."""

    ups: tuple[str, ...]
    down: str


def can_splice(module: nn.Module, where: Splice) -> bool:
    """Whether the forward can be rewritten safely.  Leaves the module as it is."""
    flags = [(m, m.training) for m in module.modules()]
    texts = []
    try:
        for training in (True, False):
            for m, _ in flags:
                m.training = training
            graph = _graph(module)
            texts.append(str(graph))
            if _single_calls(graph, where) is None:
                return False
        return texts[0] == texts[1]
    except Exception:  # whatever the tracer meets, the answer is no
        return False
    finally:
        for m, flag in flags:
            m.training = flag


def splice(module: nn.Module, where: Splice, moe: MoE) -> Callable[[], None]:
    """Let the module's forward call ``moe`` in the place of the block.  Returns the undo."""
    graph = _graph(module)
    calls = _single_calls(graph, where)
    assert calls is not None, "can_splice said yes"
    ups, down = calls
    name = spliced_name(module)
    with graph.inserting_before(down):
        call = graph.call_module(name, (ups[0].args[0],))
    down.replace_all_uses_with(call)
    _erase_unused(graph, down)

    before = module.__dict__.get("forward")
    module.add_module(name, moe)
    module.forward = _forward(module, graph)

    def undo() -> None:
        delattr(module, name)
        if before is None:
            del module.__dict__["forward"]
        else:
            module.forward = before

    return undo


def spliced_name(module: nn.Module) -> str:
    """The attribute that the next MoE of a spliced forward becomes."""
    return next(name for i in itertools.count() if not hasattr(module, name := f"moe_{i}" if i else "moe"))


def _graph(module: nn.Module) -> fx.Graph:
    """The module's forward as a graph: traced, or copied from an earlier splice (the tracer reads the class)."""
    known = getattr(getattr(module.__dict__.get("forward"), "__func__", None), _GRAPH, None)
    if known is None:
        return fx.Tracer().trace(module)
    copied = fx.Graph()
    copied.output(copied.graph_copy(known, {}))
    return copied


def _forward(module: nn.Module, graph: fx.Graph) -> types.MethodType:
    """The graph's code as a method of this instance."""
    function = type(fx.GraphModule(module, graph, class_name=type(module).__name__)).forward
    setattr(function, _GRAPH, graph)
    # Pickle keeps a method by name and would find the class's own forward: a name that it lacks fails loudly instead.
    function.__name__ = "forward_spliced_by_moepass_save_the_state_dict_instead"
    return types.MethodType(function, module)


def _erase_unused(graph: fx.Graph, node: fx.Node) -> None:
    """Erase a node without users, and then those of its inputs that only it used."""
    if node.users or node.op == "placeholder":
        return
    inputs = node.all_input_nodes
    graph.erase_node(node)
    for each in inputs:
        _erase_unused(graph, each)


def _single_calls(graph: fx.Graph, where: Splice) -> tuple[list[fx.Node], fx.Node] | None:
    """The one call of each projection, with one common input of the input projections; None if there is no such."""
    calls: dict[str, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "call_module" and node.target in {*where.ups, where.down}:
            if node.target in calls:
                return None
            calls[str(node.target)] = node
    if len(calls) != len(where.ups) + 1:
        return None
    ups = [calls[target] for target in where.ups]
    if any(len(n.args) != 1 or n.kwargs or n.args[0] is not ups[0].args[0] for n in ups):
        return None
    return ups, calls[where.down]
