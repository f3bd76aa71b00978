"""Trees: what no page can show. Forests and their quantiles beside the equations, constraints on grids, contributions beside another implementation, libraries that are not there."""

from __future__ import annotations

import importlib
import json
import sys
import warnings
from itertools import combinations
from math import comb
from typing import Any

import numpy as np
import pytest
from sklearn.ensemble import RandomForestRegressor

from mltrading.core.errors import DataError, ParameterError
from mltrading.models.conformance import check_forecaster, planted
from mltrading.models.forest import _ends, _grown, _means, _ranks
from mltrading.models.tasks import Direction, Quantiles, Regression, ThreeWay

BOOSTED = {"n_estimators": 40, "learning_rate": 0.15, "subsample": 0.8, "colsample_bytree": 0.8, "reg_lambda": 1, "max_bin": 64, "early_stopping_rounds": 0, "inner_valid_fraction": 0.2}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "forest": ("Forest", {"n_estimators": 30, "max_depth": 6, "min_samples_leaf": 20, "max_features": 0.5, "max_samples": 0.5}),
    "xgboost": ("XGBoost", BOOSTED | {"max_depth": 3, "min_child_weight": 5}),
    "catboost": ("CatBoost", BOOSTED | {"max_depth": 3}),
    "lightgbm": ("LightGBM", BOOSTED | {"num_leaves": 6, "min_child_weight": 5}),
}
TASKS = (Direction(), ThreeWay(flat=0.3), Regression(), Quantiles())
BOOSTERS = [kind for kind in KINDS if kind != "forest"]


def make(kind: str, seed: int = 0, threads: int = 1, **other: Any) -> Any:
    name, values = KINDS[kind]
    cls = getattr(importlib.import_module(f"mltrading.models.{kind}"), name)
    return cls(cls.Params(**values | other), seed=seed, threads=threads, purge_bars=5)


@pytest.fixture(scope="module")
def data():
    return planted(1200, seed=2)


def fitted(kind: str, d: Any, **other: Any) -> Any:
    return make(kind, **other).fit(d.X, d.y, d.weight, d.times)


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.kind)
@pytest.mark.parametrize("kind", KINDS)
def test_every_model_learns_every_task(kind, task):
    check_forecaster(lambda s: make(kind, s, task=task), seed=3)
    if kind != "forest":
        check_forecaster(lambda s: make(kind, s, task=task, early_stopping_rounds=10), seed=3)


# ------------------------------------------------------------------ the forest as arrays


