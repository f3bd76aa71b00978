"""Portfolio and backtest: conservation, a ledger by hand, agreement of the engines, and nothing looks ahead."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mltrading.backtest.actions import lay_actions
from mltrading.backtest.baselines import equal_weight, hold
from mltrading.backtest.costs import CostParams
from mltrading.backtest.engine import BacktestParams, equity_curve, equity_curves, lay_tape, simulate
from mltrading.backtest.instruments import Instrument
from mltrading.backtest.ledger import TABLES, Ledger
from mltrading.backtest.replay import decided_targets, replay
from mltrading.backtest.sensitivity import sensitivity
from mltrading.core.errors import DataError, ParameterError
from mltrading.market.panel import Panel, from_frame, until
from mltrading.market.simulate import random_walk
from mltrading.portfolio.block import PolicyParams, build_policy
from mltrading.portfolio.limits import CapGross, CapNet, CapPosition, NoTradeBand
from mltrading.portfolio.policy import Policy
from mltrading.portfolio.record import follow_bar
from mltrading.portfolio.sizing import Conviction, Direction, VolatilityTarget
from mltrading.systems.trade import check_bars_per_year

FREE = CostParams(commission_bps=0, half_spread_bps=0, impact_coefficient=0, adv_bars=3, adv_floor_value=1e4, adv_assumed_value=1e7, vol_floor_daily=0.01,
                  borrow_bps_annual=0, fill="open")
DEAR = FREE.model_copy(update={"commission_bps": 3.0, "half_spread_bps": 5.0, "impact_coefficient": 1.0, "borrow_bps_annual": 300.0})
PARAMS = BacktestParams(initial_cash=1e6, delay_bars=0, max_gross=3, delist_after_bars=3, delist_haircut=0.4, start="panel")


def rules(vol_annual: float = 0.15, max_weight: float = 0.4, max_gross: float = 1.2, max_net: float = 0.8, vol_bars: int = 10, rebalance_bars: int = 1) -> Policy:
    return Policy([Direction(prob_threshold=0.02, allow_short=True), Conviction(), VolatilityTarget(vol_annual=vol_annual, correlation=0.3), CapPosition(max_weight=max_weight),
                   CapGross(max_gross=max_gross), CapNet(max_net=max_net), NoTradeBand(min_trade_weight=0.02)], rebalance_bars, vol_bars)


def market(seed: int, n: int = 5, bars: int = 60, jump: float = 0.03, opens: bool = True) -> Panel:
    """Prices with late listings, gaps and delistings; the axis has no empty instant."""
    rng = np.random.default_rng(seed)
    close = 100 * np.exp(np.cumsum(rng.normal(0, jump, (n, bars)), axis=1))
    alive = rng.random((n, bars)) > 0.1
    for i in range(1, n):
        alive[i, : rng.integers(0, bars // 2)] = False
        alive[i, bars - rng.integers(0, bars // 2):] = False
    alive[0] = True
    fields = {"close": close}
    if opens:
        fields |= {"open": close * np.exp(rng.normal(0, jump / 3, close.shape)), "volume": rng.uniform(1e3, 1e5, close.shape)}
    times = pd.bdate_range("2020-01-01", periods=bars).as_unit("us").to_numpy() + np.timedelta64(21, "h")
    return Panel(times, tuple(f"S{i}" for i in range(n)), {k: np.where(alive, b, np.nan) for k, b in fields.items()})


def wishes(panel: Panel, seed: int, gross: float) -> np.ndarray:
    """Random weights of what is listed, some of them zero, half the rows without a decision."""
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(len(panel), len(panel.symbols))) * panel.view("close").ffill().notna().to_numpy() * (rng.random((len(panel), len(panel.symbols))) < 0.8)
    w *= gross / np.maximum(np.abs(w).sum(axis=1, keepdims=True), 1e-9)
    w[rng.random(len(panel)) < 0.5] = np.nan
    w[0] = 0.0
    return w


def opinions(panel: Panel, seed: int, after: int = 15) -> pd.DataFrame:
    """Random forecasts for most bars from bar `after` on."""
    rng = np.random.default_rng(seed)
    row, column = np.nonzero(panel.alive.T & (np.arange(len(panel)) >= after)[:, None] & (rng.random((len(panel), len(panel.symbols))) < 0.9))
    return pd.DataFrame({"timestamp": panel.index[row], "symbol": [panel.symbols[i] for i in column], "horizon_bars": 1, "score": 0.0, "prob_up": rng.uniform(0.3, 0.7, len(row)),
                         "sigma": 0.02, "fold": 0})


def wide(frame: pd.DataFrame, values: str, panel: Panel, index: str = "timestamp") -> pd.DataFrame:
    return frame.pivot_table(index=index, columns="symbol", values=values, aggfunc="sum").reindex(index=panel.index, columns=list(panel.symbols)).fillna(0.0)


def same(a: Ledger, b: Ledger, but: tuple[str, ...] = ()) -> None:
    for name in TABLES:
        pd.testing.assert_frame_equal(getattr(a, name).drop(columns=list(but), errors="ignore"), getattr(b, name).drop(columns=list(but), errors="ignore"), check_exact=True)


def check_conserved(panel: Panel, ledger: Ledger, params: BacktestParams) -> None:
    e, f = ledger.equity, ledger.fills
    unit = params.initial_cash
    assert np.abs(e["cash"] + e["positions_value"] - e["equity"]).max() <= 1e-9 * unit
    shares, last = wide(ledger.positions, "quantity", panel), panel.view("close").ffill().fillna(0.0)
    bought = wide(f, "quantity", panel)
    # every share held was bought: no position without a fill
    np.testing.assert_allclose(bought.cumsum(), shares, atol=1e-9 * unit / 10, rtol=1e-9)
    # equity changes by what prices did, less what trading took
    moved = wide(f.assign(value=f["quantity"] * f["reference_price"]), "value", panel)
    value = shares * last
    profit = (value - value.shift(fill_value=0.0) - moved).sum(axis=1).to_numpy()
    scale = max(unit, float(value.abs().sum(axis=1).max()))
    gap = np.diff(e["equity"], prepend=unit) - (profit - e["costs"] - e["borrow"] - e["delisting"])
    assert np.abs(gap).max() <= 1e-9 * scale
    # what the fills say is what the account was charged
    orders = f[f["kind"] == "order"]
    np.testing.assert_allclose((orders["fill_price"] - orders["reference_price"]) * orders["quantity"], orders["spread_cost"] + orders["impact_cost"], atol=1e-9 * scale, rtol=1e-6)
    charged = f.assign(all=f["commission"] + f["spread_cost"] + f["impact_cost"]).groupby("timestamp")["all"].sum().reindex(pd.DatetimeIndex(e["timestamp"])).fillna(0.0)
    np.testing.assert_allclose(charged, e["costs"], atol=1e-9 * scale)
    # an order fills in the next bar, where there is one, or not at all
    o = ledger.orders
    done = o[o["status"] == "filled"]
    assert (panel.index.get_indexer(pd.DatetimeIndex(done["fill_time"])) == panel.index.get_indexer(pd.DatetimeIndex(done["decision_time"])) + 1).all()
    np.testing.assert_array_equal(done["quantity"].to_numpy(), orders.sort_values(["timestamp", "symbol"])["quantity"].to_numpy())
    assert len(done) == len(orders)
    assert o.loc[o["status"] != "filled", "fill_time"].isna().all()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 10**6), gross=st.floats(0.1, 3.0), jump=st.floats(0.001, 0.2), delay=st.integers(0, 3), patience=st.integers(1, 6), fill=st.sampled_from(["open", "close"]),
       scale=st.floats(0, 5), opens=st.booleans())
def test_nothing_gets_lost(seed: int, gross: float, jump: float, delay: int, patience: int, fill: str, scale: float, opens: bool) -> None:
    panel = market(seed, jump=jump, opens=opens)
    params = PARAMS.model_copy(update={"delay_bars": delay, "delist_after_bars": patience})
    costs = DEAR.scaled(scale).model_copy(update={"fill": fill})
    targets = wishes(panel, seed + 1, gross)
    ledger = simulate(panel, targets, costs, params)
    check_conserved(panel, ledger, params)
    np.testing.assert_array_equal(equity_curve(lay_tape(panel, costs), targets, costs, params), ledger.equity["equity"])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 10**6), delay=st.integers(0, 2), every=st.integers(1, 7), start=st.sampled_from(["decision", "panel"]))
def test_replay_is_simulate(seed: int, delay: int, every: int, start: str) -> None:
    panel, params = market(seed), PARAMS.model_copy(update={"delay_bars": delay, "start": start})
    policy = rules(rebalance_bars=every)
    ledger, decisions = replay(panel, policy, opinions(panel, seed), DEAR, params)
    same(ledger, simulate(panel, decided_targets(panel, decisions), DEAR, params), but=("reason",))
    if start == "panel":
        check_conserved(panel, ledger, params)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 10**6), cut=st.integers(16, 58), delay=st.integers(0, 2))
def test_what_comes_later_changes_nothing(seed: int, cut: int, delay: int) -> None:
    panel, params, policy = market(seed), PARAMS.model_copy(update={"delay_bars": delay, "max_gross": 20}), rules()  # prices jump at the cut
    forecasts = opinions(panel, seed)
    rng, late = np.random.default_rng(seed), np.arange(len(panel)) > cut
    order = np.concatenate([np.arange(cut + 1), cut + 1 + rng.permutation(len(panel) - cut - 1)])
    shuffled = Panel(panel.times, panel.symbols, {k: np.where(late, b[:, order] * 1.7, b) for k, b in panel.fields.items()})
    shuffled = Panel(panel.times, panel.symbols, {k: np.where(shuffled.alive | ~late, b, np.nan) for k, b in shuffled.fields.items()})
    now = panel.index[cut]
    f2 = pd.concat([forecasts[forecasts["timestamp"] <= now], opinions(shuffled, seed + 1).query("timestamp > @now")], ignore_index=True)
    (a, da), (b, db) = replay(panel, policy, forecasts, DEAR, params), replay(shuffled, policy, f2, DEAR, params)
    for name in ("fills", "positions", "equity"):
        x, y = (t.loc[t["timestamp"] <= now].reset_index(drop=True) for t in (getattr(a, name), getattr(b, name)))
        pd.testing.assert_frame_equal(x, y, check_exact=True)
    pd.testing.assert_frame_equal(da[da["timestamp"] <= now], db[db["timestamp"] <= now], check_exact=True)
    columns = ["decision_time", "symbol", "target_weight", "quantity", "reason"]
    pd.testing.assert_frame_equal(a.orders.loc[a.orders["decision_time"] <= now, columns], b.orders.loc[b.orders["decision_time"] <= now, columns], check_exact=True)
    before = [t.orders[t.orders["decision_time"] < now] for t in (a, b)]
    pd.testing.assert_frame_equal(*before, check_exact=True)
    # and a panel that ends there gives the same account
    short, _ = replay(until(panel, panel.times[cut]), policy, forecasts[forecasts["timestamp"] <= now], DEAR, params)
    pd.testing.assert_frame_equal(short.equity, a.equity.iloc[: cut + 1], check_exact=True)


KEPT = {"orders": ["quantity", "target_weight"], "fills": ["quantity", "reference_price", "fill_price", "commission", "spread_cost", "impact_cost"],
        "positions": ["quantity", "price", "value", "weight"],
        "equity": ["cash", "positions_value", "equity", "ret", "gross", "net", "turnover", "costs", "borrow", "delisting"]}


def fingerprint(ledger: Ledger) -> str:
    """A hash of every number of a ledger, without the columns that came later."""
    found = hashlib.sha256()
    for table, columns in KEPT.items():
        for column in columns:
            found.update(np.ascontiguousarray(getattr(ledger, table)[column].to_numpy(np.float64)).tobytes())
    found.update(("".join(ledger.orders["status"]) + "".join(ledger.fills["kind"])).encode())
    return found.hexdigest()


@pytest.mark.parametrize("fill", ["open", "close"])
@pytest.mark.parametrize("seed", range(6))
def test_a_plain_account_keeps_its_bits(seed: int, fill: str) -> None:
    """Stored before instruments, actions, participation and the event engine came: where none of these is used, no bit may change."""
    stored = json.loads((Path(__file__).parent / "data" / "ledgers_before.json").read_text())
    panel, costs, params = market(seed), DEAR.model_copy(update={"fill": fill}), PARAMS.model_copy(update={"delay_bars": seed % 3})
    assert fingerprint(simulate(panel, wishes(panel, seed + 1, 1.5), costs, params)) == stored[f"simulate {seed} {fill}"]
    assert fingerprint(replay(panel, rules(), opinions(panel, seed), costs, params)[0]) == stored[f"replay {seed} {fill}"]


def hand_panel() -> Panel:
    """Two symbols over eight days; B misses day 3, A ends after day 5."""
    rows = {"A": [(100, 100), (102, 101), (103, 104), (104, 103), (101, 102), (100, 99)], "B": [(20, 20), (20, 21), (22, 22), None, (21, 20), (20, 19), (19, 20), (21, 21)]}
    days = pd.to_datetime(["2024-03-04", "2024-03-05", "2024-03-06", "2024-03-07", "2024-03-08", "2024-03-11", "2024-03-12", "2024-03-13"], utc=True).as_unit("us")
    long = [{"timestamp": days[d], "symbol": s, "open": float(b[0]), "high": max(b) + 1.0, "low": min(b) - 1.0, "close": float(b[1]), "volume": 10_000.0 if s == "A" else 50_000.0}
            for s, bars in rows.items() for d, b in enumerate(bars) if b]
    return from_frame(pd.DataFrame(long).sort_values(["timestamp", "symbol"]).reset_index(drop=True))


def test_ledger_by_hand() -> None:
    """Every cost type, a lapsed order, a weekend of borrow and a delisting, to the cent.

    Commission 10 bps, half spread 20 bps, impact 0.5 × volatility × sqrt(value / ADV), borrow 365 bps a year = 1 bp a calendar day."""
    nan = np.nan
    costs = CostParams(commission_bps=10, half_spread_bps=20, impact_coefficient=0.5, adv_bars=2, adv_floor_value=1.0, adv_assumed_value=1e7, vol_floor_daily=0.01,
                       borrow_bps_annual=365, fill="open")
    params = BacktestParams(initial_cash=100_000, delay_bars=0, max_gross=2, delist_after_bars=2, delist_haircut=0.5, start="panel")
    targets = np.array([[0.5, 0.0], [nan, nan], [0.5, -0.2], [0.3, -0.2], [nan, nan], [0.3, 0.0], [nan, nan], [nan, nan]])
    ledger = simulate(hand_panel(), targets, costs, params)

    def fill(q: float, ref: float, vol: float, adv: float) -> tuple[float, float]:
        "Money paid and costs."
        rate = 0.002 + 0.5 * vol * np.sqrt(abs(q) * ref / adv)
        price = ref * (1 + np.sign(q) * rate)
        return q * price + 0.001 * abs(q) * price, 0.001 * abs(q) * price + rate * abs(q) * ref

    # day 0: 500 A; filled on day 1 at 102, volatility at its floor (no return known yet), ADV 100 × 10,000
    cash, a, b = 100_000.0, 500.0, 0.0
    paid, cost1 = fill(500, 102, 0.01, 1_000_000)
    # rate = 0.002 + 0.005 × sqrt(0.051) = 0.312916 %, price 102.3191746, value 51,159.59, commission 51.16
    assert paid == pytest.approx(51_159.587 + 51.160, abs=0.01)
    cash -= paid
    expected = [(100_000.0, 100_000.0), (cash, cash + 500 * 101)]
    # day 2: close 104, 22; equity sizes both legs; B has no bar on day 3, so its order lapses
    equity2 = cash + 500 * 104
    expected.append((cash, equity2))
    q = 0.5 * equity2 / 104 - 500
    vol_a, adv_a = np.std([101 / 100 - 1, 104 / 101 - 1], ddof=1), (101 + 104) / 2 * 10_000
    paid, _ = fill(q, 104, vol_a, adv_a)
    cash, a = cash - paid, a + q
    equity3 = cash + a * 103
    expected.append((cash, equity3))
    # day 3: A down to 30 %; B, last known at 22 two days ago, is sold short and does trade on day 4
    qa, qb = 0.3 * equity3 / 103 - a, -0.2 * equity3 / 22
    vol_a, adv_a = np.std([104 / 101 - 1, 103 / 104 - 1], ddof=1), (104 + 103) / 2 * 10_000
    vol_b, adv_b = np.std([21 / 20 - 1, 22 / 21 - 1], ddof=1), (21 + 22) / 2 * 50_000
    assert vol_b == pytest.approx(0.001684, abs=1e-6)  # below the floor of 1 %, so the floor is used
    cash -= fill(qa, 101, vol_a, adv_a)[0] + fill(qb, 21, 0.01, adv_b)[0]
    a, b = a + qa, qb
    expected.append((cash, cash + a * 102 + b * 20))
    # day 5 follows a weekend: three days of borrow on B's value at the close of day 4
    borrow = -b * 20 * 3 * 1e-4
    cash -= borrow
    equity5 = cash + a * 99 + b * 19
    expected.append((cash, equity5))
    # day 5: back to 30 % of A, which has no bar any more: lapses; B is closed on day 6 at 19, after one day of borrow
    vol_b, adv_b = np.std([20 / 22 - 1, 19 / 20 - 1], ddof=1), (20 + 19) / 2 * 50_000
    cash -= -b * 19 * 1e-4 + fill(-b, 19, vol_b, adv_b)[0]
    expected.append((cash, cash + a * 99))
    # day 7: the second instant without a bar, A is settled at half its last close
    cash += a * 99 * 0.5
    expected.append((cash, cash))

    got = ledger.equity
    np.testing.assert_allclose(got["cash"], [c for c, _ in expected], atol=1e-6)
    np.testing.assert_allclose(got["equity"], [e for _, e in expected], atol=1e-6)
    np.testing.assert_allclose(got["costs"].iloc[1], cost1, atol=1e-6)
    np.testing.assert_allclose(got["borrow"].iloc[5], borrow, atol=1e-6)
    np.testing.assert_allclose(got["delisting"].iloc[7], a * 99 * 0.5, atol=1e-6)
    assert ledger.orders["status"].tolist() == ["filled", "filled", "lapsed", "filled", "filled", "lapsed", "filled"]
    assert ledger.fills["kind"].tolist() == ["order"] * 5 + ["delisting"]
    assert ledger.positions.iloc[-1]["timestamp"] == got["timestamp"].iloc[6]
    assert got["turnover"].iloc[1] == pytest.approx(0.51)


def test_buy_and_hold_without_costs_is_the_price() -> None:
    panel = market(3)
    ledger = simulate(panel, hold(panel, "S0"), FREE.model_copy(update={"fill": "close"}), PARAMS)
    c = panel["close"][0]
    np.testing.assert_allclose(ledger.equity["equity"].to_numpy()[1:] / 1e6, 1 + (c[1:] - c[1]) / c[0], rtol=1e-12)
    flat = Panel(panel.times, panel.symbols, {"close": np.where(np.arange(len(panel)) == 1, panel["close"][:, :1], panel["close"])})
    ledger = simulate(flat, hold(flat, "S0"), FREE, PARAMS)
    np.testing.assert_allclose(ledger.equity["equity"] / 1e6, flat["close"][0] / flat["close"][0, 0], rtol=1e-12)


def test_a_random_policy_loses_its_costs_and_nothing_else() -> None:
    """On prices without drift, the mean profit before costs of random weights is within three standard errors of zero."""
    gross = []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        close = 100 * np.cumprod(1 + rng.normal(0, 0.01, (4, 60)), axis=1)
        panel = Panel(market(0).times, ("A", "B", "C", "D"), {"close": close})
        e = simulate(panel, rng.uniform(-0.25, 0.25, (60, 4)), DEAR, PARAMS).equity
        gross.append((e["equity"].iloc[-1] - 1e6 + (e["costs"] + e["borrow"]).sum()) / 1e6)
    assert abs(np.mean(gross)) < 3 * np.std(gross, ddof=1) / np.sqrt(len(gross))


@pytest.mark.parametrize("delay", [1, 2, 5])
def test_delay_shifts_decisions(delay: int) -> None:
    panel = market(7)
    targets = wishes(panel, 8, 1.0)
    late = np.vstack([np.full((delay, targets.shape[1]), np.nan), targets[:-delay]])
    a, b = simulate(panel, targets, DEAR, PARAMS.model_copy(update={"delay_bars": delay})), simulate(panel, late, DEAR, PARAMS)
    same(a, b)


def test_costs_only_cost() -> None:
    panel = market(9)
    curves = equity_curves(panel, {"w": wishes(panel, 10, 1.0)}, DEAR, PARAMS, cost_scales=(0, 0.5, 1, 2, 4), delays=(0, 1), threads=2)
    assert (curves.xs(0, axis=1, level="delay_bars").iloc[-1].diff().dropna() < 0).all()
    pd.testing.assert_frame_equal(curves, equity_curves(panel, {"w": wishes(panel, 10, 1.0)}, DEAR, PARAMS, cost_scales=(0, 0.5, 1, 2, 4), delays=(0, 1)), check_exact=True)


def test_ruin_closes_the_account() -> None:
    close = np.array([[100.0, 101, 20, 21, 22, 23, 24]])
    panel = Panel(market(0).times[:7], ("A",), {"close": close})
    targets = np.full((7, 1), 2.0)
    ledger = simulate(panel, targets, FREE, PARAMS)
    assert ledger.equity["equity"].iloc[2] < 0
    assert ledger.orders["reason"].iloc[-1] == "account without equity: closed"
    assert (ledger.equity["positions_value"].iloc[3:] == 0).all()
    np.testing.assert_array_equal(ledger.equity["equity"].iloc[3:], ledger.equity["equity"].iloc[3])
    opinion = pd.DataFrame({"timestamp": panel.index, "symbol": "A", "score": 0.0, "prob_up": 0.9, "sigma": 0.01})
    bold = rules(vol_annual=9.0, max_weight=3.0, max_gross=3.0, max_net=3.0, vol_bars=2)
    wild = Panel(panel.times, ("A",), {"close": np.array([[100.0, 101, 102.5, 103, 30, 31, 32]])})
    ended, _ = replay(wild, bold, opinion, FREE, PARAMS)
    assert ended.equity["equity"].iloc[-1] < 0
    assert ended.orders["reason"].iloc[-1] == "account without equity: closed"


def test_short_delisting_costs_the_holder() -> None:
    close = np.array([[10.0] * 3 + [np.nan] * 5, [5.0, 6, 5, 6, 5, 6, 5, 6]])
    panel = Panel(market(0).times[:8], ("A", "B"), {"close": close})
    targets = np.full((8, 2), np.nan)
    targets[0] = [-0.5, 0.0]
    ledger = simulate(panel, targets, FREE, PARAMS)
    settled = ledger.fills[ledger.fills["kind"] == "delisting"].iloc[0]
    assert settled["timestamp"] == panel.index[5]
    assert settled["fill_price"] == pytest.approx(14.0)
    assert ledger.equity["equity"].iloc[-1] == pytest.approx(1e6 - 0.5e6 * 0.4)


def test_saved_and_loaded(tmp_path) -> None:
    panel = market(11)
    ledger = simulate(panel, wishes(panel, 12, 1.0), DEAR, PARAMS)
    idle = simulate(panel, np.zeros((len(panel), 5)), DEAR, PARAMS)
    for name, book in (("a", ledger), ("b", idle)):
        book.save(tmp_path / name)
        book.save(tmp_path / "again")
        same(book, Ledger.load(tmp_path / name))
        for table in TABLES:
            assert (tmp_path / name / f"{table}.parquet").read_bytes() == (tmp_path / "again" / f"{table}.parquet").read_bytes()
    assert idle.orders.empty
    with pytest.raises(DataError, match="no such file"):
        Ledger.load(tmp_path / "none")


def test_baselines_use_one_engine_and_know_no_future() -> None:
    panel = market(13)
    monthly = equal_weight(panel, "monthly", stale_bars=3)
    for cut in (5, 20, 40):
        np.testing.assert_array_equal(monthly[: cut + 1], equal_weight(until(panel, panel.times[cut]), "monthly", stale_bars=3))
    check_conserved(panel, simulate(panel, monthly, DEAR, PARAMS), PARAMS)


@pytest.mark.parametrize(("change", "message"), [
    (lambda w: w[:-1], "have shape"),
    (lambda w: w[:, :-1], "have shape"),
    (lambda w: np.where(np.arange(5) == 2, np.nan, np.zeros_like(w)), "NaN inside a row"),
    (lambda w: np.full_like(w, np.nan), "hold no decision"),
    (lambda w: np.where(np.arange(5) == 0, 4.0, np.zeros_like(w)), "the account accepts 3"),
    (lambda w: np.where(np.arange(5) == 0, -np.inf, np.zeros_like(w)), "not a weight"),
])
def test_bad_targets(change, message: str) -> None:
    panel = market(0)
    with pytest.raises(DataError, match=message):
        simulate(panel, change(wishes(panel, 1, 1.0)), DEAR, PARAMS)


def test_bars_per_year_have_to_fit_the_panel() -> None:
    panel = random_walk(3, 500, seed=1)
    check_bars_per_year(panel, 252.0)
    with pytest.raises(ParameterError, match="says 19,656, and the panel has about 26"):
        check_bars_per_year(panel, 19_656.0)


def test_a_policy_that_never_decides() -> None:
    """Its account stays in cash, and its table of decisions has no row and the columns of any other."""
    panel = market(3)
    _, some = replay(panel, rules(), opinions(panel, 3), DEAR, PARAMS)
    ledger, none = replay(panel, rules(rebalance_bars=10_000), opinions(panel, 3, after=2), DEAR, PARAMS.model_copy(update={"start": "panel"}))
    assert (ledger.equity["equity"] == PARAMS.initial_cash).all()
    assert len(none) == 0
    assert (none.columns.tolist(), none.dtypes.tolist()) == (some.columns.tolist(), some.dtypes.tolist())


def test_curves_know_instruments_and_actions() -> None:
    """What `simulate` is told of instruments and actions, the curves and the sensitivity are told as well."""
    panel = market(4)
    now = {"instruments": {s: Instrument(lot=1, financing_bps_annual=300) for s in panel.symbols},
           "actions": lay_actions(panel, pd.DataFrame({"timestamp": panel.index[panel.alive[0]][[10]], "symbol": panel.symbols[0], "kind": "dividend", "value": float(np.nanmean(panel["close"][0])) * 0.1}))}
    targets = wishes(panel, 5, 1.0)
    whole = simulate(panel, targets, DEAR, PARAMS.model_copy(update={"start": "panel"}), **now).equity["equity"]
    np.testing.assert_array_equal(equity_curves(panel, {"w": targets}, DEAR, PARAMS, **now)["w", 1.0, PARAMS.delay_bars], whole)
    small = {"seed": 1, "n_boot": 20, "level": 0.9, "bars_per_year": 252}
    begin = int((~np.isnan(targets)).any(axis=1).argmax())
    told, plain = (sensitivity(panel, targets, DEAR, PARAMS, scales=[1], **small, **more)["sharpe_annual"].iloc[0] for more in (now, {}))
    ret = whole.iloc[begin:].pct_change().dropna()
    np.testing.assert_allclose(told, np.sqrt(252) * ret.mean() / ret.std(), rtol=1e-9)
    assert told != plain


class Spy:
    """A policy, and the accounts that it was shown."""

    def __init__(self, policy: Policy) -> None:
        self.policy, self.steps, self.vol_bars, self.seen = policy, policy.steps, policy.vol_bars, []

    def decide(self, t, forecast, account, market):
        self.seen.append((account, market.close))
        return self.policy.decide(t, forecast, account, market)


@pytest.mark.parametrize("seed", range(5))
def test_what_an_account_remembers(seed: int) -> None:
    """Entry, age and best close of every position as they follow from the ledger's fills; the record from its equity; a halt that ends by itself. And targets from a policy with exits are still targets."""
    panel, params = market(seed), PARAMS.model_copy(update={"release_after_bars": 4, "delist_after_bars": 60})
    block = {"rebalance_bars": 2, "vol_bars": 10, "bars_per_year": 252, "direction": {"prob_threshold": 0.02, "allow_short": True}, "equal_weight": {"gross": 1.0}, "stop_loss": {"loss": 0.04},
             "trailing_stop": {"drop": 0.05}, "max_holding": {"bars": 9}, "drawdown_stop": {"max_drawdown": 0.05}, "cap_gross": {"max_gross": 1.2}}
    spy = Spy(build_policy(PolicyParams(**block)))
    ledger, decisions = replay(panel, spy, opinions(panel, seed, after=2), DEAR, params)
    same(ledger, simulate(panel, decided_targets(panel, decisions), DEAR, params), but=("reason",))
    n, (accounts, closes) = len(panel.symbols), zip(*spy.seen, strict=True)
    quantity, price = wide(ledger.fills, "quantity", panel).to_numpy(), wide(ledger.fills, "fill_price", panel).to_numpy()
    shares, memory = np.zeros(n), (np.full(n, np.nan), np.zeros(n), np.full(n, np.nan), np.full(n, np.nan))
    first = accounts[0].bar
    for t in range(len(panel)):
        *memory, _ = follow_bar(shares, quantity[t], price[t], panel["close"][:, t], *memory)
        shares = shares + quantity[t]
        shares[np.abs(shares) < 1e-9] = 0.0
        if t >= first and t - first < len(accounts):
            account = accounts[t - first]
            assert account.bar == t
            np.testing.assert_array_equal(closes[t - first], panel["close"][:, t])
            for found, expected in ((account.entry, memory[0]), (account.age, memory[2]), (account.best, memory[3])):
                held = account.weights != 0
                np.testing.assert_allclose(found[held], expected[held], rtol=1e-9)
    equity = ledger.equity["equity"].to_numpy()
    released = [k for k, a in enumerate(accounts) if k and accounts[k - 1].record.halt and not a.record.halt]
    for k, account in enumerate(accounts):
        since = max([first + r for r in released if r <= k], default=0)
        assert account.record.peak == max(equity[since:first + k + 1].max(), params.initial_cash if since == 0 else 0)
    assert any(a.record.halt for a in accounts)
