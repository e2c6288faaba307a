"""Modules of a model under the names that they have before anything is wrapped around them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)

#: Attributes under which torch.compile and activation checkpointing keep the module they wrap.
_ATTRIBUTES = frozenset({"_orig_mod", "_checkpoint_wrapped_module"})
#: Modules that keep theirs under the attribute ``module``, a name that others may use as well.
_AROUND = (nn.parallel.DistributedDataParallel, nn.DataParallel)


def named(model: nn.Module, kind: type[M]) -> Iterator[tuple[str, M]]:
    """``(name, module)`` of every module of a kind, each once, as ``state_dict`` of the unwrapped model names them."""
    around: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, _AROUND):
            around.add(f"{name}.module" if name else "module")
        if isinstance(module, kind):
            yield _unwrapped(name, around), module


def _unwrapped(name: str, around: set[str]) -> str:
    parts = name.split(".")
    return ".".join(p for i, p in enumerate(parts) if p not in _ATTRIBUTES and ".".join(parts[: i + 1]) not in around)
