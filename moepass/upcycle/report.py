"""What ``moepass.convert`` did, block by block: frozen values, readable as text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar, Literal

from moepass import pointwise
from moepass.spec import InitSpec, RouterSpec

#: Reason codes of conversion, beside those of ``moepass.graph.site.REASONS``, with what a user can do.
REASONS: dict[str, str] = {
    "already_moe": "this block is a moepass.nn.MoE already",
    "not_selected": "left out by layers= or every=",
    "no_module_boundary": "the block is not a module or a chain of modules of its own; use the one-line form "
    "torch.compile(model, backend='moepass'), or give the block its own nn.Module",
    "root_module": "the model itself is the block and cannot be exchanged in place; wrap it, e.g. nn.Sequential(model)",
    "tied_weight": "a weight of the block is also used elsewhere; conversion would untie it",
    "trace_failed": "the module could not be traced with one tensor [1, 3, D]; write the block as a module of its own",
    "verification_failed": "the converted block was not shown to reproduce the dense one, which stays; please report",
    "no_state": "no MoE state is attached to this block",
    "adapter_failed": "the adapter for this class of transformers does not fit the installed version; please report",
    "ambiguous_routing": "several routing rules give the block's output; nothing was guessed",
    "differs_in_training": "the block behaves differently in training (noise, dropout), which an nn.MoE would lose",
    "experts_not_understood": "the experts are no plain feed-forward blocks; use the block as it is",
    "has_hooks": "the block or a module in it has hooks, which would be lost; remove them, convert, put them back",
    "no_data": "the block is on the meta device; load its weights first",
    "not_reproduced": "no known reading of the block gives its own output and gradients; use it as it is",
    "not_runnable": "the block could not be run on tokens [2, 12, D] or [24, D]",
    "return_form": "the block returns something else than its output, or its output and the router's logits",
    "shared_setting": "set_experts_implementation acts on all experts of a model",
    "updates_buffers": "the forward changes buffers (token counts, a bias), which an nn.MoE would not do in its place",
}


@dataclass(frozen=True)
class ConvertedSite:
    """One block that is a ``moepass.nn.MoE`` now.

    ``id`` the block's name (the module that holds all its weights); ``where`` the name of the MoE module;
    ``K`` experts per token; ``parameters_before`` and ``parameters_after`` count elements.
    """

    id: str
    where: str
    D: int
    F: int
    E: int
    K: int
    activation: str
    method: str
    exact: bool
    reason: str
    parameters_before: int
    parameters_after: int
    kind: ClassVar[str] = "dense"

    def __str__(self) -> str:
        name = pointwise.display_name(self.activation)
        verdict = "exact" if self.exact else "not exact: " + self.reason
        size = f"{self.parameters_before:,} -> {self.parameters_after:,} parameters"
        return f"{self.id}  {name}, {self.E} experts of {self.D}x{self.F}, top-{self.K}, {size}, {verdict}"


@dataclass(frozen=True)
class ConvertedMoE:
    """One MoE block that the model had already, now run by moepass (``convert(existing=True)``).

    ``way``      ``interface`` (transformers' experts interface: only a setting changed), ``adapter`` (a known class) or
                 ``rebuilt`` (read from its numbers)
    ``routing``  in words; ``router`` the spec where moepass routes too; ``K`` None where the block's own router knows
    ``weights``  whether the experts' weights are used in place or were copied
    ``error``    largest relative difference to the block that the proof saw, float64
    """

    id: str
    where: str
    way: Literal["interface", "adapter", "rebuilt"]
    D: int
    F: int
    E: int
    K: int | None
    activation: str
    routing: str
    router: RouterSpec | None
    weights: str
    error: float
    parameters: int
    kind: ClassVar[str] = "moe"
    exact: ClassVar[bool] = True
    reason: ClassVar[str] = ""

    @property
    def parameters_before(self) -> int:
        """Elements of the block, the same before and after."""
        return self.parameters

    parameters_after = parameters_before

    def __str__(self) -> str:
        name = pointwise.display_name(self.activation)
        return (
            f"{self.id}  {name}, {self.E} experts of {self.D}x{self.F}, {self.way}: {self.routing}; weights "
            f"{self.weights}"
        )


@dataclass(frozen=True)
class SkippedSite:
    """One block, or a module that may hold one, that stays as it was.  ``reason`` is a stable code."""

    id: str
    reason: str
    detail: str


@dataclass(frozen=True)
class ConversionReport:
    """The outcome of ``moepass.convert``.  ``print`` it."""

    init: InitSpec | None  # None: existing MoE blocks were converted
    converted: tuple[ConvertedSite | ConvertedMoE, ...]
    skipped: tuple[SkippedSite, ...]

    @property
    def exact(self) -> bool:
        """Whether the model computes the dense function, up to rounding: every conversion is exact."""
        return all(site.exact for site in self.converted)

    @property
    def parameters_before(self) -> int:
        """Elements of the converted blocks' dense weights."""
        return sum(site.parameters_before for site in self.converted)

    @property
    def parameters_after(self) -> int:
        """Elements of the MoE weights that replace them."""
        return sum(site.parameters_after for site in self.converted)

    def to_text(self) -> str:
        """A line a block; equal reasons are counted together."""
        return "\n".join([self._headline(), *(f"  {site}" for site in self.converted), *self._skipped_lines()])

    def __str__(self) -> str:
        return self.to_text()

    def _headline(self) -> str:
        if self.init is None:
            return f"handed {len(self.converted)} existing MoE blocks to moepass; the function is unchanged"
        method = f"{self.init.method}, seed {self.init.seed}"
        if not self.converted:
            return f"converted 0 feed-forward blocks ({method})"
        verdict = "the function is unchanged" if self.exact else "the function changes"
        size = f"{self.parameters_before:,} -> {self.parameters_after:,} parameters"
        return f"converted {len(self.converted)} feed-forward blocks ({method}): {size}, {verdict}"

    def _skipped_lines(self) -> Iterator[str]:
        from moepass.graph.site import REASONS as FROM_GRAPH

        ordered = sorted(self.skipped, key=lambda s: (s.reason, s.detail))
        for (reason, detail), group in groupby(ordered, key=lambda s: (s.reason, s.detail)):
            names = [s.id for s in group]
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            hint = REASONS.get(reason) or FROM_GRAPH.get(reason, "")
            yield f"  skipped {names[0]}{more}: {reason}" + "".join(f"; {text}" for text in (detail, hint) if text)
