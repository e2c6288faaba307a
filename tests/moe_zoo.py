"""Tiny random mixture-of-experts models of transformers: two layers, D=32, E=4 to 8, float32, evaluation mode.

    model = build("olmoe", experts="eager");  model(**inputs("olmoe", 7))

The same seed gives the same weights whatever ``experts`` says.  Routers are drawn so that logits have a standard
deviation of about 1 (no near-ties); biases, correction biases and norms are drawn too, so that none hides behind a zero
or a one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

D, FF, EXPERTS, K, LAYERS, VOCAB, MAX_T = 32, 48, 8, 2, 2, 128, 1024


@dataclass(frozen=True)
class Family:
    """``interface``: its experts class has transformers' experts interface, so it takes ``experts=``."""

    model: str
    config: str
    settings: dict[str, Any]
    interface: bool = True


_BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": D,
    "intermediate_size": FF,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_T,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts_per_tok": K,
}
_MLA: dict[str, Any] = {
    **_BASE,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "moe_intermediate_size": FF,
    "first_k_dense_replace": 0,
    "routed_scaling_factor": 1.5,
}


def _causal(name: str, *, config: str | None = None, interface: bool = True, **settings: Any) -> Family:
    return Family(f"{name}ForCausalLM", config or f"{name}Config", {**_BASE, **settings}, interface)


def _mla(name: str, **settings: Any) -> Family:
    return Family(f"{name}ForCausalLM", f"{name}Config", {**_MLA, **settings})


FAMILIES: dict[str, Family] = {
    "olmoe": _causal("Olmoe", num_experts=EXPERTS),
    "mixtral": _causal("Mixtral", num_local_experts=EXPERTS),
    "qwen2_moe": _causal(
        "Qwen2Moe", num_experts=EXPERTS, moe_intermediate_size=FF, shared_expert_intermediate_size=40,
        norm_topk_prob=True,
    ),
    "qwen3_moe": _causal("Qwen3Moe", num_experts=EXPERTS, moe_intermediate_size=FF, head_dim=8, norm_topk_prob=True),
    "granitemoe": _causal("GraniteMoe", num_local_experts=EXPERTS),
    "gpt_oss": _causal("GptOss", num_local_experts=EXPERTS, head_dim=8, sliding_window=64),
    "deepseek_v2": _mla("DeepseekV2", topk_method="group_limited_greedy", num_experts_per_tok=3),
    "deepseek_v3": _mla("DeepseekV3", num_experts_per_tok=3, rope_interleave=True),
    "glm4_moe": _causal(
        "Glm4Moe", n_routed_experts=EXPERTS, n_shared_experts=1, n_group=2, topk_group=1, moe_intermediate_size=FF,
        first_k_dense_replace=0, head_dim=8, routed_scaling_factor=1.5,
    ),
    "flex_olmo": _causal("FlexOlmo", num_experts=EXPERTS),
    "ernie4_5_moe": _causal(
        "Ernie4_5_Moe", moe_num_experts=EXPERTS, moe_k=K, moe_intermediate_size=FF, moe_num_shared_experts=1,
        moe_layer_start_index=0,
    ),
    "llama4_text": _causal(
        "Llama4", config="Llama4TextConfig", num_local_experts=EXPERTS, intermediate_size_mlp=FF, head_dim=8,
        interface=False,
    ),
    "dbrx": Family("DbrxForCausalLM", "DbrxConfig", {
        "vocab_size": VOCAB, "d_model": D, "n_heads": 4, "n_layers": LAYERS, "max_seq_len": MAX_T, "pad_token_id": 0,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": D, "ffn_hidden_size": FF, "moe_num_experts": EXPERTS, "moe_top_k": K},
    }, interface=False),
    "phimoe": _causal("Phimoe", num_local_experts=EXPERTS, router_jitter_noise=0.01, input_jitter_noise=0.0),
    "jetmoe": Family("JetMoeForCausalLM", "JetMoeConfig", {
        **{key: value for key, value in _BASE.items() if key != "num_attention_heads"},
        "kv_channels": 8, "num_local_experts": EXPERTS,
    }, interface=False),
    "minimax": _causal(
        "MiniMax", num_local_experts=EXPERTS, head_dim=8, block_size=16,
        layer_types=["full_attention", "linear_attention"],
    ),
    "hunyuan_v1_moe": _causal("HunYuanMoEV1", num_experts=EXPERTS, moe_topk=K, head_dim=8),
    "gemma4": _causal(
        "Gemma4", config="Gemma4TextConfig", enable_moe_block=True, num_experts=EXPERTS, top_k_experts=K,
        moe_intermediate_size=FF, head_dim=8, global_head_dim=8, hidden_size_per_layer_input=0,
        layer_types=["sliding_attention", "full_attention"], sliding_window=64,
    ),
}  # fmt: skip

#: Families with transformers' experts interface, and those without.
WITH_INTERFACE = [name for name, family in FAMILIES.items() if family.interface]
WITHOUT_INTERFACE = [name for name, family in FAMILIES.items() if not family.interface]


def build(name: str, experts: str = "grouped_mm", *, seed: int = 0, **overrides: Any) -> nn.Module:
    """The model of a family in evaluation mode; ``overrides`` are settings of its config."""
    family = FAMILIES[name]
    settings = {**family.settings, **overrides}
    if family.interface:
        settings["experts_implementation"] = experts
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, family.model)(getattr(transformers, family.config)(**settings))
    _draw(model, seed)
    return model.eval()


def inputs(name: str, T: int, batch: int = 1, *, seed: int = 0) -> dict[str, Any]:
    """``batch`` sequences of T tokens."""
    del name  # all families read token ids alike
    generator = torch.Generator().manual_seed(1000 * seed + T)
    return {"input_ids": torch.randint(3, VOCAB, (batch, T), generator=generator)}


@torch.no_grad()
def _draw(model: nn.Module, seed: int) -> None:
    """Fresh values by role: transformers initialises many of these to zero or one."""
    generator = torch.Generator().manual_seed(seed + 1)
    tensors = [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if "correction" in n)]
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        fresh = torch.randn(tensor.shape, generator=generator)
        if "correction" in name:
            tensor.copy_(0.2 * fresh)
        elif is_router(name) and tensor.dim() == 2:
            tensor.copy_(fresh * tensor.shape[1] ** -0.5)
        elif name.endswith("bias") or "proj_bias" in name:
            tensor.copy_(0.1 * fresh)
        elif tensor.dim() == 1:  # norms and scales
            tensor.copy_(1.0 + 0.1 * fresh)
        else:
            tensor.copy_(fresh * tensor.shape[-1] ** -0.5)


def is_router(name: str) -> bool:
    """Whether a parameter's name says that it makes router logits."""
    parts = name.split(".")
    return any(part in ("gate", "router", "wg") for part in parts) and "experts" not in parts
