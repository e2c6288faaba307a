"""Each ``torch.library`` op passes torch's own opcheck: schema, fake, autograd, AOT dispatch with dynamic shapes."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from moepass.kernels import host
from moepass.kernels.grouped_linear import grouped_linear
from moepass.kernels.rows import gather
from moepass.kernels.rows_linear import rows_linear
from moepass.kernels.sorting import sort_by_expert
from moepass.kernels.taken_linear import taken_linear


@pytest.fixture
def routed():
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(0, 4, (7, 2), generator=generator)
    index[index == 2] = 3  # expert 2 has no rows
    return index


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), requires_grad=True)


def test_sort_by_expert_passes_opcheck(routed):
    opcheck(torch.ops.moepass.sort_by_expert.default, (routed, 4))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("to_hidden", [False, True])
def test_grouped_linear_passes_opcheck(routed, bias, to_hidden):
    offsets = sort_by_expert(routed, 4)[2]
    args = (draw(14, 6), draw(4, 5, 6), draw(4, 5) if bias else None, offsets, False, to_hidden)
    opcheck(torch.ops.moepass.grouped_linear.default, args)


@pytest.mark.parametrize("bias", [False, True])
def test_rows_linear_passes_opcheck(routed, bias):
    args = (draw(14, 6), draw(4, 5, 6), draw(4, 5) if bias else None, routed.reshape(-1))
    opcheck(torch.ops.moepass.rows_linear.default, args)
    opcheck(torch.ops.moepass.few_rows_linear.default, args)


@pytest.mark.parametrize("bias", [False, True])
def test_taken_linear_passes_opcheck(routed, bias):
    order, inverse, offsets = sort_by_expert(routed, 4)
    x, w, b = draw(7, 6), draw(4, 5, 6), draw(4, 5) if bias else None
    opcheck(torch.ops.moepass.taken_linear.default, (x, order, inverse, 2, w, b, offsets))
    opcheck(torch.ops.moepass.taken_outer.default, (draw(14, 5).detach(), x.detach(), order, 2, offsets))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("transposed", [False, True])
def test_taken_linear_is_grouped_linear_of_gathered_rows(routed, transposed, dtype):
    routed = torch.where(routed == 1, 4, routed)  # and rows of nobody
    order, inverse, offsets = sort_by_expert(routed, 4)
    x, b = draw(7, 6).to(dtype), draw(4, 5).to(dtype)
    w = draw(4, 6, 5).to(dtype).transpose(1, 2) if transposed else draw(4, 5, 6).to(dtype)
    ours = taken_linear(x, order, inverse, 2, w, b, offsets)
    theirs = grouped_linear(gather(x, order // 2, inverse.view(7, 2)), w, b, offsets)
    torch.testing.assert_close(ours, theirs)
    upstream = torch.randn(14, 5, generator=torch.Generator().manual_seed(2), dtype=dtype)
    got, truth = (torch.autograd.grad(y, [x, w, b], upstream) for y in (ours, theirs))
    torch.testing.assert_close(got, truth)
    assert got[1].stride() == truth[1].stride()


def test_backward_ops_pass_opcheck(routed):
    offsets = sort_by_expert(routed, 4)[2]
    dy, x = draw(14, 5).detach(), draw(14, 6).detach()
    opcheck(torch.ops.moepass.grouped_outer.default, (dy, x, offsets, False, False))
    opcheck(torch.ops.moepass.grouped_sum.default, (dy, offsets, False))
    opcheck(torch.ops.moepass.rows_outer.default, (dy, x, routed.reshape(-1), 4))


def test_sorting_is_stable_and_its_inverse_is_the_inverse(routed):
    order, inverse, offsets = sort_by_expert(routed, 4)
    flat = routed.reshape(-1)
    assert torch.equal(flat[order], flat.sort(stable=True).values)
    assert torch.equal(order[inverse], torch.arange(14))
    assert offsets.tolist() == [int((flat <= e).sum()) for e in range(4)]
    for e in range(4):
        rows = order[flat[order] == e]
        assert torch.equal(rows, rows.sort().values)


def test_grouped_linear_equals_a_linear_per_row(routed):
    order, inverse, offsets = sort_by_expert(routed, 4)
    x, w, b = draw(14, 6), draw(4, 5, 6), draw(4, 5)
    sorted_rows = grouped_linear(x[order], w, b, offsets)
    torch.testing.assert_close(sorted_rows[inverse], rows_linear(x, w, b, routed.reshape(-1)))


@pytest.mark.parametrize("bias", [False, True])
def test_two_grouped_linears_are_the_same_through_the_hidden_layout(routed, bias):
    offsets = sort_by_expert(routed, 4)[2]
    x, w1, w2 = draw(14, 6), draw(4, 5, 6), draw(4, 3, 5)
    b1, b2 = (draw(4, 5), draw(4, 3)) if bias else (None, None)
    leaves = [t for t in (x, w1, w2, b1, b2) if t is not None]

    def run(hidden):
        h = grouped_linear(x, w1, b1, offsets, to_hidden=hidden)
        y = grouped_linear(torch.tanh(h), w2, b2, offsets, from_hidden=hidden)
        return y, torch.autograd.grad(y.square().sum(), leaves)

    plain, plain_grads = run(False)
    hidden, hidden_grads = run(True)
    torch.testing.assert_close(hidden, plain)
    torch.testing.assert_close(hidden_grads, plain_grads)


def test_padding_of_the_hidden_layout_is_zero_and_never_read(routed):
    offsets = sort_by_expert(routed, 4)[2]
    x, w1, w2 = draw(14, 6), draw(4, 5, 6), draw(4, 3, 5)
    h = grouped_linear(x, w1, None, offsets, to_hidden=True)
    used = torch.zeros(h.shape[1], dtype=torch.bool)
    start = 0
    for count in offsets.diff(prepend=offsets.new_zeros(1)).tolist():
        used[start : start + count] = True
        start += -(-count // 16) * 16
    assert not h[:, ~used].any()
    poisoned = torch.where(used, h, torch.nan)
    y = grouped_linear(poisoned, w2, None, offsets, from_hidden=True)
    assert y.isfinite().all()
    grads = torch.autograd.grad(y.sum(), [x, w1, w2])
    assert all(g.isfinite().all() for g in grads)


def test_anomaly_detection_finds_nothing_in_a_healthy_block(routed):
    offsets = sort_by_expert(routed, 4)[2]
    x, w1, w2 = draw(14, 6), draw(4, 5, 6), draw(4, 3, 5)
    with torch.autograd.detect_anomaly(check_nan=True):
        h = grouped_linear(x, w1, None, offsets, to_hidden=True)
        grouped_linear(torch.tanh(h), w2, None, offsets, from_hidden=True).sum().backward()


def test_large_host_buffers_are_ordinary_tensors():
    buffer = host.empty((9, 1024, 1024), torch.float32)
    assert buffer.shape == (9, 1024, 1024)
    assert buffer.fill_(2.0).sum() == 2.0 * buffer.numel()
    view = buffer[3]
    del buffer
    assert (view == 2.0).all()


def test_host_buffers_of_close_sizes_are_one_after_the_other():
    sizes = [(1000, 1024), (1010, 1024), (1020, 1024)]
    addresses = {host.empty(size, torch.float32).data_ptr() for size in sizes}
    assert len(addresses) == 1
    held = [host.empty(size, torch.float32) for size in sizes]
    assert len({buffer.data_ptr() for buffer in held}) == len(sizes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("a_by_column", [False, True])
@pytest.mark.parametrize("b_by_column", [False, True])
def test_host_mm_is_right_for_every_mix_of_layouts(dtype, a_by_column, b_by_column):
    a, b = draw(4, 6).detach().to(dtype), draw(6, 5).detach().to(dtype)
    out = torch.empty(4, 5, dtype=dtype)
    host.mm(a.t().contiguous().t() if a_by_column else a, b.t().contiguous().t() if b_by_column else b, out)
    torch.testing.assert_close(out.float(), a.float() @ b.float(), rtol=2e-2, atol=2e-2)


def test_gather_has_the_adjoint_of_index_select(routed):
    order, inverse, _ = sort_by_expert(routed, 4)
    x = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: gather(t, order // 2, inverse.view(7, 2)), (x,))
