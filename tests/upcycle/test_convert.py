"""``moepass.convert`` on hand-written modules: what is found, where the MoE goes, and that nothing else changes."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moepass import errors
from moepass.nn import MoE
from moepass.spec import ExpertSpec, InitSpec, MoESpec, RouterSpec
from moepass.upcycle.convert import convert
from moepass.upcycle.init import MoEWeights

D, WIDTH = 16, 32


class Gated(nn.Module):
    """The whole forward is the block."""

    def __init__(self, bias=False):
        super().__init__()
        self.gate, self.up = nn.Linear(D, WIDTH, bias), nn.Linear(D, WIDTH, bias)
        self.down = nn.Linear(WIDTH, D, bias)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Spliced(Gated):
    """A dropout follows a gated block, in the same forward."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        return self.drop(super().forward(x))


class FunctionalDropout(Gated):
    """As Spliced, by a function that reads the training flag: torch.fx would freeze it."""

    def forward(self, x):
        return F.dropout(super().forward(x), 0.1, training=self.training)


class TakesTwo(Gated):
    """A second argument: no MoE can stand in for the module, but its forward can be rewritten."""

    def forward(self, x, scale=1.0):
        return super().forward(x) * scale


class Raw(nn.Module):
    """Parameters of its own, stored [in, out]."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(D, WIDTH)), nn.Parameter(torch.randn(WIDTH, D))

    def forward(self, x):
        return torch.relu(x @ self.a) @ self.b


def chain(*between, bias=True):
    return nn.Sequential(
        nn.LayerNorm(D), nn.Linear(D, WIDTH, bias), *between, nn.Linear(WIDTH, D, bias), nn.Dropout(0.1)
    )


class Stack(nn.Module):
    """Residual blocks around given feed-forward modules, and a head."""

    def __init__(self, *blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(D, 5)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def converted(model, **options):
    """(report, largest relative change of the output in evaluation mode)."""
    x = torch.randn(4, 7, D, generator=torch.Generator().manual_seed(3)).to(next(model.parameters()).dtype)
    flags = [m.training for m in model.modules()]
    before = copy.deepcopy(model).eval()(x)
    assert [m.training for m in model.modules()] == flags
    report = convert(model, **options)
    after = copy.deepcopy(model).eval()(x)
    return report, float(((after - before).abs().max() / before.abs().max()).detach())


@pytest.mark.parametrize(
    ("block", "where"),
    [
        (Gated(), "blocks.0"),
        (Gated(bias=True), "blocks.0"),
        (Spliced(), "blocks.0.moe"),
        (TakesTwo(), "blocks.0.moe"),
        (Raw(), "blocks.0"),
        (nn.Sequential(nn.Linear(D, WIDTH), nn.GELU(), nn.Linear(WIDTH, D)), "blocks.0"),
        (chain(nn.GELU()), "blocks.0.1"),
        (chain(nn.ReLU(), nn.Dropout(0.2)), "blocks.0.1"),
        (chain(nn.Sequential(nn.SiLU(), nn.Identity()), bias=False), "blocks.0.1"),
    ],
    ids=[
        "module",
        "biases",
        "splice",
        "arguments",
        "raw parameters",
        "sequential",
        "chain",
        "chain with dropout",
        "nested activation",
    ],
)
def test_blocks_are_found_wherever_they_are_and_the_function_stays(block, where):
    model = Stack(block)
    dense = {id(p) for p in block.parameters() if max(p.shape) == WIDTH}
    report, change = converted(model)
    assert [site.where for site in report.converted] == [where]
    assert report.exact
    assert change < 1e-6
    moe = model.get_submodule(where)
    assert isinstance(moe, MoE)
    assert dense
    assert dense.isdisjoint(id(p) for p in model.parameters())
    assert {id(p) for p in moe.parameters()} <= {id(p) for p in model.parameters()}
    assert sum(p.numel() for p in moe.parameters()) == report.parameters_after


def test_a_spliced_forward_keeps_its_other_arguments():
    block = TakesTwo()
    twin = copy.deepcopy(block)
    model = Stack(block)
    convert(model)
    x = torch.randn(3, D)
    torch.testing.assert_close(model.blocks[0](x, scale=-2.0), twin(x, scale=-2.0))


def test_dropout_inside_the_block_moves_into_the_experts_and_dropout_behind_it_stays():
    model = Stack(chain(nn.ReLU(), nn.Dropout(0.2)))
    convert(model.eval())
    moe = model.blocks[0][1]
    assert moe.spec.experts.dropout == 0.2
    assert not moe.training
    assert isinstance(model.blocks[0][3], nn.Identity)
    assert model.blocks[0][5].p == 0.1


def test_the_spliced_module_keeps_its_class_and_can_be_copied_and_trained():
    model = Stack(Spliced())
    convert(model)
    assert type(model.blocks[0]) is Spliced
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.blocks[0].moe.w_out.zero_()
    x = torch.randn(3, D)
    assert not torch.allclose(model.eval()(x), twin.eval()(x))
    torch.testing.assert_close(twin(x), twin.head(x))


def test_two_blocks_of_one_forward_are_both_spliced():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(D, WIDTH), nn.Linear(WIDTH, D)
            self.c, self.d = nn.Linear(D, WIDTH), nn.Linear(WIDTH, D)
            self.norm = nn.LayerNorm(D)

        def forward(self, x):
            x = x + self.b(F.gelu(self.a(x)))
            return x + self.d(F.relu(self.c(self.norm(x))))

    model = Stack(Two())
    report, change = converted(model)
    assert [(s.id, s.where, s.activation) for s in report.converted] == [
        ("blocks.0.a", "blocks.0.moe", "gelu(g)"),
        ("blocks.0.c", "blocks.0.moe_1", "relu(g)"),
    ]
    assert change < 1e-6


def test_a_chain_in_the_root_module_is_converted_and_a_root_that_is_the_block_says_why_not():
    root = chain(nn.GELU())
    assert [s.where for s in converted(root)[0].converted] == ["1"]
    with pytest.warns(UserWarning, match="changed nothing"):
        report = convert(Gated())
    assert [(s.id, s.reason) for s in report.skipped] == [("(root)", "root_module")]


def test_a_block_without_a_boundary_is_left_alone_with_a_hint():
    model = Stack(FunctionalDropout())
    text = repr(model)
    with pytest.warns(UserWarning, match="one-line form"):
        report = convert(model)
    assert report.converted == ()
    assert ("blocks.0", "no_module_boundary") in {(s.id, s.reason) for s in report.skipped}
    assert repr(model) == text


def test_near_misses_are_reported_with_their_codes_and_nothing_is_taken():
    class Lora(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(D, 4, bias=False), nn.Linear(4, D, bias=False)

        def forward(self, x):
            return self.b(self.a(x))

    with pytest.warns(UserWarning, match="changed nothing"):
        report = convert(Stack(Lora()))
    assert {(s.id, s.reason) for s in report.skipped} == {("blocks.0.b", "no_nonlinearity")}


def test_a_second_call_changes_nothing_and_says_why():
    model = Stack(Gated(), chain(nn.GELU()))
    convert(model)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = convert(model)
    assert again.converted == ()
    assert {(s.id, s.reason) for s in again.skipped} == {("blocks.0", "already_moe"), ("blocks.1.1", "already_moe")}
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"every": 2}, [1, 3]),
        ({"every": 5}, [4]),
        ({"layers": "blocks.1, blocks.3"}, [1, 3]),
        ({"layers": ["blocks.[0-2]"]}, [0, 1, 2]),
        ({"layers": "blocks.[1-4]", "every": 2}, [2, 4]),
    ],
)
def test_globs_and_every_nth_choose_the_blocks_in_model_order(options, expected):
    report, change = converted(Stack(*(Gated() for _ in range(5))), **options)
    assert [s.id for s in report.converted] == [f"blocks.{i}" for i in expected]
    left = [f"blocks.{i}" for i in range(5) if i not in expected]
    assert [s.id for s in report.skipped if s.reason == "not_selected"] == left
    assert change < 1e-6


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


def test_a_module_shared_between_layers_stays_shared():
    shared = Gated()
    model = Stack(shared, Gated(), shared)
    report, change = converted(model)
    assert change < 1e-6
    assert model.blocks[0] is model.blocks[2]
    assert isinstance(model.blocks[0], MoE)
    assert len(report.converted) == 2


def test_two_modules_with_the_same_parameters_share_one_moe():
    model = Stack(Gated(), Gated())
    for name in ("gate", "up", "down"):
        getattr(model.blocks[1], name).weight = getattr(model.blocks[0], name).weight
    report, change = converted(model)
    assert change < 1e-6
    assert len(report.converted) == 2
    assert model.blocks[0] is model.blocks[1]


def test_a_weight_that_is_tied_to_something_else_is_not_untied():
    model = Stack(Gated(), nn.Linear(WIDTH, D, bias=False))
    model.blocks[1].weight = model.blocks[0].down.weight
    with pytest.warns(UserWarning, match="tied_weight"):
        report = convert(model)
    assert ("blocks.0", "tied_weight") in {(s.id, s.reason) for s in report.skipped}
    assert isinstance(model.blocks[0], Gated)


def test_instances_that_differ_only_in_their_settings_are_not_confused():
    class Activated(nn.Module):
        def __init__(self, fn):
            super().__init__()
            self.a, self.b, self.fn = nn.Linear(D, WIDTH), nn.Linear(WIDTH, D), fn

        def forward(self, x):
            return self.b(self.fn(self.a(x)))

    report, change = converted(Stack(Activated(F.relu), Activated(F.gelu), Activated(F.relu)))
    assert [s.activation for s in report.converted] == ["relu(g)", "gelu(g)", "relu(g)"]
    assert change < 1e-6


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
