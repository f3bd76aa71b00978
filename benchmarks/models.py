"""Fitting and predicting through the common protocol beside the bare estimators, in one run.

`make bench NAME=models` prints a table whose last column is the ratio of the peer's time to ours: 1 means that the protocol costs nothing."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import xgboost as xgb
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mltrading.models.conformance import Planted, planted
from mltrading.models.zoo import ModelsParams, build

ROWS, FEATURES, REPEATS = 50_000, 60, 5
THREADS = int(os.environ.get("THREADS", "1"))  # more than one only helps where the cores are idle
PARAMS = ModelsParams.model_validate({
    "constant": {},
    "logistic": {"l2": 0.001, "winsor": 0.0, "missing_indicators": False, "max_iter": 1000},
    "xgboost": {"n_estimators": 200, "max_depth": 4, "learning_rate": 0.05, "subsample": 0.8, "colsample_bytree": 0.5, "min_child_weight": 20,
                "reg_lambda": 1, "max_bin": 64, "early_stopping_rounds": 0, "inner_valid_fraction": 0.2},
})


def peers() -> dict[str, Any]:
    """The bare estimators with the same settings."""
    p = PARAMS["xgboost"].params.model_dump(exclude={"early_stopping_rounds", "inner_valid_fraction"})
    return {
        "logistic": make_pipeline(SimpleImputer(strategy="median"), StandardScaler(), LogisticRegression(C=1 / (PARAMS["logistic"].params.l2 * ROWS), tol=1e-6, max_iter=1000)),
        "xgboost": xgb.XGBClassifier(**p, tree_method="hist", n_jobs=THREADS, random_state=0),
    }


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def alternating(ours: Callable[[], object], theirs: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median times of two calls that take turns, so that a busy moment of the machine hits both."""
    pairs = np.array([(seconds(ours), seconds(theirs)) for _ in range(repeats)])
    return float(np.median(pairs[:, 0])), float(np.median(pairs[:, 1]))


def measure(name: str, d: Planted, peer: Any) -> list[dict[str, object]]:
    """Rows of the table for one model."""
    model, up, raw = PARAMS[name].build(0, THREADS, purge_bars=5), d.y > 0, d.X.to_numpy()
    weights = {("logisticregression__" if name == "logistic" else "") + "sample_weight": d.weight}
    one, raw_one = d.X.iloc[:1], raw[:1]
    work = [
        ("fit", ROWS, lambda: model.fit(d.X, d.y, d.weight, d.times), lambda: peer.fit(raw, up, **weights), REPEATS),
        ("predict", ROWS, lambda: model.predict(d.X), lambda: peer.predict_proba(raw), REPEATS),
        ("predict one row", 1, lambda: model.predict(one), lambda: peer.predict_proba(raw_one), 200),
    ]
    out = []
    for what, rows, ours, theirs, repeats in work:
        a, b = alternating(ours, theirs, repeats)
        out.append({"model": name, "work": what, "ms": 1e3 * a, "rows/s": rows / a, "peer ms": 1e3 * b, "peer ms / ms": b / a})
    return out


def main() -> None:
    """Print the table."""
    d = planted(ROWS, seed=0, n_features=FEATURES)
    rows = [row for name, peer in peers().items() for row in measure(name, d, peer)]
    stopping = PARAMS["xgboost"].params.model_copy(update={"early_stopping_rounds": 20})
    fold = build("xgboost", stopping, seed=0, threads=THREADS, purge_bars=5)
    took = seconds(lambda: fold.fit(d.X, d.y, d.weight, d.times))
    print(f"{ROWS:,} rows × {FEATURES} features, {THREADS} threads; peers: scikit-learn's and xgboost's own estimators; medians")
    print(pd.DataFrame(rows).to_string(index=False, formatters={"rows/s": "{:,.0f}".format}, float_format="{:.2f}".format))
    print(f"one fold of XGBoost with early stopping and refit ({fold.trees} trees): {took:.1f} s")


if __name__ == "__main__":
    sys.exit(main())
