"""Whatever a file of bars looks like: it is read right, repaired in the open, or refused; it never becomes wrong bars in silence."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mltrading.core.errors import DataError, ParameterError
from mltrading.core.storage import write_parquet
from mltrading.market.calendar import expected, sessions
from mltrading.market.folder import Folder, read_folder
from mltrading.market.panel import from_frame, to_frame
from mltrading.market.simulate import random_walk

DATA = os.environ.get("MLTRADING_DATA")
FIELDS = ["open", "high", "low", "close", "volume"]


def market() -> pd.DataFrame:
    """Three symbols of a year of New York sessions, prices with four decimals."""
    frame = to_frame(random_walk(3, 250, seed=4, ragged=False))
    frame[FIELDS] = frame[FIELDS].round(4)
    days = sessions("XNYS", "2015-01-02", "2016-12-30").iloc[:250]
    return frame.assign(timestamp=pd.DatetimeIndex(days["close"]).repeat(3), volume=frame["volume"].round())


GOOD = market()
DAYS = GOOD["timestamp"].dt.tz_convert("America/New_York").dt.tz_localize(None).dt.normalize()


# --- layouts -----------------------------------------------------------------------------------------------------------------


def put(folder: Path, **files: pd.DataFrame | str | bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if isinstance(content, pd.DataFrame):
            write_parquet(content, folder / f"{name}.parquet")
        else:
            (folder / f"{name}.csv").write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def dated(frame: pd.DataFrame = GOOD) -> pd.DataFrame:
    return frame.assign(timestamp=DAYS.dt.date.astype(str)).rename(columns={"timestamp": "Date"})


def test_a_canonical_file_passes_to_the_byte(tmp_path: Path) -> None:
    folder = put(tmp_path / "in", mine=GOOD)
    read = read_folder(folder)
    assert [(s.name, s.frequency, s.calendar) for s in read.sets] == [("daily", "1d", "XNYS")]
    write_parquet(read.sets[0].bars, tmp_path / "out.parquet")
    assert (tmp_path / "out.parquet").read_bytes() == (folder / "mine.parquet").read_bytes()
    assert read.findings.empty
    assert read.removed.empty


def layouts() -> dict[str, Callable[[Path], Path]]:
    text = dated()
    return {
        "dates in Parquet": lambda f: put(f, mine=GOOD.assign(timestamp=DAYS)),
        "dates at midnight UTC": lambda f: put(f, mine=GOOD.assign(timestamp=DAYS.dt.tz_localize("UTC"))),
        "CSV": lambda f: put(f, mine=text.to_csv(index=False)),
        "capitals": lambda f: put(f, mine=text.rename(columns=str.upper).to_csv(index=False)),
        "an index column": lambda f: put(f, mine=text.set_index("Date").rename_axis(None).to_csv()),
        "tabs, BOM, CRLF": lambda f: put(f, mine=b"\xef\xbb\xbf" + text.to_csv(index=False, sep="\t", lineterminator="\r\n").encode()),
        "decimal commas": lambda f: put(f, mine=text.to_csv(index=False, sep=";", decimal=",", float_format="%.4f")),
        "UTF-16": lambda f: put(f, mine=text.to_csv(index=False).encode("utf-16")),
        "American dates": lambda f: put(f, mine=text.assign(Date=DAYS.dt.strftime("%m/%d/%Y")).to_csv(index=False)),
        "whole-number dates": lambda f: put(f, mine=text.assign(Date=DAYS.dt.strftime("%Y%m%d")).to_csv(index=False)),
        "midnights of New York": lambda f: put(f, mine=text.assign(Date=DAYS.dt.tz_localize("America/New_York").astype(str)).to_csv(index=False)),
        "newest first": lambda f: put(f, mine=text[::-1].to_csv(index=False)),
        "milliseconds": lambda f: put(f, mine=text.assign(Date=GOOD["timestamp"].dt.as_unit("ms").astype("int64")).to_csv(index=False)),
        "a file per symbol": lambda f: put(f, **{str(s): part.drop(columns="symbol").to_csv(index=False) for s, part in text.groupby("symbol")}),
        "adjusted closes": lambda f: put(f, mine=text.assign(**{"Adj Close": text["close"]}).to_csv(index=False)),
    }


@pytest.mark.parametrize("name", layouts())
def test_a_layout_gives_the_same_bars(name: str, tmp_path: Path) -> None:
    (bars,) = read_folder(layouts()[name](tmp_path / "in")).sets
    assert bars.name == "daily"
    pd.testing.assert_frame_equal(bars.bars[list(GOOD.columns)], GOOD)


def test_frequencies_of_one_folder_become_sets(tmp_path: Path) -> None:
    stamps = expected("XNYS", "5m", "2024-06-03", "2024-06-07")
    five = pd.DataFrame({"datetime": stamps - pd.Timedelta(minutes=5), "close": 100 + np.sin(np.arange(len(stamps)))})
    one = dated()[GOOD["symbol"] == "S000"].drop(columns="symbol")
    folder = put(tmp_path, SPY=five.to_csv(index=False), KO=one.to_csv(index=False), many=GOOD)
    read = {s.name: s for s in read_folder(folder).sets}
    assert sorted(read) == ["5m", "daily", "many"]
    assert read["5m"].bars["timestamp"].tolist() == stamps.tolist()
    assert set(read["daily"].bars["symbol"]) == {"KO"}


@pytest.mark.parametrize("shift", [0, 5])
def test_sessions_tell_starts_from_closes(tmp_path: Path, shift: int) -> None:
    stamps = expected("XNYS", "5m", "2024-06-03", "2024-06-07")
    frame = pd.DataFrame({"timestamp": stamps - pd.Timedelta(minutes=shift), "symbol": "SPY", "close": 100 + np.sin(np.arange(len(stamps)))})
    bars = read_folder(put(tmp_path, SPY=frame)).sets[0].bars
    assert bars["timestamp"].tolist() == stamps.tolist()


def test_an_hour_that_the_close_cuts_short_closes_with_it(tmp_path: Path) -> None:
    stamps = expected("XNYS", "1h", "2024-06-03", "2024-07-05")
    starts = pd.DatetimeIndex([t - pd.Timedelta(minutes=30 if t.minute == 0 else 60) for t in stamps])
    frame = pd.DataFrame({"timestamp": starts.as_unit("us"), "symbol": "SPY", "close": 100 + np.sin(np.arange(len(stamps)))})
    read = read_folder(put(tmp_path, SPY=frame))
    assert read.sets[0].bars["timestamp"].tolist() == stamps.tolist()
    assert read.findings.empty


REFUSED: dict[str, tuple[Callable[[pd.DataFrame], pd.DataFrame], str]] = {
    "no column of times": (lambda f: f.rename(columns={"Date": "when"}), "column `timestamp`: is missing"),
    "two columns of closes": (lambda f: f.assign(last=f["close"], price=f["close"]).drop(columns="close"), "could both be the close"),
    "days of Tokyo": (lambda f: f.assign(Date=(DAYS + pd.Timedelta(days=1)).dt.date.astype(str)), "CALENDAR="),
    "clock times without a zone": (lambda f: f.assign(Date=(DAYS + pd.Timedelta(hours=16)).astype(str)), "times without a zone"),
    "before the close": (lambda f: f.assign(Date=(GOOD["timestamp"] - pd.Timedelta(hours=1)).astype(str)), "rule `early`"),
    "a header again": (lambda f: pd.concat([f.iloc[:9], pd.DataFrame([f.columns], columns=f.columns), f.iloc[9:]]), "`Date` is not a time"),
    "months": (lambda f: f[~DAYS.dt.to_period("M").duplicated()].iloc[:6], "bars of 2[89] days|bars of 3[0123] days"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_told_is_refused(name: str, tmp_path: Path) -> None:
    change, message = REFUSED[name]
    with pytest.raises(DataError, match=message):
        read_folder(put(tmp_path, mine=change(dated()).to_csv(index=False)))


def test_a_manifest_may_lie_elsewhere(tmp_path: Path) -> None:
    folder = put(tmp_path / "read only", **{s: part.drop(columns="symbol").rename(columns={"close": "PX"}).to_csv(index=False) for s, part in dated().groupby("symbol")})
    said = {"tables": {"daily": {"prices": "total", "columns": {"close": "PX"}, "calendar": "XNYS"}}, "symbols": {"S001": {"role": "benchmark"}}}
    (tmp_path / "said.json").write_text(json.dumps(said))
    read = read_folder(folder, tables=tmp_path / "said.json")
    pd.testing.assert_frame_equal(read.sets[0].bars[list(GOOD.columns)], GOOD)
    assert read.sets[0].prices == "total"
    assert [f["role"] for f in read.facts.values()] == ["traded", "benchmark", "traded"]


def test_days_of_a_market_that_never_closes_are_asked_for(tmp_path: Path) -> None:
    days = pd.date_range("2024-01-01", periods=200, tz="UTC").as_unit("us")
    frame = pd.DataFrame({"timestamp": days, "symbol": "BTC", "close": 100 + np.sin(np.arange(200))})
    folder = put(tmp_path, BTC=frame)
    with pytest.raises(DataError, match=r"STAMP=close or STAMP=start"):
        read_folder(folder)
    assert read_folder(folder, stamp="close").sets[0].bars["timestamp"].tolist() == list(days)
    assert read_folder(folder, stamp="start").sets[0].bars["timestamp"].tolist() == list(days + pd.Timedelta(days=1))


def test_a_date_without_a_session_is_removed_or_refused(tmp_path: Path) -> None:
    text = dated().to_csv(index=False).replace("2015-03-04,S001", "2015-03-07,S001")
    read = read_folder(put(tmp_path, mine=text))
    assert read.removed[["symbol", "rule"]].to_numpy().tolist() == [["S001", "off_session"]]
    assert set(read.findings["rule"]) == {"off_session", "gaps"}
    with pytest.raises(DataError, match="is no session of XNYS"):
        read_folder(tmp_path, policies={"off_session": "fail"})


# --- corrupt files -----------------------------------------------------------------------------------------------------------


def silently_wrong(read: Folder, original: pd.DataFrame) -> list[str]:
    """Bars that are wrong without a line about them. This is the oracle of the corrupt files.

    A bar is wrong where its price differs from the original bar of that symbol and instant by more than the rules promise to see (35 % between bars, or what leaves
    the range of high and low), where its volume is none, and where its values stand at an *earlier* instant than in the original, or at no instant of the original at all. A bar that stands later is late, which is safe.
    It is wrong in silence where neither the findings nor the removed rows name its symbol."""
    named = set(read.findings["symbol"]) | set(read.removed["symbol"])
    (bars,) = [s.bars for s in read.sets]
    both = bars.merge(original, on=["timestamp", "symbol"], how="left", suffixes=("", "_was"))
    prices = [f for f in FIELDS[:4] if f in bars.columns]
    wrong = (bars[prices] <= 0).any(axis=1) | bars["close"].isna() | (bars.get("volume", pd.Series(0.0, index=bars.index)) < 0)
    for f in prices:
        wrong |= np.abs(np.log(both[f] / both[f"{f}_was"])) > 0.35
    values = original.rename(columns={"timestamp": "known"})[["known", "symbol", *prices]].drop_duplicates(["symbol", *prices])
    known = bars.merge(values, on=["symbol", *prices], how="left")["known"]
    moved = (known > bars["timestamp"]) | (known.isna() & both["close_was"].isna())
    bad = bars[(wrong.to_numpy() | moved.to_numpy()) & ~bars["symbol"].isin(named).to_numpy()]
    return [f"{r.symbol} at {r.timestamp}" for r in bad.itertuples()]


ODD = [np.nan, np.inf, -np.inf, -1.0, 0.0, 1e308, 1e13]
ROWS = st.lists(st.integers(0, len(GOOD) - 1), min_size=1, max_size=6, unique=True)


@st.composite
def changed_tables(draw: st.DrawFn) -> pd.DataFrame:
    """The good table with one or two things wrong with it."""
    frame = dated() if draw(st.booleans()) else GOOD.copy()
    for _ in range(draw(st.integers(1, 2))):
        frame = draw(st.sampled_from(CHANGES))(draw, frame)
    return frame


def _values(draw: st.DrawFn, frame: pd.DataFrame) -> pd.DataFrame:
    column = draw(st.sampled_from([c for c in FIELDS if c in frame.columns] or [frame.columns[-1]]))
    rows = [r for r in draw(ROWS) if r < len(frame)]
    if not pd.api.types.is_numeric_dtype(frame[column]):
        return frame
    new = frame[column].to_numpy(np.float64).copy()
    new[rows] = draw(st.sampled_from([lambda x: x * 100, lambda x: x / 100, lambda x: x * 10, lambda x: x * 2, *(lambda x, v=v: np.full_like(x, v) for v in ODD)]))(new[rows])
    return frame.assign(**{column: new})


def _scaled(draw: st.DrawFn, frame: pd.DataFrame) -> pd.DataFrame:
    """A symbol's prices in another unit from some row on."""
    columns = [c for c in FIELDS[:4] if c in frame.columns and pd.api.types.is_numeric_dtype(frame[c])]
    start, factor = draw(st.integers(30, 700)), draw(st.sampled_from([0.01, 0.1, 0.5, 2.0, 3.0, 100.0]))
    late = (np.arange(len(frame)) >= start)
    return frame.assign(**{c: np.where(late, frame[c] * factor, frame[c]) for c in columns})


