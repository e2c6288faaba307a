"""Meta-device inputs with a wanted number of tokens.

T is the number of rows that a feed-forward block sees: all elements of integer ids ``[B, S]``, all but the last
dimension of activations ``[..., D]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moepass import errors


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype of the first floating parameter; float32 where there is none."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def to_meta(values: Any, dtype: torch.dtype | None = None) -> Any:
    """A copy of a nest of values with every tensor on meta; floating tensors in ``dtype`` if given."""

    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        wanted = dtype if dtype is not None and value.is_floating_point() else value.dtype
        return torch.empty(value.shape, dtype=wanted, device="meta", requires_grad=value.requires_grad)

    return map_leaves(move, values)


def in_dtype(values: Any, dtype: torch.dtype | None) -> Any:
    """A nest of values with floating tensors in ``dtype`` if given."""
    return map_leaves(lambda v: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v, values)


def vocabulary(model: nn.Module) -> int:
    """Rows of the first Embedding; 1 where there is none."""
    return next((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), 1)


def module_to_meta(model: nn.Module) -> nn.Module:
    """``model`` with parameters, buffers and plain tensor attributes on meta, in place (its weights are let go)."""
    model = model.to("meta")
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, Tensor):
                setattr(module, name, value.to("meta"))
    return model


def ids(batch: int, length: int) -> Tensor:
    """Token ids ``[B, S]``, int64, meta."""
    return torch.zeros(batch, length, dtype=torch.long, device="meta")


def for_transformers(
    name: str, main: str, takes: set[str], config: Any, dtype: torch.dtype, tokens: int
) -> dict[str, Any]:
    """Keyword arguments for a Hugging Face model: ids ``[B, S]`` with B*S = T, or as many images as hold T patches.

    S is the largest divisor of T that the positions of the model allow.
    """
    if main == "input_ids":
        limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or tokens
        length = next(s for s in range(min(tokens, int(limit)), 0, -1) if tokens % s == 0)
        given = {"input_ids": ids(tokens // length, length)}
        if "decoder_input_ids" in takes:
            given["decoder_input_ids"] = ids(tokens // length, length)
        return given
    size, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    if main == "pixel_values" and isinstance(size, int) and isinstance(patch, int):
        images = max(1, round(tokens / ((size // patch) ** 2 + 1)))
        return {main: torch.empty(images, config.num_channels, size, size, dtype=dtype, device="meta")}
    raise errors.BadTarget(
        target=name,
        detail=f"moepass does not know how to make its input {main!r}",
        remedy="write a function that returns (module, example_args) and give module:function",
    )


def guess(name: str, model: nn.Module) -> tuple[Any, ...]:
    """One-token example arguments for a module that starts with a Linear or an Embedding."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            return (ids(1, 1),)
        if isinstance(module, nn.Linear):
            return (torch.empty(1, module.in_features, dtype=module.weight.dtype, device="meta"),)
    raise errors.BadTarget(
        target=name,
        detail="it has neither an Embedding nor a Linear to guess the input from",
        remedy="return (module, example_args)",
    )


