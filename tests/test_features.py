"""Features on panels that are ragged, frozen, tiny or huge: the same bits under truncation, and never an infinity."""

import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mltrading.cli import main
from mltrading.core.errors import DataError, LeakError, ParameterError
from mltrading.features import audit as audit_module
from mltrading.features import proof
from mltrading.features.audit import audit, audit_function, check_causal, check_registry
from mltrading.features.engine import plain
from mltrading.features.expressions import lag
from mltrading.features.expressions import macro as macro_
from mltrading.features.futures import other_future, other_releases
from mltrading.features.machine import Context, FeatureBlock
from mltrading.features.registry import SETS, catalogue, choose, compute, lookup, write_features
from mltrading.features.stream import Stream
from mltrading.market.macro import History, check_macro
from mltrading.market.panel import Panel, to_frame, until
from mltrading.market.simulate import bridge_intraday, made_up_fields, made_up_releases, random_walk, regime_market

SHORT = settings(max_examples=6, deadline=None, derandomize=True)


def needed() -> tuple[set[str], set[str]]:
    """What the registry reads: fields of panels, and macro series."""
    needs = {n for f in lookup() for n in f.needs}
    return {n for n in needs if ":" not in n} - {"benchmark", "others"}, {n.removeprefix("macro:") for n in needs if n.startswith("macro:")}


def with_all_fields(panel: Panel) -> Panel:
    """The panel with every further field that a feature reads."""
    return made_up_fields(panel, needed()[0])


def releases(panel: Panel, seed: int = 0) -> pd.DataFrame:
    """Daily figures of every series that a feature reads."""
    return made_up_releases(panel, needed()[1], seed)


