"""Row kernels on fake tensors with a symbolic token count: what the backend runs before it knows how many there are."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from moepass.kernels import rows


@pytest.mark.parametrize("K", [0, 1, 2, 17])  # nothing, one term, written out, too many to write out
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_combine_of_a_symbolic_number_of_tokens(K, dtype):
    fake = FakeTensorMode(shape_env=ShapeEnv())
    first_dynamic = StatelessSymbolicContext([DimDynamic.DYNAMIC, DimDynamic.STATIC])
    x_TD = fake.from_tensor(torch.randn(7, 8).to(dtype).requires_grad_(), symbolic_context=first_dynamic)
    weight_TK = fake.from_tensor(torch.randn(7, K).requires_grad_(), symbolic_context=first_dynamic)
    y_TKD = x_TD.unsqueeze(1).expand(-1, K, -1)

    with fake:
        out_TD = rows.combine(y_TKD, weight_TK, dtype)
        out_TD.sum().backward()

    assert out_TD.dtype == dtype
    assert isinstance(out_TD.shape[0], torch.SymInt)
    assert out_TD.shape == x_TD.shape == x_TD.grad.shape
