"""``moepass verify --ep``: every form of expert parallelism over real ranks, and planted faults are seen.

The ranks run themselves as ``tests/ranks.py`` does: two for all sound forms, four for two levels and planted faults.
"""

from __future__ import annotations

import faults_planted
import pytest
import ranks

from moepass.lowering.ep import all_to_all, exact
from moepass.lowering.plan import Workload
from moepass.verify.ranks import check_ranks, checks_of, leave_errors

WORK = Workload(tokens=0, D=6, F=5, E=4, K=2, n=2, bias=True, train=True, dtype="float32")
ACTIVATION = "silu(g)*u"


def splits_off_by_one(patch: pytest.MonkeyPatch) -> None:
    """One row too few for the first rank and one too many for the second, as both sides believe."""
    faults_planted.plant(
        patch, exact.routes, "wanted_GCB.sum(2).T + own_CG, arriving_GCB.sum(2).T + own_CG",
        "wanted_GCB.sum(2).T + own_CG + torch.tensor([-1, 1, 0, 0]), "
        "arriving_GCB.sum(2).T + own_CG + (2 * group.rank - 1) * (group.rank < 2)",
    )  # fmt: skip


def levels_exchanged(patch: pytest.MonkeyPatch) -> None:
    """Rows go to a rank of the node first, and to a node then."""
    faults_planted.plant(
        patch, all_to_all.run_two_level, "nodes, local = settings.groups", "local, nodes = settings.groups"
    )  # fmt: skip


def four_ranks(rank: ranks.Rank) -> None:
    two_levels = [("hierarchical", None)]
    runs = {
        "sound": (lambda _: None, two_levels),
        "splits": (splits_off_by_one, [("all_to_all", None), ("all_gather", None)]),
        "levels": (levels_exchanged, [*two_levels, ("all_to_all", None)]),
    }
    for name, (fault, forms) in runs.items():
        (rank.folder / name).mkdir(exist_ok=True)
        with pytest.MonkeyPatch.context() as patch:
            fault(patch)
            leave_errors(rank.folder / name, rank.number, rank.size, WORK, ACTIVATION, forms)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The checks of each run over four ranks, two nodes of two, by name."""
    folder = tmp_path_factory.mktemp("ranks")
    ranks.spawn(__file__, 4, folder)
    runs = ("sound", "splits", "levels")
    return {run: {c.name: c for c in checks_of("4 ranks", folder / run, 4)} for run in runs}


def test_every_form_over_two_ranks_is_the_reference():
    found = list(check_ranks("block", WORK, ACTIVATION, 2))
    assert [c for c in found if c.status != "ok"] == []
    assert {c.name.partition(":")[0] for c in found} == {
        "replicated", "all_gather", "all_to_all", "all_to_all with a buffer", "hierarchical"
    }  # fmt: skip


def test_two_nodes_of_two_ranks_are_the_reference(found):
    assert {name: c.status for name, c in found["sound"].items()} == {
        f"hierarchical: {what}": "ok" for what in ("output", "gradients", "nothing lost")
    }


def test_an_off_by_one_in_the_splits_of_all_to_all_is_found_and_named(found):
    assert found["splits"]["all_to_all: output"].status == "failed"
    assert found["splits"]["all_gather: output"].status == "ok"


def test_levels_that_are_exchanged_are_found_and_named(found):
    assert found["levels"]["hierarchical: output"].status == "failed"
    assert found["levels"]["all_to_all: output"].status == "ok"


def test_capacity_over_two_levels_is_skipped_with_the_reason():
    check = next(check_ranks("block", WORK.model_copy(update={"capacity_factor": 1.0}), ACTIVATION, 2))
    assert (check.name, check.status) == ("hierarchical", "skipped")
    assert "order of the ranks" in check.detail


def test_experts_that_do_not_divide_are_skipped_with_the_numbers():
    (check,) = check_ranks("block", WORK, ACTIVATION, 3)
    assert (check.status, check.detail) == ("skipped", "E=4 is not divisible by 3")


def test_a_rank_that_left_nothing_is_a_failure_that_quotes_its_log(tmp_path):
    (tmp_path / "log0").write_text("Traceback\nRuntimeError: gone\n")
    (check,) = checks_of("1 rank", tmp_path, 1)
    assert (check.status, check.detail) == ("failed", "rank 0: RuntimeError: gone")


if __name__ == "__main__":
    ranks.join(four_ranks)
