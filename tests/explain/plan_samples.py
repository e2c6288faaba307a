"""Reports made by hand, shared by the tests of the report and its views."""

from __future__ import annotations

from moepass.explain.report import GraphPlan, PlanReport, SitePlan
from moepass.lowering.plan import Alternative, Plan, Price, TokenRange, Workload

WORK = Workload(tokens=64, D=64, F=96, E=8, K=2, n=2, dtype="bfloat16", device="cuda")
CAPACITY = Alternative(lowering="capacity", legal=False, reason="dropless", detail="the spec keeps every token")


def priced(lowering: str, seconds: float, measured: float | None = None) -> Alternative:
    return Alternative(lowering=lowering, legal=True, predicted=Price(compute=seconds), measured=measured)


def small(measured: float | None = None) -> Plan:
    """T in [2, 511]: dense wins."""
    alternatives = (priced("dense", 40e-6, measured), priced("grouped", 60e-6), priced("gathered", 3.1e-3), CAPACITY)
    return Plan(
        lowering="dense", tokens=TokenRange(low=2, high=511), workload=WORK, alternatives=alternatives, hardware="H100"
    )


def large() -> Plan:
    """T >= 512: grouped wins."""
    work = WORK.model_copy(update={"tokens": 4096})
    alternatives = (priced("grouped", 1.2e-3), priced("dense", 9.6e-3), CAPACITY)
    return Plan(
        lowering="grouped", tokens=TokenRange(low=512), workload=work, alternatives=alternatives, hardware="H100"
    )


def lowered(id: str, plan: Plan, guard: str | None = None) -> SitePlan:
    return SitePlan.from_plan(id, "dense_ffn", plan, activation="silu(g)*u", init="virtual_groups, exact", guard=guard)


def skipped(id: str) -> SitePlan:
    return SitePlan(
        id=id,
        kind="dense_ffn",
        status="skipped",
        reason="hidden_escapes",
        detail="mul is also read by sum",
        hint="keep the hidden tensor inside the block",
    )


def failed(id: str) -> SitePlan:
    return SitePlan(id=id, kind="moe", status="fallback", reason="internal_error", detail="KeyError: 'w'")


def report(*sites: SitePlan, **fields: object) -> PlanReport:
    settings = {"moepass_version": "0.1.0", "torch_version": "2.13.0", "hardware": "H100", "device": "cuda"}
    return PlanReport.model_validate({**settings, **fields, "sites": sites})


def model(layers: int = 12) -> PlanReport:
    """Twelve equal layers with two ranges each, two near misses, one failure."""
    names = [f"model.layers.{i}.mlp" for i in range(layers)]
    sites = [s for n in names for s in (lowered(n, small(), "T <= 511"), lowered(n, large(), "T >= 512"))]
    sites += [skipped("model.layers.2.side"), skipped("model.layers.3.side"), failed("head.moe")]
    return report(
        *sites,
        settings={"inner": "inductor", "convert": True},
        graphs=(GraphPlan(index=0, guards=("T <= 511",), cache="miss"),),
        notes=("head.moe stays as it was: KeyError",),
    )
