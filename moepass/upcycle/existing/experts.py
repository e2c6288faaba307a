"""Guesses at the expert weights of a hand-written MoE block, from shapes and, where experts are modules, by tracing.

    ModuleList of E equal modules, each a dense feed-forward block    (Mixtral before transformers 5, NeMo AutoModel)
    stacked parameters, two or three, in [E, F, D] or [E, D, F]       (torchtitan, OLMo-core), or flat (Megatron)

A guess is a way to read ``w_in`` and ``w_out``; what cannot be told from shapes (which of two is the gate, which
activation, which way up a square weight stands) becomes several guesses, and numbers choose (``search``).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from moepass import pointwise
from moepass.nn.origin import dense_matrices
from moepass.upcycle.existing.activation import read_activation
from moepass.upcycle.find import Shape, examine
from moepass.upcycle.trace import fingerprint

#: Activations to try where the block does not hold its own as an attribute: what the peers' MoE blocks use.
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu(g)**2", "sigmoid")
#: Names under which blocks keep their activation.
_ACT_NAMES = ("act_fn", "act", "activation", "activation_fn", "act_func", "activation_func", "nonlinearity")
#: Names under which blocks keep E.
_COUNT_NAMES = ("num_experts", "num_local_experts", "n_routed_experts", "n_experts", "moe_num_experts", "E")

#: ``w_in [E, n*F, D]``, ``w_out [E, D, F]``, ``b_in``, ``b_out``.
Weights = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class Layout:
    """How one stacked parameter is read as ``[E, rows, columns]``: a shape to view it in, and whether to transpose."""

    name: str
    view: tuple[int, ...]
    transposed: bool

    def read(self, block: nn.Module) -> Tensor:
        """The weight with rows as output features."""
        stacked = block.get_parameter(self.name).view(self.view)
        return stacked.transpose(1, 2) if self.transposed else stacked


@dataclass(frozen=True)
class Guess:
    """One reading of a block's experts.  ``names``: every parameter it uses, relative to the block."""

    E: int
    D: int
    F: int
    activation: str
    names: tuple[str, ...]
    experts: tuple[str, ...] = ()  # the modules, where experts are modules
    shape: Shape | None = None  # the dense block that each of them is
    ups: tuple[Layout, ...] = ()
    down: Layout | None = None
    interleaved: bool = False

    @property
    def copies(self) -> bool:
        """Whether ``w_in`` and ``w_out`` are new memory rather than the block's own."""
        return bool(self.experts) or len(self.ups) != 1 or self.interleaved

    def read(self, block: nn.Module) -> Weights:
        """``w_in [E, n*F, D]`` gate rows first, ``w_out [E, D, F]``, ``b_in``, ``b_out``."""
        if self.shape is not None:
            return _stack([_dense(block.get_submodule(name), self.shape) for name in self.experts])
        assert self.down is not None
        parts = [layout.read(block) for layout in self.ups]
        w_in = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        if self.interleaved:
            w_in = torch.cat([w_in[:, ::2], w_in[:, 1::2]], dim=1)
        return w_in, self.down.read(block), None, None


def guesses(block: nn.Module, E: int, D: int, router: str) -> list[Guess]:
    """Every reading of a block's experts that the shapes allow; ``router``: the parameter that makes the logits."""
    if (listed := module_list(block, E)) is not None:
        found = _from_list(block, listed, E, D)
        return [] if found is None else [found]
    return list(_from_stacked(block, E, D, router))


# --- experts as modules ----------------------------------------------------------------------------------------------


def module_list(block: nn.Module, E: int | None = None) -> str | None:
    """The name of the one ModuleList (or ModuleDict) of at least two (or E) modules that are equal in structure."""
    names = []
    for name, child in block.named_modules():
        if isinstance(child, nn.ModuleList | nn.ModuleDict) and len(child) > 1 and (E is None or len(child) == E):
            prints = {fingerprint(m, own_number=False) for m in child.children()}
            if len(prints) == 1 and any(True for _ in child.parameters()):
                names.append(name)
    return names[0] if len(names) == 1 else None


def _from_list(block: nn.Module, listed: str, E: int, D: int) -> Guess | None:
    experts = tuple(f"{listed}.{name}" for name, _ in block.get_submodule(listed).named_children())
    first = block.get_submodule(experts[0])
    shape = expert_shape(first, D)
    if shape is None:
        return None
    names = tuple(f"{expert}.{name}" for expert in experts for name in shape.parameters)
    return Guess(E, D, shape.F, shape.program, names, experts=experts, shape=shape)


