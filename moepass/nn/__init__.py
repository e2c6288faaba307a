"""Mixture-of-experts modules that run eagerly, under ``torch.compile`` and under ``torch.export``."""

from __future__ import annotations

from moepass.nn.counting import Counts, count
from moepass.nn.hybrid import Hybrid
from moepass.nn.losses import attach_loss, hf_load_balancing_loss, load_balancing_loss, router_z_loss
from moepass.nn.metrics import Metrics, MetricsLogger, collect, log_metrics, routing_metrics
from moepass.nn.moe import MoE
from moepass.nn.replay import capture_routing, replay_routing
from moepass.nn.router import Router, RouterOutput
from moepass.nn.routing_bias import post_batch

__all__ = [
    "Counts",
    "Hybrid",
    "Metrics",
    "MetricsLogger",
    "MoE",
    "Router",
    "RouterOutput",
    "attach_loss",
    "capture_routing",
    "collect",
    "count",
    "hf_load_balancing_loss",
    "load_balancing_loss",
    "log_metrics",
    "post_batch",
    "replay_routing",
    "router_z_loss",
    "routing_metrics",
]
