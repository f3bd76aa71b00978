"""What holds of a fusion, whatever the networks and the experts say."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mltrading.core.errors import DataError, ParameterError
from mltrading.systems.regime.experts import UNAVAILABLE, FragilityParams, fragility_cap
from mltrading.systems.regime.fusion import (
    Fused,
    FusionParams,
    Reading,
    Readings,
    disagreement,
    fuse,
    fuse_history,
    readings_at,
)

REGIMES = ("calm_uptrend", "risk_on_trend", "choppy", "risk_off_trend", "high_vol_panic")
OFF = FusionParams(override=False, calm_floor=None, macro=False, fragility=False, entropy=False, throttle_from=0.7, throttle_strength=0.0, disagreement_strength=0.0, least_size=0.25)
ON = FusionParams(override=True, calm_floor="choppy", macro=True, fragility=True, entropy=True, throttle_from=0.7, throttle_strength=0.5, disagreement_strength=1.0, least_size=0.25)
EIGHT = FragilityParams(symbols=list("abcdefgh"), window_bars=60, least_bars=45, normal=0.5, max_age_days=5)

unit = st.floats(0, 1)
five = st.lists(st.floats(1e-3, 1), min_size=5, max_size=5).map(lambda w: np.array(w) / np.sum(w))
corners = st.integers(0, 4).map(lambda k: np.eye(5)[k])
models = st.dictionaries(st.sampled_from(["gru", "transformer", "hmm"]), st.one_of(five, corners), min_size=1)
absent = st.just(Reading(UNAVAILABLE, np.nan, 1.0, "nothing is known"))


def reading(states: list[str], score: st.SearchStrategy[float] = unit, cap: st.SearchStrategy[float] | None = None) -> st.SearchStrategy[Reading]:
    return st.one_of(st.builds(Reading, st.sampled_from(states), score, st.just(1.0) if cap is None else cap), absent)


caps = st.floats(0.01, 1)
readings = st.builds(Readings, reading(["downgrade", "upgrade", "keep"], st.floats(-1, 1)), reading(["panic", "unstable_calm", "normal"]), reading(["fragile", "diverse"], cap=caps),
                     reading(["compressing", "dispersing", "stable"], st.floats(-5, 5), caps))
params = st.builds(FusionParams, override=st.booleans(), calm_floor=st.sampled_from([None, *REGIMES]), macro=st.booleans(), fragility=st.booleans(), entropy=st.booleans(),
                   throttle_from=st.floats(0, 0.99), throttle_strength=st.floats(0, 0.99), disagreement_strength=unit, least_size=st.floats(0.25, 1))


def level(regime: str) -> int:
    return REGIMES.index(regime)


@given(models, readings, params)
def test_bounds_and_records(probabilities, given_readings, p) -> None:
    got = fuse(probabilities, given_readings, p)
    assert p.least_size <= got.size_modifier <= 1
    assert 0 < got.throttle <= 1
    assert 0 <= got.disagreement <= 1
    assert [s.name for s in got.steps] == ["models", "override", "macro", "fragility", "entropy", "stress", "disagreement"]
    last = got.steps[-1]
    assert (last.regime, last.size_modifier, last.throttle) == (got.regime, got.size_modifier, got.throttle)
    for before, after in zip(got.steps, got.steps[1:], strict=False):
        same = (before.regime, before.size_modifier, before.throttle) == (after.regime, after.size_modifier, after.throttle)
        assert (after.did == "nothing") == same
        assert after.saw
        assert after.why
        moved = abs(level(after.regime) - level(before.regime))
        assert moved == 0 or after.name == "override" or (after.name == "macro" and moved == 1)
        assert after.size_modifier <= before.size_modifier
        assert after.throttle <= before.throttle


@given(models, readings)
def test_all_off_is_the_mean_of_the_models(probabilities, given_readings) -> None:
    got = fuse(probabilities, given_readings, OFF)
    mean = np.mean([probabilities[n] for n in sorted(probabilities)], axis=0)
    assert mean[level(got.regime)] == mean.max()
    assert (got.size_modifier, got.throttle) == (1.0, 1.0)
    assert {s.did for s in got.steps[1:]} == {"nothing"}


@given(models, readings, params, unit, unit)
def test_more_fragility_never_increases_size(probabilities, r, p, a, b) -> None:
    def size(score: float) -> float:
        cap = float(fragility_cap(np.array([score]), EIGHT)[0])
        return fuse(probabilities, Readings(r.macro_credit, r.volatility_complexity, Reading("fragile", score, cap), r.entropy_shift), p).size_modifier
    assert size(max(a, b)) <= size(min(a, b))


@given(models, readings, params, unit, unit)
def test_more_stress_never_raises_the_throttle(probabilities, r, p, a, b) -> None:
    def throttle(score: float) -> float:
        return fuse(probabilities, Readings(r.macro_credit, Reading("normal", score), r.fragility, r.entropy_shift), p).throttle
    assert throttle(max(a, b)) <= throttle(min(a, b))


@given(five, five, readings, unit)
def test_models_that_are_farther_apart_never_increase_size(a, b, r, part) -> None:
    def size(share: float) -> float:
        return fuse({"a": a, "b": (1 - share) * a + share * b}, r, ON).size_modifier
    assert size(1.0) <= size(part) + 1e-12


@given(models, readings)
def test_a_panic_is_final(probabilities, r) -> None:
    got = fuse(probabilities, Readings(r.macro_credit, Reading("panic", 0.9), r.fragility, r.entropy_shift), ON)
    assert (got.regime, got.size_modifier) == ("high_vol_panic", 0.25)


@given(models, readings, params)
def test_unstable_calm_sets_a_floor_that_nothing_undercuts(probabilities, r, p) -> None:
    got = fuse(probabilities, Readings(r.macro_credit, Reading("unstable_calm", 0.5), r.fragility, r.entropy_shift), p)
    assert p.calm_floor is None or level(got.regime) >= level(p.calm_floor)


@given(five, five, five)
def test_disagreement_is_a_distance(a, b, c) -> None:
    def d(x, y) -> float:
        return disagreement({"x": x, "y": y})
    assert d(a, a) == 0
    assert d(a, b) == d(b, a)
    assert d(a, c) <= d(a, b) + d(b, c) + 1e-12
    best = max(sum((a - b)[k] for k in range(5) if bits >> k & 1) for bits in range(32))  # the largest difference over all sets of regimes
    np.testing.assert_allclose(d(a, b), best, atol=1e-12)


def some_days(n: int, seed: int) -> tuple[dict[str, pd.DataFrame], dict[str, pd.DataFrame]]:
    rng = np.random.default_rng(seed)
    index = pd.bdate_range("2020-01-01", periods=n, tz="UTC").as_unit("us")

    def said(states: list[str], cap: bool) -> pd.DataFrame:
        table = pd.DataFrame({"score": rng.random(n), "state": rng.choice([*states, UNAVAILABLE], n), "reason": ""}, index=index)
        table.loc[table["state"] == UNAVAILABLE, ["score", "reason"]] = [np.nan, "nothing is known"]
        return table.assign(cap=np.where(table["state"] == UNAVAILABLE, 1.0, rng.uniform(0.3, 1, n))) if cap else table

    signals = {"macro_credit": said(["downgrade", "upgrade", "keep"], False), "volatility_complexity": said(["panic", "unstable_calm", "normal"], False),
               "fragility": said(["fragile"], True), "entropy_shift": said(["compressing", "stable"], True)}
    tables = {name: pd.DataFrame(rng.dirichlet(np.ones(5), n), index=index, columns=list(REGIMES)) for name in ("gru", "transformer")}
    tables["gru"].iloc[:4] = np.nan
    tables["transformer"].iloc[:2] = np.nan
    return tables, signals


@settings(max_examples=10)
@given(st.integers(0, 1000), params)
def test_a_history_is_its_nights(seed, p) -> None:
    tables, signals = some_days(12, seed)
    history = fuse_history(tables, signals, p)
    assert history["regime"].isna().tolist() == [True] * 2 + [False] * 10
    for t in history.index[2:]:
        night: Fused = fuse({n: m.loc[t].to_numpy() for n, m in tables.items()}, readings_at(signals, t), p)
        row = history.loc[t]
        assert (row["regime"], row["size_modifier"], row["throttle"], row["disagreement"]) == (night.regime, night.size_modifier, night.throttle, night.disagreement)
    cut = fuse_history({n: m.iloc[:7] for n, m in tables.items()}, {n: s.iloc[:7] for n, s in signals.items()}, p)
    pd.testing.assert_frame_equal(cut, history.iloc[:7], check_exact=True)


def test_signals_that_are_missing_do_nothing() -> None:
    tables, signals = some_days(12, 0)
    bare = fuse_history(tables, {}, ON.model_copy(update={"disagreement_strength": 0.0}))
    assert bare["regime"].dropna().tolist() == bare["models"].dropna().tolist()
    assert set(bare["size_modifier"].dropna()) == {1.0}
    late = readings_at(signals, pd.Timestamp("2030-01-01", tz="UTC"))
    assert late.fragility == Reading(UNAVAILABLE, late.fragility.score, 1.0, "fragility has no row at this instant")


def test_what_makes_no_sense_is_refused() -> None:
    tables, signals = some_days(12, 0)
    with pytest.raises(ParameterError, match="did you mean `fragility`"):
        fuse_history(tables, {"fragillity": signals["fragility"]}, ON)
    with pytest.raises(DataError, match="other instants"):
        fuse_history({"gru": tables["gru"], "transformer": tables["transformer"].iloc[1:]}, signals, ON)
    with pytest.raises(DataError, match="no column choppy"):
        fuse_history({"gru": tables["gru"].drop(columns="choppy")}, signals, ON)
    with pytest.raises(DataError, match="no models"):
        fuse_history({}, signals, ON)
    with pytest.raises(DataError, match="two rows at one instant"):
        fuse_history(tables, {"fragility": pd.concat([signals["fragility"]] * 2)}, ON)
    with pytest.raises(DataError, match="a cap is above 0"):
        fuse_history(tables, {"fragility": signals["fragility"].assign(cap=1.5)}, ON)
