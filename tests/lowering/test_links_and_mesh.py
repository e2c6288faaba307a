"""Links and meshes: what collectives cost on them, how they are written, and what is refused with which words."""

from __future__ import annotations

import json

import pytest

from moepass import errors
from moepass.lowering import cache, links, mesh
from moepass.lowering.hardware import Hardware
from moepass.lowering.links import Fit, Link

H200, CPU = Hardware.preset("H200"), Hardware.preset("cpu")


def test_seconds_are_latency_for_each_doubling_step_and_bytes_over_bandwidth():
    link = Link(name="x", bandwidth=1e9, latency=1e-5)
    assert link.seconds("all_to_all", 2e6, 8) == pytest.approx(3e-5 + 2e-3)
    assert link.seconds("all_gather", 0.0, 9) == pytest.approx(4e-5)
    assert link.seconds("all_reduce", 1e9, 1) == 0.0


def test_a_fit_replaces_the_figures_of_its_collective_only():
    link = Link(name="x", bandwidth=1e9, latency=1e-5, fits=(Fit(collective="all_to_all", latency=1.0, bandwidth=1.0),))
    assert link.seconds("all_to_all", 3.0, 2) == 4.0
    assert link.seconds("all_gather", 1e9, 2) == pytest.approx(1 + 1e-5)


@pytest.mark.parametrize("name", [*links.PRESETS, *links.ALIASES, "NVLink"])
def test_presets_and_aliases_name_their_source(name):
    assert "assumed" in links.link(name).comment


def test_unknown_link_names_the_nearest_preset():
    with pytest.raises(errors.UnknownLink, match=r"'nvlnk'.*did you mean 'nvlink'.*nvlink4, .*path"):
        links.link("nvlnk")


def test_a_link_can_come_from_a_file(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(Link(name="mine", bandwidth=2.0, latency=0.5).model_dump_json())
    assert links.link(str(path)).bandwidth == 2.0
    path.write_text('{"name": "mine", "bandwidth": -1, "latency": 0}')
    with pytest.raises(errors.BadProfile, match=r"mine\.json.*bandwidth.*greater than 0"):
        links.link(str(path))


def test_nodes_are_joined_by_infiniband_and_their_ranks_by_what_the_hardware_has():
    found = mesh.parse("node=16,ep=8", H200)
    assert [(dim.name, dim.size, dim.link.name) for dim in found.dims] == [
        ("node", 16, "ib-ndr"),
        ("ep", 8, "nvlink4"),
    ]
    assert (found.P, found.ranks, found.ep) == (128, 128, ("node", "ep"))
    assert str(found) == "node=16 (ib-ndr) x ep=8 (nvlink4), experts over node x ep: P = 128"


def test_other_dimensions_hold_no_experts():
    found = mesh.parse("dp=4,ep=8", H200)
    assert (found.P, found.ranks, [level.name for level in found.levels]) == (8, 32, ["ep"])
    assert mesh.parse("dp=4,ep=8", H200, ep=["dp"]).P == 4


def test_links_are_named_one_by_one_or_for_all():
    assert [d.link.name for d in mesh.parse("node=2,ep=8", H200, links="ep=pcie").dims] == ["ib-ndr", "pcie5"]
    assert [d.link.name for d in mesh.parse("node=2,ep=8", H200, links="ethernet").dims] == ["ethernet", "ethernet"]


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        ("", {}, r"'' is not a dimension; write NAME=SIZE"),
        ("ep", {}, r"mesh 'ep' cannot be used: 'ep' is not a dimension; write NAME=SIZE"),
        ("ep=0", {}, r"ep=0 is no size; give a whole number of at least 1"),
        ("ep=-2", {}, r"ep=-2 is no size"),
        ("ep=2.5", {}, r"ep=2\.5 is no size"),
        ("ep=٣", {}, r"is no size"),
        ("ep=2,ep=4", {}, r"dimension 'ep' occurs twice"),
        ("dp=2", {}, r"no dimension is called 'ep' or 'node'.*--ep with one of dp"),
        ("dp=2,ep=2", {"ep": ["tp"]}, r"the EP dimension 'tp' is not in it; name one of dp, ep"),
        ("ep=2", {"links": "node=ib"}, r"the link 'node=ib' belongs to no dimension.*one of ep"),
        ("ep=2", {"links": "ep=ib,nvlink"}, r"the link 'nvlink' belongs to no dimension"),
    ],
)
def test_bad_meshes_are_refused_with_value_place_and_change(text, options, words):
    with pytest.raises(errors.BadMesh, match=words):
        mesh.parse(text, H200, **options)


def test_calibrated_links_are_found_for_the_nearest_number_of_ranks(own_cache):
    assert mesh.parse("ep=2", CPU).dims[0].link.name == "gloo"
    for ranks in (2, 8):
        found = Link(name=f"gloo-{ranks}", bandwidth=1e9, latency=0.0, source="calibrated")
        assert links.save(found, "cpu", ranks) is not None
    assert [mesh.parse(f"ep={P}", CPU).dims[0].link.name for P in (2, 3, 6, 64)] == [
        "gloo-2",
        "gloo-2",
        "gloo-8",
        "gloo-8",
    ]


def test_foreign_and_damaged_profiles_are_ignored_and_said(own_cache, caplog):
    path = links.save(Link(name="old", bandwidth=1e9, latency=0.0), "cpu", 2)
    content = json.loads(path.read_text())
    cache.write(links.profile_file("cpu", 2), content | {"machine": {"processor": "another"}})
    links.forget()
    assert links.calibrated("cpu", 2) is None
    assert "another machine" in caplog.text
    cache.write(links.profile_file("cpu", 2), content | {"link": {"name": "old"}})
    links.forget()
    assert links.calibrated("cpu", 2) is None
    assert "bandwidth" in caplog.text or "validation error" in caplog.text
