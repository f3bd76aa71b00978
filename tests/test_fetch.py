"""The cache never glues two versions of a history together, never forgets, and never keeps a bar that was still moving."""

from __future__ import annotations

from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mltrading.core.storage import read_json
from mltrading.market.fetch import Cache, agree, days_of, fetch_symbol, gather
from mltrading.market.http import SourceError
from mltrading.market.panel import PRICES, to_frame
from mltrading.market.simulate import random_walk
from mltrading.market.store import file_name

FIRST = date(2023, 1, 2)


class Service:
    """One symbol whose whole history may be restated, with a clock."""

    name, frequencies, calendar, prices = "simulated", ("1d",), "24/5", "splits"

    def __init__(self, seed: int) -> None:
        self.truth = to_frame(random_walk(1, 200, seed=seed, ragged=False, start=str(FIRST)))
        self.now, self.asked, self.fails = pd.Timestamp(FIRST, tz="UTC") + pd.Timedelta(days=30), [], False
        self.asked: list[tuple[date, date]] = []

    def bars(self, symbol: str, start: date, end: date, frequency: str) -> pd.DataFrame:
        self.asked.append((start, end))
        if self.fails:
            raise SourceError("simulated", "does not answer", kind="down")
        day = days_of(self.truth["timestamp"])
        rows = self.truth[(day >= pd.Timestamp(start)) & (day <= pd.Timestamp(end))]
        begun = rows[rows["timestamp"] <= self.now + pd.Timedelta(hours=20)].reset_index(drop=True)
        moving = begun["timestamp"] > self.now
        return begun.assign(close=begun["close"].where(~moving, begun["close"] * 1.01))

    def between(self, start: date, end: date) -> pd.DataFrame:
        day = days_of(self.truth["timestamp"])
        return self.truth[(day >= pd.Timestamp(start)) & (day <= pd.Timestamp(end)) & (self.truth["timestamp"] <= self.now)].reset_index(drop=True)

    def restate(self, ratio: float) -> None:
        self.truth[list(PRICES)] *= ratio


@pytest.mark.parametrize("seed", range(25))
def test_any_sequence_of_calls(tmp_path: Path, seed: int) -> None:
    """Time passes, spans move, histories are restated, calls fail: what a call gives is one version of the truth, whole."""
    rng, service, cache = np.random.default_rng(seed), Service(seed), Cache(tmp_path)
    version, held_version = 0, -1
    for _ in range(25):
        service.now += pd.Timedelta(hours=int(rng.integers(0, 200)))
        if rng.random() < 0.2:
            service.restate(float(rng.choice([0.5, 2.0, 0.99, 1 / 3])))
            version += 1
        start = FIRST + timedelta(days=int(rng.integers(0, 40)))
        end = min(start + timedelta(days=int(rng.integers(1, 150))), service.now.date())
        if end < start:
            continue
        service.fails = rng.random() < 0.2
        before = cache.read("S000")
        try:
            status = fetch_symbol(service, "S000", start, end, "1d", cache, service.now)
        except SourceError:
            after = cache.read("S000")
            assert (after is None) == (before is None)
            assert before is None or (after is not None and after.bars.equals(before.bars))
            continue
        got = cache.bars("S000", start, end)
        if status != "cached":
            held_version = version
        if held_version == version:
            pd.testing.assert_frame_equal(got, service.between(start, end)[got.columns], check_dtype=False)
        held = cache.read("S000")
        assert held is not None
        assert held.end < service.now.date()
        assert (held.bars["timestamp"] <= service.now).all()
        assert held.bars["timestamp"].is_monotonic_increasing
        assert held.bars["timestamp"].is_unique


def test_a_shorter_question_asks_for_nothing_and_a_later_one_for_little(tmp_path: Path) -> None:
    service, cache = Service(1), Cache(tmp_path)
    service.now = pd.Timestamp("2023-06-01 23:00", tz="UTC")
    fetch_symbol(service, "S000", FIRST, date(2023, 5, 1), "1d", cache, service.now)
    service.asked.clear()
    assert fetch_symbol(service, "S000", date(2023, 2, 1), date(2023, 3, 1), "1d", cache, service.now) == "cached"
    assert service.asked == []
    assert fetch_symbol(service, "S000", FIRST, date(2023, 5, 31), "1d", cache, service.now) == "appended"
    assert service.asked[0][0] > date(2023, 4, 15)


def test_a_delisted_symbol_is_not_forgotten(tmp_path: Path) -> None:
    service, cache = Service(2), Cache(tmp_path)
    service.now = pd.Timestamp("2023-06-01 23:00", tz="UTC")
    fetch_symbol(service, "S000", FIRST, date(2023, 5, 1), "1d", cache, service.now)
    before = cache.bars("S000", FIRST, date(2023, 5, 1))
    service.truth = service.truth.iloc[:0]
    for start in (FIRST, FIRST - timedelta(days=60)):
        gather(service, ["S000"], start, date(2023, 5, 31), "1d", cache, service.now)
        pd.testing.assert_frame_equal(cache.bars("S000", FIRST, date(2023, 5, 1)), before)


class Window(Service):
    """Keeps only the last days, delivers late, or says nothing at all."""

    keeps_days, late_days, silent = 10_000, 0, False

    def bars(self, symbol: str, start: date, end: date, frequency: str) -> pd.DataFrame:
        found, day = super().bars(symbol, start, end, frequency), pd.Timedelta(days=1)
        if self.silent:
            return found.iloc[:0]
        stamps = found["timestamp"]
        return found[(stamps > self.now - self.keeps_days * day) & (stamps <= self.now - self.late_days * day)].reset_index(drop=True)


