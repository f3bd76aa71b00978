"""The pipeline's description and its notebooks fit together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from mltrading.core.notebooks import clean, contents, readme
from mltrading.core.params import load_params, read_params, read_yaml
from mltrading.core.pipeline import stages
from mltrading.core.storage import read_json
from mltrading.market.snapshot import from_embedded, write_snapshot
from mltrading.reports.league import read_metrics, results_markdown, results_sentence


def test_running_a_notebook_by_hand_and_cleaning_it_changes_no_byte(project: Path) -> None:
    """As JupyterLab would: execute all cells, save, clean."""
    (project / "nbs").unlink()
    shutil.copytree(Path(__file__).parents[1] / "nbs" / "pipeline", project / "nbs" / "pipeline", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    write_snapshot(from_embedded(), project / "data")
    path = project / "nbs" / "pipeline" / "10_panel.ipynb"
    before = path.read_bytes()
    nb = nbformat.read(path, as_version=4)
    NotebookClient(nb, resources={"metadata": {"path": str(path.parent)}}).execute()
    nb.metadata["kernelspec"]["display_name"] = "Python 3 (ipykernel)"
    nbformat.write(nb, path)
    assert path.read_bytes() != before
    assert clean(project) == [path]
    assert path.read_bytes() == before
    assert (project / "build" / "smoke" / "multiasset" / "panel" / "panel.parquet").exists()


def test_every_stage_names_its_inputs(root: Path) -> None:
    """A stage depends on the folders of all modules that its notebook imports, directly or not, and on nothing above them."""
    entries = read_yaml(root / "dvc.yaml")["stages"]
    for name, entry in entries.items():
        path = next(d for d in entry["deps"] if d.endswith(".ipynb"))
        text = "".join("".join(c["source"]) for c in json.loads((root / path).read_text())["cells"])
        needed = {line.split()[1].split(".")[1] for line in text.splitlines() if line.startswith("from mltrading.")}
        declared = {d.removeprefix("mltrading/") for d in entry["deps"] if d.startswith("mltrading/")}
        assert needed <= declared, f"{name}: {sorted(needed - declared)}"


def test_parameters_are_known(root: Path) -> None:
    params = read_params(root)
    for system in params["systems"]:
        for profile in params["profiles"]:
            load_params(system, profile, root)


def test_stages_run_in_order(root: Path) -> None:
    assert [s for s, _ in stages(root)] == ["panel", "features", "train", "backtest", "report", "compare"]


def test_front_page_tells_the_numbers_that_stand_in_git(root: Path) -> None:
    metrics = read_metrics(root / "reports" / "metrics")
    page = readme(root)
    assert results_markdown(metrics) in page
    assert results_sentence(metrics) in page
    assert contents(root) in page.replace("](nbs/", "](")


def test_locked_metrics_are_those_in_git(root: Path) -> None:
    """What dvc.lock says of the metrics is what stands in git."""
    import hashlib

    lock = read_yaml(root / "dvc.lock")["stages"]
    for out in (o for s in lock.values() for o in s["outs"] if o["path"].startswith(("reports/metrics", "reports/trials"))):
        assert hashlib.md5((root / out["path"]).read_bytes(), usedforsecurity=False).hexdigest() == out["md5"], out["path"]


@pytest.mark.parametrize("key", ["sharpe_annual", "cagr", "max_drawdown"])
def test_every_headline_number_has_an_interval(root: Path, key: str) -> None:
    for path in sorted((root / "reports" / "metrics").glob("*.json")):
        for account in read_json(path)["accounts"].values():
            assert account[key]["low"] <= account[key]["value"] <= account[key]["high"]
