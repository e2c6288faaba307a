"""Every user-facing error of moepass.

Each class carries a stable ``code`` (the same codes appear as ``reason`` in plan reports) and a message template
that names the value, the place and the change to make.  Raise with keyword arguments only::

    raise TopKTooLarge(top_k=9, experts=8, where="model.layers.3.mlp")
"""

from __future__ import annotations

from typing import Any, ClassVar


class MoepassError(Exception):
    """Base of all errors that a user of moepass may see."""

    code: ClassVar[str] = "moepass_error"
    template: ClassVar[str] = "{detail}"

    def __init__(self, **fields: Any) -> None:
        self.fields = fields
        super().__init__(self.template.format(**fields))


class SpecError(MoepassError):
    """A spec whose semantics are impossible or would not train.

    Not a ValueError on purpose: pydantic would wrap that and hide the class.
    """

    code = "bad_spec"


class TopKTooLarge(SpecError):
    """More experts per token than there are experts."""

    code = "top_k_too_large"
    template = "top_k={top_k} exceeds the {experts} experts of {where}; choose top_k <= {experts}"


class DeadRouter(SpecError):
    """top_k=1 with renormalised weights: the router's weight is 1 whatever it says, so it gets no gradient."""

    code = "dead_router"
    template = (
        "top_k=1 with normalize={normalize} gives every routing weight the value 1, so the router of {where} can "
        "never learn; choose top_k >= 2, or RouterSpec(normalize=None)"
    )


class NotDivisible(SpecError):
    """A width or a count that does not divide as the recipe needs."""

    code = "not_divisible"
    template = "{what}={value} of {where} is not divisible by {by_what}={by}; {remedy}"


class BadActivation(SpecError):
    """An activation expression that the grammar does not accept."""

    code = "unknown_activation"
    template = "activation {text!r} is not understood: {detail}; known names: {known}"


class UnknownOption(MoepassError, ValueError):
    """An option of ``torch.compile(..., backend="moepass", options=...)`` that does not exist."""

    code = "unknown_option"
    template = "unknown moepass option {name!r}{suggestion}; the options are {known}"


class BadOption(MoepassError, ValueError):
    """An option with a value that cannot be used."""

    code = "bad_option"
    template = "option {name!r} has the value {value!r}: {detail}"


class UnknownHardware(MoepassError, ValueError):
    """A hardware profile name that is not a preset and not a file."""

    code = "unknown_hardware"
    template = "unknown hardware {name!r}{suggestion}; the presets are {known}, or give the path of a profile"


class BadProfile(MoepassError, ValueError):
    """A hardware profile file that cannot be read or does not hold a profile."""

    code = "bad_profile"
    template = "{path} is not a hardware profile: {detail}; `moepass calibrate` writes a valid one"


class NoLegalLowering(MoepassError):
    """Every lowering refused a workload."""

    code = "no_legal_lowering"
    template = "no lowering can serve {where}: {reasons}"


class BadPin(MoepassError, ValueError):
    """A pinned lowering that does not exist, or that may not serve the workload."""

    code = "bad_pin"
    template = "the lowering {name!r} cannot be pinned for {where}: {detail}; the lowerings are {known}"


class NotMeasured(MoepassError):
    """A question about measured times, asked of a plan without any."""

    code = "not_measured"
    template = "the plan for {where} holds no measured time of {lowering!r}; plan with measure=True"


class PlanMismatch(MoepassError, ValueError):
    """A pinned plan that does not fit this model or this version."""

    code = "plan_mismatch"
    template = "the pinned plan {path} does not fit: {detail}; remove options['plan'] or dump the plan anew"


class NoSites(MoepassError):
    """strict=True and nothing to rewrite."""

    code = "no_sites"
    template = "no feed-forward site was found in {where} ({candidates} candidates, reasons: {reasons})"


class SiteRejected(MoepassError):
    """strict=True and a candidate that could not be rewritten."""

    code = "site_rejected"
    template = "{where}: {reason} ({detail}); use strict=False to leave it dense"


class NoState(MoepassError):
    """The one-line form has not run yet, so no MoE state hangs on the model."""

    code = "no_state"
    template = (
        "no MoE state is attached to {where}: run the model compiled with backend='moepass' once (a forward under "
        "torch.no_grad() is enough), or use moepass.convert before building the optimizer"
    )


class BadReport(PlanMismatch):
    """Text that is not a plan report, or one of another schema version."""

    code = "bad_report"
    template = (
        "this is not a moepass plan report: {detail}; write one with PlanReport.to_json() or "
        "`moepass explain MODEL --format json` of this version"
    )


class CannotMerge(MoepassError, ValueError):
    """Two plan reports that do not describe one configuration."""

    code = "cannot_merge"
    template = "plan reports with different {what} ({ours!r} and {theirs!r}) cannot be merged; explain them separately"


class NoSuchSite(MoepassError, LookupError):
    """A site or a token count that a plan report does not cover."""

    code = "no_such_site"
    template = "{detail}; PlanReport.sites lists what was planned"


class BadTarget(MoepassError, ValueError):
    """MODEL on the command line that cannot be loaded or fed."""

    code = "bad_target"
    template = "MODEL {target!r}: {detail}; {remedy}"


class MissingPackage(MoepassError, ImportError):
    """An optional package that is not installed."""

    code = "missing_package"
    template = "{what} needs the package {package!r}, which is not installed; pip install '{install}'"


class IncompleteSpec(SpecError):
    """A spec that leaves open what only a dense FFN could supply."""

    code = "incomplete_spec"
    template = (
        "ExpertSpec.{missing} is None, and {where} has no dense block to take it from; give it, or use moepass.convert"
    )


class SpecContradictsDense(SpecError):
    """A spec whose width or activation cannot come out of the dense FFN it is to be made from."""

    code = "spec_contradicts_dense"
    template = (
        "{field}={value!r} contradicts the dense block {where}, which gives {dense!r}; leave ExpertSpec.{field}=None"
    )


class CannotConvert(MoepassError, TypeError):
    """A model in a state in which its modules must not be exchanged."""

    code = "cannot_convert"
    template = "{where} cannot be converted: {detail}; the order is convert -> EP/TP -> FSDP -> optimizer -> compile"
