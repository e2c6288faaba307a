"""The definition: routing as transformers routes, and the MoE as a loop over tokens anybody can check by eye."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moepass import reference
from moepass.reference import ExpertWeights, Routing
from moepass.spec import DispatchSpec, ExpertSpec, MoESpec, RouterSpec

T, D, E, K, WIDTH = 17, 6, 8, 3, 5
SMALL = {"hidden_size": D, "intermediate_size": WIDTH, "num_attention_heads": 1, "num_key_value_heads": 1}


def _mixtral() -> tuple[Any, RouterSpec]:
    from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralTopKRouter

    config = MixtralConfig(num_local_experts=E, num_experts_per_tok=K, **SMALL)
    return MixtralTopKRouter(config), RouterSpec(top_k=K)


def _qwen2_moe(norm: bool) -> tuple[Any, RouterSpec]:
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeConfig, Qwen2MoeTopKRouter

    config = Qwen2MoeConfig(num_experts=E, num_experts_per_tok=K, norm_topk_prob=norm, **SMALL)
    return Qwen2MoeTopKRouter(config), RouterSpec(top_k=K, normalize=1.0 if norm else None)


def _olmoe(norm: bool) -> tuple[Any, RouterSpec]:
    from transformers.models.olmoe.modeling_olmoe import OlmoeConfig, OlmoeTopKRouter

    config = OlmoeConfig(num_experts=E, num_experts_per_tok=K, norm_topk_prob=norm, **SMALL)
    return OlmoeTopKRouter(config), RouterSpec(top_k=K, normalize=1.0 if norm else None)


def _gpt_oss() -> tuple[Any, RouterSpec]:
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssTopKRouter

    config = GptOssConfig(num_local_experts=E, num_experts_per_tok=K, **SMALL)
    return GptOssTopKRouter(config), RouterSpec(top_k=K, score_first=False, normalize=None)


def _granite_moe() -> tuple[Any, RouterSpec]:
    from transformers.models.granitemoe.modeling_granitemoe import GraniteMoeConfig, GraniteMoeTopKRouter

    config = GraniteMoeConfig(num_local_experts=E, num_experts_per_tok=K, **SMALL)
    return GraniteMoeTopKRouter(config), RouterSpec(top_k=K, score_first=False, normalize=None)


def _deepseek_v3() -> tuple[Any, RouterSpec]:
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Config, DeepseekV3TopkRouter

    config = DeepseekV3Config(
        n_routed_experts=E,
        num_experts_per_tok=K,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        **SMALL,
    )
    return DeepseekV3TopkRouter(config), RouterSpec(top_k=K, score="sigmoid", scale=2.5)


ROUTERS = {
    "mixtral": _mixtral,
    "qwen2_moe, normalised": lambda: _qwen2_moe(True),
    "qwen2_moe": lambda: _qwen2_moe(False),
    "olmoe": lambda: _olmoe(False),
    "olmoe, normalised": lambda: _olmoe(True),
    "gpt_oss": _gpt_oss,
    "granitemoe": _granite_moe,
    "deepseek_v3, one group": _deepseek_v3,
}


@pytest.mark.parametrize("name", ROUTERS)
def test_routing_is_that_of_transformers(name):
    torch.manual_seed(0)
    router, spec = ROUTERS[name]()
    torch.nn.init.normal_(router.weight)
    logits_TE, weight_TK, index_TK = router(torch.randn(T, D))
    ours = reference.route(logits_TE, spec)
    assert ours.weight_TK.dtype == torch.float32
    torch.testing.assert_close(_dense(ours), _dense(Routing(index_TK, weight_TK)))
    assert (ours.weight_TK.diff(dim=-1) <= 0).all(), "best first"


def _dense(routing: Routing) -> Tensor:
    """``[T, E]``: each expert's weight, whatever the order of the K choices."""
    return torch.zeros(routing.index_TK.shape[0], E).scatter(1, routing.index_TK, routing.weight_TK.float())


