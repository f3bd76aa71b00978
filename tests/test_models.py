"""Models: conformance, damaged folders, wrong features, and the same bytes from two fresh processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mltrading.core.errors import DataError, ParameterError
from mltrading.models.conformance import check_forecaster, planted
from mltrading.models.explain import shap_values
from mltrading.models.rows import inner_split
from mltrading.models.zoo import ModelsParams, build, load_forecaster

VALUES: dict[str, Any] = {
    "constant": {},
    "logistic": {"l2": 0.001, "winsor": 0.005, "missing_indicators": True, "max_iter": 500},
    "xgboost": {"n_estimators": 150, "max_depth": 2, "learning_rate": 0.1, "subsample": 0.8, "colsample_bytree": 0.8, "min_child_weight": 5,
                "reg_lambda": 1, "max_bin": 64, "early_stopping_rounds": 20, "inner_valid_fraction": 0.2},
}
PARAMS = ModelsParams.model_validate(VALUES)
NAMES = list(PARAMS)


def make(name: str, seed: int = 0, threads: int = 1) -> Any:
    return PARAMS[name].build(seed, threads, purge_bars=5)


@pytest.fixture(scope="module")
def data():
    return planted(1500, seed=2)


@pytest.fixture(scope="module", params=NAMES)
def fitted(request, data):
    return make(request.param).fit(data.X, data.y, data.weight, data.times)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", NAMES)
def test_every_model_conforms(name, seed):
    check_forecaster(lambda s: make(name, s), seed=seed, learns=name != "constant")


def test_conformance_with_two_threads():
    check_forecaster(lambda s: make("xgboost", s, threads=2))


# ------------------------------------------------------------------ a damaged folder


@pytest.fixture
def folder(fitted, tmp_path) -> Path:
    fitted.save(tmp_path / "model")
    return tmp_path / "model"


def test_no_file_can_be_cut_short_or_removed(folder):
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        for damaged in (whole[: len(whole) // 2], whole[:-3], b"", bytes([whole[0] ^ 1]) + whole[1:]):
            path.write_bytes(damaged)
            with pytest.raises(DataError, match=r"model\.json|trees\.ubj"):
                load_forecaster(folder)
        path.unlink()
        with pytest.raises(DataError):
            load_forecaster(folder)
        path.write_bytes(whole)
    load_forecaster(folder)


def test_no_number_can_be_edited(folder):
    card = json.loads((folder / "model.json").read_bytes())
    card["state"]["summary"]["sigma"] *= 1.5
    (folder / "model.json").write_text(json.dumps(card, indent=1, sort_keys=True))
    with pytest.raises(DataError, match="was changed since it was written"):
        load_forecaster(folder)


def test_a_failed_save_leaves_the_old_model(fitted, folder, monkeypatch):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full(*_: Any) -> int:
        raise OSError("no space left on device")

    with monkeypatch.context() as m:
        m.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="no space"):
            fitted.save(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


def test_another_folder_is_not_overwritten(fitted, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(DataError, match="left as it is"):
        fitted.save(tmp_path / "notes")
    assert (tmp_path / "notes" / "a.txt").read_text() == "mine"


# ------------------------------------------------------------------ wrong features at prediction


def test_wrong_features_are_named(fitted, data):
    for X, text in (
        (data.X.drop(columns="x3"), "`x3` is missing"),
        (data.X.assign(x9=0.0), "`x9` was not there"),
        (data.X[["x1", "x0", *data.X.columns[2:]]], "another order of columns: `x1` is at position 0, where `x0` was fitted"),
        (data.X.rename(columns={"x3": "x4"}), "column `x4`: stands there twice"),
        (data.X.assign(x3="a"), "column `x3`: is str"),
        (data.X.assign(x3=np.inf), "column `x3`, row 0: inf"),
    ):
        for use in (fitted.predict, fitted.contributions):
            with pytest.raises(DataError) as caught:
                use(X)
            assert text in str(caught.value)


def test_loaded_and_fitted_explain_alike(fitted, data, folder):
    ours, theirs = shap_values(fitted, data.X[:50]), shap_values(load_forecaster(folder), data.X[:50])
    assert ours[0].equals(theirs[0])
    assert ours[1].equals(theirs[1])


def test_explaining_no_rows(fitted, data):
    values, base = fitted.contributions(data.X[:0])
    assert values.shape == (0, 8)
    assert base.shape == (0,)


# ------------------------------------------------------------------ scales


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e6, 1e30])
def test_extreme_scales_of_features(data, scale):
    for name in ("logistic", "xgboost"):
        model = make(name).fit(data.X * scale, data.y, data.weight, data.times)
        forecast = model.predict(data.X * scale)
        assert np.isfinite(forecast.to_numpy()).all()
        assert np.corrcoef(forecast["score"], data.truth)[0, 1] > 0.8


def test_weights_count_relatively(data):
    for name in NAMES:
        a, b = (make(name).fit(data.X, data.y, data.weight * k, data.times).predict(data.X) for k in (1, 1024))
        np.testing.assert_allclose(a, b, rtol=1e-9, err_msg=name)


# ------------------------------------------------------------------ the inner split


@given(st.lists(st.integers(0, 60), min_size=1, max_size=200), st.floats(0.01, 0.99), st.integers(1, 10))
@settings(max_examples=200, deadline=None)
def test_inner_split_leaves_the_gap(days, fraction, purge):
    times = np.datetime64("2024-01-01", "us") + np.sort(days) * np.timedelta64(1, "D")
    try:
        learn, stop = inner_split(times, fraction, purge)
    except DataError:
        return
    assert learn.any()
    assert stop.any()
    between = np.unique(times[~learn & ~stop])
    assert len(between) == purge
    assert times[learn].max() < between.min()
    assert between.max() < times[stop].min()


def test_early_stopping_needs_a_gap(data):
    with pytest.raises(ParameterError, match="purge_bars"):
        build("xgboost", PARAMS["xgboost"].params, 0, 1, 0).fit(data.X, data.y, data.weight, data.times)


def test_too_few_instants_for_early_stopping(data):
    with pytest.raises(DataError, match="too few"):
        build("xgboost", PARAMS["xgboost"].params, 0, 1, 200).fit(data.X, data.y, data.weight, data.times)


# ------------------------------------------------------------------ fresh processes

PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
from test_models import make, planted
from mltrading.core.storage import content_id
d = planted(4000, seed=9, n_features=20)
for name in ("constant", "logistic", "xgboost"):
    model = make(name, threads=2).fit(d.X, d.y, d.weight, d.times)
    model.save(f"{sys.argv[2]}/{name}")
    print(name, content_id(f"{sys.argv[2]}/{name}"), model.predict(d.X).to_numpy().tobytes().hex()[:64])
"""


@pytest.mark.slow
def test_two_fresh_processes_give_the_same_bytes(tmp_path):
    told = []
    for hash_seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(Path(__file__).parents[1])}
        folder = tmp_path / hash_seed
        run = subprocess.run([sys.executable, "-c", PROGRAM, str(Path(__file__).parent), str(folder)], env=env, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        told.append(run.stdout)
    assert told[0] == told[1]
    assert len(told[0].splitlines()) == 3
