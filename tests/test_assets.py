"""Results asset by asset: what luck gives, and that no asset spoils another's row."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from mltrading.backtest.costs import CostParams
from mltrading.backtest.engine import BacktestParams
from mltrading.core.errors import DataError
from mltrading.market.panel import Panel
from mltrading.market.simulate import random_walk
from mltrading.systems.assets import (
    account_table,
    by_class,
    field_of,
    p_by_chance,
    put_elsewhere,
    reasons,
    share_profitable,
    shares_by_chance,
)
from mltrading.systems.choice import Alone, AloneParams

COSTS = CostParams(commission_bps=1, half_spread_bps=1, impact_coefficient=0, adv_bars=20, adv_floor_value=1e6, adv_assumed_value=5e7, vol_floor_daily=0.005, borrow_bps_annual=0, fill="close",
                   commission_per_share=0, commission_minimum=0, slippage_bps=0, margin_rate_annual_bps=0, participation=None)
MONEY = BacktestParams(initial_cash=1e6, delay_bars=0, max_gross=2, delist_after_bars=20, delist_haircut=0.01, start="decision")
RULE = AloneParams(prob_threshold=0.02, allow_short=True, vol_annual=0.1, vol_bars=20, max_weight=1)
BOOT = {"seed": 1, "n_boot": 100, "level": 0.9, "bars_per_year": 60}


def forecasts(market: Panel, prob: np.ndarray) -> pd.DataFrame:
    """Probabilities (T, N) as a long table, where there is a bar."""
    days, names = market.index, list(market.symbols)
    table = pd.DataFrame({"timestamp": days.repeat(len(names)), "symbol": names * len(days), "prob_up": prob.ravel()})
    return table[np.isfinite(market["close"]).T.ravel()]


def held(prob: np.ndarray, bars: int) -> np.ndarray:
    """Each value kept for so many bars."""
    return prob.repeat(bars, axis=0)


def test_noise_is_inside_what_chance_gives_about_as_often_as_it_should_be() -> None:
    found = []
    for seed in range(8):
        market, rng = random_walk(6, 400, seed=seed, ragged=False), np.random.default_rng(100 + seed)
        share, chance = shares_by_chance(Alone(market, RULE, COSTS, MONEY, 60), forecasts(market, held(rng.uniform(0.4, 0.6, (40, 6)), 10)), 19, seed)
        assert len(chance) == 19
        found.append(p_by_chance(share, chance))
    assert 0.25 < np.mean(found) < 0.85  # ties count against the system: above one half rather than below
    assert sum(p <= 0.1 for p in found) <= 3  # fewer than one is expected


def test_knowledge_of_all_assets_is_seen() -> None:
    market, rng = random_walk(6, 400, seed=3, ragged=False), np.random.default_rng(0)
    after = (np.roll(market["close"], -2, axis=1) > np.roll(market["close"], -1, axis=1)).T
    share, chance = shares_by_chance(Alone(market, RULE, COSTS, MONEY, 60), forecasts(market, np.where(after == (rng.random(after.shape) < 0.62), 0.55, 0.45)), 19, 0)
    assert share == 1
    assert p_by_chance(share, chance) == 0.05


def test_too_little_to_be_put_elsewhere_gives_no_share() -> None:
    market = random_walk(3, 100, seed=1, ragged=False)
    share, chance = shares_by_chance(Alone(market, RULE, COSTS, MONEY, 60), forecasts(market, np.full((100, 3), 0.6)), 19, 0)
    assert np.isnan(share)
    assert np.isnan(p_by_chance(share, chance))


def test_the_offset_is_the_same_for_assets_of_the_same_days() -> None:
    market = random_walk(4, 300, seed=1, ragged=False)
    moved = put_elsewhere(forecasts(market, np.arange(300.0).repeat(4).reshape(300, 4)), 77, 60)
    np.testing.assert_array_equal(moved["prob_up"], np.tile(np.roll(np.arange(300.0), 77), 4))


@pytest.fixture(scope="module")
def noise() -> tuple[Panel, dict[str, pd.DataFrame], pd.DataFrame, pd.DataFrame]:
    """A market, what two strategies earned on it, choices, and rated forecasts."""
    market, rng = random_walk(5, 300, seed=9, ragged=False), np.random.default_rng(1)
    said = {name: forecasts(market, held(rng.uniform(0.4, 0.6, (30, 5)), 10)) for name in ("a", "choice")}
    accounts = Alone(market, RULE, COSTS, MONEY, 60)
    earned = {name: accounts.earned(f) for name, f in said.items()}
    choices = pd.DataFrame({"fold": [0, 1] * 5, "symbol": np.repeat(market.symbols, 2), "strategy": list("aabababbaa")})
    return market, earned, choices, said["choice"].assign(up=rng.random(1500) < 0.5)


def test_the_order_of_assets_changes_no_row(noise: tuple[Panel, dict[str, pd.DataFrame], pd.DataFrame, pd.DataFrame]) -> None:
    market, earned, choices, rated = noise
    order = [market.symbols[k] for k in (3, 0, 4, 2, 1)]
    mixed = {name: r[order] for name, r in earned.items()}
    pd.testing.assert_frame_equal(account_table(earned, choices, rated, **BOOT), account_table(mixed, choices[::-1], rated.sample(frac=1, random_state=0), **BOOT), rtol=1e-9)
    groups = dict(zip(market.symbols, "xyxyx", strict=True))
    pd.testing.assert_frame_equal(by_class(earned["a"], groups), by_class(mixed["a"], groups))
    assert share_profitable(earned["a"], 1, 200, 0.9) == pytest.approx(share_profitable(mixed["a"], 1, 200, 0.9))


def test_the_strategy_taken_most_often_and_of_equals_the_last(noise: tuple[Panel, dict[str, pd.DataFrame], pd.DataFrame, pd.DataFrame]) -> None:
    _, earned, choices, rated = noise
    assert account_table(earned, choices, rated, **BOOT)["strategy"].tolist() == ["a", "a", "a", "b", "a"]


def test_sick_assets_keep_their_rows_and_spoil_no_other(noise: tuple[Panel, dict[str, pd.DataFrame], pd.DataFrame, pd.DataFrame]) -> None:
    _, earned, choices, rated = noise
    nothing, flat, short = "S000", "S001", "S002"
    sick = {name: r.assign(**{flat: r[flat] * 0, short: r[short].where(np.arange(300) < 30)}).drop(columns=nothing) for name, r in earned.items()}
    table, well = account_table(sick, choices, rated, **BOOT), {name: r[["S003", "S004"]] for name, r in earned.items()}
    assert table.loc[[flat, short], ["sharpe", "low", "high", "dsr"]].isna().all(axis=None)
    pd.testing.assert_frame_equal(table.loc[["S003", "S004"]], account_table(well, choices, rated, **BOOT))
    assert field_of(sick, 60).n_trials == 4
    assert np.isfinite(table["total_return"]).all()


def test_each_reason_is_told() -> None:
    market = random_walk(5, 300, seed=9, ragged=False)
    close = market["close"].copy()
    close[0], close[1, 130:], close[2, :290] = 7.0, np.nan, np.nan
    sick = Panel(market.times, market.symbols, {"close": close})
    folds = pd.DataFrame({"fold": [4, 5], "test_start": market.index[[100, 200]], "test_end": market.index[[199, 299]]})
    said = forecasts(sick, np.full((300, 5), 0.5))
    said = said[(said["timestamp"] >= market.index[100]) & (said["symbol"] != "S000")]
    returns = Alone(sick, RULE, COSTS, MONEY, 60).earned(said)
    refused = pd.DataFrame({"fold": [4], "model": "own", "symbol": "S003", "reason": "training rows: there are none"})
    why = reasons([*market.symbols, "NONE"], sick, returns, said, refused, folds, 20, 60)
    assert why["S000"] == "its price is 7 on all 300 bars; no forecast: 300 bars, none in a test window with a volatility"
    assert why["S001"] == f"ends on {market.index[129]:%Y-%m-%d}, inside fold 4; 29 bars of record, less than a year"
    assert why["S002"] == "9 bars of record, less than a year"
    assert why["S003"] == "never held: no probability was far enough from one half; own: no model of its own in 1 of 2 folds (training rows: there are none)"
    assert why["S004"] == "never held: no probability was far enough from one half"
    assert why["NONE"] == "no data"


def test_one_forecast_is_not_none() -> None:
    """An account lasts from the first forecast to the last: with a single one there is no return, and it is said why."""
    market = random_walk(3, 300, seed=9, ragged=False)
    folds = pd.DataFrame({"fold": [0], "test_start": market.index[[100]], "test_end": market.index[[299]]})
    said = forecasts(market, np.full((300, 3), 0.6))
    said = said[(said["symbol"] == "S002") | ((said["symbol"] == "S001") & (said["timestamp"] == market.index[150]))]
    returns = Alone(market, RULE, COSTS, MONEY, 60).earned(said)
    for shown in (returns, returns.dropna(axis=1, how="all")):  # as it is at once, and as it comes back from the disk
        why = reasons(market.symbols, market, shown, said, pd.DataFrame(columns=["fold", "model", "symbol", "reason"]), folds, 20, 60)
        assert why.to_dict() == {"S000": "no forecast: 300 bars, none in a test window with a volatility", "S001": "a single forecast: an account lasts from the first to the last", "S002": ""}


def test_two_forecasts_of_one_instant_are_refused() -> None:
    """None of them may win by standing last."""
    market = random_walk(3, 300, seed=9, ragged=False)
    said, alone = forecasts(market, np.full((300, 3), 0.6)), Alone(market, RULE, COSTS, MONEY, 60)
    other = said[(said["symbol"] == "S001") & (said["timestamp"] == market.index[150])].assign(prob_up=0.4)
    for table in (pd.concat([said, other]), pd.concat([other, said])):
        with pytest.raises(DataError, match=rf"forecasts: S001 has two at {market.index[150]:%Y-%m-%d}"):
            alone.targets(table)
    elsewhere = said.iloc[[0, 0]].assign(symbol="XXX")  # of assets that have no account here: not looked at
    np.testing.assert_array_equal(alone.targets(pd.concat([said, elsewhere])), alone.targets(said))
