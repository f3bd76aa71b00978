"""Labels: complete or absent, unchanged by later data, and weighted by what they hold."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from mltrading.features.audit import other_future
from mltrading.labels.horizons import LabelParams, label_frame
from mltrading.labels.weights import uniqueness
from mltrading.market.panel import Panel, until
from mltrading.market.simulate import random_walk

SHORT = settings(max_examples=25, deadline=None, derandomize=True)
SCALE = st.sampled_from([1e-12, 1.0, 1e12])


@SHORT
@given(st.integers(0, 10**6), st.integers(1, 25), st.sampled_from(["open", "close"]), st.floats(0.1, 0.99), SCALE)
def test_more_data_changes_no_label(seed: int, horizon: int, fill: str, place: float, scale: float) -> None:
    base = random_walk(3, 160, seed, closes_only=1)
    panel = Panel(base.times, base.symbols, {k: b * (1 if k == "volume" else scale) for k, b in base.fields.items()})
    labels = label_frame(panel, horizon, fill, vol_bars=20)
    cut = panel.times[int(place * (len(panel) - 1))]
    known = labels[labels["end"] <= pd.Timestamp(cut, tz="UTC")].reset_index(drop=True)
    pd.testing.assert_frame_equal(label_frame(until(panel, cut), horizon, fill, vol_bars=20), known, check_exact=True)
    assert np.isfinite(labels[["ret", "sigma", "ret_voladj"]]).all(axis=None)
    assert (labels["timestamp"] < labels["start"]).all()
    assert (labels["start"] < labels["end"]).all()
    assert labels.sort_values(["timestamp", "symbol"]).index.equals(labels.index)


@SHORT
@given(st.integers(0, 10**6), st.integers(1, 10))
def test_sigma_is_known_at_the_stamp(seed: int, horizon: int) -> None:
    panel = random_walk(3, 160, seed)
    t = panel.times[100]
    frames = [label_frame(p, horizon, vol_bars=20) for p in (panel, other_future(panel, t, np.random.default_rng(seed)))]
    as_it_was, other = (f[f["timestamp"] <= pd.Timestamp(t, tz="UTC")].set_index(["timestamp", "symbol"])["sigma"] for f in frames)
    both = as_it_was.index.intersection(other.index)
    pd.testing.assert_series_equal(as_it_was.loc[both], other.loc[both], check_exact=True)


@SHORT
@given(st.integers(0, 10**6), st.integers(1, 10))
def test_labels_equal_shifted_closes(seed: int, horizon: int) -> None:
    panel = random_walk(2, 120, seed)
    labels = label_frame(panel, horizon, "close", vol_bars=10)
    for i, symbol in enumerate(panel.symbols):
        own = pd.Series(panel["close"][i], panel.index).dropna()
        mine = labels[labels["symbol"] == symbol].set_index("timestamp")
        ret = own.shift(-1 - horizon) / own.shift(-1) - 1
        sigma = own.pct_change().rolling(10).std() * np.sqrt(horizon)
        expected = pd.DataFrame({"ret": ret, "sigma": sigma}).dropna()
        np.testing.assert_allclose(mine[["ret", "sigma"]], expected, rtol=1e-9, atol=1e-14)
        assert mine.index.equals(expected.index)


def test_a_standing_price_has_no_label() -> None:
    panel = random_walk(2, 120, seed=1, ragged=False)
    close = panel["close"].copy()
    close[0, 40:90] = close[0, 40]
    labels = label_frame(Panel(panel.times, panel.symbols, {"close": close}), 3, vol_bars=10)
    mine = labels[labels["symbol"] == "S000"]["timestamp"]
    still = panel.index[50:90]  # ten returns of zero
    assert not mine.isin(still).any()
    assert panel.index[[49, 90]].isin(mine).all()
    assert len(label_frame(until(panel, panel.times[5]), 3, vol_bars=10)) == 0


@SHORT
@given(st.integers(0, 10**6), st.integers(1, 12))
def test_weights_follow_their_definition(seed: int, horizon: int) -> None:
    panel = random_walk(2, 60, seed)
    labels = label_frame(panel, horizon, vol_bars=5)
    got = uniqueness(labels)
    assert ((got > 0) & (got <= 1)).all()
    for rows in labels.groupby("symbol").indices.values():
        start, end = labels["start"].to_numpy()[rows], labels["end"].to_numpy()[rows]
        stamps = np.unique(np.concatenate([start, end]))
        spans = (stamps > start[:, None]) & (stamps <= end[:, None])
        share = spans / np.maximum(spans.sum(axis=0), 1)
        np.testing.assert_allclose(got[rows], share.sum(axis=1) / spans.sum(axis=1), rtol=1e-12)


def test_parameters_are_checked() -> None:
    good = {"horizon_bars": 5, "vol_bars": 20, "fill": "close", "target": "ret_voladj"}
    assert LabelParams(**good).horizon_bars == 5
    for bad in ({"horizon_bars": 0}, {"vol_bars": 1}, {"fill": "mid"}, {"target": "sign"}, {"horizon": 5}):
        with pytest.raises(ValidationError):
            LabelParams(**(good | bad))
