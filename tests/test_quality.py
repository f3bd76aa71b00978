"""Each quality rule finds the fault that was planted, nothing in a clean market, and does what its policy says."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest

from mltrading.core.errors import DataError, ParameterError
from mltrading.market.calendar import expected, sessions
from mltrading.market.panel import from_frame, to_frame
from mltrading.market.quality import examine
from mltrading.market.rules import RULES
from mltrading.market.simulate import random_walk

N = 400
PRICES = ["open", "high", "low", "close"]


def market(seed: int = 3, factor: bool = True) -> pd.DataFrame:
    """Two clean symbols stamped with the closes of New York, and a factor of one."""
    frame = to_frame(random_walk(2, N, seed=seed, ragged=False))
    closes = pd.DatetimeIndex(sessions("XNYS", "2015-01-02", "2016-12-30")["close"])[:N]
    frame["timestamp"] = closes.repeat(2)
    return frame.assign(adj_factor=1.0) if factor else frame


def minutes() -> pd.DataFrame:
    """A clean week of 30-minute bars of two symbols."""
    stamps = expected("XNYS", "30m", "2024-06-03", "2024-06-14")
    frame = market(factor=False).iloc[: 2 * len(stamps)]
    return frame.assign(timestamp=stamps.repeat(2)[: len(frame)])


A = "S000"
Change = Callable[[pd.DataFrame], pd.DataFrame]


def put(column: str | list[str], rows: slice | int, change: Callable[[pd.Series], object]) -> Change:
    """Change a column (or several) of symbol A at some of its bars."""
    def apply(frame: pd.DataFrame) -> pd.DataFrame:
        frame = frame.copy()
        mine = frame.index[frame["symbol"] == A][rows]
        for c in [column] if isinstance(column, str) else column:
            frame.loc[mine, c] = change(frame.loc[mine, c])
        return frame
    return apply


def swapped(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.assign(open=frame["close"].where(frame["symbol"] == A, frame["open"]), close=frame["open"].where(frame["symbol"] == A, frame["close"]))


def twice(change: Callable[[pd.Series], object]) -> Change:
    def apply(frame: pd.DataFrame) -> pd.DataFrame:
        row = frame[frame["symbol"] == A].iloc[[100]]
        return pd.concat([frame, row.assign(close=change(row["close"]))], ignore_index=True).sort_values(["timestamp", "symbol"], ignore_index=True, kind="stable")
    return apply


def unsorted(frame: pd.DataFrame) -> pd.DataFrame:
    order = np.arange(len(frame))
    order[[20, 40]] = order[[40, 20]]
    return frame.iloc[order].reset_index(drop=True)


def dividend(frame: pd.DataFrame) -> pd.DataFrame:
    """A payout of 60 %, in price and factor."""
    frame = put(PRICES, slice(200, None), lambda x: x * 0.4)(frame)
    return put("adj_factor", slice(0, 200), lambda x: x * 0.4)(frame)


def stamped(hours: int, rows: slice) -> Change:
    return put("timestamp", rows, lambda x: x + pd.Timedelta(hours=hours))


def holiday(frame: pd.DataFrame) -> pd.DataFrame:
    """The bar of Friday, 2 January 2015 at new year's day."""
    return put("timestamp", 0, lambda x: pd.Timestamp("2015-01-01 21:00", tz="UTC"))(frame)


PLANTED: dict[str, Change] = {
    "unsorted": unsorted,
    "repeated": twice(lambda x: x),
    "conflict": twice(lambda x: x * 1.01),
    "missing": put("open", 50, lambda x: np.nan),
    "not_positive": put("low", 50, lambda x: 0.0),
    "negative_volume": put("volume", 50, lambda x: -1.0),
    "bad_factor": put("adj_factor", 50, lambda x: 0.0),
    "dead": put(PRICES, slice(None), lambda x: 10.0),
    "lone": lambda frame: frame[(frame["symbol"] != A) | (np.arange(len(frame)) < 2)].reset_index(drop=True),
    "early": stamped(-2, slice(50, 51)),
    "off_session": holiday,
    "shifted": put("timestamp", 10, lambda x: pd.Timestamp("2015-01-17 21:00", tz="UTC")),
    "gaps": lambda frame: frame.drop(frame.index[frame["symbol"] == A][100:103]).reset_index(drop=True),
    "jump": put(PRICES, slice(200, None), lambda x: x * 1.3),
    "spike": put(PRICES, 200, lambda x: x * 1.5),
    "split": put(PRICES, slice(200, None), lambda x: x / 4),
    "unit": put(PRICES, slice(200, None), lambda x: x / 100),
    "outlier": put(PRICES, slice(200, None), lambda x: x * 1.9),
    "length": put("high", 200, lambda x: x * 3),
    "stale": put("close", slice(50, 57), lambda x: x.iloc[0]),
    "coarse": put(PRICES, slice(None), lambda x: (x / x.iloc[0] * 3).round(2)),
    "inconsistent": put("high", 30, lambda x: x * 0.5),
    "exchanged": swapped,
    "stale_open": lambda frame: frame.assign(open=frame.groupby("symbol")["close"].shift().where(frame["symbol"] == A, frame["open"]).fillna(frame["open"])),
    "no_volume": put("volume", 7, lambda x: 0.0),
    "volume_scale": put("volume", slice(200, None), lambda x: x * 30),
    "payout": dividend,
    "factor_jump": put("adj_factor", slice(0, 200), lambda x: x * 0.8),
}
FATAL = {name for name, r in RULES.items() if r.policy == "fail"}


