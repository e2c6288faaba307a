"""Sizes that may be symbols: what is known of them, and what a trace may be told."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def is_unbacked(size: int | torch.SymInt) -> bool:
    """Whether a size depends on data, so that comparing it would fail."""
    if isinstance(size, int):
        return False
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    return bool(free_unbacked_symbols(size))


def size_bounds(size: int | torch.SymInt) -> tuple[int, int | None]:
    """Proven ``(low, high)`` of a size; ``high=None`` where unbounded."""
    if isinstance(size, int):
        return size, size
    bounds = size.node.shape_env.bound_sympy(size.node.expr)
    low = max(0, int(bounds.lower)) if bounds.lower.is_finite else 0
    high = int(bounds.upper) if bounds.upper.is_finite and bounds.upper < 2**48 else None
    return low, high


def size_hint(size: int | torch.SymInt) -> int | None:
    """The size of the current example without installing a guard; None if unbacked."""
    if isinstance(size, int):
        return size
    return None if is_unbacked(size) else int(size.node.hint)


def known_equal(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """Whether two sizes are equal whatever the values of their symbols.  Installs no guard."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(a == b))


def size_text(size: int | torch.SymInt) -> str:
    """``s77`` or ``512``."""
    return str(size)


def host_sizes(counts: Tensor) -> list[int]:
    """Counts as sizes: a host read; when traced, sizes that depend on data and are known to be no less than 0."""
    sizes: list[int] = counts.tolist()
    for size in sizes:
        torch._check(size >= 0)
    return sizes


def promise(condition: bool) -> None:
    """Tell a trace what is true of sizes that depend on data; checked when it runs."""
    torch._check(condition)


def only_shapes_matter(x: Tensor) -> bool:
    """Whether an op is asked for the shape of its result (Dynamo): nothing is being traced or computed."""
    if not isinstance(x, FakeTensor):
        return False
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is None


def pretend_host_read(x: Tensor) -> None:
    """On a fake tensor: fail as reading from the host would, where a trace does not allow it (a graph break then)."""
    if not isinstance(x, FakeTensor) or x.fake_mode.shape_env is None:
        return
    with x.fake_mode.shape_env.ignore_fresh_unbacked_symbols():
        x.new_zeros((), dtype=torch.int64).item()
