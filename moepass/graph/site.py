"""The values that recognition produces: what was found, and why the rest was not.

``DenseFFN``  out = down(program(up_1(x), ..., up_n(x))), all nodes of one FX graph.
``Rejected``  a candidate that came close, with a stable reason code.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch.fx import Node


@dataclass(frozen=True)
class Projection:
    """One affine map ``x @ W.T + b`` of a site.

    ``node``        the FX node that computes it
    ``weight``      node that holds the whole weight tensor (placeholder, get_attr)
    ``bias``        likewise, or None
    ``rows``        (start, stop): the output features used (a fused gate_up weight gives two projections)
    ``transposed``  True where the weight is stored ``[in, out]`` (GPT-2's Conv1D)
    """

    node: Node
    weight: Node
    bias: Node | None
    rows: tuple[int, int]
    transposed: bool = False


@dataclass(frozen=True)
class DenseFFN:
    """A feed-forward region.  ``ups`` are in the order of the program's variables: g, then u."""

    x: Node  # [..., D]: the tensor that all input projections read (views stripped)
    ups: tuple[Projection, ...]
    program: str  # canonical pointwise expression
    dropout: float  # probability between program and down; 0.0 in evaluation mode
    down: Projection
    output: Node  # the node whose value is the block's output, [..., D] in x's leading shape or [T, D]
    D: int
    F: int
    interior: tuple[Node, ...] = field(default=(), repr=False)  # every node of the region, graph order

    @property
    def n(self) -> int:
        """Input projections: 2 gated, 1 ungated."""
        return len(self.ups)


@dataclass(frozen=True)
class Rejected:
    """A near miss.  ``code`` is stable and lands in the plan report."""

    output: Node  # the output projection of the candidate
    code: str
    detail: str
    weights: tuple[Node, ...] = ()  # nodes of its weights, where ``output`` does not read them itself


#: Reason codes that ``moepass.graph.dense`` may give, with what a user can do.
REASONS: dict[str, str] = {
    "no_nonlinearity": "the projections compose to a linear map (a LoRA pair, a factorised layer); nothing to route",
    "width_changes": "the output projection does not return to the width of the input (a pooler or a classifier)",
    "hidden_escapes": "a hidden tensor is also used outside the block, so the block cannot be replaced",
    "inputs_differ": "the input projections read different tensors",
    "not_pointwise": "an operation between the projections is not pointwise",
    "unknown_activation": "a pointwise operation between the projections is not in the vocabulary",
    "tensor_in_program": "the pointwise program reads a tensor besides the projections",
    "cast_in_program": "the pointwise program changes the dtype",
    "too_many_projections": "more than two input projections",
    "mixed_biases": "only one of the gate and up projections has a bias",
    "widths_differ": "the input projections have different widths",
    "weight_not_parameter": "a weight is computed in the graph (merged LoRA, weight norm, dequantisation)",
    "non_floating": "inputs or weights are not floating point",
    "quantised_weight": "a weight is quantised",
    "sparse_weight": "a weight is sparse",
    "tensor_subclass": "a weight is a tensor subclass that the pass does not know",
    "sharded_parameter": "a weight is sharded (FSDP, DTensor); convert before sharding",
    "shape_not_understood": "a view between the projections mixes the feature dimension with others",
    "crosses_autocast": "the block crosses the border of an autocast or grad-mode region",
    "mutated": "a tensor of the block is changed in place",
    "overlaps": "a projection already belongs to the feed-forward block before it",
}

#: Reason codes that only ``moepass.graph.foreign`` gives (it shares some of the above).
EXPERT_REASONS: dict[str, str] = {
    "eager_loop": (
        "a Python loop over experts breaks the graph; model.set_experts_implementation('moepass') or "
        "moepass.convert(model, existing=True) takes its place"
    ),
    "unknown_order": "nothing proves that rows, weights and expert ids are in the same order",
    "offsets_not_proven": "nothing proves that the offsets of a grouped GEMM are the running sum of its ids' histogram",
    "moe_form": "an expert GEMM of a form that is not recognised; use the moepass experts implementation",
    "moe_combine": "something besides the routing weights happens between the experts and the sum over choices",
    "moe_not_understood": "an operation on the experts' rows that no rule covers (an einsum over the choices)",
}
