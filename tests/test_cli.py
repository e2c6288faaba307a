"""The command line: what reaches stdout, how errors look, and how MODEL is loaded and fed."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

import moepass
import moepass.preview
from moepass import cli, errors
from moepass.explain import inputs, targets
from moepass.explain.report import PlanReport, SitePlan
from moepass.lowering.plan import TokenRange

runner = CliRunner()


class Blocks(nn.Module):
    """Two feed-forward blocks behind an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)
        self.table = torch.ones(8)  # a tensor that is neither parameter nor buffer

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids) * self.table
        return x + self.down(nn.functional.gelu(self.up(x)))


class Rows(nn.Module):
    """One block over activations."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.gelu(self.up(x)))


class Explained:
    """Stands in for ``moepass.preview.model.explain``: records calls, reports one site per token count."""

    def __init__(self) -> None:
        self.calls: list[types.SimpleNamespace] = []
        self.error: Exception | None = None

    def __call__(self, model: nn.Module, **options: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> PlanReport:
            if self.error is not None:
                raise self.error
            tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)]
            out = torch.compile(model, backend="eager")(*args, **kwargs)
            print("the model prints this")
            first = tensors[0]
            seen = first.numel() if not first.is_floating_point() else first.numel() // first.shape[-1]
            self.calls.append(
                types.SimpleNamespace(
                    model=model, options=options, tensors=tensors, out=out, grad=torch.is_grad_enabled()
                )
            )
            sites = tuple(
                SitePlan(
                    id="mlp", kind="dense_ffn", status="lowered", lowering="dense", tokens=TokenRange(low=t, high=t)
                )
                for t in options.get("tokens") or (seen,)
            )
            return PlanReport(kind="explain", hardware="H100", device="meta", sites=sites)

        return run


@pytest.fixture
def explained(monkeypatch: pytest.MonkeyPatch) -> Explained:
    fake = Explained()
    monkeypatch.setitem(sys.modules, "moepass.preview.model", types.SimpleNamespace(explain=fake))
    monkeypatch.setattr(moepass.preview, "model", sys.modules["moepass.preview.model"], raising=False)
    return fake


@pytest.fixture
def llama(tmp_path: Path) -> str:
    from transformers import LlamaConfig

    LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=32,
        max_position_embeddings=64,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path / "llama")
    return str(tmp_path / "llama")


@pytest.fixture
def script(tmp_path: Path) -> str:
    """A user's file: ``rows`` comes with an example, ``bare`` without, ``wrong`` is no model."""
    path = tmp_path / "user_models.py"
    path.write_text(
        "import torch\nfrom torch import nn\n"
        "def bare():\n    print('hello')\n    return nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))\n"
        "def rows():\n    return bare(), (torch.randn(3, 8),)\n"
        "def images():\n    return nn.Conv2d(3, 4, 2), (torch.randn(1, 3, 4, 4),)\n"
        "def wrong():\n    return 3\n"
    )
    return str(path)


def run(*args: str) -> Result:
    return runner.invoke(cli.app, list(args))


