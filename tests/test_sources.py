"""Every source against every way in which a service fails.

The services are replayed on this computer, in the shape of their real replies. With MLTRADING_ONLINE=1 the tests that hold for
any honest service are also run against the real ones: all that need no key, and those whose keys are set.
"""

from __future__ import annotations

import copy
import itertools
import logging
import os
import random
import traceback
from collections.abc import Callable, Iterator
from datetime import date
from typing import Any
from urllib.parse import quote_plus, urlsplit

import numpy as np
import pandas as pd
import pytest
import replay
from replay import PRICES, SESSIONS, Market, Replay

from mltrading.market.http import SourceError, unreachable
from mltrading.market.prices import PRICE_SOURCES
from mltrading.market.source import Source, check_bars_of

ONLINE = os.environ.get("MLTRADING_ONLINE") == "1"
KEYS = {"alphavantage": ["ALPHAVANTAGE_API_KEY"], "polygon": ["POLYGON_API_KEY"], "alpaca": ["ALPACA_API_KEY", "ALPACA_SECRET_KEY"], "stooq": ["STOOQ_API_KEY"]}
SECRET = "s3cret/key+for tests".replace(" ", "-")
SPRING = (date(2024, 3, 7), date(2024, 3, 12))  # the clocks change on the 10th
AUTUMN = (date(2024, 11, 27), date(2024, 12, 2))  # the 29th is a half day
NAMES = list(PRICE_SOURCES)
REPLAYED = {name: "BTC/USDT" if name == "ccxt" else "AAA" for name in NAMES}
LISTED = REPLAYED | {"yfinance": "SPY", "stooq": "spy.us", "alphavantage": "IBM", "polygon": "SPY", "alpaca": "SPY"}
HASTE: dict[str, Any] = {"timeout_s": 20.0, "attempts": 3, "backoff_s": 0.01, "wait_s": 2.0}
SHORT_S = {"lasting": 0.1, "passing": 1.0}  # how long a server that hangs is waited for; after a passing fault an answer has to come in time


def moved_session(url: str, timeout_s: float) -> Any:
    """A session of Yahoo's library whose every question goes to another host."""
    from curl_cffi.requests import Session

    class Moved(Session):  # type: ignore[misc]
        def request(self, method: str, url_: str = "", **more: Any) -> Any:
            asked = urlsplit(more.pop("url", url_))
            more["timeout"] = timeout_s
            return super().request(method, f"{url}{asked.path or '/'}", **more)

    return Moved()


def replayed(name: str, server: Replay, **more: Any) -> Source:
    """A source that asks the replay server, in haste."""
    options = {**HASTE, **more}
    if name == "yfinance":
        return PRICE_SOURCES[name](session=moved_session(server.url, options["timeout_s"]), **{"per_minute": 1e6, **options})
    if name == "ccxt":
        source = PRICE_SOURCES[name](base_url=server.url, **options)
        source.exchange.enableRateLimit = False  # type: ignore[attr-defined]
        return source
    return PRICE_SOURCES[name](base_url=server.url, **{"per_minute": 1e6, **options})


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> None:
    """Example keys, no proxy, and a folder of its own for what Yahoo's library keeps."""
    import yfinance

    yfinance.set_tz_cache_location(str(tmp_path_factory.getbasetemp()))
    if "online" not in request.node.name:
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        for key in itertools.chain(*KEYS.values()):
            monkeypatch.setenv(key, SECRET)


@pytest.fixture
def market() -> Market:
    return Market()


@pytest.fixture
def serve(market: Market) -> Iterator[Callable[[str], Replay]]:
    """The replay server of one source."""
    with Replay([]) as server:

        def of(name: str) -> Replay:
            server.routes = [PRICES[name](market)]
            return server

        yield of


