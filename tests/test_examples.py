"""Every example and every benchmark runs as a user would run it, with small settings."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file

from moepass.decide import HINTS
from moepass.graph.site import EXPERT_REASONS, REASONS
from moepass.lowering.registry import lowerings
from moepass.options import Options
from moepass.spec import InitMethod

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py") if path.stem != "common")


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def example(request: pytest.FixtureRequest) -> ModuleType:
    return _load(ROOT / "examples" / f"{request.param}.py")


@pytest.mark.slow
@pytest.mark.parametrize("example", ["demo"], indirect=True)
def test_the_demo_computes_the_dense_function_and_shows_the_plan(example, capsys):
    torch.compiler.reset()
    relative = example.main(["--tokens", "64", "--layers", "1", "--width", "128", "--repeats", "1"])
    shown = capsys.readouterr().out
    assert relative <= 5e-6
    for promised in (
        "logit difference",
        "Inductor",
        "torch 2",
        "router: a gradient",
        "expert: a gradient",
        "1 lowered",
    ):
        assert promised in shown


@pytest.mark.parametrize("example", ["convert_and_save"], indirect=True)
def test_a_converted_model_survives_the_round_trip_through_safetensors(example, tmp_path):
    assert example.main(["--out", str(tmp_path), "--experts", "4"]) == 0.0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "spec.json"]
    assert json.loads((tmp_path / "spec.json").read_text())["experts"]["num_experts"] == 4
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    assert sum(shape == (4, 512, 128) for name, shape in shapes.items() if name.endswith("w_in")) == 2, "E, 2F/G, D"


@pytest.mark.parametrize("init", ["copy", "virtual-groups"])
@pytest.mark.parametrize("example", ["upcycle_qwen3"], indirect=True)
def test_an_upcycled_qwen3_computes_the_dense_function(example, init, tmp_path, capsys):
    assert example.main(["--out", str(tmp_path / "moe"), "--experts", "4", "--init", init]) <= 5e-6
    shown = capsys.readouterr().out
    assert "Qwen3MoeForCausalLM" in shown
    assert "verdict: EXACT" in shown
    assert (tmp_path / "moe" / "moepass_upcycle.json").is_file()


@pytest.mark.parametrize("example", ["upcycle_llama"], indirect=True)
def test_an_upcycled_llama_computes_the_dense_function_whole_and_granular(example, tmp_path, capsys):
    differences = example.main(["--out", str(tmp_path), "--granularity", "2"])
    assert set(differences) == {"copy", "granular"}
    assert max(differences.values()) <= 5e-6
    assert "MixtralForCausalLM" in capsys.readouterr().out
    assert all((tmp_path / name / "moepass_upcycle.json").is_file() for name in differences)


@pytest.mark.slow
@pytest.mark.parametrize("example", ["train_upcycled"], indirect=True)
def test_an_upcycled_model_is_trained_and_saved_by_stock_tools(example, tmp_path):
    losses = example.main(["--steps", "25", "--out", str(tmp_path / "trained")])
    assert losses["dense"] < losses["random"] - 0.5
    assert losses["upcycled"] == pytest.approx(losses["dense"], abs=0.1)
    assert losses["trained"] < losses["upcycled"] - 0.05
    assert losses["loaded"] == pytest.approx(losses["trained"], abs=1e-5)
    assert json.loads((tmp_path / "trained" / "config.json").read_text())["model_type"] == "mixtral"


SMALL = ["--width", "48", "--layers", "1", "--batch", "4", "--length", "32", "--eval-windows", "4", "--lr", "1e-2"]


@pytest.mark.slow
@pytest.mark.parametrize("example", ["train_tiny"], indirect=True)
def test_upcycled_arms_start_at_the_dense_loss_and_all_arms_learn(example):
    curves = example.main(["--pretrain", "20", "--steps", "30", "--points", "2", *SMALL])
    assert set(curves) == {"dense", "virtual_groups", "copy"}
    start = curves["dense"].held_out[0]
    for curve in curves.values():
        assert curve.held_out[0] == pytest.approx(start, rel=1e-4), "exact at step 0"
        assert curve.held_out[30] < start - 0.05
    assert curves["copy"].parameters > curves["virtual_groups"].parameters > curves["dense"].parameters


@pytest.mark.parametrize("example", ["train_tiny"], indirect=True)
def test_every_arm_sees_the_same_batches_and_none_of_the_held_out_text(example):
    corpus = example.read_corpus(max_bytes=50_000)
    first, second = (example.batches(corpus.train, 2, 16, seed=3) for _ in range(2))
    assert all(torch.equal(next(first), next(second)) for _ in range(5))
    assert corpus.held_out[:200].tolist() != corpus.train[:200].tolist()
    assert bytes(corpus.held_out[:200].tolist()) not in bytes(corpus.train.tolist())


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_explains_its_arguments(name, capsys):
    """In this process: what each imports costs seconds.  ``tests/test_upcycle_quality.py`` runs one as a user does."""
    module = importlib.import_module(f"benchmarks.{name}")
    with pytest.raises(SystemExit) as end:
        module.main(["--help"])
    assert end.value.code == 0
    repeats = name != "long_run"  # every run of which is the same
    assert ("--repeats" in capsys.readouterr().out) == repeats
    assert 'if __name__ == "__main__":' in Path(module.__file__ or "").read_text()


@pytest.fixture
def common() -> ModuleType:
    return _load(ROOT / "benchmarks" / "common.py")


def test_interleaved_sides_take_turns_and_warm_up_is_not_counted(common):
    order: list[str] = []
    sides = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    timings = common.interleaved(sides, repeats=3, warmup=1)
    assert order == list("abbaabba")
    assert {name: timing.repeats for name, timing in timings.items()} == {"a": 3, "b": 3}


def test_a_timing_is_the_median_of_its_samples(common):
    assert common.Timing.of([3.0, 1.0, 100.0]).median == 3.0
    assert common.Timing.of([2.0]) == common.Timing(2.0, 2.0, 2.0, 1)


def test_results_name_the_machine_and_hold_every_number(common, tmp_path, capsys):
    path = common.write("toy", [{"T": 1, "ms": 0.12345}], title="Toy", notes=["one note"], out=tmp_path)
    content = json.loads((tmp_path / "toy.json").read_text())
    assert content["rows"] == [{"T": 1, "ms": 0.12345}]
    assert content["machine"]["torch"] == torch.__version__
    assert {"cpu", "cores", "threads"} <= set(content["machine"])
    assert "| 1 | 0.1235 |" in path.read_text()
    assert "one note" in path.read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["toy.json", "toy.md"]


def test_every_example_is_run_by_a_test():
    text = Path(__file__).read_text()
    ranks = (ROOT / "tests" / "distributed" / "test_ep_example.py").read_text()
    for path in (ROOT / "examples").glob("*.py"):
        assert f'["{path.stem}"]' in text or f'"{path.name}"' in ranks, path.name


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_link_of_a_page_leads_somewhere(page):
    targets = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    assert targets
    for target in targets:
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_no_page_has_a_placeholder(page):
    assert "TBD" not in page.read_text()


def test_the_page_on_plans_lists_every_lowering_and_only_known_reasons():
    page = (ROOT / "docs" / "reading-a-plan.md").read_text()
    codes = set(re.findall(r"^\| `(\w+)` \|", page, flags=re.MULTILINE))
    assert codes - {*REASONS, *EXPERT_REASONS, *HINTS} == set(lowerings())


def test_the_readme_names_every_option_of_the_backend_and_every_init_method():
    readme = (ROOT / "README.md").read_text()
    for name in (*Options.__dataclass_fields__, *get_args(InitMethod)):
        assert f"`{name}`" in readme, name
