"""The package as an installer and an importer see it."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata, resources
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import moepass

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
#: Folder in the repository -> import name (setuptools package-dir).
TOP_LEVEL = {"moepass": "moepass", "lowering": "moepass.lowering", "kernels": "moepass.kernels"}


def _run_outside(code: str, cwd: Path) -> str:
    """Standard output of a fresh interpreter that cannot see the repository through its working directory."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def _folders_with_python() -> set[str]:
    names = set()
    for folder, name in TOP_LEVEL.items():
        for init in (ROOT / folder).rglob("*.py"):
            parts = init.parent.relative_to(ROOT / folder).parts
            names.add(".".join((name, *parts)))
    return names


def _data_files() -> set[str]:
    """Every file under the packages that is neither Python source nor a cache, named as in the wheel."""
    found = set()
    for folder, name in TOP_LEVEL.items():
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and path.suffix not in {".py", ".pyc"} and "__pycache__" not in path.parts:
                found.add(f"{name.replace('.', '/')}/{path.relative_to(ROOT / folder).as_posix()}")
    return found


def test_the_package_list_is_what_is_on_disk():
    assert sorted(PYPROJECT["tool"]["setuptools"]["packages"]) == sorted(_folders_with_python())


def test_every_package_folder_has_an_init():
    for name in _folders_with_python():
        assert importlib.import_module(name).__file__, f"{name} is a namespace package: add __init__.py"


def test_kernels_and_lowering_are_not_importable_at_the_top_level(tmp_path):
    code = (
        "import importlib.util, json, moepass.lowering, moepass.kernels\n"
        "found = [importlib.util.find_spec(name) for name in ('kernels', 'lowering')]\n"
        "print(json.dumps([str(spec.origin or spec.submodule_search_locations) for spec in found if spec]))"
    )
    assert [place for place in json.loads(_run_outside(code, tmp_path)) if str(ROOT) in place] == []


def test_kernels_and_lowering_are_not_importable_at_the_top_level_of_the_test_process():
    for name in ("kernels", "lowering"):
        spec = importlib.util.find_spec(name)
        places = [] if spec is None else [spec.origin or "", *(spec.submodule_search_locations or [])]
        ours = [place for place in places if place.startswith(str(ROOT) + os.sep) and ".venv" not in place]
        assert ours == [], f"the repository's folder stands on sys.path and hides the package {name!r}"


def test_import_moepass_does_not_import_torch(tmp_path):
    code = (
        "import sys, moepass; moepass.__version__; dir(moepass)\n"
        "print(sorted({'torch', 'pydantic', 'rich'} & set(sys.modules)))"
    )
    assert _run_outside(code, tmp_path) == "[]"


def test_the_backend_is_found_by_name_without_importing_moepass(tmp_path):
    code = "import sys, torch; print('moepass' in torch.compiler.list_backends(), 'moepass' in sys.modules)"
    assert _run_outside(code, tmp_path) == "True False"


def test_entry_points_name_the_backend_and_the_command_line():
    project = PYPROJECT["project"]
    asked = {**project["entry-points"], "console_scripts": project["scripts"]}
    assert set(asked) == {"torch_dynamo_backends", "console_scripts"}
    for group, wanted in asked.items():
        (entry,) = metadata.entry_points(group=group, name="moepass")
        assert {entry.name: entry.value} == wanted, (
            "install the package again: its metadata is older than pyproject.toml"
        )
        assert callable(entry.load())


@pytest.mark.parametrize("name", sorted(moepass._PUBLIC))
def test_every_public_name_loads(name):
    assert getattr(moepass, name) is not None
    assert name in dir(moepass)


def test_all_lists_exactly_the_public_table():
    assert moepass.__all__ == sorted(moepass.__all__, key=lambda n: (not n[0].isupper(), n))
    assert set(moepass.__all__) == {*moepass._PUBLIC, "__version__"}


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'turn_into_moe'"):
        _ = moepass.turn_into_moe  # type: ignore[attr-defined]


def test_the_version_is_written_once_more_and_equal():
    assert moepass.__version__ == PYPROJECT["project"]["version"] == metadata.version("moepass")


def test_the_package_is_marked_as_typed():
    assert resources.files("moepass").joinpath("py.typed").is_file()


def _constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {name.lower().replace("_", "-"): version for name, version in pins}


def _requirements() -> list[Requirement]:
    project = PYPROJECT["project"]
    extras = [text for group in project["optional-dependencies"].values() for text in group]
    return [Requirement(text) for text in (*project["dependencies"], *extras, *PYPROJECT["build-system"]["requires"])]


@pytest.mark.parametrize("requirement", _requirements(), ids=str)
def test_every_requirement_is_pinned_within_its_bounds(requirement):
    assert _constraints()[requirement.name] in requirement.specifier


@pytest.mark.parametrize("name", ["torch", "transformers", "numpy", "pydantic", "networkx", "pytest", "ruff", "mypy"])
def test_this_environment_is_the_pinned_one(name):
    assert metadata.version(name).split("+")[0] in SpecifierSet(f"=={_constraints()[name]}")


def test_the_licence_is_apache_2():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text.splitlines()[0]
    assert "END OF TERMS AND CONDITIONS" in text


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> list[str]:
    """Names in a wheel built from a copy of the sources (building in place would leave build/ behind)."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    for folder in TOP_LEVEL:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", out, "."]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = out.glob("*.whl")
    return zipfile.ZipFile(built).namelist()


def test_the_wheel_holds_every_source_file(wheel):
    for folder, name in TOP_LEVEL.items():
        for path in (ROOT / folder).rglob("*.py"):
            assert f"{name.replace('.', '/')}/{path.relative_to(ROOT / folder).as_posix()}" in wheel


def test_the_wheel_holds_presets_templates_and_the_type_marker(wheel):
    data = _data_files()
    assert "moepass/py.typed" in data
    assert any(name.startswith("moepass/lowering/presets/") for name in data)
    assert data <= set(wheel), f"not packaged: {sorted(data - set(wheel))}; add them to tool.setuptools.package-data"


def test_the_wheel_has_one_top_level_package(wheel):
    tops = {name.split("/")[0] for name in wheel}
    assert {name for name in tops if not name.endswith(".dist-info")} == {"moepass"}


def test_ci_runs_lint_and_types_and_the_tests_last():
    steps = [line.split()[-1] for line in (ROOT / ".ci" / "run").read_text().splitlines() if line.startswith("make")]
    assert steps == ["lint", "types", "test"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_both_commands_of_the_readme_are_make_targets():
    makefile = (ROOT / "Makefile").read_text().splitlines()
    for target in ("demo", "test"):
        assert f"make {target}" in (ROOT / "README.md").read_text()
        assert any(line.startswith(f"{target}:") for line in makefile)