def _rows(draw: st.DrawFn, frame: pd.DataFrame) -> pd.DataFrame:
    rows = [r for r in draw(ROWS) if r < len(frame)]
    how = draw(st.sampled_from(["delete", "repeat", "conflict", "shuffle", "reverse"]))
    if how == "delete":
        return frame.drop(index=frame.index[rows])
    if how == "shuffle":
        return frame.sample(frac=1.0, random_state=draw(st.integers(0, 99)))
    if how == "reverse":
        return frame[::-1]
    again = frame.iloc[rows]
    if how == "conflict" and "close" in frame.columns and pd.api.types.is_numeric_dtype(frame["close"]):
        again = again.assign(close=again["close"] * 1.01)
    return pd.concat([frame, again])


def _columns(draw: st.DrawFn, frame: pd.DataFrame) -> pd.DataFrame:
    a, b = draw(st.lists(st.sampled_from(list(frame.columns)), min_size=2, max_size=2, unique=True))
    how = draw(st.sampled_from(["swap", "rename", "drop", "text", "twice", "whole"]))
    if how == "swap":
        return frame.rename(columns={a: b, b: a})
    if how == "rename":
        return frame.rename(columns={a: draw(st.sampled_from(["x", "", "Close", "date", "adj close", "ticker", "price"]))})
    if how == "drop":
        return frame.drop(columns=a)
    if how == "text" and a != "symbol":  # a symbol of another name is another symbol
        return frame.assign(**{a: frame[a].astype(str) + draw(st.sampled_from(["", " ", "%", "x", " USD"]))})
    if how == "whole" and pd.api.types.is_float_dtype(frame[a]) and np.isfinite(frame[a]).all():
        return frame.assign(**{a: frame[a].clip(-1e15, 1e15).astype("int64")})
    return pd.concat([frame, frame[[b]]], axis=1)