def resize(name: str, args: tuple[Any, ...], tokens: int) -> tuple[Any, ...]:
    """Example arguments with T tokens; tensors that share the first tensor's leading dimensions follow it.

    The last token dimension takes T, the ones before it become 1.  Tensors on meta in, tensors on meta out.
    """
    first = next((a for a in args if isinstance(a, Tensor)), None)
    if first is None:
        raise errors.BadTarget(
            target=name, detail="no argument is a tensor, so there is no T to set", remedy="leave out --tokens"
        )
    lead = _token_shape(first)
    if not 1 <= len(lead) <= 2:
        raise errors.BadTarget(
            target=name,
            detail=f"its input of shape {list(first.shape)} is not [T, D], [B, S, D] or ids",
            remedy="leave out --tokens",
        )
    new_lead = (*(1 for _ in lead[:-1]), tokens)

    def follow(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.shape[: len(lead)] != lead:
            return value
        return value.new_empty((*new_lead, *value.shape[len(lead) :]))

    return tuple(follow(a) for a in args)


@dataclass(frozen=True)
class Dims:
    """Shapes of an exported program's tensor inputs: one entry per leaf, sizes are numbers or symbol names."""

    leaves: tuple[tuple[int | str, ...] | None, ...]
    low: dict[str, int]
    high: dict[str, float]


def exported_dims(program: torch.export.ExportedProgram) -> Dims:
    """Which sizes of the inputs are free, and between which bounds."""
    nodes = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
    leaves: list[tuple[int | str, ...] | None] = []
    for name in program.graph_signature.user_inputs:
        value = nodes[name].meta.get("val") if isinstance(name, str) and name in nodes else None
        shape = tuple(s if isinstance(s, int) else str(s) for s in value.shape) if isinstance(value, Tensor) else None
        leaves.append(shape)
    bounds = {str(symbol): (r.lower, r.upper) for symbol, r in program.range_constraints.items()}
    return Dims(
        leaves=tuple(leaves),
        low={s: max(1, int(low)) for s, (low, _) in bounds.items()},
        high={s: _upper(high) for s, (_, high) in bounds.items()},
    )


def resize_exported(
    name: str, args: Any, kwargs: Any, dims: Dims, tokens: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of an exported program with T tokens, if its free sizes allow it; else `errors.BadTarget`."""
    values: list[Any] = []
    map_leaves(values.append, (args, kwargs))
    if len(values) != len(dims.leaves):
        raise errors.BadTarget(
            target=name, detail="its inputs are not plain tuples, lists and dicts", remedy="leave out --tokens"
        )
    position = next((i for i, v in enumerate(values) if isinstance(v, Tensor)), None)
    shape = None if position is None else dims.leaves[position]
    if position is None or shape is None:
        raise errors.BadTarget(target=name, detail="it has no tensor input", remedy="leave out --tokens")
    lead = shape if not values[position].is_floating_point() else shape[:-1]
    sizes = _solve(name, lead, dims, tokens)

    def size(s: int | str) -> int:
        return s if isinstance(s, int) else sizes.get(s, dims.low.get(s, 1))

    leaves = iter(dims.leaves)

    def resized(value: Any) -> Any:
        leaf = next(leaves)
        return value.new_empty([size(s) for s in leaf]) if isinstance(value, Tensor) and leaf is not None else value

    new_args, new_kwargs = map_leaves(resized, (args, kwargs))
    return tuple(new_args), dict(new_kwargs)


def _solve(name: str, lead: tuple[int | str, ...], dims: Dims, tokens: int) -> dict[str, int]:
    """Values of the free sizes so that the product of ``lead`` is T: the last is solved for, others are minimal."""
    free = [s for s in lead if isinstance(s, str)]
    fixed = math.prod(s for s in lead if isinstance(s, int))
    if not free:
        if fixed == tokens:
            return {}
        raise errors.BadTarget(
            target=name,
            detail=f"it was exported for exactly {fixed} tokens, so it has no plan for {tokens}",
            remedy="leave out --tokens, or export it with dynamic_shapes",
        )
    last = free[-1]
    sizes = {s: dims.low.get(s, 1) for s in free[:-1]}
    count, rest = divmod(tokens, fixed * math.prod(sizes.values()))
    if rest or free.count(last) > 1 or not dims.low.get(last, 1) <= count <= dims.high.get(last, math.inf):
        raise errors.BadTarget(
            target=name,
            detail=f"its input sizes {list(lead)} (from {dims.low} to {dims.high}) cannot make {tokens} tokens",
            remedy="choose --tokens within them, or export it with other dynamic_shapes",
        )
    return {**sizes, last: count}


def _upper(bound: Any) -> float:
    """A symbolic upper bound as a float; infinite where torch says ``int_oo``."""
    try:
        return float(int(bound))
    except (TypeError, ValueError, OverflowError):
        return math.inf


def map_leaves(function: Callable[[Any], Any], values: Any) -> Any:
    """``function`` of every leaf of nested tuples, lists and dicts, in order."""
    if isinstance(values, dict):
        return {key: map_leaves(function, value) for key, value in values.items()}
    if type(values) in (tuple, list):
        return type(values)(map_leaves(function, value) for value in values)
    return function(values)


def _token_shape(value: Tensor) -> torch.Size:
    return value.shape[:-1] if value.is_floating_point() else value.shape
