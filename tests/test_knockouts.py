"""Knock-out options: values against other ways to them, limits, monotonicities, nights, and bars that know nothing of the future."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtr

from mltrading.backtest.actions import lay_actions
from mltrading.backtest.bars import bars_of
from mltrading.backtest.costs import CostParams
from mltrading.backtest.engine import BacktestParams
from mltrading.backtest.events import run
from mltrading.backtest.knockout_values import (
    barrier_for_probability,
    knockout_probability,
    knockout_value,
    leverage,
    simulate_nights,
    strike_for_leverage,
    watched_barrier,
)
from mltrading.backtest.knockouts import Knockouts, KnockoutTerms, financing_levels, knockout_bars
from mltrading.backtest.orders import Orders
from mltrading.core.errors import ParameterError
from mltrading.features.futures import other_future
from mltrading.market.panel import Panel, from_frame, to_frame, until
from mltrading.market.simulate import random_walk

MANY = settings(max_examples=60)
SIDE, AWAY, BUFFER = st.sampled_from([1, -1]), st.floats(0.005, 0.5), st.floats(0.0, 0.9)
YEARS, VOL, RATE, YIELD = st.floats(0.01, 3.0), st.floats(0.02, 0.8), st.floats(-0.03, 0.1), st.floats(0.0, 0.06)
ISSUED = pd.Timestamp("2015-02-02 21:00", tz="UTC")


def vanilla(side: float, spot: float, strike: float, years: float, vol: float, rate: float, dividend: float) -> float:
    "A call or a put of Black, Scholes and Merton."
    w = vol * math.sqrt(years)
    d = math.log(spot / strike) / w + (rate - dividend) * years / w + w / 2
    return side * (spot * math.exp(-dividend * years) * ndtr(side * d) - strike * math.exp(-rate * years) * ndtr(side * (d - w)))


def levels(side: int, away: float, buffer: float, spot: float = 100.0) -> tuple[float, float]:
    "Financing level, and a barrier that is the part `buffer` of the way to the price before it."
    strike = spot * (1 - side * away)
    return strike, strike + side * buffer * away * spot


@MANY
@given(SIDE, AWAY, BUFFER, YEARS, VOL, RATE, YIELD, RATE)
def test_value_is_scale_free_and_within_its_bounds(side, away, buffer, years, vol, rate, dividend, growth):
    strike, barrier = levels(side, away, buffer)
    value = float(knockout_value(side, 100.0, strike, barrier, years, vol, rate, dividend, growth))
    assert float(knockout_value(side, 1e4, 100 * strike, 100 * barrier, years, vol, rate, dividend, growth)) == pytest.approx(100 * value, rel=1e-9, abs=1e-8)
    assert value >= -1e-10
    longest = math.exp(max(growth - rate, 0.0) * years)  # whatever is paid is paid in units that grow with the levels
    residual = side * (barrier - strike)
    assert value <= vanilla(side, 100.0, strike, years, vol, rate - growth, dividend) + residual * longest + 1e-9


@MANY
@given(SIDE, AWAY, BUFFER, YEARS, VOL, RATE)
def test_a_loan_at_the_interest_rate_is_worth_its_intrinsic_value(side, away, buffer, years, vol, rate):
    strike, barrier = levels(side, away, buffer)
    value = float(knockout_value(side, 100.0, strike, barrier, years, vol, rate, 0.0, rate))
    assert value == pytest.approx(100 * away, rel=1e-9, abs=1e-9)


@MANY
@given(SIDE, AWAY, YEARS, VOL, RATE, YIELD)
def test_in_and_out_make_a_vanilla(side, away, years, vol, rate, dividend):
    "Merton's down-and-in call with the barrier behind the strike is an image of a vanilla; with the out option it adds up."
    strike, spot = 100.0, 100.0
    barrier = spot * (1 - side * away)
    power = 2 * (rate - dividend) / vol**2 - 1
    knock_in = (barrier / spot) ** power * vanilla(side, barrier**2 / spot, strike, years, vol, rate, dividend)
    whole = vanilla(side, spot, strike, years, vol, rate, dividend)
    out = float(knockout_value(side, spot, strike, barrier, years, vol, rate, dividend))
    assert out + knock_in == pytest.approx(whole, rel=1e-8, abs=1e-9)


@MANY
@given(SIDE, YEARS, VOL, RATE, YIELD)
def test_limits(side, years, vol, rate, dividend):
    strike, barrier = levels(side, 0.1, 0.3)
    at = float(knockout_value(side, barrier * (1 + side * 1e-12), strike, barrier, years, vol, rate, dividend))
    assert at == pytest.approx(abs(barrier - strike), rel=1e-6)
    assert float(knockout_value(side, barrier, strike, barrier, years, vol, rate, dividend)) == pytest.approx(abs(barrier - strike))
    assert float(knockout_value(side, strike * (1 - side * 0.01), strike, barrier, years, vol, rate, dividend)) == 0.0
    soon = float(knockout_value(side, 100.0, strike, barrier, 1e-7, vol, rate, dividend))
    assert soon == pytest.approx(side * (100 - strike), rel=1e-5)
    if side > 0 and vol * math.sqrt(years) < 0.4:  # the barrier is never seen
        far = float(knockout_value(1, 100.0, 1.0, 1.0, years, vol, rate, dividend))
        assert far == pytest.approx(100 * math.exp(-dividend * years) - math.exp(-rate * years), rel=1e-9)


@MANY
@given(SIDE, AWAY, YEARS, VOL, RATE, YIELD)
def test_value_rises_away_from_the_barrier_and_falls_with_the_rate_on_the_loan(side, away, years, vol, rate, dividend):
    "For turbos; with a residual, staying alive can be worth less than what is paid at the end."
    strike = 100 * (1 - side * away)
    spots = strike * np.exp(side * np.linspace(0.0, 0.5, 40))
    assert (np.diff(knockout_value(side, spots, strike, strike, years, vol, rate, dividend)) >= -1e-9).all()
    loans = knockout_value(side, 100.0, strike, strike, years, vol, rate, 0.0, np.linspace(rate, rate + 0.1, 8))
    assert (side * np.diff(loans) <= 1e-9).all()


@MANY
@given(SIDE, YEARS, VOL, RATE, RATE)
def test_probability_falls_with_distance_rises_with_time_and_has_an_inverse(side, years, vol, drift, growth):
    barriers = 100 * np.exp(-side * np.linspace(0.0, 3.0, 60))
    p = knockout_probability(side, 100.0, barriers, years, vol, drift, growth)
    assert p[0] == 1.0
    assert ((p >= 0) & (p <= 1)).all()
    assert (np.diff(p) <= 1e-12).all()
    assert (np.diff(knockout_probability(side, 100.0, barriers[3], np.linspace(0.0, 3.0, 30), vol, drift, growth)) >= -1e-12).all()
    wanted = np.array([0.001, 0.02, 0.3, 0.9])
    found = barrier_for_probability(side, 100.0, wanted, years, vol, drift, growth)
    np.testing.assert_allclose(knockout_probability(side, 100.0, found, years, vol, drift, growth), wanted, rtol=1e-8)
    assert (side * found < side * 100.0).all()


@MANY
@given(SIDE, st.floats(1.01, 500.0), st.floats(0.0, 0.001))
def test_leverage_has_an_inverse(side, wanted, premium):
    strike = float(strike_for_leverage(side, 100.0, wanted, 100 * premium))
    assert float(leverage(100.0, side * (100.0 - strike) + 100 * premium)) == pytest.approx(wanted, rel=1e-9)


def test_threads_and_shapes_change_no_bit():
    rng = np.random.default_rng(3)
    side, spot = rng.choice([1, -1], 50_000), rng.uniform(80, 120, 50_000)
    strike = spot * (1 - side * rng.uniform(0.01, 0.3, 50_000))
    one = knockout_value(side, spot, strike, strike * (1 + 0.005 * side), 0.3, 0.25, 0.02, 0.01, 0.04)
    assert np.array_equal(one, knockout_value(side, spot, strike, strike * (1 + 0.005 * side), 0.3, 0.25, 0.02, 0.01, 0.04, threads=2))
    assert one[777] == float(knockout_value(side[777], spot[777], strike[777], strike[777] * (1 + 0.005 * side[777]), 0.3, 0.25, 0.02, 0.01, 0.04))
    assert knockout_value(1, 100.0, np.array([[90.0], [80.0]]), 90.0, np.array([0.1, 0.2, 0.3]), 0.2).shape == (2, 3)


# nights


def on_a_grid(side: int, strike: float, barrier: float, days: int, vol: float, share: float, points: int = 1200) -> tuple[float, float]:
    "Probability of a knock-out and the issuer's loss without interest, from densities of the log price pushed through nights and sessions."
    night, day = vol * math.sqrt(share / 252), vol * math.sqrt((1 - share) / 252)
    h = side * math.log(barrier / 100)
    top = 8 * vol * math.sqrt(days / 252)
    step = (top - h) / points
    x = h + (np.arange(points) + 0.5) * step  # where it lives, on the near side of the barrier
    lean = -side * 0.5  # of the drift, per variance

    def jump(sd: float) -> np.ndarray:
        return np.exp(-0.5 * ((x[None, :] - x[:, None] - lean * sd * sd) / sd) ** 2) * step / (sd * math.sqrt(2 * math.pi))
    survive = 1 - np.exp(-2 * (x[:, None] - h) * (x[None, :] - h) / (day * day))
    over_night, over_day = jump(night), jump(day) * survive
    prices = 100 * np.exp(side * x)
    at_risk = np.array([vanilla(-side, p, strike, 1.0, night, 0.0, 0.0) for p in prices])
    loss = vanilla(-side, 100.0, strike, 1.0, night, 0.0, 0.0)
    alive = (np.exp(-0.5 * ((x - lean * night * night) / night) ** 2) * step / (night * math.sqrt(2 * math.pi))) @ over_day
    for _ in range(days - 1):
        loss += float(alive @ at_risk)
        alive = alive @ over_night @ over_day
    return 1 - float(alive.sum()), loss


@pytest.mark.parametrize(("side", "away", "buffer"), [(1, 0.02, 0.0), (1, 0.05, 0.2), (-1, 0.03, 0.0), (-1, 0.05, 0.3)])
def test_nights_agree_with_densities_on_a_grid(side, away, buffer):
    strike, barrier = levels(side, away, buffer)
    out = simulate_nights(side, 100.0, strike, barrier, 10, 0.25, night_share=0.3, paths=40_000, seed=1)
    knocked, loss = on_a_grid(side, strike, barrier, 10, 0.25, 0.3)
    assert abs(out.knocked - knocked) < 4 * math.sqrt(knocked * (1 - knocked) / 40_000)
    assert abs(out.gap_loss - loss) < 4 * out.gap_error
    fair = 100 * away + loss  # a fair game, and the insurance
    assert abs(out.value - fair) < 4 * out.value_error
    assert abs(out.value / fair - 1) < 1e-3


@pytest.mark.parametrize("rate", [0.0, 0.04])
def test_without_nights_it_is_the_closed_form(rate):
    side = np.array([1, 1, -1, -1])
    strike, barrier = np.array([levels(s, a, b) for s, a, b in zip(side, (0.03, 0.1, 0.03, 0.1), (0.0, 0.3, 0.0, 0.4), strict=True)]).T
    out = simulate_nights(side, 100.0, strike, barrier, 30, 0.3, rate, 0.02, night_share=0.0, paths=40_000, seed=2)
    value = knockout_value(side, 100.0, strike, barrier, 30 / 252, 0.3, rate, 0.02)
    assert (np.abs(out.value - value) < 4 * out.value_error + 1e-4 * value).all()
    assert (np.abs(out.value / value - 1) < 1e-3).all()
    again = simulate_nights(side, 100.0, strike, barrier, 30, 0.3, rate, 0.02, night_share=0.0, paths=40_000, seed=2)
    assert all(np.array_equal(a, b) for a, b in zip(out, again, strict=True))


def test_once_a_day_is_a_barrier_further_away():
    barriers = np.array([97.0, 94.0, 90.0])
    out = simulate_nights(1, 100.0, barriers, barriers, 60, 0.2, night_share=1.0, paths=40_000, seed=3)
    moved = knockout_probability(1, 100.0, watched_barrier(1, barriers, 0.2, 1 / 252), 60 / 252, 0.2)
    assert (np.abs(out.knocked - moved) < 4 * np.sqrt(moved * (1 - moved) / 40_000) + 0.002).all()
    assert (out.knocked == out.by_night).all()
    assert (knockout_probability(1, 100.0, barriers, 60 / 252, 0.2) > moved + 0.01).all()


# bars


def sheet(symbol: str, price: float, side: int, away: float, buffer: float, **changes: object) -> KnockoutTerms:
    strike, barrier = levels(side, away, buffer, price)
    return replace(KnockoutTerms(symbol, ISSUED, side, strike, barrier, 0.1, 0.03, 0.025, 0.02, 0.02, 1e-6, 1.0), **changes)


def chain(panel: Panel) -> dict[str, KnockoutTerms]:
    "Products on each symbol, long and short, turbos and minis, some issued later."
    out = {}
    for i, symbol in enumerate(panel.symbols):
        for k, (side, away, buffer) in enumerate([(1, 0.05, 0.0), (-1, 0.08, 0.0), (1, 0.2, 0.2), (-1, 0.25, 0.3)]):
            issued = ISSUED + pd.Timedelta(days=20 * k)
            past = panel["close"][i, panel.index <= issued]
            if len(past := past[np.isfinite(past)]):
                out[f"{symbol}_{k}"] = sheet(symbol, float(past[-1]), side, away, buffer, issued=issued)
    return out


def same(a: Knockouts, b: Knockouts, upto: int) -> None:
    assert a.panel.symbols == b.panel.symbols
    for x, y in [(a.settlement, b.settlement), (a.strike, b.strike), (a.barrier, b.barrier), *((a.panel[f], b.panel[f]) for f in a.panel.fields)]:
        assert np.array_equal(x[:, :upto], y[:, :upto], equal_nan=True)


def test_bars_know_nothing_of_the_future():
    panel = random_walk(3, 160, seed=2)
    products = chain(panel)
    whole = knockout_bars(panel, products)
    assert np.isfinite(whole.settlement).any(axis=1).sum() >= 3
    assert whole.actions["value"].tolist() == whole.settlement.T[np.isfinite(whole.settlement.T)].tolist()
    assert whole.actions["timestamp"].is_monotonic_increasing
    for cut in (30, 60, 90, 158):
        same(whole, knockout_bars(until(panel, panel.times[cut]), products), cut + 1)
        issued = {name: terms for name, terms in products.items() if terms.issued <= panel.index[cut]}
        other = other_future(panel, panel.times[cut], np.random.default_rng(7))
        same(knockout_bars(panel, issued), knockout_bars(other, issued), cut + 1)


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.booleans())
def test_bars_are_bars_and_end_once(seed, unquoted):
    panel = random_walk(2, 140, seed, closes_only=1)
    products = chain(panel)
    if not products:
        return
    quoted = np.random.default_rng(seed).random(len(panel)) < 0.7 if unquoted else None
    out = knockout_bars(panel, products, quoted)
    alive = out.panel.alive
    assert (np.isfinite(out.settlement).sum(axis=1) <= 1).all()
    for k, name in enumerate(out.panel.symbols):
        terms, i = products[name], panel.symbols.index(products[name].underlying)
        strike, barrier = financing_levels(terms, panel.times)
        with np.errstate(invalid="ignore"):
            worst = np.fmin.reduce([terms.side * panel[f][i] for f in ("open", "high", "low", "close")])
            dead = np.flatnonzero((worst <= terms.side * barrier) & (panel.index > terms.issued))
        end = dead[0] if len(dead) else len(panel)
        assert np.array_equal(np.flatnonzero(np.isfinite(out.settlement[k])), dead[:1])
        assert not alive[k, end + 1:].any()
        assert not alive[k, panel.index < terms.issued].any()
        assert np.isnan(out.strike[k, end + 1:]).all()
        live = np.isfinite(panel["close"][i]) & (panel.index >= terms.issued) & (np.arange(len(panel)) < end) & (True if quoted is None else quoted)
        assert np.array_equal(alive[k, :end], live[:end])
        value = terms.ratio * terms.side * (panel["close"][i] - strike) + terms.premium
        np.testing.assert_allclose(out.panel["close"][k, live], value[live], atol=1e-6)
        if len(dead):
            assert 0.0 <= out.settlement[k, end] <= terms.ratio * terms.side * (barrier[end] - strike[end]) + 1e-12
            if alive[k, end]:  # a last bar ends at the quote at the barrier: nobody was quoted less
                at_barrier = max(terms.ratio * terms.side * (barrier[end] - strike[end]) + terms.premium, terms.tick)
                np.testing.assert_allclose(out.panel["low"][k, end], min(at_barrier, out.panel["open"][k, end]), atol=1e-6)
                assert out.panel["low"][k, end] == out.panel["close"][k, end]
    if alive.any() and "open" in out.panel.fields:
        from_frame(to_frame(Panel(out.panel.times, out.panel.symbols, {"close": out.panel["close"]})))
        low, high = out.panel["low"], out.panel["high"]
        for f in ("open", "close"):
            known = np.isfinite(low) & np.isfinite(out.panel[f])
            assert (out.panel[f][known] >= low[known] - 1e-12).all()
            assert (out.panel[f][known] <= high[known] + 1e-12).all()


class Guarded:
    """One product with a stop behind it."""

    def __init__(self, stop):
        self.stop = stop

    def decide(self, now):
        return Orders(["T"], 1000, stop_loss=self.stop) if now.number == 0 else None


@pytest.mark.parametrize(("stop", "kind", "price"), [(0.25, "settlement", 0.2), (0.35, "order", 0.35)])
def test_no_stop_below_the_last_quote_is_filled(stop, kind, price):
    """A mini that is quoted at 0.30 when its barrier is touched and pays 0.20 never traded at 0.25."""
    bars = np.array([(100, 100, 100, 100), (100, 101, 99, 100), (100, 104, 92, 95)], float).T
    index = Panel(pd.bdate_range("2020-01-14 21:00", periods=3, normalize=False).as_unit("us").to_numpy(), ("A",), {f: bars[k:k + 1].copy() for k, f in enumerate(("open", "high", "low", "close"))})
    mini = KnockoutTerms("A", index.index[0], side=1, strike=90.0, barrier=93.0, ratio=0.1, reference_annual=0.0, spread_annual=0.0, premium=0.0, bid_ask=0.0, tick=0.01, unwind=1.0)
    products = knockout_bars(index, {"T": mini})
    free = CostParams(commission_bps=0, half_spread_bps=0, impact_coefficient=0, adv_bars=2, adv_floor_value=1e4, adv_assumed_value=1e7, vol_floor_daily=0.01, borrow_bps_annual=0, fill="open")
    params = BacktestParams(initial_cash=1e5, delay_bars=0, max_gross=1, delist_after_bars=5, delist_haircut=0.3, start="panel")
    ledger = run(bars_of(products.panel, lay_actions(products.panel, products.actions)), ("T",), Guarded(stop), free, params)
    last = ledger.fills.iloc[-1]
    assert (last["kind"], len(ledger.fills)) == (kind, 2)
    np.testing.assert_allclose(last["fill_price"], price, rtol=1e-12)


def test_levels_depend_on_the_calendar_not_on_the_bars():
    days = pd.date_range("2015-02-03 21:00", "2015-04-30 21:00").as_unit("us").to_numpy()
    for side in (1, -1):
        terms = sheet("A", 100.0, side, 0.1, 0.4)
        whole = financing_levels(terms, days)
        some = np.random.default_rng(side + 1).random(len(days)) < 0.4
        assert np.array_equal(financing_levels(terms, days[some]), whole[:, some])
        rate = terms.financing_annual / 360
        assert whole[0, -1] == pytest.approx(terms.strike * (1 + rate) ** 87, rel=1e-12)
        assert whole[1, 0] == terms.barrier
        moves = np.flatnonzero(np.diff(whole[1]) != 0) + 1
        assert [str(days[m])[:10] for m in moves] == ["2015-03-01", "2015-04-01"]
        assert whole[1, -1] / terms.barrier == pytest.approx((1 + rate) ** 58, rel=1e-12)


def test_a_bar_at_midnight_belongs_to_the_day_before():
    terms = sheet("A", 100.0, 1, 0.1, 0.0, issued=pd.Timestamp("2015-02-03", tz="UTC"))
    stamps = pd.DatetimeIndex(["2015-02-03 12:00", "2015-02-04 00:00", "2015-02-04 00:01"]).as_unit("us").to_numpy()
    levels_ = financing_levels(terms, stamps)[0] / terms.strike
    rate = 1 + terms.financing_annual / 360
    np.testing.assert_allclose(levels_, [rate, rate, rate**2], rtol=1e-14)


@pytest.mark.parametrize(("changes", "message"), [
    ({"side": 2}, "not a side"), ({"strike": 0.0}, "`strike`: 0 is not positive"), ({"ratio": -1.0}, "`ratio`"), ({"tick": 0.0}, "`tick`"), ({"spread_annual": -0.01}, "`spread_annual`"),
    ({"premium": float("nan")}, "`premium`: nan"), ({"barrier": 50.0}, "lies behind"), ({"unwind": -0.1}, "not a part"), ({"issued": pd.Timestamp("2015-01-01")}, "no zone")])
def test_terms_that_cannot_be(changes, message):
    with pytest.raises(ParameterError, match=message):
        replace(sheet("A", 100.0, 1, 0.1, 0.1), **changes)


@pytest.mark.parametrize("name", ["spot", "strike", "barrier", "vol_annual"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_prices_that_cannot_be(name, value):
    given_ = {"side": 1, "spot": 100.0, "strike": 90.0, "barrier": 90.0, "years": 1.0, "vol_annual": 0.2} | {name: np.array([1.0, value])}
    with pytest.raises(ParameterError, match=f"`{name}`"):
        knockout_value(**given_)