def _stamps(draw: st.DrawFn, frame: pd.DataFrame) -> pd.DataFrame:
    name = "timestamp" if "timestamp" in frame.columns else "Date"
    if name not in frame.columns or not frame.columns.is_unique or name == "Date" or not isinstance(frame[name].dtype, pd.DatetimeTZDtype):
        return frame
    times = frame[name]
    rows = [r for r in draw(ROWS) if r < len(frame)]
    how = draw(st.sampled_from(["naive", "shift", "some", "zone", "epoch", "mixed", "text", "swap"]))
    if how == "naive":
        return frame.assign(**{name: times.dt.tz_localize(None)})
    if how == "shift":
        return frame.assign(**{name: times + pd.Timedelta(hours=draw(st.sampled_from([-72, -24, -21, -9, -5, -1, 1, 5, 24])))})
    if how == "zone":
        return frame.assign(**{name: times.dt.tz_localize(None).dt.tz_localize(draw(st.sampled_from(["Asia/Tokyo", "America/New_York", "Europe/London"])))})
    if how == "epoch":
        return frame.assign(**{name: times.dt.as_unit(draw(st.sampled_from(["s", "ms", "us", "ns"]))).astype("int64")})
    if how in ("text", "mixed"):
        text = times.astype(str).to_numpy(object)
        if how == "mixed":
            text[rows] = [t.removesuffix("+00:00") for t in text[rows]]
        return frame.assign(**{name: text})
    new = times.to_numpy().copy()
    if how == "swap":
        new[rows] = new[rows[::-1]]
    else:
        new[rows] = new[rows] + pd.Timedelta(days=draw(st.sampled_from([-30, -3, -1, 1, 3, 4000])))
    return frame.assign(**{name: pd.Series(new, index=frame.index)})


