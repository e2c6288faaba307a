"""Parameters and FLOPs against hand counts, the modules' own tensors, and transformers' models."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM, OlmoeConfig, OlmoeForCausalLM

from moepass import errors
from moepass.nn import MoE, count
from moepass.nn.counting import moe_counts
from moepass.spec import DispatchSpec, ExpertSpec, MoESpec, RouterSpec

D, F, E, K = 8, 12, 4, 2


def spec_of(router=None, dispatch=None, **experts):
    experts = ExpertSpec(num_experts=E, intermediate_size=F, activation="swiglu", **experts)
    return MoESpec(router=router or RouterSpec(top_k=K), experts=experts, dispatch=dispatch or DispatchSpec())


def test_hand_count_of_a_plain_block():
    moe = MoE(D, spec_of())
    assert moe.num_params == E * D + E * 3 * D * F
    assert moe.num_active_params == E * D + K * 3 * D * F
    assert moe.flops_per_token() == 6 * moe.num_active_params  # no bias: every active parameter is multiplied
    assert moe.flops_per_token(seq_len=4096, backward=False) == 2 * moe.num_active_params


def test_hand_count_with_everything():
    L, S = 4, 6
    router = RouterSpec(top_k=K, linear_bias=True, bias=True)
    moe = MoE(D, spec_of(router, bias_in=True, bias_out=True, output_scale=True, latent_size=L,
                         shared_intermediate_size=S, shared_combine="gated"))  # fmt: skip
    expert, extras = 3 * L * F, 2 * F + L + 1
    dense = E * D + 3 * D * S + D + 2 * D * L
    assert moe.num_params == E * (expert + extras) + dense + E
    assert moe.num_active_params == K * (expert + extras) + dense + E
    assert moe.flops_per_token() == 6 * (K * expert + dense)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias_in": True},
        {"bias_out": True, "output_scale": True},
        {"latent_size": 4},
        {"shared_intermediate_size": 6, "shared_combine": "mixed"},
        {"shared_intermediate_size": 6, "shared_combine": "gated", "latent_size": 4},
    ],
)
def test_counts_from_the_spec_are_those_of_the_tensors(options):
    spec = spec_of(RouterSpec(top_k=K, linear_bias=True), **options)
    moe = MoE(D, spec, device="meta")
    assert moe_counts(D, spec).num_params == sum(p.numel() for p in moe.parameters())


def test_experts_that_choose_are_active_by_their_capacity():
    router = RouterSpec(top_k=K, choice="expert", normalize=None)
    twice = spec_of(router, DispatchSpec(capacity_factor=1.5))
    assert moe_counts(D, twice).num_active_params == E * D + 3 * 3 * D * F  # 1.5 * K experts a token
    everything = spec_of(router, DispatchSpec(capacity_factor=9.0))
    assert moe_counts(D, everything).num_active_params == moe_counts(D, everything).num_params


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(11, D), nn.LayerNorm(D)
        self.q_proj, self.o_proj = nn.Linear(D, 6), nn.Linear(6, D, bias=False)
        self.moe, self.head = MoE(D, spec_of()), nn.Linear(D, 11, bias=False)
        self.head.weight = self.embed.weight


def test_hand_count_of_a_model_with_a_tied_head():
    model = Model()
    counts, moe = count(model), model.moe
    dense = 11 * D + 2 * D + (D * 6 + 6) + 6 * D
    assert counts.num_params == dense + moe.num_params
    assert counts.num_active_params == dense + moe.num_active_params
    assert counts.num_embedding_params == 11 * D
    assert counts.num_non_embedding_params == counts.num_params - 11 * D
    products = D * 6 + 6 * D + 11 * D + moe.num_active_params
    assert counts.flops_per_token() == 6 * products
    assert counts.flops_per_token(seq_len=100) == 6 * products + 12 * 100 * 6  # OLMo-core's 12 * width * S


SMALL = {
    "vocab_size": 32, "hidden_size": D, "intermediate_size": F, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "num_experts_per_tok": K,
}  # fmt: skip
FAMILIES = {
    "olmoe": (OlmoeForCausalLM, OlmoeConfig, "num_experts"),
    "mixtral": (MixtralForCausalLM, MixtralConfig, "num_local_experts"),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_totals_of_transformers_models(family, tied):
    cls, config, name = FAMILIES[family]
    with torch.device("meta"):
        model = cls(config(**SMALL, **{name: E}, tie_word_embeddings=tied))
    counts = count(model)
    assert counts.num_params == model.num_parameters()
    assert counts.num_non_embedding_params == model.num_parameters(exclude_embeddings=True)
    expert = 3 * D * F
    assert counts.num_params - counts.num_active_params == 2 * (E - K) * expert
    attention = D * D + 2 * D * (D // 2) + D * D
    assert counts.flops_per_token(backward=False) == 2 * (2 * (attention + E * D + K * expert) + 32 * D)
    assert counts.flops_per_token(10) - counts.flops_per_token() == 12 * 10 * 2 * D
    assert count(model, top_k=1).num_active_params == counts.num_active_params - 2 * expert


def test_stacked_experts_without_a_known_k_are_refused():
    model = nn.Module()
    model.num_experts, model.w1 = E, nn.Parameter(torch.empty(E, D, F))
    with pytest.raises(errors.UnknownTopK, match="top_k="):
        count(model)
    assert count(model, top_k=K).num_active_params == K * D * F