def test_ties_go_to_the_lower_expert():
    routing = reference.route(torch.tensor([[1.0, 2.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0]]), RouterSpec(top_k=3))
    assert routing.index_TK.tolist() == [[1, 2, 0], [0, 1, 2]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_logits_are_routed_in_float32(dtype):
    logits = torch.randn(T, E).to(dtype)
    routing = reference.route(logits, RouterSpec(top_k=2))
    assert routing.weight_TK.dtype == torch.float32
    torch.testing.assert_close(routing.weight_TK, reference.route(logits.float(), RouterSpec(top_k=2)).weight_TK)


def test_an_l2_norm_makes_unit_vectors():
    routing = reference.route(torch.randn(T, E), RouterSpec(top_k=2, normalize=2.0, scale=3.0))
    torch.testing.assert_close(routing.weight_TK.norm(dim=-1), torch.full((T,), 3.0))


def make(spec: MoESpec, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, ExpertWeights]:
    """x, router logits and weights of a spec."""
    g = torch.Generator().manual_seed(seed)
    n = spec.experts.n_projections

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()

    weights = ExpertWeights(
        draw(E, n * WIDTH, D),
        draw(E, D, WIDTH),
        draw(E, n * WIDTH) if spec.experts.bias_in else None,
        draw(E, D) if spec.experts.bias_out else None,
    )
    return draw(T, D), draw(T, E), weights


def by_hand(x: Tensor, logits: Tensor, weights: ExpertWeights, top_k: int, keep: Tensor | None = None) -> Tensor:
    """softmax -> top k -> renormalise -> swiglu experts, token by token."""
    rows = []
    for t in range(x.shape[0]):
        p = torch.softmax(logits[t], 0)
        chosen = sorted(range(E), key=lambda e: -p[e].item())[:top_k]
        total = sum(p[e] for e in chosen)
        y = torch.zeros(D, dtype=x.dtype)
        for k, e in enumerate(chosen):
            if keep is not None and not keep[t, k]:
                continue
            h = weights.w_in[e] @ x[t] + (0 if weights.b_in is None else weights.b_in[e])
            h = F.silu(h[:WIDTH]) * h[WIDTH:]
            y = y + p[e] / total * (weights.w_out[e] @ h + (0 if weights.b_out is None else weights.b_out[e]))
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("top_k", [2, 3, E])
def test_moe_is_the_loop_over_tokens_with_its_gradients(top_k, bias):
    spec = MoESpec(
        router=RouterSpec(top_k=top_k),
        experts=ExpertSpec(num_experts=E, activation="swiglu", bias_in=bias, bias_out=bias),
    )
    x, logits, weights = make(spec)
    leaves = [x, logits, *(w for w in weights if w is not None)]
    ours, theirs = reference.moe(x, logits, weights, spec), by_hand(x, logits, weights, top_k)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    direction = torch.randn(T, D, dtype=torch.float64)
    ours_grads = torch.autograd.grad((ours * direction).sum(), leaves)
    theirs_grads = torch.autograd.grad((theirs * direction).sum(), leaves)
    for one, other in zip(ours_grads, theirs_grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_moe_is_transformers_mixtral_block():
    from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralSparseMoeBlock

    torch.manual_seed(0)
    config = MixtralConfig(num_local_experts=E, num_experts_per_tok=2, experts_implementation="eager", **SMALL)
    block = MixtralSparseMoeBlock(config).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, T, D, dtype=torch.float64)
    spec = MoESpec(router=RouterSpec(top_k=2), experts=ExpertSpec(num_experts=E, activation="swiglu"))
    weights = ExpertWeights(block.experts.gate_up_proj, block.experts.down_proj)
    ours = reference.moe(x, F.linear(x, block.gate.weight), weights, spec)
    assert ours.shape == x.shape
    torch.testing.assert_close(ours, block(x), rtol=1e-5, atol=1e-5)  # transformers routes in float32


def test_expert_without_tokens_gets_zero_gradient():
    spec = MoESpec(router=RouterSpec(top_k=2), experts=ExpertSpec(num_experts=E, activation="gelu", bias_in=True))
    x, logits, weights = make(spec)
    logits = (logits + torch.tensor([0.0] * (E - 1) + [-1e9])).detach()
    assert weights.b_in is not None
    grads = torch.autograd.grad(
        reference.moe(x, logits, weights, spec).sum(), [weights.w_in, weights.w_out, weights.b_in]
    )
    for grad in grads:
        assert (grad[-1] == 0).all()
        assert grad.abs().sum() > 0


def test_half_precision_is_summed_in_float32_and_returned_in_its_own_dtype():
    spec = MoESpec(router=RouterSpec(top_k=E), experts=ExpertSpec(num_experts=E, activation="g"))
    x, logits, weights = make(spec, torch.bfloat16)
    rows = torch.stack(
        [F.linear(F.linear(x, i), o).float() for i, o in zip(weights.w_in, weights.w_out, strict=True)], 1
    )
    wanted = (torch.softmax(logits.float(), -1)[..., None] * rows).sum(1)
    ours = reference.moe(x, logits, weights, spec)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours, wanted.bfloat16(), rtol=2**-7, atol=2**-7)


