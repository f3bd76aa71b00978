"""A server on this computer that answers as the real services do, and misbehaves on demand.

A *route* is a function of what was asked that gives a `Reply` in a service's own shape, or None where the question is for
another route. A *fault* is a function that makes a good reply into a bad one. `Replay` tries its routes in order, applies the
faults that are due to every reply that holds data, and remembers what was asked, when, and with which headers.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

DAY = timedelta(days=1)


@dataclass(frozen=True)
class Asked:
    """One request."""

    path: str
    query: dict[str, str]
    headers: dict[str, str]  # names in lower case
    at_s: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class Reply:
    """One answer."""

    body: Any = ""  # text, or what becomes JSON
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    data: bool = True  # whether faults apply to it: False for cookies, lists of markets, …
    hang: bool = False  # never answered
    cut: bool = False  # announced whole, sent half

    def text(self) -> str:
        return self.body if isinstance(self.body, str) else json.dumps(self.body)


Route = Callable[[Asked], Reply | None]
Fault = Callable[[Reply], Reply]


# ------------------------------------------------------------------------------------------------ faults


def status(code: int, **headers: str) -> Fault:
    """An error whose body repeats the question, keys included, as services do."""
    return lambda reply: Reply({"message": "refused", "you_sent": "ECHO"}, code, {k.replace("_", "-"): v for k, v in headers.items()})


def hang(reply: Reply) -> Reply:
    return replace(reply, hang=True)


def cut(reply: Reply) -> Reply:
    return replace(reply, cut=True)


def empty(reply: Reply) -> Reply:
    return replace(reply, body="")


def html(reply: Reply) -> Reply:
    return Reply("<!DOCTYPE html><html><head><title>Sign in</title></head><body>Please sign in. You sent ECHO</body></html>", headers={"Content-Type": "text/html"})


def body(text: Any) -> Fault:
    """A good status with another body."""
    return lambda reply: Reply(text)


def renamed(old: str, new: str) -> Fault:
    """A column under another name."""

    def fault(reply: Reply) -> Reply:
        assert old in reply.text()
        return replace(reply, body=reply.text().replace(old, new))

    return fault


# ------------------------------------------------------------------------------------------------ the server


class Replay:
    """The server. A context manager; `url` is where it listens."""

    def __init__(self, routes: Sequence[Route]) -> None:
        self.routes, self.asked, self.released = list(routes), [], threading.Event()
        self._due: list[Fault] = []
        self._always: Fault | None = None
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    asked: list[Asked]

    def fail(self, *faults: Fault) -> None:
        """The next answers with data have these faults, one each."""
        self._due = list(faults)

    def fail_always(self, fault: Fault) -> None:
        self._always = fault

    def answer(self, asked: Asked) -> Reply:
        self.asked.append(asked)
        reply = next((r for r in (route(asked) for route in self.routes) if r is not None), Reply({"message": "no route"}, 404))
        if reply.data and reply.status == 200:
            fault = self._due.pop(0) if self._due else self._always
            reply = fault(reply) if fault else reply
        return reply

    def __enter__(self) -> Replay:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        replay = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # else each body waits for the acknowledgement of its headers

            def do_GET(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))  # a posted form
                url = urlsplit(self.path)
                headers = {k.lower(): v for k, v in self.headers.items()}
                reply = replay.answer(Asked(url.path, {k: v[-1] for k, v in parse_qs(url.query).items()}, headers))
                if reply.hang:
                    replay.released.wait(10)
                    self.close_connection = True
                    return
                echo = " ".join([self.path, *headers.values()]).replace('"', "")
                data = reply.text().replace("ECHO", echo).encode()
                self.send_response_only(reply.status)
                for name, value in {"Date": self.date_time_string(), "Content-Type": "application/json", "Content-Length": str(len(data)), **reply.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data[: len(data) // 2] if reply.cut else data)
                self.close_connection = reply.cut

            do_POST = do_GET

            def log_message(self, *_: object) -> None:
                pass

        return Handler


# ------------------------------------------------------------------------------------------------ a small market

# Sessions of New York around the change of the clocks in March 2024 and around a half day: open and close in UTC, by hand.
SESSIONS = {
    date(2024, 3, 7): ("14:30", "21:00"), date(2024, 3, 8): ("14:30", "21:00"), date(2024, 3, 11): ("13:30", "20:00"), date(2024, 3, 12): ("13:30", "20:00"),
    date(2024, 11, 27): ("14:30", "21:00"), date(2024, 11, 29): ("14:30", "18:00"), date(2024, 12, 2): ("14:30", "21:00"),
}  # fmt: skip
KNOWN = {"AAA", "aaa.us", "BTCUSDT"}
FIELDS = ("open", "high", "low", "close", "volume")


def moment(day: date, clock: str = "00:00") -> datetime:
    return datetime.fromisoformat(f"{day}T{clock}+00:00")


def candle(at: datetime) -> dict[str, float]:
    """Prices that differ from bar to bar and depend on nothing but the time."""
    close = 100 + at.timetuple().tm_yday / 10 + (at.hour * 60 + at.minute) / 1000
    return {"open": close - 0.5, "high": close + 1.0, "low": close - 1.0, "close": close, "volume": 1000.0 + at.minute}


class Market:
    """What the routes answer from. `shuffled` gives rows out of order, `per_page` bounds the rows in a reply."""

    def __init__(self) -> None:
        self.shuffled, self.per_page = False, 10_000

    def mixed(self, rows: list[Any]) -> list[Any]:
        return random.Random(1).sample(rows, len(rows)) if self.shuffled else rows

    def days(self, first: date, last: date) -> list[tuple[date, dict[str, float]]]:
        return self.mixed([(d, candle(moment(d, "20:00"))) for d in SESSIONS if first <= d <= last])

    def minutes(self, first: date, last: date, step: int) -> list[tuple[datetime, dict[str, float]]]:
        """Begins of bars, one before the opening and one after the close included."""
        rows = []
        for day in (d for d in SESSIONS if first <= d <= last):
            at, close = (moment(day, clock) for clock in SESSIONS[day])
            at -= timedelta(minutes=step)
            while at <= close:
                rows.append((at, candle(at)))
                at += timedelta(minutes=step)
        return self.mixed(rows)


def zone_of(day: date) -> timedelta:
    """New York behind Greenwich."""
    return timedelta(hours=4 if date(2024, 3, 10) <= day < date(2024, 11, 3) else 5)


# ------------------------------------------------------------------------------------------------ routes


def stooq(market: Market) -> Route:
    def route(asked: Asked) -> Reply | None:
        if asked.path != "/q/d/l/":
            return None
        first, last = (datetime.strptime(asked.query.get(k, default), "%Y%m%d").date() for k, default in (("d1", "20000101"), ("d2", "20300101")))
        rows = market.days(first, last) if asked.query["s"] in KNOWN else []
        lines = [",".join([str(d), *(f"{bar[f]:g}" for f in FIELDS)]) for d, bar in rows]
        return Reply("\r\n".join(["Date,Open,High,Low,Close,Volume", *lines, ""]) if rows else "No data", headers={"Content-Type": "text/csv"})

    return route


def alphavantage(market: Market) -> Route:
    def route(asked: Asked) -> Reply | None:
        if asked.path != "/query" or not asked.query.get("function", "").startswith("TIME_SERIES"):
            return None
        if asked.query["symbol"] not in KNOWN:
            return Reply({"Error Message": f"Invalid API call. Please retry or visit the documentation for {asked.query['function']}."})
        if asked.query["function"] == "TIME_SERIES_DAILY_ADJUSTED":
            names = ("1. open", "2. high", "3. low", "4. close", "6. volume")
            rows = {str(d): dict(zip(names, map(str, bar.values()), strict=True)) | {"5. adjusted close": str(bar["close"] / 2), "7. dividend amount": "0.0000", "8. split coefficient": "1.0"}
                    for d, bar in reversed(market.days(date(2000, 1, 1), date(2030, 1, 1)))}  # fmt: skip
            return Reply({"Meta Data": {"1. Information": "Daily Time Series with Splits and Dividend Events", "2. Symbol": "AAA", "5. Time Zone": "US/Eastern"}, "Time Series (Daily)": rows})
        year, month = map(int, asked.query["month"].split("-"))
        names = ("1. open", "2. high", "3. low", "4. close", "5. volume")
        bars = market.minutes(date(year, month, 1), date(year, month, 28) + 3 * DAY, int(asked.query["interval"][:-3]))
        rows = {f"{at - zone_of(at.date()):%Y-%m-%d %H:%M:%S}": dict(zip(names, map(str, bar.values()), strict=True)) for at, bar in reversed(bars) if at.month == month}
        return Reply({"Meta Data": {"1. Information": "Intraday", "2. Symbol": "AAA", "6. Time Zone": "US/Eastern"}, f"Time Series ({asked.query['interval']})": rows})

    return route


def _letters(bar: dict[str, float]) -> dict[str, float]:
    return {"o": bar["open"], "h": bar["high"], "l": bar["low"], "c": bar["close"], "v": bar["volume"], "vw": bar["close"] - 0.1, "n": 7}


def _begins(market: Market, first: date, last: date, minutes: int) -> list[tuple[datetime, dict[str, float]]]:
    """Bars with the instant at which they begin; daily ones at midnight in New York."""
    if minutes:
        return market.minutes(first, last, minutes)
    return [(moment(d) + zone_of(d), bar) for d, bar in market.days(first, last)]


def polygon(market: Market) -> Route:
    def route(asked: Asked) -> Reply | None:
        if not asked.path.startswith("/v2/aggs/ticker/"):
            return None
        symbol, _, count, span, first, last = asked.path.split("/")[4:]
        bars = _begins(market, date.fromisoformat(first), date.fromisoformat(last), int(count) if span == "minute" else 0) if symbol in KNOWN else []
        at = int(asked.query.get("cursor", "0"))
        page = [{"t": int(t.timestamp() * 1000), **_letters(bar)} for t, bar in bars[at : at + market.per_page]]
        reply = {"ticker": symbol, "queryCount": len(bars), "resultsCount": len(page), "adjusted": True, "status": "OK", "request_id": "0"}
        if page:
            reply["results"] = page
        if at + len(page) < len(bars):
            reply["next_url"] = f"https://api.polygon.io{asked.path}?cursor={at + len(page)}"
        return Reply(reply)

    return route


def alpaca(market: Market) -> Route:
    def route(asked: Asked) -> Reply | None:
        parts = asked.path.split("/")
        if parts[1:3] != ["v2", "stocks"]:
            return None
        if not parts[3].isalpha():
            return Reply({"code": 40010001, "message": f"invalid symbol: {parts[3]}"}, 400)
        start, end = (datetime.fromisoformat(asked.query[k].replace("Z", "+00:00")) for k in ("start", "end"))
        step = asked.query["timeframe"]
        bars = [b for b in _begins(market, start.date() - DAY, end.date(), 0 if step == "1Day" else int(step[:-3])) if start <= b[0] <= end] if parts[3] in KNOWN else []
        at = int(asked.query.get("page_token", "0"))
        page = [{"t": f"{t:%Y-%m-%dT%H:%M:%SZ}", **_letters(bar)} for t, bar in bars[at : at + market.per_page]]
        return Reply({"bars": page or None, "symbol": parts[3], "next_page_token": str(at + len(page)) if at + len(page) < len(bars) else None})

    return route


def yahoo(market: Market) -> Route:
    def route(asked: Asked) -> Reply | None:
        if asked.path == "/v1/test/getcrumb":
            return Reply("crumb", data=False)
        if asked.path in ("/", "/consent"):
            return Reply("<html></html>", headers={"Set-Cookie": "A3=cookie; Path=/", "Content-Type": "text/html"}, data=False)
        if not asked.path.startswith("/v8/finance/chart/"):
            return None
        symbol = asked.path.rsplit("/", 1)[1]
        if symbol not in KNOWN:
            return Reply({"chart": {"result": None, "error": {"code": "Not Found", "description": "No data found, symbol may be delisted"}}}, 404)
        first, last = (datetime.fromtimestamp(int(asked.query[k]), UTC) for k in ("period1", "period2"))
        step = {"1d": 0, "1m": 1, "5m": 5, "1h": 60}[asked.query["interval"]]
        bars = [b for b in (market.minutes(first.date(), last.date(), step) if step else [(moment(d, SESSIONS[d][0]), bar) for d, bar in market.days(first.date(), last.date())]) if first <= b[0] < last]
        chart: dict[str, Any] = {"meta": {"symbol": symbol, "exchangeTimezoneName": "America/New_York", "instrumentType": "EQUITY"}, "indicators": {"quote": [{}]}}
        if bars:
            chart["timestamp"] = [int(t.timestamp()) for t, _ in bars]
            chart["indicators"]["quote"] = [{f: [bar[f] for _, bar in bars] for f in FIELDS}]
            if not step:
                chart["indicators"]["adjclose"] = [{"adjclose": [bar["close"] / 2 for _, bar in bars]}]
        return Reply({"chart": {"result": [chart], "error": None}})

    return route


def binance(market: Market) -> Route:
    def candles(since: datetime, step: timedelta, limit: int) -> Iterator[list[Any]]:
        for i in range(limit):
            at = since + i * step
            if at < datetime(2025, 1, 1, tzinfo=UTC):
                opens = int(at.timestamp() * 1000)
                bar = candle(at)
                yield [opens, *(f"{bar[f]:.8f}" for f in FIELDS), opens + int(step.total_seconds() * 1000) - 1, "0.0", 7, "0.0", "0.0", "0"]

    def route(asked: Asked) -> Reply | None:
        if asked.path == "/api/v3/exchangeInfo":
            listed = {"symbol": "BTCUSDT", "status": "TRADING", "baseAsset": "BTC", "quoteAsset": "USDT", "isSpotTradingAllowed": True, "permissions": ["SPOT"], "filters": []}
            return Reply({"timezone": "UTC", "symbols": [listed]}, data=False)
        if asked.path != "/api/v3/klines":
            return None
        step = {"1m": timedelta(minutes=1), "5m": timedelta(minutes=5), "1h": timedelta(hours=1), "1d": DAY}[asked.query["interval"]]
        since = datetime.fromtimestamp(int(asked.query["startTime"]) / 1000, UTC)
        return Reply(market.mixed(list(candles(since, step, min(int(asked.query["limit"]), market.per_page)))))

    return route


PRICES: dict[str, Callable[[Market], Route]] = {"yfinance": yahoo, "stooq": stooq, "alphavantage": alphavantage, "polygon": polygon, "alpaca": alpaca, "ccxt": binance}
