"""One layer's MoE on disk: its weights as functions of the dense ones, and the tensors that hold them.

``moepass.convert`` makes the same values of the same dense weights (``upcycle.init``); names, layout and what stands
beside the experts are the host's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moepass.upcycle.checkpoint.tensors import Computed, OutTensor, Pieces, Streamed, Verbatim, torch_dtype
from moepass.upcycle.exactness import SPLITS
from moepass.upcycle.hf.arrange import Arrangement
from moepass.upcycle.hf.match import Match
from moepass.upcycle.hf.parents import Parents, parent_of
from moepass.upcycle.hf.pieces import Piece, block_name, cast_code, computed, passed_on, stream, streamed
from moepass.upcycle.hf.prompts import PromptRouter
from moepass.upcycle.hf.recipe import Plan
from moepass.upcycle.hf.routers import router_weight
from moepass.upcycle.one_expert import Noise, expert_in, expert_out, moments_of, noise_in, noise_out, part_of, scaled

MATRICES = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Extras:
    """What a recipe needs beside the dense weights of SRC.

    ``arranged``  layer -> the order of its neurons; ``prompts``: router rows from examples; ``parents``: other models
    """

    arranged: Mapping[int, Arrangement] = field(default_factory=dict)
    prompts: PromptRouter | None = None
    parents: Parents | None = None


@dataclass
class Block:
    """One layer's MoE: its weights as functions of the dense ones, and the tensors that hold them.

    ``router_weight``, ``expert_in``, ``expert_out``, ``shared_in``, ``shared_out`` give values in the output's dtype.
    """

    layer: int
    ins: tuple[Piece, Piece]
    down: Piece
    found: Match
    plan: Plan
    dtype: str | None
    extras: Extras
    _std: dict[tuple[str, ...], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.name = block_name(self.layer)
        self.names = self.found.host.names
        self.D = self.down.shape[0]
        self.f, self.E, self.shared = self.plan.width, self.plan.recipe.experts, self.plan.recipe.shared
        self.arranged = self.extras.arranged.get(self.layer)
        self.order = None if self.arranged is None else self.arranged.routed
        self.code = cast_code(self.down.dtype, self.dtype)

    def tensors(self) -> Iterator[OutTensor]:
        """Router, experts by projection, then what the host asks for beside them."""
        yield self._router_out()
        if self.names.stacked:
            yield self._all_in()
            yield self._all_out()
        else:
            for p, pattern in enumerate((self.names.gate, self.names.up)):
                yield from (self._one_in(pattern, p, e) for e in range(self.E))
            yield from (self._one_out(e) for e in range(self.E))
        yield from self._beside()

    def _out(
        self, suffix: str, shape: tuple[int, ...], recipe: Verbatim | Computed | Streamed, group: str, code: str
    ) -> OutTensor:
        return OutTensor(f"model.layers.{self.layer}.{suffix}", shape, code, recipe, f"{self.name}/{group}")

    def matrices(self, e: int) -> tuple[Piece, Piece, Piece]:
        """Gate, up and down that expert ``e`` is made from."""
        parents = self.extras.parents
        if parents is None:
            return (*self.ins, self.down)
        k = parent_of(e, self.E, self.plan.cut, len(parents.named))
        gate, up, down = (parents.named[k][f"{self.name}.{matrix}.weight"] for matrix in MATRICES)
        return gate, up, down

    def router_weight(self) -> Tensor:
        """``[E, D]``."""
        if self.extras.prompts is not None:
            return self.extras.prompts.weight(self.layer, torch_dtype(self._router_code))
        rows = None if self.arranged is None else self.arranged.router
        return router_weight(self.plan, self.name, self.D, torch_dtype(self._router_code), rows)

    @property
    def _router_code(self) -> str:
        return self.found.host.router_dtype or self.code

    def _router_out(self) -> OutTensor:
        code, recipe = self._router_code, self.plan.recipe
        prompts = "" if self.extras.prompts is None else f" {self.extras.prompts.digest(self.layer)}"
        digest = f"router {recipe.router} {recipe.router_std!r} {self._about()} {torch_dtype(code)}{prompts}"
        make = self.router_weight
        return self._out(self.names.router, (self.E, self.D), Computed((), make, digest), "router", code)

    def _about(self) -> str:
        """Everything that the draws and cuts of this block depend on."""
        init, plan = self.plan.init, self.plan
        tied = init.granularity if init.method == "virtual_groups" else 1
        drop = f" ratio={init.drop_ratio!r} indices={init.drop_indices}"
        extra = {"copy+noise": f" std={init.noise_std!r}", "drop": drop}.get(init.method, "")
        order = "" if self.arranged is None else f" order={self.arranged.digest}"
        return (
            f"{init.method}{extra}{order} seed={init.seed} name={self.name} E={self.E} tied={tied} cut={plan.cut} "
            f"zero={plan.zero_router}"
        )

    @property
    def _plain(self) -> bool:
        """Whether the method changes no value."""
        init = self.plan.init
        return (
            init.method in {"copy", "virtual_groups", *SPLITS}
            or (init.method == "copy+noise" and not init.noise_std)
            or (init.method == "drop" and not init.drop_ratio)
        )

    def _verbatim(self, piece: Piece) -> bool:
        return self._plain and self.plan.cut == 1 and piece.rows is None and piece.dtype == self.code

    @property
    def _noisy(self) -> bool:
        return not self._plain and self.plan.init.method == "copy+noise"

    def learn_deviations(self, read: Pieces) -> None:
        """What noise is relative to; ``expert_in`` then needs no projection but its own."""
        for used in {self.matrices(e) for e in range(self.E)} if self._noisy else ():
            for part in (used[:2], used[2:]):
                self._moment(part, functools.partial(stream, part, read))

    def expert_in(self, dense: Sequence[Tensor], p: int, e: int) -> Tensor:
        """``[f, D]`` of the input projections of ``matrices(e)``; only noise looks at others than ``p``."""
        std = self._moment(self.matrices(e)[:2], lambda: dense) if self._noisy else None
        return expert_in(dense, p, e, self.plan.cut, self.plan.init, self.name, std, self.order).to(self._dtype)

    def expert_out(self, dense: Tensor, e: int) -> Tensor:
        """``[D, f]`` of the output projection of ``matrices(e)``."""
        std = self._moment(self.matrices(e)[2:], lambda: [dense]) if self._noisy else None
        plan = self.plan
        made = expert_out(dense, e, plan.cut, plan.verdict.scale, plan.init, self.name, std, self.order)
        return made.to(self._dtype)

    def shared_in(self, dense: Tensor) -> Tensor:
        """``[shared, D]`` of one input projection."""
        return part_of(dense, 0, 0, 1, self._first).to(self._dtype)

    def shared_out(self, dense: Tensor) -> Tensor:
        """``[D, shared]``."""
        return scaled(part_of(dense, 1, 0, 1, self._first), self.plan.shared_scale).to(self._dtype)

    @property
    def _first(self) -> Tensor | None:
        return None if self.arranged is None else self.arranged.first

    @property
    def _dtype(self) -> torch.dtype:
        return torch_dtype(self.code)

    def _one_in(self, pattern: str, p: int, e: int) -> OutTensor:
        ins, suffix = self.matrices(e)[:2], pattern.format(e=e)
        piece, what = ins[p], f"in p={p} e={e} {self._about()}"
        if self._verbatim(piece):
            return self._out(suffix, (self.f, self.D), Verbatim(piece.source), f"in{p}", self.code)
        recipe: Computed | Streamed
        if self._noisy:
            recipe = self._with_noise(piece, ins, lambda std: noise_in(std, p, e, self.plan.init, self.name), what)
        else:  # the other projection does not matter
            recipe = computed((piece, piece), lambda dense: self.expert_in(dense, p, e), what, self._dtype)
        return self._out(suffix, (self.f, self.D), recipe, f"in{p}", self.code)

    def _one_out(self, e: int) -> OutTensor:
        piece, suffix = self.matrices(e)[2], self.names.down.format(e=e)
        if self._verbatim(piece) and self.plan.verdict.scale == 1.0:
            return self._out(suffix, (self.D, self.f), Verbatim(piece.source), "out", self.code)
        recipe: Computed | Streamed
        if self._noisy and self.plan.verdict.scale == 1.0:
            what = f"out e={e} {self._about()}"
            recipe = self._with_noise(piece, [piece], lambda std: noise_out(std, e, self.plan.init, self.name), what)
        else:
            recipe = self._computed_out([piece], lambda dense: self.expert_out(dense[0], e), f"out e={e}")
        return self._out(suffix, (self.D, self.f), recipe, "out", self.code)

    def _with_noise(
        self, piece: Piece, all_of: Sequence[Piece], noise: Callable[[float], Noise], what: str
    ) -> Streamed:
        """``piece`` and the noise that follows from the deviation of ``all_of``."""

        def begin(read: Pieces) -> Callable[[Tensor], Tensor]:
            add = noise(self._moment(all_of, lambda: stream(all_of, read)))
            return lambda elements: add(elements).to(self._dtype)

        return streamed(piece, all_of, begin, f"{what} {self._dtype}")

    def _computed_out(self, used: Sequence[Piece], make: Callable[[list[Tensor]], Tensor], what: str) -> Computed:
        digest = f"{what} scale={self.plan.verdict.scale!r} {self._about()}"
        return computed(used, make, digest, self._dtype)

    def _moment(self, used: Sequence[Piece], dense: Callable[[], Iterable[Tensor]]) -> float:
        """The standard deviation of the dense matrices, computed for the first expert that asks."""
        key = tuple(piece.source for piece in used)
        if key not in self._std:
            self._std[key] = moments_of(dense)[1]
        return self._std[key]

    def _all_in(self) -> OutTensor:
        def make(dense: list[Tensor]) -> Tensor:
            out = dense[0].new_empty(self.E, 2 * self.f, self.D, dtype=self._dtype)
            for e in range(self.E):
                for p in range(2):
                    out[e, p * self.f : (p + 1) * self.f] = self.expert_in(dense[2 * e : 2 * e + 2], p, e)
            return out

        used = [piece for e in range(self.E) for piece in self.matrices(e)[:2]]
        recipe = computed(used, make, f"in all {self._about()}", self._dtype)
        return self._out(self.names.gate, (self.E, 2 * self.f, self.D), recipe, "in", self.code)

    def _all_out(self) -> OutTensor:
        def make(dense: list[Tensor]) -> Tensor:
            out = dense[0].new_empty(self.E, self.D, self.f, dtype=self._dtype)
            for e in range(self.E):
                out[e] = self.expert_out(dense[e], e)
            return out

        recipe = self._computed_out([self.matrices(e)[2] for e in range(self.E)], make, "out all")
        return self._out(self.names.down, (self.E, self.D, self.f), recipe, "out", self.code)

    def _beside(self) -> Iterator[OutTensor]:
        if self.names.bias is not None:
            suffix, kind = self.names.bias
            yield self._zeros(suffix, (self.E,) if kind == "E" else (1, self.E), "F32")
        if self.names.shared is not None:
            rule = self.found.host.shared
            if self.shared:
                yield from self._shared(self.names.shared)
            elif rule is None or not rule.optional:
                yield from self._idle(self.names.shared)
        if self.names.shared_gate is not None:
            yield self._zeros(self.names.shared_gate, (1, self.D), self.code)

    def _shared(self, prefix: str) -> Iterator[OutTensor]:
        """The shared expert of the neurons that were chosen for it."""
        what = f"shared {self.shared} {self._about()}"
        for p, matrix in enumerate(MATRICES[:2]):
            recipe = computed((self.ins[p],), lambda dense: self.shared_in(dense[0]), f"in p={p} {what}", self._dtype)
            yield self._out(f"{prefix}{matrix}.weight", (self.shared, self.D), recipe, f"in{p}", self.code)
        digest = f"out scale={self.plan.shared_scale!r} {what}"
        recipe = computed((self.down,), lambda dense: self.shared_out(dense[0]), digest, self._dtype)
        yield self._out(f"{prefix}down_proj.weight", (self.D, self.shared), recipe, "out", self.code)

    def _idle(self, prefix: str) -> Iterator[OutTensor]:
        """A shared expert that adds nothing: of width 0, or with a zero output projection."""
        if not self.found.host.zero_shared:
            yield self._zeros(f"{prefix}gate_proj.weight", (0, self.D), self.code)
            yield self._zeros(f"{prefix}up_proj.weight", (0, self.D), self.code)
            yield self._zeros(f"{prefix}down_proj.weight", (self.D, 0), self.code)
            return
        for p, matrix in enumerate(MATRICES[:2]):
            piece = self.ins[p]
            first = Piece(piece.source, (self.f, self.D), piece.dtype, (0, self.f) if self.plan.cut > 1 else piece.rows)
            made = passed_on(f"model.layers.{self.layer}.{prefix}{matrix}.weight", first, self.code)
            yield OutTensor(made.name, made.shape, made.dtype, made.recipe, f"{self.name}/shared{p}")
        yield self._zeros(f"{prefix}down_proj.weight", (self.D, self.f), self.code)

    def _zeros(self, suffix: str, shape: tuple[int, ...], code: str) -> OutTensor:
        make = functools.partial(torch.zeros, shape, dtype=torch_dtype(code))
        return self._out(suffix, shape, Computed((), make, f"zeros {list(shape)} {code}"), "zeros", code)
