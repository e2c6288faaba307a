"""The order of each block's neurons, and router rows made from data: what a recipe needs to know of weights and text.

Contract
    in    an opened source, a ``Match``, a ``Plan``, the layers to convert, a ``Calibration`` if one was given
    out   one ``Arrangement`` per layer that needs one
    Memory: with weights, the input projections of one block in float32 besides the source's; with a calibration, one
    layer and what its neurons did on all tokens.  Nothing is written; the same inputs give the same bits.
The functions themselves are in ``upcycle.neurons``, which ``moepass.convert`` uses too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moepass import errors
from moepass.upcycle import neurons
from moepass.upcycle.checkpoint.source import Source
from moepass.upcycle.hf.calibration import Calibration, Observed, observed, single_threaded
from moepass.upcycle.hf.match import Match
from moepass.upcycle.hf.methods import uses_calibration, wants_arrangement, why_calibration
from moepass.upcycle.hf.pieces import Piece, block_name, pieces
from moepass.upcycle.hf.recipe import Plan
from moepass.upcycle.hf.routers import FROM_DATA


@dataclass(frozen=True)
class Arrangement:
    """``order [F]``: first the neurons of the shared expert, ascending, then the routed experts' in equal runs.

    ``shared``  how many stand in the shared expert; ``router``: rows ``[E, D]`` in float32, where they come from data
    """

    order: Tensor
    shared: int = 0
    router: Tensor | None = None

    @property
    def first(self) -> Tensor:
        """The shared expert's neurons."""
        return self.order[: self.shared]

    @property
    def routed(self) -> Tensor:
        """The routed experts' neurons, expert by expert."""
        return self.order[self.shared :]

    @property
    def digest(self) -> str:
        """Hash of the values: two runs with the same one make the same tensors of the same weights."""
        parts = (self.order,) if self.router is None else (self.order, self.router)
        content = b"".join(part.contiguous().numpy().tobytes() for part in parts)
        return hashlib.sha256(content + str(self.shared).encode()).hexdigest()[:16]


def check_calibration(plan: Plan, calibration: Calibration | None) -> None:
    """Raise ``BadOption`` for a recipe that needs activations and has no text."""
    name = why_calibration(plan.recipe)
    if name is not None and calibration is None:
        detail = "it needs to see neurons at work; give a text with --calibration, or ids with --calibration-tokens"
        raise errors.BadOption(name=name, value=getattr(plan.recipe, name), detail=detail)


def arrange(
    source: Source, found: Match, plan: Plan, layers: Sequence[int], calibration: Calibration | None
) -> dict[int, Arrangement]:
    """Layer -> arrangement, empty for recipes that need none.

    Raises ``BadOption``, ``MissingPackage``, and with a calibration the errors of ``checkpoint.observe``.
    """
    check_calibration(plan, calibration)
    recipe = plan.recipe
    if not wants_arrangement(recipe):
        return {}
    named = pieces(source.headers, found)
    made: dict[int, Arrangement] = {}

    def see(layer: int, seen: Observed | None) -> None:
        made[layer] = _arranged(source, named, plan, block_name(layer), seen)

    with single_threaded():
        if calibration is None or not uses_calibration(recipe):
            for layer in layers:
                see(layer, None)
        else:
            observed(source.folder, calibration, layers, see)
    return made


def _arranged(source: Source, named: dict[str, Piece], plan: Plan, name: str, seen: Observed | None) -> Arrangement:
    """One block.  ``seen`` is None where nothing of it is needed."""
    recipe = plan.recipe
    gate, up = (named[f"{name}.{part}_proj.weight"] for part in ("gate", "up"))
    F, E = gate.shape[0], recipe.experts
    first = torch.empty(0, dtype=torch.int64)
    if recipe.shared and seen is not None:
        first = neurons.most_active(seen.a_TF, recipe.shared)
    order = rest = neurons.rest_of(first, F)
    if recipe.method == "cluster":
        if recipe.cluster_on == "activations" and seen is not None:
            features = neurons.by_activations(seen.a_TF, rest)
        else:
            features = neurons.by_weights([p.of(source.read(p.source)) for p in (gate, up)], rest)
        order = rest[neurons.clustered(features, E, recipe.seed, name)]
    rows = None
    if recipe.router in FROM_DATA:
        if seen is not None:
            rows = neurons.input_centroids(seen.x_TD, seen.a_TF, order, E, recipe.router_std)
        else:
            rows = neurons.row_centroids(gate.of(source.read(gate.source)), order, E, recipe.router_std)
    return Arrangement(torch.cat([first, order]), recipe.shared, rows)
