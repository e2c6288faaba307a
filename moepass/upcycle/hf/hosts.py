"""MoE hosts of transformers: what each supports, the fields of its config, its names on disk.

Contract
    A ``Host`` is data.  ``fields`` gives every config field that makes the MoE, from a ``Shape``; other fields come
    from the dense config by name, or from ``absent`` where the dense family has no such field (``config`` does that).
    ``router`` is the routing rule in moepass's terms: it decides scales and verdicts.
    Names are those that ``save_pretrained`` writes (per expert), which vLLM, llama.cpp and Megatron converters read.
Source: configuration and modeling files of transformers 5.23; ``reference/upcycling.md`` sections 2.1 to 2.3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from moepass.spec import RouterSpec
from moepass.upcycle.hf.families import Feature, rope


@dataclass(frozen=True)
class Shape:
    """What decides the fields of a host: E experts of width F, top K, and which of L layers become MoE.

    ``shared``: how many neurons stand in a shared expert.
    """

    experts: int
    top_k: int
    width: int
    renormalize: bool
    layers: tuple[int, ...]
    num_layers: int
    config: Any
    features: tuple[Feature, ...]
    shared: int = 0

    def has(self, feature: str) -> bool:
        """Whether the dense model has this feature."""
        return any(f.name == feature for f in self.features)

    @property
    def all_layers(self) -> bool:
        """Whether every layer becomes MoE."""
        return len(self.layers) == self.num_layers

    @property
    def dense_layers(self) -> list[int]:
        """Layers that stay dense."""
        return sorted(set(range(self.num_layers)) - set(self.layers))

    @property
    def kinds(self) -> list[str]:
        """``sparse`` or ``dense`` for each layer."""
        return ["sparse" if i in self.layers else "dense" for i in range(self.num_layers)]


@dataclass(frozen=True)
class Names:
    """Tensor names of one MoE block on disk, after ``model.layers.N.``; ``{e}`` is the expert.

    ``stacked``       gate and up of all experts are one tensor [E, 2F, D], down another [E, D, F]
    ``bias``          name and shape ("E" or "1E") of a selection bias, zero
    ``shared``        prefix of a shared expert's three projections; ``shared_gate``: its gate [1, D]
    """

    router: str = "mlp.gate.weight"
    gate: str = "mlp.experts.{e}.gate_proj.weight"
    up: str = "mlp.experts.{e}.up_proj.weight"
    down: str = "mlp.experts.{e}.down_proj.weight"
    stacked: bool = False
    bias: tuple[str, Literal["E", "1E"]] | None = None
    shared: str | None = None
    shared_gate: str | None = None


#: softmax over all experts, top k, weights that sum to 1.
_EARLY = RouterSpec()


@dataclass(frozen=True)
class Shared:
    """What a host's shared expert is like.  Its names are in ``Names``.

    ``width``     ``any``; ``multiple``: n times the routed experts' width; ``equal``: exactly it
    ``weight``    what its output is multiplied by where its gate, if it has one, is zero
    ``optional``  it is only there if it has neurons; else it is always there, of width 0 or with a zero output
    """

    width: Literal["any", "multiple", "equal"] = "multiple"
    weight: float = 1.0
    optional: bool = False


@dataclass(frozen=True)
class Host:
    """A MoE ``model_type``.

    ``supports``     features of dense models that it shares (``families.FEATURES``)
    ``router``       its rule where weights are renormalised
    ``can_leave``    whether renormalisation can be switched off
    ``absent``       values of fields that a dense family may lack, chosen so that they change nothing
    ``aliases``      further keys for config.json: (new key, field); readers differ in what they look for
    ``head_dim``     whether readers other than transformers know the field
    ``mixed``        which sets of MoE layers it can express; None: only all layers
    ``zero_shared``  the shared expert is mandatory and as wide as the others: its output projection is zero
    ``shared``       its shared expert, if it has one
    ``router_dtype`` dtype of router weights on disk where it is not the model's
    """

    model_type: str
    supports: frozenset[str]
    fields: Callable[[Shape], dict[str, Any]]
    router: RouterSpec = _EARLY
    can_leave: bool = False
    absent: dict[str, Any] = field(default_factory=dict)
    names: Names = Names()
    aliases: tuple[tuple[str, str], ...] = ()
    head_dim: bool = True
    mixed: Callable[[Shape], bool] | None = None
    zero_shared: bool = False
    shared: Shared | None = None
    router_dtype: str | None = None


#: Losses belong to the trainer; written out so that no default of a host decides.
_LOSSES: dict[str, Any] = {"output_router_logits": False, "router_aux_loss_coef": 0.001}


def _mixtral(s: Shape) -> dict[str, Any]:
    return {"num_local_experts": s.experts, "num_experts_per_tok": s.top_k, "intermediate_size": s.width,
            "router_jitter_noise": 0.0, **_LOSSES}  # fmt: skip


def _granitemoe(s: Shape) -> dict[str, Any]:
    made = {"num_local_experts": s.experts, "num_experts_per_tok": s.top_k, "intermediate_size": s.width,
            "attention_bias": s.has("qkv_bias"), **_LOSSES}  # fmt: skip
    if not s.has("multipliers"):
        made["attention_multiplier"] = head_dim(s.config) ** -0.5
    return made


def _qwen2_moe(s: Shape) -> dict[str, Any]:
    return {"num_experts": s.experts, "num_experts_per_tok": s.top_k, "moe_intermediate_size": s.width,
            "shared_expert_intermediate_size": s.shared, "norm_topk_prob": s.renormalize, "decoder_sparse_step": 1,
            "mlp_only_layers": s.dense_layers, "qkv_bias": s.has("qkv_bias"),
            "layer_types": list(s.config.layer_types) if s.has("mixed_windows") else ["full_attention"] * s.num_layers,
            **_LOSSES}  # fmt: skip


def _qwen3_moe(s: Shape) -> dict[str, Any]:
    return {"num_experts": s.experts, "num_experts_per_tok": s.top_k, "moe_intermediate_size": s.width,
            "norm_topk_prob": s.renormalize, "decoder_sparse_step": 1, "mlp_only_layers": s.dense_layers,
            "attention_bias": s.has("qkv_bias"), "use_sliding_window": False, "sliding_window": None,
            **_LOSSES}  # fmt: skip


def _mellum(s: Shape) -> dict[str, Any]:
    kinds = ("full_attention", "sliding_attention")
    return {"num_experts": s.experts, "num_experts_per_tok": s.top_k, "moe_intermediate_size": s.width,
            "norm_topk_prob": s.renormalize, "mlp_layer_types": s.kinds, "attention_bias": s.has("qkv_bias"),
            "rope_parameters": {kind: rope(s.config) for kind in kinds}, "num_mtp_layers": None,
            "mtp_layer_types": None, "mtp_mlp_layer_types": None, **_LOSSES}  # fmt: skip


def _glm4_moe(s: Shape) -> dict[str, Any]:
    first = s.layers[0]
    rotary = {"partial_rotary_factor": 1.0, **rope(s.config)}
    return {"n_routed_experts": s.experts, "num_experts_per_tok": s.top_k, "moe_intermediate_size": s.width,
            "norm_topk_prob": s.renormalize, "routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1,
            "n_shared_experts": s.shared // s.width, "first_k_dense_replace": first, "use_qk_norm": s.has("head_norm"),
            "attention_bias": s.has("qkv_bias"), "rope_parameters": rotary, "num_mtp_layers": 0,
            "output_router_logits": False}  # fmt: skip


def _flex_olmo(s: Shape) -> dict[str, Any]:
    return {"num_experts": s.experts, "num_experts_per_tok": s.top_k, "intermediate_size": s.width,
            "norm_topk_prob": s.renormalize, "attention_bias": s.has("qkv_bias"), **_LOSSES}  # fmt: skip


def _ernie(s: Shape) -> dict[str, Any]:
    return {"moe_num_experts": s.experts, "moe_k": s.top_k, "moe_intermediate_size": s.width,
            "moe_num_shared_experts": s.shared // s.width, "moe_layer_start_index": s.layers[0],
            "moe_layer_end_index": s.layers[-1], "moe_layer_interval": 1, "moe_norm_min": 1e-12, "use_bias": False,
            **_LOSSES}  # fmt: skip


def _cohere2_moe(s: Shape) -> dict[str, Any]:
    # prefix_dense_sliding_window_pattern=1 would force the rotary embedding on dense layers; any other value leaves it.
    return {"num_experts": s.experts, "num_experts_per_tok": s.top_k, "intermediate_size": s.width,
            "norm_topk_prob": True, "expert_selection_fn": "softmax", "num_shared_experts": s.shared // s.width,
            "shared_expert_combination_strategy": "sum", "mlp_layer_types": s.kinds,
            "prefix_dense_intermediate_size": None if s.all_layers else s.config.intermediate_size,
            "prefix_dense_sliding_window_pattern": 4, "sliding_window_pattern": 4, "rms_norm_eps": None,
            "attention_bias": s.has("qkv_bias"), "rope_theta": rope(s.config)["rope_theta"], "rope_scaling": None,
            "rope_parameters": rope(s.config), "output_router_logits": False}  # fmt: skip


def _hunyuan(s: Shape) -> dict[str, Any]:
    return {"num_experts": s.experts, "moe_topk": s.top_k, "intermediate_size": s.width,
            "attention_bias": s.has("qkv_bias"), "output_router_logits": False}  # fmt: skip


def _qwen3_5_moe(s: Shape) -> dict[str, Any]:
    return {"num_experts": s.experts, "num_experts_per_tok": s.top_k, "moe_intermediate_size": s.width,
            "shared_expert_intermediate_size": s.shared, "attention_bias": s.has("qkv_bias"), **_LOSSES}  # fmt: skip


def _any(_s: Shape) -> bool:
    return True


def _from_a_layer_on(s: Shape) -> bool:
    return s.layers == tuple(range(s.layers[0], s.num_layers))


def _in_a_row(s: Shape) -> bool:
    return s.layers == tuple(range(s.layers[0], s.layers[-1] + 1))


def head_dim(config: Any) -> int:
    """Width of an attention head, given or derived."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


