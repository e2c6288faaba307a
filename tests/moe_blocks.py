"""Stand-ins for the MoE blocks of other code bases: their shapes, routing rules and loops, none of their code.

``BLOCKS`` maps a name to a maker of a block of width D; every block is deterministic and drawn from the global seed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

D, FF, E, K = 16, 24, 4, 2


class Expert(nn.Module):
    """A gated FFN as a module."""

    def __init__(self, width: int = FF) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Linear(D, width, bias=False), nn.Linear(D, width, bias=False)
        self.w2 = nn.Linear(width, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class BiasedExpert(nn.Module):
    """An ungated FFN with biases."""

    def __init__(self) -> None:
        super().__init__()
        self.rise, self.fall = nn.Linear(D, FF), nn.Linear(FF, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.fall(F.gelu(self.rise(x)))


class MixtralStyle(nn.Module):
    """transformers before version 5: a ModuleList, one_hot and torch.where; returns the logits too."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts, self.top_k = E, K
        self.gate = nn.Linear(D, E, bias=False)
        self.experts = nn.ModuleList(Expert() for _ in range(E))

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        B, S, _ = hidden.shape
        flat = hidden.reshape(-1, D)
        logits = self.gate(flat)
        weight, chosen = torch.topk(F.softmax(logits, dim=1, dtype=torch.float), self.top_k, dim=-1)
        weight = (weight / weight.sum(-1, keepdim=True)).to(hidden.dtype)
        out = torch.zeros_like(flat)
        hits = F.one_hot(chosen, self.num_experts).permute(2, 1, 0)
        for e in torch.greater(hits.sum((-1, -2)), 0).nonzero().flatten().tolist():
            slot, token = torch.where(hits[e])
            out.index_add_(0, token, self.experts[e](flat[token]) * weight[token, slot, None])
        return out.reshape(B, S, D), logits


class SharedStyle(nn.Module):
    """DeepSeek-V3: sigmoid scores, a correction bias for the choice, normalised, scaled, a shared expert; a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts_per_tok, self.routed_scaling_factor = K, 2.5
        self.gate = nn.Linear(D, E, bias=False)
        self.register_buffer("e_score_correction_bias", torch.zeros(E))
        self.experts = nn.ModuleList(Expert() for _ in range(E))
        self.shared_experts = Expert(40)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        scores = self.gate(flat).sigmoid()
        chosen = torch.topk(scores + self.e_score_correction_bias, self.num_experts_per_tok, dim=-1).indices
        weight = scores.gather(1, chosen)
        weight = weight / weight.sum(-1, keepdim=True) * self.routed_scaling_factor
        out = self.shared_experts(flat)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == e)
            out = out.index_add(0, token, expert(flat[token]) * weight[token, slot, None])
        return out.view_as(x)


class GatedSharedStyle(nn.Module):
    """Qwen2-MoE: a shared expert behind a sigmoid gate; weights not normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.top_k = K
        self.gate = nn.Linear(D, E, bias=False)
        self.experts = nn.ModuleList(Expert() for _ in range(E))
        self.shared_expert, self.shared_expert_gate = Expert(40), nn.Linear(D, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weight, chosen = self.gate(x).softmax(-1).topk(self.top_k, dim=-1)
        out = torch.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)
        for e, expert in enumerate(self.experts):
            out = out + expert(x) * torch.where(chosen == e, weight, 0).sum(-1, keepdim=True)
        return out