@pytest.mark.parametrize("seed", range(3))
def test_arrays_forecast_as_the_forest_they_were_made_of(seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((400, 5)).astype(np.float32)
    x[:, 1] = np.round(x[:, 1])  # ties
    x[rng.random(x.shape) < 0.2] = np.nan
    x[:, 4] = np.where(rng.random(400) < 0.5, np.nan, 1)  # only being there says something
    y = np.nan_to_num(x[:, 0]) + 2.0 * np.isnan(x[:, 4]) + rng.standard_normal(400)
    places, values = _ranks(x)
    theirs = RandomForestRegressor(20, min_samples_leaf=5, max_features=0.6, random_state=seed).fit(places, np.column_stack([y, y > 0]))
    grown = _grown([e.tree_ for e in theirs.estimators_], values)
    assert np.isinf(grown.threshold).any()
    assert _means(x, grown).tobytes() == theirs.predict(places).tobytes()


def test_values_between_those_that_were_seen():
    x = np.float32([[0], [1], [10], [11]])
    places, values = _ranks(x)
    theirs = RandomForestRegressor(1, bootstrap=False, max_depth=1, random_state=0).fit(places, [0, 0, 1, 1])
    grown = _grown([e.tree_ for e in theirs.estimators_], values)
    assert grown.threshold[0] == 5.5
    assert _means(np.float32([[5.4], [5.6], [-99], [99]]), grown)[:, 0].tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("seed", range(3))
def test_quantiles_of_a_forest_are_weighted_quantiles(seed):
    rng = np.random.default_rng(seed)
    d = planted(300, seed)
    X = d.X.mask(rng.random(d.X.shape) < 0.1)
    y = np.round(d.y, 1)  # ties
    levels = (0.01, 0.25, 0.5, 0.9, 0.99)
    model = make("forest", seed, task=Quantiles(levels=levels), min_samples_leaf=5).fit(X, y, d.weight, d.times)
    new = planted(40, seed + 9).X.mask(rng.random((40, 8)) < 0.1).to_numpy()
    old_ends, new_ends = (_ends(x, model.grown) for x in (X.to_numpy(), new))
    for i, found in enumerate(model._raw(new)):
        w = np.mean([d.weight * (old == at[i]) / d.weight[old == at[i]].sum() for old, at in zip(old_ends, new_ends, strict=True)], axis=0)
        assert w.sum() == pytest.approx(1)
        for level, q in zip(levels, found, strict=True):
            assert w[y <= q].sum() >= level - 1e-9
            assert w[y < q].sum() < level + 1e-9


def test_quantiles_of_one_leaf_are_those_of_the_rows(data):
    levels = (0.1, 0.5, 0.9)
    model = make("forest", task=Quantiles(levels=levels), min_samples_leaf=1200, max_samples=1.0).fit(data.X, data.y, np.ones(1200), data.times)
    assert model._raw(data.X.to_numpy()[:2]).tolist() == [np.quantile(data.y, levels, method="inverted_cdf").tolist()] * 2


def test_threads_do_not_change_a_forest(data):
    one, two = (make("forest", threads=threads).fit(data.X, data.y, data.weight, data.times)._learned()[1] for threads in (1, 2))
    assert one == two


# ------------------------------------------------------------------ constraints


@pytest.mark.parametrize("task", [Direction(), Regression()], ids=lambda task: task.kind)
@pytest.mark.parametrize("kind", KINDS)
def test_constraints_hold_on_a_grid(kind, task, data):
    deep = {"max_depth": 6} if kind != "lightgbm" else {"num_leaves": 24}
    free, held = (fitted(kind, data, task=task, monotone=m, **deep) for m in ({}, {"x0": 1, "x1": -1, "x2": 1}))
    for feature, sign in (("x0", 1), ("x1", -1), ("x2", 1)):
        grid = data.X.iloc[np.repeat(np.arange(40), 61)].reset_index(drop=True).assign(**{feature: np.tile(np.linspace(-4, 4, 61, dtype=np.float32), 40)})
        steps = [sign * np.diff(m.predict(grid)["score"].to_numpy().reshape(40, 61), axis=1) for m in (held, free)]
        assert steps[0].min() >= -1e-9, feature
        assert steps[1].min() < -1e-4, feature


@pytest.mark.parametrize("kind", KINDS)
def test_constraints_that_cannot_hold(kind, data):
    with pytest.raises(ParameterError, match=r"unknown feature `x00`\n  → did you mean `x0`\?"):
        fitted(kind, data, monotone={"x00": 1})
    for task in (ThreeWay(), Quantiles()):
        with pytest.raises(ValueError, match=f"monotone: cannot be held for {task.kind}"):
            make(kind, task=task, monotone={"x0": 1})


@pytest.mark.parametrize("kind", BOOSTERS)
def test_libraries_do_not_hold_constraints_on_quantiles(kind, data):
    """Why they are refused: where this fails, a library has learned it."""
    model = make(kind, task=Quantiles())
    model.params = model.params.model_copy(update={"monotone": {"x0": -1}})  # against the planted signal, past the check of parameters
    if kind == "lightgbm":
        with pytest.raises(Exception, match="Cannot use ``monotone_constraints`` in quantile objective"):
            model.fit(data.X, data.y, data.weight, data.times)
        return
    model.fit(data.X, data.y, data.weight, data.times)
    grid = data.X.iloc[np.repeat(np.arange(40), 61)].reset_index(drop=True).assign(x0=np.tile(np.linspace(-4, 4, 61, dtype=np.float32), 40))
    assert np.diff(model._raw(grid.to_numpy()).reshape(40, 61, 5), axis=1).max() > 0.01


def test_constraints_follow_their_feature(data):
    turned = data.X[list(data.X.columns[::-1])]
    model = make("xgboost", monotone={"x1": -1}).fit(turned, data.y, data.weight, data.times)
    assert model.signs == [0, 0, 0, 0, 0, 0, -1, 0]


# ------------------------------------------------------------------ classes


@pytest.mark.parametrize("task", [Direction(), ThreeWay(flat=0.3)], ids=lambda task: task.kind)
@pytest.mark.parametrize("kind", KINDS)
def test_balanced_classes_meet_in_the_middle(kind, task, data):
    y = data.y + 0.8
    given, balanced = (make(kind, task=task, balanced=b).fit(data.X, y, data.weight, data.times)._raw(data.X.to_numpy()) for b in (False, True))
    classes = np.eye(task.outputs)[task.encode(y)] if task.outputs > 1 else task.encode(y)
    shares = np.average(classes, weights=data.weight, axis=0)
    np.testing.assert_allclose(np.average(given, weights=data.weight, axis=0), shares, atol=0.02)
    balance = sum(np.average(balanced[rows], weights=data.weight[rows], axis=0) for rows in (task.encode(y) == c for c in range(max(2, task.outputs)))) / max(2, task.outputs)
    np.testing.assert_allclose(balance, 1 / max(2, task.outputs), atol=0.03)


@pytest.mark.parametrize("kind", BOOSTERS)
def test_an_earlier_part_without_a_class(kind, data):
    y = np.where((np.arange(1200) < 960) & (np.abs(data.y) < 0.3), 1.0, data.y)
    with pytest.raises(DataError, match="has 2 of 3 classes"):
        make(kind, task=ThreeWay(flat=0.3), early_stopping_rounds=5).fit(data.X, y, data.weight, data.times)


# ------------------------------------------------------------------ stopping


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.kind)
@pytest.mark.parametrize("kind", BOOSTERS)
def test_trees_stop_at_the_lowest_loss(kind, task, data):
    model = fitted(kind, data, task=task, early_stopping_rounds=10, n_estimators=200, learning_rate=0.3)
    assert model.trees == int(np.argmin(model.losses)) + 1
    assert model.trees + 10 <= len(model.losses) <= model.trees + 11
    assert len(model.losses) < 200
    again = fitted(kind, data, task=task, n_estimators=model.trees, learning_rate=0.3)
    if kind != "catboost":  # it spreads its randomness over the number of trees that it was told
        assert again._raw(data.X.to_numpy()).tobytes() == model._raw(data.X.to_numpy()).tobytes()