def expert_shape(expert: nn.Module, D: int) -> Shape | None:
    """The dense feed-forward block that an expert is as a whole, if it is one."""
    look = examine(expert, D, next(expert.parameters()))
    if len(look.shapes) != 1:
        return None
    shape = look.shapes[0]
    whole = shape.boundary is not None and not shape.boundary.chain and shape.boundary.splice is None
    covers = {name for name, _ in expert.named_parameters()} == set(shape.parameters)
    return shape if whole and covers and shape.D == D and not shape.dropout else None


def _dense(expert: nn.Module, shape: Shape) -> Weights:
    return dense_matrices(shape.ups, shape.down, expert.get_parameter)


def _stack(experts: list[Weights]) -> Weights:
    def column(i: int) -> Tensor | None:
        tensors = [t for t in (expert[i] for expert in experts) if t is not None]
        return torch.stack(tensors) if tensors else None

    w_in, w_out = column(0), column(1)
    assert w_in is not None
    assert w_out is not None
    return w_in, w_out, column(2), column(3)


# --- stacked parameters ----------------------------------------------------------------------------------------------


def stacked(block: nn.Module, E: int, D: int, router: str) -> list[str]:
    """Names of the parameters that may be stacked expert weights: E matrices with a side of D.

    Flat ones ``[E*F, D]`` count only where the block itself says E: every pair of matrices could be that.
    """
    flat = E in {getattr(module, name, None) for module in block.modules() for name in _COUNT_NAMES}
    return [
        name
        for name, p in block.named_parameters()
        if name != router and p.is_floating_point() and (flat or p.dim() == 3) and _layouts(name, p, E, D)
    ]


def _layouts(name: str, p: Tensor, E: int, D: int) -> list[Layout]:
    """Readings of a parameter as ``[E, rows, D]``, rows being the output features of an input projection."""
    fits = p.dim() in (2, 3) and p.is_contiguous() and p.numel() % (E * D) == 0 and p.numel() > E * D
    if not fits or (p.dim() == 3 and p.shape[0] != E):
        return []
    found = []
    if p.shape[-1] == D and (p.dim() == 3 or p.shape[0] % E == 0):
        found.append(Layout(name, (E, p.numel() // (E * D), D), transposed=False))
    if (p.dim() == 3 and p.shape[1] == D) or (p.dim() == 2 and p.shape[0] == D):
        found.append(Layout(name, (E, D, p.numel() // (E * D)), transposed=True))
    return found


def _from_stacked(block: nn.Module, E: int, D: int, router: str) -> Iterator[Guess]:
    names = stacked(block, E, D, router)
    readings = {name: _layouts(name, block.get_parameter(name), E, D) for name in names}
    if len(names) not in (2, 3):
        return
    for order in itertools.permutations(names):
        for layouts in itertools.product(*(readings[name] for name in order)):
            *ups, back = layouts
            # As [E, rows, D] the output projection stands on its head: rows are its input features.
            down = replace(back, transposed=not back.transposed)
            rows = [_rows(layout) for layout in ups]
            if len(set(rows)) == 1:
                yield from _activated(block, E, D, tuple(ups), down, rows[0], _rows(back))


def _rows(layout: Layout) -> int:
    return layout.view[2] if layout.transposed else layout.view[1]


def _activated(
    block: nn.Module, E: int, D: int, ups: tuple[Layout, ...], down: Layout, rows: int, F: int
) -> Iterator[Guess]:
    names = tuple(layout.name for layout in (*ups, down))
    plain = Guess(E, D, F, "", names, ups=ups, down=down)
    texts = _activations(block)
    if len(ups) == 2 and rows == F:
        yield from (replace(plain, activation=pointwise.canonical(f"({text})*u")) for text in texts)
    if len(ups) == 1 and rows == F:
        yield from (replace(plain, activation=pointwise.canonical(text)) for text in texts)
    if len(ups) == 1 and rows == 2 * F:
        for text, interleaved in itertools.product(texts, (False, True)):
            for program in (f"({text})*u", f"({_swapped(text)})*g"):
                yield replace(plain, activation=pointwise.canonical(program), interleaved=interleaved)


def _swapped(text: str) -> str:
    return pointwise.unparse(pointwise.rename(pointwise.parse(text), {"g": "u"}))


def _activations(block: nn.Module) -> list[str]:
    """Ungated programs to try: the block's own activation where an attribute holds it, else the usual ones."""
    for module in block.modules():
        for name in _ACT_NAMES:
            fn = getattr(module, name, None)
            found = read_activation(fn, 6) if callable(fn) else None
            if found is not None and not isinstance(found, str) and pointwise.n_inputs(found.text) == 1:
                return [found.text]
    return [pointwise.unparse(pointwise.parse(text)) for text in ACTIVATIONS]
