"""What the init methods draw: layout, determinism, statistics, devices and dtypes."""

from __future__ import annotations

import sys

import pytest
import torch

from moepass import errors
from moepass.spec import ExpertSpec, InitSpec, MoESpec, RouterSpec
from moepass.upcycle.init import complete, initialise

D, WIDTH = 16, 24
METHODS = ["virtual_groups", "copy", "split", "cluster", "copy+noise", "drop"]


def made(
    method="virtual_groups", name="layers.0.mlp", dtype=torch.float32, device="cpu", experts=8, program="swiglu", **init
):
    n = 2 if program == "swiglu" else 1
    generator = torch.Generator().manual_seed(5)
    w_in = torch.randn(n * WIDTH, D, generator=generator).to(device, dtype)
    w_out = torch.randn(D, WIDTH, generator=generator).to(device, dtype)
    b_in = torch.randn(n * WIDTH, generator=generator).to(device, dtype)
    b_out = torch.randn(D, generator=generator).to(device, dtype)
    how = InitSpec(method=method, **init)
    spec = MoESpec(experts=ExpertSpec(num_experts=experts))
    spec = complete(spec, F=WIDTH, D=D, program=program, init=how, bias_in=True, bias_out=True)
    return (w_in, w_out, b_in, b_out), initialise(w_in, w_out, b_in, b_out, spec, how, name)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_weights_depend_on_seed_and_name_only(method):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = made(method)[1]
    assert torch.equal(torch.get_rng_state(), state), "the global generator was used"
    torch.manual_seed(99)
    made(method, name="another")
    assert same(made(method)[1], first)
    assert not same(made(method, seed=1)[1], first)
    assert not same(made(method, name="layers.1.mlp")[1], first)


