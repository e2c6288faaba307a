"""Calibration on a tiny budget: a plausible profile, kept where planning finds it."""

from __future__ import annotations

import os

import pytest

from moepass import errors
from moepass.lowering import cache, hardware
from moepass.lowering.calibrate import DTYPES, ROWS, _tiles, calibrate
from moepass.lowering.hardware import Hardware, load_hardware
from moepass.lowering.plan import TokenRange, Workload
from moepass.lowering.planner import plan


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """One quick calibration, saved to a cache of its own: ``(profile, said, cache directory)``."""
    folder = tmp_path_factory.mktemp("cache")
    before = os.environ.get("MOEPASS_CACHE_DIR")
    os.environ["MOEPASS_CACHE_DIR"] = str(folder)
    said: list[str] = []
    try:
        yield calibrate(progress=said.append, seconds=0.0005, sweep_bytes=2 << 20), said, folder
    finally:
        os.environ.pop("MOEPASS_CACHE_DIR")
        if before is not None:
            os.environ["MOEPASS_CACHE_DIR"] = before
        hardware.forget_default()


def test_every_figure_is_measured_and_plausible(session):
    profile, _, _ = session
    assert (profile.device, profile.source) == ("cpu", "calibrated")
    for dtype in DTYPES:
        assert 1e8 < profile.peak(dtype) < 1e15
        assert 1e8 < profile.matvec_bandwidth(dtype) < 1e13
        for rows in ROWS:
            assert 0 < profile.rows_efficiency(dtype, rows) <= 1
            assert 0 < profile.rows_efficiency(dtype, rows, backward=True) <= 1
    assert 1e8 < profile.bandwidth < 1e13
    assert 1e8 < profile.gather < 1e13
    assert 0 <= profile.sort_row < 1e-5
    assert 1e-8 < profile.launch < 1e-3
    assert {name for name, _ in profile.fixed} == {"dense", "gathered", "grouped", "capacity"}
    assert all(1e-6 < seconds < 1.0 for _, seconds in profile.fixed)


def test_tile_efficiencies_are_those_of_grouped_gemms_with_so_many_rows():
    """The accelerator's measurement, on the device there is."""
    measured = _tiles("cpu", ((64.0, 0.6), (128.0, 0.7)), peak=1e13, seconds=0.0, width=64, E=4)
    assert [rows for rows, _ in measured] == [64.0, 128.0]
    assert all(0 < efficiency < 1 for _, efficiency in measured)
    ((_, capped),) = _tiles("cpu", ((64.0, 0.6),), peak=1.0, seconds=0.0, width=64, E=4)
    assert capped == 1.0


def test_wide_gemms_attain_more_than_single_rows_in_float32(session):
    profile, _, _ = session
    assert profile.rows_efficiency("float32", 256) > profile.rows_efficiency("float32", 1)


def test_saved_profile_is_what_planning_uses_from_then_on(session):
    profile, _, _ = session
    assert load_hardware(None, "cpu") == profile
    work = Workload(tokens=512, D=256, F=128, E=16, K=2, n=2)
    assert plan(work, TokenRange(low=512), load_hardware(None, "cpu")).hardware == profile.name


def test_progress_names_each_dtype(session):
    _, said, _ = session
    assert all(any(dtype in line for line in said) for dtype in DTYPES)


def test_changed_thread_count_or_version_makes_the_profile_stale(session, monkeypatch):
    profile, _, _ = session
    monkeypatch.setattr("torch.get_num_threads", lambda: 99)
    assert load_hardware(None, "cpu") == Hardware.preset("cpu")
    monkeypatch.undo()
    assert load_hardware(None, "cpu") == profile


def test_unsaved_calibration_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEPASS_CACHE_DIR", str(tmp_path / "none"))
    monkeypatch.setattr("moepass.lowering.calibrate.DTYPES", ("float32",))
    calibrate(save=False, seconds=0.0, sweep_bytes=2 << 20)
    assert not cache.directory().exists()


def test_absent_device_is_a_clear_error():
    with pytest.raises(errors.BadOption, match=r"'cuda'|'xpu'") as caught:
        calibrate("cuda" if not _has_cuda() else "xpu")
    assert "cannot be used here" in str(caught.value)


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
