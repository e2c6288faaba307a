"""The one-line form's weights: MoE state that hangs on the dense weight it was made from.

Dynamo shares one compiled graph between all instances with the same code and shapes, so a graph may not own weights.
Instead the compiled callable asks, at every call, for the state of the dense weight that it was actually given, and
passes it on as extra inputs (``torch.compile`` then sees ordinary parameters, and gradients reach them).

Rules
    one state per (dense weights, recipe), shared by all recompiles and by train/eval; it hangs on the output
    projection's weight and lives as long as all of them
    dense weight re-assigned      -> another Parameter, hence another state, made from it
    dense weight changed in place -> the state is made anew, in the same Parameters (a warning if it had been trained)
    dense weight moved or cast    -> the state moves with it
    requires_grad                 follows the dense weight
    copied, pickled, saved        the dense weight alone (torch.save(model) warns if the state had been trained;
                                  deepcopy and state_dict cannot): materialize first
    written through .data/numpy   not seen: such writes leave no trace in a tensor's version counter
    optimizer without them        warned about at its second step (``moepass.watch``)
    compile that fails            what it attached is detached again (``detached_on_failure``)
"""

from __future__ import annotations

import contextlib
import logging
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moepass import errors
from moepass.nn.moe import MoE
from moepass.spec import InitSpec, MoESpec
from moepass.upcycle.convert import SiteInfo, convert
from moepass.upcycle.init import MoEWeights, initialise
from moepass.upcycle.modules import set_tensor_at
from moepass.upcycle.report import ConversionReport, SkippedSite
from moepass.watch import watch

log = logging.getLogger("moepass.attach")

ATTRIBUTE = "_moepass_states"


@dataclass(frozen=True)
class Layout:
    """Which part of a stored weight a projection uses: ``rows`` (start, stop), stored ``[in, out]`` if transposed."""

    rows: tuple[int, int]
    transposed: bool

    def weight(self, stored: Tensor) -> Tensor:
        """``[rows, in]``."""
        return (stored.t() if self.transposed else stored)[self.rows[0] : self.rows[1]]

    def bias(self, stored: Tensor) -> Tensor:
        """``[rows]``."""
        return stored[self.rows[0] : self.rows[1]]


@dataclass(frozen=True)
class Recipe:
    """How a site's MoE weights are made from its dense ones.

    ``asked`` is the spec that the user gave, ``spec`` the same completed with F, activation and biases.
    """

    site: str
    asked: MoESpec
    spec: MoESpec
    init: InitSpec
    D: int
    ups: tuple[Layout, ...]
    down: Layout

    @property
    def key(self) -> str:
        """States of one weight under different recipes do not meet."""
        return f"{self.spec.digest}-{self.init.digest}"


