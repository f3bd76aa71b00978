"""Ensembles and what surrounds them: brute force beside the fast way, futures that are changed, folders that are damaged."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import expit, logit

from mltrading.core.errors import DataError, LeakError, ParameterError
from mltrading.models import zoo
from mltrading.models.calibration import Calibrated, CalibratedParams, fit_sigmoid, fit_venn_abers, venn_abers
from mltrading.models.composite import Horizons, HorizonsParams, fit_inner
from mltrading.models.conformal import adaptive_intervals, conformal_margin, coverage, nonconformity
from mltrading.models.conformance import check_forecaster, planted
from mltrading.models.diversity import ambiguity, effective_members, pairs, similarity
from mltrading.models.ensemble import Ensemble, EnsembleParams, fit_stack, forward_splits
from mltrading.models.explain import Unseen, permutation_importance, sampled_contributions
from mltrading.models.outcomes import check_no_look_ahead, side_by_side, usable_from, utc, with_outcomes
from mltrading.models.weighting import confident, hedge_weights, pooled, recent_weights, regime_weights
from mltrading.models.windows import as_windows

few = settings(max_examples=10, deadline=None)
LOGISTIC: dict[str, Any] = {"kind": "logistic", "l2": 1e-3, "winsor": 0.005, "missing_indicators": True, "max_iter": 500}
TREES: dict[str, Any] = {"kind": "xgboost", "n_estimators": 10, "max_depth": 2, "learning_rate": 0.3, "subsample": 0.8, "colsample_bytree": 0.8, "min_child_weight": 5, "reg_lambda": 1, "max_bin": 64,
                         "early_stopping_rounds": 0, "inner_valid_fraction": 0.2}


@pytest.fixture(autouse=True)
def kinds(monkeypatch):
    for kind, place in {"calibrated": "calibration:Calibrated", "horizons": "composite:Horizons", "ensemble": "ensemble:Ensemble"}.items():
        monkeypatch.setitem(zoo.KINDS, kind, place)


# ------------------------------------------------------------------ maps


def isotonic_at(s, scores, labels, w):
    """The isotonic fit at s, by its definition: the largest over beginnings of the smallest over ends of the mean between."""
    at = np.unique(scores)
    total, rises = (np.array([v[scores == a].sum() for a in at]) for v in (w, w * labels))
    g = int(np.searchsorted(at, s))
    return max(min(rises[a : b + 1].sum() / total[a : b + 1].sum() for b in range(g, len(at))) for a in range(g + 1))


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(2, 12), digits=st.integers(0, 2), weighted=st.booleans())
def test_venn_abers_is_two_isotonic_fits(seed, n, digits, weighted):
    r = np.random.default_rng(seed)
    scores, up, w = r.standard_normal(n).round(digits), r.random(n) < r.random(), r.uniform(0.3, 2, n) if weighted else np.ones(n)
    new = np.unique(np.concatenate([scores, scores + 0.003, [-9.0, 9.0]]))
    p0, p1, p = venn_abers(new, fit_venn_abers(scores, up, w))
    for label, mine in ((0, p0), (1, p1)):
        literal = [isotonic_at(s, np.append(scores, s), np.append(up, label), np.append(w, 1.0)) for s in new]
        np.testing.assert_allclose(mine, literal, atol=1e-9)
    assert (p0 <= p).all()
    assert (p <= p1).all()
    assert all((np.diff(v) >= 0).all() for v in (p0, p1))
    assert ((p > 0) & (p < 1)).all()


@few
@given(seed=st.integers(0, 10**6), n=st.integers(5, 100), scale=st.sampled_from([1e-3, 1.0, 30.0]), shift=st.floats(-5, 5))
def test_the_sigmoid_is_the_best_line(seed, n, scale, shift):
    r = np.random.default_rng(seed)
    s, w = r.standard_normal(n), r.uniform(0.5, 1.5, n)
    up = r.random(n) < expit(s)
    up[:2] = True, False
    a, b = fit_sigmoid(s, up, w)
    rises, falls = w[up].sum(), w[~up].sum()
    target = np.where(up, (rises + 1) / (rises + 2), 1 / (falls + 2))
    best = minimize(lambda v: float((w * (np.logaddexp(0, v[0] * s + v[1]) - target * (v[0] * s + v[1]))).sum()), [0, 0], bounds=[(0, None), (None, None)], tol=1e-12)
    assert (a, b) == pytest.approx(best.x, abs=2e-3)
    c, e = fit_sigmoid(scale * s + shift, up, w)  # the same line, whatever the unit of the scores
    assert c * scale == pytest.approx(a, abs=1e-6)
    assert e + c * shift == pytest.approx(b, abs=1e-6)


def test_a_model_fixed_on_the_earlier_part_and_a_map_from_the_later():
    d = planted(1200, 3)
    params = CalibratedParams(of=LOGISTIC, method="isotonic", fraction=0.25)
    model = Calibrated(params, seed=0, purge_bars=5).fit(d.X, d.y, d.weight, d.times)
    alone = zoo.build("logistic", LOGISTIC, seed=0, purge_bars=5).fit(d.X[:850], d.y[:850], d.weight[:850], d.times[:850])  # 120 instants: 30 for the map, 5 between
    assert model.inner["of"].predict(d.X).equals(alone.predict(d.X))
    changed = np.where(np.arange(1200) >= 900, -d.y, d.y)
    other = Calibrated(params, seed=0, purge_bars=5).fit(d.X, changed, d.weight, d.times)
    assert other.inner["of"].predict(d.X).equals(alone.predict(d.X))
    assert not other.predict(d.X).equals(model.predict(d.X))
    assert (other.predict(d.X)["prob_up"].nunique(), other.predict(d.X)["prob_up"].max() - other.predict(d.X)["prob_up"].min() < 0.5)[1]  # not turned round


# ------------------------------------------------------------------ intervals


@few
@given(scores=st.lists(st.floats(-5, 5), min_size=1, max_size=40), level=st.floats(0, 1))
def test_the_margin_is_an_order_statistic(scores, level):
    values, n = np.array(scores), len(scores)
    margin = conformal_margin(values, level)
    inside = float((values <= margin).mean())
    if np.isfinite(margin):
        assert margin in values
        assert inside >= level - 1e-9
    else:
        assert margin < 0 if level < 1e-9 else level > n / (n + 1) - 1e-9


def test_every_rank_is_as_likely_so_the_promise_is_exact():
    values = np.random.default_rng(0).standard_normal(20)  # leave each out once: all orders of an exchangeable set
    for level in (0.5, 0.75, 0.9):
        inside = [values[i] <= conformal_margin(np.delete(values, i), level) for i in range(20)]
        assert level <= np.mean(inside) <= level + 1 / 20


def table(seed, days=60, symbols=4, models=3, latest=8):
    """Forecasts of several models, and outcomes that come late and out of order, some never."""
    r = np.random.default_rng(seed)
    day = pd.date_range("2024-01-01 21:00", periods=days + latest + 1, tz="UTC", unit="us")
    t, s = np.divmod(np.arange(days * symbols), symbols)
    keys = pd.DataFrame({"timestamp": day[t], "symbol": [f"S{k}" for k in s]})[r.random(days * symbols) < 0.9].reset_index(drop=True)
    n, at = len(keys), ((keys["timestamp"] - day[0]).dt.days).to_numpy()
    own = [keys.assign(horizon_bars=5, score=r.normal(0, 0.01, n), prob_up=r.uniform(0.2, 0.8, n), sigma=r.uniform(0.01, 0.03, n), fold=0, model=f"m{m}") for m in range(models)]
    outcomes = keys.assign(end=day[at + r.integers(0, latest + 1, n)], ret=r.normal(0, 0.02, n)).sample(frac=0.95, random_state=seed)
    return pd.concat(own, ignore_index=True), outcomes, pd.Series(r.choice(["a", "b", None], len(day)), day)


@pytest.mark.parametrize("seed", range(3))
def test_adaptive_intervals_the_slow_way(seed):
    forecasts, outcomes, _ = table(seed, models=1)
    got = adaptive_intervals(forecasts, outcomes, level=0.8, rate=0.05, memory=10)
    rows = with_outcomes(forecasts, outcomes).sort_values(["timestamp", "symbol"], ignore_index=True)
    alpha, days = 0.2, sorted(rows["timestamp"].unique())
    issued: dict[int, float] = {}
    for k, day in enumerate(days):
        known = rows[rows["end"] < day]
        arrival = np.array([next(i for i, d in enumerate(days) if d > end) for end in known["end"]], int)
        new = [i for i, a in zip(known.index, arrival, strict=True) if a == k]
        if new:
            missed = [abs(rows["ret"][i] - rows["score"][i]) > issued[i] * rows["sigma"][i] for i in new]
            alpha += 0.05 * (0.2 - np.mean(missed))
        recent = sorted(abs(rows["ret"][i] - rows["score"][i]) / rows["sigma"][i] for i, a in zip(known.index, arrival, strict=True) if a > k - 10)
        rank = int(np.ceil((len(recent) + 1) * (1 - alpha) - 1e-9))
        margin = recent[rank - 1] if 1 <= rank <= len(recent) else (0.0 if rank < 1 else np.inf)
        issued |= {i: max(0.0, margin) for i in rows.index[rows["timestamp"] == day]}
    half = pd.Series(issued) * rows["sigma"]
    np.testing.assert_allclose(got["high"], rows["score"] + half, rtol=1e-9)
    np.testing.assert_allclose(got["low"], rows["score"] - half, rtol=1e-9)


@few
@given(seed=st.integers(0, 10**6), late=st.integers(0, 6), rate=st.floats(0.02, 0.2), level=st.floats(0.5, 0.95))
def test_the_bound_on_misses_holds_for_late_outcomes(seed, late, rate, level):
    r, T = np.random.default_rng(seed), 120
    day = pd.date_range("2024-01-01", periods=T + late + 1, tz="UTC", unit="us")
    keys = pd.DataFrame({"timestamp": day[:T], "symbol": "A"})
    forecasts = keys.assign(horizon_bars=1, score=0.0, prob_up=0.5, sigma=1.0, fold=0)
    outcomes = keys.assign(end=day[late : T + late] + pd.Timedelta("1h"), ret=np.exp(r.normal(0, 1, T).cumsum()))
    missed = 1 - coverage(adaptive_intervals(forecasts, outcomes, level, rate, 30), outcomes)["inside"].to_numpy()[: T - 1 - late]  # those that came back
    assert abs(missed.mean() - (1 - level)) <= (max(level, 1 - level) + rate * (1 + late)) / (rate * len(missed)) + 1e-9


# ------------------------------------------------------------------ weights


def slowly(members, t, loss, half_life, kept) -> tuple[np.ndarray, float]:
    """Discounted losses known before instant t, row by row."""
    total, weight = np.zeros(len(members.models)), 0.0
    at, per_instant, usable = members.at, np.bincount(members.at), usable_from(members.rows["end"], members.instants)
    for i in np.flatnonzero(members.known & kept):
        if usable[i] <= t:
            share = 0.5 ** ((t - usable[i]) / half_life) / per_instant[at[i]]
            p = members.prob[i] if members.up[i] else 1 - members.prob[i]
            total, weight = total + share * ((1 - p) ** 2 if loss == "brier" else -np.log(p)), weight + share
    return total, weight


@pytest.mark.parametrize("seed", range(2))
def test_weights_the_slow_way(seed):
    forecasts, outcomes, regime = table(seed, days=20, symbols=3)
    m = side_by_side(forecasts, outcomes)
    hedge, recent, by = hedge_weights(m, 2.0, 7), recent_weights(m, 30, 7), regime_weights(m, regime, 30, 7, 3.0)
    label = regime.to_numpy()[: len(m.instants)]
    for t in range(len(m.instants)):
        everything = np.ones(len(m.at), bool)
        brier, _ = slowly(m, t, "brier", 7, everything)
        total, weight = slowly(m, t, "log", 7, everything)
        mean = total / weight if weight else total
        mine = mean
        if isinstance(label[t], str):
            own, n = slowly(m, t, "log", 7, label[m.at] == label[t])
            mine = (own + 3.0 * mean) / (n + 3.0)
        for got, exponent in ((hedge, -2.0 * brier), (recent, -30 * mean), (by, -30 * mine)):
            w = np.exp(exponent - exponent.max())
            np.testing.assert_allclose(got.iloc[t], w / w.sum(), atol=1e-9)


@settings(max_examples=2, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_no_weight_or_interval_moves_when_the_future_does(seed):
    forecasts, outcomes, regime = table(seed, days=30)
    one = forecasts[forecasts["model"] == "m0"]
    makers = [lambda m: hedge_weights(m, 2.0, 9), lambda m: recent_weights(m, 50, 9), lambda m: regime_weights(m, regime, 50, 9, 2.0)]
    for make in makers:
        assert check_no_look_ahead(lambda o, make=make: pooled(m := side_by_side(forecasts, o), make(m), "pool"), outcomes, seed, cuts=2) > 0
    assert check_no_look_ahead(lambda o: adaptive_intervals(one, o, 0.8, 0.1, 10), outcomes, seed, cuts=2) > 0


@pytest.mark.parametrize(("table", "column"), [("forecasts", "timestamp"), ("outcomes", "timestamp"), ("outcomes", "end")])
@pytest.mark.parametrize("as_text", [False, True])
def test_instants_without_a_zone_are_refused(table, column, as_text):
    at = pd.date_range("2024-01-01 21:00", periods=4, tz="UTC", unit="us")
    given = {"forecasts": pd.DataFrame({"timestamp": at[:3], "symbol": "A", "horizon_bars": 1, "score": 0.0, "prob_up": 0.5, "sigma": 1.0, "fold": 0}),
             "outcomes": pd.DataFrame({"timestamp": at[:3], "symbol": "A", "end": at[1:], "ret": 0.1})}
    assert with_outcomes(**given)["ret"].notna().all()
    bad = given[table][column]
    given[table] = given[table].assign(**{column: bad.astype(str) if as_text else bad.dt.tz_localize(None)})
    with pytest.raises(DataError, match=f"{table}, {column}: .* no instants with a time zone"):
        with_outcomes(**given)


def test_the_check_finds_who_uses_an_outcome_on_the_day_it_ends():
    forecasts, outcomes, _ = table(1, days=30)
    instants = np.unique(utc(forecasts["timestamp"]))

    def early(o):
        known = utc(o["end"])
        return pd.DataFrame({"timestamp": pd.DatetimeIndex(instants).tz_localize("UTC"), "mean": [float(o["ret"][known <= t].sum()) for t in instants]})

    with pytest.raises(LeakError, match="moved when outcomes known"):
        check_no_look_ahead(early, outcomes, 0)


@few
@given(seed=st.integers(0, 10**6), rate=st.floats(0.1, 5))
def test_hedge_keeps_its_bound(seed, rate):
    r, T, M = np.random.default_rng(seed), 60, 4
    day = pd.date_range("2024-01-01", periods=T, tz="UTC", unit="us")
    keys = pd.DataFrame({"timestamp": day, "symbol": "A"})
    forecasts = pd.concat([keys.assign(horizon_bars=1, score=0.0, prob_up=r.random(T) ** r.uniform(0.2, 5), sigma=1.0, fold=0, model=f"m{m}") for m in range(M)])
    m = side_by_side(forecasts, keys.assign(end=day + pd.Timedelta("1h"), ret=r.normal(0, 1, T)))
    pool = pooled(m, hedge_weights(m, rate), "pool")
    mine, best = ((pool["prob_up"] - m.up) ** 2).sum(), ((m.prob - m.up[:, None]) ** 2).sum(axis=0).min()
    assert mine <= best + np.log(M) / rate + rate * T / 8 + 1e-9
    assert (pool["agreement"] > 0).all()


def test_a_pool_keeps_the_contract_and_its_variance():
    forecasts, outcomes, _ = table(4)
    m = side_by_side(forecasts, outcomes)
    equal = pd.DataFrame(1 / 3, pd.DatetimeIndex(m.instants).tz_localize("UTC"), m.models)
    pool = pooled(m, equal, "pool")
    assert list(pool.columns) == ["timestamp", "symbol", "horizon_bars", "score", "prob_up", "sigma", "fold", "model", "disagreement", "agreement"]
    draws = np.random.default_rng(0).normal(m.score[0], m.sigma[0], (200_000, 3)).ravel()
    assert pool["sigma"].iloc[0] == pytest.approx(draws.std(), rel=0.01)
    kept = confident(pool, 0.3, 10)
    assert 0.15 < len(kept) / len(pool) < 0.45
    assert kept.index.isin(pool.index).all()


# ------------------------------------------------------------------ stacking


@few
@given(n=st.integers(6, 60), rows=st.integers(1, 4), parts=st.integers(1, 5), purge=st.integers(1, 4))
def test_nothing_is_asked_before_it_was_learned_around(n, rows, parts, purge):
    times = np.datetime64("2024-01-01", "us") + np.arange(n).repeat(rows) * np.timedelta64(1, "D")
    try:
        found = list(forward_splits(times, parts, purge))
    except DataError:
        assert n // (parts + 1) <= purge + 1
        return
    asked = np.zeros(len(times), int)
    for learn, part in found:
        assert times[learn].max() + np.timedelta64(purge, "D") < times[part].min()
        assert learn[0]
        asked += part
    assert asked.max() == 1
    assert asked[-1] == 1
    assert asked.sum() > 0


@few
@given(seed=st.integers(0, 10**6), members=st.integers(1, 5), l2=st.sampled_from([0.0, 1e-2, 1.0]))
def test_the_stack_is_where_nothing_is_better(seed, members, l2):
    r = np.random.default_rng(seed)
    z = r.standard_normal((400, members)) + r.standard_normal((400, 1))
    up, v = r.random(400) < expit(z.mean(axis=1)), r.uniform(0.5, 1.5, 400)
    w, b = fit_stack(z, up, v, l2)

    def loss(w, b):
        return float((v * np.logaddexp(0, -np.where(up, 1, -1) * (z @ w + b))).sum() / v.sum() + l2 / 2 * ((w - 1 / members) ** 2).sum())

    assert (w >= 0).all()
    for _ in range(30):
        assert loss(np.maximum(0, w + r.normal(0, 0.05, members)), b + r.normal(0, 0.05)) >= loss(w, b) - 1e-7


def test_an_ensemble_is_its_members():
    d, new = planted(900, 1), planted(50, 2)
    for how in ("probability", "log_odds", "stack"):
        e = Ensemble(EnsembleParams(members={"b": LOGISTIC, "a": TREES}, combine=how, parts=2), seed=3, purge_bars=2).fit(d.X, d.y, d.weight, d.times)
        alone = {name: zoo.build(kind["kind"], kind, seed=3, purge_bars=2).fit(d.X, d.y, d.weight, d.times).predict(new.X)["prob_up"].to_numpy() for name, kind in (("a", TREES), ("b", LOGISTIC))}
        p = np.column_stack([alone["a"], alone["b"]])
        wanted = {"probability": p.mean(axis=1), "log_odds": expit(logit(p).mean(axis=1)), "stack": expit(logit(p) @ getattr(e, "weights", np.ones(2)) + getattr(e, "intercept", 0.0))}[how]
        got = e.predict(new.X)
        np.testing.assert_allclose(got["prob_up"], wanted, atol=1e-12)
        np.testing.assert_allclose(got["disagreement"], p.std(axis=1), atol=1e-12)
        np.testing.assert_allclose(got["agreement"], ((p > 0.5) == (wanted > 0.5)[:, None]).mean(axis=1))


def test_a_composite_in_a_composite_in_a_composite(tmp_path):
    d = planted(900, 1)
    y = pd.DataFrame({1: d.y, 3: d.y + np.random.default_rng(0).standard_normal(900)})
    members = {"sure": {"kind": "calibrated", "of": TREES, "method": "venn_abers", "fraction": 0.3}, "line": LOGISTIC}
    params = HorizonsParams(of={"kind": "ensemble", "members": members, "combine": "log_odds"})
    model = Horizons(params, seed=0, purge_bars=3).fit(d.X, y, d.weight, d.times)
    model.save(tmp_path / "model")
    again = zoo.load_forecaster(tmp_path / "model")
    out = model.predict(d.X)
    assert out.columns.get_level_values(0).unique().tolist() == [1, 3]
    assert again.predict(d.X).equals(out)
    again.save(tmp_path / "again")
    files = sorted(p.relative_to(tmp_path / "model") for p in (tmp_path / "model").rglob("*") if p.is_file())
    assert len(files) == 3
    assert all((tmp_path / "model" / f).read_bytes() == (tmp_path / "again" / f).read_bytes() for f in files)
    for file in files:
        whole = (tmp_path / "model" / file).read_bytes()
        for damaged in (whole[:-3], b"", bytes([whole[0] ^ 1]) + whole[1:]):
            (tmp_path / "model" / file).write_bytes(damaged)
            with pytest.raises(DataError, match=file.name.replace(".", r"\.")):
                zoo.load_forecaster(tmp_path / "model")
        (tmp_path / "model" / file).unlink()
        with pytest.raises(DataError):
            zoo.load_forecaster(tmp_path / "model")
        (tmp_path / "model" / file).write_bytes(whole)


def test_members_that_read_sequences_get_the_length_they_want(monkeypatch):
    import torch
    from torch import nn

    from mltrading.models.network import Encoder, Network, NetworkParams

    class Flat(Encoder):
        def __init__(self, inputs: int) -> None:
            super().__init__()
            self.width = 4
            self.layers = nn.Sequential(nn.Flatten(), nn.Linear(inputs, 4), nn.Tanh())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers(x)

    class Perceptron(Network):
        Params = NetworkParams

        def encoder(self, features: Sequence[str]) -> Encoder:
            return Flat(self.params.steps * len(features))

    usual = zoo.model_class
    monkeypatch.setattr(zoo, "model_class", lambda kind, where="kind": Perceptron if kind == "perceptron" else usual(kind, where))
    train = {"epochs": 2, "batch_size": 64, "patience": 0}
    params = EnsembleParams(members={"long": {"kind": "perceptron", "steps": 5, "train": train}, "short": {"kind": "perceptron", "steps": 2, "train": train}, "line": LOGISTIC}, combine="probability")
    d = planted(600, 1, steps=5)
    model = Ensemble(params, seed=0, purge_bars=2).fit(d.X, d.y, d.weight, d.times)
    assert params.steps == 5
    assert {name: m.about["steps"] for name, m in model.inner.items()} == {"long": 5, "short": 2, "line": 1}
    out = model.predict(d.X)
    one = fit_inner(Perceptron(model.inner["short"].params, seed=0, purge_bars=2), d.X, d.y, d.weight, d.times)
    line = zoo.build("logistic", LOGISTIC, seed=0).fit(d.X.frame(), d.y, d.weight, d.times)
    p = np.column_stack([model.inner["long"].predict(d.X)["prob_up"], one.predict(d.X.take(slice(None)) if d.X.steps == 2 else _cut(d.X, 2))["prob_up"], line.predict(d.X.frame())["prob_up"]])
    np.testing.assert_allclose(out["prob_up"], p.mean(axis=1), atol=1e-12)
    with pytest.raises(DataError, match="windows of 3 steps, where it reads 5"):
        Ensemble(params, seed=0, purge_bars=2).fit(planted(600, 1, steps=3).X, d.y, d.weight, d.times)
    values, base = sampled_contributions(model, d.X.take(slice(0, 4)), d.X, rounds=2)
    np.testing.assert_allclose(values.sum(axis=1) + base, logit(out["prob_up"][:4]), atol=1e-6)
    values, base = model.inner["long"].contributions(d.X.take(slice(0, 0)))
    assert values.shape == (0, 8)
    assert len(base) == 0
    values, base = model.inner["long"].contributions(d.X.take(slice(0, 9)))
    np.testing.assert_allclose(values.sum(axis=1) + base, logit(model.inner["long"].predict(d.X.take(slice(0, 9)))["prob_up"]), atol=1e-5)


def _cut(x, steps):
    from dataclasses import replace
    return replace(x, steps=steps)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("kind", ["horizons", "calibrated", "ensemble"])
def test_every_composite_conforms(kind, steps):
    params = {"horizons": HorizonsParams(of=TREES), "calibrated": CalibratedParams(of=LOGISTIC, method="isotonic", fraction=0.3, level=0.8),
              "ensemble": EnsembleParams(members={"a": LOGISTIC, "b": TREES}, combine="stack", parts=3, copies=2)}[kind]
    check_forecaster(lambda seed: zoo.build(kind, params, seed, purge_bars=2), seed=1, steps=steps, least_skill=0.3 if steps > 1 else 0.8)


# ------------------------------------------------------------------ diversity, explanation


@few
@given(seed=st.integers(0, 10**6), members=st.integers(2, 8), rows=st.integers(3, 50))
def test_the_effective_number_lies_between_one_and_all(seed, members, rows):
    r = np.random.default_rng(seed)
    values = pd.DataFrame(r.standard_normal((rows, members)) + r.standard_normal((rows, 1)) * r.uniform(0, 5))
    for centred in (True, False):
        matrix = similarity(values, centred)
        eigen = np.linalg.eigvalsh(matrix)
        assert 1 - 1e-9 <= effective_members(matrix) <= members + 1e-9
        assert effective_members(matrix) == pytest.approx(eigen.sum() ** 2 / (eigen**2).sum(), rel=1e-9)
    np.testing.assert_allclose(similarity(values), np.corrcoef(values.T), atol=1e-9)
    assert effective_members(similarity(pd.concat([values[0]] * members, axis=1))) == pytest.approx(1)
    w = r.dirichlet(np.ones(members))
    parts = ambiguity(values, r.standard_normal(rows), w)
    assert parts["ensemble"] == pytest.approx(parts["members"] - parts["ambiguity"], abs=1e-9)


@few
@given(seed=st.integers(0, 10**6))
def test_pairs_by_counting(seed):
    right = pd.DataFrame(np.random.default_rng(seed).random((12, 4)) < 0.6, columns=list("abcd"))
    for row, (i, j) in zip(pairs(right).itertuples(), combinations("abcd", 2), strict=True):
        a, b, c, e = (float(((right[i] == x) & (right[j] == y)).mean()) for x, y in ((1, 1), (1, 0), (0, 1), (0, 0)))
        assert (row.first, row.second) == (i, j)
        assert row.disagreement == pytest.approx(b + c)
        assert row.double_fault == pytest.approx(e)
        assert row.q == pytest.approx((a * e - b * c) / (a * e + b * c)) if a * e + b * c > 0 else np.isnan(row.q)


def test_importance_of_what_is_not_used_is_nothing():
    d = planted(600, 1)
    line = zoo.build("logistic", LOGISTIC, seed=0).fit(d.X, d.y, d.weight, d.times)
    line.coef[2:] = 0.0
    found = permutation_importance([Unseen(line, d.X, d.y, d.times)], block_bars=7, repeats=3)
    assert list(found.index[:2]) == ["x0", "x1"]
    assert (found.loc[[f"x{k}" for k in range(2, 8)], ["increase", "low", "high"]] == 0).all().all()
    assert found["blocks"].tolist() == [9] * 8
    windows = as_windows(d.X)

    class Reads:  # the same model, given windows of one step
        def predict(self, X):
            return line.predict(X.frame())

    assert permutation_importance([Unseen(Reads(), windows, d.y, d.times)], block_bars=7, repeats=3).equals(found)


def test_permuted_rows_keep_their_places():
    from mltrading.models.explain import _shuffled
    block = np.arange(60) // 5
    source = _shuffled(block, np.random.default_rng(0))
    assert sorted(source) == list(range(60))
    assert (source % 5 == np.arange(60) % 5).all()
    uneven = np.array([0, 0, 0, 1, 1, 2, 2, 2, 2])
    assert all(0 <= s < 9 for s in _shuffled(uneven, np.random.default_rng(1)))


def test_what_is_refused():
    d = planted(300, 1)
    with pytest.raises(ParameterError, match="fit it inside of `Horizons`"):
        Calibrated(CalibratedParams(of=LOGISTIC, method="sigmoid", fraction=0.3), 0, purge_bars=1).fit(d.X, pd.DataFrame({1: d.y, 2: d.y}), d.weight, d.times)
    for wrong in ({"of": LOGISTIC | {"kind": "logistik"}}, {"of": {"l2": 1}}, {"of": 3}):
        with pytest.raises((ParameterError, ValueError)):
            CalibratedParams(**wrong, method="sigmoid", fraction=0.3)
    with pytest.raises(DataError, match="too few"):
        Ensemble(EnsembleParams(members={"a": LOGISTIC}, combine="stack", parts=40), 0, purge_bars=1).fit(d.X, d.y, d.weight, d.times)
    assert nonconformity([np.nan], 0, 1)[0] != 0