def window(seed: int, tmp_path: Path, until: str) -> tuple[Window, Cache]:
    """A service that was asked for all from the first day until another, on that evening."""
    service, cache = Window(seed), Cache(tmp_path)
    service.now = pd.Timestamp(f"{until} 23:00", tz="UTC")
    fetch_symbol(service, "S000", FIRST, date.fromisoformat(until), "1d", cache, service.now)
    return service, cache


def test_no_bars_in_the_overlap_is_no_agreement(tmp_path: Path) -> None:
    service, cache = window(5, tmp_path, "2023-03-01")
    service.restate(0.25)
    service.now, service.keeps_days = pd.Timestamp("2023-06-01 23:00", tz="UTC"), 60
    with pytest.raises(SourceError, match="no longer gives the bars from 2023-01-02"):
        fetch_symbol(service, "S000", FIRST, date(2023, 5, 31), "1d", cache, service.now)
    assert cache.read("S000").end < date(2023, 3, 2)  # type: ignore[union-attr]
    assert fetch_symbol(service, "S000", date(2023, 5, 1), date(2023, 5, 31), "1d", cache, service.now) == "restated"
    expected = service.between(date(2023, 5, 1), date(2023, 5, 31))
    pd.testing.assert_frame_equal(cache.bars("S000", date(2023, 5, 1), date(2023, 5, 31)), expected, check_dtype=False)


def test_silence_does_not_count_as_days_without_bars(tmp_path: Path) -> None:
    service, cache = window(6, tmp_path, "2023-03-01")
    service.now, service.silent = pd.Timestamp("2023-06-01 23:00", tz="UTC"), True
    report = gather(service, ["S000"], FIRST, date(2023, 5, 31), "1d", cache, service.now)
    assert report["status"].tolist() == ["silent"]
    assert "after 2023-03-01" in report["why"].iloc[0]
    service.silent = False
    assert fetch_symbol(service, "S000", FIRST, date(2023, 5, 31), "1d", cache, service.now) == "appended"
    assert len(cache.bars("S000", FIRST, date(2023, 5, 31))) == len(service.between(FIRST, date(2023, 5, 31)))


def test_late_bars_are_asked_for_again(tmp_path: Path) -> None:
    service, cache = window(7, tmp_path, "2023-03-01")
    service.now, service.late_days = pd.Timestamp("2023-03-08 01:00", tz="UTC"), 3
    fetch_symbol(service, "S000", FIRST, date(2023, 3, 7), "1d", cache, service.now)
    service.now, service.late_days = pd.Timestamp("2023-03-08 21:30", tz="UTC"), 0
    assert fetch_symbol(service, "S000", FIRST, date(2023, 3, 7), "1d", cache, service.now) == "appended"
    assert len(cache.bars("S000", FIRST, date(2023, 3, 7))) == len(service.between(FIRST, date(2023, 3, 7)))


def test_a_corrected_bar_costs_no_history(tmp_path: Path) -> None:
    service, cache = window(8, tmp_path, "2023-05-01")
    service.truth.loc[service.truth["timestamp"] == "2023-04-28 21:00+00:00", "close"] *= 1.0001
    service.now, service.keeps_days = pd.Timestamp("2023-06-01 23:00", tz="UTC"), 60
    assert fetch_symbol(service, "S000", FIRST, date(2023, 5, 31), "1d", cache, service.now) == "appended"
    pd.testing.assert_frame_equal(cache.bars("S000", FIRST, date(2023, 5, 31)), service.between(FIRST, date(2023, 5, 31)), check_dtype=False)


@pytest.mark.parametrize("damage", ["cut", "swapped", "note", "no note"])
def test_a_damaged_cache_is_not_believed(tmp_path: Path, damage: str) -> None:
    service, cache = Service(3), Cache(tmp_path)
    service.now = pd.Timestamp("2023-06-01 23:00", tz="UTC")
    fetch_symbol(service, "S000", FIRST, date(2023, 5, 1), "1d", cache, service.now)
    path = tmp_path / file_name("S000")
    note = path.with_suffix(".json")
    match damage:
        case "cut":
            path.write_bytes(path.read_bytes()[:-10])
        case "swapped":
            path.write_bytes(bytes(reversed(path.read_bytes())))
        case "note":
            note.write_text(note.read_text()[:-5])
        case "no note":
            note.unlink()
    assert cache.read("S000") is None
    assert fetch_symbol(service, "S000", FIRST, date(2023, 5, 1), "1d", cache, service.now) == "fetched"
    assert set(read_json(note)) == {"format", "content", "start", "end", "retrieved"}


@pytest.mark.parametrize(("edit", "same"), [
    (lambda f: f, True),
    (lambda f: f.assign(close=f["close"] * (1 + 1e-8)), True),
    (lambda f: f.assign(volume=f["volume"] + 1), True),
    (lambda f: f.assign(close=f["close"] * (1 + 1e-4)), False),
    (lambda f: f.assign(adj_factor=0.5), False),
    (lambda f: f.drop(index=f.index[2]), False),  # in the older half
    (lambda f: f.drop(index=f.index[4]), True),   # in the newer half
    (lambda f: f.iloc[3:], True),
    (lambda f: f.iloc[6:], False),  # nothing is shared
    (lambda f: f.iloc[:0], False),
])  # fmt: skip
def test_when_two_histories_agree(edit, same: bool) -> None:  # type: ignore[no-untyped-def]
    old = Service(4).truth.iloc[:50]
    assert agree(old, edit(Service(4).truth.iloc[44:60].reset_index(drop=True)).reset_index(drop=True)) is same
