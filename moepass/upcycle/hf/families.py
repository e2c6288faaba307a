"""Dense families: what a resolved config asks of a MoE host, as a set of features.

A feature is something that the host must also have for the function to stay the same: a bias, a window, a norm.  It
carries the field that caused it, so that a refusal can name it.
Source: the modeling files of transformers 5.23, and ``reference/upcycling.md`` section 2.1 (measured).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

#: Feature -> what it is, for messages.
FEATURES = {
    "qkv_bias": "biases on the q, k and v projections",
    "o_bias": "a bias on the attention's output projection",
    "mlp_bias": "biases in the feed-forward block, which no per-expert layout of transformers can hold",
    "window": "a sliding window in every layer",
    "mixed_windows": "a sliding window in some layers only",
    "partial_rotary": "rotary embeddings on a part of each head",
    "rope_scaling": "this kind of position scaling",
    "head_norm": "norms on the heads of q and k",
    "late_head_norm": "norms on the heads of q and k after the rotary embedding",
    "wide_norm": "norms on q and k across heads, and norms after the blocks",
    "interleaved_rope": "rotary embeddings on interleaved pairs",
    "multipliers": "multipliers on embeddings, residuals, attention and logits",
    "parallel_block": "attention and feed-forward side by side under one LayerNorm",
    "linear_attention": "layers of linear attention",
}


@dataclass(frozen=True)
class Feature:
    """``name`` (a key of ``FEATURES``), and the field of the source's config that brings it with its value."""

    name: str
    field: str
    value: object


@dataclass(frozen=True)
class Family:
    """A dense ``model_type``.

    ``hosts``    MoE model types that may take it, the default first; ``match`` decides on the config
    ``always``   features of every model of the family, whatever its config says
    ``fused``    q, k, v and gate, up are one matrix each on disk
    ``ignored``  config fields without influence on the function in evaluation mode, which no host has
    ``training`` config fields that act in training only and that no host has: dropped with a warning if not zero
    """

    model_type: str
    hosts: tuple[str, ...]
    always: tuple[str, ...] = ()
    fused: bool = False
    ignored: frozenset[str] = frozenset()
    training: frozenset[str] = frozenset()
    find: Callable[[Any], Iterator[Feature]] | None = None

    def features(self, config: Any) -> list[Feature]:
        """All features of a model with this resolved config."""
        found = [Feature(name, "model_type", self.model_type) for name in self.always]
        return [*found, *_common(config), *(() if self.find is None else self.find(config))]


def rope(config: Any) -> dict[str, Any]:
    """The resolved rotary parameters, a copy."""
    return dict(getattr(config, "rope_parameters", None) or {})


def _common(config: Any) -> Iterator[Feature]:
    """What the same field means in every family."""
    parameters = rope(config)
    factor = parameters.get("partial_rotary_factor", 1.0)
    if factor not in (None, 1.0):
        yield Feature("partial_rotary", "rope_parameters.partial_rotary_factor", factor)
    if parameters.get("rope_type", "default") not in {"default", "linear", "dynamic", "llama3", "yarn", "longrope"}:
        yield Feature("rope_scaling", "rope_parameters.rope_type", parameters["rope_type"])
    if parameters.get("alpha"):
        yield Feature("rope_scaling", "rope_parameters.alpha", parameters["alpha"])
    if getattr(config, "mlp_bias", False):
        yield Feature("mlp_bias", "mlp_bias", True)


def _all_biases(config: Any) -> Iterator[Feature]:
    """``attention_bias`` puts one on each of the four projections."""
    if config.attention_bias:
        yield Feature("qkv_bias", "attention_bias", True)
        yield Feature("o_bias", "attention_bias", True)


def _window(config: Any) -> Iterator[Feature]:
    """One window for all layers."""
    if config.sliding_window is not None:
        yield Feature("window", "sliding_window", config.sliding_window)


def _layer_windows(config: Any) -> Iterator[Feature]:
    """Windows by ``layer_types``."""
    if "sliding_attention" in config.layer_types:
        yield Feature("mixed_windows", "layer_types", "sliding_attention")


