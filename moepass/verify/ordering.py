"""Order among equals: the sorts that routing and dropping rest on are stable.

Ties are common, not rare: the rows of a virtual group are tied on purpose, and which token is dropped over a capacity
is decided by position.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from moepass import reference
from moepass.kernels.sorting import rank_in_group, sort_by_expert
from moepass.spec import RouterSpec
from moepass.verify.report import Check

_SUBJECT = "stable sorts"


def check_order() -> Iterator[Check]:
    """Ties in routing go to the lower expert, rows of an expert stay in token order, and so do ranks."""
    generator = torch.Generator().manual_seed(0)
    E, T, K = 8, 64, 2
    coarse_TE = torch.randint(0, 3, (T, E), generator=generator).double()  # three values: ties everywhere
    index_TK, _ = reference.route(coarse_TE, RouterSpec(top_k=4))
    best = [sorted(range(E), key=lambda e, row=row: (-row[e], e))[:4] for row in coarse_TE.tolist()]  # type: ignore[misc]
    yield Check.holds(_SUBJECT, "routing: ties", index_TK.tolist() == best, "a tie went to the higher expert")

    expert_TK = torch.randint(0, E + 1, (T, K), generator=generator)  # E: nobody's
    order_R, inverse_R, offsets_E = sort_by_expert(expert_TK, E)
    flat = expert_TK.flatten().tolist()
    wanted = sorted(range(T * K), key=lambda r: (flat[r], r))
    yield Check.holds(_SUBJECT, "rows of an expert", order_R.tolist() == wanted, "rows are out of token order")
    ends = [sum(f <= e for f in flat) for e in range(E)]
    yield Check.holds(_SUBJECT, "ends of experts", offsets_E.tolist() == ends, f"{offsets_E.tolist()}, not {ends}")
    back = all(order_R[p] == r for r, p in enumerate(inverse_R.tolist()) if flat[r] < E)
    yield Check.holds(_SUBJECT, "way back", back, "the inverse does not undo the order")

    before = [sum(f == flat[r] for f in flat[:r]) for r in range(T * K)]
    rank_R = rank_in_group(expert_TK.flatten())
    yield Check.holds(_SUBJECT, "ranks by position", rank_R.tolist() == before, "ranks do not count rows before")
    coarse = torch.randint(0, 2, (T * K,), generator=generator).double()
    order = sorted(range(T * K), key=lambda r: (-coarse[r].item(), r))
    seen: dict[int, int] = {}
    ranks = [0] * (T * K)
    for r in order:
        ranks[r] = seen.get(flat[r], 0)
        seen[flat[r]] = ranks[r] + 1
    found = rank_in_group(expert_TK.flatten(), coarse).tolist()
    yield Check.holds(_SUBJECT, "ranks by priority", found == ranks, "equal priorities are out of order")
