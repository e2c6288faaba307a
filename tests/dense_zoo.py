"""Tiny dense models of every family that ``moepass upcycle`` takes, some without a host, as their users save them."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()

V, S = 64, 24
_COMMON: dict[str, Any] = {
    "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_HYBRID = ["linear_attention", "full_attention"]
_WINDOWS = ["sliding_attention", "full_attention"]
_OWN: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 5},
    "qwen3": {"head_dim": 16},
    "cohere2": {"layer_types": _WINDOWS, "sliding_window": 5, "logit_scale": 1.0},
    "ernie4_5": {"head_dim": 16},
    "seed_oss": {"head_dim": 16, "residual_dropout": 0.0, "attention_dropout": 0.0},
    "internlm3": {"head_dim": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "granite": {"embedding_multiplier": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3,
                "logits_scaling": 3.0},
    "gpt2": {"n_inner": 48},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gemma3_text": {"head_dim": 8, "sliding_window": 5},
    "qwen3_5_text": {"head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
                     "linear_value_head_dim": 8, "layer_types": _HYBRID},
}  # fmt: skip


def build(model_type: str, dtype: torch.dtype = torch.float32, **config: Any) -> nn.Module:
    """A model whose weights are all far from their initial values: no norm is one, no bias zero."""
    settings = CONFIG_MAPPING[model_type](**{**_COMMON, **_OWN.get(model_type, {}), **config})
    model = AutoModelForCausalLM.from_config(settings)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=draw)
            if p.dim() >= 2:
                p.copy_(noise / p.shape[-1] ** 0.5)
            else:
                p.add_(noise * (0.3 if "bias" in name else 0.1))
    return model.to(dtype).eval()


def save(folder: Path, model_type: str, **config: Any) -> Path:
    """``build``, saved."""
    build(model_type, **config).save_pretrained(folder)  # type: ignore[operator]
    return folder


@functools.cache
def saved(model_type: str, **config: Any) -> Path:
    """``save``, once per process, into a folder that nobody may change.  Values of ``config`` must be hashable."""
    folder = Path(tempfile.mkdtemp(prefix="moepass-dense-")) / "src"
    return save(folder, model_type, **config)


def load(folder: Path) -> nn.Module:
    """As stock transformers loads it, in float32; no tensor may be missing or left over."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    """``[2, S, V]`` on fixed random tokens, longer than every window."""
    ids = torch.randint(V, (2, S), generator=torch.Generator().manual_seed(2))
    return model(ids, use_cache=False).logits


@functools.cache
def dense_logits(folder: Path) -> Tensor:
    """``logits`` of the model in the folder."""
    return logits(load(folder))


def error(src: Path, dst: Path) -> float:
    """Largest |logit difference| relative to the largest |logit|."""
    expected = dense_logits(src)
    return float((logits(load(dst)) - expected).abs().max() / expected.abs().max())


def add_tokenizer(folder: Path, words: int = V) -> None:
    """Word ``w7`` is token 7."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({f"w{i}": i for i in range(words)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(folder)
