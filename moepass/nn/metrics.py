"""What the routing of a block did: tensors on the device, never a host synchronisation.

Contract
    ``routing_metrics`` is a pure function of the routing.  A module keeps what its last forward did (``Recorder``) only
    when asked, so that default graphs have no side effect; ``collect`` and ``log_metrics`` read every block of a model.
    Recording writes buffers in place, with the values of this forward rather than by adding to them: a forward that
    activation checkpointing runs again leaves the same numbers.

Shapes: T tokens, E experts, K top-k, C rows an expert has room for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor, nn

from moepass.nn.losses import expert_counts
from moepass.nn.named import named

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from moepass.nn.moe import MoE

Reduce = Literal["mean", "sum", "max"]


class Metrics(NamedTuple):
    """Routing of one forward; everything is float32 of shape [] except where noted.

    ``tokens_per_expert``     pairs that the router sent to each expert, before any is dropped: int64 ``[E]``
    ``dropped_tokens``        (token, expert) pairs that were not computed for lack of room: int64
    ``padding_rows``          rows of a fixed-capacity buffer that held no token, ``E*C - kept``: int64
    ``load_cv``               standard deviation of ``tokens_per_expert`` over its mean
    ``load_max_over_mean``    the busiest expert's load over the mean (OLMo-core's load imbalance)
    ``load_utilization``      ``exp(H)/E``, H the entropy of the load: the share of the experts that is really used
    ``dead_expert_fraction``  share of experts without a token
    ``router_entropy``        mean over tokens of the entropy of a token's scores, in nats
    ``router_utilization``    ``exp(router_entropy)/E``: 1 for a router that does not care, 1/E for one that is sure
    """

    tokens_per_expert: Tensor
    dropped_tokens: Tensor
    padding_rows: Tensor
    load_cv: Tensor
    load_max_over_mean: Tensor
    load_utilization: Tensor
    dead_expert_fraction: Tensor
    router_entropy: Tensor
    router_utilization: Tensor


#: How each metric is combined over ranks or micro-batches.
REDUCE: Mapping[str, Reduce] = {
    "tokens_per_expert": "sum",
    "dropped_tokens": "sum",
    "padding_rows": "sum",
    "load_cv": "mean",
    "load_max_over_mean": "max",
    "load_utilization": "mean",
    "dead_expert_fraction": "mean",
    "router_entropy": "mean",
    "router_utilization": "mean",
}


def routing_metrics(
    index_TK: Tensor,
    scores_TE: Tensor,
    num_experts: int,
    dropped: Tensor | int = 0,
    *,
    padding_rows: Tensor | int = 0,
    mask: Tensor | None = None,
) -> Metrics:
    """Metrics of a routing: ``index_TK`` before drops (an index >= E is nobody's), ``scores_TE`` of any positive scale.

    ``dropped`` and ``padding_rows`` are what the dispatch reports; ``capacity_drops`` computes them for a capacity.
    """
    count_E = expert_counts(index_TK, num_experts, mask=mask)[0]
    device = index_TK.device
    return summarize(
        count_E,
        torch.as_tensor(dropped, device=device),
        torch.as_tensor(padding_rows, device=device),
        score_entropy(scores_TE, mask),
    )


def capacity_drops(count_E: Tensor, capacity: int | Tensor) -> tuple[Tensor, Tensor]:
    """``(dropped, padding_rows)`` int64 of a buffer with ``capacity`` rows an expert."""
    kept_E = count_E.clamp(max=capacity)
    return (count_E - kept_E).sum(), (capacity - kept_E).sum()


def score_entropy(scores_TE: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean entropy of a token's scores, normalised over the experts: float32 ``[]``, 0 without tokens."""
    scores_TE = scores_TE.detach().float()
    p_TE = scores_TE / scores_TE.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    entropy_T: Tensor = torch.special.entr(p_TE).sum(-1)
    if mask is None:
        return entropy_T.sum() / max(entropy_T.shape[0], 1)
    real_T = mask.reshape(-1).bool()
    return torch.where(real_T, entropy_T, 0).sum() / real_T.sum().clamp(min=1)


def summarize(count_E: Tensor, dropped: Tensor, padding_rows: Tensor, entropy: Tensor) -> Metrics:
    """All metrics from the four that a forward must measure."""
    count_E, E = count_E.detach(), count_E.shape[0]
    load_E = count_E.float()
    mean = load_E.mean().clamp(min=1.0 / E)  # no token: every load is 0, and so are the ratios
    share_E = load_E / load_E.sum().clamp(min=1)
    return Metrics(
        tokens_per_expert=count_E.clone(),
        dropped_tokens=dropped.clone(),
        padding_rows=padding_rows.clone(),
        load_cv=load_E.std(correction=0) / mean,
        load_max_over_mean=load_E.max() / mean,
        load_utilization=torch.where(load_E.sum() > 0, torch.special.entr(share_E).sum().exp() / E, 0.0),
        dead_expert_fraction=(count_E == 0).float().mean(),
        router_entropy=entropy.clone(),
        router_utilization=entropy.exp() / E,
    )


@torch.no_grad()
def over_ranks(metrics: Metrics, group: ProcessGroup | None = None) -> Metrics:
    """Metrics of all ranks' tokens together, the same on every rank; collective.  ``group``: all ranks by default.

    Counts are summed and everything else follows from them; the entropy is weighed by the ranks' tokens.
    """
    pairs = metrics.tokens_per_expert.sum()
    counts = torch.cat([metrics.tokens_per_expert, metrics.dropped_tokens[None], metrics.padding_rows[None]])
    entropy = (metrics.router_entropy * pairs).double()
    torch.distributed.all_reduce(counts, group=group)
    torch.distributed.all_reduce(entropy, group=group)
    entropy = (entropy / counts[:-2].sum().clamp(min=1)).float()
    return summarize(counts[:-2], counts[-2], counts[-1], entropy)


class Recorder(nn.Module):
    """What the last forward measured, in buffers that are no part of the state dict."""

    tokens_per_expert: Tensor
    dropped_tokens: Tensor
    padding_rows: Tensor
    router_entropy: Tensor

    def __init__(self, num_experts: int, *, device: torch.device | str | None = None) -> None:
        super().__init__()
        for name, shape in (("tokens_per_expert", (num_experts,)), ("dropped_tokens", ()), ("padding_rows", ())):
            self.register_buffer(name, torch.zeros(shape, dtype=torch.int64, device=device), persistent=False)
        self.register_buffer("router_entropy", torch.zeros((), device=device), persistent=False)

    @torch.no_grad()
    def forward(self, count_E: Tensor, dropped: Tensor, padding_rows: Tensor, entropy: Tensor) -> None:
        """Overwrite the record."""
        self.tokens_per_expert.copy_(count_E)
        self.dropped_tokens.copy_(dropped)
        self.padding_rows.copy_(padding_rows)
        self.router_entropy.copy_(entropy)

    @torch.no_grad()
    def add_dropped(self, dropped: Tensor) -> None:
        """More pairs of this forward that were not computed."""
        self.dropped_tokens.add_(dropped)

    def metrics(self) -> Metrics:
        """The metrics of the last forward, in tensors of their own."""
        return summarize(self.tokens_per_expert, self.dropped_tokens, self.padding_rows, self.router_entropy.float())


def blocks(model: nn.Module) -> Iterator[tuple[str, MoE]]:
    """``(name, block)`` of every MoE block of a model; compiled and wrapped models have their original's names."""
    from moepass.nn.moe import MoE

    return named(model, MoE)


def collect(model: nn.Module) -> dict[str, tuple[Tensor, Reduce]]:
    """``{"layers.0.mlp.load_cv": (tensor, "mean"), ...}`` of every recording block of a model.

    The second is how to combine the value over ranks and micro-batches (OLMo-core's reduce types).
    """
    return {
        f"{name}.{metric}" if name else metric: (value, REDUCE[metric])
        for name, block in blocks(model)
        if block.recording
        for metric, value in block.metrics()._asdict().items()
    }


class MetricsLogger:
    """Handle of ``log_metrics``: ``remove()`` takes the hook away and stops the recording that it had started."""

    def __init__(self, model: nn.Module, callback: Callable[[dict[str, dict[str, Tensor]]], None]) -> None:
        self.model, self.callback = model, callback
        self._started = [block for _, block in blocks(model) if not block.recording]
        for block in self._started:
            block.record_metrics(True)
        self._handle = model.register_forward_hook(self._after_forward)

    def _after_forward(self, *_: object) -> None:
        self.callback({name: block.metrics()._asdict() for name, block in blocks(self.model) if block.recording})

    def remove(self) -> None:
        """Undo ``log_metrics``; harmless when repeated."""
        self._handle.remove()
        for block in self._started:
            block.record_metrics(False)
        self._started = []


def log_metrics(model: nn.Module, callback: Callable[[dict[str, dict[str, Tensor]]], None]) -> MetricsLogger:
    """Call ``callback({block name: {metric: tensor}})`` after every forward of ``model``.

    Give the module that you call: the one that ``torch.compile`` returned, or the callback is compiled along.  The
    tensors are the callback's to keep and live on the device: reading one (``.item()``) is what synchronises.
    """
    return MetricsLogger(model, callback)