class BiasedStyle(nn.Module):
    """Biases everywhere, an ungated activation, scores after the top-k (GPT-OSS's order), no attribute that says K."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(D, E)
        self.ffns = nn.ModuleDict({f"expert_{e}": BiasedExpert() for e in range(E)})

    def forward(self, x: Tensor) -> Tensor:
        top, chosen = self.router(x).topk(3, dim=-1)
        weight = top.softmax(-1)
        every = torch.stack([expert(x) for expert in self.ffns.values()], dim=-2)
        return (every.gather(-2, chosen[..., None].expand(*chosen.shape, D)) * weight[..., None]).sum(-2)


class GroupedExperts(nn.Module):
    """torchtitan: w1, w3 [E, F, D] and w2 [E, D, F], tokens sorted by expert."""

    def __init__(self, width: int = FF) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(E, width, D) * 0.2)
        self.w2 = nn.Parameter(torch.randn(E, D, width) * 0.2)
        self.w3 = nn.Parameter(torch.randn(E, width, D) * 0.2)

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        outs = []
        for e, part in enumerate(rows.split(counts.tolist())):
            outs.append((F.silu(part @ self.w1[e].T) * (part @ self.w3[e].T)) @ self.w2[e].T)
        return torch.cat(outs)


class TokenChoiceRouter(nn.Module):
    """torchtitan's router: sigmoid in float32, a bias for the choice, an optional norm and scale."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.top_k, self.route_scale = nn.Linear(D, E, bias=False), K, 1.5

    def forward(self, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores = torch.sigmoid(self.gate(x).to(torch.float32))
        chosen = torch.topk(scores + bias, self.top_k, dim=1).indices
        weight = scores.gather(1, chosen)
        weight = weight / (weight.sum(-1, keepdim=True) + 1e-20) * self.route_scale
        return weight, chosen, torch.bincount(chosen.flatten(), minlength=E)


class TorchtitanStyle(nn.Module):
    """Router, grouped experts and a reorderer; ``before``: the experts' input is multiplied by the weights."""

    def __init__(self, before: bool = False, count: bool = False, width: int = FF) -> None:
        super().__init__()
        self.router, self.experts = TokenChoiceRouter(), GroupedExperts(width)
        self.before, self.count = before, count
        if before:
            self.router.route_scale = 1.0
        self.register_buffer("expert_bias", torch.zeros(E))
        self.register_buffer("tokens_per_expert", torch.zeros(E), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        weight, chosen, counts = self.router(flat, self.expert_bias)
        if self.count:
            with torch.no_grad():
                self.tokens_per_expert.add_(counts)
        order = torch.argsort(chosen.flatten(), stable=True)
        token = order // K
        weight = weight.flatten()[order, None].to(x.dtype)
        rows = flat[token]
        out = self.experts(rows * weight, counts) if self.before else self.experts(rows, counts) * weight
        return torch.zeros_like(flat).index_add(0, token, out).view_as(x)


class OlmoCoreStyle(nn.Module):
    """OLMo-core: a bare router parameter, w1, w2, w3 [E, D, F] / [E, F, D], L2-normalised weights."""

    def __init__(self) -> None:
        super().__init__()
        self.top_k, self.num_experts = K, E
        self.router_weight = nn.Parameter(torch.randn(E, D) * 0.2)
        self.w1, self.w3 = (nn.Parameter(torch.randn(E, D, FF) * 0.2) for _ in range(2))
        self.w2 = nn.Parameter(torch.randn(E, FF, D) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        weight, chosen = F.linear(flat.float(), self.router_weight.float()).softmax(-1).topk(self.top_k)
        weight = weight / torch.linalg.vector_norm(weight, dim=-1, keepdim=True)
        order = chosen.flatten().argsort(stable=True)
        ends = torch.bincount(chosen.flatten(), minlength=E).cumsum(0).to(torch.int32)
        rows = flat[order // K]
        h = F.silu(F.grouped_mm(rows, self.w1, offs=ends)) * F.grouped_mm(rows, self.w3, offs=ends)
        out = F.grouped_mm(h, self.w2, offs=ends) * weight.flatten()[order, None].to(x.dtype)
        return torch.zeros_like(flat).index_add(0, order // K, out).view_as(x)


class MegatronStyle(nn.Module):
    """Megatron's GroupedMLP: both weights flat, [D, E*2F] and [E*F, D], viewed per expert; tokens [T, D] only."""

    def __init__(self) -> None:
        super().__init__()
        self.num_local_experts, self.topk = E, K
        self.router = nn.Linear(D, E, bias=False)
        self.weight1 = nn.Parameter(torch.randn(D, E * 2 * FF) * 0.2)
        self.weight2 = nn.Parameter(torch.randn(E * FF, D) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        T, _ = x.shape
        top, chosen = self.router(x).topk(self.topk)
        weight = torch.zeros(T, E, dtype=x.dtype).scatter(1, chosen, top.softmax(-1))
        h = torch.einsum("td,edf->etf", x, self.weight1.view(E, D, -1))
        gate, up = h.chunk(2, dim=-1)
        y = torch.einsum("etf,efd->etd", F.silu(gate) * up, self.weight2.view(E, -1, D))
        return torch.einsum("te,etd->td", weight, y)


class StackedInPlaceStyle(nn.Module):
    """Weights in our own layout, gate and up interleaved or not."""

    def __init__(self, interleaved: bool = False) -> None:
        super().__init__()
        self.top_k, self.interleaved, self.act = K, interleaved, nn.GELU(approximate="tanh")
        self.router = nn.Linear(D, E, bias=False)
        self.gate_up = nn.Parameter(torch.randn(E, 2 * FF, D) * 0.2)
        self.down = nn.Parameter(torch.randn(E, D, FF) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        weight, chosen = self.router(x).softmax(-1).topk(self.top_k)
        h = torch.einsum("...d,efd->...ef", x, self.gate_up)
        gate, up = (h[..., ::2], h[..., 1::2]) if self.interleaved else h.chunk(2, dim=-1)
        y = torch.einsum("...ef,edf->...ed", self.act(gate) * up, self.down)
        return (y.gather(-2, chosen[..., None].expand(*chosen.shape, D)) * weight[..., None]).sum(-2)


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "mixtral": MixtralStyle,
    "deepseek": SharedStyle,
    "qwen2": GatedSharedStyle,
    "biased": BiasedStyle,
    "torchtitan": TorchtitanStyle,
    "torchtitan_before": lambda: TorchtitanStyle(before=True),
    "torchtitan_square": lambda: TorchtitanStyle(width=D),
    "olmo_core": OlmoCoreStyle,
    "megatron": MegatronStyle,
    "stacked": StackedInPlaceStyle,
    "interleaved": lambda: StackedInPlaceStyle(interleaved=True),
}
