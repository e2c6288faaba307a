"""``moepass verify --ep``: every form of expert parallelism over real ranks, and an off-by-one in the splits is seen.

The ranks run themselves as ``tests/ranks.py`` does, two for the sound forms and two with the fault planted.
"""

from __future__ import annotations

from pathlib import Path

import faults_planted
import pytest
import ranks

from moepass.lowering.ep import exact
from moepass.lowering.plan import Workload
from moepass.verify.ranks import check_ranks, checks_of, leave_errors

WORK = Workload(tokens=0, D=6, F=5, E=4, K=2, n=2, bias=True, train=True, dtype="float32")
ACTIVATION = "silu(g)*u"


def faulty(rank: ranks.Rank) -> None:
    """One row too few for the first rank and one too many for the second, as both sides believe."""
    with pytest.MonkeyPatch.context() as patch:
        faults_planted.plant(
            patch, exact._splits, "wanted_GB.sum(1) + own_G, arriving_GB.sum(1) + own_G",
            "wanted_GB.sum(1) + own_G + torch.tensor([-1, 1]), arriving_GB.sum(1) + own_G + 2 * group.rank - 1",
        )  # fmt: skip
        leave_errors(rank.folder, rank.number, rank.size, WORK, ACTIVATION)


def test_every_form_over_two_ranks_is_the_reference():
    found = list(check_ranks("block", WORK, ACTIVATION, 2))
    assert [c for c in found if c.status != "ok"] == []
    assert {c.name.partition(":")[0] for c in found} == {
        "replicated", "all_gather", "all_to_all", "all_to_all with a buffer"
    }  # fmt: skip


def test_an_off_by_one_in_the_splits_of_all_to_all_is_found_and_named(tmp_path):
    ranks.spawn(__file__, 2, tmp_path)
    found = {c.name: c for c in checks_of("2 ranks", Path(tmp_path), 2)}
    assert found["all_to_all: output"].status == "failed"
    assert found["all_gather: output"].status == "ok"


def test_experts_that_do_not_divide_are_skipped_with_the_numbers():
    (check,) = check_ranks("block", WORK, ACTIVATION, 3)
    assert (check.status, check.detail) == ("skipped", "E=4 is not divisible by 3")


def test_a_rank_that_left_nothing_is_a_failure_that_quotes_its_log(tmp_path):
    (tmp_path / "log0").write_text("Traceback\nRuntimeError: gone\n")
    (check,) = checks_of("1 rank", tmp_path, 1)
    assert (check.status, check.detail) == ("failed", "rank 0: RuntimeError: gone")


if __name__ == "__main__":
    ranks.join(faulty)
