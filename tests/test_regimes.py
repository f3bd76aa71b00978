"""The context of a market, the names it is given, and the models that forecast the next name."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mltrading.features.state import CONTEXT, ContextParams, context
from mltrading.labels.regimes import REGIMES, RegimeParams, label_regimes, regime_targets
from mltrading.market import embedded
from mltrading.market.macro import as_of, lagged
from mltrading.market.panel import Panel, from_frame
from mltrading.models.hmm import GaussianHMM
from mltrading.models.windows import windows
from mltrading.models.zoo import build, load_forecaster
from mltrading.systems.regimes import hmm_regimes, regime_scores, stay_regimes

DATA = os.environ.get("MLTRADING_DATA")
ROLES = ContextParams(market="SPY", duration="IEF", credit="LQD", long_bonds="TLT", vix="vix", slope_long=None, slope_short=None, short_bars=5, long_bars=60, vol_bars=20, high_bars=126, mean_bars=200, spread_bars=20, bars_per_year=252, max_age_days=5)
RULE = RegimeParams(panic_vix=30, panic_vol=28, panic_drawdown=0.08, risk_off_return=0.04, credit_stress=0.02, calm_vol=12, choppy_vol=12, choppy_return=0.04, min_stay_bars=4)
ROWS = {0: (0.05, 10, 0.0), 1: (0.05, 15, 0.0), 2: (0.0, 15, 0.0), 3: (-0.05, 15, -0.05), 4: (-0.05, 40, -0.2), -1: (np.nan,) * 3}


def etfs() -> Panel:
    return from_frame(next(s for s in embedded.sets() if s.name == "etf_daily").bars)


def said(codes: list[int]) -> pd.DataFrame:
    """A context in which the rule says these regimes; -1 where it says nothing."""
    days = pd.date_range("2020-01-01", periods=len(codes), freq="D", tz="UTC", unit="us")
    return pd.DataFrame([ROWS[c] for c in codes], columns=["ret_long", "vol", "drawdown"], index=days).assign(vix=np.nan, credit=np.nan)


@given(st.lists(st.integers(-1, 4), min_size=1, max_size=60), st.integers(1, 6), st.integers(0, 59))
def test_a_regime_stays_and_nothing_looks_ahead(codes: list[int], stay: int, cut: int) -> None:
    rule = RULE.model_copy(update={"min_stay_bars": stay})
    table = said(codes)
    labels = label_regimes(table, rule)
    np.testing.assert_array_equal(labels.cat.codes[:cut], label_regimes(table.iloc[:cut], rule).cat.codes)
    np.testing.assert_array_equal(labels.isna(), np.array(codes) < 0)
    named = labels.dropna().cat.codes.to_numpy()
    change = np.flatnonzero(np.diff(named)) + 1
    spells = np.diff(np.r_[0, change]) if len(change) else np.array([])
    assert all(length >= stay or named[end] == 4 for length, end in zip(spells, change, strict=True))
    truth = np.array([c for c in codes if c >= 0])
    assert (named[change] == truth[change]).all()  # what is entered is what the rule says on that bar
    assert ((named == 4) | (truth != 4)).all()     # a panic does not wait


@given(st.lists(st.integers(0, 4), max_size=30), st.lists(st.integers(0, 4), max_size=30), st.lists(st.integers(0, 4), min_size=1, max_size=30), st.integers(0, 4), st.integers(1, 5))
def test_where_a_history_began_is_forgotten(one: list[int], other: list[int], rest: list[int], steady: int, stay: int) -> None:
    rule, middle = RULE.model_copy(update={"min_stay_bars": stay}), [steady] * (2 * stay)
    ends = [label_regimes(said([*start, *middle, *rest]), rule).cat.codes.to_numpy()[-len(rest):] for start in (one, other)]
    np.testing.assert_array_equal(*ends)


def test_a_week_without_the_vix() -> None:
    panel, releases = etfs(), embedded.macro()
    week = (releases["series"] == "vix") & releases["timestamp"].between("2015-08-24", "2015-09-04")
    whole, holed = context(panel, releases, ROLES), context(panel, releases[~week], ROLES)
    silent = holed["vix"].isna() & whole["vix"].notna()
    assert list(whole.index[silent].strftime("%m-%d")) == ["08-27", "08-28", "08-31", "09-01", "09-02", "09-03", "09-04"]
    pd.testing.assert_frame_equal(whole.drop(columns=["vix", "vix_ratio"]), holed.drop(columns=["vix", "vix_ratio"]), check_exact=True)
    labels = label_regimes(holed, RULE)
    assert labels[silent].notna().all()  # realized volatility takes its place


@pytest.mark.skipif(not DATA, reason="MLTRADING_DATA names no folder")
def test_a_universe_that_has_every_role() -> None:
    bars = pd.read_parquet(Path(str(DATA)) / "bars" / "etf230_daily.parquet", filters=[("symbol", "in", ["SPY", "IEF", "HYG", "TLT"])])
    bars = bars.assign(timestamp=(bars["timestamp"] + pd.Timedelta(hours=21)).dt.tz_localize("UTC"), close=bars["adj_close"].astype(float))
    panel = from_frame(bars[["timestamp", "symbol", "close"]].sort_values(["timestamp", "symbol"]))
    series = pd.read_parquet(Path(str(DATA)) / "macro" / "series.parquet").drop_duplicates(["series", "timestamp"])
    macro = pd.concat([lagged(series[series["series"] == s].set_index("timestamp")["value"], s) for s in ("VIXCLS", "DGS10", "DGS2")], ignore_index=True)
    roles = ROLES.model_copy(update={"credit": "HYG", "vix": "VIXCLS", "slope_long": "DGS10", "slope_short": "DGS2", "max_age_days": 10})
    table = context(panel, macro, roles)
    later = table["2010":"2022"]
    assert list(later) == list(CONTEXT)
    assert later.notna().mean().min() > 0.99
    stood = as_of(macro, table.index, pd.Timedelta(days=10))
    pd.testing.assert_series_equal(table["slope"], stood["DGS10"] - stood["DGS2"], check_names=False, check_freq=False)
    labels = label_regimes(table, RULE)
    assert (labels["2008-10":"2008-12"] == "high_vol_panic").mean() > 0.9
    assert (labels["2020-03-16":"2020-04-10"] == "high_vol_panic").all()
    assert (labels["2017"] == "calm_uptrend").mean() > 0.6


@pytest.mark.parametrize(("kind", "sizes"), [("gru_attention", {"hidden": 16, "layers": 1}), ("transformer", {"width": 16, "heads": 2, "layers": 1, "feedforward": 32})])
def test_networks_learn_five_regimes(kind: str, sizes: dict[str, int], tmp_path: Path) -> None:
    """A hidden state from one to five that moves by a step now and then, seen through noise."""
    rng = np.random.default_rng(2)
    moves = np.where(rng.random(2500) < 0.05, rng.choice([-1, 1], 2500), 0)
    state = np.zeros(2500, int)
    for t in range(1, 2500):
        state[t] = np.clip(state[t - 1] + moves[t], 0, 4)
    X = pd.DataFrame(state[:, None] + rng.normal(0, 1.0, (2500, 2)), columns=["a", "b"], dtype="float32").assign(never=np.float32(np.nan))
    days = pd.date_range("2010-01-01", periods=2500, freq="D", tz="UTC", unit="us")
    targets = regime_targets(pd.Series(pd.Categorical.from_codes(state, list(REGIMES), ordered=True), days), 3)
    y, at = targets["regime"].cat.codes.to_numpy(float), targets.index.tz_localize(None).to_numpy()
    seen = windows(X, ["market"] * 2500, 8).take(np.arange(len(targets)))
    params = {"steps": 8, "task": {"kind": "classes", "names": list(REGIMES)}, "train": {"epochs": 12, "batch_size": 64, "learning_rate": 0.005, "patience": 3}, **sizes}
    model = build(kind, params, seed=1, purge_bars=3).fit(seen.take(slice(0, 1700)), y[:1700], np.ones(1700), at[:1700])
    out = model.predict(seen.take(slice(1710, None)))
    assert list(out) == [f"prob_{name}" for name in REGIMES]
    np.testing.assert_allclose(out.sum(axis=1), 1, atol=1e-6)
    model.save(tmp_path / "m")
    pd.testing.assert_frame_equal(load_forecaster(tmp_path / "m").predict(seen.take(slice(1710, None))), out, check_exact=True)
    labels = pd.Series(pd.Categorical.from_codes(state, list(REGIMES), ordered=True), days)
    scores = {"network": regime_scores(pd.DataFrame(out.to_numpy(), targets.index[1710:], list(REGIMES)), targets.iloc[1710:]),
              "even": regime_scores(pd.DataFrame(0.2, targets.index, list(REGIMES)), targets.iloc[1710:]),
              "stay": regime_scores(stay_regimes(labels, days[1699], 3), targets.iloc[1710:])}
    assert scores["stay"]["log_loss"] < scores["network"]["log_loss"] < 0.75 * scores["even"]["log_loss"]  # who is told the state knows more


def test_nothing_after_a_row_moves_its_probabilities() -> None:
    panel = etfs()
    labels, returns = label_regimes(context(panel, None, ROLES), RULE), panel.view("close")[["SPY"]].pct_change(fill_method=None)
    until, rng = panel.index[1200], np.random.default_rng(0)
    whole = hmm_regimes(GaussianHMM(3, seed=5, starts=2), returns, labels, until, 5)
    for cut in (1201, 1500, 2000):
        other = returns.copy()
        other.iloc[cut:] = rng.normal(0, 0.1, other.iloc[cut:].shape)
        mixed = labels.copy()
        mixed.iloc[cut:] = rng.permutation(mixed.iloc[cut:].to_numpy())
        np.testing.assert_array_equal(hmm_regimes(GaussianHMM(3, seed=5, starts=2), other, mixed, until, 5).iloc[:cut], whole.iloc[:cut])
        np.testing.assert_array_equal(stay_regimes(mixed, until, 5).iloc[:cut], stay_regimes(labels, until, 5).iloc[:cut])