def flagged(name: str) -> dict[str, str]:
    """Policies under which nothing fails but, if it must, the rule itself."""
    return {n: "flag" if "flag" in RULES[n].allowed else "drop" for n in FATAL}


def test_every_rule_has_a_planted_fault() -> None:
    assert list(PLANTED) == list(RULES)


@pytest.mark.parametrize("seed", range(5))
def test_clean_markets_pass_unchanged(seed: int) -> None:
    frame = market(seed)
    report = examine(frame, "1d", "XNYS")
    pd.testing.assert_frame_equal(report.bars, frame)
    assert report.findings.empty
    assert report.removed.empty
    assert examine(to_frame(random_walk(4, 500, seed=seed, ragged=False)), "irregular", None).findings.empty


def test_clean_minutes_pass_unchanged() -> None:
    report = examine(minutes(), "30m", "XNYS")
    assert report.findings.empty


@pytest.mark.parametrize("name", RULES)
def test_a_rule_finds_its_fault_in_the_symbol_that_has_it(name: str) -> None:
    frame = PLANTED[name](market())
    report = examine(frame, "1d", "XNYS", flagged(name))
    found = report.findings[report.findings["rule"] == name]
    assert list(found["symbol"]) == [A]
    assert set(report.findings["symbol"]) == {A}
    assert found["severity"].iloc[0] == RULES[name].severity
    assert len(report.bars) + len(report.removed) == len(frame)
    from_frame(report.bars)  # the panel's door is open for what is left


@pytest.mark.parametrize("name", [n for n in RULES if "fail" in RULES[n].allowed])
def test_a_policy_of_fail_names_rule_symbol_and_row(name: str) -> None:
    with pytest.raises(DataError, match=rf"mine.csv, rule `{name}`, row \d+ \({A} at 201"):
        examine(PLANTED[name](market()), "1d", "XNYS", flagged(name) | {name: "fail"}, "mine.csv")


@pytest.mark.parametrize("name", [n for n in RULES if "drop" in RULES[n].allowed])
def test_a_policy_of_drop_keeps_every_removed_row(name: str) -> None:
    frame = PLANTED[name](market())
    others = {n: "flag" for n in RULES if "flag" in RULES[n].allowed} | flagged(name)
    report = examine(frame, "1d", "XNYS", others | {name: "drop"})
    mine = report.removed[report.removed["rule"] == name].drop(columns="rule")
    assert len(mine) == report.findings.set_index("rule").loc[name, "bars"]
    assert mine.merge(frame, how="left", indicator=True)["_merge"].eq("both").all()
    assert len(report.bars) + len(report.removed) == len(frame)


def test_hours_beside_the_sessions_are_a_shift() -> None:
    frame = minutes()
    day = frame["timestamp"].dt.strftime("%m-%d") == "06-05"
    for hours in (-4, -1, 1, 5):
        moved = frame.assign(timestamp=frame["timestamp"] + pd.to_timedelta(np.where(day, hours, 0), unit="h").as_unit("us"))
        found = examine(moved, "30m", "XNYS").findings.set_index("rule")
        assert found.loc[["shifted"], "symbol"].tolist() == ["S000", "S001"]
        assert found.loc[["shifted"], "bars"].tolist() == [13, 13]


@pytest.mark.parametrize("hours", [-21, -12, -6, -1])
def test_daily_bars_before_their_close_are_refused(hours: int) -> None:
    frame = market()
    with pytest.raises(DataError, match="rule `early`"):
        examine(frame.assign(timestamp=frame["timestamp"] + pd.Timedelta(hours=hours)), "1d", "XNYS")


def test_late_stamps_are_no_fault() -> None:
    frame = market()
    assert examine(frame.assign(timestamp=frame["timestamp"] + pd.Timedelta(hours=6)), "1d", "XNYS").findings.empty


def test_a_late_listing_is_no_gap_and_a_missing_day_is() -> None:
    frame = market()
    late = frame.drop(frame.index[frame["symbol"] == A][:100])
    assert examine(late, "1d", "XNYS").findings.empty


def test_a_split_that_the_factor_explains_is_none() -> None:
    frame = put(PRICES, slice(200, None), lambda x: x / 2)(market())
    explained = put("adj_factor", slice(0, 200), lambda x: x / 2)(frame)
    assert "split" in set(examine(frame, "1d", "XNYS").findings["rule"])
    assert examine(explained, "1d", "XNYS").findings.empty


def test_order_of_rows_does_not_matter() -> None:
    frame = PLANTED["spike"](market())
    shuffled = frame.sample(frac=1.0, random_state=1)
    one, other = examine(frame, "1d", "XNYS"), examine(shuffled, "1d", "XNYS")
    pd.testing.assert_frame_equal(one.bars, other.bars)
    pd.testing.assert_frame_equal(one.findings, other.findings[other.findings["rule"] != "unsorted"].reset_index(drop=True))


@pytest.mark.parametrize(("policies", "message"), [({"spikes": "drop"}, "did you mean `spike`"), ({"spike": "remove"}, "cannot be done"), ({"gaps": "drop"}, "cannot be done")])
def test_wrong_policies_are_refused(policies: dict[str, str], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        examine(market(), "1d", "XNYS", policies)
