"""The validation floor: no leak in any split, no unnoticed edit of a ledger, no luck that passes for skill."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from mltrading.core.errors import DataError, LeakError, ParameterError
from mltrading.core.params import block
from mltrading.features.machine import FeatureBlock
from mltrading.features.redundancy import ic
from mltrading.market.http import secret
from mltrading.validation import inference, metrics, splits, trials

BARS = pd.date_range("2020-01-01 21:00", periods=120, freq="B", tz="UTC", unit="us")
AXIS = BARS.tz_localize(None).to_numpy()


@st.composite
def long_rows(draw):
    """Rows of up to four symbols with holes, labels of any length, some never complete, and a walk over them."""
    n_bars = draw(st.integers(8, 60))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    alive = rng.random((n_bars, draw(st.integers(1, 4)))) < draw(st.sampled_from([0.6, 1.0]))
    alive[:, 0] = True
    bar = np.nonzero(alive)[0]
    length = rng.integers(0, draw(st.integers(1, 6)), len(bar))
    end = np.where(bar + length < n_bars, AXIS[np.minimum(bar + length, n_bars - 1)], np.datetime64("NaT"))
    train = draw(st.integers(2, n_bars - 1))
    walk = splits.WalkForward(train, draw(st.integers(1, 15)), draw(st.integers(0, min(3, train - 1))), draw(st.booleans()))
    return AXIS[bar], end, AXIS[:n_bars], walk


def folds_or_none(walk, *rows):
    """The folds, or nothing where a fold has nothing to learn from."""
    try:
        return walk.folds(*rows)
    except DataError as error:
        if "has a label known before" in str(error):
            return None
        raise


@settings(max_examples=200, deadline=None)
@given(long_rows())
def test_no_training_label_touches_the_test_window(case):
    t, end, bars, walk = case
    folds = folds_or_none(walk, t, end, bars)
    for f in folds or []:
        learned = end[f.train]
        assert not np.isnat(learned).any()
        assert (learned < f.test_start).all()
        assert np.searchsorted(bars, f.test_start) - np.searchsorted(bars, learned.max()) > walk.embargo_bars
        assert (t[f.train] >= f.train_start).all()
        assert ((t[f.test] >= f.test_start) & (t[f.test] <= f.test_end)).all()
        window = (t >= f.train_start) & (t < f.test_start)
        np.testing.assert_array_equal(np.flatnonzero(window), np.sort(np.concatenate([f.train, f.purged, f.embargoed])))


@settings(max_examples=200, deadline=None)
@given(long_rows())
def test_each_row_is_judged_once(case):
    t, end, bars, walk = case
    folds = folds_or_none(walk, t, end, bars)
    if folds is not None:
        judged = np.concatenate([f.test for f in folds])
        np.testing.assert_array_equal(judged, np.flatnonzero(t >= bars[walk.train_bars]))


@settings(max_examples=200, deadline=None)
@given(long_rows(), st.data())
def test_a_longer_history_leaves_old_folds_alone(case, data):
    t, end, bars, walk = case
    cut = data.draw(st.integers(walk.train_bars + 1, len(bars)))
    old = t < bars[cut - 1] + np.timedelta64(1, "us")
    known = np.where(end <= bars[cut - 1], end, np.datetime64("NaT"))
    now, then = folds_or_none(walk, t, end, bars), folds_or_none(walk, t[old], known[old], bars[:cut])
    if now is None or then is None:
        return
    for a, b in zip(then, now, strict=False):
        np.testing.assert_array_equal(a.train, b.train)
        assert (a.number, a.test_start, a.train_end, list(a.purged), list(a.embargoed)) == (b.number, b.test_start, b.train_end, list(b.purged), list(b.embargoed))
        if b.test_end < bars[cut - 1]:
            np.testing.assert_array_equal(a.test, b.test)


@settings(max_examples=200, deadline=None)
@given(long_rows(), st.integers(1, 3), st.integers(0, 40))
def test_calendar_windows_begin_with_a_month_and_tile_the_axis(case, months, later):
    t, end, bars, walk = case
    walk, shift = splits.WalkForward(walk.train_bars, None, walk.embargo_bars, walk.anchored, test_months=months), np.timedelta64(later, "D")
    t, end, bars = t + shift, end + shift, bars + shift
    month = bars.astype("datetime64[M]").astype(int)
    first = [s for s in range(walk.train_bars, len(bars)) if month[s] != month[s - 1]]
    if not first:
        with pytest.raises(DataError, match="no month begins after"):
            walk.folds(t, end, bars)
        return
    folds = folds_or_none(walk, t, end, bars)
    if folds is None:
        return
    starts, ends = (np.searchsorted(bars, [getattr(f, name) for f in folds]) for name in ("test_start", "test_end"))
    assert list(starts) == [s for s in first if (month[s] - month[first[0]]) % months == 0]
    assert list(starts[1:]) == list(ends[:-1] + 1)
    assert ends[-1] == len(bars) - 1
    np.testing.assert_array_equal(np.concatenate([f.test for f in folds]), np.flatnonzero(t >= bars[first[0]]))
    for f, s in zip(folds, starts, strict=True):
        assert (end[f.train] < bars[s - walk.embargo_bars]).all()
        assert f.train_start == bars[0 if walk.anchored else s - walk.train_bars]
        window = (t >= f.train_start) & (t < f.test_start)
        np.testing.assert_array_equal(np.flatnonzero(window), np.sort(np.concatenate([f.train, f.purged, f.embargoed])))


@settings(max_examples=100, deadline=None)
@given(long_rows(), st.integers(1, 2), st.data())
def test_a_longer_history_leaves_old_months_alone(case, months, data):
    t, end, bars, walk = case
    walk = splits.WalkForward(walk.train_bars, None, walk.embargo_bars, walk.anchored, test_months=months)
    cut = data.draw(st.integers(walk.train_bars + 1, len(bars)))
    old = t <= bars[cut - 1]
    known = np.where(end <= bars[cut - 1], end, np.datetime64("NaT"))
    try:
        now, then = walk.folds(t, end, bars), walk.folds(t[old], known[old], bars[:cut])
    except DataError:
        return
    for a, b in zip(then, now, strict=False):
        np.testing.assert_array_equal(a.train, b.train)
        assert (a.number, a.test_start, a.train_end, list(a.purged), list(a.embargoed)) == (b.number, b.test_start, b.train_end, list(b.purged), list(b.embargoed))


def test_a_month_without_bars_begins_no_window():
    bars = BARS.union(BARS + pd.DateOffset(months=8))
    bars = bars[bars.month != 3]
    ends = bars.to_series().shift(-1).array
    starts = [str(f.test_start)[:10] for f in splits.WalkForward(10, None, test_months=1).folds(bars, ends)]
    assert starts[:3] == ["2020-02-03", "2020-04-01", "2020-05-01"]
    every_other = [str(f.test_start)[:10] for f in splits.WalkForward(10, None, test_months=2).folds(bars, ends)]
    assert every_other[:2] == ["2020-02-03", "2020-04-01"]
    late = splits.WalkForward(10, None, test_months=1).folds(bars[bars.month != 2], bars[bars.month != 2].to_series().shift(-1).array)
    assert str(late[0].test_start)[:10] == "2020-04-01"


@pytest.mark.parametrize("lengths", [{"test_bars": None}, {"test_bars": 20, "test_months": 1}])
def test_windows_have_one_length(lengths):
    params = {"train_bars": 30, "embargo_bars": 0, "anchored": False, **lengths}
    with pytest.raises(ParameterError, match=r"validation\.test_bars: is .* one of the two says"):
        block(splits.ValidationParams, params, "validation")
    with pytest.raises(ParameterError, match=r"validation\.test_bars: is "):
        splits.WalkForward(**params)


@settings(max_examples=100, deadline=None)
@given(long_rows(), st.data())
def test_the_seal_breaks_on_any_purged_row(case, data):
    t, end, bars, walk = case
    folds = folds_or_none(walk, t, end, bars)
    for f in folds or []:
        bad = np.flatnonzero((t < f.test_start) & ~(end < f.test_start))
        if len(bad):
            row = data.draw(st.sampled_from(list(bad)))
            leaky = splits.Fold(**{**vars(f), "train": np.union1d(f.train, [row])})
            with pytest.raises(LeakError, match=f"row {row} "):
                splits.check_fold(leaky, t, end)
        with pytest.raises(LeakError, match="is learned from and judged"):
            splits.check_fold(splits.Fold(**{**vars(f), "train": np.append(f.train, f.test[0])}), t, end)


def returns_list(low=-0.2, high=0.2):
    return st.lists(st.floats(low, high, allow_nan=False), min_size=2, max_size=60).filter(lambda x: np.ptp(x) > 1e-4)


@settings(max_examples=100, deadline=None)
@given(returns_list())
def test_metrics_keep_their_bounds(values):
    found = metrics.performance(values)
    assert -1 <= found["max_drawdown"] <= 0
    assert np.isnan(found["hit_rate"]) or 0 <= found["hit_rate"] <= 1
    assert found["es_95"] <= found["var_95"] + 1e-15
    assert found["kurtosis"] >= 1 + found["skew"] ** 2 - 1e-9
    assert 0 <= found["longest_drawdown_bars"] <= len(values)


@settings(max_examples=50, deadline=None)
@given(returns_list(), st.floats(0.1, 2))
def test_sharpe_does_not_depend_on_size(values, size):
    r = np.array(values)
    assert metrics.sharpe_annual(r * size) == pytest.approx(metrics.sharpe_annual(r), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("bad", [[0.01], [], [0.0] * 10, [0.1, np.nan], [0.1, np.inf], [0.1, -1.1], [[0.1, 0.2]]])
def test_what_cannot_be_measured_is_refused(bad):
    for function in (metrics.performance, metrics.sharpe_annual, lambda r: inference.bootstrap_intervals(r, 0), inference.optimal_block):
        if function is inference.optimal_block and bad == [0.1, -1.1]:
            continue  # a series to be redrawn may be anything
        with pytest.raises(DataError):
            function(bad)


def test_bootstrap_is_deterministic():
    r = 0.01 * np.random.default_rng(0).standard_t(4, 700)
    a, b = (inference.bootstrap_metrics(r, seed=7, n_boot=300) for _ in range(2))
    assert a.to_numpy().tobytes() == b.to_numpy().tobytes()
    pd.testing.assert_frame_equal(a.iloc[:250], inference.bootstrap_metrics(r, seed=7, n_boot=250))
    assert (a["sharpe_annual"] != inference.bootstrap_metrics(r, seed=8, n_boot=300)["sharpe_annual"]).all()


def test_bootstrap_scatters_as_arch_does():
    from arch.bootstrap import StationaryBootstrap

    r = 0.01 * np.random.default_rng(1).standard_t(4, 1000)
    ours = inference.bootstrap_metrics(r, seed=1, n_boot=2000, block=15)[["sharpe_annual", "max_drawdown", "es_95"]].to_numpy()

    def three(x):
        return np.array([metrics.sharpe_annual(x), metrics.max_drawdown(x), metrics.es_95(x)])

    theirs = StationaryBootstrap(15, r, seed=2).apply(three, 2000)
    np.testing.assert_allclose(ours.mean(axis=0), theirs.mean(axis=0), atol=4 * ours.std(axis=0).max() / np.sqrt(2000))
    np.testing.assert_allclose(ours.std(axis=0), theirs.std(axis=0), rtol=0.1)


def test_optimal_block_equals_arch():
    from arch.bootstrap import optimal_block_length

    rng = np.random.default_rng(2)
    for phi in (0.0, 0.2, 0.6, -0.3):
        x = rng.normal(size=1500)
        for i in range(1, len(x)):
            x[i] += phi * x[i - 1]
        assert inference.optimal_block(x) == pytest.approx(max(1.0, optimal_block_length(x)["stationary"].iloc[0]), rel=1e-9)


def ledger_of(path: Path, block: np.ndarray) -> pd.DataFrame:
    index = pd.date_range("2010-01-04 21:00", periods=len(block), freq="B", tz="UTC", unit="us")
    trials.record(path, [trials.trial("noise", "rule", {"number": i}, "d", pd.Series(block[:, i], index=index)) for i in range(block.shape[1])])
    return trials.read(path)


@pytest.mark.slow
def test_noise_does_not_pass_and_a_planted_signal_does(tmp_path):
    rng = np.random.default_rng(0)
    noise = 0.01 * rng.normal(size=(2520, 200))
    ledger = ledger_of(tmp_path / "noise.jsonl", noise)
    passed = sum(trials.deflated(noise[:, i], ledger)["dsr"] > 0.95 for i in range(200))
    assert passed <= binom.ppf(0.99, 200, 0.05)
    planted = noise.copy()
    planted[:, 0] = (noise[:, 0] - noise[:, 0].mean()) / noise[:, 0].std(ddof=1) * 0.01 + 0.01 * 1.5 / np.sqrt(252)
    found = trials.deflated(planted[:, 0], ledger_of(tmp_path / "planted.jsonl", planted))
    assert found["sharpe_annual"] == pytest.approx(1.5)
    assert found["n_trials"] == 200
    assert found["dsr"] > 0.95


@pytest.fixture
def ledger_lines(tmp_path):
    ledger_of(tmp_path / "x.jsonl", 0.01 * np.random.default_rng(4).normal(size=(100, 6)))
    return (tmp_path / "x.jsonl").read_text().splitlines(), tmp_path / "bad.jsonl"


@pytest.mark.parametrize("i", range(6))
def test_tampering_with_any_row_is_noticed(ledger_lines, i):
    lines, bad = ledger_lines
    changed = [
        lines[:i] + lines[i + 1:],                                                      # removed
        [*lines[:i], lines[i].replace('"fits":1', '"fits":0'), *lines[i + 1:]],         # edited
        [*lines[:i], lines[i].replace('"number":', '"number": '), *lines[i + 1:]],      # reformatted
        [*lines[:i + 1], lines[i], *lines[i + 1:]],                                     # repeated
        [*lines[:i], lines[i][:40]],                                                    # cut short
        lines[:i + 1],                                                                  # closing line lost
        [*lines[:i], lines[-1]],                                                        # tail removed, closing line kept
        [*lines[:i], lines[i], "", *lines[i + 1:]],                                     # an empty line
    ]
    if i < 5:
        changed.append([*lines[:i], lines[i + 1], lines[i], *lines[i + 2:]])            # moved
    for text in changed:
        bad.write_text("".join(line + "\n" for line in text))
        with pytest.raises(DataError, match=r"(row|line) \d+"):
            trials.read(bad)
        with pytest.raises(DataError):
            trials.record(bad, [])


def test_recording_again_changes_no_byte(tmp_path):
    block = 0.01 * np.random.default_rng(4).normal(size=(100, 6))
    path = tmp_path / "x.jsonl"
    ledger_of(path, block)
    before, stamp = path.read_bytes(), path.stat().st_mtime_ns
    ledger_of(path, block)
    assert (path.read_bytes(), path.stat().st_mtime_ns) == (before, stamp)
    for name in (b"time", b"host", str(tmp_path).encode()):
        assert name not in before


def test_returns_that_were_not_recorded_are_not_deflated(tmp_path):
    block = 0.01 * np.random.default_rng(4).normal(size=(100, 3))
    ledger = ledger_of(tmp_path / "x.jsonl", block[:, :2])
    with pytest.raises(DataError, match="not in the ledger"):
        trials.deflated(block[:, 2], ledger)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_one_coefficient_for_rows_and_for_blocks(seed):
    """A forecast as rows, and the same as a feature block with holes, have the same information coefficients to the bit."""
    rng = np.random.default_rng(seed)
    score, ret = rng.normal(size=(2, 7, 12)).round(1)
    score[rng.random(score.shape) < 0.3] = np.nan
    symbols, stamps = tuple("ABCDEFG"), AXIS[:12]
    block = FeatureBlock(("f",), stamps, symbols, score[None], np.isfinite(score))
    column, row = np.nonzero(np.isfinite(score).T)
    by_row = metrics.ic_by_time(score[row, column], ret[row, column], BARS[column])
    pd.testing.assert_series_equal(by_row, ic(block, ret, least=3)["f"].dropna(), check_exact=True, check_names=False, check_freq=False)


def test_a_failure_in_a_look_is_recorded_without_what_is_private(tmp_path, monkeypatch):
    """The ledger stands in the repository: no key, no folder of this machine, no address in its memory."""
    monkeypatch.setenv("SOME_API_KEY", "k3y-that-nobody-may-see")
    secret("SOME_API_KEY")
    path = tmp_path / "x.jsonl"
    for look in (trials.looking, trials.failure_recorded):
        with pytest.raises(OSError, match="k3y"), look(path, "demo", look.__name__, {}, "d0"):
            raise OSError(f"asked k3y-that-nobody-may-see for '{tmp_path}/prices.parquet',\nand got an array at 0x7f3a2b")
    rows = trials.read_rows(path)
    assert [r["status"] for r in rows] == ["failed"] * 2
    assert {r["error"] for r in rows} == {"OSError: asked *** for '…/prices.parquet', and got an array at 0x…"}


def test_what_is_not_a_table_of_trials_is_refused(tmp_path):
    ledger_of(tmp_path / "x.jsonl", 0.01 * np.random.default_rng(4).normal(size=(100, 3)))
    for of in (trials.trial_count, trials.weekly_returns, trials.effective_trials, trials.sharpe_variance, trials.search_overfitting, lambda x: trials.deflated([0.1, 0.2], x)):
        for wrong in (tmp_path / "x.jsonl", str(tmp_path / "x.jsonl"), pd.DataFrame({"a": [1]})):
            with pytest.raises(ParameterError, match="table of trials"):
                of(wrong)


def test_a_look_that_could_not_be_recorded_is_refused_before_it_begins(tmp_path):
    """Otherwise the window would be seen, and nobody would count it."""
    broken = tmp_path / "broken.jsonl"
    broken.write_text("x\n")
    for path, params, bars_per_year, said in ((tmp_path / "a.jsonl", {"model": object()}, 252, "params"), (tmp_path / "b.jsonl", {}, 0, "make no year"), (broken, {}, 252, "not a whole row"), (tmp_path, {}, 252, "no such ledger")):
        for look in (trials.looking, trials.failure_recorded):
            begun = []
            with pytest.raises((DataError, ParameterError), match=said), look(path, "demo", "x", params, "d0", bars_per_year):
                begun.append(1)
            assert not begun


def test_returns_in_another_form_are_told_and_counted(tmp_path):
    path, r = tmp_path / "x.jsonl", pd.Series(0.01 * np.random.default_rng(0).normal(size=len(BARS)), BARS)
    for n, wrong in enumerate((r.to_frame(), r.to_numpy(), r[::-1]), 1):
        with pytest.raises(DataError, match=r"Series of returns|order of time"), trials.looking(path, "demo", "x", {"n": n}, "d0") as look:
            look.show(wrong)
        assert [row["status"] for row in trials.read_rows(path)] == ["failed"] * n


def test_a_lock_is_the_same_for_every_user_and_folder_of_temporary_files(tmp_path, monkeypatch):
    """Whoever holds the lock of a ledger holds off a process with another TMPDIR; and no file is left beside the ledger."""
    path, row = tmp_path / "books" / "x.jsonl", trials.trial("demo", "x", {}, "d", None, error="tried")
    code = "import sys; from mltrading.validation import trials; print('ready', flush=True); trials.record(sys.argv[1], [trials.trial('demo', 'y', {}, 'd', None, error='tried')])"
    with trials._alone(path):
        other = subprocess.Popen([sys.executable, "-c", code, str(path)], env=os.environ | {"TMPDIR": str(tmp_path)}, stdout=subprocess.PIPE)
        assert other.stdout.readline() == b"ready\n"
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(0.5)
        assert not path.exists()
    assert other.wait(30) == 0
    other.stdout.close()
    trials.record(path, [row])
    assert [r["model"] for r in trials.read_rows(path)] == ["y", "x"]
    assert list(path.parent.iterdir()) == [path]


def test_returns_that_cannot_be_measured_are_warned_of(tmp_path):
    path, r = tmp_path / "x.jsonl", pd.Series(0.01 * np.random.default_rng(0).normal(size=len(BARS)), BARS)
    for n, wrong in enumerate((1e4 * r, r.where(r > 0), r[:1]), 1):
        with pytest.warns(UserWarning, match="recorded as a failed trial"), trials.looking(path, "demo", "x", {"n": n}, "d0") as look:
            look.show(wrong)
        assert [row["status"] for row in trials.read_rows(path)] == ["failed"] * n


def test_a_part_of_a_ledger_is_refused(tmp_path):
    block = 0.01 * np.random.default_rng(4).normal(size=(400, 6))
    ledger = ledger_of(tmp_path / "x.jsonl", block)
    for of in (trials.trial_count, trials.weekly_returns, trials.effective_trials, trials.sharpe_variance, trials.search_overfitting, lambda x: trials.deflated(block[:, 2], x)):
        of(ledger.sample(frac=1, random_state=0))  # in another order it is still whole
        for part in (ledger[ledger["sharpe_bar"] > 0], ledger[2:], ledger[:-1], ledger[:0], pd.concat([ledger, ledger[:1]])):
            with pytest.raises(ParameterError, match="not all that was tried"):
                of(part)
