"""The C++ grouped GEMM against float64: every layout, tail and dtype that it takes, and how it is built."""

from __future__ import annotations

import logging

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from moepass import caches
from moepass.kernels import grouped_linear as grouped_ops
from moepass.kernels import sorting
from moepass.kernels.cpu import build, grouped
from moepass.kernels.grouped_linear import grouped_linear
from moepass.kernels.rows_linear import rows_linear

pytestmark = pytest.mark.skipif(build.load() is None, reason="needs AVX2 and a C++ compiler that knows its vectors")

#: Rows of each expert: none, fewer than a register tile, one more than a block, all of one, one strip and two.
COUNTS = [(3, 0, 1, 7), (50, 49, 0, 2), (0, 0, 0, 1), (5, 5, 5, 5), (97, 0, 0, 0), (12, 0, 33, 20)]
#: K, N: whole vectors, tails on both sides, more than one panel deep (a long one too), more than one block of columns.
WIDTHS = [(64, 48), (33, 21), (1100, 70), (2100, 20), (8, 300), (1, 1)]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8}


def drawn(counts, K, N, dtype, by_column=False):
    torch.manual_seed(0)
    offsets = torch.tensor(counts).cumsum(0, dtype=torch.int32)
    expert = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    w = torch.randn(len(counts), K, N).transpose(1, 2) if by_column else torch.randn(len(counts), N, K)
    return torch.randn(len(expert), K).to(dtype), w.to(dtype), torch.randn(len(counts), N).to(dtype), offsets, expert


def close(ours, truth, dtype, terms):
    limit = TOLERANCE[dtype] * terms**0.5 * max(1.0, float(truth.abs().max()))
    assert float((ours.double() - truth).abs().max()) <= limit


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("by_column", [False, True], ids=["by row", "by column"])
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("widths", WIDTHS)
def test_linear_is_each_experts_product(widths, counts, by_column, dtype):
    x, w, b, offsets, expert = drawn(counts, *widths, dtype, by_column)
    truth = torch.einsum("rk,rnk->rn", x.double(), w.double()[expert])
    for bias in (None, b):
        y = x.new_empty(len(expert), w.shape[1])
        grouped.linear(x, w, bias, y, offsets_E=offsets)
        close(
            y, truth if bias is None else truth + bias.double()[expert], dtype, widths[0] if dtype.itemsize > 2 else 1
        )


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("widths", WIDTHS)
def test_outer_is_each_experts_weight_gradient_and_zero_without_rows(widths, counts, dtype):
    x, w, _, offsets, expert = drawn(counts, *widths, dtype)
    dy = torch.randn(len(expert), widths[1]).to(dtype)
    dw = torch.full(w.shape, torch.nan, dtype=dtype)
    grouped.outer(dy, x, offsets, dw)
    truth = torch.stack([dy[expert == e].double().t() @ x[expert == e].double() for e in range(len(counts))])
    close(dw, truth, dtype, max(counts) if dtype.itemsize > 2 else 1)


def test_results_do_not_depend_on_the_number_of_threads():
    x, w, b, offsets, expert = drawn((50, 49, 0, 2), 300, 130, torch.float32)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        y, dw = x.new_empty(len(expert), 130), torch.empty_like(w)
        grouped.linear(x, w, b, y, offsets_E=offsets)
        grouped.outer(y, x, offsets, dw)
        results.append((y, dw))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_bfloat16_is_rounded_as_torch_rounds_it():
    specials = torch.tensor([1.0, torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 3e38, 1e-40])
    dy = torch.cat([torch.randn(1000), specials]).to(torch.bfloat16).unsqueeze(0)
    x = torch.randn(1, 40).to(torch.bfloat16)
    dw = torch.empty(1, dy.shape[1], 40, dtype=torch.bfloat16)
    grouped.outer(dy, x, torch.tensor([1], dtype=torch.int32), dw)
    assert torch.equal(dw[0].isnan(), (dy.t().float() * x.float()).isnan())
    assert torch.equal(dw[0].nan_to_num(), (dy.t().float() * x.float()).to(torch.bfloat16).nan_to_num())


def test_rows_in_any_order_name_their_experts():
    x, w, b, _, _ = drawn((4, 4), 33, 21, torch.float32)
    expert = torch.tensor([1, 0, 2, 1, -1, 0, 0, 1])  # 2 and -1 are nobody's
    y = rows_linear(x, w, b, expert)
    inside = expert.clamp(0, 1) == expert
    assert not y[~inside].any()
    truth = torch.einsum("rk,rnk->rn", x.double(), w.double()[expert.clamp(0, 1)]) + b.double()[expert.clamp(0, 1)]
    close(y[inside], truth[inside], torch.float32, 33)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("by_column", [False, True], ids=["by row", "by column"])
