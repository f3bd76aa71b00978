"""Formulas of any shape: the same bits at once, in chunks and bar by bar, nothing from the future, nothing infinite, nothing before the warm-up."""

import re
import tracemalloc

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mltrading.core.errors import DataError, ParameterError
from mltrading.features import across, expressions, machine, windows
from mltrading.features.across import mean_across, rank_across, std_across
from mltrading.features.engine import OPCODE
from mltrading.features.expressions import (
    CLOSE,
    HIGH,
    LOW,
    OPEN,
    VOLUME,
    Expr,
    absolute,
    adaptive,
    arctan,
    change,
    clock,
    cumulate,
    cumulative_max,
    equal,
    ewm,
    exp,
    fill,
    hold,
    known,
    lag,
    log,
    macro,
    market,
    maximum,
    minimum,
    needs,
    sign,
    since,
    sqrt,
    square,
    steady,
    streak,
    text,
    warmup,
    where,
)
from mltrading.features.expressions import (
    given as given_,
)
from mltrading.features.machine import Machine, chunks, context_of, evaluate, plan, stacked, value
from mltrading.features.stream import Stream
from mltrading.market.panel import Panel, until
from mltrading.market.simulate import random_walk

SHORT = settings(max_examples=40, deadline=None)
LENGTHS = st.one_of(st.integers(4, 40), st.sampled_from([63, 64, 100]))
FIELDS = (CLOSE, HIGH, LOW, OPEN, VOLUME)

ONE = [absolute, arctan, exp, known, log, sign, sqrt, square, since, streak, rank_across, mean_across, std_across, lambda x: fill(x, 0.5), lambda x: x + 1.5, lambda x: 2.0 - x, lambda x: 1.0 / x, lambda x: ~(x > 0)]
TWO = [lambda a, b: a + b, lambda a, b: a - b, lambda a, b: a * b, lambda a, b: a / b, lambda a, b: a > b, lambda a, b: a >= b, equal, maximum, minimum, given_, hold, cumulate, cumulative_max, lambda a, b: adaptive(a, b * 0.1)]
WINDOWED = [lag, change, windows.roll_sum, windows.roll_mean, windows.roll_max, windows.roll_min, windows.since_max, windows.since_min, windows.roll_std, windows.roll_slope, windows.roll_r2, windows.roll_wma, windows.roll_rank, windows.roll_mad,
            windows.ema, windows.wilder, windows.rescaled_range, windows.roll_skew, windows.roll_kurt, lambda x, n: windows.roll_quantile(x, n, 0.3), lambda x, n: ewm(x, 0.3, n, 2)]


@st.composite
def formulas(draw: st.DrawFn, depth: int = 4) -> Expr:
    """Any formula of the language."""
    if depth == 0 or draw(st.integers(0, 5)) == 0:
        leaf = draw(st.integers(0, 9))
        if leaf == 9:
            return draw(st.sampled_from([clock("weekday_sin"), macro("vix", 10), market(change(CLOSE, 3)), market(windows.ema(CLOSE, 5))]))
        return draw(st.sampled_from(FIELDS))
    kind = draw(st.integers(0, 6))
    if kind == 0:
        return draw(st.sampled_from(ONE))(draw(formulas(depth - 1)))
    if kind == 1:
        return where(draw(formulas(depth - 1)) > draw(formulas(depth - 2 if depth > 1 else 0)), draw(formulas(depth - 1)), draw(st.sampled_from(FIELDS)))
    if kind == 2:
        return draw(st.sampled_from([windows.roll_corr, windows.roll_cov, windows.roll_beta]))(draw(formulas(depth - 1)), draw(formulas(depth - 1)), draw(LENGTHS))
    if kind == 3:
        a, b = draw(formulas(depth - 1)), draw(formulas(depth - 1))
        return draw(st.sampled_from([windows.parabolic_stop(a, b, 0.02, 0.2), windows.trailing_stop(a + b, a - b, CLOSE)]))
    if kind == 4:
        return draw(st.sampled_from(TWO))(draw(formulas(depth - 1)), draw(formulas(depth - 1)))
    return draw(st.sampled_from(WINDOWED))(draw(formulas(depth - 1)), draw(LENGTHS))


def ragged(seed: int, bars: int = 150, symbols: int = 4) -> Panel:
    """Late listings, pauses, ends, bars without volume or range, a stretch without movement, odd scales."""
    rng = np.random.default_rng(seed)
    base = random_walk(symbols, bars, seed, closes_only=seed % 2)
    scale = 10.0 ** rng.choice([-12, 0, 0, 12], symbols)[:, None]
    fields = {k: b * (1 if k == "volume" else scale) for k, b in base.fields.items()}
    a, b = sorted(rng.integers(0, bars, 2))
    for k in ("open", "high", "low", "close"):
        fields[k][:, a:b] = np.where(np.isnan(fields[k][:, a:b]), np.nan, fields["close"][:, [a]])
    fields["volume"][rng.random(fields["volume"].shape) < 0.1] = 0.0
    fields["volume"][rng.random(fields["volume"].shape) < 0.05] = np.nan
    return Panel(base.times, base.symbols, fields)


