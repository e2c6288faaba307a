"""Inputs with values, for models that run: drawn from the model's own example, or at random.

A feed makes meta tensors of the wanted shapes; here each gets values of its kind.  The same T gives the same values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moepass.explain import inputs

#: What a report says of inputs that were drawn from an example.
FROM_EXAMPLE = "its own weights; its own example inputs, or values drawn from them where --tokens asks for another T"

#: The same of a model that was initialised here.
RANDOM = "random weights; token ids drawn at random"

#: T or None -> positional and keyword arguments.
Feed = Callable[[int | None], tuple[tuple[Any, ...], dict[str, Any]]]


def feed(shapes: Feed, model: nn.Module, vocabulary: int, example: Any = None) -> Feed:
    """``shapes`` (meta tensors) with values, on the device of the model.

    ``example``  what came with the model: used as it is for ``None`` tokens, else values are drawn from its tensors.
    Without one, whole numbers are drawn below ``vocabulary`` and others from a normal distribution.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def fed(tokens: int | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if tokens is None and example is not None:
            args, kwargs = example
            return tuple(args), dict(kwargs)
        wanted = shapes(tokens)
        pools: list[Any] = []
        inputs.map_leaves(pools.append, example)
        leaves: list[Any] = []
        inputs.map_leaves(leaves.append, wanted)
        sources = iter(pools if len(pools) == len(leaves) else [None] * len(leaves))
        generator = torch.Generator().manual_seed(tokens or 0)
        args, kwargs = inputs.map_leaves(lambda leaf: _drawn(leaf, next(sources), vocabulary, generator), wanted)
        return tuple(_to(args, device)), dict(_to(kwargs, device))

    return fed


def _drawn(leaf: Any, source: Any, vocabulary: int, generator: torch.Generator) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    if isinstance(source, Tensor) and source.numel() and source.dtype == leaf.dtype:
        if source.shape == leaf.shape:
            return source.detach().clone()
        which = torch.randint(source.numel(), leaf.shape, generator=generator)
        return source.detach().cpu().reshape(-1)[which]
    if leaf.is_floating_point():
        return torch.randn(leaf.shape, generator=generator).to(leaf.dtype)
    if leaf.dtype == torch.bool:
        return torch.ones(leaf.shape, dtype=torch.bool)
    return torch.randint(vocabulary, leaf.shape, generator=generator, dtype=leaf.dtype)


def _to(values: Any, device: torch.device) -> Any:
    return inputs.map_leaves(lambda v: v.to(device) if isinstance(v, Tensor) else v, values)
