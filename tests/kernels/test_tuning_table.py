"""Tuning tables: an entry replaces the rule's tiles for its matrices and its bucket; a bad one decides nothing."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest

from moepass.kernels.fused import ops, schedule, tuning
from moepass.kernels.fused.problem import TARGETS, Problem, Tile
from moepass.kernels.fused.tuning import Entry, Table

TARGET = TARGETS["sm_90"]
PROBLEM = Problem(
    tokens=4096, D=2048, F=768, E=128, K=8, n=2, dtype="bfloat16", activation="silu(g)*u",
    w_in=(2 * 768 * 2048, 2048, 1), w_out=(2048 * 768, 768, 1),
)  # fmt: skip
UP, DOWN = Tile(64, 128, 64, 8, 3), Tile(64, 256, 64, 8, 3)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "folder", lambda: tmp_path)
    ops.reload_tiles()
    yield tmp_path
    monkeypatch.undo()
    ops.reload_tiles()


def entry(rows: int = 256, **tiles: Tile) -> Entry:
    return Entry(D=2048, F=768, n=2, dtype="bfloat16", rows=rows, tiles=tiles or {"up": UP, "down": DOWN})


def table(*entries: Entry, target: str = "sm_90") -> Table:
    return Table(target=target, accelerator="made up", versions={}, entries=entries)


def put(folder, content: str, target: str = "sm_90") -> None:
    (folder / f"{target}.json").write_text(content)
    ops.reload_tiles()


def test_an_entry_replaces_the_rule_for_its_bucket_and_nothing_else(folder):
    before = schedule.tiles(PROBLEM, TARGET)
    put(folder, table(entry()).model_dump_json())
    after = schedule.tiles(PROBLEM, TARGET)
    assert before != after
    assert after == before._replace(up=UP, down=DOWN)
    for other in (replace(PROBLEM, tokens=8192), replace(PROBLEM, F=1024), replace(PROBLEM, dtype="float16")):
        assert schedule.tiles(other, TARGET).up != UP
    assert schedule.tiles(PROBLEM, TARGETS["sm_80"]).up != UP


def test_a_tuned_tile_is_what_is_launched(folder):
    put(folder, table(entry()).model_dump_json())
    program = schedule.forward(PROBLEM, schedule.tiles(PROBLEM, TARGET), TARGET)
    up = next(launch for launch in program.launches if launch.name == "up")
    assert {dict(up.constexprs)[f"BLOCK_{axis}"] for axis in "MNK"} == {64, 128}
    assert (up.num_warps, up.num_stages) == (8, 3)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (entry(up=UP), "share their row tiles"),
        (entry(up=UP, down=DOWN._replace(m=32)), "m differs"),
        (entry(up=UP._replace(n=96), down=DOWN), "is no tile"),
        (entry(up=UP._replace(warps=3), down=DOWN), "is no tile"),
        (entry(sideways=UP), "no kernel 'sideways'"),
        (entry(dw=UP._replace(persistent=1)), "no persistent form"),
        (entry(up=UP._replace(weigh=True), down=DOWN), "only down can weigh"),
        (entry(up=UP._replace(tma=3), down=DOWN), "is no tile"),
    ],
)
def test_an_impossible_entry_is_named_and_the_rule_serves(folder, caplog, bad, said):
    rule = schedule.tiles(PROBLEM, TARGET)
    put(folder, table(bad).model_dump_json())
    with caplog.at_level(logging.WARNING):
        assert schedule.tiles(PROBLEM, TARGET) == rule
    assert said in caplog.text


@pytest.mark.parametrize("content", ["", "[]", '{"target": "sm_90"}', "not json"])
def test_a_damaged_table_is_named_and_ignored(folder, caplog, content):
    before = schedule.tiles(PROBLEM, TARGET)
    put(folder, content)
    with caplog.at_level(logging.WARNING):
        assert schedule.tiles(PROBLEM, TARGET) == before
    assert "sm_90.json" in caplog.text


def test_a_new_run_keeps_the_entries_that_it_did_not_touch():
    old, again = table(entry(64), entry(256)), table(entry(256, dw=Tile(128, 128, 32, 8, 3, 1)))
    found = tuning.merged(old, again)
    assert [e.rows for e in found.entries] == [64, 256]
    assert set(found.entries[1].tiles) == {"dw"}
    assert tuning.merged(table(entry(64), target="sm_80"), again).entries == again.entries


def test_the_bucket_is_the_next_power_of_two():
    assert [tuning.bucket(replace(PROBLEM, tokens=T)) for T in (1, 16, 17, 4096)] == [1, 1, 2, 256]