def releases(panel: Panel) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    return pd.DataFrame({"timestamp": panel.index + pd.Timedelta(minutes=15), "series": "vix", "value": np.exp(3 + 0.1 * rng.standard_normal(len(panel))), "reference": panel.index.normalize()})


@SHORT
@given(st.lists(formulas(), min_size=1, max_size=4), st.integers(0, 40), st.floats(0.1, 0.9), st.integers(2, 60))
def test_however_a_history_is_cut_the_bits_are_the_same(exprs: list[Expr], seed: int, place: float, width: int) -> None:
    panel = ragged(seed)
    vix, named = releases(panel), {str(k): e for k, e in enumerate(exprs)}
    whole = evaluate(panel, named, vix, panel.symbols[0])
    assert not np.isinf(whole.values).any()
    assert np.isnan(whole.values[:, ~panel.alive]).all()

    cut = panel.times[int(place * len(panel))]
    part = evaluate(until(panel, cut), named, vix[vix["timestamp"] <= pd.Timestamp(cut, tz="UTC")], panel.symbols[0], threads=3)
    assert part.values.tobytes() == np.ascontiguousarray(whole.values[:, :, : part.values.shape[2]]).tobytes()

    p = plan(tuple(exprs))
    chunked, fields, out = Machine(p, 4, context_of(panel, vix, panel.symbols[0], "24/7"), width, 2), stacked(panel, p.fields), np.empty(whole.values.shape)
    for first in range(0, len(panel), width):
        chunked.advance(panel.times[first : first + width], fields, first, out, first)
    assert out.tobytes() == whole.values.tobytes()

    stream = Stream(named, panel.symbols, vix, panel.symbols[0])
    live = [stream.update(t, {f: panel[f][:, k] for f in p.fields}) for k, t in enumerate(panel.times)]
    assert np.stack(live, axis=2).tobytes() == whole.values.tobytes()


@SHORT
@given(formulas(), st.integers(0, 40))
def test_no_value_comes_before_the_warmup(expr: Expr, seed: int) -> None:
    panel = ragged(seed)
    x = value(panel, expr) if not {"benchmark", "macro:vix"} & set(needs(expr)) else evaluate(panel, {"x": expr}, releases(panel), panel.symbols[0]).values[0]
    before = np.cumsum(panel.alive, axis=1) - 1
    assert not (~np.isnan(x) & (before < warmup(expr))).any()


@SHORT
@given(formulas(depth=3))
def test_the_text_of_a_formula_says_what_it_is(expr: Expr) -> None:
    words = {name: getattr(module, name) for module in (expressions, windows, across) for name in module.__all__ if callable(getattr(module, name))}
    words |= {"atan": arctan, "abs": absolute, "max": maximum, "min": minimum, "eq": equal, "cummax": cumulative_max}
    fields = {str(f.params[0]): f for f in FIELDS}
    quoted = re.sub(r"(clock|macro)\((\w+)", r"\1('\2'", text(expr))  # names are written without quotes
    again = eval(quoted, {**words, **fields})
    assert again is expr


def test_steady_formulas_begin_when_the_warmup_has_passed() -> None:
    panel = random_walk(1, 200, seed=3, ragged=False)
    for f in WINDOWED:
        expr = f(change(CLOSE) + VOLUME * 0.0, 7)
        if steady(expr):
            assert int(np.isnan(value(panel, expr)[0]).argmin()) == warmup(expr), expr
    assert not steady(since(CLOSE > OPEN))
    assert windows.roll_mean(CLOSE, np.int64(20)) is windows.roll_mean(CLOSE, 20)


@SHORT
@given(formulas(depth=3), st.integers(0, 40))
def test_days_without_a_bar_do_not_exist(expr: Expr, seed: int) -> None:
    if any(n == "others" or ":" in n or n == "benchmark" for n in needs(expr)):
        return
    panel = ragged(seed)
    x = value(panel, expr)
    for i in range(len(panel.symbols)):
        own = panel.alive[i]
        if own.any():
            alone = Panel(panel.times[own], panel.symbols[i : i + 1], {f: np.ascontiguousarray(b[i : i + 1, own]) for f, b in panel.fields.items()})
            assert value(alone, expr)[0].tobytes() == x[i, own].tobytes()