# ------------------------------------------------------------------ contributions


@pytest.fixture(scope="module")
def shap():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import shap
    return shap


@pytest.mark.parametrize("task", [Direction(), Regression()], ids=lambda task: task.kind)
@pytest.mark.parametrize("kind", ["xgboost", "lightgbm"])
def test_contributions_beside_shap(kind, task, data, shap):
    X = data.X.mask(np.random.default_rng(1).random(data.X.shape) < 0.1)
    model = make(kind, task=task).fit(X, data.y, data.weight, data.times)
    values, _ = model.contributions(X[:100])
    explainer = shap.TreeExplainer(model.booster if kind == "xgboost" else model.boosters[0])
    explainer.model.model_type = "its own"  # by default it would ask the library, as the model does
    np.testing.assert_allclose(values, explainer.shap_values(X.to_numpy(np.float64)[:100], check_additivity=False), atol=1e-5)


def expected(tree: dict[str, Any], x: np.ndarray, known: set[int], level: int, leaf: int = 0) -> float:
    """What an oblivious tree says of a row of which some features are known: over the others, the mean by the rows that came through. The last split is the root."""
    if level < 0:
        return tree["leaf_values"][leaf]
    feature, border = (tree["splits"][level][k] for k in ("float_feature_index", "border"))
    sides = [leaf, leaf + (1 << level)]
    if feature in known:
        return expected(tree, x, known, level - 1, sides[int(x[feature] > border)])
    cover = [sum(tree["leaf_weights"][side : side + (1 << level)]) for side in sides]
    return sum(c * expected(tree, x, known, level - 1, side) for c, side in zip(cover, sides, strict=True)) / sum(cover)


