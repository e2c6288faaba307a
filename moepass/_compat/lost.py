"""Saying, once, that this torch lacks a private API."""

from __future__ import annotations

import functools
import logging

import torch

#: How a private API shows that this torch does not have it.
GONE = (ImportError, AttributeError)

log = logging.getLogger("moepass")


@functools.cache
def lost(capability: str, instead: str) -> None:
    """Say once that this torch lacks what a capability needs, and what happens instead."""
    log.warning("torch %s lacks what moepass needs to %s: %s", torch.__version__, capability, instead)
