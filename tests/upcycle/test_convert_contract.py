"""What ``moepass.convert`` promises beside finding blocks: what carries over, what is refused, what works after."""

from __future__ import annotations

import copy

import pytest
import torch
from blocks import WIDTH, D, Gated, Spliced, Stack, chain, converted
from torch import nn

from moepass import errors
from moepass.spec import ExpertSpec, InitSpec, MoESpec, RouterSpec
from moepass.upcycle.convert import convert
from moepass.upcycle.init import MoEWeights


def test_weights_do_not_depend_on_order_or_on_which_other_blocks_are_converted():
    model = Stack(Gated(), Gated(), Gated())
    twin = copy.deepcopy(model)
    convert(model, init="drop", seed=4)
    convert(twin, init="drop", seed=4, layers="blocks.2")
    convert(twin, init=InitSpec(method="drop", seed=4))
    a, b = model.state_dict(), twin.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_global_generator_is_left_alone():
    model = Stack(Gated(), chain(nn.ReLU(), nn.Dropout(0.2)), Spliced())
    state = torch.get_rng_state()
    convert(model, init="copy+noise")
    assert torch.equal(torch.get_rng_state(), state)


def test_flags_dtypes_and_requires_grad_carry_over():
    model = Stack(Gated(), Gated()).to(torch.bfloat16)
    model.blocks[0].eval().requires_grad_(False)
    report = convert(model)
    assert len(report.converted) == 2
    assert not model.blocks[0].training
    assert model.blocks[1].training
    assert {p.requires_grad for p in model.blocks[0].parameters()} == {False}
    assert {p.requires_grad for p in model.blocks[1].parameters()} == {True}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_bfloat16_with_a_scale_that_rounds_is_still_verified_and_kept():
    spec = MoESpec(router=RouterSpec(score="sigmoid", scale=2.5))
    report, change = converted(Stack(Gated(bias=True)).to(torch.bfloat16), spec=spec)
    assert report.exact
    assert change < 0.03


def test_on_the_meta_device_no_data_is_touched():
    with torch.device("meta"):
        model = Stack(Gated(), chain(nn.GELU()), Spliced())
    report = convert(model)
    assert len(report.converted) == 3
    assert all(p.is_meta for p in model.parameters())
    real = Stack(Gated(), chain(nn.GELU()), Spliced())
    convert(real)
    assert {n: t.shape for n, t in model.state_dict().items()} == {n: t.shape for n, t in real.state_dict().items()}


def test_a_block_that_does_not_verify_is_put_back(monkeypatch):
    model = Stack(Gated(), chain(nn.GELU()), Spliced())
    twin = copy.deepcopy(model)
    monkeypatch.setattr("moepass.upcycle.convert.initialise", _wrong(monkeypatch))
    with pytest.warns(UserWarning, match="verification_failed"):
        report = convert(model)
    assert [s.reason for s in report.skipped] == ["verification_failed"] * 3
    x = torch.randn(3, D)
    assert torch.equal(model.eval()(x), twin.eval()(x))
    assert model.state_dict().keys() == twin.state_dict().keys()


class InBfloat16(Gated):
    """A block that computes in one dtype, whatever it is given."""

    def forward(self, x):
        return super().forward(x.to(torch.bfloat16))


def test_a_block_that_does_not_run_in_float32_stays_dense_and_the_others_are_converted():
    model = Stack(Gated(), InBfloat16(), Gated()).to(torch.bfloat16)
    report = convert(model)
    assert [s.id for s in report.converted] == ["blocks.0", "blocks.2"]
    (left,) = report.skipped
    assert (left.id, left.reason) == ("blocks.1", "verification_failed")
    assert "does not run in float32" in left.detail
    assert isinstance(model.blocks[1], InBfloat16)


def _wrong(monkeypatch):
    from moepass.upcycle.init import initialise

    def wrong(*args):
        return initialise(*args)._replace(w_out=initialise(*args).w_out * 1.001)

    return wrong


