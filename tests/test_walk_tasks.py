"""A walk done by one process, by two and on a cluster: the same bytes; and from a block as from a table; and what a kill in the middle costs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from tasks_work import SEED, THREADS

from mltrading.core.errors import DataError, StageError
from mltrading.core.params import ComputeParams
from mltrading.core.runner import fixed_environment
from mltrading.core.storage import content_id, read_parquet, write_parquet
from mltrading.core.tasks import Task
from mltrading.features.redundancy import SelectionParams
from mltrading.features.registry import compute, write_features
from mltrading.labels.horizons import horizon_sigma, label_frame
from mltrading.market.panel import long_column
from mltrading.market.simulate import random_walk
from mltrading.models.zoo import spec
from mltrading.systems import walk as module
from mltrading.systems.lessons import Rows, rows
from mltrading.systems.strategies import Learner, Strategy
from mltrading.systems.walk import Walked, walk
from mltrading.validation.splits import WalkForward

NAMES = ["ret_1d", "ret_5d", "ret_10d", "vol_20d", "vol_60d", "rsi_14"]
FEW = SelectionParams(max_features=4, max_correlation=0.9, min_presence=0.5, slices=2, row_step=2)
BOOSTED = {"n_estimators": 5, "max_depth": 2, "learning_rate": 0.3, "subsample": 0.8, "colsample_bytree": 0.8, "min_child_weight": 1, "reg_lambda": 1, "max_bin": 32, "early_stopping_rounds": 0, "inner_valid_fraction": 0.2}
LINE = {"l2": 0.01, "winsor": 0.005, "missing_indicators": False, "max_iter": 100}


def how(workers: int = 1, cluster: str | None = None) -> ComputeParams:
    return ComputeParams(seed=SEED, threads=THREADS, workers=workers, cluster=cluster)


def small(folder: Path | None = None) -> Rows:
    """Twenty symbols, of which one is never traded; features in memory, or in a block."""
    panel = random_walk(20, 260, seed=3)
    labels = pd.concat([label_frame(panel, h, "open", vol_bars=20) for h in (1, 5)])
    table = compute(panel, NAMES).to_frame()
    sigma = table[["timestamp", "symbol"]].assign(sigma=long_column(panel, horizon_sigma(panel, 1, 20)))
    return rows(write_features(panel, folder, NAMES) if folder else table, sigma, labels, "S007")


def learners() -> dict[str, Learner]:
    week = Strategy(model="any", horizon_bars=5, target="ret_voladj", scope="pooled", row_step=2)
    day = week.model_copy(update={"horizon_bars": 1, "target": "ret"})
    return {"trees": Learner(week, spec("xgboost", BOOSTED), SEED, THREADS), "line": Learner(day, spec("logistic", LINE), SEED, THREADS),
            "own": Learner(week.model_copy(update={"scope": "asset", "row_step": 1}), spec("logistic", LINE), SEED, THREADS)}


def walked(data: Rows, folder: Path, compute: ComputeParams = how(), unfinished: Path | None = None) -> Walked:  # noqa: B008
    return walk(data, WalkForward(120, 60, 2).folds(data.times, data.end), learners(), folder, FEW, unfinished=unfinished, compute=compute)


def put(done: Walked, folder: Path) -> str:
    """All of it in a folder, and the folder's id."""
    for name in ("forecasts", "quality", "selection", "refused"):
        write_parquet(getattr(done, name), folder / f"{name}.parquet")
    return content_id(folder)


