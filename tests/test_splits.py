"""Splits on label ends against a slow check that compares every training row with every test row."""

from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.dummy import DummyRegressor
from sklearn.model_selection import cross_val_score

from mltrading.core.errors import DataError, LeakError
from mltrading.validation.combinatorial import CombinatorialPurged, paths, routes
from mltrading.validation.kfold import PurgedKFold
from mltrading.validation.nested import every, inner_folds, nested_search
from mltrading.validation.splits import Fold, WalkForward, check_fold
from mltrading.validation.trials import looking, read_rows

NAT = np.datetime64("NaT", "us")
SHORT = settings(max_examples=100, deadline=None)


@st.composite
def tables(draw):
    """Rows of up to three symbols at irregular instants with holes; labels of any length, some never complete."""
    n = draw(st.integers(8, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    axis = np.datetime64("2020-01-01", "us") + np.cumsum(rng.choice([1, 1, 1, 24, 72, 2000], n)) * np.timedelta64(1, "h")
    alive = rng.random((n, draw(st.integers(1, 3)))) < draw(st.sampled_from([0.5, 1.0]))
    alive[:, 0] |= draw(st.booleans())  # else some instants have no row at all
    assume(alive.any(axis=1).sum() >= 6)
    t = axis[np.nonzero(alive)[0]]
    length = rng.integers(0, draw(st.sampled_from([1, 5, 50, 500])), len(t)) * np.timedelta64(1, "h")
    end = np.where(rng.random(len(t)) < draw(st.sampled_from([0.0, 0.1])), NAT, t + length)
    return t, end, axis


def open_windows(t: np.ndarray, end: np.ndarray, stretches: list[np.ndarray]) -> list[tuple]:
    """First decision and last label end of each stretch of instants, row by row."""
    out = []
    for stretch in stretches:
        first, last = stretch[0], stretch[-1]
        for j in range(len(t)):
            if stretch[0] <= t[j] <= stretch[-1] and not np.isnat(end[j]) and end[j] > last:
                last = end[j]
        out.append((first, last))
    return out


def touches(t_i, end_i, windows: list[tuple]) -> bool:
    """Whether a row may not be learned from; a label without an end may touch anything."""
    return bool(np.isnat(end_i)) or any(end_i >= first and t_i <= last for first, last in windows)


def close_behind(t_i, windows: list[tuple], bars: np.ndarray, embargo: int) -> bool:
    """Whether a row decides within so many bars after the last label of a window."""
    return any(t_i > last and ((bars > last) & (bars <= t_i)).sum() <= embargo for _, last in windows)


def assert_exact(fold: Fold, t, end, stretches, bars, embargo: int) -> None:
    """Each row is where the slow check puts it: nothing leaks, and nothing is left out without a reason."""
    windows = open_windows(t, end, stretches)
    for i in range(len(t)):
        if any(s[0] <= t[i] <= s[-1] for s in stretches):
            expected = "test"
        elif touches(t[i], end[i], windows):
            expected = "purged"
        else:
            expected = "embargoed" if close_behind(t[i], windows, bars, embargo) else "train"
        assert [kind for kind in ("train", "purged", "embargoed", "test") if i in getattr(fold, kind)] == [expected]


def or_nothing_to_learn(split, *rows) -> list[Fold]:
    try:
        return list(split.folds(*rows))
    except DataError as error:
        if "nothing is left to learn from" in str(error) or "has a label known before" in str(error):
            return []
        raise


@SHORT
@given(tables(), st.integers(2, 6), st.integers(0, 3), st.booleans())
def test_purged_k_fold_is_exact(table, n, embargo, whole_axis):
    t, end, axis = table
    bars = axis if whole_axis else np.unique(t)
    for fold, stretch in zip(or_nothing_to_learn(PurgedKFold(n, embargo), t, end, bars), np.array_split(np.unique(t), n), strict=False):
        assert_exact(fold, t, end, [stretch], bars, embargo)


@SHORT
@given(tables(), st.sampled_from([(3, 1), (4, 2), (5, 3), (6, 2)]), st.integers(0, 3))
def test_combinations_are_exact(table, groups, embargo):
    t, end, axis = table
    split, parts = CombinatorialPurged(*groups, embargo), np.array_split(np.unique(t), groups[0])
    for fold, judged in zip(or_nothing_to_learn(split, t, end, axis), split.combinations(), strict=False):
        assert_exact(fold, t, end, [parts[g] for g in judged], axis, embargo)


@SHORT
@given(tables(), st.integers(2, 12), st.integers(1, 10), st.integers(0, 3), st.booleans())
def test_the_walk_is_exact_within_its_window(table, train, test, embargo, anchored):
    t, end, axis = table
    assume(embargo < train < len(axis))
    for fold in or_nothing_to_learn(WalkForward(train, test, embargo, anchored), t, end, axis):
        stretch = axis[(axis >= fold.test_start) & (axis <= fold.test_end)]
        windows = open_windows(t, end, [stretch])
        gap = axis[np.searchsorted(axis, fold.test_start) - embargo]
        for i in np.flatnonzero((t >= fold.train_start) & (t < fold.test_start)):
            expected = "purged" if touches(t[i], end[i], windows) else "train" if end[i] < gap else "embargoed"
            assert [kind for kind in ("train", "purged", "embargoed") if i in getattr(fold, kind)] == [expected]


@SHORT
@given(tables(), st.data())
def test_the_seal_agrees_with_the_slow_check_on_any_rows(table, data):
    """Random training rows around random windows: refused where, and only where, one of them touches a window."""
    t, end, _ = table
    parts = np.array_split(np.unique(t), data.draw(st.integers(2, 6)))
    judged = sorted(data.draw(st.sets(st.integers(0, len(parts) - 1), min_size=1, max_size=len(parts) - 1)))
    stretches = [parts[g] for g in judged]
    test = np.flatnonzero([any(s[0] <= x <= s[-1] for s in stretches) for x in t])
    others = np.setdiff1d(np.arange(len(t)), test)
    train = np.array(data.draw(st.lists(st.sampled_from(list(others)), unique=True, min_size=1)))  # in any order
    none = np.array([], np.int64)
    fold = Fold(7, train, test, none, none, t[0], t[train[-1]], np.array([(s[0], s[-1]) for s in stretches]))
    bad = [i for i in train if touches(t[i], end[i], open_windows(t, end, stretches))]
    if bad:
        with pytest.raises(LeakError, match=r"fold 7, row \d+ ") as caught:
            check_fold(fold, t, end)
        assert int(caught.value.where.split("row ")[1].split(" ")[0]) in bad
    else:
        check_fold(fold, t, end)


@SHORT
@given(tables(), st.sampled_from([(3, 2), (4, 2), (6, 3)]))
def test_paths_use_each_judged_group_once(table, groups):
    t, _, _ = table
    split = CombinatorialPurged(*groups)
    folds = or_nothing_to_learn(split, t, t)  # labels that end at once
    own = np.random.default_rng(0).permutation(np.arange(float(len(folds) * len(t)))).reshape(len(folds), len(t))
    made = paths(split, t, ((f, own[f.number, f.test]) for f in reversed(folds)))
    assert made.shape == (split.n_paths, len(t))
    assert sorted(made.ravel()) == sorted(np.concatenate([own[f.number, f.test] for f in folds]))
    group = np.concatenate([np.full(np.isin(t, part).sum(), g) for g, part in enumerate(np.array_split(np.unique(t), groups[0]))])
    for path, route in zip(made, routes(split), strict=True):
        np.testing.assert_array_equal(path, own[route[group], np.arange(len(t))])


SPLITTERS = st.sampled_from([WalkForward(4, 3, 1), WalkForward(4, 3, anchored=True), PurgedKFold(3, 1), CombinatorialPurged(4, 2)])


@SHORT
@given(tables(), SPLITTERS, SPLITTERS)
def test_inner_folds_never_meet_an_outer_test_window(table, outside, inside):
    t, end, axis = table
    assume(len(axis) > 4)
    for outer in or_nothing_to_learn(outside, t, end, axis):
        around = open_windows(t, end, [np.array(w) for w in outer.windows])
        try:
            inner = list(inner_folds(outer, inside, t, end, axis))
        except DataError as error:
            if error.where.startswith(f"inside fold {outer.number}, "):
                continue
            raise
        for fold in inner:
            within = open_windows(t[outer.train], end[outer.train], [np.array(w) for w in fold.windows])
            for kind in ("train", "test", "purged", "embargoed"):
                assert np.isin(getattr(fold, kind), outer.train).all()
            assert not any(touches(t[i], end[i], around) for i in np.append(fold.train, fold.test))
            assert not any(touches(t[i], end[i], within) for i in fold.train)
            assert all(touches(t[i], end[i], within) for i in fold.purged if isinstance(inside, (PurgedKFold, CombinatorialPurged)))


@pytest.mark.parametrize("whole_axis", [False, True])
def test_bars_of_an_inner_walk_are_bars_of_the_axis(whole_axis):
    axis = pd.date_range("2020-01-01", periods=121, freq="D", unit="us")
    at = np.setdiff1d(np.arange(120), np.arange(3, 120, 7)) if whole_axis else np.arange(120)
    t, end, bars = axis[at], axis[at + 1], axis[:120] if whole_axis else None
    outer = PurgedKFold(3).folds(t, end, bars)[1]
    hole = at[outer.test]
    inner = list(inner_folds(outer, WalkForward(30, 30), t, end, bars))
    assert [int(at[f.test[0]]) // 30 for f in inner] == [1, 2, 3]
    for fold, begin in zip(inner, (30, 60, 90), strict=True):
        assert ((at[fold.train] >= begin - 30) & (at[fold.train] < begin)).all()
        assert ((at[fold.test] >= begin) & (at[fold.test] < begin + 30)).all()
        assert not np.isin(at[np.append(fold.train, fold.test)], hole).any()
    with pytest.raises(DataError, match=r"inside fold 1, fold 2: no row between"):
        list(inner_folds(outer, WalkForward(20, 20), t, end, bars))
    assert len(list(inner_folds(outer, WalkForward(20, 20, anchored=True), t, end, bars))) > 2
    found = nested_search([outer], WalkForward(30, 30), t, end, every({"one": 1}), lambda c, train, test: float(at[test[0]] - at[train[0]]), bars)
    assert found["inner"].item() == np.mean([at[f.test[0]] - at[f.train[0]] for f in inner])


@settings(max_examples=50, deadline=None)
@given(tables(), st.integers(0, 2**32 - 1))
def test_a_choice_does_not_depend_on_outer_test_rows(table, seed):
    t, end, _ = table
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(len(t), 5)), rng.normal(size=len(t))

    def score(column, train, test):
        return float((x[train, column] @ y[train]) * (x[test, column] @ y[test]))

    for outer in or_nothing_to_learn(PurgedKFold(3), t, end):
        if len(np.unique(t[outer.train])) < 2:
            continue
        try:
            before = nested_search([outer], PurgedKFold(2), t, end, every(dict(zip("abcde", range(5), strict=True))), score)
        except DataError:
            continue
        rest = np.setdiff1d(np.arange(len(t)), outer.train)
        x[rest], y[rest] = rng.normal(size=(len(rest), 5)), rng.normal(size=len(rest))
        after = nested_search([outer], PurgedKFold(2), t, end, every(dict(zip("abcde", range(5), strict=True))), score)
        pd.testing.assert_frame_equal(before.drop(columns="outer"), after.drop(columns="outer"), check_exact=True)


@pytest.mark.parametrize("split", [WalkForward(40, 20, 2), PurgedKFold(5, 2), CombinatorialPurged(5, 2, 2)], ids=lambda s: type(s).__name__)
def test_scikit_learn_takes_every_splitter(split):
    bars = pd.date_range("2020-01-01", periods=110, freq="h", tz="America/New_York", unit="us")
    X = pd.DataFrame({"a": 0.0}, index=bars[:100].repeat(2))
    y, ends = np.arange(200.0), bars[3:103].repeat(2)
    scores = cross_val_score(DummyRegressor(), X, y, groups=ends, cv=split)
    assert len(scores) == split.get_n_splits(X, y, ends) == len(list(split.folds(X.index, ends)))
    with pytest.raises(LeakError, match="no label ends"):
        cross_val_score(DummyRegressor(), X, y, cv=split)
    with pytest.raises(DataError, match="not instants"):
        cross_val_score(DummyRegressor(), X.to_numpy(), y, groups=ends, cv=split)
    with pytest.raises(DataError, match="not instants"):
        cross_val_score(DummyRegressor(), X, y, groups=np.arange(200), cv=split)


def test_a_nested_search_is_one_trial(tmp_path: Path) -> None:
    """Its returns are those of all outer folds, joined; a failure on the way is recorded instead."""
    t = pd.date_range("2020-01-01 21:00", periods=300, freq="B", tz="UTC", unit="us")
    end, returns = t.append(t[-1:] + pd.Timedelta(days=1))[1:], pd.Series(0.01 * np.random.default_rng(0).normal(size=300), t)
    outer, path = WalkForward(150, 50).folds(t, end), tmp_path / "x.jsonl"

    def earned(side: int, train: np.ndarray, test: np.ndarray) -> pd.Series:
        return side * returns.iloc[test]

    def fails_outside(side: int, train: np.ndarray, test: np.ndarray) -> pd.Series:
        if test[-1] == 299:
            raise ArithmeticError("the last window")
        return earned(side, train, test)

    for score, width in ((earned, 1), (earned, 2), (fails_outside, 1)):
        with suppress(ArithmeticError), looking(path, "demo", "sides", {"width": width}, "d") as look:
            nested_search(outer[::-1], PurgedKFold(3), t, end, every({"long": width, "short": -width}), score, look=look)
    rows = read_rows(path)
    assert [(r["status"], r["fits"], r["n_bars"]) for r in rows] == [("ok", 7 * len(outer), 150), ("ok", 7 * len(outer), 150), ("failed", 7, 0)]
    assert len({r["params_id"] for r in rows}) == 2
    assert (pd.Timestamp(rows[0]["start"]), pd.Timestamp(rows[0]["end"])) == (t[150], t[-1])
    assert rows[-1]["error"] == "ArithmeticError: the last window"


def test_label_ends_without_the_zone_of_the_times_are_refused() -> None:
    t = pd.date_range("2020-01-01 16:00", periods=100, freq="B", tz="America/New_York", unit="us")
    end = pd.Series(t).shift(-3)
    whole = WalkForward(30, 20).folds(t, end)
    for times, ends in ((t, end.dt.tz_localize(None)), (t.tz_localize(None), end), (t, end.to_numpy("datetime64[us]"))):
        with pytest.raises(DataError, match="overlaps would be missed"):
            WalkForward(30, 20).folds(times, ends)
    for times, ends in ((t, end.to_numpy()), (t.tz_convert("UTC"), end.to_numpy("datetime64[us]")), (t.to_numpy("datetime64[us]"), end.dt.tz_convert("UTC"))):
        for one, other in zip(whole, WalkForward(30, 20).folds(times, ends), strict=True):
            np.testing.assert_array_equal(one.train, other.train)


@pytest.mark.parametrize("same", [0.1, 1e-4 / 3, 0.0])
def test_a_candidate_that_always_earns_the_same_is_not_the_best(same: float) -> None:
    t = pd.date_range("2020-01-01", periods=300, freq="D", tz="UTC", unit="us")
    r = pd.Series(0.01 * np.random.default_rng(0).normal(size=300), t)
    found = nested_search(WalkForward(150, 50).folds(t, t), PurgedKFold(3), t, t, every({"same": 0, "moves": 1}), lambda side, _, test: r.iloc[test] if side else r.iloc[test] * 0 + same)
    assert set(found.loc[found["candidate"] == "same", "status"]) == {"failed"}
    assert found["error"].str.contains("variance is zero").sum() == len(found) / 2
    assert found.loc[found["chosen"], "candidate"].unique().tolist() == ["moves"]