@pytest.fixture(params=[f"{where}-{name}" for where in ("replay", "online") for name in NAMES])
def service(request: pytest.FixtureRequest, serve: Callable[[str], Replay]) -> tuple[str, Source, str]:
    """A source and a symbol that it knows: replayed always, the real service where that is allowed."""
    where, name = request.param.split("-")
    if where == "replay":
        return name, replayed(name, serve(name)), REPLAYED[name]
    if not ONLINE:
        pytest.skip("MLTRADING_ONLINE=1 asks the real services")
    if missing := [key for key in KEYS.get(name, []) if not os.environ.get(key)]:
        pytest.skip(f"{', '.join(missing)} not set")
    return name, PRICE_SOURCES[name](), LISTED[name]


def failure(ask: Callable[[], Any]) -> SourceError:
    with pytest.raises(SourceError) as caught:
        ask()
    return caught.value


def stamps(bars: pd.DataFrame) -> list[str]:
    return [f"{t:%m-%d %H:%M}" for t in bars["timestamp"]]


# ------------------------------------------------------------------------------------------------ what holds for the real services, too


@pytest.mark.parametrize("span", [SPRING, AUTUMN], ids=["clocks-change", "half-day"])
def test_daily_bars_are_stamped_with_the_close(service: tuple[str, Source, str], span: tuple[date, date]) -> None:
    name, source, symbol = service
    bars = check_bars_of(source, symbol, *span, "1d")
    if name == "ccxt":
        expected = [f"{day + pd.Timedelta(days=1):%m-%d} 00:00" for day in pd.date_range(*span)]
    else:
        expected = [f"{day:%m-%d} {close}" for day, (_, close) in SESSIONS.items() if span[0] <= day <= span[1]]
    assert stamps(bars) == expected


def test_a_span_without_bars_is_no_failure(service: tuple[str, Source, str]) -> None:
    name, source, symbol = service
    weekend = (date(2024, 3, 9), date(2024, 3, 10)) if name != "ccxt" else (date(2035, 1, 1), date(2035, 1, 2))
    bars = check_bars_of(source, symbol, *weekend, "1d")
    assert bars.empty


def test_an_unknown_symbol_is_said_to_be_unknown(service: tuple[str, Source, str]) -> None:
    name, source, _ = service
    if name == "polygon":
        assert source.bars("NOSUCHX", *SPRING, "1d").empty  # it cannot tell
        return
    symbol = {"alpaca": "NO$SUCH", "ccxt": "NOSUCH/USDT"}.get(name, "NOSUCHX")
    assert failure(lambda: source.bars(symbol, *SPRING, "1d")).kind == "unknown"


# ------------------------------------------------------------------------------------------------ intraday, pages


INTRADAY = {"yfinance": ["1h", "5m", "1m"], "alphavantage": ["30m", "5m"], "polygon": ["30m", "5m", "1m"], "alpaca": ["30m", "5m", "1m"], "ccxt": ["1h", "5m"]}


@pytest.mark.parametrize(("name", "frequency"), [(n, f) for n, fs in INTRADAY.items() for f in fs])
def test_intraday_bars_are_stamped_with_their_own_close(name: str, frequency: str, serve: Callable[[str], Replay]) -> None:
    source = replayed(name, serve(name))
    step = pd.Timedelta(frequency.replace("m", "min"))
    for span in ((date(2024, 3, 8), date(2024, 3, 11)), (date(2024, 11, 29), date(2024, 11, 29))):
        bars = check_bars_of(source, REPLAYED[name], *span, frequency)
        expected: list[pd.Timestamp] = []
        for day in pd.date_range(*span):
            if name == "ccxt":
                opens, closes = day, day + pd.Timedelta(days=1)
            elif day.date() in SESSIONS:
                opens, closes = (pd.Timestamp(f"{day.date()} {clock}") for clock in SESSIONS[day.date()])
            else:
                continue
            ends = [opens + step * (i + 1) for i in range(int(np.ceil((closes - opens) / step)))]
            expected += [min(t, closes) for t in ends]
        assert list(bars["timestamp"].dt.tz_localize(None)) == expected
        begins = bars["timestamp"].iloc[0].to_pydatetime() - step.to_pytimedelta()
        assert bars["close"].iloc[0] == pytest.approx(replay.candle(begins)["close"])  # the bar that began one step earlier


