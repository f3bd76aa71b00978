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
from mltrading.features.state import ContextParams, context
from mltrading.labels.horizons import horizon_sigma, label_frame
from mltrading.labels.regimes import REGIMES, RegimeParams, label_regimes
from mltrading.market.panel import long_column
from mltrading.market.simulate import random_walk
from mltrading.models.zoo import spec
from mltrading.systems import walk as module
from mltrading.systems.lessons import Rows, market_rows, rows
from mltrading.systems.strategies import Learner, Strategy
from mltrading.systems.walk import Course, Walked, walk
from mltrading.validation.splits import WalkForward

NAMES = ["ret_1d", "ret_5d", "ret_10d", "vol_20d", "vol_60d", "rsi_14"]
FEW = SelectionParams(max_features=4, max_correlation=0.9, min_presence=0.5, slices=2, row_step=2)
BOOSTED = {"n_estimators": 5, "max_depth": 2, "learning_rate": 0.3, "subsample": 0.8, "colsample_bytree": 0.8, "min_child_weight": 1, "reg_lambda": 1, "max_bin": 32, "early_stopping_rounds": 0, "inner_valid_fraction": 0.2}
LINE = {"l2": 0.01, "winsor": 0.005, "missing_indicators": False, "max_iter": 100}
ROLES = ContextParams(market="S000", duration=None, credit=None, long_bonds=None, vix=None, slope_long=None, slope_short=None, short_bars=5, long_bars=20, vol_bars=20, high_bars=40, mean_bars=40, spread_bars=20, bars_per_year=252, max_age_days=10)
RULE = RegimeParams(panic_vix=30, panic_vol=26, panic_drawdown=0.08, risk_off_return=0.04, credit_stress=0.02, calm_vol=20, choppy_vol=20, choppy_return=0.04, min_stay_bars=3)
QUICK = {"epochs": 2, "batch_size": 64, "learning_rate": 0.01, "patience": 0}
NET = {"steps": 5, "width": 8, "heads": 2, "layers": 1, "feedforward": 8, "task": {"kind": "classes", "names": list(REGIMES)}, "train": QUICK}
CODED = {"hidden": [8], "latent": 2, "auxiliary": [{"kind": "health"}, {"kind": "volatility"}], "train": QUICK}
SPLIT = WalkForward(120, 60, 2)


def how(workers: int = 1, cluster: str | None = None) -> ComputeParams:
    return ComputeParams(seed=SEED, threads=THREADS, workers=workers, cluster=cluster)


def small(folder: Path | None = None) -> Rows:
    """Eight symbols, of which one is never traded; features in memory, or in a block."""
    panel = random_walk(8, 260, seed=3)
    labels = pd.concat([label_frame(panel, h, "open", vol_bars=20) for h in (1, 5)])
    table = compute(panel, NAMES).to_frame()
    sigma = table[["timestamp", "symbol"]].assign(sigma=long_column(panel, horizon_sigma(panel, 1, 20)))
    return rows(write_features(panel, folder, NAMES) if folder else table, sigma, labels, "S007")


def moods() -> tuple[pd.DataFrame, pd.DataFrame]:
    """The state of a symbol that has bars throughout, and its regimes."""
    state = context(random_walk(8, 260, seed=3), None, ROLES).rename_axis("timestamp")
    return state.reset_index(), label_regimes(state, RULE).astype("str").reset_index()


def course(state: pd.DataFrame, regimes: pd.DataFrame) -> Course:
    data = market_rows(state, regimes, [1, 5])
    return Course(data, SPLIT.folds(data.times, data.end, state["timestamp"]))


def learners() -> dict[str, Learner]:
    week = Strategy(model="any", horizon_bars=5, target="ret_voladj", scope="pooled", row_step=2)
    day = week.model_copy(update={"horizon_bars": 1, "target": "ret"})
    return {"trees": Learner(week, spec("xgboost", BOOSTED), SEED, THREADS), "line": Learner(day, spec("logistic", LINE), SEED, THREADS),
            "own": Learner(week.model_copy(update={"scope": "asset", "row_step": 1}), spec("logistic", LINE), SEED, THREADS),
            "mood": Learner(week.model_copy(update={"scope": "market", "target": "regime", "row_step": 1}), spec("transformer", NET), SEED, THREADS), "health": Learner(week, spec("autoencoder", CODED), SEED, THREADS)}


def walked(data: Rows, folder: Path, compute: ComputeParams = how(), unfinished: Path | None = None) -> Walked:  # noqa: B008
    return walk(data, SPLIT.folds(data.times, data.end, moods()[0]["timestamp"]), learners(), folder, FEW, unfinished=unfinished, compute=compute, market=course(*moods()))


