"""Parameters and FLOPs of an MoE block and of a whole model.

Contract
    ``moe_counts`` needs only the spec; ``count`` walks a model (dense linears, embeddings, ``nn.MoE``, and modules with
    stacked expert weights such as transformers').  Nothing is run and meta devices will do.
    Active parameters are those that one token meets: K of E experts, everything else whole.  Attention's own products
    are counted for ``nn.MultiheadAttention`` and for modules with a linear ``q_proj`` (transformers).
    FLOPs are those of matrix products, two per multiply-add; forward and backward make six per active weight
    (Kaplan et al. 2020; OLMo-core's ``num_flops_per_token``).  Biases, norms, activations and lookups count nothing.

Shapes: D model width, F expert width, E experts, K top-k, n input projections.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from moepass import errors
from moepass.spec import MoESpec


class Counts(NamedTuple):
    """What a block or a model holds and what one token costs.

    ``num_params``            all parameters, shared ones once
    ``num_active_params``     those that one token meets, embeddings included
    ``num_embedding_params``  lookup tables, a tied output projection included: OLMo-core's non-embedding count is the
                              difference
    ``matmul_weights``        active weights that a token is multiplied with
    ``attention_width``       heads times head width, summed over attention layers
    """

    num_params: int
    num_active_params: int
    num_embedding_params: int
    matmul_weights: int
    attention_width: int = 0

    @property
    def num_non_embedding_params(self) -> int:
        """All parameters but lookup tables."""
        return self.num_params - self.num_embedding_params

    def flops_per_token(self, seq_len: int | None = None, *, backward: bool = True) -> int:
        """FLOPs of a token's matrix products: 2 per active weight forward, 6 with the backward.

        ``seq_len`` adds those of attention's scores and values over that many tokens, as OLMo-core counts them: the
        causal mask is not taken off.
        """
        attention = 2 * (seq_len or 0) * self.attention_width
        return (6 if backward else 2) * (self.matmul_weights + attention)


def moe_counts(D: int, spec: MoESpec) -> Counts:
    """Counts of ``nn.MoE(D, spec)``: router, experts, and shared and latent projections where the spec has them."""
    experts, router = spec.experts, spec.router
    F = experts.intermediate_size
    if F is None:
        raise errors.IncompleteSpec(missing="intermediate_size", where="moe_counts")
    E, n, width = experts.num_experts, experts.n_projections, experts.latent_size or D
    matrices = (n + 1) * F * width
    rest = (n * F if experts.bias_in else 0) + (width if experts.bias_out else 0) + int(experts.output_scale)
    shared = (n + 1) * D * (experts.shared_intermediate_size or 0)
    gate = D if shared and experts.shared_combine == "gated" else 0
    latent = 2 * D * (experts.latent_size or 0)
    dense = E * D + shared + gate + latent
    routed = active_experts(spec)
    bias = E if router.linear_bias else 0
    return Counts(
        num_params=E * (matrices + rest) + dense + bias,
        num_active_params=round(routed * (matrices + rest)) + dense + bias,
        num_embedding_params=0,
        matmul_weights=round(routed * matrices) + dense,
    )


def active_experts(spec: MoESpec) -> float:
    """Experts per token: K; with expert choice the mean, which the capacity factor stretches."""
    if spec.router.choice == "expert":
        return min(spec.router.top_k * (spec.dispatch.capacity_factor or 1.0), spec.experts.num_experts)
    return spec.router.top_k


def count(model: nn.Module, *, top_k: int | None = None) -> Counts:
    """Counts of a whole model.

    Expert weights of other libraries are recognised as parameters of three dimensions with ``num_experts`` in front
    (transformers); their K is read from ``top_k`` or ``num_experts_per_tok`` of a module nearby or its config, unless
    ``top_k`` says it.  Raises ``UnknownTopK`` where neither does.
    """
    from moepass.nn.moe import MoE

    embeddings = {id(p): p.numel() for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    total = sum(p.numel() for p in model.parameters())
    idle = 0.0
    weights = 0.0
    blocks = {name: module for name, module in model.named_modules() if isinstance(module, MoE)}
    inside = {id(m) for block in blocks.values() for m in block.modules()}
    for block in blocks.values():
        counts = block.counts()
        idle += counts.num_params - counts.num_active_params
        weights += counts.matmul_weights
    for name, module in model.named_modules():
        if id(module) in inside or isinstance(module, nn.Embedding):
            continue
        for parameter in module.parameters(recurse=False):
            share = _share(model, name, module, parameter, top_k)
            idle += parameter.numel() * (1 - share)
            if parameter.dim() >= 2:
                weights += parameter.numel() * share
    width = sum(_attention_width(module) for module in model.modules())
    return Counts(total, total - round(idle), sum(embeddings.values()), round(weights), width)


def _attention_width(module: nn.Module) -> int:
    """Width of an attention layer's queries; 0 for any other module."""
    if isinstance(module, nn.MultiheadAttention):
        return int(module.embed_dim)
    query = getattr(module, "q_proj", None)
    return query.out_features if isinstance(query, nn.Linear) else 0


def _share(model: nn.Module, name: str, module: nn.Module, parameter: nn.Parameter, top_k: int | None) -> float:
    """The part of a parameter that one token meets: K/E of stacked experts, all of any other."""
    E = getattr(module, "num_experts", None)
    if not isinstance(E, int) or parameter.dim() < 2 or parameter.shape[0] != E or _is_router(parameter, module):
        return 1.0
    K = top_k if top_k is not None else _top_k_near(model, name)
    if K is None:
        raise errors.UnknownTopK(where=name)
    return min(K, E) / E


def _is_router(parameter: nn.Parameter, module: nn.Module) -> bool:
    """A matrix ``[E, D]`` on its own; biases of experts are matrices too, but stand beside their weights."""
    return parameter.dim() == 2 and not any(p.dim() == 3 for p in module.parameters(recurse=False))


def _top_k_near(model: nn.Module, name: str) -> int | None:
    """K by the first of the module, its siblings and its ancestors (with their children) that knows it."""
    for owner in _ancestors(model, name):
        for module in (owner, *owner.children()):
            for source in (module, getattr(module, "config", None)):
                for field in ("top_k", "num_experts_per_tok", "num_experts_per_token"):
                    K = getattr(source, field, None)
                    if isinstance(K, int) and not isinstance(K, bool):
                        return K
    return None


def _ancestors(model: nn.Module, name: str) -> Iterator[nn.Module]:
    parts = name.split(".") if name else []
    for end in range(len(parts), -1, -1):
        yield model.get_submodule(".".join(parts[:end]))
