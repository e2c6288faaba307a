"""How large the output is and what a token costs: parameters, active parameters, FLOPs, bytes.  From the plan alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from moepass.upcycle.checkpoint.tensors import Header, OutTensor
from moepass.upcycle.hf.hosts import Names


@dataclass(frozen=True)
class Sizes:
    """``active_parameters`` are those that one token uses (embeddings included, as model cards count).

    ``flops_per_token``  2 per weight of a matrix product in a forward pass, without attention scores
    ``shards``           (file, bytes) in order; ``nbytes``: of all shards
    """

    parameters: int
    active_parameters: int
    flops_per_token: int
    nbytes: int
    shards: tuple[tuple[str, int], ...]
    dense_parameters: int
    dense_flops_per_token: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for the report."""
        return asdict(self)


def measure(
    tensors: Sequence[OutTensor],
    headers: Mapping[str, Header],
    shards: Sequence[tuple[str, int]],
    *,
    names: Names,
    experts: int,
    top_k: int,
    tied: bool,
) -> Sizes:
    """Count.  ``tied``: the embedding is also the output projection."""
    made = {t.name: t.shape for t in tensors}
    dense = {h.name: h.shape for h in headers.values() if not h.name.endswith("inv_freq")}
    inactive = sum(math.prod(s) for n, s in made.items() if _is_expert(n, names)) * (experts - top_k) // experts
    total = _total(made)
    return Sizes(
        parameters=total,
        active_parameters=total - inactive,
        flops_per_token=2 * (_products(made, tied) - inactive),
        nbytes=sum(size for _, size in shards),
        shards=tuple(shards),
        dense_parameters=_total(dense),
        dense_flops_per_token=2 * _products(dense, tied),
    )


def human(n: float) -> str:
    """``8030261248`` -> ``8.03 G``."""
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= size:
            return f"{n / size:.2f} {prefix}"
    return f"{n:.0f}"


def _total(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(math.prod(s) for s in shapes.values())


def _is_expert(name: str, names: Names) -> bool:
    """Whether a tensor is weights of routed experts."""
    if names.stacked:
        return name.endswith((names.gate, names.down))
    return ".experts." in name


def _products(shapes: Mapping[str, tuple[int, ...]], tied: bool) -> int:
    """Weights that take part in a product with each token."""
    count = 0
    for name, shape in shapes.items():
        embedding = "embed_tokens" in name
        if len(shape) >= 2 and (not embedding or (tied and "lm_head.weight" not in shapes)):
            count += math.prod(shape)
    return count