def test_every_operation_is_tried() -> None:
    exprs = [*(f(CLOSE) for f in ONE), *(f(CLOSE, VOLUME) for f in TWO), *(f(CLOSE, 5) for f in WINDOWED), where(HIGH > LOW, OPEN, CLOSE), windows.roll_corr(CLOSE, VOLUME, 5),
             windows.parabolic_stop(HIGH, LOW, 0.02, 0.2), windows.trailing_stop(HIGH, LOW, CLOSE), rank_across(CLOSE) + 1.0]
    p = plan(tuple(exprs))
    assert {c for layer in p.layers for c in layer.code[:, 0]} | {OPCODE["row"]} == set(OPCODE.values())


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([5, 20, 60, 252]), st.sampled_from([0.0, 1e3, 1e7]))
def test_moments_do_not_remember_outliers_or_levels(seed: int, n: int, level: float) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal(700) + level, rng.standard_normal(700)
    x[40] = 1e9
    times = np.datetime64("2020-01-01", "us") + np.arange(700) * np.timedelta64(1, "D")
    panel = Panel(times, ("A",), {"close": x[None], "volume": y[None]})
    view = np.lib.stride_tricks.sliding_window_view
    got = {"std": windows.roll_std(CLOSE, n), "mean": windows.roll_mean(CLOSE, n), "slope": windows.roll_slope(CLOSE, n), "corr": windows.roll_corr(CLOSE, VOLUME, n), "skew": windows.roll_skew(CLOSE, n)}
    mine = evaluate(panel, got).values[:, 0, 40 + n :]
    wx, wy = view(x, n)[41:], view(y, n)[41:]
    centred = wx - wx.mean(axis=1, keepdims=True)
    place = np.arange(n) - (n - 1) / 2
    np.testing.assert_allclose(mine[0], wx.std(axis=1, ddof=1), rtol=1e-8)
    np.testing.assert_allclose(mine[1], wx.mean(axis=1), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(mine[2], centred @ place / (place @ place), atol=1e-7 * max(1, level / 1e3))
    np.testing.assert_allclose(mine[3], [np.corrcoef(a, b)[0, 1] for a, b in zip(wx, wy, strict=True)], atol=1e-7)
    m2, m3 = (centred**2).mean(axis=1), (centred**3).mean(axis=1)
    np.testing.assert_allclose(mine[4], np.sqrt(n * (n - 1)) / (n - 2) * m3 / m2**1.5, atol=1e-6)


@pytest.mark.parametrize("n", [1, 2, 511, 512, 513, 700, 1300])
def test_lags_and_windows_longer_than_a_chunk(n: int) -> None:
    panel = random_walk(2, 1400, seed=8)
    named = {"lag": lag(VOLUME, n), "mean": windows.roll_mean(VOLUME, n), "top": windows.roll_max(CLOSE, n), "mad": windows.roll_mad(CLOSE, n), "quantile": windows.roll_quantile(VOLUME, n, 0.5)}
    block = evaluate(panel, named)
    for i in range(2):
        own = pd.Series(panel["volume"][i, panel.alive[i]])
        for name, want in (("lag", own.shift(n)), ("mean", own.rolling(n).mean()), ("quantile", own.rolling(n).quantile(0.5))):
            np.testing.assert_allclose(block[name][i, panel.alive[i]], want, rtol=1e-9)
    p = plan(tuple(named.values()))
    mixed, fields, out, first = Machine(p, 2, context_of(panel, None, None, "24/7"), 600), stacked(panel, p.fields), np.empty(block.values.shape), 0
    for width in (1, 600, 3, 511, 1, 284):
        mixed.advance(panel.times[first : first + width], fields, first, out, first)
        first += width
    assert out.tobytes() == block.values.tobytes()


def test_a_stream_takes_releases_as_they_come_and_refuses_late_ones() -> None:
    panel = random_walk(3, 40, seed=1, ragged=False)
    vix, named = releases(panel), {"vix": macro("vix", 10), "r": change(CLOSE)}
    whole = evaluate(panel, named, vix).values
    stream = Stream(named, panel.symbols)
    for k, t in enumerate(panel.times):
        np.testing.assert_array_equal(stream.update(t, {"close": panel["close"][:, k]}), whole[:, :, k])
        stream.publish(vix.iloc[[k]])
    with pytest.raises(ParameterError, match="have been computed without it"):
        stream.publish(vix.iloc[[10]])
    with pytest.raises(DataError, match="do not come after"):
        stream.update(panel.times[5], {"close": panel["close"][:, 5]})


def test_chunks_need_no_more_memory_than_a_chunk() -> None:
    panel = random_walk(20, 8000, seed=2, ragged=False)
    named = {f"{f.__name__}_{n}": f(x, n) for f in (windows.roll_mean, windows.roll_std, windows.roll_max) for n in (5, 10, 20, 40) for x in (CLOSE, HIGH, LOW, VOLUME)}
    tracemalloc.start()
    size = sum(block.values.nbytes for block in chunks(panel, named, dtype=np.float32))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size == 4 * len(named) * panel["close"].size
    assert peak < size
    assert len(panel) / 4 > machine.WIDTH
