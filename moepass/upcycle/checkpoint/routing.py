"""What the routers of a stock MoE do with the tokens of a run: balance, and virtual groups that break.

A virtual group is a set of experts with equal router rows; its experts hold the parts of one dense block, so a token
must choose all of them or none.  Equal rows have equal logits, and ties keep the group together; in bfloat16 the logits
of *different* groups may tie too, and a tie at the edge of the top-k cuts a group.  The block is therefore asked once
more in bfloat16, with its experts replaced by a stub.
Source: He et al. 2024 (virtual groups); ``reference/upcycling.md`` section 1.0.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class RouterBalance:
    """Routing of one layer.

    ``tokens_per_expert``  [E], counts of (token, choice) pairs; their sum is T*K
    ``imbalance``  largest count over the mean count (1 is perfect)
    ``entropy``    of the shares, divided by log E (1 is perfect)
    ``group_size`` G, or None where no rows are tied;  ``broken_*``: tokens that chose a part of a group
    """

    layer: str
    tokens_per_expert: tuple[int, ...]
    imbalance: float
    entropy: float
    group_size: int | None
    broken_float32: int
    broken_bfloat16: int


class _Stub(nn.Module):
    """In the place of the experts: keeps the choice, computes nothing."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.index: Tensor | None = None
        for name in ("num_experts", "top_k", "hidden_dim"):
            if isinstance(getattr(experts, name, None), int):
                setattr(self, name, getattr(experts, name))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, *_: Any, **__: Any) -> Tensor:
        self.index = top_k_index
        return torch.zeros_like(hidden_states)


@dataclass
class RoutingProbe:
    """Hooks on one MoE block (the parent of its experts).  ``layer`` is the decoder layer's name."""

    layer: str
    block: nn.Module
    experts_name: str
    x: Tensor | None = None
    index: Tensor | None = None
    handles: list[Any] = field(default_factory=list)

    def attach(self) -> None:
        """Watch the next forward."""
        experts = getattr(self.block, self.experts_name)
        self.handles = [
            self.block.register_forward_pre_hook(lambda _, args, kwargs: self._see_x(args, kwargs), with_kwargs=True),
            experts.register_forward_pre_hook(lambda _, args, kwargs: self._see_index(args, kwargs), with_kwargs=True),
        ]

    def detach(self) -> None:
        """Stop watching."""
        for handle in self.handles:
            handle.remove()

    def _see_x(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.x = args[0] if args else kwargs["hidden_states"]

    def _see_index(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.index = args[1] if len(args) > 1 else kwargs["top_k_index"]

    def balance(self) -> RouterBalance | None:
        """To be called while the block's weights are in memory; leaves the block in bfloat16."""
        if self.x is None or self.index is None:
            return None
        router = _router_rows(self.block, self.experts_name)
        E = int(self.index.max()) + 1 if router is None else router.shape[0]
        counts = torch.bincount(self.index.reshape(-1), minlength=E)
        groups = None if router is None else virtual_groups(router)
        broken32 = 0 if groups is None else broken_groups(self.index, groups)
        broken16 = 0 if groups is None else broken_groups(self._index_in_bfloat16(), groups)
        size = None if groups is None else int((groups == 0).sum())
        imbalance = float(counts.max() / counts.float().mean())
        found = tuple(int(c) for c in counts)
        return RouterBalance(self.layer, found, imbalance, _entropy(counts), size, broken32, broken16)

    def _index_in_bfloat16(self) -> Tensor:
        assert self.x is not None
        experts = getattr(self.block, self.experts_name)
        stub = _Stub(experts)
        setattr(self.block, self.experts_name, stub)
        try:
            self.block.to(torch.bfloat16)(self.x.to(torch.bfloat16))
        finally:
            setattr(self.block, self.experts_name, experts)
        assert stub.index is not None
        return stub.index


def find_probes(model: nn.Module, layers: tuple[str, ...]) -> dict[str, RoutingProbe]:
    """Layer -> probe, for the layers whose experts are called with (hidden_states, top_k_index, top_k_weights)."""
    found = {}
    for layer in layers:
        for module in model.get_submodule(layer).modules():
            for name, child in module.named_children():
                if "top_k_index" in inspect.signature(child.forward).parameters:
                    found[layer] = RoutingProbe(layer, module, name)
    return found


def _router_rows(block: nn.Module, experts_name: str) -> Tensor | None:
    """The router's weight [E, D]: the matrix beside the experts with a row per expert."""
    experts = getattr(block, experts_name)
    E = next((p.shape[0] for p in experts.parameters() if p.dim() == 3), None)
    for name, p in block.named_parameters():
        if p.dim() == 2 and p.shape[0] == E and not name.startswith(f"{experts_name}.") and "shared" not in name:
            return p
    return None


def virtual_groups(router_ED: Tensor) -> Tensor | None:
    """Group of each expert [E], counted from the first; None where rows are all different, all equal, or uneven."""
    _, inverse, sizes = torch.unique(router_ED.detach(), dim=0, return_inverse=True, return_counts=True)
    G = int(sizes[0])
    return inverse if 1 < G < router_ED.shape[0] and bool((sizes == G).all()) else None


def broken_groups(index_TK: Tensor, group_of_E: Tensor) -> int:
    """Tokens that chose some experts of a group and not the others."""
    E, groups = group_of_E.numel(), int(group_of_E.max()) + 1
    index_TK = index_TK.reshape(-1, index_TK.shape[-1])
    chosen_TE = torch.zeros(index_TK.shape[0], E).scatter(1, index_TK.long(), 1.0)
    counts = torch.zeros(index_TK.shape[0], groups).index_add(1, group_of_E, chosen_TE)
    partly = (counts > 0) & (counts < E // groups)
    return int(partly.any(1).sum())


def _entropy(counts: Tensor) -> float:
    if counts.numel() < 2:
        return 1.0
    share = counts.double() / counts.sum()
    return float(torch.special.entr(share).sum()) / math.log(counts.numel())
