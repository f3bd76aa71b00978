"""The exported package is what the notebooks say, and nothing else."""

from __future__ import annotations

import ast
import importlib
import json
import pkgutil
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

import pytest

import mltrading
from mltrading.core.notebooks import FLOORS, exported, notebooks, readme, stale_modules, stored_form

ORDER = (*FLOORS, "cli")
BESIDE = {("features", "labels"), ("labels", "features")}


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.py"))}


def test_export_changes_nothing(root: Path, tmp_path: Path) -> None:
    for name in ("nbs", "mltrading"):
        shutil.copytree(root / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for name in ("settings.ini", "pyproject.toml"):
        shutil.copy(root / name, tmp_path / name)
    subprocess.run([str(Path(sys.executable).with_name("nbdev_export"))], cwd=tmp_path, check=True)
    before, after = tree(root / "mltrading"), tree(tmp_path / "mltrading")
    assert sorted(before) == sorted(after)
    assert [name for name in after if before[name] != after[name]] == [], "run `make refresh`"


def test_no_stale_modules(root: Path) -> None:
    assert stale_modules(root) == [], "run `make refresh`"


def test_one_notebook_per_module(root: Path) -> None:
    assert {m: c for m, c in exported(root).items() if len(c) > 1} == {}


def test_every_module_imports() -> None:
    for module in pkgutil.walk_packages(mltrading.__path__, "mltrading."):
        importlib.import_module(module.name)


def test_imports_go_down(root: Path) -> None:
    wrong = []
    for path in sorted((root / "mltrading").rglob("*.py")):
        parts = path.relative_to(root / "mltrading").with_suffix("").parts
        if path.name == "_modidx.py" or parts[0] == "__init__":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                package = [*parts[:-1]][: len(parts) - node.level] + (node.module or "").split(".")
                target = package[0]
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mltrading."):
                target = node.module.split(".")[1]
            else:
                continue
            if target in ORDER and target != parts[0] and (parts[0], target) not in BESIDE and ORDER.index(target) > ORDER.index(parts[0]):
                wrong.append(f"{path.relative_to(root)}:{node.lineno} imports {target}")
    assert wrong == []


def test_modules_import_each_other_relatively(root: Path) -> None:
    """The export makes an import relative where it stands on one line."""
    wrong = [f"{path.relative_to(root)}:{node.lineno}" for path in sorted((root / "mltrading").rglob("*.py")) for node in ast.parse(path.read_text()).body
             if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "mltrading"]
    assert wrong == [], "write the import on one line"


def test_notebooks_are_in_their_stored_form(root: Path) -> None:
    unclean = [p.relative_to(root) for p in notebooks(root) if stored_form(json.loads(p.read_text()), "pipeline" in p.parts) != p.read_text()]
    assert unclean == [], "run `make refresh`"


def test_pipeline_notebooks_are_thin(root: Path) -> None:
    for path in sorted((root / "nbs" / "pipeline").glob("*.ipynb")):
        cells = json.loads(path.read_text())["cells"]
        code = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
        kinds = {type(n) for n in ast.walk(ast.parse(code))}
        assert not kinds & {ast.FunctionDef, ast.ClassDef, ast.For, ast.While}, path.name
        assert sum("parameters" in c["metadata"].get("tags", []) for c in cells) == 1, path.name


def test_readme_is_the_front_page(root: Path) -> None:
    assert (root / "README.md").read_text() == readme(root), "run `make refresh`"


def test_installed_is_what_is_locked(root: Path) -> None:
    locked = dict(line.split("==") for line in (root / "constraints.txt").read_text().splitlines() if "==" in line)
    locked = {name.lower().replace("_", "-").replace(".", "-"): version for name, version in locked.items()}
    wrong = {}
    for d in metadata.distributions(path=[sysconfig.get_paths()["purelib"]]):  # not what a library brings along and puts on the path
        name = d.metadata["Name"].lower().replace("_", "-").replace(".", "-")
        if name in ("mltrading", "pip") or name.startswith(("nvidia-", "triton", "cuda-")):  # the CUDA parts of a torch built for it
            continue
        if locked.get(name) != d.version.split("+")[0]:
            wrong[name] = (d.version, locked.get(name))
    assert wrong == {}


def test_torch_is_the_pinned_one(root: Path) -> None:
    assert "torch==2.13.0" in (root / "constraints.txt").read_text().split()


@pytest.mark.parametrize("name", ["settings.ini", "pyproject.toml"])
def test_version_stands_in_one_place(root: Path, name: str) -> None:
    text = (root / name).read_text()
    assert (f"version = {mltrading.__version__}" in text) if name == "settings.ini" else ("dynamic = [\"version\"]" in text)