@dataclass(frozen=True)
class DenseTensors:
    """A site's weights as stored, in the order of its projections."""

    ups: tuple[Tensor, ...]
    up_biases: tuple[Tensor | None, ...]
    down: Tensor
    down_bias: Tensor | None

    def all(self) -> tuple[Tensor, ...]:
        """Every tensor there is, the output projection's weight first."""
        return tuple(t for t in self.slots() if t is not None)

    def slots(self) -> tuple[Tensor | None, ...]:
        """The fields in one row, the output projection's first; ``of`` is the way back."""
        return (self.down, self.down_bias, *self.ups, *self.up_biases)

    @classmethod
    def of(cls, slots: Sequence[Any]) -> DenseTensors:
        """The tensors that ``slots`` gave."""
        down, down_bias, *rest = slots
        return cls(tuple(rest[: len(rest) // 2]), tuple(rest[len(rest) // 2 :]), down, down_bias)

    @property
    def weights(self) -> tuple[int, ...]:
        """Identities of the projections' weights, which tell sites apart."""
        return tuple(map(id, (self.down, *self.ups)))


Stamp = tuple[tuple[int, int], ...]


class Attached:
    """One site's MoE module with what it was made from."""

    def __init__(self, recipe: Recipe, dense: DenseTensors) -> None:
        self.recipe = recipe
        self._dense = [None if t is None else weakref.ref(t) for t in dense.slots()]
        # Dense weights may be on any device; the module's own parameters replace what the constructor allocates.
        self.moe = MoE(recipe.D, recipe.spec, device="meta", dtype=dense.down.dtype)
        _install(self.moe, make_weights(recipe, dense), dense.down.requires_grad)
        self.stamp = _stamp(dense)
        self.born = _versions(self.operands())

    def operands(self) -> tuple[nn.Parameter | None, ...]:
        """router, w_in, w_out, b_in, b_out: the extra inputs of the compiled graph."""
        moe = self.moe
        return (moe.router.weight, moe.w_in, moe.w_out, moe.b_in, moe.b_out)

    @property
    def dense(self) -> DenseTensors | None:
        """The dense tensors it was made from; None when one of them is gone from the model."""
        held = [None if reference is None else reference() for reference in self._dense]
        gone = any(t is None and reference is not None for t, reference in zip(held, self._dense, strict=True))
        return None if gone else DenseTensors.of(held)

    def belongs_to(self, dense: DenseTensors) -> bool:
        """Whether it was made from these very tensors."""
        mine = self.dense
        return mine is not None and _same(mine.all(), dense.all())

    @property
    def trained(self) -> bool:
        """Whether its parameters were written since they were made."""
        return self.born != _versions(self.operands())

    @property
    def site(self) -> str:
        """The block's name."""
        return self.recipe.site

    def pair(self) -> tuple[Tensor, Tensor] | None:
        """The dense output weight and the MoE's in its place; None once the dense one is gone."""
        dense = self._dense[0]() if self._dense[0] is not None else None
        return None if dense is None else (dense, self.moe.w_out)

    def sync(self, dense: DenseTensors) -> None:
        """Follow the dense weights: in-place updates, moves, casts, requires_grad."""
        down, mine = dense.down, self.moe.w_out
        if mine.dtype != down.dtype or mine.device != down.device:
            self.moe.to(device=down.device, dtype=down.dtype)
            self.stamp, self.born = _stamp(dense), _versions(self.operands())
        elif self.stamp != (stamp := _stamp(dense)):
            self._remake(dense, stamp)
        if mine.requires_grad != down.requires_grad:
            self.moe.requires_grad_(down.requires_grad)

    def _remake(self, dense: DenseTensors, stamp: Stamp) -> None:
        if self.trained:
            log.warning(
                "%s: the dense weights changed in place after their MoE state had been trained; the state is made "
                "anew from them. Use moepass.materialize(model) to train the MoE weights themselves.",
                self.recipe.site,
            )
        weights = make_weights(self.recipe, dense)
        with torch.no_grad():
            for mine, new in zip(self.operands(), weights, strict=True):
                if mine is not None and new is not None:
                    mine.copy_(new)
        self.stamp, self.born = stamp, _versions(self.operands())


class States(dict[tuple[object, ...], Attached]):
    """The states that hang on one dense weight.  Whoever pickles the weight takes none of them along."""

    def __reduce__(self) -> tuple[type, tuple[()]]:
        for state in self.values():
            if state.trained:
                log.warning(
                    "%s: its trained MoE state is not saved with the dense weight; call moepass.materialize(model) "
                    "before saving.",
                    state.recipe.site,
                )
        return OrderedDict, ()  # a type that torch.load accepts under weights_only=True


def make_weights(recipe: Recipe, dense: DenseTensors) -> MoEWeights:
    """The initial MoE weights of a site, outside autograd and inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        w_in = torch.cat([layout.weight(w) for layout, w in zip(recipe.ups, dense.ups, strict=True)])
        biases = [None if b is None else layout.bias(b) for layout, b in zip(recipe.ups, dense.up_biases, strict=True)]
        b_in = None if any(b is None for b in biases) else torch.cat([b for b in biases if b is not None])
        w_out = recipe.down.weight(dense.down)
        return initialise(w_in, w_out, b_in, dense.down_bias, recipe.spec, recipe.init, recipe.site)


def state_for(recipe: Recipe, dense: DenseTensors) -> Attached:
    """The state of the weights actually given, made on first sight.  Raises the errors of ``upcycle.init``."""
    states = dense.down.__dict__.get(ATTRIBUTE)
    if not isinstance(states, States):
        states = dense.down.__dict__[ATTRIBUTE] = States()
    key = (recipe.key, recipe.ups, recipe.down, *dense.weights)
    state = states.get(key)
    if state is not None and state.belongs_to(dense):
        state.sync(dense)
        return state
    for stale in [k for k, s in states.items() if s.dense is None]:
        del states[stale]
    state = states[key] = Attached(recipe, dense)
    if (journal := _journal.get()) is not None:
        journal.append((states, key))
    if dense.down.requires_grad:
        watch(state)
    return state


#: What ``state_for`` has made in the innermost ``detached_on_failure``.
_journal: ContextVar[list[tuple[States, tuple[object, ...]]] | None] = ContextVar("moepass_made", default=None)


@contextlib.contextmanager
def detached_on_failure(*, always: bool = False) -> Iterator[None]:
    """States that are made inside are detached again if the block raises (or ``always``): the model runs without them.

    States that hung there before stay: another compile uses them.
    """
    made: list[tuple[States, tuple[object, ...]]] = []
    token, done = _journal.set(made), False
    try:
        yield
        done = True
    finally:
        _journal.reset(token)
        for states, key in made if always or not done else ():
            states.pop(key, None)


def attached_states(model: nn.Module) -> Iterator[tuple[str, Attached]]:
    """``(name of the dense output weight, state)`` of every attachment in a model, each once."""
    seen: set[int] = set()
    for name, parameter in model.named_parameters():
        for state in list(parameter.__dict__.get(ATTRIBUTE, {}).values()):
            dense = state.dense
            if id(state) not in seen and dense is not None and dense.down is parameter:
                seen.add(id(state))
                yield name, state


def moe_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The trainable MoE parameters that the one-line form attached to a model: give them to an optimizer.

    Those of ``moepass.nn.MoE`` modules, which a converted or materialized model has, are yielded too.
    Raises ``errors.NoState`` before the first forward of the compiled model, since nothing is attached until then.
    """
    modules = [state.moe for _, state in attached_states(model)]
    modules += [module for module in model.modules() if isinstance(module, MoE)]
    if not modules:
        raise errors.NoState(where=type(model).__name__)
    return (parameter for module in modules for parameter in module.parameters())


def materialize(model: nn.Module) -> ConversionReport:
    """Turn the one-line form's attached state into ``moepass.nn.MoE`` modules of the model, in place.

    The very Parameter objects move over, so an optimizer that holds ``moe_parameters(model)`` goes on working; the
    dense weights leave the model.  All or nothing: raises ``errors.CannotMaterialize`` where a state has no block of
    its own to go to, ``errors.NoState`` where nothing is attached, and as ``moepass.convert``.
    """
    model = getattr(model, "_orig_mod", model)
    states = _states_in_use(model)
    if not states and any(isinstance(module, MoE) for module in model.modules()):
        done = [SkippedSite(name, "already_moe", "") for name, m in model.named_modules() if isinstance(m, MoE)]
        return ConversionReport(InitSpec(), (), tuple(done))
    if not states:
        raise errors.NoState(where=type(model).__name__)
    _refuse_homeless(model, states)
    reports = [_materialize_kind(model, states, asked, init) for asked, init in _kinds(states)]
    converted = tuple(site for report in reports for site in report.converted)
    return ConversionReport(reports[0].init, converted, reports[-1].skipped)


def _states_in_use(model: nn.Module) -> list[Attached]:
    """The states whose dense weights are all still the model's."""
    mine = {id(p) for p in model.parameters()}
    states = [state for _, state in attached_states(model)]
    return [state for state in states if (dense := state.dense) is not None and mine.issuperset(dense.weights)]


def _refuse_homeless(model: nn.Module, states: Sequence[Attached]) -> None:
    """Raise, before anything changes, where a state would be lost: its block cannot be exchanged, or has another."""
    reasons: dict[str, str] = {}
    housed: dict[tuple[int, ...], Attached] = {}
    for asked, init in _kinds(states):
        by_weights = _by_weights(states, asked, init)

        def look(info: SiteInfo, found: dict[tuple[int, ...], Attached] = by_weights) -> None:
            key = tuple(map(id, (info.down, *info.ups)))
            if key in found:
                if key in housed:
                    detail = "it holds the states of two specs; compile a fresh copy of the model with one of them"
                    raise errors.CannotMaterialize(where=info.id, detail=detail)
                housed[key] = found[key]

        with warnings.catch_warnings(action="ignore", category=UserWarning):
            report = convert(model, asked, init=init, weights_for=look)  # a hook without weights changes nothing
        reasons.update((s.id, s.reason) for s in report.skipped if s.reason != "no_state")
    kept = {id(state) for state in housed.values()}
    lost = [state for state in states if id(state) not in kept]
    if lost:
        why = sorted({reasons.get(state.site) or _why_not_found(state, states) for state in lost})
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise errors.CannotMaterialize(
            where=f"{lost[0].site}{more}",
            detail=f"{', '.join(why)}; make it a module with weights of its own, or keep the one-line form",
        )


def _why_not_found(state: Attached, states: Sequence[Attached]) -> str:
    mine, others = state.dense, [dense for other in states if (dense := other.dense) is not None]
    tied = mine is not None and sum(other.down is mine.down for other in others) > 1
    return "its output projection serves another block too" if tied else "the block was not found"


def _by_weights(states: Sequence[Attached], asked: MoESpec, init: InitSpec) -> dict[tuple[int, ...], Attached]:
    """The states of one kind by their dense weights."""
    mine = [state for state in states if (state.recipe.asked, state.recipe.init) == (asked, init)]
    return {dense.weights: state for state in mine if (dense := state.dense) is not None}


def _kinds(states: Sequence[Attached]) -> list[tuple[MoESpec, InitSpec]]:
    return list(dict.fromkeys((s.recipe.asked, s.recipe.init) for s in states))


def _materialize_kind(model: nn.Module, states: Sequence[Attached], asked: MoESpec, init: InitSpec) -> ConversionReport:
    by_weights = _by_weights(states, asked, init)
    taken: dict[str, Attached] = {}

    def weights_for(info: SiteInfo) -> MoEWeights | None:
        state = by_weights.get(tuple(map(id, (info.down, *info.ups))))
        if state is None or (dense := state.dense) is None:
            return None
        state.sync(dense)
        taken[info.id] = state
        return MoEWeights(*(None if p is None else p.detach() for p in state.operands()))  # type: ignore[arg-type]

    report = convert(model, asked, init=init, weights_for=weights_for)
    for site in report.converted:
        moe, attached = model.get_submodule(site.where), taken[site.id].moe
        for name, parameter in attached.named_parameters():
            set_tensor_at(moe, name, parameter)
    return report


def _install(moe: MoE, weights: MoEWeights, requires_grad: bool) -> None:
    def parameter(tensor: Tensor | None) -> nn.Parameter | None:
        return None if tensor is None else nn.Parameter(tensor.detach().clone(), requires_grad=requires_grad)

    with torch.inference_mode(False):
        router, w_in, w_out, b_in, b_out = (parameter(t) for t in weights)
    moe.router.weight, moe.w_in, moe.w_out, moe.b_in, moe.b_out = router, w_in, w_out, b_in, b_out  # type: ignore[assignment]


def _same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))


def _stamp(dense: DenseTensors) -> Stamp:
    """Changes when any dense tensor is written in place or its storage is swapped."""
    return tuple((_version(t), t.data_ptr()) for t in dense.all())


def _versions(tensors: Sequence[Tensor | None]) -> tuple[int, ...]:
    return tuple(_version(t) for t in tensors if t is not None)


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
