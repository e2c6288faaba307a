"""Rows without an expert in the kernels' ops: sorted last, never computed, never read; the code of every device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from moepass.kernels import grouped_linear as grouped
from moepass.kernels import rows_linear as rowwise
from moepass.kernels.grouped_linear import grouped_linear
from moepass.kernels.rows import sum_by_expert
from moepass.kernels.rows_linear import rows_linear
from moepass.kernels.sorting import sort_by_expert

T, K, E = 7, 2, 4
R = T * K


@pytest.fixture(params=[torch.int32, torch.int64])
def routed(request):
    index = torch.randint(0, E, (T, K), generator=torch.Generator().manual_seed(0))
    index[index == 2] = 3  # expert 2 has no rows
    index[1] = E
    index[4, 1], index[6, 0] = E + 3, -1
    return index.to(request.param)


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=dtype).requires_grad_()


def test_sorting_puts_them_last_and_their_inverse_is_the_last_row(routed):
    order, inverse, offsets = sort_by_expert(routed, E)
    flat = routed.reshape(-1)
    computed = (flat >= 0) & (flat < E)
    assert offsets.tolist() == [int((computed & (flat <= e)).sum()) for e in range(E)]
    assert offsets[-1] == R - 4
    assert torch.equal(order.sort().values, torch.arange(R))
    assert not computed[order[R - 4 :]].any()
    assert torch.equal(order[inverse[computed]], torch.arange(R)[computed])
    assert (inverse[~computed] == R - 1).all()
    assert (order.dtype, inverse.dtype, offsets.dtype) == (torch.int64, torch.int64, torch.int32)


def test_sorting_nothing_and_only_rows_without_an_expert():
    for tokens in (0, 3):
        order, inverse, offsets = sort_by_expert(torch.full((tokens, K), E), E)
        assert order.tolist() == list(range(tokens * K))
        assert inverse.tolist() == [tokens * K - 1] * (tokens * K)
        assert offsets.tolist() == [0] * E


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("to_hidden", [False, True])
def test_ops_pass_opcheck(routed, bias, to_hidden):
    opcheck(torch.ops.moepass.sort_by_expert.default, (routed, E))
    offsets = sort_by_expert(routed, E)[2]
    b = draw(E, 5) if bias else None
    opcheck(torch.ops.moepass.grouped_linear.default, (draw(R, 6), draw(E, 5, 6), b, offsets, False, to_hidden))
    opcheck(torch.ops.moepass.rows_linear.default, (draw(R, 6), draw(E, 5, 6), b, routed.reshape(-1)))


@pytest.mark.parametrize("hidden", [False, True])
def test_grouped_rows_behind_the_offsets_are_neither_computed_nor_read(routed, hidden):
    offsets = sort_by_expert(routed, E)[2]
    end = int(offsets[-1])
    x, w1, w2, b1, b2 = draw(R, 6), draw(E, 5, 6), draw(E, 3, 5), draw(E, 5), draw(E, 3)
    garbage = (torch.arange(R) >= end).unsqueeze(1)
    poisoned = torch.where(garbage, torch.nan, x)
    h = grouped_linear(poisoned, w1, b1, offsets, to_hidden=hidden)
    y = grouped_linear(torch.tanh(h), w2, b2, offsets, from_hidden=hidden)
    expected = torch.cat([grouped_linear(torch.tanh(grouped_linear(x[:end], w1, b1, offsets)), w2, b2, offsets)])
    torch.testing.assert_close(y[:end], expected)
    assert torch.count_nonzero(y[-1]) == 0
    upstream = torch.where(garbage, torch.nan, torch.ones_like(y))
    got = torch.autograd.grad(y, [w1, w2, b1, b2], upstream)
    torch.testing.assert_close(got, torch.autograd.grad(expected.sum(), [w1, w2, b1, b2]))


def test_row_by_row_linear_gives_zero_and_takes_nothing_from_them(routed):
    flat = routed.reshape(-1)
    computed = ((flat >= 0) & (flat < E)).unsqueeze(1)
    x, w, b = draw(R, 6), draw(E, 5, 6), draw(E, 5)
    y = rows_linear(torch.where(computed, x, torch.nan), w, b, flat)
    inside = torch.where(computed[:, 0], flat, 0).long()
    expected = torch.where(computed, torch.einsum("rnd,rd->rn", w[inside], x) + b[inside], 0.0)
    torch.testing.assert_close(y, expected)
    upstream = torch.where(computed, torch.ones_like(y), torch.nan)
    got = torch.autograd.grad(y, [w, b], upstream)
    torch.testing.assert_close(got, torch.autograd.grad(expected.sum(), [w, b]))


def test_the_accelerators_row_by_row_code_computes_what_the_cpus_does(routed):
    flat = routed.reshape(-1)
    computed = ((flat >= 0) & (flat < E)).unsqueeze(1)
    x, w, b, dy = (t.detach() for t in (draw(R, 6), draw(E, 5, 6), draw(E, 5), draw(R, 5)))
    x, dy = torch.where(computed, x, torch.nan), torch.where(computed, dy, torch.nan)
    for bias in (None, b):
        torch.testing.assert_close(rowwise._linear_accelerator(x, w, bias, flat), rowwise._linear_cpu(x, w, bias, flat))
    torch.testing.assert_close(rowwise._outer_accelerator(dy, x, flat, E), rowwise._outer_cpu(dy, x, flat, E))


def test_the_accelerators_grouped_code_computes_what_the_cpus_does(routed):
    offsets = sort_by_expert(routed, E)[2]
    end = int(offsets[-1])
    x, w, b, dy = (t.detach().bfloat16() for t in (draw(R, 8), draw(E, 16, 8), draw(E, 16), draw(R, 16)))
    x[end:], dy[end:] = torch.nan, torch.nan
    assert grouped._fits_grouped_mm(x, w)
    for bias in (None, b):
        got = grouped._linear_accelerator(x, w, bias, offsets, False, False)
        expected = grouped._linear_loop(x, w, bias, offsets, False, False)
        torch.testing.assert_close(got[:end], expected[:end], rtol=2e-2, atol=2e-2)
        assert torch.count_nonzero(got[-1]) == 0
    torch.testing.assert_close(
        grouped._outer_accelerator(dy, x, offsets, False, False),
        grouped._outer_loop(dy, x, offsets, False, False),
        rtol=2e-2,
        atol=2e-2,
    )
    torch.testing.assert_close(
        grouped._sum_accelerator(dy, offsets, False), grouped._sum_loop(dy, offsets, False), rtol=2e-2, atol=2e-2
    )


def test_sums_by_expert_are_those_of_a_loop_and_read_no_other_row(routed):
    flat = routed.reshape(-1)
    x = torch.where(((flat >= 0) & (flat < E)).unsqueeze(1), draw(R, 3, dtype=torch.float64).detach(), torch.inf)
    expected = torch.stack([x[flat == e].sum(0) for e in range(E)])
    torch.testing.assert_close(sum_by_expert(x, flat, E), expected)