def _qwen2(config: Any) -> Iterator[Feature]:
    yield Feature("qkv_bias", "model_type", "qwen2")
    yield from _layer_windows(config)


def _biases_and_windows(config: Any) -> Iterator[Feature]:
    yield from _all_biases(config)
    yield from _layer_windows(config)


def _seed_oss(config: Any) -> Iterator[Feature]:
    if config.attention_bias:
        yield Feature("qkv_bias", "attention_bias", True)
    if config.attention_out_bias:
        yield Feature("o_bias", "attention_out_bias", True)


def _ernie(config: Any) -> Iterator[Feature]:
    if config.use_bias:
        yield Feature("mlp_bias", "use_bias", True)


_FAMILIES = (
    Family("llama", ("mixtral", "granitemoe", "qwen2_moe", "glm4_moe"), ignored=frozenset({"pretraining_tp"}),
           find=_all_biases),
    Family("mistral", ("mixtral", "granitemoe", "qwen2_moe", "glm4_moe"), find=_window),
    Family("phi3", ("mixtral", "glm4_moe"), fused=True, ignored=frozenset({"original_max_position_embeddings"}),
           training=frozenset({"resid_pdrop", "embd_pdrop"}), find=_window),
    Family("internlm3", ("mixtral", "granitemoe", "qwen2_moe", "glm4_moe"), find=_all_biases),
    Family("qwen2", ("qwen2_moe", "glm4_moe"), find=_qwen2),
    Family("qwen3", ("qwen3_moe", "mellum", "glm4_moe"), always=("head_norm",), find=_biases_and_windows),
    Family("seed_oss", ("qwen2_moe", "glm4_moe", "mixtral"), ignored=frozenset({"pretraining_tp"}),
           training=frozenset({"residual_dropout"}), find=_seed_oss),
    Family("olmo2", ("flex_olmo",), always=("wide_norm",), find=_all_biases),
    Family("granite", ("granitemoe",), always=("multipliers",), find=_all_biases),
    Family("ernie4_5", ("ernie4_5_moe",), always=("interleaved_rope",), find=_ernie),
    Family("cohere2", ("cohere2_moe",), always=("parallel_block",), find=_biases_and_windows),
    Family("hunyuan_v1_dense", ("hunyuan_v1_moe",), always=("late_head_norm",), find=_all_biases),
    Family("qwen3_5_text", ("qwen3_5_moe_text",), always=("linear_attention", "head_norm"), find=_all_biases),
)  # fmt: skip

FAMILIES = {family.model_type: family for family in _FAMILIES}

#: Dense model types whose tensor names fit a MoE of transformers, while the function does not: refused with the reason.
NO_HOST = {
    "smollm3": "its layers without position embeddings (no_rope_layers) have no counterpart in a MoE host",
    "olmo": "its norms have no parameters, those of olmoe do",
    "olmo3": "its sliding windows have no counterpart in flex_olmo",
    "gemma": "its norms, embedding scale and GeGLU belong to no MoE host",
    "gemma2": "its norms and soft-capping belong to no MoE host",
    "gemma3_text": "its norms and windows belong to no MoE host",
    "cohere": "cohere2_moe leaves the rotary embedding out of its global layers",
    "exaone4": "its norms come after the blocks, those of exaone_moe before",
    "glm": "its rotary embedding is interleaved, that of glm4_moe is not",
    "glm4": "its sandwich norms have no counterpart in glm4_moe",
    "ministral": "its windows by layer have no counterpart in mixtral",
    "ministral3": "its attention scaling has no counterpart in mixtral",
    "gpt_neox": "its feed-forward block has no gate",
    "phi": "its feed-forward block has no gate",
    "starcoder2": "its feed-forward block has no gate",
    "gpt2": "its feed-forward block has no gate",
    "opt": "its feed-forward block has no gate",
    "nemotron": "its feed-forward block has no gate",
    "stablelm": "its LayerNorms have no counterpart in a MoE host",
}
