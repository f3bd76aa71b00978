"""The whole chain on the small profile: nothing looks ahead, and the same inputs give the same bytes.

The real pipeline notebooks are run through the real runner, in a temporary project that holds the real package and another snapshot.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from mltrading.core import runner
from mltrading.core.blocks import open_block
from mltrading.core.errors import StageError
from mltrading.core.params import read_yaml
from mltrading.core.runner import run_stage
from mltrading.core.storage import content_id, read_parquet
from mltrading.market.panel import BarSet
from mltrading.market.snapshot import Snapshot, examined, read_snapshot, write_snapshot
from mltrading.validation.trials import read_rows, record, trial

SYSTEM, PROFILE = "multiasset", "smoke"
STAGES = ("panel", "features", "train", "backtest")
T = pd.Timestamp("2016-06-01 20:00", tz="UTC")  # inside a test window of the small profile


def shuffled_after(embedded: Path, t: pd.Timestamp | None, seed: int = 0) -> Snapshot:
    """The daily bars and macro values of the embedded snapshot; each symbol's bars, and each series' values, in another order after `t`.

    Each moves by ten places at the most: prices in any order would jump by factors, and an account that is short loses more than it has.
    """
    rng = np.random.default_rng(seed)

    def mix(frame: pd.DataFrame, by: str, columns: list[str]) -> pd.DataFrame:
        out = frame.copy()
        late = frame["timestamp"] > (t or frame["timestamp"].max())
        for _, rows in frame[late].groupby(by):
            out.loc[rows.index, columns] = rows[columns].to_numpy()[np.argsort(np.arange(len(rows)) + rng.uniform(0, 10, len(rows)), kind="stable")]
        return out

    bars = mix(read_parquet(embedded / "bars" / "daily.parquet"), "symbol", ["open", "high", "low", "close", "volume"])
    manifest = read_snapshot(embedded).manifest
    return Snapshot({"daily": [examined(BarSet("daily", bars, "1d", "XNYS", "total"), {})]}, manifest, macro=mix(read_parquet(embedded / "macro.parquet"), "series", ["value"]))


def fewer(block: dict[str, Any]) -> dict[str, Any]:
    """The same parameters with few trees and one epoch: what a model may know of later rows does not hang on their number."""
    most = {"n_estimators": 8, "epochs": 1}
    return {name: fewer(value) if isinstance(value, dict) else min(value, most[name]) if name in most else value for name, value in block.items()}


@pytest.fixture(scope="module")
def new_project(new_project: Callable[[Path], Path]) -> Callable[[Path], Path]:
    """Projects whose ensembles have small members."""
    def make(folder: Path) -> Path:
        params = read_yaml(new_project(folder) / "params.yaml")
        models = params["systems"][SYSTEM]["models"]
        models |= {name: fewer(models[name]) for name in ("ensemble", "small")}
        (folder / "params.yaml").write_text(yaml.safe_dump(params))
        return folder
    return make


def chain(folder: Path, snapshot: Snapshot) -> Path:
    """Run the small chain on a snapshot in a new project; give the folder of its outputs."""
    write_snapshot(snapshot, folder / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLTRADING_ROOT", str(folder))
        for stage in STAGES:
            run_stage(stage, SYSTEM, PROFILE)
    return folder / "build" / "smoke" / SYSTEM


pytestmark = pytest.mark.slow  # the whole pipeline runs twice, once for all of these tests


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory, embedded_data: Path, new_project: Callable[[Path], Path]) -> tuple[Path, Path]:
    """The small chain, run on the real snapshot and on one whose prices after T are shuffled."""
    top = tmp_path_factory.mktemp("chain")
    return chain(new_project(top / "real"), shuffled_after(embedded_data, None)), chain(new_project(top / "shuffled"), shuffled_after(embedded_data, T, seed=1))


def read_table(path: Path) -> pd.DataFrame:
    """A stored table, or a block of rows as one."""
    if not path.is_dir():
        return read_parquet(path)
    block = open_block(path)
    rows = block.between(None, None)
    return block.keys(rows).join(block.take(rows))


def same_until(a: Path, b: Path, column: str, t: pd.Timestamp = T) -> tuple[int, bool]:
    """Rows up to an instant of two tables, compared bit for bit: their number, and whether what follows differs."""
    x, y = read_table(a), read_table(b)
    early, other = x[x[column] <= t], y[y[column] <= t]
    assert list(x.columns) == list(y.columns)
    for name in x.columns:
        left, right = early[name].to_numpy(), other[name].to_numpy()
        if left.dtype.kind == "f":
            left, right = left.view(f"u{left.itemsize}"), right.view(f"u{right.itemsize}")
        np.testing.assert_array_equal(left, right, err_msg=f"{a.name}: {name}")
    return len(early), not x.equals(y)


TABLES = [
    ("panel/panel.parquet", "timestamp"),
    ("features/rows", "timestamp"),
    ("features/sigma.parquet", "timestamp"),
    ("features/labels.parquet", "end"),
    ("train/forecasts.parquet", "timestamp"),
    ("backtest/forecasts.parquet", "timestamp"),
    ("backtest/choice/positions.parquet", "timestamp"),
    ("backtest/xgboost/orders.parquet", "decision_time"),
    ("backtest/xgboost/fills.parquet", "timestamp"),
    ("backtest/xgboost/positions.parquet", "timestamp"),
    ("backtest/xgboost/equity.parquet", "timestamp"),
    ("backtest/logistic/positions.parquet", "timestamp"),
    ("backtest/decisions.parquet", "timestamp"),
    ("backtest/alone.parquet", "timestamp"),
]


@pytest.mark.parametrize(("table", "column"), TABLES)
def test_nothing_stamped_until_t_knows_what_follows(twins: tuple[Path, Path], table: str, column: str) -> None:
    real, shuffled = twins
    rows, differs = same_until(real / table, shuffled / table, column)
    assert rows > 100
    assert differs, "the shuffle after T has to be seen after T, or this test shows nothing"


def test_nothing_knows_what_follows_a_half_day(twins: tuple[Path, Path], tmp_path: Path, embedded_data: Path, new_project: Callable[[Path], Path]) -> None:
    t = pd.Timestamp("2013-11-29 18:00", tz="UTC")
    other = chain(new_project(tmp_path / "other"), shuffled_after(embedded_data, t, seed=2))
    for table, column in TABLES:
        rows, differs = same_until(twins[0] / table, other / table, column, t)
        assert rows
        assert differs


def test_models_fitted_until_t_are_the_same_bytes(twins: tuple[Path, Path]) -> None:
    real, shuffled = twins
    folds = read_parquet(real / "train" / "folds.parquet")
    compared = 0
    for fold in folds.itertuples():
        for model in ("voladj", "day1", "own", "xgboost", "logistic", "constant"):
            pair = [content_id(f / "train" / "models" / model / f"fold_{fold.fold:03d}") for f in twins]
            if fold.test_start <= T:
                assert pair[0] == pair[1], f"{model}, fold {fold.fold}"
                compared += 1
    assert compared >= 3
    assert content_id(real / "train" / "models") != content_id(shuffled / "train" / "models")


def test_features_chosen_until_t_are_the_same(twins: tuple[Path, Path]) -> None:
    folds = read_parquet(twins[0] / "train" / "folds.parquet")
    early = folds.loc[folds["test_start"] <= T, "fold"]
    real, shuffled = (read_parquet(f / "train" / "selection.parquet") for f in twins)
    assert 0 < len(early) < len(folds)
    pd.testing.assert_frame_equal(real[real["fold"].isin(early)], shuffled[shuffled["fold"].isin(early)], check_exact=True)
    assert not real.equals(shuffled)


def test_the_same_inputs_give_the_same_bytes(twins: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    real, _ = twins
    before = {stage: content_id(real / stage) for stage in STAGES}
    pages = {p.name: p.read_bytes() for p in (real / "notebooks").glob("*.html")}
    monkeypatch.setenv("MLTRADING_ROOT", str(real.parents[2]))
    for stage in STAGES[2:]:  # features have tests of their own
        run_stage(stage, SYSTEM, PROFILE)
    assert {stage: content_id(real / stage) for stage in STAGES} == before
    assert {p.name: p.read_bytes() for p in (real / "notebooks").glob("*.html")} == pages


def broken(project: Path, notebook: str, old: str, new: str) -> None:
    """Change a pipeline notebook of a temporary project."""
    if (project / "nbs").is_symlink():
        pages = (project / "nbs").resolve() / "pipeline"
        (project / "nbs").unlink()
        shutil.copytree(pages, project / "nbs" / "pipeline")
    path = project / "nbs" / "pipeline" / notebook
    text = path.read_text()
    assert text.count(json.dumps(old)[1:-1]) == 1
    path.write_text(text.replace(json.dumps(old)[1:-1], json.dumps(new)[1:-1]))


ACCOUNTS = ("choice", "constant", "logistic", "xgboost")
ALONE = tuple(f"alone:{name}" for name in ("choice", "day1", "day3", "day5", "own", "voladj"))
LOOKS = (*ALONE, *ACCOUNTS)
STRATEGIES = ("constant", "day1", "day3", "day5", "logistic", "own", "voladj", "xgboost")
BROKEN = [
    pytest.param("train", "30_train.ipynb", "walk(data, folds, learners,", 'walk(data, folds, learners | {"late": learners["constant"]._replace(seed="one")},', (*STRATEGIES, "late"), "is not a whole number", id="a task that may have seen a test window"),
    pytest.param("train", "30_train.ipynb", "walk(data, folds, learners,", 'walk(data, folds, {"early": learners["constant"]._replace(strategy=None)} | learners,', (), "no attribute", id="before any forecast"),
    pytest.param("backtest", "40_backtest.ipynb", "show(returns_table(ledgers))", "1 / 0", ACCOUNTS, "ZeroDivisionError: division by zero", id="backtest"),
    pytest.param("backtest", "40_backtest.ipynb", "ran = this.accounts(bench)", "from mltrading.systems import forecasting\n    forecasting.looks_at = lambda earned: 1 / 0\n    ran = this.accounts(bench)", LOOKS, "ZeroDivisionError: division by zero", id="accounts of one asset"),
]


@pytest.mark.parametrize(("stage", "notebook", "old", "new", "models", "error"), BROKEN)
def test_a_stage_that_fails_on_a_test_window_is_a_trial(twins: tuple[Path, Path], tmp_path: Path, new_project: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch,
                                                       stage: str, notebook: str, old: str, new: str, models: tuple[str, ...], error: str) -> None:
    project = new_project(tmp_path / "project")
    shutil.copytree(twins[0].parents[2] / "build" / "smoke", project / "build" / "smoke")
    monkeypatch.setenv("MLTRADING_ROOT", str(project))
    ledger = project / "build" / "smoke" / "reports" / "trials" / f"{SYSTEM}.jsonl"
    before = {name: content_id(project / "build" / "smoke" / SYSTEM / name) for name in STAGES}
    broken(project, notebook, old, new)
    for _ in range(2 if stage == "backtest" else 1):  # the same failure is the same trial
        with pytest.raises(StageError, match=error):
            run_stage(stage, SYSTEM, PROFILE)
        failed = read_rows(ledger)[len(LOOKS):]
        assert sorted((r["model"], r["status"]) for r in failed) == [(m, "failed") for m in sorted(models)]
        assert all(error in r["error"] for r in failed)
        assert {name: content_id(project / "build" / "smoke" / SYSTEM / name) for name in STAGES} == before
    if stage == "backtest":
        broken(project, notebook, new, old)
        run_stage(stage, SYSTEM, PROFILE)
        assert len(read_rows(ledger)) == len(LOOKS) + len(models)  # what it found is on record already


def test_rows_that_others_record_while_a_stage_runs_stay(twins: tuple[Path, Path], tmp_path: Path, new_project: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    project = new_project(tmp_path / "project")
    shutil.copytree(twins[0].parents[2] / "build" / "smoke", project / "build" / "smoke")
    monkeypatch.setenv("MLTRADING_ROOT", str(project))
    ledger = project / "build" / "smoke" / "reports" / "trials" / f"{SYSTEM}.jsonl"
    executed = runner.execute

    def interrupted(*args: Any) -> Any:
        done = executed(*args)
        record(ledger, [trial(SYSTEM, "by hand", {}, "d0", None, error="another process")])
        return done

    monkeypatch.setattr(runner, "execute", interrupted)
    run_stage("backtest", SYSTEM, PROFILE)
    assert [r["model"] for r in read_rows(ledger)][len(LOOKS):] == ["by hand"]


ONE_STRATEGY = """from dataclasses import replace

