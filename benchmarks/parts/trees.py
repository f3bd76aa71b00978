"""Trees: one row and one fold through the protocol, beside each library's own call with the same settings, by turns; medians. `ours / bare`: 1 where the protocol costs nothing."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import expit

from mltrading.models.conformance import planted

THREADS = int(os.environ.get("THREADS", "1"))
BOOSTED = {"n_estimators": 200, "learning_rate": 0.05, "subsample": 0.8, "colsample_bytree": 0.5, "reg_lambda": 1.0, "max_bin": 64, "early_stopping_rounds": 0, "inner_valid_fraction": 0.2}
TREES: dict[str, tuple[str, dict[str, Any]]] = {
    "xgboost": ("XGBoost", BOOSTED | {"max_depth": 4, "min_child_weight": 20.0}),
    "lightgbm": ("LightGBM", BOOSTED | {"num_leaves": 16, "min_child_weight": 20.0}),
    "catboost": ("CatBoost", BOOSTED | {"max_depth": 4}),
    "forest": ("Forest", {"n_estimators": 100, "max_depth": 8, "min_samples_leaf": 40, "max_features": 0.3, "max_samples": 0.5}),
}


def ours(kind: str) -> Any:
    """Our model, not fitted."""
    cls = getattr(importlib.import_module(f"mltrading.models.{kind}"), TREES[kind][0])
    return cls(cls.Params(**TREES[kind][1]), seed=0, threads=THREADS, purge_bars=5)


def bare(kind: str, x: np.ndarray, up: np.ndarray, weight: np.ndarray) -> tuple[Callable[[], Any], Callable[[Any, np.ndarray], np.ndarray]]:
    """The library's own call: fit on arrays, and probabilities of rows, in the leanest way that it offers."""
    p = TREES[kind][1]
    if kind == "xgboost":
        import xgboost as xgb

        settings = {k: p[k] for k in ("max_depth", "learning_rate", "subsample", "colsample_bytree", "min_child_weight", "reg_lambda", "max_bin")}
        settings |= {"objective": "binary:logistic", "tree_method": "hist", "nthread": THREADS, "seed": 0}

        def fit() -> Any:
            booster = xgb.train(settings, xgb.QuantileDMatrix(x, up, weight=weight, max_bin=p["max_bin"], nthread=THREADS), p["n_estimators"])
            booster.set_param({"nthread": 1})
            return booster

        return fit, lambda m, rows: m.inplace_predict(rows)
    if kind == "lightgbm":
        import lightgbm as lgb

        settings = {"objective": "binary", "num_leaves": p["num_leaves"], "learning_rate": p["learning_rate"], "bagging_fraction": p["subsample"], "bagging_freq": 1, "feature_fraction": p["colsample_bytree"],
                    "lambda_l2": p["reg_lambda"], "min_sum_hessian_in_leaf": p["min_child_weight"], "min_data_in_leaf": 1, "max_bin": p["max_bin"], "num_threads": THREADS, "seed": 0,
                    "deterministic": True, "force_row_wise": True, "verbosity": -1}
        return lambda: lgb.train(settings, lgb.Dataset(x, up.astype(float), weight=weight), p["n_estimators"]), lambda m, rows: m.predict(rows, num_threads=1)
    if kind == "catboost":
        from catboost import CatBoost, Pool

        settings = {"loss_function": "Logloss", "iterations": p["n_estimators"], "depth": p["max_depth"], "learning_rate": p["learning_rate"], "subsample": p["subsample"], "rsm": p["colsample_bytree"],
                    "l2_leaf_reg": p["reg_lambda"], "border_count": p["max_bin"], "boosting_type": "Plain", "bootstrap_type": "Bernoulli", "random_seed": 0, "thread_count": THREADS,
                    "allow_writing_files": False, "logging_level": "Silent"}
        return lambda: CatBoost(settings).fit(Pool(x, up.astype(int), weight=weight, thread_count=THREADS)), lambda m, rows: expit(m.predict(rows, prediction_type="RawFormulaVal", thread_count=1))
    from sklearn.ensemble import RandomForestRegressor

    return lambda: RandomForestRegressor(**p, n_jobs=THREADS, random_state=0).fit(x, up.astype(float), sample_weight=weight), lambda m, rows: m.predict(rows)


def turns(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, np.ndarray]:
    """Seconds of calls that take turns, so that a busy moment of the machine hits all."""
    took: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            took[name].append(time.perf_counter() - start)
    return {name: np.array(v) for name, v in took.items()}


def trees_fit(rows: int = 20_000, features: int = 40, repeats: int = 5) -> pd.DataFrame:
    """Fit throughput of a direction: rows × trees per second, and the ratio to the bare library that fits and forecasts its training rows, as `fit` does for its summary."""
    d = planted(rows, seed=0, n_features=features)
    x, table = d.X.to_numpy(), []
    for kind, (_, p) in TREES.items():
        fit, predict = bare(kind, x, d.y > 0, d.weight)
        t = turns({"ours": lambda kind=kind: ours(kind).fit(d.X, d.y, d.weight, d.times), "bare": lambda fit=fit, predict=predict: predict(fit(), x)}, repeats)
        a, b = (float(np.median(t[k])) for k in ("ours", "bare"))
        table.append({"model": kind, "fit s": a, "million rows x trees / s": rows * p["n_estimators"] / a / 1e6, "bare s": b, "ours / bare": float(np.median(t["ours"] / t["bare"]))})
    return pd.DataFrame(table).set_index("model")


def trees_one_row(rows: int = 4_000, features: int = 40, repeats: int = 2_000) -> pd.DataFrame:
    """Microseconds for one row: `predict` of a table, the model on an array, the bare library on an array."""
    d = planted(rows, seed=0, n_features=features)
    x, X, table = d.X.to_numpy(), d.X.iloc[:1], []
    one = x[:1].copy()
    for kind in TREES:
        fit, predict = bare(kind, x, d.y > 0, d.weight)
        model, peer = ours(kind).fit(d.X, d.y, d.weight, d.times), fit()
        calls = {"predict": lambda model=model: model.predict(X), "array": lambda model=model: model._raw(one), "bare": lambda predict=predict, peer=peer: predict(peer, one)}
        turns(calls, 50)
        t = turns(calls, 200 if kind == "forest" else repeats)
        table.append({"model": kind} | {f"{name} p{q}": 1e6 * float(np.percentile(v, q)) for name, v in t.items() for q in (50, 99)})
    return pd.DataFrame(table).set_index("model")
