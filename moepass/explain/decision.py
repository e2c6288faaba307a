"""The part of a site's entry in a report that was decided: what a fingerprint covers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moepass.explain.report import SitePlan


def decision(site: SitePlan) -> dict[str, Any]:
    """Everything but seconds, prose, and the representative T inside a range."""
    seconds_and_prose = {
        "id",
        "shared_by",
        "detail",
        "hint",
        "evidence",
        "predicted",
        "measured",
        "decided_by",
        "alternatives",
        "ep",
    }
    data = site.model_dump(mode="json", exclude=seconds_and_prose)
    if site.workload is not None:
        if site.tokens is not None:
            data["workload"].pop("tokens")
        if site.workload.mesh is None:  # one rank: decided as before there were meshes
            for field in ("mesh", "same_tokens", "buffer_factor", "shared"):
                data["workload"].pop(field)
    if site.ep is not None:
        data["ep"] = [site.ep.form, sorted([o.form, o.legal, o.reason or ""] for o in site.ep.options)]
    data["alternatives"] = sorted([a.lowering, a.legal, a.reason or ""] for a in site.alternatives)
    return data