CHANGES: list[Callable[[Any, pd.DataFrame], pd.DataFrame]] = [_values, _values, _scaled, _rows, _columns, _stamps]


@st.composite
def corrupt_files(draw: st.DrawFn) -> tuple[str, bytes]:
    """A file's ending and its bytes."""
    frame = draw(changed_tables()) if draw(st.integers(0, 3)) else (dated() if draw(st.booleans()) else GOOD)
    if draw(st.booleans()) and frame.columns.is_unique:
        sink = pa.BufferOutputStream()
        try:  # a footer has no checksum, but pages can have one, and then flipped values are seen
            pq.write_table(pa.Table.from_pandas(frame, preserve_index=False), sink, compression="zstd", write_page_checksum=True)
        except (pa.ArrowException, ValueError):
            return "csv", b"<!doctype html><title>503</title>"
        return "parquet", damaged(draw, sink.getvalue().to_pybytes())
    sep = draw(st.sampled_from([",", ",", ";", "\t", "|", ":"]))
    decimal = draw(st.sampled_from([".", ".", ","]))
    text = frame.to_csv(index=draw(st.booleans()) and frame.index.is_unique, sep=sep, decimal=decimal, float_format=draw(st.sampled_from([None, "%.3f"])))
    header, _, rest = text.partition("\n")
    text = draw(st.sampled_from([text, text, text, f"{header}\n{text}", rest, f"<html>{text}", "", header + "\n", text[:-1], f"# made by hand\n{text}"]))
    return "csv", damaged(draw, text.encode(draw(st.sampled_from(["utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-32"]))))