_QWEN_SHARED = Names(shared="mlp.shared_expert.", shared_gate="mlp.shared_expert_gate.weight")
_GATED = Shared(width="any", weight=0.5)  # sigmoid of a zero gate
_NO_WINDOW: dict[str, Any] = {"use_sliding_window": False, "sliding_window": None, "max_window_layers": 0}
_SIGMOID = RouterSpec(score="sigmoid", normalize_eps=1e-20, bias=True)
_LATE = RouterSpec(score_first=False)

_HOSTS = (
    Host("mixtral", frozenset({"window"}), _mixtral, absent={"sliding_window": None},
         names=Names(router="block_sparse_moe.gate.weight", gate="block_sparse_moe.experts.{e}.w1.weight",
                     up="block_sparse_moe.experts.{e}.w3.weight", down="block_sparse_moe.experts.{e}.w2.weight")),
    Host("granitemoe", frozenset({"qkv_bias", "o_bias", "multipliers"}), _granitemoe, router=_LATE, head_dim=False,
         absent={"embedding_multiplier": 1.0, "logits_scaling": 1.0, "residual_multiplier": 1.0},
         names=Names(router="block_sparse_moe.router.layer.weight", gate="block_sparse_moe.input_linear.weight",
                     up="", down="block_sparse_moe.output_linear.weight", stacked=True)),
    Host("qwen2_moe", frozenset({"qkv_bias", "mixed_windows"}), _qwen2_moe, can_leave=True, absent=_NO_WINDOW,
         names=_QWEN_SHARED, shared=_GATED, mixed=_any, head_dim=False),
    Host("qwen3_moe", frozenset({"head_norm", "qkv_bias", "o_bias"}), _qwen3_moe, can_leave=True, mixed=_any,
         aliases=(("num_experts", "num_experts"), ("num_local_experts", "num_experts"))),
    Host("mellum", frozenset({"head_norm", "qkv_bias", "o_bias", "mixed_windows"}), _mellum, can_leave=True,
         mixed=_any),
    Host("glm4_moe", frozenset({"head_norm", "qkv_bias", "partial_rotary"}), _glm4_moe, router=_SIGMOID,
         can_leave=True, mixed=_from_a_layer_on, shared=Shared(),
         names=Names(bias=("mlp.gate.e_score_correction_bias", "E"), shared="mlp.shared_experts.")),
    Host("flex_olmo", frozenset({"wide_norm", "qkv_bias", "o_bias"}), _flex_olmo, can_leave=True, head_dim=False),
    Host("ernie4_5_moe", frozenset({"interleaved_rope"}), _ernie, router=RouterSpec(bias=True), mixed=_in_a_row,
         names=Names(bias=("mlp.moe_statics.e_score_correction_bias", "1E"), shared="mlp.shared_experts."),
         shared=Shared(optional=True), router_dtype="F32"),
    Host("cohere2_moe", frozenset({"parallel_block", "mixed_windows", "qkv_bias", "o_bias"}), _cohere2_moe,
         router=_LATE, mixed=_any, names=Names(shared="mlp.shared_experts."), shared=Shared(optional=True)),
    Host("hunyuan_v1_moe", frozenset({"late_head_norm", "qkv_bias", "o_bias", "rope_scaling"}), _hunyuan,
         absent={"sep_token_id": None}, zero_shared=True, shared=Shared(width="equal"), router_dtype="F32",
         names=Names(router="mlp.gate.wg.weight", shared="mlp.shared_mlp.")),
    Host("qwen3_5_moe_text", frozenset({"linear_attention", "head_norm", "partial_rotary", "qkv_bias", "o_bias"}),
         _qwen3_5_moe, names=_QWEN_SHARED, shared=_GATED),
)  # fmt: skip

HOSTS = {host.model_type: host for host in _HOSTS}