def test_rows_are_taken_from_the_tokens_bit_for_bit_as_from_a_copy(by_column, dtype):
    x, w, b, offsets, _ = drawn((3, 0, 40, 7), 33, 21, dtype, by_column)
    order = torch.randperm(50)  # of 25 tokens with two rows each
    y, copied = (x.new_empty(50, 21) for _ in range(2))
    grouped.linear(x[:25], w, b, y, offsets_E=offsets, order_R=order, per=2)
    grouped.linear(x[order // 2], w, b, copied, offsets_E=offsets)
    assert torch.equal(y, copied)
    dw, dw_copied = (x.new_empty(4, 21, 33) for _ in range(2))
    grouped.outer(y, x[:25], offsets, dw, order_R=order, per=2)
    grouped.outer(y, x[order // 2], offsets, dw_copied)
    assert torch.equal(dw, dw_copied)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize(("T", "E"), [(7, 5), (300, 3), (1, 1), (0, 4), (20, 128)])
def test_rows_are_sorted_as_pytorch_sorts_them(T, E, dtype):
    index = torch.randint(-1, E + 1, (T, 2), generator=torch.Generator().manual_seed(T), dtype=dtype)
    for view in (index, torch.cat([index, index], 1)[:, :2], torch.full_like(index, E)):
        for ours, theirs in zip(grouped.sort(view, E), sorting._sort_by_expert(view, E), strict=True):
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)


def test_rows_behind_the_offsets_are_zero():
    x, w, b, offsets, _ = drawn((3, 0, 1, 7), 33, 21, torch.float32)
    y = torch.full((14, 21), torch.nan)
    grouped.linear(torch.cat([x, x[:3] * torch.nan]), w, b, y, offsets_E=offsets)
    assert not y[11:].any()
    assert y[:11].isfinite().all()


@pytest.mark.parametrize("wrong", ["dtype of x", "width of x", "dtype of the bias", "width of the bias"])
def test_operands_that_do_not_go_together_are_refused_as_pytorch_refuses_them(wrong):
    x, w, b, offsets, expert = drawn((3, 0, 1, 7), 33, 21, torch.bfloat16)
    x = {"dtype of x": x.float(), "width of x": torch.cat([x, x], 1)}.get(wrong, x)
    b = {"dtype of the bias": b.float(), "width of the bias": torch.cat([b, b], 1)}.get(wrong, b)
    with pytest.raises(RuntimeError):
        grouped_linear(x, w, b, offsets)
    with pytest.raises(RuntimeError):
        rows_linear(x, w, b, expert)


def test_experts_with_more_rows_than_the_limit_are_the_librarys(monkeypatch):
    x, w, b, offsets, _ = drawn((50, 3, 0, 2), 64, 48, torch.float32)
    dy = torch.randn(55, 48)
    whole = grouped_linear(x, w, b, offsets), grouped_ops._outer_loop(dy, x, offsets, False, False)
    monkeypatch.setattr(grouped, "most_rows", lambda dtype: 3)
    mixed = grouped_linear(x, w, b, offsets), grouped_ops._outer_loop(dy, x, offsets, False, False)
    for a, b in zip(whole, mixed, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def test_without_a_compiler_pytorchs_products_serve(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    with caplog.at_level(logging.WARNING, "moepass"):
        assert build.load.__wrapped__() is None
    assert "no-such-compiler" in caplog.text


def test_a_compiler_that_fails_is_quoted(monkeypatch, tmp_path, caplog):
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "no vectors here" >&2\nexit 1\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with caplog.at_level(logging.WARNING, "moepass"):
        assert build.load.__wrapped__() is None
    assert "no vectors here" in caplog.text


def test_a_cache_that_cannot_be_written_costs_a_build_only(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(caches, "directory", lambda: tmp_path / "file" / "cache")
    assert build._compiled().exists()


def test_a_library_that_is_wrong_is_not_used(monkeypatch, caplog):
    with FakeTensorMode():  # asked first while a graph is traced
        assert grouped._proved.__wrapped__()
    monkeypatch.setattr(grouped, "outer", lambda dy, x, offsets, dw: dw.zero_())
    with caplog.at_level(logging.WARNING, "moepass"):
        assert not grouped._proved.__wrapped__()
    assert "torch.float32, torch.bfloat16" in caplog.text


def test_the_environment_turns_it_off(monkeypatch):
    monkeypatch.setenv("MOEPASS_CPU_KERNELS", "0")
    assert build.load.__wrapped__() is None
