"""Upcycling while loading: a converted model takes the dense model's state dict.

    moepass.convert(model, ...)  # on any device; from meta, load with assign=True
    with moepass.accept_dense(model):
        model.load_state_dict(dense_state_dict)

Stages
    check      a hook on the model, before any tensor is written: a block's keys are all dense, or all those of the MoE
    translate  a hook per block, just before its tensors are loaded: ``upcycle.init.initialise`` with what the block
               remembers (``MoE.origin``); one block's experts at a time are in memory beside the model's
Everything else is ``load_state_dict`` as it is: ``strict``, ``assign``, prefixes, hooks.  Loaders that do not call it
(``from_pretrained``, distributed checkpoints) do not call the hooks either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moepass import errors
from moepass.nn.moe import MoE
from moepass.nn.origin import Origin, Place, dense_matrices
from moepass.upcycle.init import MoEWeights, initialise

State = MutableMapping[str, Any]
#: Names in ``MoE``'s state dict -> fields of ``MoEWeights``.
FIELDS = {"router.weight" if field == "router_weight" else field: field for field in MoEWeights._fields}


class Handles:
    """The registered hooks.  ``remove`` takes them off; so does leaving a ``with`` block."""

    def __init__(self, handles: list[RemovableHandle]) -> None:
        self._handles = handles

    def remove(self) -> None:
        """Take all hooks off; a second call does nothing."""
        while self._handles:
            self._handles.pop().remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.remove()


@dataclass(frozen=True)
class _Site:
    """One place of one MoE.  ``root`` is the module that takes the hook, ``at`` its name in the model."""

    root: nn.Module
    at: str
    place: Place
    moe: MoE
    origin: Origin

    def moe_keys(self, prefix: str) -> dict[str, str]:
        """Keys of the MoE in a state dict -> names in the MoE, given the prefix of ``root``'s keys."""
        inner = _below(self.place.where, self.place.root)
        start = prefix + (f"{inner}." if inner else "")
        return {start + name: name for name in self.moe.state_dict()}

    def dense_keys(self, prefix: str) -> dict[str, str]:
        """Keys of the dense tensors -> their names in the origin."""
        return {prefix + _below(name, self.place.root): name for name in self.place.names}


def accept_dense(model: nn.Module) -> Handles:
    """Let ``model.load_state_dict`` take the state dict of the dense model that ``moepass.convert`` changed.

    The weights are those that ``convert`` makes from the same dense weights: same spec, init, seed and names.  A state
    dict of the converted model loads as before.  What else an MoE holds (a router's biases, an output scale) starts as
    ``convert`` starts it.
    Raises ``NoState`` where the model has no MoE that ``convert`` made.  Loading raises ``MixedLayouts``, before
    anything is written, for keys of both layouts, for dense blocks that lack a tensor, and for dense tensors of another
    shape.
    """
    sites = list(_sites(model))
    if not sites:
        raise errors.NoState(where=type(model).__name__)
    handles = [model.register_load_state_dict_pre_hook(_checker(sites))]
    once = {(id(site.root), site.place.where): site for site in sites}  # shared modules are visited by each name
    handles += [site.root.register_load_state_dict_pre_hook(_translator(site)) for site in once.values()]
    return Handles(handles)


def _sites(model: nn.Module) -> Iterator[_Site]:
    """Every place of every MoE with an origin, found by its name in this model (convert may have seen a part of it)."""
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, MoE) or module.origin is None:
            continue
        place = _place_of(module.origin, name)
        inner = _below(place.where, place.root)
        at = name[: len(name) - len(inner)].removesuffix(".") if inner else name
        yield _Site(model.get_submodule(at), at, place, module, module.origin)


def _place_of(origin: Origin, name: str) -> Place:
    """The recorded place whose name agrees with this one for the longest part, counted from the end."""

    def agreement(place: Place) -> int:
        pairs = zip(reversed(place.where.split(".")), reversed(name.split(".")), strict=False)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), len(name))

    return max(origin.places, key=agreement)


def _below(name: str, root: str) -> str:
    return name[len(root) :].removeprefix(".")


