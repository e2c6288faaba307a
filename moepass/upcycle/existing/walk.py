"""``convert(model, existing=True)``: every MoE block that a model already has, handed to moepass, in place.

Three ways, tried in this order:

    interface   experts with transformers' experts interface: the model's setting changes, no module does
    adapter     transformers' classes without it (``families``): the class says which adapter, numbers decide
    rebuilt     hand-written blocks (``blocks``): structure proposes, numbers prove, an ``nn.MoE`` takes the place

Every block is either in the report as converted or there with the reason why not.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from moepass import errors
from moepass.graph.names import ROOT
from moepass.nn.moe import MoE
from moepass.upcycle.existing.blocks import ExistingMoE, Reading, Refusal, proposes, read_block
from moepass.upcycle.existing.families import Adapted, adapt, has_adapter
from moepass.upcycle.modules import Names, matches_any, subtree
from moepass.upcycle.report import ConvertedMoE, SkippedSite

Outcome = ConvertedMoE | SkippedSite


def convert_existing(model: nn.Module, patterns: Sequence[str]) -> list[Outcome]:
    """Convert the MoE blocks whose names match one of the globs, and say what became of each."""
    names = Names(model)
    outcomes: list[Outcome] = []
    settled: set[int] = set()  # modules that belong to a block which has its verdict
    for name, module in _interface_modules(model):
        settled |= subtree(module)
        outcomes.append(_describe_interface(name, module))
    if outcomes:
        outcomes = _switch(model, outcomes, patterns)
    for name, module, inside in _leaves_first(model):
        if inside & settled:
            continue
        outcome = _one(model, names, name or ROOT, module, patterns)
        if outcome is not None:
            settled |= inside
            outcomes.append(outcome)
    return sorted(outcomes, key=lambda each: names.order.get(each.id, 0))


def _leaves_first(model: nn.Module) -> list[tuple[str, nn.Module, set[int]]]:
    """All modules as they are now, each with its subtree; children first, to ask the smallest whole block first."""
    found = [(name, module, subtree(module)) for name, module in model.named_modules()]
    return sorted(found, key=lambda item: len(item[2]))


def _one(model: nn.Module, names: Names, name: str, module: nn.Module, patterns: Sequence[str]) -> Outcome | None:
    """Convert one module; None where it is no MoE block."""
    if isinstance(module, MoE | ExistingMoE):
        return SkippedSite(name, "already_moe", "")
    known = has_adapter(module)
    if not known and not proposes(module):
        return None
    aliases = names.of_module[id(module)]
    if not matches_any(aliases, patterns):
        return SkippedSite(name, "not_selected", "")
    if "" in aliases:
        return SkippedSite(name, "root_module", "")
    if any(not names.owners[id(p)] <= subtree(module) for p in module.parameters()):
        return SkippedSite(name, "tied_weight", "")
    return _by_adapter(model, aliases, module) if known else _by_reading(model, aliases, module)


def _by_adapter(model: nn.Module, aliases: Sequence[str], module: nn.Module) -> Outcome:
    made = adapt(module)
    if isinstance(made, str):
        return SkippedSite(aliases[0], "adapter_failed", made)
    _exchange(model, aliases, made.module)
    return _from_adapter(aliases[0], made)


def _by_reading(model: nn.Module, aliases: Sequence[str], module: nn.Module) -> Outcome:
    reading = read_block(module)
    if isinstance(reading, Refusal):
        return SkippedSite(aliases[0], reading.code, reading.detail)
    _exchange(model, aliases, reading.build(module))
    return _from_reading(aliases[0], reading, module)


def _exchange(model: nn.Module, aliases: Sequence[str], new: nn.Module) -> None:
    for alias in aliases:
        model.set_submodule(alias, new)


# --- transformers' interface -----------------------------------------------------------------------------------------


def _interface_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Experts modules that dispatch through transformers; none where transformers has no part in the model."""
    if not any(cls.__module__.startswith("transformers.") for cls in type(model).__mro__):
        return []
    from moepass.integrations import transformers as interface

    return list(interface.interface_experts(model).items())


def _describe_interface(name: str, module: nn.Module) -> Outcome:
    from moepass.integrations import transformers as interface

    try:
        interface.read_experts(module)
    except errors.UnsupportedExperts as error:
        return SkippedSite(name, "experts_not_understood", str(error.fields["detail"]))
    _, w_out = interface.stacked_weights(module)
    E, D, F = w_out.shape
    return ConvertedMoE(
        id=name, where=name, way="interface", D=D, F=F, E=E, K=None, activation=str(module._moepass_activation),
        routing="its own router", router=None, weights="in place", error=0.0, parameters=_elements(module),
    )  # fmt: skip


def _switch(model: nn.Module, found: list[Outcome], patterns: Sequence[str]) -> list[Outcome]:
    """Set the implementation: one setting serves all experts of a config, so it is all of them or none."""
    from moepass.integrations import transformers as interface

    refused = [each for each in found if isinstance(each, SkippedSite)]
    left_out = [SkippedSite(each.id, "not_selected", "") for each in found if not matches_any([each.id], patterns)]
    if not refused and not left_out:
        model.set_experts_implementation(interface.NAME)  # type: ignore[operator]
        return found
    own = {each.id: each for each in (*refused, *left_out)}
    why = f"{next(iter(own))} cannot be or is not converted, and one setting serves them all"
    return [own.get(each.id) or SkippedSite(each.id, "shared_setting", why) for each in found]


# --- words for the report --------------------------------------------------------------------------------------------


def _from_adapter(name: str, made: Adapted) -> ConvertedMoE:
    return ConvertedMoE(
        id=name, where=name, way="adapter", D=made.D, F=made.F, E=made.E, K=made.K, activation=made.activation,
        routing=made.routing, router=None, weights=made.weights, error=made.error,
        parameters=_elements(made.module),
    )  # fmt: skip


def _from_reading(name: str, reading: Reading, block: nn.Module) -> ConvertedMoE:
    found = reading.found
    weights = "stacked into w_in and w_out (a copy)" if found.experts.copies else "in place"
    beside = f"; beside it {found.beside.shared}" if found.beside.shared else ""
    return ConvertedMoE(
        id=name, where=name, way="rebuilt", D=found.experts.D, F=found.experts.F, E=found.experts.E,
        K=found.router.top_k, activation=found.experts.activation, routing=found.words + beside, router=found.router,
        weights=weights, error=reading.error, parameters=_elements(block),
    )  # fmt: skip


def _elements(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