def fresh(folder: Path, workers: int = 1, cluster: str = "", in_a_block: bool = False) -> str:
    """The id of a walk in a process of its own, in the environment that the runner gives a stage."""
    code = ("import sys\nfrom pathlib import Path\nfrom test_walk_tasks import how, put, small, walked\nfolder, workers, cluster, block = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] or None, sys.argv[4]\n"
            "print(put(walked(small(folder.with_name('block') if block else None), folder, how(workers, cluster), folder.with_name('unfinished')), folder))")
    env = os.environ | fixed_environment(THREADS, SEED) | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ["PYTHONPATH"]])}
    return subprocess.run([sys.executable, "-c", code, str(folder), str(workers), cluster, "block" * in_a_block], env=env, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> str:
    return fresh(tmp_path_factory.mktemp("alone") / "models")


def test_two_processes_and_a_block_give_what_one_gives_from_a_table(alone: str, tmp_path: Path) -> None:
    assert fresh(tmp_path / "two", 2, in_a_block=True) == alone
    assert not (tmp_path / "unfinished").exists()
    made = read_parquet(tmp_path / "two" / "forecasts.parquet")
    assert set(made["model"]) == {"trees", "line", "own"}
    assert "S007" not in set(made["symbol"])


@pytest.mark.slow
def test_a_cluster_gives_what_one_process_gives(alone: str, tmp_path: Path, cluster: str) -> None:
    assert fresh(tmp_path / "far", 1, cluster, in_a_block=True) == alone


def test_a_walk_that_was_ended_half_way_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was finished is not done again, and the result is that of a walk that was not disturbed."""
    data, real, tables = small(), module.run_tasks, []

    def stopped(work: object, tasks: list[Task], *rest: object) -> pd.DataFrame:
        first = work is module.fit_and_forecast and not tables
        table = real(work, tasks[:5] if first else tasks, *rest)
        if work is module.fit_and_forecast:
            tables.append(table)
        if first:
            raise KeyboardInterrupt
        return table

    monkeypatch.setattr(module, "run_tasks", stopped)
    with pytest.raises(KeyboardInterrupt):
        walked(data, tmp_path / "models", unfinished=tmp_path / "unfinished")
    again = put(walked(data, tmp_path / "models", unfinished=tmp_path / "unfinished"), tmp_path / "models")
    assert [int(x["kept"].sum()) for x in tables] == [0, 5]
    monkeypatch.undo()
    assert again == put(walked(data, tmp_path / "undisturbed"), tmp_path / "undisturbed")


def test_one_symbol_that_cannot_learn_harms_no_other(tmp_path: Path) -> None:
    data = small()
    late = (data.keys["symbol"] == "S003") & (data.times < data.times[len(data.times) // 2])
    few = {h: t.assign(**{c: t[c].where(t["symbol"] != "S004", t[c].abs()) for c in ("ret", "ret_voladj")}) for h, t in data.labels.items()}
    kept = (~late).to_numpy()
    odd = Rows(data.keys[kept].reset_index(drop=True), data.features[kept].reset_index(drop=True), {h: t[kept].reset_index(drop=True) for h, t in few.items()}, data.sigma[kept])
    done = walked(odd, tmp_path / "models")
    assert {"S003", "S004"} <= set(done.refused["symbol"])
    assert set(done.refused["model"]) == {"own"}
    assert done.refused["reason"].str.len().min() > 10
    assert "S005" in set(done.forecasts.query("model == 'own'")["symbol"])


def test_what_goes_wrong_is_told(tmp_path: Path) -> None:
    data = small()
    folds = WalkForward(120, 60, 2).folds(data.times, data.end)
    still = Rows(data.keys, data.features * 0, data.labels, data.sigma)
    with pytest.raises(DataError, match=r"task fold_000.*none of 6 features has spread"):
        walk(still, folds, learners(), tmp_path, FEW)
    with pytest.raises(DataError, match=r"task fold_000 trees: XGBoost, seed: 'one' is not a whole number"):
        walk(data, folds, {"trees": learners()["trees"]._replace(seed="one")}, tmp_path, FEW)  # type: ignore[arg-type]
    asked = learners()["trees"].strategy.model_copy(update={"target": "nothing"})
    with pytest.raises(StageError, match=r"fold_000 by \d+: KeyError: 'nothing'"):
        walk(data, folds, {"trees": learners()["trees"]._replace(strategy=asked)}, tmp_path, FEW)
    assert not list(tmp_path.rglob("model.json"))