@st.composite
def panels(draw: st.DrawFn) -> Panel:
    """Ragged panels with prices from 1e-12 to 1e12, frozen stretches, jumps, bars without volume or range."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    base = random_walk(draw(st.integers(1, 4)), draw(st.integers(30, 330)), int(rng.integers(1 << 30)), closes_only=draw(st.integers(0, 1)))
    scale = 10.0 ** np.array([draw(st.sampled_from([-12, 0, 12])) for _ in base.symbols])[:, None]
    fields = {k: b * (1 if k == "volume" else scale) for k, b in base.fields.items()}
    t = len(base)
    if draw(st.booleans()):  # a stretch in which nothing moves
        a, b = sorted(rng.integers(0, t, 2))
        for k in ("open", "high", "low", "close"):
            fields[k][:, a:b] = np.where(np.isnan(fields[k][:, a:b]), np.nan, fields["close"][:, [a]])
        fields["close"][:, a:b] = np.where(np.isnan(base["close"][:, a:b]), np.nan, fields["close"][:, a:b])
    if draw(st.booleans()):
        fields["volume"][rng.random(fields["volume"].shape) < 0.2] *= 0.0
    if draw(st.booleans()):  # one jump by a factor of a million
        k = int(rng.integers(1, t))
        for f in ("open", "high", "low", "close"):
            fields[f][:, k:] *= 1e6
    return with_all_fields(Panel(base.times, base.symbols, fields))


@SHORT
@given(panels(), st.floats(0.05, 0.95))
def test_truncation_changes_no_bit_and_nothing_is_infinite(panel: Panel, place: float) -> None:
    macro, benchmark = releases(panel), panel.symbols[0]
    whole = compute(panel, "all", macro, benchmark, short=True)
    assert not np.isinf(whole.values).any()
    assert np.isnan(whole.values[:, ~panel.alive]).all()
    cut = panel.times[int(place * (len(panel) - 1))]
    part = compute(until(panel, cut), whole.names, macro[macro["timestamp"] <= pd.Timestamp(cut, tz="UTC")], benchmark, short=True, threads=1)
    assert part.values.tobytes() == np.ascontiguousarray(whole.values[:, :, : part.values.shape[2]]).tobytes()
    single = compute(panel, whole.names, macro, benchmark, short=True, dtype=np.float32)
    assert not np.isinf(single.values).any()


def one_symbol(**fields: float | np.ndarray) -> Panel:
    """Bars of one symbol."""
    bars = max(np.size(x) for x in fields.values())
    times = np.datetime64("2020-01-01T21:00", "us") + np.arange(bars) * np.timedelta64(1, "D")
    return with_all_fields(Panel(times, ("A",), {k: np.broadcast_to(np.asarray(v, float), (1, bars)).copy() for k, v in fields.items()}))


N = 700
WALK = 100 * np.exp(np.cumsum(0.01 * np.random.default_rng(0).standard_normal(N)))
ODD = {
    "nothing moves": one_symbol(open=np.full(N, 7.1), high=7.1, low=7.1, close=7.1, volume=1000.0),
    "nothing moves or trades": one_symbol(open=np.full(N, 7.1), high=7.1, low=7.1, close=7.1, volume=0.0),
    "always grows by the same rate": one_symbol(open=100 * 1.0002 ** np.arange(N), high=100 * 1.0002 ** np.arange(N), low=100 * 1.0002 ** np.arange(N), close=100 * 1.0002 ** np.arange(N), volume=1000.0),
    "no volume": one_symbol(open=WALK, high=1.01 * WALK, low=0.99 * WALK, close=WALK, volume=0.0),
    "one bar": one_symbol(open=1.0, high=2.0, low=0.5, close=1.5, volume=10.0),
    "two bars": one_symbol(open=[1.0, 1.0], high=2.0, low=0.5, close=1.5, volume=10.0),
    "no bar at all": one_symbol(open=np.full(N, np.nan), high=np.nan, low=np.nan, close=np.nan, volume=np.nan),
    "tiny": one_symbol(open=1e-12 * WALK, high=1.01e-12 * WALK, low=0.99e-12 * WALK, close=1e-12 * WALK, volume=1e-6),
    "huge": one_symbol(open=1e12 * WALK, high=1.01e12 * WALK, low=0.99e12 * WALK, close=1e12 * WALK, volume=1e18),
    "from tiny to huge": one_symbol(open=10.0 ** np.linspace(-12, 12, N), high=1.2 * 10.0 ** np.linspace(-12, 12, N), low=0.9 * 10.0 ** np.linspace(-12, 12, N), close=10.0 ** np.linspace(-12, 12, N), volume=10.0 ** np.linspace(12, -12, N)),
    "lists late": one_symbol(**{k: np.where(np.arange(N) < 600, np.nan, WALK * f) for k, f in (("open", 1), ("high", 1.01), ("low", 0.99), ("close", 1), ("volume", 50))}),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_bars_give_defined_values_or_none(name: str) -> None:
    panel = ODD[name]
    block = compute(panel, "all", releases(panel), "A", short=True)
    assert len(block.names) > 100
    assert not np.isinf(block.values).any()
    wild = {n: float(np.nanmax(np.abs(v))) for n, v in zip(block.names, block.values, strict=True) if "tiny to" not in name and np.isfinite(v).any() and np.nanmax(np.abs(v)) > 1e7}
    assert not wild, "rounding errors were divided by rounding errors"
    assert np.isnan(block.values[:, ~panel.alive]).all()


def test_scale_makes_no_difference_to_what_has_no_unit() -> None:
    base = random_walk(3, 600, seed=4, ragged=False)
    panels = [with_all_fields(Panel(base.times, base.symbols, {k: b * (scale if k != "volume" else 1.0) for k, b in base.fields.items()})) for scale in (1.0, 2.0**30)]
    one, two = (compute(p, "all", None, "S001") for p in panels)
    for name in one.names:
        np.testing.assert_allclose(one[name], two[name], rtol=1e-6, atol=1e-9, err_msg=name)


def test_bar_by_bar_is_what_was_computed_at_once() -> None:
    panel = with_all_fields(random_walk(4, 420, seed=9, closes_only=1))
    macro = releases(panel)
    whole = compute(panel, "all", macro, "S001", short=True)
    stream = Stream(whole.names, panel.symbols, macro, "S001")
    stream.catch_up(until(panel, panel.times[299]))
    live = [stream.update(panel.times[k], {f: b[:, k] for f, b in panel.fields.items()}) for k in range(300, 420)]
    assert np.stack(live, axis=2).tobytes() == np.ascontiguousarray(whole.values[:, :, 300:]).tobytes()


@pytest.mark.slow  # the page of the proof does the same with few cuts
def test_every_registered_feature_passes_the_audit() -> None:
    longest = max(f.warmup for f in lookup())
    daily = with_all_fields(random_walk(6, longest + 80, seed=11, closes_only=1))
    table = check_registry(daily, "all", releases(daily), "S001", cuts=20, seed=3)
    within = with_all_fields(bridge_intraday(regime_market(n_symbols=3, n_bars=60, seed=5)[0], "15m", "XNYS", seed=1))
    names = [f.name for f in lookup() if "clock:session" in f.needs]
    inside = check_registry(within, names, releases(within), within.symbols[1], "XNYS", cuts=20, seed=3)
    assert set(table["feature"]) | set(inside["feature"]) == {f.name for f in lookup()}
    assert (table["cuts"] >= 10).all()


def test_the_audit_is_deterministic() -> None:
    panel = random_walk(4, 300, seed=1)
    pd.testing.assert_frame_equal(audit(panel, ["ret_5d", "vol_20d"], seed=4), audit(panel, ["ret_5d", "vol_20d"], seed=4))


def test_a_leak_through_macro_is_found() -> None:
    panel = random_walk(2, 200, seed=2, ragged=False)
    macro = releases(panel)

    def late(p: Panel, m: pd.DataFrame) -> pd.DataFrame:
        vix = m[m["series"] == "vix"].set_index("timestamp")["value"].sort_index()
        return pd.DataFrame({s: vix.reindex(p.index, method="bfill") for s in p.symbols})

    assert audit_function(late, panel, macro)["leaks"].all()
    with pytest.raises(LeakError, match=r"feature `late`, S00\d at .* is .*, but .* when everything after"):
        check_causal(late, panel, macro, name="late")


def test_another_future_keeps_the_past_and_changes_all_else() -> None:
    panel = random_walk(8, 200, seed=6, closes_only=2)
    t = panel.times[120]
    other = other_future(panel, t, np.random.default_rng(0))
    for field, block in panel.fields.items():
        np.testing.assert_array_equal(other[field][:, :121], block[:, :121])
        both = panel.alive[:, 121:] & other.alive[:, 121:]
        assert not (other[field][:, 121:] == block[:, 121:])[both].any()
    was, now = (p.alive[:, 121:].any(axis=1) for p in (panel, other))
    assert (was & ~now).any()
    high, low = (other[f][:, 121:] for f in ("high", "low"))
    assert (high >= low)[~np.isnan(high)].all()


def test_another_future_revises_old_macro_figures() -> None:
    macro = releases(random_walk(2, 200, seed=2, ragged=False)).sort_values("timestamp", kind="stable", ignore_index=True)
    t = pd.Timestamp("2015-06-01", tz="UTC")
    other = check_macro(other_releases(macro, t.tz_localize(None).to_datetime64(), np.random.default_rng(0)), "changed")
    pd.testing.assert_frame_equal(other[other["timestamp"] <= t].reset_index(drop=True), macro[macro["timestamp"] <= t].reset_index(drop=True))
    known = macro[macro["timestamp"] <= t].set_index(["series", "reference"]).index
    later = other[other["timestamp"] > t].set_index(["series", "reference"])
    assert later.index.isin(known).sum() > 100
    assert later["timestamp"].is_monotonic_increasing
    removed = macro[macro["timestamp"] > t].set_index(["series", "reference"]).index.difference(later.index)
    assert len(removed) > 10


@pytest.mark.parametrize("cuts", [1, 2, 8, 30])
def test_a_whole_sample_mean_is_found_with_few_cuts(cuts: int) -> None:
    panel = random_walk(3, 60, seed=1)
    table = audit_function(lambda p: p.view("close") - p.view("close").mean(), panel, cuts=cuts)
    assert table["leaks"].all()
    assert (table["cuts"] == cuts).all()


def test_a_function_of_luck_or_of_memory_is_no_leak_but_an_error() -> None:
    panel, rng, calls = random_walk(3, 60, seed=1), np.random.default_rng(), iter(range(100))
    with pytest.raises(DataError, match="on the same input"):
        check_causal(lambda p: p.view("close") + rng.standard_normal(), panel)
    with pytest.raises(DataError, match="on the same input"):
        check_causal(lambda p: p.view("close").iloc[next(calls) :], panel)


def test_a_leak_is_told_before_an_error_of_another_cut() -> None:
    panel = random_walk(3, 200, seed=1)

    def short(p: Panel, shift: int) -> pd.DataFrame:
        if len(p) < 100:
            raise ValueError("too few bars")
        return p.view("close").shift(shift)

    with pytest.raises(DataError, match=r"(?s)`function`, cut at .*fails on its \d+ instants \(ValueError: too few bars\).*give `warmup`"):
        check_causal(lambda p: short(p, 1), panel)
    check_causal(lambda p: short(p, 1), panel, warmup=100)
    with pytest.raises(LeakError):
        check_causal(lambda p: short(p, -1), panel)


@pytest.fixture
def peeking(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry whose last feature looks ahead by a bar."""
    def peek(*args: Any, **options: Any) -> FeatureBlock:
        block = compute(*args, **options)
        block.values[-1] = np.roll(block.values[-1], -1, axis=1)
        return block
    monkeypatch.setattr(audit_module, "compute", peek)


