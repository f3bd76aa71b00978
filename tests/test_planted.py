"""The leak benchmark: ways to look ahead that people fall into, each beside its honest twin. The audit has to catch every one and to pass every twin.

To add a pair, write a class with the functions `dirty` and `clean` under `@planted("name")`; its docstring says how the mistake happens."""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import signal, sparse
from scipy.sparse.linalg import spsolve
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.linear_model import LinearRegression
from sklearn.model_selection import KFold, cross_val_predict
from sklearn.preprocessing import StandardScaler

from mltrading.core.errors import LeakError
from mltrading.features.audit import check_causal
from mltrading.labels.horizons import label_frame
from mltrading.market.macro import as_of
from mltrading.market.panel import Panel, to_frame
from mltrading.market.simulate import random_walk

# ------------------------------------------------------------------ the market that the functions see

TRAIN = 150  # bars of a training fold


@cache
def daily() -> Panel:
    """Daily bars with gaps, late listings, delistings, a symbol of closes only, and splits."""
    panel = random_walk(6, 260, seed=7, closes_only=1)
    split = np.where(np.random.default_rng(7).random((6, len(panel))) < 0.01, 0.5, 1.0)
    return Panel(panel.times, panel.symbols, {**panel.fields, "adj_factor": np.where(panel.alive, np.cumprod(split, axis=1), np.nan)})