from mltrading.systems.multiasset import system

system.SYSTEM = replace(system.SYSTEM, model="voladj", baselines=("constant",))
"""


def test_a_system_that_trades_one_strategy_needs_no_choice(tmp_path: Path, embedded_data: Path, new_project: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """All stages and the report, with `choice: {}`; the sections about single assets are not there, and nothing else is missing."""
    folder = new_project(tmp_path / "plain")
    params = read_yaml(folder / "params.yaml")
    own = params["systems"][SYSTEM]
    own["choice"], own["strategies"] = {}, {"voladj": own["strategies"]["voladj"] | {"model": "logistic"}, "constant": own["strategies"]["constant"]}
    params["profiles"] = {name: params["profiles"][name] for name in ("default", PROFILE)}  # others change what is not there any more
    params["universes"] = {}
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(ONE_STRATEGY)  # every kernel runs it before anything else
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "site"), os.environ["PYTHONPATH"]]))
    out = chain(folder, shuffled_after(embedded_data, None))
    monkeypatch.setenv("MLTRADING_ROOT", str(folder))
    run_stage("report", SYSTEM, PROFILE)
    assert not {"choices.parquet", "alone.parquet"} & {p.name for p in (out / "backtest").iterdir()}
    assert set(read_parquet(out / "backtest" / "forecasts.parquet")["model"]) == {"voladj", "constant"}
    assert {r["model"] for r in read_rows(folder / "build" / "smoke" / "reports" / "trials" / f"{SYSTEM}.jsonl")} == {"voladj", "constant"}
    numbers = json.loads((folder / "build" / "smoke" / "reports" / "metrics" / f"{SYSTEM}.json").read_text())
    assert numbers["model"] == "voladj"
    assert "profitable" not in numbers
    page = (folder / "build" / "smoke" / "reports" / f"{SYSTEM}.html").read_text()
    assert "Asset by asset" not in page
    assert "How sure is any of this?" in page