@pytest.mark.usefixtures("peeking")
def test_a_registered_feature_that_looks_ahead_is_named() -> None:
    panel = random_walk(4, 200, seed=1)
    table = audit(panel, ["ret_5d", "vol_20d", "ret_1d"])
    assert table["leaks"].tolist() == [False, False, True]
    with pytest.raises(LeakError, match=r"(?s)feature `ret_1d`, S00\d at .* is .*, but .* when everything after .*→ it reaches past its stamp"):
        check_registry(panel, ["ret_5d", "vol_20d", "ret_1d"])


def test_large_panels_are_audited_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    panel, names = random_walk(4, 200, seed=1), ["ret_5d", "vol_20d", "ret_1d"]
    whole = audit(panel, names)
    monkeypatch.setattr(audit_module, "PART_BYTES", 2 * 4 * 200 * 8)
    pd.testing.assert_frame_equal(audit(panel, names), whole)


def test_a_warmup_that_is_not_kept_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    panel = random_walk(4, 200, seed=1)
    monkeypatch.setattr(audit_module, "lookup", lambda names: [replace(f, expr=lag(f.expr, 2)) for f in lookup(names)])
    with pytest.raises(DataError, match="feature `ret_1d`: has its first value after 1 of a symbol's bars, and declares 3"):
        check_registry(panel, ["ret_1d"])


