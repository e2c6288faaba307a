"""What the output says about itself: ``moepass_upcycle.json`` and a section of README.md.

Both belong to the plan: the same inputs give the same bytes (no times, no paths but parents' as given).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import moepass
from moepass.upcycle.checkpoint.source import Source
from moepass.upcycle.checkpoint.tensors import OutTensor, Verbatim
from moepass.upcycle.hf.calibration import Calibration
from moepass.upcycle.hf.match import Match, transformers
from moepass.upcycle.hf.recipe import Plan
from moepass.upcycle.hf.sizes import Sizes, human
from moepass.upcycle.hf.step0 import Measured
from moepass.upcycle.own.schema import NAME

REPORT = "moepass_upcycle.json"
_SCHEMA = 1
_SHOWN = 20
#: A training hint: for stock hosts, for our own format.
_BALANCE = (
    "- Set `output_router_logits=True` (or your trainer's load-balancing loss) so that experts are used evenly.",
    "- Add a load-balancing loss (`MoESpec.losses`, docs/losses.md) so that experts are used evenly.",
)
_OWN_FORMAT = "- Load it with `moepass.load(folder)`: stock transformers has no such architecture and refuses it."
_BEGIN, _END = "<!-- moepass upcycle -->", "<!-- /moepass upcycle -->"


@dataclass(frozen=True)
class Facts:
    """Everything that the report tells.

    ``extra``: further entries of it; ``notes``: lines for people; ``measured``: the error at step 0, where not EXACT.
    """

    source: Source
    found: Match
    plan: Plan
    sizes: Sizes
    layers: tuple[int, ...]
    dtype: str | None
    warnings: tuple[str, ...]
    rounding: str | None
    extra: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    calibration: Calibration | None = None
    measured: Measured | None = None

    @property
    def exact(self) -> bool:
        """Whether the output computes the dense function at step 0."""
        return self.plan.verdict.exact and self.rounding is None

    @property
    def label(self) -> str:
        """EXACT or APPROX."""
        return "EXACT" if self.exact else "APPROX"

    @property
    def reason(self) -> str:
        """Why."""
        why = self.plan.verdict.reason
        return why if self.rounding is None else f"{why}; {self.rounding}"


def report(facts: Facts, tensors: Sequence[OutTensor]) -> dict[str, Any]:
    """The content of ``moepass_upcycle.json``."""
    plan = facts.plan
    return {
        "schema": _SCHEMA,
        "from": facts.found.family.model_type,
        "to": facts.found.host.model_type,
        "recipe": plan.recipe.to_dict() | {"layers": list(facts.layers), "dtype": facts.dtype},
        "verdict": {"exact": facts.exact, "reason": facts.reason, "scale": plan.verdict.scale},
        "measured": None if facts.measured is None else facts.measured.to_dict(),
        "calibration": None if facts.calibration is None else facts.calibration.to_dict(),
        "warnings": list(facts.warnings),
        "sizes": facts.sizes.to_dict(),
        "versions": {
            "moepass": moepass.__version__,
            "torch": torch.__version__,
            "transformers": transformers().__version__,
        },
        "fingerprints": {"source": source_fingerprint(facts.source), "output": _output_fingerprint(tensors)},
        "tensors": {t.name: _provenance(t) for t in tensors},
        **facts.extra,
    }


def source_fingerprint(source: Source) -> str:
    """Identifies config and the names, dtypes and shapes of the source; not the values, which would have to be read."""
    headers = sorted((h.name, h.dtype, h.shape) for h in source.headers.values())
    return _digest([source.config, headers])


def readme(old: str | None, facts: Facts) -> str:
    """The source's model card with our section put in, or in the place of an older one."""
    section = f"{_BEGIN}\n{_section(facts)}{_END}\n"
    if old is None:
        return section
    if _BEGIN in old and _END in old:
        before, _, rest = old.partition(_BEGIN)
        return before + section + rest.partition(_END)[2].lstrip("\n")
    return f"{old.rstrip()}\n\n{section}"


def text(facts: Facts) -> str:
    """The plan for a terminal: verdict, sizes, shards, warnings."""
    plan, sizes, recipe = facts.plan, facts.sizes, facts.plan.recipe
    largest = max(size for _, size in sizes.shards)
    lines = [
        f"{facts.found.family.model_type} -> {facts.found.host.model_type}: {recipe.method}, {recipe.experts} experts, "
        f"top-{recipe.top_k}, {len(facts.layers)} of {facts.found.config.num_hidden_layers} layers",
        *facts.notes,
        f"verdict: {facts.label} ({facts.reason}); output projections x {plan.verdict.scale:g}",
        *([f"measured: {facts.measured}"] if facts.measured is not None else []),
        f"parameters: {human(sizes.parameters)} (dense {human(sizes.dense_parameters)})",
        f"active parameters: {human(sizes.active_parameters)} per token",
        f"FLOPs per token: {human(sizes.flops_per_token)} (dense {human(sizes.dense_flops_per_token)})",
        f"size: {sizes.nbytes:,} bytes in {len(sizes.shards)} file{'s'[: len(sizes.shards) > 1]}, largest {largest:,}",
        *(f"  {name}: {size:,} bytes" for name, size in sizes.shards[:_SHOWN]),
    ]
    if len(sizes.shards) > _SHOWN:
        lines.append(f"  ... {len(sizes.shards) - _SHOWN} more")
    return "\n".join([*lines, *(f"note: {warning}" for warning in facts.warnings)])


def _section(facts: Facts) -> str:
    sizes, recipe = facts.sizes, facts.plan.recipe
    lines = [
        "## Upcycled with moepass",
        "",
        f"A mixture of experts (`{facts.found.host.model_type}`) made from a dense `{facts.found.family.model_type}` "
        f"checkpoint by `moepass upcycle` {moepass.__version__}. It has not been trained since.",
        "",
        "| | dense | this model |",
        "|---|---|---|",
        f"| parameters | {human(sizes.dense_parameters)} | {human(sizes.parameters)} |",
        f"| used per token | {human(sizes.dense_parameters)} | {human(sizes.active_parameters)} |",
        f"| FLOPs per token (forward, without attention scores) | {human(sizes.dense_flops_per_token)} "
        f"| {human(sizes.flops_per_token)} |",
        "",
        f"- Recipe: `{recipe.method}`, {recipe.experts} experts, top-{recipe.top_k}, seed {recipe.seed}; "
        f"{len(facts.layers)} of {facts.found.config.num_hidden_layers} layers.",
        *(f"- {note[0].upper()}{note[1:]}." for note in facts.notes),
        f"- Verdict: **{facts.label}** ({facts.reason}).",
        *([f"- Measured before training: {facts.measured}."] if facts.measured is not None else []),
        f"- Every tensor's origin is in `{REPORT}`.",
        *([_OWN_FORMAT] if facts.found.host.model_type == NAME else []),
        "",
        "Training hints:",
        "",
        _BALANCE[facts.found.host.model_type == NAME],
        "- Start again at the peak learning rate of pre-training, with a warm-up, rather than where it had decayed to.",
        *(f"- {warning[0].upper()}{warning[1:]}." for warning in facts.warnings),
    ]
    return "\n".join(lines) + "\n"


def _provenance(t: OutTensor) -> dict[str, Any]:
    if isinstance(t.recipe, Verbatim):
        return {"from": [t.recipe.source], "how": "copied"}
    return {"from": list(t.recipe.inputs), "how": t.recipe.digest}


def _output_fingerprint(tensors: Iterable[OutTensor]) -> str:
    return _digest([(t.name, t.dtype, t.shape, _provenance(t)) for t in tensors])


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
