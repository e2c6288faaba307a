"""Shared by ``tests/fuzz``: how many inputs a test tries, and the count of what was tried."""

from __future__ import annotations

import os
from collections import Counter

from hypothesis import HealthCheck, settings

EXPLORING = os.environ.get("HYPOTHESIS_PROFILE") == "explore"
#: Times more inputs than in CI.
_MORE = int(os.environ.get("FUZZ_TIMES", "40"))

tried: Counter[str] = Counter()


def inputs(count: int) -> settings:
    """``count`` inputs in CI, the same in every run; new ones and ``FUZZ_TIMES`` as many by ``make fuzz``."""
    return settings(
        max_examples=count * _MORE if EXPLORING else count,
        deadline=None,
        derandomize=not EXPLORING,
        suppress_health_check=list(HealthCheck),
    )
