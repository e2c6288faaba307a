"""The backend's options at work: converting or not, specs, plans that are pinned or measured, refusals."""

from __future__ import annotations

import pytest
import torch
from tiny import WIDTH, D, Net, assert_close, compiled

import moepass
from moepass.spec import DispatchSpec, ExpertSpec, InitSpec, MoESpec, RouterSpec


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)


def test_unknown_option_names_the_nearest_one():
    with pytest.raises(Exception, match="did you mean 'measure'"):
        compiled(Net(), measur=True)(torch.randn(2, D))


def test_inductor_option_at_the_wrong_level_says_where_it_belongs():
    with pytest.raises(Exception, match="it is an Inductor option"):
        compiled(Net(), max_autotune=True)(torch.randn(2, D))


def test_convert_false_leaves_the_ffn_dense():
    model, x = Net(), torch.randn(8, D)
    assert torch.equal(compiled(model, "eager", convert=False)(x), model(x))
    assert {s.reason for s in moepass.last_plan().sites} == {"conversion_off"}


def test_other_inits_and_specs_are_honoured():
    model, x = Net(1), torch.randn(8, D)
    spec = MoESpec(router=RouterSpec(top_k=2), experts=ExpertSpec(num_experts=4))
    assert_close(compiled(model, spec=spec, convert="copy")(x), model(x))
    site = moepass.last_plan().sites[0]
    assert (site.workload.E, site.workload.F, site.init) == (4, WIDTH, "copy, exact")


def test_indivisible_width_is_skipped_with_a_reason_and_raises_under_strict():
    model, x = Net(1), torch.randn(8, D)
    init = InitSpec(granularity=3)
    spec = MoESpec(router=RouterSpec(top_k=3), experts=ExpertSpec(num_experts=9))
    assert torch.equal(compiled(model, "eager", spec=spec, convert=init)(x), model(x))
    assert moepass.last_plan().sites[0].reason == "not_divisible"
    with pytest.raises(Exception, match="not divisible by granularity=3"):
        compiled(model, "eager", spec=spec, convert=init, strict=True)(x)


def test_a_limit_on_what_is_kept_for_backward_leaves_out_what_keeps_more_and_can_be_read_in_the_plan():
    model, x = Net(1), torch.randn(64, D)
    free, tight = (moepass.explain(model, save_limit=limit)(x).sites[0] for limit in (None, 1))
    kept = {a.lowering: a.predicted.saved_bytes for a in free.alternatives if a.legal}
    assert len(kept) > 1
    assert kept[tight.lowering] == min(kept.values())
    assert {a.reason for a in tight.alternatives if a.lowering in kept and not a.legal} == {"save_limit"}
    assert (free.workload.save_limit, tight.workload.save_limit) == (None, 1)


def test_a_dropping_spec_uses_capacity():
    model, x = Net(1), torch.randn(64, D)
    compiled(model, spec=MoESpec(dispatch=DispatchSpec(capacity_factor=1.0)))(x)
    site = moepass.last_plan().sites[0]
    assert site.lowering == "capacity"
    assert "may drop tokens" in site.init


@pytest.mark.parametrize(
    ("field", "spec"),
    [
        ("router.bias", MoESpec(router=RouterSpec(bias=True))),
        ("router.jitter", MoESpec(router=RouterSpec(jitter=0.1))),
        ("experts.output_scale", MoESpec(experts=ExpertSpec(output_scale=True))),
        ("dispatch.scope", MoESpec(dispatch=DispatchSpec(capacity_factor=1.0, scope="sequence"))),
    ],
)
def test_a_spec_that_the_rewrite_cannot_carry_is_never_dropped_silently(field, spec):
    model, x = Net(1), torch.randn(8, D)
    assert torch.equal(compiled(model, "eager", spec=spec)(x), model(x))
    site = moepass.last_plan().sites[0]
    assert (site.status, site.reason) == ("skipped", "not_in_one_line")
    assert field in site.detail
    with pytest.raises(Exception, match="use moepass"):
        compiled(model, "eager", spec=spec, strict=True)(x)


def test_measure_decides_by_measurement(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEPASS_CACHE_DIR", str(tmp_path))
    model, x = Net(1), torch.randn(8, D)
    assert_close(compiled(model, measure=True)(x), model(x))
    site = moepass.last_plan().sites[0]
    assert site.decided_by == "measurement"
    assert site.measured > 0


def test_pinned_plan_is_replayed(tmp_path):
    model, x = Net(), torch.randn(8, D)
    compiled(model)(x)
    report = moepass.last_plan()
    other = "grouped" if report.sites[0].lowering != "grouped" else "dense"
    path = tmp_path / "plan.json"
    path.write_text(
        report.to_json().replace(
            f'"lowering": "{report.sites[0].lowering}",\n      "alternatives"',
            f'"lowering": "{other}",\n      "alternatives"',
        )
    )
    torch._dynamo.reset()
    assert_close(compiled(model, plan=str(path), strict=True)(x), model(x))
    assert {(s.lowering, s.decided_by) for s in moepass.last_plan().sites} == {(other, "pin")}


def test_plan_of_another_model_falls_back_with_a_reason_and_raises_under_strict(tmp_path):
    compiled(Net(1))(torch.randn(8, D))
    path = tmp_path / "plan.json"
    path.write_text(moepass.last_plan().to_json())
    model, x = Net(2), torch.randn(8, D)
    torch._dynamo.reset()
    assert_close(compiled(model, plan=str(path))(x), model(x))
    assert moepass.last_plan().site("layers.1").reason == "plan_mismatch"
    said = r"the pinned plan .*plan\.json does not fit: it has no lowered site 'layers\.1'"
    with pytest.raises(Exception, match=said):
        compiled(model, plan=str(path), strict=True)(x)


@pytest.mark.parametrize("content", ["not json", "{}", '{"schema_version": "9.0"}'])
def test_unreadable_plan_file_is_a_clear_error(tmp_path, content):
    path = tmp_path / "plan.json"
    path.write_text(content)
    with pytest.raises(Exception, match="not a moepass plan report"):
        compiled(Net(1), plan=str(path), strict=True)(torch.randn(8, D))


def test_internal_failure_compiles_without_the_rewrite_and_says_so_once(monkeypatch, caplog):
    def explode(*args, **kwargs):
        raise RuntimeError("boom")

    monkeypatch.setattr("moepass.backend.rewrite", explode)
    model, x = Net(1), torch.randn(8, D)
    assert_close(compiled(model)(x), model(x))
    assert moepass.last_plan().sites[0].reason == "internal_error"
    assert caplog.text.count("compiled without the rewrite: RuntimeError: boom") == 1
    with pytest.raises(Exception, match="boom"):
        compiled(model, strict=True)(x)
