"""Is DST the same function as SRC?  Both run through stock transformers in float32, one layer in memory at a time.

Contract
    in    two Hugging Face folders with the same depth, width and vocabulary; token ids (random ones are always tried)
    out   ``VerifyReport``: largest difference of hidden states per layer and of the logits relative to their scale, KL,
          argmax agreement, router balance, broken virtual groups
    Memory: one decoder layer or the embeddings, plus SRC's hidden states [layers, T, D] and both logits [T, V].
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from moepass import errors
from moepass.upcycle.checkpoint.routing import RouterBalance, find_probes
from moepass.upcycle.checkpoint.stock import Stock, refuse

#: Largest allowed |logit difference| relative to the largest |logit|, in float32 (DESIGN: exact by default).
TOLERANCE = 5e-6
_RANDOM = (2, 32)


@dataclass(frozen=True)
class Difference:
    """Two tensors that should be equal.  ``relative = largest / scale``; ``scale`` is the largest |entry| of SRC."""

    where: str
    largest: float
    scale: float
    relative: float


@dataclass(frozen=True)
class Comparison:
    """One batch of tokens.  KL(SRC || DST) in nats per token; ``argmax``: share of tokens with the same best token."""

    tokens: str
    shape: tuple[int, int]
    layers: tuple[Difference, ...]
    logits: Difference
    kl_mean: float
    kl_max: float
    argmax: float
    routers: tuple[RouterBalance, ...]


@dataclass(frozen=True)
class VerifyReport:
    """``passed``: the logits of every batch agree within ``tolerance``.  ``peak_weights``: bytes in memory at once."""

    source: str
    target: str
    tolerance: float
    passed: bool
    first_bad_layer: str | None
    peak_weights: int
    comparisons: tuple[Comparison, ...]

    def to_json(self) -> str:
        """Everything, as JSON text."""
        return json.dumps(asdict(self), indent=1) + "\n"

    def __str__(self) -> str:
        verdict = "the same function" if self.passed else "NOT the same function"
        lines = [f"{self.target} is {verdict} as {self.source} (tolerance {self.tolerance:g} x scale, float32)"]
        if self.first_bad_layer is not None:
            lines.append(f"  first layer above the tolerance: {self.first_bad_layer}")
        for c in self.comparisons:
            lines += _batch_lines(c)
        return "\n".join(lines)


def verify(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    token_ids: Tensor | Sequence[int] | Sequence[Sequence[int]] | None = None,
    tolerance: float = TOLERANCE,
) -> VerifyReport:
    """Compare layer by layer.  ``token_ids [S]`` or ``[B, S]`` are tried besides the random ones.

    Raises ``BadCheckpoint``, ``NotVerifiable`` (depths, widths or vocabularies differ; transformers cannot load one of
    them), ``BadOption`` (token ids that are no ids), ``MissingPackage``.
    """
    a, b = Stock.open(src), Stock.open(dst)
    vocabulary = _check_pair(a, b)
    batches = {"random": torch.randint(vocabulary, _RANDOM, generator=torch.Generator().manual_seed(0))}
    if token_ids is not None:
        batches["given"] = _ids(token_ids, vocabulary)
    comparisons = tuple(_compare(name, ids, a, b) for name, ids in batches.items())
    bad = [d.where for c in comparisons for d in c.layers if not d.relative <= tolerance]
    passed = all(c.logits.relative <= tolerance for c in comparisons)
    return VerifyReport(
        str(src), str(dst), tolerance, passed, bad[0] if bad else None, max(a.peak, b.peak), comparisons
    )


def _check_pair(a: Stock, b: Stock) -> int:
    """The size of the vocabulary that both share."""
    if len(a.layers) != len(b.layers):
        detail = f"{len(b.layers)} layers, the source has {len(a.layers)}"
        refuse(b.source.folder, detail, "give the checkpoint that was made from this source")
    ours, theirs = (s.model.get_input_embeddings().weight.shape for s in (a, b))
    if ours != theirs:
        detail = f"embeddings of shape {list(theirs)}, the source has {list(ours)}"
        refuse(b.source.folder, detail, "give the checkpoint that was made from this source")
    return int(ours[0])


def _ids(given: Tensor | Sequence[int] | Sequence[Sequence[int]], vocabulary: int) -> Tensor:
    try:
        ids = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError):
        raise errors.BadOption(name="token_ids", value="...", detail="give integers, rows of equal length") from None
    whole = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    if not whole or ids.dim() not in (1, 2) or not ids.numel() or ids.min() < 0 or ids.max() >= vocabulary:
        detail = f"give integers from 0 to {vocabulary - 1} of shape [S] or [B, S]"
        raise errors.BadOption(name="token_ids", value=f"{ids.dtype} {list(ids.shape)}", detail=detail)
    return ids.long().reshape(-1, ids.shape[-1])


def _compare(name: str, ids: Tensor, a: Stock, b: Stock) -> Comparison:
    expected: list[Tensor] = []
    logits_a = a.run(ids, lambda _, __, h: expected.append(h))
    layers: list[Difference] = []
    routers: list[RouterBalance] = []
    probes = find_probes(b.model, b.layers)

    def visit(layer: str, _: object, h: Tensor) -> None:
        layers.append(_difference(layer, expected[len(layers)], h))
        found = probes[layer].balance() if layer in probes else None
        routers.extend([found] if found is not None else [])

    for probe in probes.values():
        probe.attach()
    try:
        logits_b = b.run(ids, visit)
    finally:
        for probe in probes.values():
            probe.detach()
    kl_mean, kl_max = _kl(logits_a, logits_b)
    agree = float((logits_a.argmax(-1) == logits_b.argmax(-1)).float().mean())
    shape = (ids.shape[0], ids.shape[1])
    logits = _difference("logits", logits_a, logits_b)
    return Comparison(name, shape, tuple(layers), logits, kl_mean, kl_max, agree, tuple(routers))


def _difference(where: str, a: Tensor, b: Tensor) -> Difference:
    largest, scale = float((a - b).abs().max()), float(a.abs().max())
    if largest == 0.0:
        relative = 0.0
    else:
        relative = largest / scale if scale > 0 else float("inf")
    return Difference(where, largest, scale, relative)


def _kl(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Mean and largest KL(a || b) over tokens, in float64; [B, S, V] each, one sequence at a time."""
    found = []
    for p, q in zip(a, b, strict=True):
        log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
        found.append((log_p.exp() * (log_p - log_q)).sum(-1))
    kl = torch.stack(found).clamp(min=0.0)
    return float(kl.mean()), float(kl.max())


def _batch_lines(c: Comparison) -> list[str]:
    lines = [
        f"  {c.tokens} tokens {c.shape[0]} x {c.shape[1]}: max |logit difference| {c.logits.largest:.3g} = "
        f"{c.logits.relative:.2g} x scale {c.logits.scale:.3g}, KL {c.kl_mean:.2g} (max {c.kl_max:.2g}), "
        f"same best token {c.argmax:.1%}"
    ]
    lines += [f"    {d.where}: {d.relative:.2g} x scale {d.scale:.3g}" for d in c.layers]
    for r in c.routers:
        line = f"    {r.layer} router: tokens per expert {list(r.tokens_per_expert)}, largest/mean {r.imbalance:.2f}"
        if r.group_size is not None:
            line += f", groups of {r.group_size} broken: {r.broken_float32} (float32), {r.broken_bfloat16} (bfloat16)"
        lines.append(line)
    return lines
