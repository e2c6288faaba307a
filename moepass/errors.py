"""Every user-facing error of moepass.

Each class carries a stable ``code`` (the same codes appear as ``reason`` in plan reports) and a message template
that names the value, the place and the change to make.  Raise with keyword arguments only::

    raise TopKTooLarge(top_k=9, experts=8, where="model.layers.3.mlp")
"""

from __future__ import annotations

from moepass.errors_base import MoepassError as MoepassError
from moepass.errors_base import first_line as first_line
from moepass.errors_nn import LossDivFactor as LossDivFactor
from moepass.errors_nn import NoLayers as NoLayers
from moepass.errors_nn import NoRouters as NoRouters
from moepass.errors_nn import NotRecorded as NotRecorded
from moepass.errors_nn import ReplayMismatch as ReplayMismatch
from moepass.errors_nn import UnknownTopK as UnknownTopK
from moepass.errors_nn import UnsupportedExperts as UnsupportedExperts


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


class SpecConflict(SpecError):
    """A field of a spec that contradicts another, or means nothing without it."""

    code = "spec_conflict"
    template = "{field}={value!r} of {where} {detail}; {remedy}"


class NoSequences(SpecError):
    """A scope of sequences, and nobody says where they end."""

    code = "no_sequences"
    template = (
        "DispatchSpec.scope={scope!r} of {where} needs to know where sequences end; give x of shape [B, S, D], or "
        "sequences=(B, S)"
    )


class NotInOneLine(SpecError):
    """A spec that needs a module, where the backend rewrites a dense block into two ops."""

    code = "not_in_one_line"
    template = (
        "{field}={value!r} cannot be carried by the one-line form (options={{'spec': ...}}), which puts no module in "
        "the place of {where}; use moepass.convert(model, spec) before torch.compile"
    )


class NotFromDense(SpecError):
    """A part of a spec for which a dense block has no weights."""

    code = "not_from_dense"
    template = "{field}={value!r} cannot be made from the dense block {where}: {detail}; {remedy}"


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


class UnknownLink(MoepassError, ValueError):
    """A link between ranks that is not a preset and not a file."""

    code = "unknown_link"
    template = "unknown link {name!r}{suggestion}; the presets are {known}, or give the path of a profile"


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


class NoLegalForm(NoLegalLowering, ValueError):
    """A block whose experts no expert-parallel form can spread over a mesh."""

    code = "no_legal_form"
    template = "no expert-parallel form serves {where} on the mesh {mesh}: {reasons}"


class BadPin(MoepassError, ValueError):
    """A pinned lowering that does not exist, or that may not serve the workload."""

    code = "bad_pin"
    template = "the lowering {name!r} cannot be pinned for {where}: {detail}; the lowerings are {known}"


class FusedUnavailable(MoepassError):
    """The fused kernels, asked to run where Triton cannot."""

    code = "fused_unavailable"
    template = (
        "the fused kernels cannot run on {device}: they need Triton and an accelerator, or a CPU with "
        "TRITON_INTERPRET=1 set before Triton is imported; choose another lowering or move the tensors"
    )


class FusedOperands(MoepassError, ValueError):
    """Operands that the fused kernels do not take."""

    code = "fused_operands"
    template = "the fused kernels do not take these operands ({detail}); {remedy}"


class NotMeasured(MoepassError):
    """A question about measured times, asked of a plan without any."""

    code = "not_measured"
    template = "the plan for {where} holds no measured time of {lowering!r}; plan with measure=True"


class PlanMismatch(MoepassError, ValueError):
    """A pinned plan that does not fit this model or this version."""

    code = "plan_mismatch"
    template = "the pinned plan {path} does not fit: {detail}; remove options['plan'] or dump the plan anew"


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


class CannotMaterialize(MoepassError):
    """MoE state of the one-line form that cannot become a module of the model."""

    code = "cannot_materialize"
    template = "the MoE state of {where} cannot become a module of the model, which is unchanged: {detail}"


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


class MissingCapability(MoepassError, RuntimeError):
    """A torch without a private API, where guessing would give wrong numbers."""

    code = "missing_capability"
    template = "this torch lacks what moepass needs to {capability} ({detail}); use one of docs/versions.md"


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


class BadCheckpoint(MoepassError, ValueError):
    """A Hugging Face folder that cannot be read, is damaged, contradicts itself, or is quantised."""

    code = "bad_checkpoint"
    template = "{path}: {detail} [{reason}]; {remedy}"


class BadDestination(MoepassError, ValueError):
    """A folder that cannot take the output, or does not hold what a resumed run should continue."""

    code = "bad_destination"
    template = "cannot write to {path}: {detail} [{reason}]; {remedy}"


class BadOutTensor(MoepassError, ValueError):
    """A planned tensor that contradicts the source, another tensor, or what its function returned."""

    code = "bad_out_tensor"
    template = "the planned tensor {name!r} {detail}"


class MixedLayouts(MoepassError, ValueError):
    """A state dict that is neither that of the dense model nor that of the converted one."""

    code = "mixed_layouts"
    template = "this state dict cannot be loaded into {where}: {detail} ({keys}); {remedy}"


class BadMoEFolder(MoepassError, ValueError):
    """A folder that is not in moepass's own format, or contradicts itself."""

    code = "bad_moe_folder"
    template = "{path}: {detail}; {remedy}"


class CannotSave(MoepassError, TypeError):
    """A model that moepass's own format cannot hold."""

    code = "cannot_save"
    template = "cannot save {where} in moepass's own format: {detail}; {remedy}"


class NotVerifiable(MoepassError, ValueError):
    """Two checkpoints that cannot be compared layer by layer."""

    code = "not_verifiable"
    template = "cannot compare {path}: {detail}; {remedy}"


class NoHost(MoepassError, ValueError):
    """A dense architecture for which no MoE of transformers computes the same function."""

    code = "no_host"
    template = "the model_type {model_type!r} cannot be upcycled to a stock architecture: {detail}; {remedy}"


class HostRefuses(MoepassError, ValueError):
    """A dense config with something that the MoE host does not have."""

    code = "host_refuses"
    template = "{dense} cannot become {host}: {field}={value!r} ({detail}); {remedy}"


class UnexpectedTensor(MoepassError, ValueError):
    """A tensor of a checkpoint that has no place in the output, or is missing, or has another shape."""

    code = "unexpected_tensor"
    template = "{folder}: the tensor {name!r} {detail}; {remedy}"


class ParentDiffers(MoepassError, ValueError):
    """A checkpoint that should give experts and is not of the base's architecture."""

    code = "parent_differs"
    template = "{parent} cannot give experts to {base}: {field} is {theirs}, in {base} {ours}; {remedy}"


class BadMesh(MoepassError, ValueError):
    """A device mesh on which a model cannot be parallelized."""

    code = "bad_mesh"
    template = "{mesh} cannot be used: {detail}; {remedy}"


class NotParallel(MoepassError, TypeError):
    """A model or a block whose experts cannot be shared out over ranks."""

    code = "not_parallel"
    template = "{where} cannot be parallelized: {detail}; {remedy}"


class RanksDiffer(MoepassError, RuntimeError):
    """Ranks that hold different models, settings or plans."""

    code = "ranks_differ"
    template = "the ranks do not agree: {differences}; start all of them with the same model, options and versions"