def _checker(sites: list[_Site]) -> Callable[..., None]:
    def check(module: nn.Module, state: State, prefix: str, *_: Any) -> None:
        dense: list[str] = []
        moe: list[str] = []
        for site in sites:
            start = f"{prefix}{site.at}." if site.at else prefix
            found, ours = _present(site, start, state)
            where = f"{prefix}{site.at}" or type(module).__name__
            if found and ours:
                _refuse(where, "it holds both the dense block and the MoE", [*found, *ours], "keep one of the two")
            if found:
                _check_dense(where, site, start, state)
            dense, moe = dense + found, moe + ours
        if dense and moe:
            detail = "some blocks are dense in it and others are MoE"
            _refuse(type(module).__name__, detail, [dense[0], moe[0]], "give the state of one model")

    return check


def _check_dense(where: str, site: _Site, start: str, state: State) -> None:
    keys = site.dense_keys(start)
    missing = [key for key in keys if key not in state]
    if missing:
        _refuse(where, "tensors of the dense block are missing", missing, "give the whole dense state dict")
    for key, name in keys.items():
        wanted = _shape(site, name)
        if tuple(state[key].shape) != wanted:
            detail = f"the dense tensor has the shape {list(state[key].shape)}, not {list(wanted)}"
            _refuse(where, detail, [key], "give the state of the model that was converted")


def _shape(site: _Site, name: str) -> tuple[int, ...]:
    """What a dense tensor must look like: all parts that use it, stacked."""
    place = site.place
    parts = (*place.ups, place.down)
    rows = max(part.rows[1] for part in parts if name in part.names)
    F = place.ups[0].rows[1] - place.ups[0].rows[0]
    for part in parts:
        if part.bias == name:
            return (rows,)
        if part.weight == name:
            other = F if part is place.down else site.moe.D
            return (other, rows) if part.transposed else (rows, other)
    raise AssertionError(name)


def _translator(site: _Site) -> Callable[..., None]:
    def translate(_module: nn.Module, state: State, prefix: str, *_: Any) -> None:
        if not _present(site, prefix, state)[0]:
            return
        keys = site.dense_keys(prefix)
        by_name = {name: state[key] for key, name in keys.items()}
        made = state_of(site.moe, make(site.moe, site.place, by_name.__getitem__))
        for key in keys:
            del state[key]
        state.update({key: made[name] for key, name in site.moe_keys(prefix).items()})

    return translate


def make(moe: MoE, place: Place, get: Callable[[str], Tensor], experts: range | None = None) -> MoEWeights:
    """The weights that ``convert`` makes for this MoE from the dense tensors that ``get`` gives by name; of these
    ``experts`` alone where they are given."""
    assert moe.origin is not None
    dense = dense_matrices(place.ups, place.down, get)
    return initialise(*dense, moe.spec, moe.origin.init, moe.origin.site, experts)


def state_of(moe: MoE, weights: MoEWeights) -> dict[str, Tensor]:
    """The MoE's whole state dict from initial weights: what they do not name starts as ``convert`` starts it."""
    made: dict[str, Tensor] = {}
    for name, held in moe.state_dict().items():
        if name in FIELDS:
            made[name] = getattr(weights, FIELDS[name])
        else:
            start = 1.0 if name == "output_scale" else 0.0
            dtype = weights.w_out.dtype if held.dtype.is_floating_point and name != "router.bias" else held.dtype
            made[name] = weights.w_out.new_full(held.shape, start, dtype=dtype)
    return made


def _present(site: _Site, start: str, state: State) -> tuple[list[str], list[str]]:
    """Keys of the dense block, and of the MoE.  Where a hand-written block uses the MoE's names, the shape decides."""
    dense, moe = site.dense_keys(start), site.moe_keys(start)
    both = {key for key in dense if key in moe and key in state}
    flat = {key for key in both if tuple(state[key].shape) == _shape(site, dense[key])}
    return [k for k in dense if k in state and k not in both - flat], [k for k in moe if k in state and k not in flat]


def _refuse(where: str, detail: str, keys: list[str], remedy: str) -> None:
    more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
    raise errors.MixedLayouts(where=where, detail=detail, keys=", ".join(keys[:4]) + more, remedy=remedy)
