"""Blocks for the tests of the fused kernels: operands in the layout of a case, and the same block by the reference."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moepass import pointwise, reference
from moepass.kernels.fused.ops import fused_experts

#: Largest error over the largest value.  bfloat16: the interpreter cuts bits off where a GPU rounds.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Case:
    """``routing``: random, one (all rows to the last expert), skewed, or sentinels (a third without an expert)."""

    T: int = 13
    D: int = 20
    F: int = 24
    E: int = 5
    K: int = 2
    activation: str = "swiglu"
    bias: bool = False
    interleaved: bool = False
    transposed: bool = False
    save: bool = True
    routing: str = "random"
    dtype: torch.dtype = torch.float32
    index_dtype: torch.dtype = torch.int64
    seed: int = 0

    @property
    def n(self) -> int:
        return pointwise.n_inputs(self.activation)

    def leaves(self) -> dict[str, Tensor]:
        """Values in float64 that the dtype of the case holds exactly."""
        generator = torch.Generator().manual_seed(self.seed)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            values = scale * torch.randn(*shape, generator=generator, dtype=torch.float64)
            return values.to(self.dtype).double().requires_grad_()

        rows = self.n * self.F
        leaves = {
            "x": draw(self.T, self.D),
            "weight": torch.rand(self.T, self.K, generator=generator).double().requires_grad_(),
            "w_in": draw(self.E, rows, self.D, scale=self.D**-0.5),
            "w_out": draw(self.E, self.D, self.F, scale=self.F**-0.5),
        }
        return leaves | ({"b_in": draw(self.E, rows), "b_out": draw(self.E, self.D)} if self.bias else {})

    def index(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + 1)
        shares = torch.ones(self.E) if self.routing != "skewed" else 4.0 ** -torch.arange(self.E)
        index = torch.empty(0, self.K, dtype=torch.int64)
        if self.T:
            index = torch.multinomial(shares.expand(self.T, -1), self.K, generator=generator)
        if self.routing == "one":
            index[:] = self.E - 1
        if self.routing == "sentinels":
            outside = torch.randint(0, 3, index.shape, generator=generator)
            index = torch.where(outside == 0, self.E + 2, index)
            index[:1] = -1
        return index.to(self.index_dtype)

    def fused(self, leaves: dict[str, Tensor]) -> Tensor:
        """The kernels on the case's dtype and layout; gradients reach the float64 leaves."""
        given = {name: t if name == "weight" else t.to(self.dtype) for name, t in leaves.items()}
        w_in, b_in = given["w_in"], given.get("b_in")
        if self.interleaved:
            w_in = w_in.unflatten(1, (2, self.F)).transpose(1, 2).flatten(1, 2)
            b_in = None if b_in is None else b_in.unflatten(1, (2, self.F)).transpose(1, 2).flatten(1)
        w_out = given["w_out"]
        if self.transposed:
            w_in, w_out = (w.transpose(1, 2).contiguous().transpose(1, 2) for w in (w_in, w_out))
        return fused_experts(
            given["x"], self.index(), given["weight"].float(), w_in, w_out, b_in, given.get("b_out"),
            activation=self.activation, interleaved=self.interleaved, save=self.save,
        )  # fmt: skip

    def reference(self, leaves: dict[str, Tensor]) -> Tensor:
        """``moepass.reference`` in float64."""
        weights = reference.ExpertWeights(*(leaves.get(name) for name in ("w_in", "w_out", "b_in", "b_out")))
        return reference.routed_experts(leaves["x"], self.index().long(), leaves["weight"], weights, self.activation)


def run(case: Case, compute) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and the gradient of every leaf for one fixed upstream gradient."""
    leaves = case.leaves()
    y = compute(leaves)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    gradients = torch.autograd.grad(y, list(leaves.values()), upstream.to(case.dtype).to(y.dtype))
    return y, dict(zip(leaves, gradients, strict=True))


def assert_same_function(case: Case) -> None:
    """Output and every gradient of the kernels against the reference's."""
    wanted, wanted_gradients = run(case, case.reference)
    got, gradients = run(case, case.fused)
    assert got.dtype == case.dtype
    for name, theirs, ours in (("y", wanted, got), *((n, wanted_gradients[n], gradients[n]) for n in gradients)):
        assert ours.shape == theirs.shape
        error = (ours.double() - theirs).abs().max() if theirs.numel() else torch.zeros(())
        scale = theirs.abs().max() if theirs.numel() else torch.ones(())
        assert error <= TOLERANCE[case.dtype] * scale, f"{name}: error {error:.2e} at scale {scale:.2e}"
