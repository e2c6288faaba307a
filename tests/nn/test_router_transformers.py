"""``nn.Router`` decides what transformers' own routers decide, with their gradients."""

from __future__ import annotations

import pytest
import torch

from moepass.spec import RouterSpec
from tests.nn.routers import D, E, K, T, router_of, tokens


def deepseek_v3(kind="DeepseekV3", module="deepseek_v3", **changes):
    from transformers import models

    modeling = getattr(getattr(models, module), f"modeling_{module}")
    config = getattr(modeling, f"{kind}Config")(
        hidden_size=D, n_routed_experts=E, num_experts_per_tok=K, n_group=4, topk_group=2, norm_topk_prob=True,
        routed_scaling_factor=2.5, **changes,
    )  # fmt: skip
    theirs = next(getattr(modeling, name) for name in dir(modeling) if name.endswith(("TopkRouter",)))(config)
    spec = RouterSpec(
        top_k=K, score="sigmoid", bias=True, groups=4, kept_groups=2, normalize_eps=1e-20, scale=2.5,
        normalize=1.0,
    )  # fmt: skip
    return theirs, spec, theirs.e_score_correction_bias


def deepseek_v2():
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Config, DeepseekV2TopkRouter

    config = DeepseekV2Config(
        hidden_size=D, n_routed_experts=E, num_experts_per_tok=K, n_group=4, topk_group=2,
        topk_method="group_limited_greedy", routed_scaling_factor=2.5, num_attention_heads=1, num_key_value_heads=1,
    )  # fmt: skip
    spec = RouterSpec(top_k=K, normalize=None, groups=4, kept_groups=2, group_score="max", scale=2.5)
    return DeepseekV2TopkRouter(config), spec, None


def deepseek_v4():
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Config, DeepseekV4TopKRouter

    config = DeepseekV4Config(hidden_size=D, n_routed_experts=E, num_experts_per_tok=K, routed_scaling_factor=1.5)
    assert config.scoring_func == "sqrtsoftplus"
    theirs = DeepseekV4TopKRouter(config)
    spec = RouterSpec(top_k=K, score="sqrtsoftplus", bias=True, normalize_eps=1e-20, scale=1.5)
    return theirs, spec, theirs.e_score_correction_bias


def ernie():
    from transformers.models.ernie4_5_moe.modeling_ernie4_5_moe import Ernie4_5_MoeConfig, Ernie4_5_MoeTopKRouter

    theirs = Ernie4_5_MoeTopKRouter(Ernie4_5_MoeConfig(hidden_size=D, moe_num_experts=E, moe_k=K))
    # Its clamp of the sum at 1e-12 is no epsilon; it acts only where less than that of the softmax is chosen.
    return theirs, RouterSpec(top_k=K, bias=True), theirs.moe_statics.e_score_correction_bias


def gpt_oss():
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssTopKRouter

    theirs = GptOssTopKRouter(GptOssConfig(hidden_size=D, num_local_experts=E, num_experts_per_tok=K))
    return theirs, RouterSpec(top_k=K, score_first=False, normalize=None, linear_bias=True), None


def simple(module, kind, spec, **names):
    from transformers import models

    modeling = getattr(getattr(models, module), f"modeling_{module}")
    config = getattr(modeling, f"{kind}Config")(hidden_size=D, num_experts_per_tok=K, **names)
    return getattr(modeling, f"{kind}TopKRouter")(config), spec, None


ROUTERS = {
    "deepseek_v3": deepseek_v3,
    "glm4_moe": lambda: deepseek_v3("Glm4Moe", "glm4_moe"),
    "deepseek_v2": deepseek_v2,
    "deepseek_v4": deepseek_v4,
    "ernie4_5_moe": ernie,
    "gpt_oss": gpt_oss,
    "mixtral": lambda: simple("mixtral", "Mixtral", RouterSpec(top_k=K), num_local_experts=E),
    "olmoe": lambda: simple("olmoe", "Olmoe", RouterSpec(top_k=K, normalize=None), num_experts=E),
    "granitemoe": lambda: simple(
        "granitemoe", "GraniteMoe", RouterSpec(top_k=K, score_first=False, normalize=None), num_local_experts=E
    ),
}


@pytest.mark.parametrize("family", ROUTERS)
def test_decides_what_transformers_decides_with_its_gradients(family):
    theirs, spec, correction = ROUTERS[family]()
    ours = router_of(spec, dtype=torch.float32)
    with torch.no_grad():
        theirs.weight.copy_(ours.weight)
        if correction is not None:
            correction.copy_(ours.bias.view_as(correction))
        if spec.linear_bias:
            theirs.bias.copy_(ours.linear_bias)
    x, x_theirs = (tokens(T, D, dtype=torch.float32).requires_grad_() for _ in range(2))
    logits, weight, index = theirs(x_theirs)
    out = ours(x)
    torch.testing.assert_close(out.logits_TE, logits)
    torch.testing.assert_close(by_expert(out.index_TK, out.weight_TK), by_expert(index, weight))
    direction = tokens(T, E, dtype=torch.float32, seed=2)
    (by_expert(index, weight) * direction).sum().backward()
    (by_expert(out.index_TK, out.weight_TK) * direction).sum().backward()
    torch.testing.assert_close(x.grad, x_theirs.grad)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-5, atol=1e-5)


def by_expert(index, weight):
    return torch.zeros(index.shape[0], E).scatter(1, index, weight.float())


def test_decides_what_llama4_decides():
    from transformers.models.llama4.modeling_llama4 import Llama4Router, Llama4TextConfig

    theirs = Llama4Router(Llama4TextConfig(hidden_size=D, num_local_experts=E, num_experts_per_tok=1))
    spec = RouterSpec(top_k=1, score="sigmoid", normalize=None, weight_on="input")
    ours = router_of(spec, dtype=torch.float32)
    with torch.no_grad():
        theirs.weight.copy_(ours.weight)
    scores, _ = theirs(tokens(T, D, dtype=torch.float32))  # [T, E], 0 outside the top k
    out = ours(tokens(T, D, dtype=torch.float32))
    torch.testing.assert_close(by_expert(out.index_TK, out.weight_TK), scores)