@pytest.mark.parametrize("task", [Direction(), Regression()], ids=lambda task: task.kind)
def test_contributions_of_catboost_by_their_definition(task, tmp_path):
    d = planted(1200, seed=2, n_features=4)
    model = make("catboost", task=task, n_estimators=20, max_depth=2, max_bin=8).fit(d.X, d.y, d.weight, d.times)
    model.model.save_model(str(tmp_path / "trees.json"), format="json")
    trees = json.loads((tmp_path / "trees.json").read_bytes())["oblivious_trees"]
    rows = d.X.to_numpy()[:5]
    values, _ = model.contributions(d.X[:5])
    for x, found in zip(rows, values.to_numpy(), strict=True):
        worth = {s: sum(expected(t, x, set(s), len(t["splits"]) - 1) for t in trees) for k in range(5) for s in combinations(range(4), k)}
        for j in range(4):
            others = [s for s in worth if j not in s]
            phi = sum((worth[tuple(sorted((*s, j)))] - worth[s]) / (4 * comb(3, len(s))) for s in others)
            assert found[j] == pytest.approx(phi, abs=1e-9)


def test_contributions_of_a_forest_beside_shap(data, shap):
    X = data.X.mask(np.random.default_rng(1).random(data.X.shape) < 0.1)
    model = make("forest").fit(X, data.y, data.weight, data.times)
    places, _ = _ranks(X.to_numpy())
    theirs = RandomForestRegressor(**model.params.model_dump(exclude={"task", "monotone", "balanced"}), random_state=0)
    theirs.fit(places, data.y > 0, sample_weight=data.weight / data.weight.mean())
    values, base = model.contributions(X[:100])
    explainer = shap.TreeExplainer(theirs)
    np.testing.assert_allclose(values, explainer.shap_values(places[:100].astype(np.float64)), atol=1e-12)
    np.testing.assert_allclose(base, explainer.expected_value[0], atol=1e-12)
    assert model.unit == "probability"


@pytest.mark.parametrize("kind", KINDS)
def test_several_numbers_have_no_contributions(kind, data):
    model = fitted(kind, data, task=Quantiles(), n_estimators=3)
    assert model.unit == ""
    with pytest.raises(ParameterError, match="contributions explain one number, and quantiles has 5"):
        model.contributions(data.X)


# ------------------------------------------------------------------ rows of all kinds


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e30])
@pytest.mark.parametrize("kind", KINDS)
def test_scales_of_features(kind, scale, data):
    model = make(kind).fit(data.X * np.float32(scale), data.y, data.weight, data.times)
    assert np.corrcoef(model.predict(data.X * np.float32(scale))["score"], data.truth)[0, 1] > 0.8


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.kind)
@pytest.mark.parametrize("kind", KINDS)
def test_missing_values_that_are_new(kind, task, data):
    model = make(kind, task=task, **({} if kind == "forest" else {"early_stopping_rounds": 5}))
    X = data.X.assign(x3=data.X["x3"].where(np.arange(1200) < 1000), x5=np.float32("nan"))  # missing among the later rows alone; never there
    model.fit(X, data.y, data.weight, data.times)
    assert np.isfinite(model.predict(data.X * np.float32("nan")).to_numpy()).all()
    assert np.isfinite(model.predict(data.X).to_numpy()).all()


@pytest.mark.parametrize("kind", KINDS)
def test_features_that_never_change(kind, data):
    X = data.X * np.float32(0)
    if kind == "catboost":
        with pytest.raises(DataError, match="none of them changes"):
            make(kind).fit(X, data.y, data.weight, data.times)
    else:
        p = make(kind).fit(X, data.y, data.weight, data.times).predict(X)["prob_up"]
        np.testing.assert_allclose(p, np.average(data.y > 0, weights=data.weight), atol=0.02)


# ------------------------------------------------------------------ libraries that are not there


@pytest.mark.parametrize("kind", ["catboost", "lightgbm"])
def test_a_library_that_is_not_there(kind, data, tmp_path, monkeypatch):
    model = fitted(kind, data, n_estimators=3)
    model.save(tmp_path / "model")
    monkeypatch.setitem(sys.modules, kind, None)
    for call in (lambda: fitted(kind, data), lambda: type(model).load(tmp_path / "model")):
        with pytest.raises(ParameterError, match=rf"the library `{kind}` is not installed\n  → pip install {kind}"):
            call()
