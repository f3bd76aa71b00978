"""Policies: limits hold whatever comes in, nothing is remembered or written to, exits and halts last as long as they say, and the account's memory adds up."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mltrading.core.errors import ParameterError
from mltrading.core.params import block, load_params
from mltrading.portfolio.block import PolicyParams, build_policy
from mltrading.portfolio.exits import Exit, Reentry, StopLoss
from mltrading.portfolio.limits import CapGross, CapNet, CapPosition, DrawdownStop, NoTradeBand
from mltrading.portfolio.policy import Account, Forecast, Limit, Market, Policy, Record, Sizing, Targets
from mltrading.portfolio.record import advance, book_fill, follow_bar, halt, open_record, release
from mltrading.portfolio.sizing import Conviction, Direction, FixedWeight, VolatilityTarget

NOW = np.datetime64("2024-01-02T21:00")
SLOW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def test_the_steps_of_the_first_system_keep_their_bits() -> None:
    """400 decisions of the seven steps that the project began with: weights, traces and reasons are those of then, to the bit."""
    rng, found = np.random.default_rng(20261121), hashlib.sha256()
    for k in range(400):
        n = int(rng.integers(1, 40))
        threshold, vol, correlation, one, gross, net = (rng.uniform(0, 0.05), rng.uniform(0.02, 1), rng.uniform(0, 0.9), rng.uniform(0.05, 0.5), rng.uniform(0.3, 2), rng.uniform(0.2, 1))
        short, every, band = bool(rng.integers(2)), int(rng.integers(1, 4)), rng.uniform(0, 0.1)
        prob = np.where(rng.random(n) < 0.1, np.nan, rng.random(n))
        held = rng.uniform(-0.4, 0.4, n) * (rng.random(n) < 0.7)
        alive = rng.random(n) < 0.8
        vols = np.where(rng.random(n) < 0.05, np.nan, rng.uniform(0.001, 0.05, n))
        policy = Policy([Direction(prob_threshold=threshold, allow_short=short), Conviction(), VolatilityTarget(vol_annual=vol, correlation=correlation), CapPosition(max_weight=one),
                         CapGross(max_gross=gross), CapNet(max_net=net), NoTradeBand(min_trade_weight=band)], every)
        out = policy.decide(NOW, Forecast(prob, prob, prob), Account(held, 1e6, k), Market(alive, vols))
        for part in (out.weights.tobytes(), "|".join(out.reasons).encode(), bytes([out.decided]), *(x for name, w in out.trace.items() for x in (name.encode(), w.tobytes()))):
            found.update(part)
    assert found.hexdigest() == "0ed1bd7ab232b70f9ef0869eb6128d55944ea4aee4015663e523ba854497fcb3"


def some_block(rng: np.random.Generator) -> dict[str, Any]:
    """A block of parameters with a random choice of steps."""
    size = str(rng.choice(["fixed_weight", "equal_weight", "inverse_volatility", "volatility_target", "kelly"]))
    sizes: dict[str, dict[str, Any]] = {
        "fixed_weight": {"weight": rng.uniform(0.05, 1)}, "equal_weight": {"gross": rng.uniform(0.2, 2)}, "inverse_volatility": {"gross": rng.uniform(0.2, 2)},
        "volatility_target": {"vol_annual": rng.uniform(0.02, 1), "correlation": rng.uniform(0, 0.9)},
        "kelly": {"fraction": rng.uniform(0.1, 1), "observations": 400, "edge_prior": 0.05, "correlation": rng.uniform(0, 0.9)}}
    steps: dict[str, Any] = {
        "conviction": {}, "multipliers": {"layers": {"health": {"low": 0.2, "high": 1.3}, "regime": {"low": 0.5, "high": 1.0}}, "low": 0.3, "high": 1.2},
        "stop_loss": {"loss": 0.05}, "take_profit": {"gain": 0.08}, "trailing_stop": {"drop": 0.06, "by_group": {"x": 0.03}}, "volatility_stop": {"multiple": 3.0},
        "time_stop": {"bars": 10, "gain": 0.01}, "max_holding": {"bars": 15}, "health_collapse": {"floor": 0.3},
        "loss_limits": {"day": 0.02, "week": 0.04, "month": None, "action": str(rng.choice(["freeze", "close", "halt"]))}, "cool_down": {"losses": 3, "bars": 5},
        "drawdown_stop": {"max_drawdown": 0.1}, "cap_turnover": {"max_turnover": rng.uniform(0.1, 2)}, "cap_position": {"max_weight": rng.uniform(0.05, 0.5), "by_group": {"x": 0.1}},
        "cap_count": {"max_positions": int(rng.integers(1, 8))}, "cap_group": {"max_weight": rng.uniform(0.2, 1)}, "cap_gross": {"max_gross": rng.uniform(0.3, 2)},
        "cash_reserve": {"fraction": rng.uniform(0, 0.5)}, "cap_net": {"max_net": rng.uniform(0.1, 1)}, "no_trade_band": {"min_trade_weight": rng.uniform(0, 0.1)},
        "min_order": {"min_value": rng.uniform(0, 5e4)}}
    return {"rebalance_bars": int(rng.integers(1, 4)), "vol_bars": 20, "bars_per_year": 252, "direction": {"prob_threshold": 0.02, "allow_short": bool(rng.integers(2))}, size: sizes[size],
            **{name: values for name, values in steps.items() if rng.random() < 0.6}}


def some_arguments(rng: np.random.Generator) -> tuple[Forecast, Account, Market]:
    """A random instant, with closed markets, missing forecasts and volatilities, positions in gain and in loss."""
    n = int(rng.integers(1, 12))
    alive = rng.random(n) < 0.8
    held = rng.uniform(-0.4, 0.4, n) * (rng.random(n) < 0.7)
    close = np.where(alive, 100 * np.exp(rng.normal(0, 0.05, n)), np.nan)
    prob = np.where(rng.random(n) < 0.1, np.nan, rng.random(n))
    known = np.where(held != 0, 1.0, np.nan)
    record = Record(*(1e6 * np.exp(rng.normal(0, 0.02, 3))), peak=1e6 * rng.uniform(1, 1.15), losses=int(rng.integers(0, 6)), since_loss=int(rng.integers(0, 9)), halt=str(rng.choice(["", "", "", "why"])))
    account = Account(held, 1e6, int(rng.integers(0, 6)), entry=known * 100, age=known * rng.integers(0, 20, n), best=known * 100 * np.exp(np.sign(held) * np.abs(rng.normal(0, 0.04, n))),
                      barred=rng.choice([-1.0, 0, 0, 1], n), record=record)
    signals = {"health": np.where(rng.random(n) < 0.1, np.nan, rng.random(n)), "regime": rng.random(n)}
    market = Market(alive, np.where(rng.random(n) < 0.05, np.nan, rng.uniform(0.001, 0.05, n)), close, signals, ("x", *rng.choice(["x", "y", ""], n - 1)))
    return Forecast((prob - 0.5) / 50, prob, np.full(n, 0.02)), account, market


def bytes_of(*records: Any) -> list[bytes]:
    """All arrays inside some frozen records, as bytes."""
    found: list[bytes] = []
    for record in records:
        for value in vars(record).values():
            inside = value.values() if isinstance(value, dict) else [value]
            found += [v.tobytes() for v in inside if isinstance(v, np.ndarray)]
    return found


@SLOW
@given(seed=st.integers(0, 10**9))
def test_limits_hold_and_nothing_is_touched(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(10):
        policy, (forecast, account, market) = build_policy(block(PolicyParams, some_block(rng), "policy")), some_arguments(rng)
        before = bytes_of(forecast, account, market)
        out = policy.decide(NOW, forecast, account, market)
        again = policy.decide(NOW, forecast, account, market)
        assert before == bytes_of(forecast, account, market)
        assert bytes_of(out) == bytes_of(again)
        assert out.reasons == again.reasons
        assert out.halt == again.halt
        assert np.isfinite(out.weights).all()
        assert out.barred is not None
        assert set(out.barred) <= {-1.0, 0.0, 1.0}
        np.testing.assert_array_equal(out.weights[~market.alive], account.weights[~market.alive])
        check_limits(policy, out, forecast, account, market)


def check_limits(policy: Policy, out: Targets, forecast: Forecast, account: Account, market: Market) -> None:
    """What was decided keeps every limit, or is over it by nothing but what cannot be traded."""
    from mltrading.portfolio.policy import Situation

    held, w, free = account.weights, out.weights, market.alive
    if account.record is not None and account.record.halt:
        assert out.decided
        assert (w[free] == 0).all()
        return
    if not out.decided:
        assert account.bar % policy.rebalance_bars
        np.testing.assert_array_equal(w, held)
        return
    assert set(out.trace) == {c for s in policy.steps for c in s.columns}
    now = Situation(NOW, forecast, account, market, 252, policy.limits)
    frozen = np.where(free, 0.0, held)
    for limit in policy.limits:
        assert (limit.measure(w, now) <= np.maximum(limit.bound(now), limit.measure(frozen, now)) + 1e-9).all(), limit
        if limit.title() == "cap_turnover":
            same = np.sign(w) == np.sign(held)
            grown = np.where(same, np.maximum(np.abs(w) - np.abs(held), 0), np.abs(w))[free].sum()
            assert grown <= limit.max_turnover + 1e-9  # type: ignore[attr-defined]
    if out.halt:
        assert (w[free] == 0).all()
    left = (held != 0) & free & (out.barred == np.sign(held)) & any(isinstance(s, Exit) for s in policy.steps)
    assert (w[left] * np.sign(held[left]) <= 0).all()


@SLOW
@given(seed=st.integers(0, 10**9), action=st.sampled_from(["freeze", "close", "halt"]))
def test_a_loss_limit_opens_nothing(seed: int, action: str) -> None:
    rng = np.random.default_rng(seed)
    written = some_block(rng) | {"loss_limits": {"day": None, "week": None, "month": 0.01, "action": action}, "rebalance_bars": 1}
    forecast, account, market = some_arguments(rng)
    account = Account(**{**vars(account), "record": Record(1e6, 1e6, 1.02e6, 1.03e6)})
    out = build_policy(block(PolicyParams, written, "policy")).decide(NOW, forecast, account, market)
    held, w, free = account.weights, out.weights, market.alive
    assert (w[free] * held[free] >= 0).all()
    assert (np.abs(w[free]) <= np.abs(held[free]) + 1e-12).all()
    assert action == "freeze" or (w[free] == 0).all()
    assert bool(out.halt) == (action == "halt")


@SLOW
@given(seed=st.integers(0, 10**9))
def test_after_an_exit_the_side_waits_for_the_signal(seed: int) -> None:
    """An account that trades at each close: whenever an exit closes a position, the same side is not wanted again before the signal has left it."""
    rng = np.random.default_rng(seed)
    policy = Policy([Direction(prob_threshold=0.05, allow_short=True), FixedWeight(weight=0.5), Reentry(), StopLoss(loss=0.02)], rebalance_bars=int(rng.integers(1, 3)))
    price, shares, cash, barred = 100.0, np.zeros(1), 1.0, np.zeros(1)
    memory = (np.full(1, np.nan), np.zeros(1), np.full(1, np.nan), np.full(1, np.nan))
    waiting, wanted = 0.0, np.zeros(1)
    for t in range(60):
        price *= np.exp(rng.normal(0, 0.015))
        close = np.array([price])
        quantity = wanted / price - shares if (wanted == 0).all() or (shares == 0).all() else np.zeros(1)
        *memory, _ = follow_bar(shares, quantity, close, close, *memory)
        shares, cash = shares + quantity, cash - float(quantity[0]) * price
        equity = cash + float(shares[0]) * price
        held = shares * price / equity
        prob = np.array([float(np.clip(0.5 + 0.2 * np.sin(t / 7) + rng.normal(0, 0.03), 0, 1))])
        side = float(np.sign(prob[0] - 0.5)) * (abs(prob[0] - 0.5) > 0.05)
        decides = t % policy.rebalance_bars == 0
        out = policy.decide(NOW, Forecast(prob, prob, prob), Account(held, equity, t, memory[0], memory[2], memory[3], barred), Market(np.ones(1, bool), np.full(1, 0.01), close))
        if decides and side != waiting:
            waiting = 0.0
        if "stop loss: closed" in out.reasons[0]:
            waiting = float(np.sign(held[0]))
        assert out.barred is not None
        assert out.barred[0] == waiting
        assert waiting == 0 or np.sign(out.weights[0]) != waiting
        barred, wanted = out.barred, (out.weights * equity if out.decided else shares * price)


@SLOW
@given(seed=st.integers(0, 10**9))
def test_results_and_memory_add_up_to_the_money(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, bars = 4, 30
    shares, cash, closed = np.zeros(n), 0.0, 0.0
    entry, booked, age, best = np.full(n, np.nan), np.zeros(n), np.full(n, np.nan), np.full(n, np.nan)
    seen: list[list[float]] = [[] for _ in range(n)]
    for _ in range(bars):
        alive = rng.random(n) < 0.8
        close = np.where(alive, rng.uniform(90, 110, n), np.nan)
        quantity = np.where(alive & (rng.random(n) < 0.5), rng.integers(-3, 4, n), 0).astype(float)
        price = rng.uniform(90, 110, n)
        old = shares
        entry, booked, age, best, results = follow_bar(shares, quantity, price, close, entry, booked, age, best)
        shares, cash = shares + quantity, cash - float((quantity * price).sum())
        closed += float(np.nansum(results))
        for i in range(n):
            if np.sign(shares[i]) != np.sign(old[i]):
                seen[i] = []
            if shares[i] and alive[i]:
                seen[i].append(close[i])
            if shares[i] and seen[i]:
                assert age[i] == len(seen[i]) - 1
                assert best[i] == (max if shares[i] > 0 else min)(seen[i])
            assert (shares[i] != 0) == np.isfinite(entry[i])
        open_gain = float(np.where(shares != 0, shares * (100 - np.nan_to_num(entry)), 0).sum())
        np.testing.assert_allclose(closed + booked.sum() + open_gain, cash + shares.sum() * 100, atol=1e-8)


def test_several_fills_in_one_bar_are_booked_in_order() -> None:
    first = book_fill(0.0, np.nan, 0.0, 10.0, 50.0)
    assert first == (10.0, 50.0, 0.0, True, pytest.approx(np.nan, nan_ok=True))
    stopped = book_fill(*first[:3], -10.0, 48.0)
    assert stopped[0] == 0.0
    assert stopped[4] == -20.0
    assert not stopped[3]


@SLOW
@given(seed=st.integers(0, 10**9), hours=st.sampled_from([1, 5, 24, 40]))
def test_periods_begin_where_the_calendar_says(seed: int, hours: int) -> None:
    rng = np.random.default_rng(seed)
    times = np.datetime64("2023-12-20T00:00", "us") + (np.cumsum(rng.integers(1, hours + 1, 80)) * 60).astype("timedelta64[m]")
    equity = 100 * np.cumprod(1 + rng.normal(0, 0.01, 80))
    record = open_record(float(equity[0]))
    inside = pd.DatetimeIndex(times - np.timedelta64(1, "us"))
    for t in range(1, 80):
        record = advance(record, times[t - 1], times[t], float(equity[t - 1]), float(equity[t]))
        for name, period in {"day": "D", "week": "W-SUN", "month": "M"}.items():
            earlier = np.flatnonzero(inside.to_period(period)[:t] < inside.to_period(period)[t])
            assert getattr(record, name) == equity[earlier[-1] if len(earlier) else 0]
        assert record.peak == equity[: t + 1].max()


def test_a_halt_lasts_until_it_is_released() -> None:
    policy = Policy([Direction(prob_threshold=0.0, allow_short=True), FixedWeight(weight=0.5), DrawdownStop(max_drawdown=0.1)], rebalance_bars=3)
    forecast, market = Forecast(*[np.full(2, 0.9)] * 3), Market(np.array([True, False]), np.full(2, 0.01))
    fallen = Record(90.0, 90.0, 100.0, 110.0)
    out = policy.decide(NOW, forecast, Account(np.array([0.5, 0.2]), 95.0, 1, record=fallen), market)  # between two decisions
    assert out.decided
    assert out.halt.startswith("drawdown of 13.6%")
    record = halt(fallen, out.halt)
    for bar in range(6):
        still = policy.decide(NOW, forecast, Account(np.array([0.0, 0.2]), 200.0, bar, record=record), market)
        assert still.weights.tolist() == [0.0, 0.2]
        assert "halted (drawdown" in still.reasons[0]
    again = policy.decide(NOW, forecast, Account(np.array([0.0, 0.2]), 95.0, 3, record=release(record, 95.0)), market)
    assert again.weights.tolist() == [0.5, 0.2]
    assert not again.halt


def test_the_block_in_params_yaml_is_a_policy() -> None:
    params = block(PolicyParams, load_params("multiasset")["policy"], "policy")
    steps = build_policy(params).steps
    assert [s.title() for s in steps] == [name for name, value in params.model_dump().items() if isinstance(value, dict)]
    assert isinstance(steps[0], Sizing)
    assert isinstance(steps[-1], Limit)
    with pytest.raises(ParameterError, match="did you mean `cap_gross`"):
        block(PolicyParams, {**params.model_dump(exclude_none=True), "cap_gros": {"max_gross": 1}}, "policy")