@cache
def hourly() -> Panel:
    """Seven bars a day."""
    panel = random_walk(3, 280, seed=8)
    days = pd.bdate_range("2024-01-02", periods=len(panel) // 7 + 1)
    stamps = (days.repeat(7) + pd.to_timedelta(np.tile(np.arange(15, 22), len(days)), unit="h"))[: len(panel)]
    return Panel(stamps.as_unit("us").to_numpy(), panel.symbols, panel.fields)


@cache
def releases() -> pd.DataFrame:
    """A monthly figure that is revised once, and a daily one that appears after the close."""
    rng = np.random.default_rng(9)
    month = pd.date_range("2014-06-01", periods=22, freq="MS", tz="UTC").as_unit("us")
    day = daily().index
    parts = [(month + pd.Timedelta(days=40, hours=13), "cpi", month), (month + pd.Timedelta(days=75, hours=13), "cpi", month), (day + pd.Timedelta(minutes=15), "vix", day.normalize())]
    frames = [pd.DataFrame({"timestamp": at, "series": s, "value": 20 + rng.standard_normal(len(at)), "reference": of}) for at, s, of in parts]
    return pd.concat(frames).sort_values("timestamp", kind="stable", ignore_index=True)


PANELS: dict[str, Callable[[], Panel]] = {"daily": daily, "hourly": hourly}
PAIRS: dict[str, tuple[type, dict[str, Any]]] = {}


def planted(
    name: str,
    panel: str = "daily",    # a key of PANELS
    macro: bool = False,     # the functions get the releases, too
    known: str = "close",    # as in `audit_function`
) -> Callable[[type], type]:
    """Add a pair to the benchmark."""
    def add(pair: type) -> type:
        PAIRS[name] = pair, {"panel": panel, "macro": macro, "known": known}
        return pair
    return add


def audited(name: str, which: str) -> None:
    """Audit one function of a pair."""
    pair, how = PAIRS[name]
    check_causal(pair.__dict__[which], PANELS[how["panel"]](), releases() if how["macro"] else None, known=how["known"], name=which)


# ------------------------------------------------------------------ helpers of the pairs


def close(p: Panel) -> pd.DataFrame:
    return p.view("close")


def ret(p: Panel) -> pd.DataFrame:
    return close(p).ffill().pct_change()


def figure(m: pd.DataFrame, series: str) -> pd.DataFrame:
    return m[m["series"] == series]


def first(p: Panel) -> pd.Series:
    """The closes of the first symbol, which has one at every bar as long as nobody changes the future."""
    return close(p)["S000"].ffill()


def weighted(x: pd.Series, weights: np.ndarray) -> pd.Series:
    """The weighted sum of each window of as many bars as there are weights, oldest first."""
    out = np.full(len(x), np.nan)
    if len(x) >= len(weights):
        out[len(weights) - 1 :] = (np.lib.stride_tricks.sliding_window_view(x.to_numpy(), len(weights)) * weights).sum(axis=1)
    return pd.Series(out, x.index)


def day(p: Panel) -> pd.DatetimeIndex:
    return p.index.normalize()


# ------------------------------------------------------------------ windows and shifts


@planted("negative shift")
class NegativeShift:
    """The sign of `shift` is turned round: -1 brings tomorrow here."""

    def dirty(p: Panel) -> pd.DataFrame:
        return ret(p).shift(-1)

    def clean(p: Panel) -> pd.DataFrame:
        return ret(p).shift(1)


@planted("a thousandth of tomorrow")
class Thousandth:
    """A leak need not be large: one of many inputs of a blend is shifted the wrong way."""

    def dirty(p: Panel) -> pd.DataFrame:
        return ret(p) + 0.001 * ret(p).shift(-1)

    def clean(p: Panel) -> pd.DataFrame:
        return ret(p) + 0.001 * ret(p).shift(1)


@planted("centred window")
class CentredWindow:
    """`center=True` makes a smoother line, because it knows both sides."""

    def dirty(p: Panel) -> pd.DataFrame:
        return close(p).rolling(11, center=True, min_periods=1).mean()

    def clean(p: Panel) -> pd.DataFrame:
        return close(p).rolling(11, min_periods=1).mean()


@planted("forward window")
class ForwardWindow:
    """A forward-looking indexer, meant for labels, is left in the feature's code."""

    def dirty(p: Panel) -> pd.DataFrame:
        return ret(p).rolling(pd.api.indexers.FixedForwardWindowIndexer(window_size=5), min_periods=1).std()

    def clean(p: Panel) -> pd.DataFrame:
        return ret(p).rolling(5, min_periods=1).std()


@planted("expanding mean with the next bar")
class ExpandingNext:
    """`closed` is misread, and the mean is moved by one bar so that it 'includes the current one'."""

    def dirty(p: Panel) -> pd.DataFrame:
        return close(p).expanding().mean().shift(-1)

    def clean(p: Panel) -> pd.DataFrame:
        return close(p).expanding().mean()


@planted("array rolled round")
class RolledRound:
    """`np.roll` is used as a shift: the first bar gets the last value of the sample."""

    def dirty(p: Panel) -> np.ndarray:
        return p["close"] / np.roll(p["close"], 1, axis=1) - 1

    def clean(p: Panel) -> np.ndarray:
        return p["close"] / np.pad(p["close"][:, :-1], ((0, 0), (1, 0)), constant_values=np.nan) - 1


@planted("central differences")
class CentralDifferences:
    """`np.gradient` is taken for a slope; inside the sample it uses the next value."""

    def dirty(p: Panel) -> np.ndarray:
        return np.gradient(p["close"], axis=1) if len(p) > 1 else np.full(p["close"].shape, np.nan)

    def clean(p: Panel) -> np.ndarray:
        return np.diff(p["close"], axis=1, prepend=np.nan)


@planted("convolution of the same length")
class SameConvolution:
    """`mode="same"` keeps the length by centring the kernel."""

    def dirty(p: Panel) -> pd.DataFrame:
        return close(p).ffill().apply(lambda x: pd.Series(signal.convolve(x, np.ones(5) / 5, mode="same", method="direct"), x.index))

    def clean(p: Panel) -> pd.DataFrame:
        return close(p).ffill().apply(lambda x: pd.Series(signal.convolve(x, np.ones(5) / 5, mode="full", method="direct")[: len(x)], x.index))


@planted("swing highs")
class SwingHighs:
    """A local maximum is marked on its own bar, although it is one only after the next bars."""

    def dirty(p: Panel) -> pd.DataFrame:
        return (close(p) == close(p).rolling(7, center=True).max()).astype(float)

    def clean(p: Panel) -> pd.DataFrame:
        return (close(p) == close(p).rolling(7, center=True).max()).shift(3).astype(float)


@planted("exponential mean from behind")
class ReversedMean:
    """Rows come newest first, as many vendors send them, and are turned round after the mean was taken."""

    def dirty(p: Panel) -> pd.DataFrame:
        return close(p).iloc[::-1].ewm(span=10).mean().iloc[::-1]

    def clean(p: Panel) -> pd.DataFrame:
        return close(p).iloc[::-1].sort_index().ewm(span=10).mean()


# ------------------------------------------------------------------ filling


@planted("filling from behind")
class FillFromBehind:
    """`bfill` after `ffill` 'to get rid of the last NaN' writes the first price into the time before the listing."""

    def dirty(p: Panel) -> pd.DataFrame:
        return close(p).ffill().bfill()

    def clean(p: Panel) -> pd.DataFrame:
        return close(p).ffill()


@planted("warm-up filled from behind")
class FilledWarmup:
    """A model accepts no NaN, and the first value is copied backwards over the warm-up."""

    def dirty(p: Panel) -> pd.DataFrame:
        return close(p).rolling(20).mean().bfill()

    def clean(p: Panel) -> pd.DataFrame:
        return close(p).rolling(20).mean()


@planted("interpolated gaps")
class Interpolation:
    """A line through a gap ends at the price after it."""

    def dirty(p: Panel) -> pd.DataFrame:
        return close(p).interpolate(limit_area="inside")

    def clean(p: Panel) -> pd.DataFrame:
        return close(p).ffill(limit=3)


@planted("gaps filled with the mean")
class MeanFilled:
    """An imputer in its default setting fills with the mean of all rows, later ones included."""

    def dirty(p: Panel) -> pd.DataFrame:
        return ret(p).fillna(ret(p).mean())

    def clean(p: Panel) -> pd.DataFrame:
        return ret(p).fillna(ret(p).expanding().mean())


# ------------------------------------------------------------------ statistics of the whole sample


@planted("z-score of the sample")
class SampleZScore:
    """The whole column is standardized before it is split."""

    def dirty(p: Panel) -> pd.DataFrame:
        return (close(p) - close(p).mean()) / close(p).std()

    def clean(p: Panel) -> pd.DataFrame:
        return (close(p) - close(p).expanding().mean()) / close(p).expanding().std()


@planted("min-max of the sample")
class SampleMinMax:
    """Neural networks like inputs between 0 and 1: the maximum that comes in two years is known."""

    def dirty(p: Panel) -> pd.DataFrame:
        return (close(p) - close(p).min()) / (close(p).max() - close(p).min())

    def clean(p: Panel) -> pd.DataFrame:
        low, high = close(p).expanding().min(), close(p).expanding().max()
        return (close(p) - low) / (high - low)


@planted("rank in the sample")
class SampleRank:
    """`rank(pct=True)` down the column instead of across the row."""

    def dirty(p: Panel) -> pd.DataFrame:
        return ret(p).rank(pct=True)

    def clean(p: Panel) -> pd.DataFrame:
        return ret(p).rank(pct=True, axis=1)


@planted("quantile bins of the sample")
class SampleQuantiles:
    """`qcut` chooses its edges from all rows."""

    def dirty(p: Panel) -> pd.DataFrame:
        return ret(p).apply(lambda x: pd.qcut(x, 5, labels=False, duplicates="drop") if x.notna().sum() > 10 else x * np.nan)

    def clean(p: Panel) -> pd.DataFrame:
        return (ret(p).rolling(60, min_periods=20).rank(pct=True) * 5).apply(np.ceil)


@planted("outliers clipped at quantiles of the sample")
class SampleClip:
    """Winsorizing is thought of as cleaning, which 'happens before the modelling'."""

    def dirty(p: Panel) -> pd.DataFrame:
        return ret(p).clip(ret(p).quantile(0.05), ret(p).quantile(0.95), axis=1)

    def clean(p: Panel) -> pd.DataFrame:
        return ret(p).clip(ret(p).expanding().quantile(0.05), ret(p).expanding().quantile(0.95))


@planted("rebased to the last price")
class Rebased:
    """An index is set to 100 at its end, as in a chart."""

    def dirty(p: Panel) -> pd.DataFrame:
        return 100 * close(p) / close(p).ffill().iloc[-1]

    def clean(p: Panel) -> pd.DataFrame:
        return 100 * close(p) / close(p).where(close(p).notna().cumsum() == 1).ffill()


def line_end(n: int) -> np.ndarray:
    """Weights that give the distance of a window's last value from the line through the window."""
    t = np.arange(n) - (n - 1) / 2
    return (np.arange(n) == n - 1) - 1 / n - t * t[-1] / (t * t).sum()


@planted("detrended")
class Detrended:
    """The trend line is fitted through the whole history."""

    def dirty(p: Panel) -> pd.Series:
        return pd.Series(signal.detrend(first(p)), p.index)

    def clean(p: Panel) -> pd.Series:
        return weighted(first(p), line_end(40))


@planted("mean of the group")
class GroupMean:
    """`groupby(month).transform("mean")` gives the month's first day the mean of the month."""

    def dirty(p: Panel) -> pd.DataFrame:
        return ret(p).groupby(p.index.strftime("%Y-%m")).transform("mean")

    def clean(p: Panel) -> pd.DataFrame:
        month = ret(p).groupby(p.index.strftime("%Y-%m"))
        return month.cumsum() / ret(p).notna().groupby(p.index.strftime("%Y-%m")).cumsum()


# ------------------------------------------------------------------ smoothing


@planted("filtered both ways")
class FiltFilt:
    """`filtfilt` has no delay, because its second pass comes from the future."""

    def dirty(p: Panel) -> pd.DataFrame:
        b, a = signal.butter(2, 0.1)
        return close(p).ffill().fillna(1.0).apply(lambda x: pd.Series(signal.filtfilt(b, a, x, padlen=0), x.index))

    def clean(p: Panel) -> pd.DataFrame:
        b, a = signal.butter(2, 0.1)
        return close(p).ffill().fillna(1.0).apply(lambda x: pd.Series(signal.lfilter(b, a, x), x.index))


def hodrick_prescott(x: np.ndarray, strength: float = 1600.0) -> np.ndarray:
    """The trend of a series of at least three values."""
    n = len(x)
    d = sparse.diags([1.0, -2.0, 1.0], [0, 1, 2], shape=(n - 2, n))
    return np.asarray(spsolve((sparse.eye(n) + strength * d.T @ d).tocsc(), x))


@planted("Hodrick–Prescott filter")
class HodrickPrescott:
    """The filter is a two-sided one; economists use it to describe the past."""

    def dirty(p: Panel) -> pd.Series:
        return pd.Series(hodrick_prescott(first(p).to_numpy()) if len(p) > 2 else np.nan, p.index)

    def clean(p: Panel) -> pd.Series:
        return weighted(first(p), hodrick_prescott(np.eye(40)[-1]))


@planted("Savitzky–Golay filter")
class SavitzkyGolay:
    """`savgol_filter` fits each polynomial around its point."""

    def dirty(p: Panel) -> pd.Series:
        return pd.Series(signal.savgol_filter(first(p), 11, 2, mode="nearest"), p.index)

    def clean(p: Panel) -> pd.Series:
        return weighted(first(p), signal.savgol_coeffs(11, 2, pos=10, use="dot"))


def low_frequencies(x: np.ndarray) -> np.ndarray:
    spectrum = np.fft.rfft(x)
    spectrum[max(2, len(spectrum) // 8) :] = 0
    return np.fft.irfft(spectrum, len(x))


@planted("Fourier denoising")
class Fourier:
    """High frequencies of the whole series are set to zero, and every point of it moves."""

    def dirty(p: Panel) -> pd.Series:
        return pd.Series(low_frequencies(first(p).to_numpy()), p.index)

    def clean(p: Panel) -> pd.Series:
        return weighted(first(p), np.array([low_frequencies(row)[-1] for row in np.eye(64)]))


@planted("wavelet denoising")
class Wavelet:
    """The finest Haar coefficients are dropped: what is left of two bars is their mean, and the first of them has it, too."""

    def dirty(p: Panel) -> pd.Series:
        return first(p).groupby(np.arange(len(p)) // 4).transform("mean")

    def clean(p: Panel) -> pd.Series:
        return first(p).rolling(4).mean()


def local_level(x: np.ndarray, gain: float = 0.2) -> np.ndarray:
    """The filtered level of each column, a missing bar bringing nothing."""
    out, level = np.empty_like(x), np.full(x.shape[1], np.nan)
    for t, row in enumerate(x):
        seen = np.where(np.isnan(level), row, level + gain * (row - level))
        level = np.where(np.isnan(row), level, seen)
        out[t] = level
    return out


@planted("Kalman smoother")
class KalmanSmoother:
    """Libraries return the smoothed states beside the filtered ones, and the smoothed ones look better."""

    def dirty(p: Panel) -> pd.DataFrame:
        filtered = local_level(close(p).to_numpy())
        return pd.DataFrame(local_level(filtered[::-1])[::-1], p.index, p.symbols)

    def clean(p: Panel) -> pd.DataFrame:
        return pd.DataFrame(local_level(close(p).to_numpy()), p.index, p.symbols)


# ------------------------------------------------------------------ coarser bars, stamps and joins


@planted("weeks stamped with their start")
class WeekLabel:
    """`resample` labels many frequencies with the left edge, and a forward fill spreads Friday over the week."""

    def dirty(p: Panel) -> pd.DataFrame:
        return close(p).resample("W-FRI", label="left", closed="right").last().reindex(p.index, method="ffill")

    def clean(p: Panel) -> pd.DataFrame:
        return close(p).resample("W-FRI", label="right", closed="right").last().reindex(p.index, method="ffill")


@planted("coarser bars with their own stamps", panel="hourly")
class CoarseBars:
    """Daily bars are made from hourly ones and stamped with midnight; whoever reads them joins on the stamp."""

    def dirty(p: Panel) -> pd.DataFrame:
        return close(p).resample("D").last()

    def clean(p: Panel) -> pd.DataFrame:
        return close(p).resample("D", label="right", closed="right").last()


@planted("stamped with the date")
class DateStamp:
    """Vendors give a bare date; as a time it is midnight, and the session has not begun."""

    def dirty(p: Panel) -> pd.DataFrame:
        return ret(p).set_axis(p.index.normalize())

    def clean(p: Panel) -> pd.DataFrame:
        return ret(p).set_axis(p.index.normalize() + pd.Timedelta(days=1))


@planted("local times read as UTC", panel="hourly")
class LocalTime:
    """The zone is dropped instead of converted, and New York's afternoon becomes London's."""

    def dirty(p: Panel) -> pd.DataFrame:
        return ret(p).set_axis(p.index.tz_convert("America/New_York").tz_localize(None))

    def clean(p: Panel) -> pd.DataFrame:
        return ret(p).set_axis(p.index.tz_convert("America/New_York"))


@planted("joined to the nearest row", macro=True)
class NearestJoin:
    """`merge_asof(direction="nearest")` fills more rows, a quarter of an hour too early."""

    def dirty(p: Panel, m: pd.DataFrame) -> pd.Series:
        return pd.merge_asof(pd.DataFrame({"timestamp": p.index}), figure(m, "vix")[["timestamp", "value"]], on="timestamp", direction="nearest").set_index("timestamp")["value"]

    def clean(p: Panel, m: pd.DataFrame) -> pd.Series:
        return pd.merge_asof(pd.DataFrame({"timestamp": p.index}), figure(m, "vix")[["timestamp", "value"]], on="timestamp").set_index("timestamp")["value"]


@planted("joined to the next row", macro=True)
class ForwardJoin:
    """`direction="forward"` is taken for 'carry forward'."""

    def dirty(p: Panel, m: pd.DataFrame) -> pd.Series:
        return pd.merge_asof(pd.DataFrame({"timestamp": p.index}), figure(m, "cpi")[["timestamp", "value"]], on="timestamp", direction="forward").set_index("timestamp")["value"]

    def clean(p: Panel, m: pd.DataFrame) -> pd.Series:
        return pd.merge_asof(pd.DataFrame({"timestamp": p.index}), figure(m, "cpi")[["timestamp", "value"]], on="timestamp", direction="backward").set_index("timestamp")["value"]


@planted("the day's high during the day", panel="hourly")
class DayHigh:
    """The daily high is joined to the day's intraday bars by date."""

    def dirty(p: Panel) -> pd.DataFrame:
        return close(p) / p.view("high").groupby(day(p)).transform("max")

    def clean(p: Panel) -> pd.DataFrame:
        return close(p) / p.view("high").groupby(day(p)).cummax()


@planted("share of the day's volume", panel="hourly")
class DayVolume:
    """A bar's volume is divided by the day's, which is known at its end."""

    def dirty(p: Panel) -> pd.DataFrame:
        return p.view("volume") / p.view("volume").groupby(day(p)).transform("sum")

    def clean(p: Panel) -> pd.DataFrame:
        return p.view("volume") / p.view("volume").groupby(day(p)).cumsum()


@planted("bars left in the month")
class BarsLeft:
    """The end of the month is counted from the table's own rows, which know the holidays, halts and delistings to come."""

    def dirty(p: Panel) -> pd.Series:
        month = pd.Series(p.index.strftime("%Y-%m"), p.index)
        return month.groupby(month).transform("size") - month.groupby(month).cumcount()

    def clean(p: Panel) -> pd.Series:
        today = p.times.astype("datetime64[D]")
        return pd.Series(np.busday_count(today, (today.astype("datetime64[M]") + 1).astype("datetime64[D]")), p.index)


# ------------------------------------------------------------------ macro figures


@planted("macro figure at its period", macro=True)
class ReferencePeriod:
    """Figures are downloaded with the month that they describe as the index, and joined on it."""

    def dirty(p: Panel, m: pd.DataFrame) -> pd.Series:
        return figure(m, "cpi").drop_duplicates("reference").set_index("reference")["value"].reindex(p.index, method="ffill")

    def clean(p: Panel, m: pd.DataFrame) -> pd.Series:
        return as_of(figure(m, "cpi"), p.index)["cpi"] if len(figure(m, "cpi")) else pd.Series(np.nan, p.index)


@planted("revised macro figure", macro=True)
class Revised:
    """The stamp is that of the first release, the value that of the last revision, as a database of final figures has it."""

    def dirty(p: Panel, m: pd.DataFrame) -> pd.Series:
        final = figure(m, "cpi").groupby("reference").agg(timestamp=("timestamp", "min"), value=("value", "last"))
        return final.set_index("timestamp")["value"].reindex(p.index, method="ffill")

    def clean(p: Panel, m: pd.DataFrame) -> pd.Series:
        return figure(m, "cpi").drop_duplicates("reference").set_index("timestamp")["value"].reindex(p.index, method="ffill")


@planted("macro figure interpolated", macro=True)
class InterpolatedMacro:
    """A monthly figure is made daily by a line to the next one."""

    def dirty(p: Panel, m: pd.DataFrame) -> pd.Series:
        x = figure(m, "cpi").drop_duplicates("reference").set_index("timestamp")["value"]
        return x.reindex(x.index.union(p.index)).interpolate("time").reindex(p.index)

    def clean(p: Panel, m: pd.DataFrame) -> pd.Series:
        x = figure(m, "cpi").drop_duplicates("reference").set_index("timestamp")["value"]
        return x.reindex(x.index.union(p.index)).ffill().reindex(p.index)


# ------------------------------------------------------------------ at the open


@planted("same-bar close at the open", known="open")
class SameBarClose:
    """The signal is made from the bar's close and traded at its open."""

    def dirty(p: Panel) -> pd.DataFrame:
        return close(p) / close(p).shift(1) - 1

    def clean(p: Panel) -> pd.DataFrame:
        return close(p).shift(1) / close(p).shift(2) - 1


@planted("same-bar range and volume at the open", known="open")
class SameBarVolume:
    """Today's volume against its mean is a filter for entries at today's open."""

    def dirty(p: Panel) -> dict[str, pd.DataFrame]:
        return {"volume": p.view("volume") / p.view("volume").rolling(5).mean(), "low": p.view("low") / p.view("open")}

    def clean(p: Panel) -> dict[str, pd.DataFrame]:
        return {"volume": (p.view("volume") / p.view("volume").rolling(5).mean()).shift(1), "gap": p.view("open") / close(p).shift(1)}


@planted("next bar's open")
class NextOpen:
    """The fill price of tomorrow's open is written on the decision's row, and becomes an input."""

    def dirty(p: Panel) -> pd.DataFrame:
        return p.view("open").shift(-1) / close(p) - 1

    def clean(p: Panel) -> pd.DataFrame:
        return p.view("open") / close(p).shift(1) - 1


# ------------------------------------------------------------------ universes, listings, splits


@planted("universe of survivors")
class Survivors:
    """Today's members of an index are taken through its history."""

    def dirty(p: Panel) -> pd.DataFrame:
        return ret(p)[[s for s in p.symbols if not np.isnan(close(p)[s].iloc[-1])]]

    def clean(p: Panel) -> pd.DataFrame:
        return ret(p).where(close(p).notna())


@planted("symbols with a long history only")
class FullHistory:
    """`dropna(thresh=…)` by column keeps what will have traded long enough."""

    def dirty(p: Panel) -> pd.DataFrame:
        return ret(p).loc[:, close(p).notna().sum() >= 200]

    def clean(p: Panel) -> pd.DataFrame:
        return ret(p).where(close(p).notna().cumsum() >= 200)


@planted("bars until the delisting")
class UntilDelisting:
    """The age of a listing is counted from the wrong end."""

    def dirty(p: Panel) -> pd.DataFrame:
        return close(p).notna().iloc[::-1].cumsum().iloc[::-1].astype(float)

    def clean(p: Panel) -> pd.DataFrame:
        return close(p).notna().cumsum().astype(float)


@planted("mean with symbols not yet listed")
class NotYetListed:
    """To have a full rectangle, prices are filled backwards: symbols to come count with a return of zero."""

    def dirty(p: Panel) -> pd.DataFrame:
        r = close(p).ffill().bfill().pct_change()
        return r.sub(r.mean(axis=1), axis=0)

    def clean(p: Panel) -> pd.DataFrame:
        return ret(p).sub(ret(p).mean(axis=1), axis=0)


@planted("adjusted for later splits")
class LaterSplits:
    """The level of an adjusted price tells how often the share will be split, that is, how much it will rise."""

    def dirty(p: Panel) -> pd.DataFrame:
        factor = p.view("adj_factor").ffill()
        return np.log(close(p) * factor.iloc[-1] / factor)

    def clean(p: Panel) -> pd.DataFrame:
        factor = p.view("adj_factor").ffill()
        return np.log(close(p) / factor)


# ------------------------------------------------------------------ labels and rows


@planted("label used as a feature")
class LabelAsFeature:
    """All columns but the target are features, and a second label is among them."""

    def dirty(p: Panel) -> pd.DataFrame:
        return label_frame(p, 3, vol_bars=10)[["timestamp", "symbol", "ret"]]

    def clean(p: Panel) -> pd.DataFrame:
        return label_frame(p, 3, vol_bars=10)[["end", "symbol", "ret"]].rename(columns={"end": "timestamp"})


def first_touch(p: Panel, bars: int, width: float) -> pd.DataFrame:
    """1 where a price that rises by the width comes before one that falls by it, -1 the other way, 0 where neither comes."""
    out = 0.0 * close(p)
    for k in range(bars, 0, -1):
        later = close(p).shift(-k) / close(p) - 1
        out = out.mask(later > width, 1.0).mask(later < -width, -1.0)
    return out


@planted("triple-barrier result")
class TripleBarrier:
    """The outcome of the trade stands on the row of its entry; a 'win rate of late' is made from it."""

    def dirty(p: Panel) -> pd.DataFrame:
        return first_touch(p, 8, 0.03).rolling(20).mean()

    def clean(p: Panel) -> pd.DataFrame:
        return first_touch(p, 8, 0.03).shift(8).rolling(20).mean()


@planted("rows kept by their label")
class RowsByLabel:
    """`dropna()` after the label was joined removes rows whose future is missing."""

    def dirty(p: Panel) -> pd.DataFrame:
        rows = to_frame(p)[["timestamp", "symbol", "close"]]
        rows["label"] = rows.groupby("symbol")["close"].shift(-5)
        return rows.dropna().drop(columns="label")

    def clean(p: Panel) -> pd.DataFrame:
        rows = to_frame(p)[["timestamp", "symbol", "close"]]
        rows["past"] = rows.groupby("symbol")["close"].shift(5)
        return rows.dropna()


@planted("target encoding")
class TargetEncoding:
    """A symbol is coded by the mean of its target, over all rows."""

    def dirty(p: Panel) -> pd.DataFrame:
        target = ret(p).shift(-1)
        return 0 * close(p) + target.mean()

    def clean(p: Panel) -> pd.DataFrame:
        return ret(p).expanding().mean()


# ------------------------------------------------------------------ pipelines that fit something


def refitted(x: pd.DataFrame, fit: Callable[[pd.DataFrame], Callable[[pd.DataFrame], pd.DataFrame]], every: int = 40) -> pd.DataFrame:
    """Rows from TRAIN on, each by a model that was fitted on earlier rows only."""
    parts = [fit(x.iloc[:k])(x.iloc[k : k + every]) for k in range(TRAIN, len(x), every)]
    return pd.concat(parts) if parts else x.iloc[:0]


def inputs(p: Panel) -> pd.DataFrame:
    """Three features of the first symbol, and its next return."""
    r = ret(p)["S000"]
    return pd.DataFrame({"a": r, "b": r.rolling(5).mean(), "c": r.rolling(5).std(), "next": r.shift(-1)})


def main_component(x: pd.DataFrame) -> Callable[[pd.DataFrame], pd.DataFrame]:
    model = PCA(1, svd_solver="full").fit(x.fillna(0.0))
    return lambda new: pd.DataFrame(model.transform(new.fillna(0.0)), new.index, ["score"])


@planted("principal components of the sample")
class SamplePCA:
    """Dimension reduction 'uses no labels, so it cannot leak'."""

    def dirty(p: Panel) -> pd.DataFrame:
        return main_component(ret(p))(ret(p)) if len(p) > 2 else ret(p)[[]]

    def clean(p: Panel) -> pd.DataFrame:
        return refitted(ret(p), main_component)


@planted("scaler fitted on training and test rows")
class ScalerOnAll:
    """`fit_transform` stands before the split."""

    def dirty(p: Panel) -> pd.DataFrame:
        x = inputs(p)[["a", "b", "c"]].dropna()
        return pd.DataFrame(StandardScaler().fit_transform(x), x.index, x.columns).iloc[TRAIN:] if len(x) > TRAIN else x.iloc[:0]

    def clean(p: Panel) -> pd.DataFrame:
        x = inputs(p)[["a", "b", "c"]].dropna()
        return pd.DataFrame(StandardScaler().fit(x.iloc[:TRAIN]).transform(x), x.index, x.columns).iloc[TRAIN:] if len(x) > TRAIN else x.iloc[:0]


@planted("features selected on the whole sample")
class Selection:
    """The best of many columns are found first, and the model is cross-validated on them afterwards."""

    def dirty(p: Panel) -> dict[str, pd.Series]:
        x = inputs(p)
        score = x.corr()["next"].drop("next").abs()
        return {n: x[n] for n in score.nlargest(1).index}

    def clean(p: Panel) -> dict[str, pd.Series]:
        x = inputs(p)
        score = x.iloc[: TRAIN - 1].corr()["next"].drop("next").abs()
        return {n: x[n].iloc[TRAIN:] for n in score.nlargest(1).index}


@planted("window tuned on the whole sample")
class TunedWindow:
    """The length that paid best over all years is used in all years."""

    def dirty(p: Panel) -> pd.DataFrame:
        pays = {n: float((ret(p).rolling(n).mean() * ret(p).shift(-1)).mean().sum()) for n in (3, 5, 10, 20)}
        return ret(p).rolling(max(pays, key=lambda n: pays[n])).mean()

    def clean(p: Panel) -> pd.DataFrame:
        past = ret(p).iloc[:TRAIN]
        pays = {n: float((past.rolling(n).mean() * past.shift(-1)).mean().sum()) for n in (3, 5, 10, 20)}
        return ret(p).rolling(max(pays, key=lambda n: pays[n])).mean().iloc[TRAIN:]


def states(x: pd.DataFrame) -> Callable[[pd.DataFrame], pd.DataFrame]:
    model = KMeans(2, n_init=1, random_state=0).fit(x)
    return lambda new: pd.DataFrame({"state": model.predict(new), "centre": model.cluster_centers_[model.predict(new), 0]}, new.index)


@planted("regimes clustered on the whole sample")
class Regimes:
    """Calm and crisis are told apart with hindsight, and the labels are features of the backtest."""

    def dirty(p: Panel) -> pd.DataFrame:
        x = inputs(p)[["a", "c"]].dropna()
        return states(x)(x) if len(x) > 2 else x.iloc[:0]

    def clean(p: Panel) -> pd.DataFrame:
        return refitted(inputs(p)[["a", "c"]].dropna(), states)


@planted("out-of-fold predictions of shuffled folds")
class ShuffledFolds:
    """Predictions of a first model feed a second one; 'out of fold' is not 'from the past'."""

    def dirty(p: Panel) -> pd.Series:
        x = inputs(p).dropna()
        folds = KFold(5, shuffle=True, random_state=0)
        return pd.Series(cross_val_predict(LinearRegression(), x[["a", "b"]], x["next"], cv=folds), x.index) if len(x) > 5 else x["a"].iloc[:0]

    def clean(p: Panel) -> pd.DataFrame:
        def fit(x: pd.DataFrame) -> Callable[[pd.DataFrame], pd.DataFrame]:
            rows = x.iloc[:-1].dropna()
            model = LinearRegression().fit(rows[["a", "b"]], rows["next"])
            return lambda new: pd.DataFrame(model.predict(new[["a", "b"]]), new.index, ["score"])
        return refitted(inputs(p), fit)


# ------------------------------------------------------------------ the benchmark

FEW_STATES = pytest.mark.filterwarnings("ignore:Number of distinct clusters")  # a symbol whose future is gone stands still


@FEW_STATES
@pytest.mark.parametrize("name", PAIRS)
def test_a_planted_leak_is_caught_and_told(name: str) -> None:
    with pytest.raises(LeakError, match=r"(?s)^feature `.+`, .*at \d{4}-\d\d-\d\d.*: is .+, but .+ when everything after .*\d{4}.* (was removed|changed).*\n  → .{20}"):
        audited(name, "dirty")


@FEW_STATES
@pytest.mark.parametrize("name", PAIRS)
def test_its_honest_twin_passes(name: str) -> None:
    audited(name, "clean")


def test_the_benchmark_is_large_and_says_how_each_mistake_happens() -> None:
    assert len(PAIRS) >= 30
    assert all(len(pair.__doc__ or "") > 30 and "\n" not in pair.__doc__ for pair, _ in PAIRS.values())