@pytest.mark.parametrize(
    ("spec", "options", "error"),
    [
        (MoESpec(experts=ExpertSpec(intermediate_size=WIDTH)), {}, errors.SpecContradictsDense),
        (MoESpec(router=RouterSpec(top_k=3)), {}, errors.NotDivisible),
        (None, {"init": InitSpec(granularity=8)}, errors.NotDivisible),
        (None, {"init": "copies"}, errors.BadOption),
        (None, {"every": 0}, errors.BadOption),
        (None, {"init": InitSpec(seed=1), "seed": 2}, errors.BadOption),
    ],
)
def test_an_impossible_request_raises_before_anything_changes(spec, options, error):
    model = Stack(Gated(), Gated())
    text = repr(model)
    with pytest.raises(error):
        convert(model, spec, **options)
    assert repr(model) == text


def test_compiled_and_wrapped_models_are_refused():
    with pytest.raises(errors.CannotConvert, match="_orig_mod"):
        convert(torch.compile(Stack(Gated())))
    with pytest.raises(errors.CannotConvert, match="DataParallel"):
        convert(nn.DataParallel(Stack(Gated())))


def test_sharded_parameters_are_refused():
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = Stack(Gated())
        mesh = init_device_mesh("cpu", (1,))
        model.blocks[0].up.weight = nn.Parameter(distribute_tensor(model.blocks[0].up.weight.data, mesh, [Shard(0)]))
        with pytest.raises(errors.CannotConvert, match=r"blocks\.0\.up\.weight is sharded"):
            convert(model)
    finally:
        torch.distributed.destroy_process_group()


def test_parameters_of_an_unknown_kind_are_left_alone():
    class Special(nn.Parameter):
        """As quantisation libraries have them."""

    model = Stack(Gated(), Gated())
    model.blocks[0].up.weight = Special(model.blocks[0].up.weight.detach())
    report = convert(model)
    assert [s.id for s in report.converted] == ["blocks.1"]
    assert [s.id for s in report.skipped] == ["blocks.0"]
    assert isinstance(model.blocks[0].up.weight, Special)


def test_the_hook_supplies_weights_and_keeps_parameters_that_are_trained_already():
    model, donor = Stack(Gated(), Gated()), Stack(Gated(), Gated())
    convert(donor)
    trained = donor.blocks[0]
    seen = []

    def weights_for(info):
        seen.append((info.id, info.where, info.spec.experts.intermediate_size, info.down.shape))
        if info.id == "blocks.1":
            return None
        return MoEWeights(trained.router.weight, trained.w_in, trained.w_out, None, None)

    report = convert(model, weights_for=weights_for)
    assert seen == [(f"blocks.{i}", f"blocks.{i}", WIDTH // 2, (D, WIDTH)) for i in range(2)]
    assert model.blocks[0].w_in is trained.w_in
    assert isinstance(model.blocks[1], Gated)
    assert [(s.id, s.reason) for s in report.skipped] == [("blocks.1", "no_state")]


def test_inexact_methods_say_so_in_the_report():
    report = convert(Stack(Gated()), init="drop")
    assert not report.exact
    assert "not exact: 50% of the channels" in str(report)
    exact = convert(Stack(Gated()))
    assert "the function is unchanged" in str(exact)
    assert "swiglu, 8 experts of 16x16, top-2, 1,536 -> 6,272 parameters, exact" in str(exact)


def test_the_converted_model_trains_every_parameter_of_the_moe():
    model = Stack(Gated(), Spliced())
    convert(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(64, D, generator=torch.Generator().manual_seed(0))).square().mean().backward()
    optimizer.step()
    unchanged = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert unchanged == []


def test_the_converted_model_compiles_in_one_graph():
    model = Stack(Gated(), chain(nn.GELU()), Spliced()).eval()
    convert(model)
    x = torch.randn(9, D)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
