"""The facts of this machine in the cache directory: what ``measure=True`` and ``--analyze`` have seen.

One file for each device and machine (processor, threads, versions), at most ``LIMIT`` workloads, the oldest forgotten
first.  A file that is damaged, or of another version of the format, is warned of and made anew.  Writers take turns, so
none loses what another has just written.

Nothing is read or written under ``MOEPASS_LEARN=0``, and nothing in a job of several ranks (``WORLD_SIZE`` > 1): ranks
must plan alike, and each would have its own experience.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable

from pydantic import ValidationError

from moepass.lowering import cache, machine
from moepass.lowering.facts import Fact

log = logging.getLogger(__name__)

VERSION = 1
#: Workloads that are remembered.
LIMIT = 512


def enabled() -> bool:
    """Whether this process learns."""
    return os.environ.get("MOEPASS_LEARN", "1") != "0" and not machine.one_of_many()


def file(device: str) -> str:
    """Name of the cache file."""
    return f"learned-{device}-{machine.fingerprint(device)}.json"


def load(device: str) -> tuple[Fact, ...]:
    """What is known of this machine, oldest first."""
    return _read(device) if enabled() else ()


def record(device: str, facts: Iterable[Fact]) -> bool:
    """Remember facts; a newer one replaces what was known of its workload.  True where anything changed."""
    new = {fact.work: fact for fact in facts}
    if not new or not enabled():
        return False
    with cache.lock(file(device)):
        before = _read(device)
        known = {fact.work: fact for fact in before if fact.work not in new}
        after = tuple({**known, **new}.values())[-LIMIT:]
        if set(after) == set(before):
            return False
        content = {
            "version": VERSION,
            "machine": machine.describe(device),
            "facts": [fact.model_dump(mode="json") for fact in after],
        }
        return cache.write(file(device), content) is not None


def forget(device: str) -> int:
    """Remove everything known of this machine; how many workloads that were."""
    path = cache.directory() / file(device)
    with cache.lock(file(device)):
        count = len(_read(device))
        path.unlink(missing_ok=True)
    return count


def _read(device: str) -> tuple[Fact, ...]:
    content = cache.read(file(device))
    if content is None:
        return ()
    if content.get("version") != VERSION or content.get("machine") != machine.describe(device):
        log.warning("ignoring %s: it is of another version or machine, and is made anew", file(device))
        return ()
    entries = content.get("facts")
    try:
        return tuple(Fact.model_validate(entry) for entry in (entries if isinstance(entries, list) else [None]))
    except ValidationError as error:
        log.warning("ignoring %s, which is made anew: %s", file(device), str(error).partition("\n")[0])
        return ()