def refused(result: Result) -> str:
    """The one line of an error."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.startswith("moepass: error: ")]
    assert len(lines) == 1
    assert "Traceback" not in result.stderr
    return lines[0]


def test_help_and_version_answer_without_importing_torch():
    code = (
        "import sys; from typer.testing import CliRunner; from moepass.cli import app\n"
        "for flag in ('--help', '--version'):\n"
        "    result = CliRunner().invoke(app, [flag]); assert result.exit_code == 0; print(result.stdout)\n"
        "print('torch' in sys.modules)"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "explain" in child.stdout
    assert f"moepass {moepass.__version__}" in child.stdout
    assert child.stdout.split()[-1] == "False"


def test_json_is_the_only_thing_on_stdout(explained: Explained, script: str):
    result = run("explain", f"{script}:bare", "--tokens", "4", "--format", "json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["summary"]["lowered"] == 1
    assert "hello" in result.stderr
    assert "the model prints this" in result.stderr


def test_several_token_counts_are_planned_in_one_trace_at_the_largest(explained: Explained, llama: str):
    result = run("explain", llama, "--tokens", "512,1,48,48", "--format", "json")
    report = PlanReport.from_json(result.stdout)
    assert [s.tokens for s in report.sites] == [TokenRange(low=t, high=t) for t in (1, 48, 512)]
    (call,) = explained.calls
    assert call.options["tokens"] == (1, 48, 512)
    assert tuple(call.tensors[0].shape) == (8, 64)


def test_the_real_planner_gives_each_token_count_its_own_range(llama: str):
    result = run("explain", llama, "--tokens", "512,1", "--hardware", "H100", "--format", "json")
    report = PlanReport.from_json(result.stdout)
    assert {(s.status, s.tokens.low, s.tokens.high) for s in report.sites} == {("lowered", t, t) for t in (1, 512)}
    assert {s.id for s in report.sites} == {"model.layers.0.mlp", "model.layers.1.mlp"}


def test_a_config_is_built_on_meta_in_evaluation_mode_without_gradients(explained: Explained, llama: str):
    assert run("explain", llama, "--tokens", "4", "--dtype", "bfloat16").exit_code == 0
    (call,) = explained.calls
    assert {p.device.type for p in call.model.parameters()} == {"meta"}
    assert {p.dtype for p in call.model.parameters()} == {torch.bfloat16}
    assert type(call.model).__name__ == "LlamaForCausalLM"
    assert not call.model.training
    assert not call.grad
    assert call.out.logits.shape == (1, 4, 32)
    assert torch.get_default_dtype() is torch.float32


def test_train_prices_with_gradients(explained: Explained, llama: str):
    assert run("explain", llama, "--tokens", "4", "--train").exit_code == 0
    assert explained.calls[0].model.training
    assert explained.calls[0].grad


def test_options_reach_explain_only_where_given(explained: Explained, script: str):
    assert run("explain", f"{script}:rows").exit_code == 0
    flags = ["--hardware", "A100", "--experts", "4", "--top-k", "1", "--no-convert", "--strict"]
    refused(run("explain", f"{script}:rows", *flags))  # top-1 with renormalisation cannot learn
    flags[5] = "3"
    assert run("explain", f"{script}:rows", *flags).exit_code == 0
    first, second = (call.options for call in explained.calls)
    assert first == {"tokens": None, "routing": "random"}  # those of the example
    spec = second.pop("spec")
    assert second == {"tokens": None, "routing": "random", "hardware": "A100", "convert": False, "strict": True}
    assert (spec.experts.num_experts, spec.router.top_k) == (4, 3)


def test_an_example_is_used_as_it_is_and_resized_on_request(explained: Explained, script: str):
    assert run("explain", f"{script}:rows").exit_code == 0
    assert run("explain", f"{script}:rows", "--tokens", "7", "--dtype", "float16").exit_code == 0
    shapes = [(tuple(c.tensors[0].shape), c.tensors[0].dtype) for c in explained.calls]
    assert shapes == [((3, 8), torch.float32), ((7, 8), torch.float16)]
    assert explained.calls[1].out.shape == (7, 8)


def test_an_importable_module_is_found_in_the_working_directory(
    explained: Explained, script: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(Path(script).parent)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    monkeypatch.delitem(sys.modules, "user_models", raising=False)
    assert run("explain", "user_models:bare", "--tokens", "2").exit_code == 0
    assert explained.calls[0].out.shape == (2, 8)


def test_an_exported_program_is_fed_within_its_dynamic_shapes(explained: Explained, tmp_path: Path):
    path = tmp_path / "blocks.pt2"
    length = torch.export.Dim("length", min=1, max=100)
    program = torch.export.export(Blocks(), (torch.zeros(2, 7, dtype=torch.long),), dynamic_shapes={"ids": {1: length}})
    torch.export.save(program, path)
    assert run("explain", str(path)).exit_code == 0
    assert run("explain", str(path), "--tokens", "10").exit_code == 0
    assert [tuple(c.tensors[0].shape) for c in explained.calls] == [(2, 7), (2, 5)]
    assert explained.calls[1].out.device.type == "meta"
    assert "cannot make 9 tokens" in refused(run("explain", str(path), "--tokens", "9"))
    assert "cannot make 400 tokens" in refused(run("explain", str(path), "--tokens", "400"))
    assert "dtype" in refused(run("explain", str(path), "--dtype", "float16"))


def test_a_static_exported_program_has_one_token_count(explained: Explained, tmp_path: Path):
    path = tmp_path / "static.pt2"
    torch.export.save(torch.export.export(Rows(), (torch.zeros(6, 8),)), path)
    assert run("explain", str(path), "--tokens", "6").exit_code == 0
    assert "exactly 6 tokens" in refused(run("explain", str(path), "--tokens", "7"))


@pytest.mark.parametrize(
    ("model", "complaint"),
    [
        ("no-such-model", "neither a folder with config.json"),
        ("gone.pt2", "no such file"),
        ("bad.pt2", "torch.export.load cannot read it"),
        (".", "no config.json"),
        ("broken", "transformers cannot build it"),
        ("unknown", "transformers cannot build it"),
        ("gone.py:f", "no file gone.py"),
        ("no_such_module:f", "No module named 'no_such_module'"),
        ("user_models.py:nothing", "no function 'nothing'"),
        ("user_models.py:wrong", "returned int"),
    ],
)
def test_a_model_that_cannot_be_loaded_is_one_line(
    model: str, complaint: str, explained: Explained, script: str, monkeypatch: pytest.MonkeyPatch
):
    folder = Path(script).parent
    monkeypatch.chdir(folder)
    (folder / "bad.pt2").write_bytes(b"nonsense")
    for name, content in (("broken", "{"), ("unknown", '{"model_type": "no_such_type"}')):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(content)
    assert complaint in refused(run("explain", model))
    assert explained.calls == []


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--tokens", "many"], "--tokens"),
        (["--tokens", "0,4"], "--tokens"),
        (["--tokens", ""], "--tokens"),
        (["--dtype", "int8"], "--dtype"),
        (["--experts", "0"], "--experts"),
        (["--experts", "2", "--top-k", "3"], "exceeds the 2 experts"),
    ],
)
def test_a_bad_flag_is_one_line(flags: list[str], complaint: str, explained: Explained, script: str):
    assert complaint in refused(run("explain", f"{script}:rows", *flags))


def test_inputs_that_have_no_token_dimension_are_not_resized(explained: Explained, script: str):
    assert "[1, 3, 4, 4]" in refused(run("explain", f"{script}:images", "--tokens", "5"))
    assert "has neither" in refused_guess(nn.ReLU())


def refused_guess(model: nn.Module) -> str:
    with pytest.raises(errors.BadTarget) as caught:
        inputs.guess("m", model)
    return str(caught.value)


def test_an_error_that_dynamo_wrapped_is_still_one_line(explained: Explained, script: str):
    wrapped = RuntimeError("backend='moepass' raised")
    wrapped.inner_exception = errors.SiteRejected(where="rows", reason="no_home", detail="none")  # type: ignore[attr-defined]
    explained.error = wrapped
    assert "rows: no_home (none)" in refused(run("explain", f"{script}:rows", "--strict"))


def test_an_error_that_is_not_ours_keeps_its_traceback(explained: Explained, script: str):
    explained.error = ZeroDivisionError("a bug in the model")
    result = run("explain", f"{script}:rows")
    assert isinstance(result.exception, ZeroDivisionError)
    assert result.exit_code == 1


@pytest.mark.parametrize(("format", "start"), [("text", "moepass plan"), ("json", "{"), ("html", "<!DOCTYPE html>")])
def test_output_goes_to_a_file_and_leaves_stdout_empty(
    format: str, start: str, explained: Explained, script: str, tmp_path: Path
):
    path = tmp_path / "out" / "plan"
    result = run("explain", f"{script}:rows", "--format", format, "-o", str(path))
    assert (result.exit_code, result.stdout) == (0, "")
    assert path.read_text().startswith(start)


def test_an_output_that_cannot_be_written_is_one_line(explained: Explained, script: str, tmp_path: Path):
    assert "--output" in refused(run("explain", f"{script}:rows", "-o", str(tmp_path)))
    assert sorted(p.suffix for p in tmp_path.iterdir() if p.is_file()) == [".py"]


def test_a_model_moves_to_meta_with_tensors_that_are_not_registered():
    model = inputs.module_to_meta(Blocks())
    assert model.table.device.type == "meta"
    assert model(torch.zeros(1, 3, dtype=torch.long, device="meta")).shape == (1, 3, 8)


@pytest.mark.parametrize(
    ("tokens", "shape"), [(1, (1, 1)), (64, (1, 64)), (65, (5, 13)), (67, (67, 1)), (512, (8, 64))]
)
def test_token_ids_use_the_longest_sequence_that_the_positions_allow(tokens: int, shape: tuple[int, int]):
    config = types.SimpleNamespace(max_position_embeddings=64)
    given = inputs.for_transformers("m", "input_ids", {"decoder_input_ids"}, config, torch.float32, tokens)
    assert {tuple(v.shape) for v in given.values()} == {shape}
    assert set(given) == {"input_ids", "decoder_input_ids"}


def test_images_hold_about_the_wanted_number_of_patches():
    config = types.SimpleNamespace(image_size=32, patch_size=8, num_channels=3)
    given = inputs.for_transformers("m", "pixel_values", set(), config, torch.float32, 100)
    assert given["pixel_values"].shape == (6, 3, 32, 32)


def test_an_unknown_main_input_is_refused():
    with pytest.raises(errors.BadTarget, match="input_features"):
        inputs.for_transformers("m", "input_features", set(), types.SimpleNamespace(), torch.float32, 1)


def test_missing_transformers_says_what_to_install(llama: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(errors.MissingPackage, match=r"moepass\[transformers\]"):
        targets.load(llama)


def test_calibrate_prints_the_profile_as_json(monkeypatch: pytest.MonkeyPatch):
    from moepass.lowering import calibrate
    from moepass.lowering.hardware import Hardware

    def measure(device: str, *, progress: Any) -> Hardware:
        progress("a GEMM")
        return Hardware(name=f"this {device}", device=device, flops={"float32": 1e9}, bandwidth=1e9, launch=1e-6)

    monkeypatch.setattr(calibrate, "calibrate", measure)
    result = run("calibrate")
    assert result.exit_code == 0, result.output
    assert Hardware.model_validate_json(result.stdout).name == "this cpu"


def test_calibrate_of_a_missing_device_is_one_line(monkeypatch: pytest.MonkeyPatch):
    assert "device" in refused(run("calibrate", "--device", "no_such_device"))
