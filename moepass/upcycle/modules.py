"""Exchanging modules of a live model: where a block sits, what takes its place, and the way back.

``Location`` names the places; ``replace_site`` puts an MoE there and returns the undo.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moepass.nn.moe import MoE
from moepass.spec import MoESpec
from moepass.upcycle.init import MoEWeights
from moepass.upcycle.splice import Splice, splice


@dataclass(frozen=True)
class Location:
    """Where one block sits in a model; every name is fully qualified, aliases of shared modules included.

    ``moe``       these names receive the MoE; with a ``splice`` they name the module whose forward is rewritten
    ``identity``  these become ``nn.Identity``: the rest of a chain whose first link is the MoE, spliced projections
    ``splice``    set where the block is a part of a forward (``upcycle.splice``)
    """

    moe: tuple[str, ...]
    identity: tuple[str, ...] = ()
    splice: Splice | None = None


def replace_site(model: nn.Module, location: Location, moe: MoE) -> Callable[[], None]:
    """Put ``moe`` at its place, with the training flag of what it replaces.  Returns the undo."""
    old = model.get_submodule(location.moe[0])
    moe.train(old.training)
    if location.splice is None:
        undo = [_exchange(model, name, moe) for name in location.moe]
    else:
        undo = [splice(old, location.splice, moe)]
    undo += [_exchange(model, name, nn.Identity()) for name in location.identity]

    def put_back() -> None:
        for step in reversed(undo):
            step()

    return put_back


def _exchange(model: nn.Module, name: str, new: nn.Module) -> Callable[[], None]:
    parent_name, _, attribute = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    old = getattr(parent, attribute)
    if isinstance(new, nn.Identity):
        new.train(old.training)
    setattr(parent, attribute, new)
    return lambda: setattr(parent, attribute, old)


def build_moe(weights: MoEWeights, spec: MoESpec, requires_grad: bool) -> MoE:
    """An MoE that owns ``weights``.  Tensors that are Parameters already are kept as the same objects."""

    def parameter(tensor: Tensor | None) -> nn.Parameter | None:
        if tensor is None or isinstance(tensor, nn.Parameter):
            return tensor
        return nn.Parameter(tensor.detach(), requires_grad=requires_grad)

    moe = MoE(weights.w_in.shape[-1], spec, device="meta", dtype=weights.w_in.dtype)
    moe.router.weight = parameter(weights.router_weight)  # type: ignore[assignment]
    moe.router.materialise()
    for name in ("w_in", "w_out", "b_in", "b_out"):
        setattr(moe, name, parameter(getattr(weights, name)))
    if moe.output_scale is not None:
        moe.output_scale = parameter(weights.w_out.new_ones(len(weights.w_out)))
    return moe


@contextmanager
def mode(module: nn.Module, training: bool) -> Iterator[None]:
    """Set every ``training`` flag below ``module`` (past overridden ``train`` methods) and restore each exactly."""
    flags = [(m, m.training) for m in module.modules()]
    try:
        for m, _ in flags:
            m.training = training
        yield
    finally:
        for m, flag in flags:
            m.training = flag


class Names:
    """A model's modules by identity: all names of each, and all owners of each parameter."""

    def __init__(self, model: nn.Module) -> None:
        self.of_module: dict[int, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            self.of_module.setdefault(id(module), []).append(name)
        self.order = {name: i for i, (name, _) in enumerate(model.named_modules(remove_duplicate=False))}
        self.holders: dict[int, set[tuple[int, str]]] = {}
        self.owners: dict[int, set[int]] = {}
        for module in model.modules():
            for name, child in module.named_children():
                self.holders.setdefault(id(child), set()).add((id(module), name))
            for parameter in module.parameters(recurse=False):
                self.owners.setdefault(id(parameter), set()).add(id(module))


def tensor_at(module: nn.Module, name: str) -> Tensor:
    """The parameter or buffer of a fully qualified name."""
    owner, _, leaf = name.rpartition(".")
    held: Tensor = getattr(module.get_submodule(owner), leaf)
    return held


def set_tensor_at(module: nn.Module, name: str, value: Tensor) -> None:
    """Put a parameter or buffer into the place of a fully qualified name."""
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, value)


def glob_list(layers: str | Sequence[str]) -> list[str]:
    """Globs as a user gives them: a sequence, or one text with commas."""
    texts = layers.split(",") if isinstance(layers, str) else layers
    return [text.strip() for text in texts if text.strip()]


def matches_any(names: Iterable[str], globs: Sequence[str]) -> bool:
    """Whether one of the names of a block fits one of the globs."""
    return any(fnmatch.fnmatchcase(name, glob) for name in names for glob in globs)


def subtree(module: nn.Module) -> set[int]:
    """Identities of a module and everything below it."""
    return {id(m) for m in module.modules()}


def is_plain(parameter: Tensor) -> str | None:
    """A reason code where a parameter is not an ordinary dense floating tensor, else None."""
    if type(parameter) not in (Tensor, nn.Parameter):
        return "tensor_subclass"
    if parameter.is_quantized:
        return "quantised_weight"
    if parameter.layout != torch.strided:
        return "sparse_weight"
    return None if parameter.is_floating_point() else "non_floating"
