"""What to exchange for a block: a module, a chain of modules, or a part of a forward.

``module``  the traced module's whole forward is the block: the module becomes the MoE
``chain``   an ungated block made of modules called one after the other (GPT-2, OPT, BERT): the first becomes the MoE,
            the others ``nn.Identity``; what follows (dropout, residual, norm) stays
``splice``  anything else that torch.fx can rewrite (``moepass.upcycle.splice``)
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.fx import Node

from moepass.graph.site import DenseFFN
from moepass.upcycle.splice import Splice, can_splice
from moepass.upcycle.trace import Traced

_aten = torch.ops.aten
_VIEWS = {
    _aten.view.default,
    _aten.reshape.default,
    _aten._unsafe_view.default,
    _aten.flatten.using_ints,
    _aten.unflatten.int,
    _aten.contiguous.default,
    _aten.alias.default,
    _aten.squeeze.dim,
    _aten.unsqueeze.default,
}
_CHECKS = {_aten._assert_tensor_metadata.default}


@dataclass(frozen=True)
class Boundary:
    """Both empty: the traced module as a whole.  Names are relative to it; ``chain`` is in order of the calls."""

    chain: tuple[str, ...] = ()
    splice: Splice | None = None


def boundary(module: nn.Module, traced: Traced, site: DenseFFN, ups: Sequence[str], down: str) -> Boundary | None:
    """How to exchange a block, given its weights' names; None where there is no sound way."""
    if is_whole_forward(module, traced, site, {*ups, down}):
        return Boundary()
    up_modules = tuple(dict.fromkeys(name.rpartition(".")[0] for name in ups))
    down_module = down.rpartition(".")[0]
    if "" in up_modules or down_module == "" or not _called_once(traced, site, {*up_modules, down_module}):
        return None
    if site.n == 1:
        chain = _chain(traced, site, up_modules[0], down_module)
        if chain is not None:
            return Boundary(chain=chain)
    where = Splice(up_modules, down_module)
    return Boundary(splice=where) if _keeps_shape(traced, site, where) and can_splice(module, where) else None


def is_whole_forward(module: nn.Module, traced: Traced, site: DenseFFN, weights: set[str]) -> bool:
    """Whether the forward takes one tensor, returns the block of it, and does nothing else."""
    if len(inspect.signature(module.forward).parameters) != 1 or traced.output is None:
        return False
    x, y = _strip(site.x), _strip(traced.output)
    if x.name not in traced.inputs or y is not _strip(site.output):
        return False
    if traced.output.meta["val"].shape != x.meta["val"].shape:
        return False
    used = {traced.parameter(n) for n in site.interior} | {_bias(traced, p.bias) for p in (*site.ups, site.down)}
    unused = {name for name, _ in module.named_parameters()} - weights - {name for name in used if name}
    inside = set(site.interior)
    others = [n for n in traced.gm.graph.nodes if n.op == "call_function" and n not in inside]
    return not unused and all(_is_idle(n) for n in others)


def _bias(traced: Traced, node: Node | None) -> str | None:
    return None if node is None else traced.parameter(node)


def _strip(node: Node) -> Node:
    """The tensor behind views and dropouts that do nothing."""
    while node.op == "call_function" and _is_idle(node) and node.target not in _CHECKS:
        node = node.all_input_nodes[0]
    return node


def _is_idle(node: Node) -> bool:
    if node.target is _aten.dropout.default:
        return bool(node.args[1] == 0.0)
    return node.target in _VIEWS or node.target in _CHECKS


def _called_once(traced: Traced, site: DenseFFN, modules: set[str]) -> bool:
    """Whether everything that the projections' modules compute belongs to the block."""
    inside = set(site.interior) | {site.output}
    nodes = [n for n in traced.gm.graph.nodes if n.op == "call_function" and modules & set(traced.stack(n))]
    return all(n in inside or _is_idle(n) for n in nodes)


def _between(traced: Traced, site: DenseFFN, ends: set[str]) -> list[Node]:
    """Nodes of the block outside the projections' own modules."""
    nodes = [n for n in site.interior if n.op == "call_function"]
    return [n for n in nodes if not ends & set(traced.stack(n)) and n is not site.output]


def _chain(traced: Traced, site: DenseFFN, up: str, down: str) -> tuple[str, ...] | None:
    """up, the modules in between in order of their calls, down; None where a function stands between them."""
    inside = set(site.interior)
    links: list[str] = []
    for node in _between(traced, site, {up, down}):
        if node.target in _CHECKS or (_is_idle(node) and node.target not in _VIEWS):
            continue
        link = next((p for p in traced.stack(node) if _is_link(traced, p, (up, down), inside)), None)
        if link is None:
            return None
        links.append(link)
    return tuple(dict.fromkeys([up, *links, down]))


def _is_link(traced: Traced, path: str, ends: tuple[str, str], inside: set[Node]) -> bool:
    """Whether a module computes a part of the block and nothing else, and holds neither end of the chain."""
    if not path or any(f"{end}.".startswith(f"{path}.") for end in ends):
        return False
    nodes = [n for n in traced.gm.graph.nodes if n.op == "call_function" and path in traced.stack(n)]
    return all(n in inside or n.target in _CHECKS for n in nodes)


def _keeps_shape(traced: Traced, site: DenseFFN, where: Splice) -> bool:
    """Whether no view stands between the projections' modules: a view there may carry the width F."""
    return not any(n.target in _VIEWS for n in _between(traced, site, {*where.ups, where.down}))