@pytest.mark.parametrize(("name", "per_page"), [("polygon", 7), ("alpaca", 7), ("ccxt", 50)])
def test_all_pages_are_read(name: str, per_page: int, serve: Callable[[str], Replay], market: Market) -> None:
    server = serve(name)
    source = replayed(name, server, **({"per_page": per_page} if name == "ccxt" else {}))
    whole = source.bars(REPLAYED[name], *AUTUMN, "30m" if name != "ccxt" else "1h")
    before, market.per_page = len(server.asked), per_page
    assert whole.equals(source.bars(REPLAYED[name], *AUTUMN, "30m" if name != "ccxt" else "1h"))
    assert len(server.asked) - before > 2


def test_one_month_after_the_other(serve: Callable[[str], Replay]) -> None:
    server = serve("alphavantage")
    bars = check_bars_of(replayed("alphavantage", server), "AAA", *AUTUMN, "30m")
    assert [a.query["month"] for a in server.asked] == ["2024-11", "2024-12"]
    assert len(bars) == 13 + 7 + 13


def test_minutes_of_yahoo_come_a_week_at_a_time(serve: Callable[[str], Replay]) -> None:
    server = serve("yfinance")
    bars = check_bars_of(replayed("yfinance", server), "AAA", date(2024, 3, 1), date(2024, 3, 20), "1m")
    assert len(bars) == 4 * 390
    assert len({a.query["period1"] for a in server.asked if "chart" in a.path}) == 3


def test_where_the_next_page_is_does_not_decide_who_gets_the_key(serve: Callable[[str], Replay]) -> None:
    server = serve("polygon")
    server.fail(replay.body({"status": "OK", "resultsCount": 0, "results": [], "next_url": "x@127.0.0.9/?cursor=1"}))
    failure(lambda: replayed("polygon", server).bars("AAA", *SPRING, "1d"))
    assert server.asked[-1].path == "/x@127.0.0.9/"


# ------------------------------------------------------------------------------------------------ faults


COLUMN = {"yfinance": ('"close"', '"last"'), "stooq": ("Close", "Last"), "alphavantage": ("4. close", "4. last"), "polygon": ('"c"', '"last"'), "alpaca": ('"c"', '"last"')}

PERMANENT = {
    "401": (replay.status(401), "key"),
    "404": (replay.status(404), "unknown"),
    "429 for an hour": (replay.status(429, Retry_After="3600"), "limit"),
    "429": (replay.status(429), "limit"),
    "500": (replay.status(500), "down"),
    "hang": (replay.hang, "down"),
    "cut": (replay.cut, "down"),
    "empty": (replay.empty, "reply"),
    "html": (replay.html, "reply"),
    "changed columns": (None, "reply"),
    "no object": (replay.body([1, 2]), "reply"),
    "nothing in it": (replay.body({}), "reply"),
}


