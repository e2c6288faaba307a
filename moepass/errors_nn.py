"""Errors of modules, losses and routers: a part of the catalogue ``moepass.errors``, from which they are raised."""

from __future__ import annotations

from moepass.errors_base import MoepassError


class LossDivFactor(MoepassError, ValueError):
    """A divisor for a loss that has one of its own."""

    code = "loss_div_factor"
    template = (
        "loss_div_factor has no meaning in the {loss} convention, which divides by its own token count; leave it out, "
        "or use one of {known}"
    )


class NoLayers(MoepassError, ValueError):
    """A loss over layers without a pair of scores and indices for each."""

    code = "no_layers"
    template = (
        "the loss over all layers got {scores} score tensors and {indices} index tensors; give one of each per layer"
    )


class NotRecorded(MoepassError):
    """A question about the last forward of a block that keeps no record."""

    code = "not_recorded"
    template = (
        "{where} records no metrics; call record_metrics() on it before the forward, or moepass.nn.log_metrics on the "
        "model"
    )


class UnknownTopK(MoepassError, ValueError):
    """Stacked expert weights of another library, and nobody nearby says how many of them a token uses."""

    code = "unknown_top_k"
    template = "cannot tell how many experts a token uses in {where!r}; pass top_k= to moepass.nn.counting.count"


class UnsupportedExperts(MoepassError, TypeError):
    """Experts of another library that moepass cannot run as they are."""

    code = "unsupported_experts"
    template = "{where} cannot run as moepass experts: {detail}; {remedy}"


class NoRouters(MoepassError, ValueError):
    """Routing to be captured, replayed or balanced in a model without routers."""

    code = "no_routers"
    template = (
        "{what} found no moepass.nn.Router in {where}; use moepass.convert (or moepass.materialize after the one-line "
        "form) first"
    )


class ReplayMismatch(MoepassError, ValueError):
    """Recorded routing that does not fit the forward that it is replayed in."""

    code = "replay_mismatch"
    template = "the recorded routing of {where} cannot be replayed: {detail}; {remedy}"
