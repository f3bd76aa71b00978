"""The choice of features: exact, independent of order and processor, blind to what it will be judged on."""

from __future__ import annotations

import hashlib
import inspect
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata, spearmanr

from mltrading.core.errors import DataError
from mltrading.core.storage import content_id
from mltrading.features.redundancy import (
    LEAST_ROWS,
    SelectionParams,
    candidates,
    clusters,
    ic,
    ic_summary,
    luck,
    pooled_ic,
    rank_correlation,
    selection_stability,
)
from mltrading.features.registry import FeatureBlock
from mltrading.models.zoo import spec
from mltrading.systems.lessons import Rows
from mltrading.systems.strategies import Learner, Strategy
from mltrading.systems.walk import Walked, walk
from mltrading.validation.metrics import auc
from mltrading.validation.splits import Fold, WalkForward

PARAMS = SelectionParams(max_features=8, max_correlation=0.8, min_presence=0.5, slices=4, row_step=2)


def market(seed: int, instants: int = 300, symbols: int = 6, features: int = 40, signal: float = 0.0) -> Rows:
    """Rows of noise in groups of near copies; with a signal, the first two features know a little of the return."""
    rng = np.random.default_rng(seed)
    n = instants * symbols
    base = rng.standard_normal((n, features // 2))
    x = np.concatenate([base, base + 0.2 * rng.standard_normal(base.shape)], axis=1).astype(np.float32)
    ret = 0.01 * (signal * base[:, 0] - signal * base[:, 1] + rng.standard_normal(n))
    x[rng.random(x.shape) < 0.05] = np.nan
    stamps = pd.date_range("2020-01-01", periods=instants + 2, freq="D", tz="UTC", unit="us")
    keys = pd.DataFrame({"timestamp": np.repeat(stamps[:instants], symbols), "symbol": pd.array([f"S{i}" for i in range(symbols)] * instants, dtype="str")})
    labels = pd.DataFrame({"symbol": keys["symbol"], "start": np.repeat(stamps[1:-1], symbols), "end": np.repeat(stamps[2:], symbols), "ret": ret, "ret_voladj": ret / 0.01})
    return Rows(keys, pd.DataFrame(x, columns=[f"x{i:03d}" for i in range(x.shape[1])]), {1: labels}, np.full(n, 0.01))


def chosen(data: Rows, params: SelectionParams = PARAMS) -> pd.DataFrame:
    return candidates(data.features, data.times, params).choose(data.labels[1]["ret"].to_numpy(), np.ones(len(data.keys)))


# ------------------------------------------------------------------ exact


def steps(v: np.ndarray) -> np.ndarray:
    """The definition, on the slow path."""
    out, there = np.full(len(v), np.nan), ~np.isnan(v)
    n = there.sum()
    out[there] = np.rint(16 * (2 * rankdata(v[there]) - n - 1) / max(n, 1))
    return out


@given(seed=st.integers(0, 1 << 30), rows=st.integers(3, 400), ties=st.integers(1, 30), gaps=st.floats(0, 0.9))
@settings(max_examples=25)
def test_correlations_are_those_of_the_steps(seed: int, rows: int, ties: int, gaps: float) -> None:
    rng = np.random.default_rng(seed)
    x = np.round(rng.standard_normal((rows, 5)) * ties) / ties
    x[rng.random(x.shape) < gaps * rng.random(5)] = np.nan
    found = rank_correlation(pd.DataFrame(x)).to_numpy()
    for i in range(5):
        for j in range(5):
            a, b = steps(x[:, i].astype(np.float32)), steps(x[:, j].astype(np.float32))
            both = ~np.isnan(a) & ~np.isnan(b)
            if both.sum() < LEAST_ROWS or np.ptp(a[both]) == 0 or np.ptp(b[both]) == 0:
                assert np.isnan(found[i, j])
            else:
                assert found[i, j] == pytest.approx(np.corrcoef(a[both], b[both])[0, 1], abs=1e-12)


def test_steps_cost_little() -> None:
    rng = np.random.default_rng(1)
    a = rng.standard_normal(3000)
    for noise in (0.1, 0.5, 1.0, 3.0):
        x = pd.DataFrame({"a": a, "b": a + noise * rng.standard_normal(3000)})
        assert rank_correlation(x).iloc[0, 1] == pytest.approx(spearmanr(x["a"], x["b"]).statistic, abs=0.003)
        assert pooled_ic(x[["a"]], x["b"].to_numpy()).iloc[0] == rank_correlation(x).iloc[0, 1]


def test_long_tables_are_added_in_parts_exactly() -> None:
    """More rows than one 32-bit sum can hold, weighted and not."""
    rng = np.random.default_rng(2)
    a = rng.standard_normal(150_000)
    x = pd.DataFrame({"a": a.astype(np.float32), "b": (a + rng.standard_normal(len(a))).astype(np.float32)})
    p, q = steps(x["a"].to_numpy()), steps(x["b"].to_numpy())
    assert rank_correlation(x).iloc[0, 1] == pytest.approx(np.corrcoef(p, q)[0, 1], abs=1e-13)
    w = rng.integers(1, 64, len(a)).astype(float)
    w[0] = 63
    cov = np.cov(p, q, aweights=w)
    assert pooled_ic(x[["a"]], x["b"].to_numpy(), w).iloc[0] == pytest.approx(cov[0, 1] / np.sqrt(cov[0, 0] * cov[1, 1]), abs=1e-12)


def bits(path: Path) -> str:
    """Everything that a choice depends on, to the bit."""
    X = pd.read_pickle(path)
    parts = rank_correlation(X), clusters(X, 0.8), pooled_ic(X, X["x000"].to_numpy(float), 1.0 + np.arange(len(X)) % 7)
    return hashlib.sha256(b"".join(p.to_numpy().tobytes() for p in parts)).hexdigest()


def test_another_processor_finds_the_same_bits(tmp_path: Path) -> None:
    """Other kernels of the linear algebra, another number of threads, no vector instructions in numpy."""
    path = tmp_path / "X.pickle"
    market(3, 900).features.to_pickle(path)
    program = f"from __future__ import annotations\nimport hashlib\nimport numpy as np, pandas as pd\nfrom mltrading.features.redundancy import *\n{inspect.getsource(bits)}\nprint(bits({str(path)!r}), end='')"
    env = os.environ | {"OPENBLAS_CORETYPE": "Prescott", "OPENBLAS_NUM_THREADS": "1", "NPY_DISABLE_CPU_FEATURES": "X86_V3 X86_V4", "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", program], env=env, capture_output=True, text=True, check=True).stdout == bits(path)


@given(seed=st.integers(0, 1 << 30))
@settings(max_examples=10)
def test_order_makes_no_difference(seed: int) -> None:
    data, rng = market(seed, 120, 5, 20, signal=0.2), np.random.default_rng(seed)
    rows, columns = rng.permutation(len(data.keys)), rng.permutation(data.features.shape[1])
    weight = rng.uniform(0.2, 1, len(rows))
    y = data.labels[1]["ret"].to_numpy()
    here = candidates(data.features, data.times, PARAMS).choose(y, weight)
    pd.testing.assert_frame_equal(here, candidates(data.features.iloc[rows, columns], data.times[rows], PARAMS).choose(y[rows], weight[rows]), check_exact=True)
    pd.testing.assert_series_equal(clusters(data.features, 0.7), clusters(data.features.iloc[rows, columns], 0.7))


# ------------------------------------------------------------------ what is chosen


def test_one_of_each_group_and_the_signal_first() -> None:
    data = market(1, signal=0.3)
    table = chosen(data)
    assert {int(f[1:]) % 20 for f in table["feature"][:2]} == {0, 1}
    assert (table["members"] == 2).all()
    assert len({int(f[1:]) % 20 for f in table["feature"]}) == len(table) == PARAMS.max_features
    assert table["score"].is_monotonic_decreasing
    assert table["rank"].tolist() == list(range(1, 9))


def test_near_copies_are_groups_and_every_feature_is_in_one() -> None:
    group = clusters(market(2).features, 0.8)
    assert sorted(group.value_counts()) == [2] * 20
    assert clusters(market(2).features, 1.0).nunique() == 40
    assert clusters(market(2).features[["x000"]], 0.8).tolist() == [0]


def test_a_feature_that_was_right_once_is_put_behind_one_that_is_always_right() -> None:
    rng = np.random.default_rng(5)
    y = rng.standard_normal(4000)
    times = np.repeat(np.datetime64("2020-01-01", "us") + np.arange(1000) * np.timedelta64(1, "D"), 4)
    steady, once = 0.2 * y + rng.standard_normal(4000), rng.standard_normal(4000)
    once[:1000] += 2 * y[:1000]
    once[1000:] -= 0.05 * y[1000:]
    X = pd.DataFrame({"once": once, "steady": steady})
    table = candidates(X, times, PARAMS).choose(y, np.ones(4000)).set_index("feature")
    assert table.loc["once", "ic"] > table.loc["steady", "ic"]
    assert table.loc["steady", "rank"] == 1
    assert table["same_sign"].to_dict() == {"steady": 1.0, "once": 0.25}


def test_what_says_nothing_is_left_out() -> None:
    data = market(4)
    odd = data.features.assign(absent=np.nan, still=7.0, rare=data.features["x000"].where(np.arange(len(data.keys)) % 10 == 0))
    everything = PARAMS.model_copy(update={"max_features": 100, "max_correlation": 1.0})
    names = set(chosen(Rows(data.keys, odd, data.labels, data.sigma), everything)["feature"])
    assert names == set(data.features.columns)
    for nothing in (data.features * np.nan, data.features * 0 + 1):
        with pytest.raises(DataError, match="min_presence"):
            chosen(Rows(data.keys, nothing, data.labels, data.sigma))


def test_inputs_are_left_alone() -> None:
    data = market(6)
    before = data.features.copy(), data.labels[1].copy()
    chosen(data)
    pd.testing.assert_frame_equal(data.features, before[0])
    pd.testing.assert_frame_equal(data.labels[1], before[1])


# ------------------------------------------------------------------ the walk


def factories() -> dict[str, Learner]:
    boosted = {"n_estimators": 5, "max_depth": 2, "learning_rate": 0.3, "subsample": 0.8, "colsample_bytree": 0.8, "min_child_weight": 1, "reg_lambda": 1, "max_bin": 32,
               "early_stopping_rounds": 0, "inner_valid_fraction": 0.2}
    strategy = Strategy(model="any", horizon_bars=1, target="ret_voladj", scope="pooled", row_step=1)
    line = {"l2": 0.01, "winsor": 0.005, "missing_indicators": False, "max_iter": 100}
    return {name: Learner(strategy, spec(name, params), 1, 1) for name, params in {"logistic": line, "xgboost": boosted}.items()}


def walked(data: Rows, folder: Path, selection: SelectionParams | None = PARAMS, only: tuple[str, ...] = ("logistic", "xgboost")) -> tuple[list[Fold], Walked]:
    folds = WalkForward(120, 60, 2).folds(data.times, data.end)
    makers = {k: f for k, f in factories().items() if k in only}
    return folds, walk(data, folds, makers, folder, selection)


def test_what_is_judged_has_no_say(tmp_path: Path) -> None:
    """Other features and other labels from a test window on: what is chosen and fitted before it stays, to the byte."""
    data = market(7, signal=0.1)
    folds, real = walked(data, tmp_path / "real")
    for k, fold in enumerate(folds[:-1]):
        late, rng = np.arange(len(data.keys)) >= fold.test[0], np.random.default_rng(k)
        features, labels = data.features.copy(), data.labels[1].copy()
        features.loc[late] = (3 * rng.standard_normal((late.sum(), features.shape[1]))).astype(np.float32)
        labels.loc[late, ["ret", "ret_voladj"]] = 0.05 * features.loc[late, ["x005", "x006"]].to_numpy()
        _, other = walked(Rows(data.keys, features, {1: labels}, data.sigma), tmp_path / f"other_{k}")
        early = real.selection["fold"] <= fold.number
        pd.testing.assert_frame_equal(real.selection[early], other.selection[other.selection["fold"] <= fold.number], check_exact=True)
        for model in factories():
            for f in folds[:k + 1]:
                name = f"{model}/fold_{f.number:03d}"
                assert content_id(tmp_path / "real" / name) == content_id(tmp_path / f"other_{k}" / name)
        assert not real.selection[~early].equals(other.selection[~early]), "what follows has to differ, or this test shows nothing"


def test_the_order_of_columns_changes_no_forecast(tmp_path: Path) -> None:
    data = market(8, signal=0.1)
    _, here = walked(data, tmp_path / "a")
    _, there = walked(Rows(data.keys, data.features[data.features.columns[::-1]], data.labels, data.sigma), tmp_path / "b")
    pd.testing.assert_frame_equal(here.selection, there.selection, check_exact=True)
    pd.testing.assert_frame_equal(here.forecasts, there.forecasts, check_exact=True)
    assert content_id(tmp_path / "a") == content_id(tmp_path / "b")


def test_models_see_the_chosen_features_and_without_a_choice_all(tmp_path: Path) -> None:
    data = market(9)
    folds, few = walked(data, tmp_path / "few", only=("logistic",))
    _, every = walked(data, tmp_path / "all", None, only=("logistic",))
    assert every.selection.groupby("fold")["feature"].apply(list).tolist() == [list(data.features.columns)] * len(folds)
    assert few.selection.groupby("fold").size().tolist() == [PARAMS.max_features] * len(folds)
    assert list(few.selection.columns) == list(every.selection.columns)
    assert {k: v.kind for k, v in few.selection.dtypes.items()} == {k: v.kind for k, v in every.selection.dtypes.items()}


def test_noise_has_no_skill_unless_it_was_chosen_by_what_judges_it(tmp_path: Path) -> None:
    inside, outside, rows = [], [], 0
    for seed in range(3):
        data = market(100 + seed, features=400)
        _, honest = walked(data, tmp_path / f"in_{seed}", only=("logistic",))
        best = list(chosen(data)["feature"])
        _, peeked = walked(Rows(data.keys, data.features[best], data.labels, data.sigma), tmp_path / f"out_{seed}", None, only=("logistic",))
        for done, into in ((honest, inside), (peeked, outside)):
            judged = done.forecasts.merge(pd.concat([data.keys["timestamp"], data.labels[1][["symbol", "ret"]]], axis=1), on=["timestamp", "symbol"])
            into.append(auc(judged["prob_up"], judged["ret"] > 0))
        rows += len(judged)
    error = np.sqrt(1 / (3 * rows))  # of the mean area without skill, classes of equal size
    assert abs(np.mean(inside) - 0.5) < 3 * error
    assert np.mean(outside) > 0.5 + 4 * error


# ------------------------------------------------------------------ information coefficients


@given(seed=st.integers(0, 1 << 30), ties=st.integers(1, 20))
@settings(max_examples=10)
def test_information_coefficients_are_spearmans(seed: int, ties: int) -> None:
    rng = np.random.default_rng(seed)
    x, r = np.round(rng.standard_normal((2, 9, 12)) * ties) / ties, rng.standard_normal((9, 12))
    x[rng.random(x.shape) < 0.3] = np.nan
    r[rng.random(r.shape) < 0.2] = np.nan
    block = FeatureBlock(("a", "b"), np.datetime64("2020-01-01", "us") + np.arange(12) * np.timedelta64(1, "D"), tuple("ABCDEFGHI"), x, np.ones((9, 12), bool))
    found = ic(block, r, least=4)
    for f, name in enumerate(block.names):
        for t in range(12):
            both = ~np.isnan(x[f, :, t]) & ~np.isnan(r[:, t])
            if both.sum() < 4 or np.ptp(x[f, both, t]) == 0:
                assert np.isnan(found[name].iloc[t])
            else:
                assert found[name].iloc[t] == pytest.approx(spearmanr(x[f, both, t], r[both, t]).statistic, abs=1e-12)


def test_summary_of_hand_computed_coefficients() -> None:
    table = ic_summary(pd.DataFrame({"a": [0.1, np.nan, 0.3, -0.1, 0.1], "none": [np.nan] * 5}), overlap_bars=2).loc["a"]
    c = np.array([0.1, 0.3, -0.1, 0.1])
    d = c - c.mean()
    variance = (d @ d + 2 * 0.5 * (d[1:] @ d[:-1])) / 4  # lag 1: overlap less one; the rule gives 4 (0.04)^(2/9) = 1.96, rounded down
    assert table["mean"] == pytest.approx(0.1)
    assert table["t"] == pytest.approx(0.1 / np.sqrt(variance / 4))
    assert table["hit_rate"] == 0.75
    assert table["n"] == 4


def test_luck_is_calibrated() -> None:
    """Of noise, about one p-value in five is below one fifth."""
    p = []
    for seed in range(40):
        data = market(200 + seed, 80, 4, 10)
        p.append(luck(data.features, data.labels[1]["ret"].to_numpy(), data.times, 5, seed=seed, draws=49)["p_value"])
    assert 1 <= sum(v <= 0.2 for v in p) <= 17  # binomial(40, 0.2): 99.9 %
    with pytest.raises(DataError, match="ascending"):
        luck(data.features, data.labels[1]["ret"].to_numpy(), data.times[::-1], 5, seed=0)


def test_stability_of_choices() -> None:
    same = selection_stability([["a", "b", "c"]] * 4, 12)
    assert same == {"jaccard": 1.0, "nogueira": 1.0}
    found = selection_stability([["a", "b"], ["a", "c"], ["a", "b"]], 4)
    matrix = np.array([[1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 0]])
    assert found["jaccard"] == pytest.approx((1 / 3 + 1 + 1 / 3) / 3)
    assert found["nogueira"] == pytest.approx(1 - matrix.var(axis=0, ddof=1).mean() / (0.5 * 0.5))
    assert np.isnan(selection_stability([["a"]], 4)["nogueira"])


def test_only_what_a_fold_could_choose_counts_as_a_candidate(tmp_path: Path) -> None:
    """Columns that are empty, still or mostly absent change neither the choice nor the number that it was made from; one that only the last folds know does."""
    data, rng = market(9), np.random.default_rng(0)
    folds, plain = walked(data, tmp_path / "plain", only=("logistic",))
    assert plain.candidates == data.features.shape[1]
    draws = rng.standard_normal((2, len(data.keys))).astype(np.float32)
    rare, late = np.where(rng.random(draws[0].shape) < 0.05, draws[0], np.float32("nan")), np.where(np.arange(len(data.keys)) >= folds[0].test[0], draws[1], np.float32("nan"))
    useless = data.features.assign(empty=np.float32("nan"), still=np.float32(2), rare=rare)
    _, other = walked(Rows(data.keys, useless, data.labels, data.sigma), tmp_path / "useless", only=("logistic",))
    pd.testing.assert_frame_equal(other.selection, plain.selection, check_exact=True)
    assert other.candidates == plain.candidates
    _, more = walked(Rows(data.keys, useless.assign(late=late), data.labels, data.sigma), tmp_path / "late", only=("logistic",))
    assert more.candidates == plain.candidates + 1