@pytest.mark.parametrize("fault", PERMANENT)
@pytest.mark.parametrize("name", NAMES)
def test_a_lasting_fault_has_its_kind(name: str, fault: str, serve: Callable[[str], Replay], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    server = serve(name)
    source = replayed(name, server, **({"timeout_s": SHORT_S["lasting"]} if fault == "hang" else {}))
    make, kind = PERMANENT[fault]
    if name == "ccxt" and fault == "404":
        kind = "down"  # markets have names, which the list of markets decides on
    server.fail_always(make or (replay.renamed(*COLUMN[name]) if name in COLUMN else replay.body([{"begin": 1709769600000, "last": "1.0"}])))
    error = failure(lambda: source.bars(REPLAYED[name], *SPRING, "1d"))
    assert error.kind == kind, error
    data = [a for a in server.asked if "crumb" not in a.path and a.path not in ("/", "/consent")]
    assert len(data) <= 7
    if kind not in ("down", "limit") and fault != "empty":
        assert len(data) <= 2  # Yahoo's library asks once more with another cookie, ccxt for the list of markets
    if fault == "changed columns" and name in COLUMN:
        assert COLUMN[name][0].strip('"') in str(error)
    shown = "".join(traceback.format_exception(error)) + caplog.text + repr(source) + repr(getattr(source, "_client", None))
    assert not [form for form in (SECRET, quote_plus(SECRET)) if form in shown]
    assert [e for e in (error.__cause__, error.__context__) if e] == []


@pytest.mark.parametrize("name", NAMES)
def test_a_passing_fault_is_not_noticed(name: str, serve: Callable[[str], Replay]) -> None:
    expected = replayed(name, serve(name)).bars(REPLAYED[name], *SPRING, "1d")
    assert len(expected) == (6 if name == "ccxt" else 4)
    for fault in (replay.status(429, Retry_After="0"), replay.status(500), replay.hang, replay.cut, replay.empty):
        server = serve(name)
        server.fail(fault)
        timeout = {"timeout_s": SHORT_S["passing"]} if fault is replay.hang else {}
        assert replayed(name, server, **timeout).bars(REPLAYED[name], *SPRING, "1d").equals(expected)


@pytest.mark.parametrize("name", NAMES)
def test_rows_out_of_order_are_sorted(name: str, serve: Callable[[str], Replay], market: Market) -> None:
    source = replayed(name, serve(name))
    for frequency in dict.fromkeys(("1d", source.frequencies[-1])):
        market.shuffled = False
        expected = source.bars(REPLAYED[name], *AUTUMN, frequency)
        market.shuffled = True
        assert source.bars(REPLAYED[name], *AUTUMN, frequency).equals(expected)


def test_a_pause_that_is_asked_for_is_kept(serve: Callable[[str], Replay]) -> None:
    server, slept = serve("polygon"), []
    server.fail(replay.status(429, Retry_After="7"), replay.status(503, Retry_After="Tue, 12 Mar 2024 12:00:09 GMT", Date="Tue, 12 Mar 2024 12:00:00 GMT"))
    replayed("polygon", server, wait_s=10, sleep=slept.append).bars("AAA", *SPRING, "1d")
    assert [s for s in slept if s >= 1] == [7, 9]


def test_requests_keep_their_distance(serve: Callable[[str], Replay], market: Market) -> None:
    server, market.per_page = serve("alpaca"), 1
    replayed("alpaca", server, per_minute=1200).bars("AAA", *SPRING, "1d")
    gaps = np.diff([a.at_s for a in server.asked])
    assert len(gaps) == 3
    assert gaps.min() > 0.04


def test_a_reply_that_drips_is_a_hang(serve: Callable[[str], Replay]) -> None:
    server = serve("polygon")
    server.fail_always(replay.drip)
    error = failure(lambda: replayed("polygon", server, timeout_s=0.05, attempts=1).bars("AAA", *SPRING, "1d"))
    assert (error.kind, "was not done" in str(error)) == ("down", True)


def test_an_endless_reply_is_refused(serve: Callable[[str], Replay]) -> None:
    server = serve("stooq")
    server.fail_always(replay.body("Date,Open\n" + "x" * 200_000))
    assert "more than 0.1 MB" in str(failure(lambda: replayed("stooq", server, max_mb=0.1).bars("AAA", *SPRING, "1d")))


JUNK = [None, "", "x", "2024-13-45", -1, 0, 10**30, 1e300, float("inf"), float("nan"), True, [], {}, [None], {"a": 1}, "1709769600000"]


def mangled(value: Any, rng: random.Random) -> Any:
    """The same reply with one of its parts replaced by something else, or missing."""
    value = copy.deepcopy(value)
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            places.append((node, key))
            walk(node[key])

    walk(value)
    node, key = rng.choice(places)
    if rng.random() < 0.2:
        del node[key]
    else:
        node[key] = rng.choice(JUNK)
    return value


def mangled_table(text: str, rng: random.Random) -> str:
    lines = [line.split(",") for line in text.split("\r\n")]
    line = rng.choice(lines)
    line[rng.randrange(len(line))] = str(rng.choice(JUNK))
    return "\r\n".join(",".join(line) for line in lines)


@pytest.mark.parametrize("name", NAMES)
def test_a_mangled_reply_is_refused_or_still_gives_bars(name: str, serve: Callable[[str], Replay]) -> None:
    server, rng = serve(name), random.Random(7)
    source = replayed(name, server, attempts=1)
    good = source.bars(REPLAYED[name], *AUTUMN, "1d")
    for _ in range(60):
        server.fail_always(lambda reply: replay.Reply(mangled_table(reply.body, rng) if isinstance(reply.body, str) else mangled(reply.body, rng)))
        try:
            bars = source.bars(REPLAYED[name], *AUTUMN, "1d")
        except SourceError:
            continue
        assert bars["timestamp"].isin(good["timestamp"]).all()
        whole = [c for c in bars.columns if c not in ("vwap", "trade_count")]
        assert bars[whole].notna().all(axis=None)
        assert bars["timestamp"].is_monotonic_increasing


# ------------------------------------------------------------------------------------------------ each service's own words


NOTICES = [
    ("stooq", "Exceeded the daily hits limit", "limit"),
    ("stooq", "Get your apikey:\n\n1. Open https://stooq.com/q/d/?s=spy.us&get_apikey", "key"),
    ("stooq", "<!DOCTYPE html><html><body>Get your apikey: open the page</body></html>", "key"),
    ("alphavantage", {"Note": "Thank you for using Alpha Vantage! Our standard API call frequency is 5 calls per minute and 500 calls per day."}, "limit"),
    ("alphavantage", {"Information": "We have detected your API key as ECHO and our standard API rate limit is 25 requests per day."}, "limit"),
    ("alphavantage", {"Information": "Thank you for using Alpha Vantage! Please consider spreading out your free API requests more sparingly (1 request per second)."}, "limit"),
    ("alphavantage", {"Information": "Thank you for using Alpha Vantage! This is a premium endpoint."}, "key"),
    ("alphavantage", {"Error Message": "the parameter apikey is invalid or missing. Please claim your free API key."}, "key"),
    ("alphavantage", {"Error Message": "Invalid API call. Please retry or visit the documentation."}, "unknown"),
    ("alphavantage", {"Meta Data": {"5. Time Zone": "Mars/Olympus"}, "Time Series (Daily)": {}}, "reply"),
    ("polygon", {"status": "OK", "resultsCount": 3}, "reply"),
    ("yfinance", {"chart": {"result": [{"meta": {"exchangeTimezoneName": "Mars/Olympus"}, "timestamp": [1], "indicators": {"quote": [{"close": [1]}]}}]}}, "reply"),
    ("ccxt", [[None, "1", "1", "1", "1", "1"]], "reply"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "words", "kind"), NOTICES)
def test_a_notice_is_understood(name: str, words: Any, kind: str, serve: Callable[[str], Replay]) -> None:
    server = serve(name)
    server.fail_always(replay.body(words))
    error = failure(lambda: replayed(name, server).bars(REPLAYED[name], *SPRING, "1d"))
    assert error.kind == kind
    assert SECRET not in str(error)


def test_a_reach_that_yahoo_refuses_is_explained(serve: Callable[[str], Replay]) -> None:
    server = serve("yfinance")
    words = "1m data not available for startTime=1709683200 and endTime=1710288000. The requested range must be within the last 30 days."
    server.fail_always(lambda reply: replay.Reply({"chart": {"result": None, "error": {"code": "Unprocessable Entity", "description": words}}}, 422))
    error = failure(lambda: replayed("yfinance", server).bars("AAA", *SPRING, "1m"))
    assert (error.kind, "within the last 30 days" in str(error)) == ("reply", True)


@pytest.mark.parametrize("name", [n for n in NAMES if n in KEYS and n != "stooq"])
def test_a_missing_key_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in KEYS[name]:
        monkeypatch.setenv(key, "")
    error = failure(PRICE_SOURCES[name])
    assert (error.kind, error.where) == ("key", KEYS[name][0])


def test_a_row_of_the_running_day_replaces_its_earlier_state(serve: Callable[[str], Replay]) -> None:
    def twice(reply: replay.Reply) -> replay.Reply:
        chart = reply.body["chart"]["result"][0]
        chart["timestamp"].append(chart["timestamp"][-1] + 3600)
        for block in (*chart["indicators"]["quote"], *chart["indicators"]["adjclose"]):
            for values in block.values():
                values.append(values[-1] + 0.25)
        return reply

    server = serve("yfinance")
    server.fail(twice)
    bars = replayed("yfinance", server).bars("AAA", *SPRING, "1d")
    assert stamps(bars) == ["03-07 21:00", "03-08 21:00", "03-11 20:00", "03-12 20:00"]
    assert bars["close"].iloc[-1] == pytest.approx(replay.candle(replay.moment(SPRING[1], "20:00"))["close"] + 0.25)


def test_a_bar_with_a_hole_is_left_out(serve: Callable[[str], Replay]) -> None:
    def holes(reply: replay.Reply) -> replay.Reply:
        reply.body["results"][1]["h"] = None
        del reply.body["results"][2]["vw"]  # a bar may lack this one
        return reply

    server = serve("polygon")
    server.fail(holes)
    bars = replayed("polygon", server).bars("AAA", *SPRING, "1d")
    assert stamps(bars) == ["03-07 21:00", "03-11 20:00", "03-12 20:00"]
    assert bars.drop(columns="vwap").notna().all(axis=None)


AMONG_THE_DATA = {  # replies that hold what was sent, key included, where data should stand
    "alphavantage": [
        {"Meta Data": {"5. Time Zone": "US/Eastern"}, "Time Series (Daily)": {"Information": "we have seen your key ECHO"}},
        {"Meta Data": {"5. Time Zone": "US/Eastern"}, "Time Series (Daily)": {"2024-03-08": {"1. open": "ECHO"}}},
        {"Meta Data": "x" * 100 + "ECHO"},
    ],
    "polygon": [{"results": ["ECHO"]}, {"results": [{"t": "ECHO", "o": 1, "h": 1, "l": 1, "c": 1, "v": 1}]}, {"results": [{"t": 1709854200000, "o": "ECHO"}]}, {"x": "x" * 215 + "ECHO"}],
    "alpaca": [{"bars": ["ECHO"]}, {"bars": [{"t": "ECHO", "o": 1, "h": 1, "l": 1, "c": 1, "v": 1}]}, {"bars": [{"t": "2024-03-08T05:00:00Z", "o": "ECHO"}]}, {"x": "x" * 215 + "ECHO"}],
}  # fmt: skip


@pytest.mark.parametrize(("name", "reply"), [(name, reply) for name, replies in AMONG_THE_DATA.items() for reply in replies])
def test_a_key_among_the_data_is_not_shown(name: str, reply: Any, serve: Callable[[str], Replay]) -> None:
    server = serve(name)
    source = replayed(name, server)
    server.fail_always(replay.body(reply))
    shown = "".join(traceback.format_exception(failure(lambda: source.bars(REPLAYED[name], *SPRING, "1d"))))
    assert not [part for i in range(len(SECRET) - 7) if (part := SECRET[i : i + 8]) in shown]


@pytest.mark.parametrize("words", ["[Errno -2] Name or service not known", "Could not resolve host: query2.example", "Temporary failure in name resolution", "getaddrinfo failed"])
def test_without_a_network_nothing_is_asked_twice(words: str) -> None:
    outcome = unreachable(OSError(words))
    assert outcome.kind == "down"
    assert not outcome.again
    assert "network" in outcome.what
    assert unreachable(OSError("connection reset")).again