def test_the_catalogue_is_complete() -> None:
    table = catalogue()
    assert table["name"].is_unique
    assert len(table) >= 700
    assert table[["name", "family", "about", "unit", "formula", "needs", "source"]].map(lambda s: bool(s) and "{" not in s).all(axis=None)
    assert (table["warmup"] >= 0).all()


def test_all_features_are_those_that_the_panel_can_feed() -> None:
    panel = random_walk(3, 300, seed=3)
    closes = Panel(panel.times, panel.symbols, {"close": panel["close"]})
    without = set(compute(closes).names)
    assert not {f.name for f in lookup() if set(f.needs) & {"high", "low", "open", "volume", "benchmark", "macro:vix"}} & without
    assert {"ret_5d", "rank_ret_5d", "dow_sin"} <= without
    for one in ("adx_14", ["ret_5d", "adx_14"]):
        with pytest.raises(DataError, match=r"has no field `high`, which `adx_14` needs"):
            compute(closes, one)
    of_set = compute(closes, "alpha158")
    assert np.isnan(of_set["a158_klen"]).all()
    assert not np.isnan(of_set["a158_roc_5"]).all()
    with pytest.raises(ParameterError, match="needs a benchmark"):
        compute(panel, ["beta_60"])
    with pytest.raises(ParameterError, match="did you mean `macd_hist_12_26_9`"):
        compute(panel, ["macd_hist_12_26"])


