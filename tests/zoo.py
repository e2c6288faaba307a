"""Tiny random models, one per supported family: two layers, D=64, F=128, vocabulary 128, evaluation mode.

    zoo = build("llama");  zoo.model(**zoo.inputs(7))

``inputs(T, batch=1)`` gives T tokens a sequence (T patches, or what comes near, for vit).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

D, FF, LAYERS, VOCAB, MAX_T = 64, 128, 2, 128, 1024


@dataclass(frozen=True)
class ZooModel:
    """A model, its inputs by token count, and what the recogniser must find in it."""

    model: nn.Module
    inputs: Callable[..., dict[str, Any]]
    program: str
    sites: int


class HandWritten(nn.Module):
    """A plain module that owes nothing to transformers: pre-norm residual blocks with a gelu FFN."""

    def __init__(self, layers: int = LAYERS) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, D)
        self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in range(layers))
        self.rise = nn.ModuleList(nn.Linear(D, FF) for _ in range(layers))
        self.fall = nn.ModuleList(nn.Linear(FF, D) for _ in range(layers))
        self.head = nn.Linear(D, VOCAB, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        h = self.embed(input_ids)
        for norm, rise, fall in zip(self.norms, self.rise, self.fall, strict=True):
            h = h + fall(F.gelu(rise(norm(h))))
        return self.head(h)


@dataclass(frozen=True)
class Family:
    """How one family is built: ``make(layers)``; ``sites`` a layer."""

    make: Callable[..., nn.Module]
    program: str
    sites: int = 1
    kind: str = "decoder"


_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": D,
    "intermediate_size": FF,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_T,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GQA: dict[str, Any] = {**_COMMON, "num_key_value_heads": 2, "head_dim": 16}


def _hf(model: str, config: str, settings: dict[str, Any]) -> Callable[..., nn.Module]:
    def make(layers: int = LAYERS) -> nn.Module:
        depth = {key: layers for key in ("num_hidden_layers", "num_layers", "n_layer") if key in settings}
        return getattr(transformers, model)(getattr(transformers, config)(**settings | depth))

    return make


def _t5(projection: str) -> Callable[..., nn.Module]:
    return _hf("T5ForConditionalGeneration", "T5Config", {
        "vocab_size": VOCAB, "d_model": D, "d_ff": FF, "d_kv": 16, "num_layers": LAYERS, "num_heads": 4,
        "feed_forward_proj": projection, "pad_token_id": 0, "decoder_start_token_id": 0,
    })  # fmt: skip


def _causal(name: str, program: str, settings: dict[str, Any]) -> Family:
    return Family(_hf(f"{name}ForCausalLM", f"{name}Config", settings), program)


_MHA = {key: item for key, item in _GQA.items() if key != "head_dim"}
_SWIGLU, _GEGLU = "silu(g)*u", "gelu_tanh(g)*u"

FAMILIES: dict[str, Family] = {
    "llama": _causal("Llama", _SWIGLU, _GQA),
    "mistral": _causal("Mistral", _SWIGLU, _GQA),
    "qwen2": _causal("Qwen2", _SWIGLU, _MHA),
    "qwen3": _causal("Qwen3", _SWIGLU, _GQA),
    "olmo2": _causal("Olmo2", _SWIGLU, _MHA),
    "olmo3": _causal("Olmo3", _SWIGLU, _MHA),
    "granite": _causal("Granite", _SWIGLU, _MHA),
    "phi3": _causal("Phi3", _SWIGLU, _MHA),
    "gemma2": _causal("Gemma2", _GEGLU, _GQA),
    "gemma3": Family(_hf("Gemma3ForCausalLM", "Gemma3TextConfig", _GQA), _GEGLU),
    "gpt2": Family(
        _hf("GPT2LMHeadModel", "GPT2Config", {
            "vocab_size": VOCAB, "n_embd": D, "n_inner": FF, "n_layer": LAYERS, "n_head": 4, "n_positions": MAX_T,
            "bos_token_id": 1, "eos_token_id": 2,
        }),
        "gelu_tanh(g)",
    ),
    "gpt_neox": _causal("GPTNeoX", "gelu(g)", _COMMON),
    "opt": Family(
        _hf("OPTForCausalLM", "OPTConfig", {
            "vocab_size": VOCAB, "hidden_size": D, "ffn_dim": FF, "num_hidden_layers": LAYERS,
            "num_attention_heads": 4, "word_embed_proj_dim": D, "max_position_embeddings": MAX_T, "pad_token_id": 1,
        }),
        "relu(g)",
    ),
    "nemotron": _causal("Nemotron", "relu(g)**2", _MHA),
    "starcoder2": _causal("Starcoder2", "gelu_tanh(g)", _MHA),
    "bert": Family(_hf("BertModel", "BertConfig", _COMMON), "gelu(g)", kind="encoder"),
    "vit": Family(
        _hf("ViTModel", "ViTConfig", {
            "hidden_size": D, "intermediate_size": FF, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
            "image_size": 8, "patch_size": 4,
        }),
        "gelu(g)",
        kind="image",
    ),
    "t5": Family(_t5("relu"), "relu(g)", 2, "seq2seq"),
    "t5_gated": Family(_t5("gated-gelu"), _GEGLU, 2, "seq2seq"),
    "hand_written": Family(HandWritten, "gelu(g)"),
}  # fmt: skip


def build(name: str, seed: int = 0, layers: int = LAYERS) -> ZooModel:
    """The model of a family in evaluation mode; the same seed gives the same weights and inputs."""
    family = FAMILIES[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = family.make(layers).eval()

    def inputs(T: int, batch: int = 1) -> dict[str, Any]:
        return _inputs(family.kind, T, batch, seed)

    return ZooModel(model, inputs, family.program, family.sites * layers)


def _inputs(kind: str, T: int, batch: int, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed + T)
    if kind == "image":
        side = max(1, round(T**0.5)) * 4
        pixels = torch.randn(batch, 3, side, side, generator=generator)
        return {"pixel_values": pixels, "interpolate_pos_encoding": True}
    ids = torch.randint(3, VOCAB, (batch, T), generator=generator)
    if kind == "seq2seq":
        return {"input_ids": ids, "decoder_input_ids": torch.randint(3, VOCAB, (batch, T), generator=generator)}
    return {"input_ids": ids}