def damaged(draw: st.DrawFn, body: bytes) -> bytes:
    """Bytes cut, flipped or taken out, or none of it."""
    how = draw(st.sampled_from(["whole", "whole", "cut", "flip", "hole"]))
    if how == "whole" or len(body) < 10:
        return body
    at = draw(st.integers(0, len(body) - 2))
    if how == "cut":
        return body[:at]
    if how == "hole":
        return body[:at] + body[at + draw(st.integers(1, 200)):]
    out = bytearray(body)
    for place in [at, *draw(st.lists(st.integers(0, len(body) - 1), max_size=3))]:
        out[place] ^= 1 << draw(st.integers(0, 7))
    return bytes(out)


def check_corrupt(file: tuple[str, bytes], calendar: str | None) -> None:
    folder = Path(tempfile.mkdtemp())
    try:
        (folder / f"mine.{file[0]}").write_bytes(file[1])
        try:
            read = read_folder(folder, calendar=calendar)
        except (DataError, ParameterError):
            return
        for bars in read.sets:
            from_frame(bars.bars)
        assert silently_wrong(read, GOOD) == []
    finally:
        shutil.rmtree(folder)


QUIET = settings(max_examples=100, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


@QUIET
@given(corrupt_files(), st.sampled_from(["XNYS", None]))
def test_corrupt_files_are_refused_or_repaired_in_the_open(file: tuple[str, bytes], calendar: str | None) -> None:
    check_corrupt(file, calendar)


@pytest.mark.slow
@settings(QUIET, max_examples=1000)
@given(corrupt_files(), st.sampled_from(["XNYS", None]))
def test_a_thousand_corrupt_files(file: tuple[str, bytes], calendar: str | None) -> None:
    check_corrupt(file, calendar)


def test_the_oracle_sees_what_is_wrong(tmp_path: Path) -> None:
    """Bars that were changed behind the reader's back are wrong; late ones are not."""
    read = read_folder(put(tmp_path, mine=GOOD))
    (bars,) = read.sets
    for change in (lambda f: f.assign(close=f["close"].where(f.index != 30, f["close"] * 1.5)), lambda f: f.assign(timestamp=f["timestamp"].shift(3).fillna(f["timestamp"])),
                   lambda f: f.assign(timestamp=f["timestamp"] - pd.Timedelta(minutes=1)), lambda f: f.assign(symbol=f["symbol"] + "x")):
        broken = Folder([type(bars)(bars.name, change(bars.bars), bars.frequency, bars.calendar, bars.prices)], read.macro, read.news, read.facts, read.findings, read.removed)
        assert silently_wrong(broken, GOOD)
    late = Folder([type(bars)(bars.name, bars.bars.assign(timestamp=bars.bars["timestamp"] + pd.Timedelta(hours=1)), bars.frequency, bars.calendar, bars.prices)], read.macro, read.news, read.facts, read.findings, read.removed)
    assert silently_wrong(late, GOOD) == []


# --- real data ---------------------------------------------------------------------------------------------------------------

TOLD: dict[str, dict[str, str]] = {  # what these files do not say themselves
    "closes_daily": {"prices": "total"},
    "crypto_5m": {"stamp": "start"},
    "index_1h": {"stamp": "start", "calendar": "24/5"},
    "lean_1h": {"stamp": "start", "calendar": "XNYS"},
    "spy_1m": {"stamp": "start"},
}
needs_data = pytest.mark.skipif(not DATA, reason="MLTRADING_DATA names no folder")


def alone(tmp_path: Path, file: str) -> Folder:
    """One file of the real data, in a folder of its own."""
    (tmp_path / Path(file).name).symlink_to(Path(str(DATA)) / file)
    name = Path(file).stem
    return read_folder(tmp_path, tables={name: TOLD[name]} if name in TOLD else None)


def hits(read: Folder, rule: str) -> pd.Series:
    """Bars hit by a rule, by symbol."""
    return read.findings[read.findings["rule"] == rule].set_index("symbol")["bars"]


@needs_data
@pytest.mark.slow
def test_the_folder_of_bars_loads_as_a_whole() -> None:
    read = read_folder(Path(str(DATA)) / "bars", tables=TOLD)
    files = sorted(p.stem for p in (Path(str(DATA)) / "bars").glob("*.parquet"))
    assert [s.name for s in read.sets] == files
    assert {s.name: s.frequency for s in read.sets if s.frequency != "1d"} == {"crypto_5m": "5m", "index_1h": "1h", "lean_1h": "1h", "spy_1m": "1m", "spy_qqq_1m": "1m", "us_stocks_5m": "5m"}
    assert {s.name: s.calendar for s in read.sets if s.calendar != "XNYS"} == {"crypto_5m": "24/7", "crypto_daily": "24/7", "index_1h": "24/5"}
    assert {s.name: s.prices for s in read.sets if s.prices != "raw"} == {"closes_daily": "total", "etf230_daily": "splits", "sp500_daily": "splits"}
    assert set(read.findings["table"]) == set(files)
    for s in read.sets:
        assert len(from_frame(s.bars).times)


@needs_data
@pytest.mark.parametrize("file", ["index_1h", "lean_1h", "crypto_5m", "spy_1m"])
def test_starts_are_asked_for_where_the_data_cannot_tell(file: str, tmp_path: Path) -> None:
    (tmp_path / f"{file}.parquet").symlink_to(Path(str(DATA)) / "bars" / f"{file}.parquet")
    with pytest.raises(DataError, match=r"STAMP=start|CALENDAR="):
        read_folder(tmp_path)


@needs_data
def test_etf230(tmp_path: Path) -> None:
    read = alone(tmp_path, "bars/etf230_daily.parquet")
    (bars,) = read.sets
    assert (bars.frequency, bars.calendar, bars.prices) == ("1d", "XNYS", "splits")
    assert hits(read, "not_positive").to_dict() == {"^IRX": 9, "SPLG": 3}
    assert len(read.removed) == 12
    zero = read.removed["volume"].eq(0).sum()
    assert hits(read, "no_volume").sum() + zero == 7_031
    broken = (read.removed["high"] < read.removed[["open", "close"]].max(axis=1)) | (read.removed["low"] > read.removed[["open", "close"]].min(axis=1))
    assert broken.sum() == 3  # the inconsistent bars are among those without a price
    assert hits(read, "jump").idxmax() == "^IRX"
    assert "gaps" not in set(read.findings[~read.findings["symbol"].isin(["^IRX", "SPLG"])]["rule"])  # listing late is no gap


@needs_data
def test_commodity_etfs(tmp_path: Path) -> None:
    read = alone(tmp_path, "bars/commodity_etf_daily.parquet")
    assert hits(read, "no_volume").sum() == 763
    assert hits(read, "gaps").sum() > 1_000
    assert {"OUNZ", "SOYB"} <= set(hits(read, "gaps").nlargest(8).index)


@needs_data
def test_sp500(tmp_path: Path) -> None:
    read = alone(tmp_path, "bars/sp500_daily.parquet")
    assert hits(read, "inconsistent").sum() == 1
    payout = read.findings[read.findings["rule"] == "payout"]
    assert payout[["symbol", "first"]].astype(str).to_numpy().tolist() == [["KDP", "2018-07-10 20:00:00+00:00"]]
    assert "KDP" not in hits(read, "jump")  # the adjusted price does not jump
    assert read.removed.empty


@needs_data
def test_lean_hours(tmp_path: Path) -> None:
    read = alone(tmp_path, "bars/lean_1h.parquet")
    assert (hits(read, "split").reindex(["AAPL", "AIG", "BAC", "IBM", "VXX"]) >= [4, 2, 1, 1, 5]).all()
    assert "SPY" not in hits(read, "split")
    (bars,) = read.sets
    assert bars.bars["volume"].isna().sum() == 74_439  # a currency has none
    assert len(read.removed) == 0


@needs_data
def test_lean_days_know_their_splits(tmp_path: Path) -> None:
    read = alone(tmp_path, "bars/lean_daily.parquet")
    assert read.sets[0].prices == "raw"
    assert hits(read, "gaps")["USO"] > 0
    assert "unit" in set(read.findings[read.findings["symbol"] == "USO"]["rule"])  # another company before its launch
    assert hits(read, "split")["AAPL"] == 1  # the factor explains its four splits; the crash of September 2000 was none


@needs_data
def test_minutes_of_stocks(tmp_path: Path) -> None:
    read = alone(tmp_path, "bars/us_stocks_5m.parquet")
    assert "told by the sessions" in " ".join(read.sets[0].notes)
    lost = read.findings[read.findings["rule"] == "off_session"]
    assert lost["first"].min() == pd.Timestamp("2025-09-15 12:05", tz="UTC")  # the feed changes and brings bars before and after hours


@needs_data
def test_crypto(tmp_path: Path) -> None:
    read = alone(tmp_path, "bars/crypto_5m.parquet")
    assert hits(read, "no_volume").sum() == 28
    assert (hits(read, "gaps") > 0).sum() == 2
    assert read.sets[0].calendar == "24/7"


@needs_data
@pytest.mark.parametrize(("file", "lost"), [("macro/vix_daily.parquet", 13), ("acl18/price_raw.parquet", 3)])
def test_other_bars(file: str, lost: int, tmp_path: Path) -> None:
    read = alone(tmp_path, file)
    assert read.sets[0].calendar == "XNYS"
    assert len(read.removed) == lost
    assert len(read.findings)


@needs_data
@pytest.mark.parametrize("file", ["macro/series.parquet", "acl18/tweets.parquet", "text/tsla_news.parquet"])
def test_tables_that_are_no_bars_are_refused(file: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="column `close`: is missing"):
        alone(tmp_path, file)


@pytest.mark.parametrize("clock", ["05:00", "16:00", "22:00"])
def test_a_day_of_a_market_without_sessions_has_to_be_told(tmp_path: Path, clock: str) -> None:
    """A start that is taken for a close gives every price a day early."""
    stamps = [f"{day:%Y-%m-%d} {clock}:00+00:00" for day in pd.date_range("2020-01-01", periods=60)]
    pd.DataFrame({"Time": stamps, "Close": [100.0 + i % 7 for i in range(60)]}).to_csv(tmp_path / "BTC.csv", index=False)
    with pytest.raises(DataError, match="names the start or the close of a bar"):
        read_folder(tmp_path)
    close, start = (read_folder(tmp_path, stamp=end).sets[0].bars["timestamp"] for end in ("close", "start"))
    assert (start - close).unique().tolist() == [pd.Timedelta(days=1)]


def test_all_tables_are_looked_at_before_anything_is_refused(tmp_path: Path) -> None:
    stamps = pd.date_range("2020-01-01 16:00", periods=60, tz="UTC")
    for name in ("one", "two", "three"):
        pd.DataFrame({"timestamp": stamps, "symbol": name, "close": [100.0 + i % 7 for i in range(60)]}).to_parquet(tmp_path / f"{name}.parquet")
    with pytest.raises(DataError) as caught:
        read_folder(tmp_path, tables={"three": {"stamp": "close"}})
    assert "2 of 3 tables" in str(caught.value)
    assert "table `one`" in str(caught.value)
    assert "table `two`" in str(caught.value)
    assert '{"tables": {"NAME"' in str(caught.value)
    assert len(read_folder(tmp_path, stamp="close").sets) == 3


def test_a_shifted_week_is_no_market_without_sessions(tmp_path: Path) -> None:
    """Tuesday to Saturday: every date is a day late."""
    days = pd.bdate_range("2020-01-01", periods=300) + pd.Timedelta(days=1)
    pd.DataFrame({"Date": days.strftime("%Y-%m-%d"), "Close": [100.0 + i % 7 for i in range(300)]}).to_csv(tmp_path / "AAA.csv", index=False)
    with pytest.raises(DataError, match="follow no calendar that can be guessed"):
        read_folder(tmp_path)


@pytest.mark.parametrize(("path", "says"), [("nowhere", "no such folder"), ("AAA.csv", "is a file")])
def test_a_path_that_is_no_folder(tmp_path: Path, path: str, says: str) -> None:
    (tmp_path / "AAA.csv").write_text("Date,Close\n2020-01-02,1\n")
    with pytest.raises(DataError, match=says):
        read_folder(tmp_path / path)