def test_fewer_bars_than_a_warmup() -> None:
    panel = random_walk(3, 200, seed=3)
    with pytest.raises(DataError, match=r"fewer bars than a warm-up: `ret_252d` has its first value after 252 bars, and the longest history has 200"):
        compute(panel, ["ret_1d", "ret_252d"])
    assert compute(panel, ["ret_120d"]).values.shape == (1, 3, 200)


def test_single_precision_is_the_rounded_double() -> None:
    panel = random_walk(5, 400, seed=5)
    double, single = compute(panel), compute(panel, dtype=np.float32)
    np.testing.assert_array_equal(double.values.astype(np.float32), single.values)
    pd.testing.assert_frame_equal(double.to_frame(), single.to_frame(), check_exact=True)


def test_a_stale_or_future_release_is_not_seen() -> None:
    times = np.array(["2020-01-01T21:00", "2020-01-02T21:00", "2020-01-20T21:00"], "datetime64[us]")
    released = np.array(["2020-01-02T21:00", "2020-01-20T21:15"], "datetime64[us]")
    c = Context({"vix": History(released, released, np.array([10.0, 20.0]))}, None, "24/7")
    np.testing.assert_array_equal(c.row(macro_("vix", 10), times), [np.nan, 10.0, np.nan])
    np.testing.assert_array_equal(c.row(macro_("vix", 18), times), [np.nan, 10.0, 10.0])
    assert np.isnan(c.row(macro_("gold", 10), times)).all()


