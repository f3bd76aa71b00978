"""The decisions of the regime system: no limit is ever broken, nothing goes unsaid, no order of the facts matters, and the morning keeps what the night has promised."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mltrading.core.errors import ParameterError
from mltrading.core.params import block
from mltrading.systems.regime.checks import Quote, after_split, morning_checks
from mltrading.systems.regime.decisions import LAYERS, PANIC, TRIGGERS, Decision, decide, score_candidates, sells, size
from mltrading.systems.regime.facts import (
    BEHAVIOURS,
    BUCKETS,
    EXAMPLE,
    Asset,
    ByRegime,
    DecisionParams,
    Holding,
    Night,
    Review,
    search_space,
)
from mltrading.validation.search import with_values

PARAMS = block(DecisionParams, EXAMPLE, "decisions")
NAN = math.nan
TIME = pd.Timestamp("2014-03-13 02:00", tz="UTC")
CLASSES = tuple(PARAMS.compatibility)
SYMBOLS = tuple(f"S{k:02d}" for k in range(16))
SMALL = 1e-9  # of the equity


def maybe(rng: np.random.Generator, value: float, gap: float = 0.06) -> float:
    """A number that is sometimes not known."""
    return NAN if rng.random() < gap else float(value)


def some_block(rng: np.random.Generator) -> DecisionParams:
    """Parameters from everywhere in the space that a search may move through."""
    values = {name: int(rng.integers(d["low"], d["high"] + 1)) if d["kind"] == "int" else rng.uniform(d["low"], d["high"]) for name, d in search_space().items() if rng.random() < 0.3}
    return with_values(PARAMS, values)


def some_night(rng: np.random.Generator) -> Night:
    equity = float(rng.choice([3_000.0, 1e5, 1e5]))
    regime = str(rng.choice(["", *ByRegime.model_fields], p=[0.05, 0.35, 0.2, 0.15, 0.15, 0.1]))
    return Night(TIME, regime, maybe(rng, rng.choice([0.25, 0.8, 1.0]), 0.02), maybe(rng, rng.choice([0.4, 0.9, 1.0]), 0.02), maybe(rng, rng.random(), 0.02), equity, equity * rng.uniform(-0.05, 0.7))


def some_facts(rng: np.random.Generator) -> tuple[list[Asset], list[Holding], Night, Review, DecisionParams]:
    """A random night: funds halted or half known, positions in gain and in loss, some in funds of which nothing is known, an account that is sometimes full or in debt."""
    night, price = some_night(rng), {symbol: float(rng.uniform(5, 200)) for symbol in SYMBOLS}
    kind = {symbol: (str(rng.choice(CLASSES)), bool(rng.random() < 0.2)) for symbol in SYMBOLS}
    funds = [Asset(s, *kind[s], maybe(rng, price[s]), maybe(rng, rng.choice([0.0, 0.05, 0.15, 0.6], p=[0.05, 0.3, 0.4, 0.25])), maybe(rng, rng.beta(5, 1.5)), maybe(rng, np.round(rng.normal(), 1)),
                   maybe(rng, np.round(rng.normal(0, 0.1), 2)), str(rng.choice(BUCKETS)), str(rng.choice(BEHAVIOURS)), int(rng.choice([0, 1, 9], p=[0.9, 0.05, 0.05])))
             for s in rng.choice(SYMBOLS, rng.integers(0, 15), replace=False).tolist()]
    held = [Holding(s, *kind[s], night.equity * rng.uniform(0.01, 0.2) / price[s], maybe(rng, price[s] * rng.uniform(0.9, 1.05)), TIME - pd.Timedelta(days=20), maybe(rng, price[s] * rng.uniform(1, 1.1)), int(rng.integers(0, 14)))
            for s in rng.choice(SYMBOLS, int(rng.choice([0, 1, 4, 6, 8, 10])), replace=False).tolist()]
    some = [rng.choice(SYMBOLS, rng.integers(0, 4), replace=False).tolist() for _ in range(2)]
    return funds, held, night, Review({s: float(rng.uniform(0.05, 1)) for s in some[0]}, dict.fromkeys(some[1], "says somebody")), some_block(rng)


def some_morning(rng: np.random.Generator) -> tuple[Any, ...]:
    """What a random night has decided, and quotes that jump, stand still, are missing or old."""
    funds, held, night, review, params = some_facts(rng)
    intents, now = decide(funds, held, night, review, params).intents, TIME + pd.Timedelta(hours=int(rng.choice([12, 12, 12, 12, 60, 110])))
    last, quotes = {h.symbol: h.highest for h in held} | {a.symbol: a.price for a in funds}, {}
    for symbol in sorted({*intents["symbol"], *(h.symbol for h in held)}):
        if rng.random() > 0.1:
            quotes[symbol] = Quote(maybe(rng, last[symbol] * rng.choice([1.0, 0.99, 0.97, 1.02, 1.07, 0.9])), now - pd.Timedelta(minutes=int(rng.choice([0, 0, 0, 0, 5, 45]))))
    cash = night.cash - float(rng.choice([0.0, 0.02, 0.15])) * night.equity  # somebody may have drawn some
    return intents, quotes, held, cash, now, params


def seeded(make: Any) -> st.SearchStrategy[Any]:
    return st.integers(0, 2**32 - 1).map(lambda seed: make(np.random.default_rng(seed)))


facts, mornings = seeded(some_facts), seeded(some_morning)
MANY = settings(max_examples=40)


def test_the_random_nights_and_mornings_reach_everything() -> None:
    """Properties of what never happens would prove nothing."""
    logs = pd.concat([decide(*some_facts(np.random.default_rng(seed))).log for seed in range(150)])
    seen = set(zip(logs["step"], logs["outcome"], strict=True))
    assert seen >= {*((t, "sold") for t in TRIGGERS), *((t, "fired") for t in TRIGGERS[2:]), ("hold", "kept"), ("score", "refused"), ("veto", "refused"), ("night", "refused"), ("order", "bought"),
                    ("cap", "cut"), ("positions", "refused"), ("cash", "cut"), ("cash", "refused"), ("smallest order", "refused")}
    checks = pd.concat([morning_checks(*some_morning(np.random.default_rng(seed))) for seed in range(300)])
    said = "|".join(checks["reason"])
    assert all(words in said for words in ("no quote", "no quote since", "days old", "gap of", "cut from", "cash:", "this morning"))
    assert set(zip(checks["side"], checks["action"], strict=True)) == {("sell", "execute"), ("sell", "skip"), ("buy", "execute"), ("buy", "skip")}


def same(a: Decision, b: Decision) -> None:
    for name in ("intents", "candidates", "sizes", "log"):
        pd.testing.assert_frame_equal(getattr(a, name), getattr(b, name), check_exact=True)


@MANY
@given(facts)
def test_no_facts_break_a_limit(given_: Any) -> None:
    funds, held, night, review, params = given_
    out, known = decide(*given_), {a.symbol: a for a in funds}
    buys, sold = (out.intents[out.intents["side"] == side] for side in ("buy", "sell"))
    assert not out.intents["symbol"].duplicated().any()
    assert out.intents["side"].tolist() == ["sell"] * len(sold) + ["buy"] * len(buys)
    assert set(sold["symbol"]) <= {h.symbol for h in held}
    assert not set(buys["symbol"]) & ({h.symbol for h in held} | set(review.veto))
    sure = sold[np.array([known.get(s) is not None and known[s].days_since_bar == 0 and not math.isnan(known[s].price) for s in sold["symbol"]], bool)]
    if len(buys):
        assert night.blind == ""
        assert len(held) - len(sure) + len(buys) <= params.limits.max_positions
        assert night.cash + sure["dollars"].sum() - buys["dollars"].sum() >= params.limits.cash.at(night.regime) * night.equity - SMALL * night.equity
        assert buys["dollars"].min() >= params.limits.min_order - SMALL * night.equity
        assert buys["score"].is_monotonic_decreasing
    for row in buys.itertuples():
        asset = known[row.symbol]
        assert 0 < row.weight <= (params.limits.max_weight_leveraged if asset.leveraged else params.limits.max_weight)
        assert asset.days_since_bar == 0
        assert asset.volatility > 0
        assert asset.health >= params.buy.min_health
        assert row.score >= params.buy.min_score
        assert params.compatibility[asset.asset_class].at(night.regime) > 0
        assert np.isclose(row.dollars, row.shares * asset.price)
        assert np.isclose(row.dollars, row.weight * night.equity)


@MANY
@given(facts)
def test_everything_is_said(given_: Any) -> None:
    funds, held, _, _, _ = given_
    out = decide(*given_)
    assert set(out.log["symbol"]) == {a.symbol for a in funds} | {h.symbol for h in held}
    for table in (out.log, out.intents, out.sizes):
        assert (table["reason"].str.len() > 0).all()
    assert (out.candidates["passes"] == (out.candidates["reason"] == "")).all()
    final = out.log[out.log["outcome"].isin(["sold", "kept", "bought", "refused"])]
    assert not final["symbol"].duplicated().any()
    for outcome, side in (("sold", "sell"), ("bought", "buy")):
        assert sorted(final["symbol"][final["outcome"] == outcome]) == sorted(out.intents["symbol"][out.intents["side"] == side])


@MANY
@given(facts, st.randoms(use_true_random=False))
def test_the_order_of_the_facts_does_not_matter(given_: Any, random: Any) -> None:
    funds, held, night, review, params = given_
    funds_too, held_too = random.sample(funds, len(funds)), random.sample(held, len(held))
    turned = Review(dict(reversed(review.confidence.items())), dict(reversed(review.veto.items())))
    same(decide(*given_), decide(funds_too, held_too, night, turned, params))


@MANY
@given(facts, st.data())
def test_without_a_veto_no_purchase_is_lost_but_for_cash_or_positions(given_: Any, data: st.DataObject) -> None:
    funds, held, night, review, params = given_
    assume(review.veto)
    freed = data.draw(st.sampled_from(sorted(review.veto)))
    before, after = decide(*given_), decide(funds, held, night, Review(review.confidence, {s: why for s, why in review.veto.items() if s != freed}), params)
    lost = set(before.intents.query("side == 'buy'")["symbol"]) - set(after.intents.query("side == 'buy'")["symbol"])
    for symbol in lost:
        assert set(after.log["step"][after.log["symbol"] == symbol]) & {"cash", "positions"}


@MANY
@given(facts)
def test_layers_multiply_to_the_weight_before_the_limits(given_: Any) -> None:
    _, _, _, _, params = given_
    out = decide(*given_)
    for _, steps in out.sizes.groupby("symbol"):
        assert steps["layer"].tolist()[: len(LAYERS)] == list(LAYERS)
        assert np.allclose(steps["factor"].cumprod(), steps["weight"], atol=1e-15)
        assert (steps["factor"].iloc[2:] <= 1 + 1e-12).all()
        assert steps["weight"].iloc[len(LAYERS) - 1] <= params.size.base_weight * params.size.vol_high + 1e-12
    ends = out.sizes.groupby("symbol")["weight"].last()
    buys = out.intents[out.intents["side"] == "buy"].set_index("symbol")["weight"]
    pd.testing.assert_series_equal(ends[ends > 0], buys.sort_index(), check_exact=True, check_names=False)


@MANY
@given(facts)
def test_more_caution_never_makes_a_size_larger(given_: Any) -> None:
    funds, _, night, review, params = given_
    assume(not night.blind)
    for asset in funds:
        if asset.volatility > 0:
            now = size(asset, night, review, params)[-1].weight
            for less in ({"throttle": night.throttle / 2}, {"size_modifier": night.size_modifier / 2}, {"disagreement": (1 + night.disagreement) / 2}):
                assert size(asset, replace(night, **less), review, params)[-1].weight <= now
            assert size(replace(asset, volatility=2 * asset.volatility), night, review, params)[-1].weight <= now
            for bucket in BUCKETS:
                assert size(replace(asset, bucket=bucket), night, review, params)[-1].weight <= size(replace(asset, bucket=""), night, review, params)[-1].weight
            by_regime = [size(asset, replace(night, regime=regime), review, params)[-1].weight for regime in ByRegime.model_fields]
            assert by_regime == sorted(by_regime, reverse=True)  # from the calmest to the most defensive


@MANY
@given(facts)
def test_sales_know_their_numbers(given_: Any) -> None:
    funds, held, night, review, params = given_
    found, known = sells(held, funds, night, review, params), {a.symbol: a for a in funds}
    assert (found.groupby("symbol")["first"].sum() == 1).all()
    numbers = found[found["trigger"].isin(["trailing_stop", "health", "leveraged_age"])]
    assert numbers[["observed", "threshold"]].notna().all().all()
    for holding in held:
        fired = set(found["trigger"][found["symbol"] == holding.symbol])
        asset = known.get(holding.symbol)
        seen = asset is not None and asset.days_since_bar == 0 and not math.isnan(asset.price)
        stop = params.sell.trailing_stop_leveraged if holding.leveraged else params.sell.trailing_stop
        assert ("trailing_stop" in fired) == bool(seen and asset.price <= holding.highest * (1 - stop))
        assert ("health" in fired) == bool(seen and asset.health < params.sell.min_health)
        assert ("panic" in fired) == (night.regime == PANIC and holding.asset_class not in params.sell.keep_in_panic)
        assert ("veto" in fired) == (holding.symbol in review.veto)
        assert ("leveraged_age" in fired) == (holding.leveraged and holding.bars >= params.sell.leveraged_bars)


@MANY
@given(facts)
def test_a_score_does_not_depend_on_units(given_: Any) -> None:
    funds, _, night, _, _ = given_
    scaled = [replace(a, trend=8 * a.trend, strength=0.25 * a.strength) for a in funds]
    pd.testing.assert_frame_equal(score_candidates(funds, night, PARAMS), score_candidates(scaled, night, PARAMS), check_exact=True)


@MANY
@given(mornings, st.randoms(use_true_random=False))
def test_the_morning_keeps_what_the_night_has_promised(morning: Any, random: Any) -> None:
    intents, quotes, held, cash, now, params = morning
    out = morning_checks(*morning)
    done = out[out["action"] == "execute"]
    sold, bought = (done[done["side"] == side] for side in ("sell", "buy"))
    assert not done["symbol"].duplicated().any()
    assert (out["reason"].str.len() > 0).all()
    assert done[["dollars", "shares", "price"]].notna().all().all()
    assert set(sold["symbol"]) <= {h.symbol for h in held}
    if len(bought):
        assert len(held) - len(sold) + len(bought) <= params.limits.max_positions
        reserve = intents["reserve"].max()
        assert cash + sold["dollars"].sum() - bought["dollars"].sum() >= reserve - 1e-6
        assert reserve >= 0
    asked = out[out["created"] < now]
    assert sorted(zip(asked["symbol"], asked["side"], strict=True)) == sorted(zip(intents["symbol"], intents["side"], strict=True))
    night = intents.set_index("symbol")
    for row in bought.itertuples():
        assert row.dollars <= night.loc[row.symbol, "dollars"]
        assert abs(row.price / night.loc[row.symbol, "price"] - 1) <= params.morning.max_gap + 1e-12
    for holding in held:  # what is through its stop and quoted is sold, whatever else
        quote = quotes.get(holding.symbol)
        if quote is not None and quote.time >= now - pd.Timedelta(minutes=30) and quote.price <= holding.highest * (1 - params.sell.stop_of(holding)):
            assert holding.symbol in set(sold["symbol"])
    order = random.sample(range(len(intents)), len(intents))
    again = morning_checks(intents.iloc[order], dict(reversed(quotes.items())), random.sample(held, len(held)), cash, now, params)
    pd.testing.assert_frame_equal(again, out, check_exact=True)


@MANY
@given(mornings)
def test_a_morning_that_is_repeated_does_nothing_new(morning: Any) -> None:
    intents, quotes, held, cash, now, params = morning
    done = morning_checks(*morning).query("action == 'execute'")
    sold, bought = (done[done["side"] == side] for side in ("sell", "buy"))
    left = [h for h in held if h.symbol not in set(sold["symbol"])]
    new = [Holding(r.symbol, "equity", False, r.shares, r.price, now, r.price, 0) for r in bought.itertuples()]
    again = morning_checks(intents, quotes, [*left, *new], cash + sold["dollars"].sum() - bought["dollars"].sum(), now, params)
    assert not set(again.query("action == 'execute'")["symbol"]) & set(done["symbol"])
    assert (again.query("side == 'sell'")["action"] == "skip").all()


@MANY
@given(mornings, st.sampled_from([0.5, 2.0, 4.0]))
def test_a_split_overnight_changes_shares_and_nothing_else(morning: Any, factor: float) -> None:
    intents, quotes, held, cash, now, params = morning
    split = {symbol: replace(q, price=q.price / factor, split=factor) for symbol, q in quotes.items()}
    before, after = morning_checks(*morning), morning_checks(intents, split, [after_split(h, factor) for h in held], cash, now, params)
    pd.testing.assert_frame_equal(before[["symbol", "side", "action", "dollars"]], after[["symbol", "side", "action", "dollars"]], check_exact=True)  # powers of two: to the bit
    np.testing.assert_array_equal(before["shares"] * factor, after["shares"])


def test_tables_survive_the_disk(tmp_path: Any) -> None:
    """Intents and checks read back from Parquet are those that were written, a day without any included."""
    night = Night(TIME, "calm_uptrend", 1.0, 1.0, 0.0, 100_000, 100_000)
    funds = [Asset("SPY", "equity", False, 187.0, 0.12, 0.9, 0.5, 0.0), Asset("TLT", "bonds", False, 104.0, 0.1, 0.9, 0.4, -0.01)]
    for name, chosen in (("some", funds), ("none", [])):
        intents = decide(chosen, [], night, Review(), PARAMS).intents
        intents.to_parquet(tmp_path / f"{name}.parquet")
        back = pd.read_parquet(tmp_path / f"{name}.parquet")
        pd.testing.assert_frame_equal(back, intents, check_exact=True)
        quotes = {"SPY": Quote(188.0, TIME), "TLT": Quote(104.0, TIME)}
        pd.testing.assert_frame_equal(morning_checks(back, quotes, [], 100_000, TIME, PARAMS), morning_checks(intents, quotes, [], 100_000, TIME, PARAMS), check_exact=True)


@pytest.mark.parametrize(("zone", "friday", "clocks"), [("America/New_York", "2014-03-07", "forward"), ("America/New_York", "2014-10-31", "back"), ("America/New_York", "2014-06-06", "as they were"), ("Asia/Tokyo", "2014-06-06", "as they were")])
def test_an_intent_of_friday_is_good_on_monday_and_stale_after_a_holiday(zone: str, friday: str, clocks: str) -> None:
    """Whatever the hour of the morning, and whatever the clocks did in between."""
    close = pd.Timestamp(f"{friday} 16:00" if zone.startswith("America") else f"{friday} 15:00", tz=zone).tz_convert("UTC")
    intents = decide([Asset("SPY", "equity", False, 187.0, 0.12, 0.9, 0.5, 0.0)], [], Night(close, "calm_uptrend", 1.0, 1.0, 0.0, 100_000, 100_000), Review(), PARAMS).intents
    done = {}
    for days in range(6):
        for time in ("00:00", "09:30", "13:30", "14:30", "20:00", "21:30", "23:59"):
            now = close.normalize() + pd.Timedelta(days=days) + pd.Timedelta(time + ":00")
            if now >= close:
                row = morning_checks(intents, {"SPY": Quote(187.0, now)}, [], 100_000, now, PARAMS).iloc[0]
                done.setdefault(days, set()).add(row["action"])
                assert row["action"] == "execute" or row["reason"] == f"{days} days old; at most 3", clocks
    assert done == {0: {"execute"}, 1: {"execute"}, 2: {"execute"}, 3: {"execute"}, 4: {"skip"}, 5: {"skip"}}


@pytest.mark.parametrize("worse", [1, 2, 3, 4])
def test_a_warning_must_not_enlarge_positions(worse: int) -> None:
    """Sizes that grow towards the more defensive regimes are refused, equal ones are not."""
    names = list(ByRegime.model_fields)
    rising = EXAMPLE | {"size": EXAMPLE["size"] | {"regime": {name: 0.6 if k == worse else 0.5 for k, name in enumerate(names)}}}
    with pytest.raises(ParameterError, match=rf"decisions.size.regime.{names[worse]}: is 0.6, above the 0.5 of the calmer {names[worse - 1]}"):
        block(DecisionParams, rising, "decisions")
    block(DecisionParams, EXAMPLE | {"size": EXAMPLE["size"] | {"regime": dict.fromkeys(names, 0.5)}}, "decisions")


@pytest.mark.parametrize("missing", ["price", "volatility", "health", "trend", "strength"])
def test_a_fund_of_which_something_is_not_known_is_not_bought(missing: str) -> None:
    night = Night(TIME, "calm_uptrend", 1.0, 1.0, 0.0, 100_000, 100_000)
    whole = Asset("SPY", "equity", False, 187.0, 0.12, 0.9, 0.5, 0.0, behaviour="mixed")
    assert decide([whole], [], night, Review(), PARAMS).intents["symbol"].tolist() == ["SPY"]
    out = decide([replace(whole, **{missing: NAN})], [], night, Review(), PARAMS)
    assert out.intents.empty
    assert out.log["reason"].tolist() == [f"{missing} is not known"]
    unused = with_values(PARAMS, {"score.trend": 0.0, "score.strength": 0.0})
    assert decide([replace(whole, **{missing: NAN})], [], night, Review(), unused).intents.empty == (missing not in ("trend", "strength"))