INDEX = torch.tensor([[0, 1], [0, 2], [0, 1], [1, 0]])
WEIGHT = torch.tensor([[0.6, 0.4], [0.9, 0.1], [0.7, 0.3], [0.5, 0.5]])


def test_without_capacity_everything_is_kept():
    assert reference.keep_mask(Routing(INDEX, WEIGHT), 4, DispatchSpec()).all()


def test_position_keeps_the_first_tokens_of_an_expert():
    keep = reference.keep_mask(Routing(INDEX, WEIGHT), 4, DispatchSpec(capacity_factor=1.0))  # C = 2
    assert keep.tolist() == [[True, True], [True, True], [False, True], [False, False]]


def test_probability_keeps_the_highest_weights_and_ties_keep_token_order():
    spec = DispatchSpec(capacity_factor=1.0, drop_policy="probability")
    keep = reference.keep_mask(Routing(INDEX, WEIGHT), 4, spec)
    assert keep.tolist() == [[False, True], [True, True], [True, False], [True, False]]
    even = Routing(INDEX, torch.full_like(WEIGHT, 0.5))
    assert torch.equal(
        reference.keep_mask(even, 4, spec), reference.keep_mask(even, 4, DispatchSpec(capacity_factor=1.0))
    )


@pytest.mark.parametrize("policy", ["position", "probability"])
def test_a_dropped_assignment_adds_nothing_and_the_others_keep_their_weight(policy):
    spec = MoESpec(
        router=RouterSpec(top_k=2),
        experts=ExpertSpec(num_experts=E, activation="swiglu", bias_out=True),
        dispatch=DispatchSpec(capacity_factor=0.5, drop_policy=policy),
    )
    x, logits, weights = make(spec)
    keep = reference.keep_mask(reference.route(logits, spec.router), E, spec.dispatch)
    assert 0 < keep.sum() < keep.numel()
    torch.testing.assert_close(
        reference.moe(x, logits, weights, spec), by_hand(x, logits, weights, 2, keep), rtol=1e-12, atol=1e-12
    )


def test_leading_dimensions_are_kept_and_no_tokens_is_fine():
    spec = MoESpec(router=RouterSpec(top_k=2), experts=ExpertSpec(num_experts=E, activation="swiglu"))
    x, logits, weights = make(spec)
    whole = reference.moe(x, logits, weights, spec)
    shaped = reference.moe(x[:16].view(2, 2, 4, D), logits[:16].view(2, 2, 4, E), weights, spec)
    torch.testing.assert_close(shaped.view(16, D), whole[:16])
    assert reference.moe(x[:0], logits[:0], weights, spec).shape == (0, D)


def test_a_spec_without_activation_is_refused():
    spec = MoESpec(router=RouterSpec(top_k=2), experts=ExpertSpec(num_experts=E, activation="swiglu"))
    x, logits, weights = make(spec)
    with pytest.raises(ValueError, match="no activation"):
        reference.moe(x, logits, weights, MoESpec(experts=ExpertSpec(num_experts=E)))
