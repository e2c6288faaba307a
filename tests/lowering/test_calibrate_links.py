"""Links are measured between real processes, fitted, kept, and found by meshes; what cannot be measured is refused."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from moepass import cli, errors
from moepass.lowering import calibrate_links as measuring
from moepass.lowering import links, mesh
from moepass.lowering.hardware import Hardware


def test_a_line_is_fitted_exactly_and_latency_is_counted_by_step():
    points = [(sent, 1e-3 + sent / 1e9) for sent in (1e3, 1e5, 1e7)]
    latency, bandwidth, error = measuring.fit(points, ranks=4)
    assert (latency, bandwidth, error) == (pytest.approx(5e-4), pytest.approx(1e9), pytest.approx(0.0, abs=1e-9))


@pytest.mark.parametrize("points", [[(1e3, 1e-3), (1e6, 1e-4), (1e7, 1e-4)], [(1e3, 1e-7), (1e6, 1e-3), (1e7, 2e-2)]])
def test_noise_gives_no_negative_figures(points):
    latency, bandwidth, error = measuring.fit(points, ranks=2)
    assert latency >= 0
    assert bandwidth > 0
    assert error >= 0


def test_two_ranks_are_measured_kept_and_used(own_cache, monkeypatch):
    monkeypatch.setattr(measuring, "SIZES", (1 << 10, 1 << 20))
    found = CliRunner().invoke(cli.app, ["calibrate", "--dist", "2"])
    assert found.exit_code == 0, found.stderr
    told = json.loads(found.stdout)
    assert [fit["collective"] for fit in told["fits"]] == list(links.COLLECTIVES)
    assert all(0 <= fit["latency"] < 1 and fit["bandwidth"] > 1e5 for fit in told["fits"])
    used = mesh.parse("ep=2", Hardware.preset("cpu")).dims[0].link
    assert (used.name, used.source) == ("gloo-2", "calibrated")
    assert used.seconds("all_to_all", 1e6, 2) < used.seconds("all_to_all", 1e9, 2)


@pytest.mark.parametrize("ranks", [-1, 0, 1, 65])
def test_a_number_of_ranks_that_cannot_be_is_refused(ranks):
    with pytest.raises(errors.BadOption, match=r"'--dist'.*give 2 to 64 ranks"):
        measuring.calibrate_links(ranks)


def test_a_rank_that_fails_is_named_with_its_last_words(tmp_path):
    (tmp_path / "0.log").write_text("")
    (tmp_path / "1.log").write_text("Traceback\nthe abacus is missing a bead\n")
    ranks = [subprocess.Popen([sys.executable, "-S", "-c", f"raise SystemExit({code})"]) for code in (0, 3)]
    with pytest.raises(errors.BadOption, match="rank 1 failed: the abacus is missing a bead"):
        measuring._wait(ranks, str(tmp_path))


def test_a_rank_of_a_job_measures_on_its_own_device(monkeypatch):
    def no_group(backend):
        raise RuntimeError(f"no {backend} here")

    used = []
    monkeypatch.setattr("torch.distributed.is_torchelastic_launched", lambda: True)
    monkeypatch.setattr("torch.accelerator.set_device_index", used.append)
    monkeypatch.setattr("torch.distributed.init_process_group", no_group)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(RuntimeError, match="no nccl here"):
        measuring.calibrate_links(2, "cuda")
    assert used == [1]


def test_a_job_of_another_size_is_refused(monkeypatch):
    monkeypatch.setattr("torch.distributed.is_torchelastic_launched", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(errors.BadOption, match="this torchrun job has 4 ranks"):
        measuring.calibrate_links(2)
