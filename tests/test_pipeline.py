"""The pipeline's description and its notebooks fit together."""

from __future__ import annotations

import ast
import itertools
import json
import shutil
from functools import cache
from pathlib import Path

import nbformat
import pytest
from dvc.utils.serialize import modify_yaml
from nbclient import NotebookClient

from mltrading.backtest.costs import CostParams
from mltrading.backtest.engine import BacktestParams
from mltrading.core.notebooks import clean, contents, readme
from mltrading.core.params import UniverseParams, block, load_params, read_params, read_yaml, run_systems
from mltrading.core.pipeline import stages
from mltrading.core.storage import read_json
from mltrading.features.registry import FeatureParams
from mltrading.labels.horizons import LabelParams
from mltrading.market.scope import PanelParams
from mltrading.models.zoo import ModelsParams
from mltrading.reports.league import read_metrics, results_markdown, results_sentence
from mltrading.systems.base import load_system, system_names
from mltrading.systems.strategies import StrategiesParams
from mltrading.systems.trade import check_fill
from mltrading.validation.splits import ValidationParams


def test_running_a_notebook_by_hand_and_cleaning_it_changes_no_byte(project: Path, embedded_data: Path) -> None:
    """As JupyterLab would: execute all cells, save, clean."""
    (project / "nbs").unlink()
    shutil.copytree(Path(__file__).parents[1] / "nbs" / "pipeline", project / "nbs" / "pipeline", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    shutil.copytree(embedded_data, project / "data")
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


@cache
def imported(source: str, package: tuple[str, ...]) -> set[str]:
    """Modules of this project that a source imports, as dotted names below `mltrading`."""
    found, tree = set(), ast.parse(source)
    unused = {inner for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" for inner in ast.walk(node)}  # never executed
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node not in unused:
            base = package[: len(package) - node.level + 1] if node.level else ()
            name = ".".join([*base, *filter(None, [node.module])])
            if node.level or name.startswith("mltrading."):
                name = name.removeprefix("mltrading.")
                found |= {name, *(f"{name}.{a.name}" for a in node.names)}
    return found


def test_every_stage_declares_what_it_imports(root: Path) -> None:
    """Directly or through another module: otherwise a change would leave a stale output locked."""
    package = root / "mltrading"
    stages = read_yaml(root / "dvc.yaml")["stages"].items()
    for (name, entry), system in itertools.product(stages, system_names()):
        deps = [str(d).replace("${item.system}", system) for d in entry["deps"]]
        notebook = next(d for d in deps if d.endswith(".ipynb"))
        cells = json.loads((root / notebook).read_text())["cells"]
        todo = set() | imported("\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code"), ())
        if name in ("backtest", "report"):  # these load the system, and use it whole
            todo.add(f"systems.{system}.system")
        seen: set[str] = set()
        while todo:
            module = todo.pop()
            path = package / (module.replace(".", "/") + ".py")
            if module in seen or not path.exists():
                continue
            seen.add(module)
            todo |= imported(path.read_text(), tuple(module.split(".")[:-1]))
        undeclared = [m for m in sorted(seen) if not any(f"mltrading/{m.replace('.', '/')}.py".startswith(d) for d in deps)]
        assert undeclared == [], f"{name} uses {undeclared}"


def test_parameters_survive_an_experiment(root: Path, tmp_path: Path) -> None:
    """DVC writes the file anew, without quotes: what needs them is read as something else."""
    shutil.copy(root / "params.yaml", tmp_path)
    with modify_yaml(str(tmp_path / "params.yaml")) as plain:
        plain["compute"]["seed"] = 1
    told, before = read_yaml(tmp_path / "params.yaml"), read_yaml(root / "params.yaml")
    assert told.pop("compute") == before.pop("compute") | {"seed": 1}
    assert told == before


def test_parameters_are_known(root: Path) -> None:
    params = read_params(root)
    for system in params["systems"]:
        for profile in params["profiles"]:
            load_params(system, profile, root)


def test_what_is_learned_fits_together(root: Path) -> None:
    """Under every profile, before anything is computed: models learn what strategies ask for, of labels that there are."""
    for system in (params := read_params(root))["systems"]:
        for profile in params["profiles"]:
            given = load_params(system, profile, root)
            block(FeatureParams, given["features"], "features")
            block(ValidationParams, given["validation"], "validation")
            labels, models = block(LabelParams, given["labels"], "labels"), block(ModelsParams, given["models"], "models")
            block(StrategiesParams, given["strategies"], "strategies").check(models.specs(), labels, [], given["choice"].get("among", []))


def test_what_is_traded_fits_together(root: Path) -> None:
    for system in (params := read_params(root))["systems"]:
        for profile in params["profiles"]:
            given = load_params(system, profile, root)
            block(PanelParams, given["panel"], "panel")
            block(BacktestParams, given["backtest"], "backtest")
            block(load_system(system).Rules, given["policy"], "policy")
            check_fill(block(LabelParams, given["labels"], "labels").fill, block(CostParams, given["costs"], "costs").fill)


def test_every_fund_of_a_universe_has_its_place(root: Path) -> None:
    """Where the system of regimes runs: one class for each fund, and nobody has a role who is not there."""
    params = read_params(root)
    names = [name for name in params["universes"] if "regime" in run_systems(name, params)]
    assert names == ["etf65"]
    for name in names:
        universe, given = block(UniverseParams, params["universes"][name], name), load_params("regime", name, root)
        there = [s for table in universe.tables.values() for s in table.symbols]
        assert len(there) == len(set(there)) == 65
        assert set(universe.symbols) == set(there)
        assert set(given["panel"]["bars"]) == set(universe.tables)
        listed = [s for symbols in given["policy"]["universe"]["classes"].values() for s in symbols]
        assert sorted([*listed, given["panel"]["benchmark"]]) == sorted(there)
        assert set(given["policy"]["universe"]["leveraged"]) == {s for s, told in universe.symbols.items() if told.kind == "leveraged"}
        roles, experts = given["features"]["context"], given["policy"]["experts"]
        assert {*(roles[r] for r in ("market", "duration", "credit", "long_bonds")), experts["macro_credit"]["safe"], experts["macro_credit"]["risky"], *experts["fragility"]["symbols"], experts["entropy_shift"]["market"]} <= set(there)
        assert {*(roles[r] for r in ("vix", "slope_long", "slope_short")), *(experts["macro_credit"][r] for r in ("slope_long", "slope_short")), *(experts["volatility_complexity"][r] for r in ("vix", "vvix", "skew"))} == set(universe.macro)


def test_stages_run_in_order(root: Path) -> None:
    chain = ["panel", "features", "train", "backtest", "report"]
    for profile, systems in {"default": read_params(root)["run"]["systems"], "etf65": ["regime"], "etf230": ["multiasset"], "sp500": ["multiasset"], "published": ["multiasset"]}.items():
        order = stages(root, profile)
        assert {of for _, of in order} == {*systems, ""}
        for system in systems:
            assert [s for s, of in order if of == system] == chain
        assert sorted(s for s, of in order if not of) == ["catalogue", "compare", "quality"]
        assert order[-1] == ("compare", "")
    assert {of for _, of in stages(root, "etf65", only="multiasset")} == {"multiasset", ""}


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