@pytest.mark.slow
def test_the_audit_command_on_the_embedded_snapshot(project: Path, embedded_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(embedded_data, project / "data")
    assert main(["audit"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^ *\d+ features on Panel\(28 symbols × 8313 times, ", said, re.MULTILINE)
    tried = re.search(r"^(\d+) features tried, at up to 8 instants, in \d+\.\d s$", said, re.MULTILINE)
    assert tried
    assert int(tried[1]) == len(catalogue()) >= 1000
    assert "none looks ahead" in said


@pytest.mark.usefixtures("peeking")
def test_the_audit_command_fails_on_a_leak(project: Path, embedded_data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(embedded_data, project / "data")
    few = ["ret_5d", "vol_20d", "ret_1d", "session_ret", "sentiment_level"]
    monkeypatch.setattr(proof, "lookup", lambda names="all": lookup(few if names == "all" else names))
    monkeypatch.setattr(proof, "choose", lambda panel, names, *rest, **options: choose(panel, few[:3], *rest, **options))
    assert main(["audit", "--cuts", "1"]) == 1
    said = capsys.readouterr()
    assert "5 features tried, at up to 1 instants" in said.out
    assert "error: feature `" in said.err
    assert "none looks ahead" not in said.out


@pytest.mark.parametrize("name", ["alpha158", "sequence60", "intraday176", "context10"])
def test_a_set_says_nothing_twice(name: str) -> None:
    features = lookup(name)
    assert len(features) == int(re.sub(r"\D", "", name))
    assert len({id(plain(f.expr, {})) for f in features}) == len(features)


def test_distances_in_standard_deviations_have_one_unit() -> None:
    table = catalogue()
    z = table[table["name"].str.contains(r"(?:^|_)z_") | table["about"].str.contains(r"in (?:their |its )?standard deviations")]
    assert len(z) > 50
    assert set(z["unit"]) == {"standard deviations"}


def of(panel: Panel, k: int, fields: list[str]) -> dict[str, np.ndarray]:
    """Some fields of the bars of an instant."""
    return {f: panel[f][:, k] for f in fields}


def test_a_stream_is_as_strict_as_compute_about_fields() -> None:
    panel = random_walk(3, 120, seed=3)
    stream = Stream("alpha158", panel.symbols)
    live = np.stack([stream.update(t, of(panel, k, list(panel.fields))) for k, t in enumerate(panel.times)], axis=2)
    whole = compute(panel, "alpha158")
    assert stream.names == whole.names
    np.testing.assert_array_equal(live, whole.values)
    assert np.isnan(whole["a158_vwap0"]).all()
    with pytest.raises(DataError, match="have no field `volume`, which earlier bars had"):
        stream.update(panel.times[-1] + np.timedelta64(1, "D"), of(panel, -1, ["open", "high", "low", "close"]))

    at_once = Stream("alpha158", panel.symbols)
    at_once.catch_up(panel)
    for names in ("a158_vwap0", ["alpha158", "a158_vwap0"], ["sequence60", "a158_vwap0"]):
        with pytest.raises(DataError, match="has no field `vwap`, which `a158_vwap0` needs"):
            compute(panel, names)
        with pytest.raises(DataError, match="have no field `vwap`, which `a158_vwap0` needs"):
            Stream(names, panel.symbols).update(panel.times[0], of(panel, 0, list(panel.fields)))
        with pytest.raises(DataError, match="have no field `vwap`, which `a158_vwap0` needs"):
            Stream(names, panel.symbols).catch_up(panel)
    with pytest.raises(DataError, match="have no field `close`, which says where there is a bar"):
        Stream("alpha158", panel.symbols).update(panel.times[0], {"Close": panel["close"][:, 0]})
    for wrong in (lambda: compute(panel, "context10"), lambda: Stream("context10", panel.symbols)):
        with pytest.raises(ParameterError, match="`market_ret_5d` needs a benchmark"):
            wrong()
    with pytest.raises(ParameterError, match="`vix_level` needs macro releases"):
        compute(panel, ["vix_level"])
    assert np.isnan(Stream(["vix_level"], panel.symbols).update(panel.times[0], of(panel, 0, ["close"]))).all()  # its releases may be yet to come


def test_sets_families_and_features_may_stand_in_one_list() -> None:
    panel = random_walk(3, 300, seed=3)
    names = [f.name for f in lookup(["alpha158", "ret_5d", "sequence60", "candles"])]
    assert names[:159] == [*SETS["alpha158"](), "ret_5d"]
    assert len(set(names)) == len(names)
    assert set(names) == {*SETS["alpha158"](), *SETS["sequence60"](), *(f.name for f in lookup() if f.family == "candles")}
    assert [f.name for f in lookup("candles")] == [f.name for f in lookup() if f.family == "candles"]
    assert lookup(["all"]) == lookup()
    block = compute(panel, ["alpha158", "har_5"])
    assert block.names == (*SETS["alpha158"](), "har_5")
    closes = Panel(panel.times, panel.symbols, {"close": panel["close"]})
    assert np.isnan(compute(closes, ["candles", "ret_1d"])["body_share"]).all()
    with pytest.raises(DataError, match="has no field `high`, which `har_5` needs"):
        compute(closes, ["alpha158", "har_5"])
    with pytest.raises(ParameterError, match="`alpha158` is named twice"):
        lookup(["alpha158", "har_5", "alpha158"])
    with pytest.raises(ParameterError, match=r"(?s)`all` beside other names.*write `all` alone"):
        lookup(["all", "har_5"])
    with pytest.raises(ParameterError, match=r"(?s)unknown feature, set or family `candle`.*did you mean `candles`"):
        lookup(["alpha158", "candle"])


def test_no_name_means_two_things() -> None:
    names, families = {f.name for f in lookup()}, {f.family for f in lookup()}
    assert not names & families
    assert not names & set(SETS)
    for name in families & set(SETS):
        assert set(SETS[name]()) == {f.name for f in lookup() if f.family == name}


def test_a_table_in_place_of_a_panel_is_refused_with_what_makes_a_panel(tmp_path: Path) -> None:
    panel = random_walk(3, 60, seed=3)
    frame: Any = to_frame(panel)
    for call in (
        lambda: compute(frame, ["ret_1d"]),
        lambda: choose(frame),
        lambda: write_features(frame, tmp_path / "x.parquet", ["ret_1d"]),
        lambda: check_registry(frame, ["ret_1d"]),
        lambda: audit_function(lambda p: p, frame),
        lambda: proof.prove(frame),
        lambda: Stream(["ret_1d"], panel.symbols).catch_up(frame),
    ):
        with pytest.raises(DataError, match=r"(?s)is a pandas DataFrame, not a Panel.*mltrading\.market\.panel\.from_frame"):
            call()


def test_bars_of_an_instant_come_by_field_and_symbol() -> None:
    panel = random_walk(3, 60, seed=3)
    stream, frame = Stream(["ret_1d"], panel.symbols), to_frame(panel)
    now = pd.Timestamp(panel.times[0], tz="UTC")
    rows = frame[frame["timestamp"] == now]
    for wrong in (frame, rows, frame.set_index("symbol")):
        with pytest.raises(DataError, match=r"(?s)`close`.*not one value by symbol.*set_index\('symbol'\)"):
            stream.update(now, wrong)
    with pytest.raises(DataError, match=r"(?s)is a mltrading Panel.*`catch_up`"):
        stream.update(now, panel)  # type: ignore[arg-type]
    stream.update(now, rows.set_index("symbol"))
    later = frame[frame["timestamp"] == pd.Timestamp(panel.times[1], tz="UTC")].set_index("symbol")
    np.testing.assert_array_equal(stream.update(panel.times[1], later), compute(panel, ["ret_1d"]).values[:, :, 1])


def test_the_features_command_says_what_each_is_and_what_is_near(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["features", "rsi_14"]) == 0
    said, known = capsys.readouterr().out, catalogue().set_index("name").loc["rsi_14"]
    assert known["about"] in said
    assert known["formula"] in said
    assert re.search(r"^\d+ features: name, unit, ", said, re.MULTILINE)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "70")
    assert main(["features", "rsi_14"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines[:-1])) == 70
    assert lines[0].endswith("…")
    for word, near in (("rsi14", "rsi_14"), ("volatilty", "volatility"), ("har5", "har_5"), ("seqence60", "sequence60")):
        assert main(["features", word]) == 1
        said = capsys.readouterr().err
        assert f"nothing found for `{word}`" in said
        assert re.search(rf"→ near: .*\b{near}\b", said)
    assert main(["features", "rsi_14", "kurtosis"]) == 1
    assert "nothing found for `rsi_14 kurtosis` together" in capsys.readouterr().err


def test_the_features_command_finds_the_members_of_a_set(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["features", "sequence60"]) == 0
    assert "60 features" in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["rsi"]])
def test_a_reader_who_leaves_ends_a_command_quietly(root: Path, words: list[str]) -> None:
    code = f"import sys; from mltrading.cli import main; sys.exit(main(['features', *{words}]))"
    with subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdout.close()
        assert running.stderr.read() == ""
    assert running.returncode == 141


def test_the_front_page_shows_what_runs(root: Path, tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", (root / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 3
    to_frame(random_walk(4, 200, seed=1, closes_only=0)).to_parquet(tmp_path / "prices.parquet")
    code = "\n".join([*blocks, "print(*table.columns)", "assert deflated(returns, read('trials.jsonl'))['n_trials'] == 4"])
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["timestamp", "symbol", "calm_20", "calm_60", *SETS["sequence60"](), "har_5"]


def test_the_module_is_the_command(root: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "mltrading.cli", "leaks", "--help"], cwd=root, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "a minute or two" in " ".join(done.stdout.split())
