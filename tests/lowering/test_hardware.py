"""Hardware profiles: presets, files, the cached calibration, and what happens to bad ones."""

from __future__ import annotations

import json
import math
import pickle

import pytest
from pydantic import ValidationError

from moepass import errors
from moepass.lowering import cache, hardware, machine
from moepass.lowering.hardware import Hardware, load_hardware


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEPASS_CACHE_DIR", str(tmp_path / "cache"))
    hardware.forget_default()
    yield
    hardware.forget_default()


def store(profile: Hardware, described: dict[str, str] | None = None) -> None:
    content = {"machine": described or machine.describe("cpu"), "profile": profile.model_dump(mode="json")}
    assert cache.write(hardware.profile_file("cpu"), content)
    hardware.forget_default()


def calibrated_profile() -> Hardware:
    return Hardware.preset("cpu").model_copy(update={"name": "mine", "source": "calibrated"})


def test_every_promised_preset_loads_under_its_own_name_and_says_where_its_numbers_come_from():
    assert {"H100", "H200", "B200", "A100", "MI300X", "cpu"} == set(hardware.preset_names())
    for name in hardware.preset_names():
        preset = Hardware.preset(name)
        assert preset.name == name
        assert preset.source == "preset"
        assert len(preset.comment) > 40


@pytest.mark.parametrize("name", ["h200", "H200", "mi300x", "CPU"])
def test_preset_names_ignore_case(name):
    assert load_hardware(name).name.lower() == name.lower()


def test_unknown_name_suggests_the_nearest_preset():
    with pytest.raises(errors.UnknownHardware, match=r"'H20O' \(did you mean 'H200'\?\).*A100, B200"):
        load_hardware("H20O")


def test_name_like_nothing_gets_no_suggestion():
    with pytest.raises(errors.UnknownHardware) as caught:
        load_hardware("quantum-abacus-9000")
    assert "did you mean" not in str(caught.value)


def test_profile_survives_json_and_stays_hashable(tmp_path):
    preset = Hardware.preset("cpu")
    path = tmp_path / "mine.json"
    path.write_text(preset.model_dump_json())
    loaded = load_hardware(path)
    assert loaded == preset
    assert hash(loaded) == hash(preset)
    assert pickle.loads(pickle.dumps(preset)) == preset
    assert json.loads(path.read_text())["flops"]["float32"] == preset.peak("float32")


@pytest.mark.parametrize(
    ("text", "detail"),
    [(None, "No such file"), ("{", "JSON"), ('{"name": "x"}', "device"), ('["x"]', "dictionary|object")],
)
def test_bad_profile_file_is_named_with_its_fault(tmp_path, text, detail):
    path = tmp_path / "bad.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(errors.BadProfile, match=f"bad.json.*({detail})"):
        load_hardware(str(path))


@pytest.mark.parametrize("curve", [[], [[4, 0.1], [1, 0.2]], [[0, 0.1]], [[1, 0.0]]])
def test_curve_must_be_positive_and_ascending(curve):
    fields = json.loads(Hardware.preset("cpu").model_dump_json()) | {"tiles": curve}
    with pytest.raises(ValidationError):
        Hardware.model_validate(fields)


@pytest.mark.parametrize(("field", "value"), [("flops", {}), ("bandwidth", 0), ("launch", -1), ("unknown", 1)])
def test_impossible_figures_are_refused(field, value):
    fields = json.loads(Hardware.preset("cpu").model_dump_json()) | {field: value}
    with pytest.raises(ValidationError, match=field):
        Hardware.model_validate(fields)


def test_efficiency_is_interpolated_over_log_rows_and_constant_outside():
    curve = ((1.0, 0.1), (4.0, 0.3), (64.0, 0.9))
    assert hardware.interpolate(curve, 0.5) == 0.1
    assert hardware.interpolate(curve, 2) == pytest.approx(0.2)
    assert hardware.interpolate(curve, 16) == pytest.approx(0.6)
    assert hardware.interpolate(curve, 1000) == 0.9
    assert math.isclose(hardware.interpolate(curve, 4), 0.3)


def test_dtype_without_a_figure_is_taken_as_the_slowest():
    preset = Hardware.preset("H200")
    assert preset.peak("float8_e4m3fn") == min(preset.peak(d) for d in ("bfloat16", "float32", "float64"))


def test_default_profile_is_the_preset_until_a_calibration_is_cached():
    assert load_hardware(None, "cpu") == Hardware.preset("cpu")
    store(calibrated_profile())
    assert load_hardware(None, "cpu") == calibrated_profile()


def test_profile_of_another_machine_is_ignored_with_a_warning(caplog):
    store(calibrated_profile(), machine.describe("cpu") | {"torch": "1.0"})
    assert load_hardware(None, "cpu").name == "cpu"
    assert "another machine" in caplog.text


@pytest.mark.parametrize("damage", ["{", "[]", '{"machine": 1}'])
def test_damaged_calibration_is_ignored_with_a_warning(caplog, damage):
    store(calibrated_profile())
    (cache.directory() / hardware.profile_file("cpu")).write_text(damage)
    assert load_hardware(None, "cpu").name == "cpu"
    assert "ignoring" in caplog.text


def test_calibration_with_an_invalid_profile_is_ignored_with_a_warning(caplog):
    content = {"machine": machine.describe("cpu"), "profile": {"name": "x", "flops": {}}}
    cache.write(hardware.profile_file("cpu"), content)
    assert load_hardware(None, "cpu").name == "cpu"
    assert "ignoring the calibrated profile" in caplog.text


def test_unwritable_cache_is_a_warning_not_an_error(tmp_path, monkeypatch, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("MOEPASS_CACHE_DIR", str(blocked / "below"))
    assert cache.write("x.json", {}) is None
    assert "could not write" in caplog.text
    assert load_hardware(None, "cpu").name == "cpu"


def test_cache_write_leaves_no_temporary_file_behind():
    cache.write("x.json", {"a": 1})
    cache.write("x.json", {"a": 2})
    assert [p.name for p in cache.directory().iterdir()] == ["x.json"]
    assert cache.read("x.json") == {"a": 2}


def test_device_without_a_preset_plans_with_a_named_accelerator_and_says_so(caplog):
    assert load_hardware(None, "xpu").device == "cuda"
    assert "moepass calibrate" in caplog.text
    assert load_hardware(None, "meta").name == "cpu"


def test_a_changed_copy_has_a_fingerprint_of_its_own_and_is_validated():
    before = Hardware.preset("H200")
    fingerprint = before.fingerprint  # computed, hence remembered
    after = before.model_copy(update={"launch": 1.0})
    assert after.launch == 1.0
    assert after.fingerprint != fingerprint
    assert before.model_copy() == before
    assert before.model_copy().fingerprint == fingerprint
    with pytest.raises(ValueError, match="bandwidth"):
        before.model_copy(update={"bandwidth": -1.0})