def put(done: Walked, folder: Path) -> str:
    """All of it in a folder, and the folder's id."""
    for name in ("forecasts", "regimes", "quality", "selection", "refused"):
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


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Walked:
    return walked(small(), tmp_path_factory.mktemp("undisturbed"))


@pytest.mark.slow
def test_two_processes_and_a_block_give_what_one_gives_from_a_table(alone: str, tmp_path: Path) -> None:
    assert fresh(tmp_path / "two", 2, in_a_block=True) == alone
    assert not (tmp_path / "unfinished").exists()
    made = read_parquet(tmp_path / "two" / "forecasts.parquet")
    assert set(made["model"]) == {"trees", "line", "own", "health"}
    assert "S007" not in set(made["symbol"])
    assert set(read_parquet(tmp_path / "two" / "regimes.parquet")["model"]) == {"mood"}


@pytest.mark.slow
def test_a_cluster_gives_what_one_process_gives(alone: str, tmp_path: Path, cluster: str) -> None:
    assert fresh(tmp_path / "far", 1, cluster, in_a_block=True) == alone


def test_a_walk_that_was_ended_half_way_goes_on(tmp_path: Path, undisturbed: Walked, monkeypatch: pytest.MonkeyPatch) -> None:
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
    again = walked(data, tmp_path / "models", unfinished=tmp_path / "unfinished")
    assert [int(x["kept"].sum()) for x in tables] == [0, 5]
    assert put(again, tmp_path / "again") == put(undisturbed, tmp_path / "undisturbed")


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


def test_what_comes_later_moves_no_model_of_the_market(tmp_path: Path) -> None:
    """Everything is different from the second test window on: the first two folds' models stay, and what was said before."""
    state, regimes = moods()
    one, data = course(state, regimes), small()
    folds = SPLIT.folds(data.times, data.end, state["timestamp"])
    cut = pd.Timestamp(one.folds[1].test_start, tz="UTC")
    late = (state["timestamp"] >= cut).to_numpy()
    other = state.assign(**{c: state[c].where(~late, 1 - 2 * state[c]) for c in state.columns[1:]})
    swapped = regimes.assign(regime=regimes["regime"].where(~late | regimes["regime"].isna(), "choppy"))
    two, asked = course(other, swapped), {name: learners()[name] for name in ("mood", "line")}
    here, there = (walk(data, folds, asked, tmp_path / name, market=c).regimes for name, c in (("here", one), ("there", two)))
    early = here["timestamp"] < cut
    pd.testing.assert_frame_equal(there[early], here[early], check_exact=True)
    assert not there[~early].equals(here[~early])
    for fold in ("fold_000", "fold_001"):
        assert content_id(tmp_path / "here" / "mood" / fold) == content_id(tmp_path / "there" / "mood" / fold)


def test_windows_and_labels_of_the_market(undisturbed: Walked) -> None:
    """The same windows of the calendar as those of the assets; no label of a training row is known after its window began."""
    market, data = course(*moods()), small()
    folds = SPLIT.folds(data.times, data.end, moods()[0]["timestamp"])
    assert [f.windows.tolist() for f in market.folds] == [f.windows.tolist() for f in folds]
    for f in market.folds:
        assert (market.data.end.dt.tz_localize(None).to_numpy()[f.train] < f.test_start).all()
    done = undisturbed
    assert done.regimes["timestamp"].tolist() == [t for f in market.folds for t in market.data.keys["timestamp"][f.test]]
    volatility = done.forecasts.query("model == 'health'")
    assert 0.2 < (volatility["volatility"] / volatility["sigma"]).median() < 5  # both in units of return


def test_what_goes_wrong_is_told(tmp_path: Path) -> None:
    data = small()
    folds = SPLIT.folds(data.times, data.end)
    still = Rows(data.keys, data.features * 0, data.labels, data.sigma)
    with pytest.raises(DataError, match=r"task fold_000.*none of 6 features has spread"):
        walk(still, folds, {"trees": learners()["trees"]}, tmp_path, FEW)
    with pytest.raises(DataError, match=r"task fold_000 trees: XGBoost, seed: 'one' is not a whole number"):
        walk(data, folds, {"trees": learners()["trees"]._replace(seed="one")}, tmp_path, FEW)  # type: ignore[arg-type]
    asked = learners()["trees"].strategy.model_copy(update={"target": "nothing"})
    with pytest.raises(StageError, match=r"fold_000 by \d+: KeyError: 'nothing'"):
        walk(data, folds, {"trees": learners()["trees"]._replace(strategy=asked)}, tmp_path, FEW)
    assert not list(tmp_path.rglob("model.json"))