@pytest.mark.parametrize("method", METHODS)
def test_meta_in_meta_out_with_the_same_shapes(method):
    real, meta = made(method)[1], made(method, device="meta")[1]
    assert all(t.is_meta for t in meta)
    assert [t.shape for t in meta] == [t.shape for t in real]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_is_kept_and_draws_are_the_same_up_to_rounding(method, dtype):
    narrow, wide = made(method, dtype=dtype)[1], made(method)[1]
    assert all(t.dtype == dtype for t in narrow)
    torch.testing.assert_close(narrow.router_weight.float(), wide.router_weight, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(narrow.w_in.float(), wide.w_in, rtol=5e-2, atol=5e-2)


def test_virtual_groups_cut_gate_and_up_alike_and_stand_side_by_side():
    (w_in, w_out, b_in, b_out), moe = made()
    half = WIDTH // 2
    gate, up = w_in.split(WIDTH)
    for e in range(8):
        rows = slice(0, half) if e % 2 == 0 else slice(half, WIDTH)
        assert torch.equal(moe.w_in[e], torch.cat([gate[rows], up[rows]]))
        assert torch.equal(moe.b_in[e], torch.cat([b_in[:WIDTH][rows], b_in[WIDTH:][rows]]))
        assert torch.equal(moe.w_out[e], 2.0 * w_out[:, rows])
        assert torch.equal(moe.b_out[e], b_out)
    router = moe.router_weight
    assert torch.equal(router[0::2], router[1::2])
    gram = router[0::2] @ router[0::2].T
    torch.testing.assert_close(gram, 0.01 * torch.eye(4), rtol=0, atol=1e-7)


def test_more_groups_than_dimensions_stay_distinct_and_of_equal_length():
    router = made(experts=48)[1].router_weight[0::2]
    assert router.shape == (24, D)
    torch.testing.assert_close(router.norm(dim=1), torch.full((24,), 0.1))
    assert torch.unique(router, dim=0).shape[0] == 24


def test_results_do_not_share_memory_with_the_dense_weights_or_between_experts():
    for method in METHODS:
        experts = 1 if method == "copy" else 8
        spec = MoESpec(router=RouterSpec(top_k=experts if experts == 1 else 2, normalize=None if experts == 1 else 1.0),
                       experts=ExpertSpec(num_experts=experts))  # fmt: skip
        how = InitSpec(method=method)
        w_in, w_out, b_out = torch.randn(WIDTH, D), torch.randn(D, WIDTH), torch.randn(D)
        spec = complete(spec, F=WIDTH, D=D, program="gelu", init=how, bias_in=False, bias_out=True)
        moe = initialise(w_in, w_out, None, b_out, spec, how, "mlp")
        kept = [t.clone() for t in (w_in, w_out, b_out)]
        for tensor in moe:
            if tensor is not None:
                assert tensor.is_contiguous()
                tensor.fill_(7.0)
        assert same((w_in, w_out, b_out), kept), method


def test_noise_differs_between_experts_and_has_the_asked_size():
    (w_in, w_out, _, _), moe = made("copy+noise", noise_std=0.1)
    for dense, experts in ((w_in, moe.w_in), (w_out, moe.w_out)):
        noise = experts - dense
        torch.testing.assert_close(noise.std(), 0.1 * dense.std(), rtol=0.1, atol=0)
        assert len({float(e.sum()) for e in noise}) == 8


def test_drop_redraws_the_same_share_of_channels_in_every_matrix():
    (w_in, w_out, b_in, _), moe = made("drop", drop_ratio=0.25)
    gate, up = w_in.split(WIDTH)
    chosen = set()
    for e in range(8):
        new_gate, new_up = moe.w_in[e].split(WIDTH)
        changed = (new_gate != gate).all(1)
        assert int(changed.sum()) == WIDTH // 4
        assert torch.equal((new_up != up).all(1), changed)
        assert torch.equal((moe.w_out[e] != w_out).all(0), changed)
        assert torch.equal(moe.b_in[e][:WIDTH] != b_in[:WIDTH], changed)
        assert torch.equal(new_gate[~changed], gate[~changed])
        chosen.add(tuple(changed.tolist()))
    assert len(chosen) > 1


def test_drop_with_independent_sets_leaves_a_channel_whole_with_the_chance_of_all_three():
    """(1 - r)^3, against 1 - r for one set; each matrix loses its share, and biases go with their rows."""
    F, E, r = 4096, 4, 0.25
    w_in, w_out, b_in = torch.randn(2 * F, 8), torch.randn(8, F), torch.randn(2 * F)
    for indices, whole in (("shared", 1 - r), ("independent", (1 - r) ** 3)):
        how = InitSpec(method="drop", drop_ratio=r, drop_indices=indices)
        spec = MoESpec(experts=ExpertSpec(num_experts=E))
        spec = complete(spec, F=F, D=8, program="swiglu", init=how, bias_in=True, bias_out=False)
        moe = initialise(w_in, w_out, b_in, None, spec, how, "mlp")
        kept = [torch.stack([(moe.w_in[e, p * F : (p + 1) * F] == w_in[p * F : (p + 1) * F]).all(1) for e in range(E)])
                for p in range(2)]  # fmt: skip
        kept.append((moe.w_out == w_out).all(1))
        for each in kept:
            assert (each.sum(1) == F - r * F).all()
        for p in range(2):
            assert torch.equal(moe.b_in[:, p * F : (p + 1) * F] == b_in[p * F : (p + 1) * F], kept[p])
        intact = float((kept[0] & kept[1] & kept[2]).float().mean())
        assert intact == pytest.approx(whole, abs=0.02), indices


@pytest.mark.parametrize("method", ["split", "cluster"])
@pytest.mark.parametrize("program", ["swiglu", "gelu"])
def test_the_experts_of_a_split_sum_to_the_dense_block(method, program):
    (w_in, w_out, b_in, b_out), moe = made(method, dtype=torch.float64, experts=6, program=program)
    x = torch.randn(5, D, dtype=torch.float64)

    def ffn(w_in, w_out, b_in):
        h = x @ w_in.T + b_in
        parts = h.chunk(2, -1)
        return (torch.nn.functional.silu(parts[0]) * parts[1] if program == "swiglu"
                else torch.nn.functional.gelu(h)) @ w_out.T  # fmt: skip

    total = sum(ffn(moe.w_in[e], moe.w_out[e], moe.b_in[e]) for e in range(6)) / 6  # each counts 6-fold
    torch.testing.assert_close(total, ffn(w_in, w_out, b_in), rtol=1e-12, atol=1e-12)
    assert torch.equal(moe.b_out[0], b_out)


def test_without_scikit_learn_cluster_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(errors.MissingPackage, match=r"moepass\[upcycle\]"):
        made("cluster")
    assert made("cluster", device="meta")[1].w_in.is_meta


def test_drop_draws_with_the_mean_and_deviation_of_what_it_replaces():
    how = InitSpec(method="drop", drop_ratio=1.0)
    spec = complete(MoESpec(), F=512, D=64, program="gelu", init=how, bias_in=False, bias_out=False)
    w_in, w_out = 3.0 + 0.5 * torch.randn(512, 64), 2.0 * torch.randn(64, 512)
    moe = initialise(w_in, w_out, None, None, spec, how, "mlp")
    torch.testing.assert_close(moe.w_in[3].mean(), w_in.mean(), rtol=0.02, atol=0)
    torch.testing.assert_close(moe.w_in[3].std(), w_in.std(), rtol=0.05, atol=0)
    torch.testing.assert_close(moe.w_out[3].std(), w_out.std(), rtol=0.05, atol=0)


def test_a_bias_that_only_the_spec_has_starts_at_zero():
    spec = MoESpec(experts=ExpertSpec(bias_in=True, bias_out=True))
    spec = complete(spec, F=WIDTH, D=D, program="gelu", init=InitSpec(), bias_in=False, bias_out=False)
    moe = initialise(torch.randn(WIDTH, D), torch.randn(D, WIDTH), None, None, spec, InitSpec(), "mlp")
    assert torch.count_nonzero(moe.b_in) == 0
    assert moe.b_in.shape == (8, WIDTH // 2)
    assert torch.count_nonzero(moe.b_out) == 0
    assert moe.b_out.shape == (8, D)
