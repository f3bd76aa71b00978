"""Feeds of macro values and news against a server that answers as the real services do, and misbehaves on demand."""

from __future__ import annotations

import logging
import os
import random
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from typing import Any

import pandas as pd
import pytest
from replay import Asked, Fault, Replay, Reply, Route, body, cut, empty, hang, html, renamed, status

from mltrading.core.errors import DataError, ParameterError
from mltrading.market import feeds
from mltrading.market.feeds import MACRO_SOURCES, TEXT_SOURCES, AlphaVantageNews, Fred, Gdelt
from mltrading.market.http import SourceError
from mltrading.market.macro import as_of, check_macro
from mltrading.market.news import check_news

FIRST, LAST = date(2024, 3, 20), date(2024, 3, 21)
KEYS = {name: f"{name.lower().replace('_', '-')}/s3cret+{k}" for k, name in enumerate(
    ("FRED_API_KEY", "NEWSAPI_KEY", "REDDIT_CLIENT_ID", "REDDIT_CLIENT_SECRET", "ALPACA_API_KEY", "ALPACA_SECRET_KEY", "POLYGON_API_KEY", "ALPHAVANTAGE_API_KEY"))}  # fmt: skip
TOKEN = "reddit-token-s3cret"
NEEDED = {"fred": ["FRED_API_KEY"], "newsapi": ["NEWSAPI_KEY"], "reddit": ["REDDIT_CLIENT_ID", "REDDIT_CLIENT_SECRET"], "alpaca": ["ALPACA_API_KEY", "ALPACA_SECRET_KEY"],
          "polygon": ["POLYGON_API_KEY"], "alphavantage": ["ALPHAVANTAGE_API_KEY"], "gdelt": []}  # fmt: skip


@dataclass
class Item:
    at: datetime
    name: str
    title: str
    body: str = "Some words."
    changed: datetime | None = None


@dataclass
class Archive:
    """What the routes answer from: an item every ten minutes, in one day, and three quarters with their vintages."""

    shuffled: bool = False
    endless: bool = False
    items: list[Item] = field(default_factory=lambda: [Item(datetime(2024, 3, 20, tzinfo=UTC) + k * timedelta(minutes=10), f"n{k}", f"Headline number {k}") for k in range(130)])
    prints: list[tuple[str, str, str]] = field(default_factory=lambda: [  # quarter, vintage, value
        ("2023-04-01", "2023-07-27", "2.4"), ("2023-04-01", "2023-08-30", "2.1"), ("2023-07-01", "2023-10-26", "4.9"), ("2023-04-01", "2023-10-26", "2.1"), ("2023-07-01", "2023-11-29", "5.2"),
        ("2023-10-01", "2023-12-01", "."), ("2023-10-01", "2024-01-25", "3.3"), ("2023-07-01", "2024-01-25", "4.9")])  # fmt: skip

    def page(self, items: list[Item], at: int, count: int) -> tuple[list[Item], bool]:
        """Some items, and whether there are more."""
        some = items[at : at + count]
        return random.Random(1).sample(some, len(some)) if self.shuffled else some, self.endless or at + count < len(items)

    def within(self, first: str, last: str, form: str) -> list[Item]:
        low, high = (datetime.strptime(text, form).replace(tzinfo=UTC) for text in (first, last))
        return [i for i in self.items if low <= i.at <= high]


# ------------------------------------------------------------------------------------------------ routes


def fred(archive: Archive) -> Route:
    def route(asked: Asked) -> Reply | None:
        if not asked.path.startswith("/fred/"):
            return None
        if asked.query["api_key"] != KEYS["FRED_API_KEY"]:
            return Reply({"error_code": 400, "error_message": "Bad Request.  The value for variable api_key is not registered."}, 400)
        if asked.query["series_id"] != "GDPC1":
            return Reply({"error_code": 400, "error_message": "Bad Request.  The series does not exist."}, 400)
        at, dates = int(asked.query["offset"]), sorted({v for _, v, _ in archive.prints})
        if asked.path.endswith("vintagedates"):
            return Reply({"realtime_start": "1776-07-04", "realtime_end": "9999-12-31", "order_by": "vintage_date", "sort_order": "asc", "count": len(dates), "offset": at, "limit": 10000, "vintage_dates": dates[at:]})
        low, high = asked.query["realtime_start"], asked.query["realtime_end"]
        if sum(low <= d <= high for d in dates) > feeds.VINTAGES:
            return Reply({"error_code": 400, "error_message": "Bad Request.  This exceeds the maximum number of vintage dates allowed (2000)."}, 400)
        rows = []
        for quarter in sorted({q for q, _, _ in archive.prints}):
            stood = sorted((v, value) for q, v, value in archive.prints if q == quarter)
            for (start, value), end in zip(stood, [v for v, _ in stood[1:]] + ["9999-12-31"], strict=True):
                if start <= high and end > low and asked.query["observation_start"] <= quarter <= asked.query["observation_end"]:
                    rows.append({"realtime_start": max(start, low), "realtime_end": min(end, high), "date": quarter, "value": value})
        rows = random.Random(1).sample(rows, len(rows)) if archive.shuffled else rows
        some = [] if archive.endless and at else rows[at : at + 3]
        return Reply({"observation_start": "1600-01-01", "units": "lin", "output_type": 1, "file_type": "json", "count": len(rows), "offset": at, "limit": 100000, "observations": some})

    return route


def gdelt(archive: Archive) -> Route:
    def route(asked: Asked) -> Reply | None:
        if asked.path != "/api/v2/doc/doc":
            return None
        found = archive.within(asked.query["startdatetime"], asked.query["enddatetime"], "%Y%m%d%H%M%S")
        some, _ = archive.page(found, 0, int(asked.query["maxrecords"]))
        articles = [{"url": i.name, "url_mobile": "", "title": i.title, "seendate": f"{i.at:%Y%m%dT%H%M%SZ}", "socialimage": "", "domain": "paper.example", "language": "English", "sourcecountry": "US"} for i in some]
        return Reply({"articles": articles} if articles else {})

    return route


def newsapi(archive: Archive) -> Route:
    def route(asked: Asked) -> Reply | None:
        if asked.path != "/v2/everything":
            return None
        assert asked.headers["x-api-key"] == KEYS["NEWSAPI_KEY"]
        found = archive.within(asked.query["from"], asked.query["to"], "%Y-%m-%dT%H:%M:%S")[::-1]
        some, _ = archive.page(found, 100 * (int(asked.query["page"]) - 1), int(asked.query["pageSize"]))
        articles = [{"source": {"id": None, "name": "Paper"}, "author": None, "title": i.title, "description": i.body, "url": i.name, "urlToImage": None, "publishedAt": f"{i.at:%Y-%m-%dT%H:%M:%SZ}", "content": "…"} for i in some]
        return Reply({"status": "ok", "totalResults": len(found), "articles": articles})

    return route


def reddit(archive: Archive) -> Route:
    def route(asked: Asked) -> Reply | None:
        if asked.path == "/api/v1/access_token":
            assert asked.headers["authorization"].startswith("Basic ")
            return Reply({"access_token": TOKEN, "token_type": "bearer", "expires_in": 86400, "scope": "*"}, data=False)
        if not asked.path.startswith("/r/stocks/"):
            return None
        assert asked.headers["authorization"] == f"bearer {TOKEN}"
        assert "mltrading" in asked.headers["user-agent"]
        found = [i for i in archive.items[::-1] if asked.query.get("q", "") in i.title]
        at = int(asked.query.get("after", "t3_0")[3:])
        some, more = archive.page(found, 0 if archive.endless else at, int(asked.query["limit"]))
        posts = [{"kind": "t3", "data": {"name": i.name, "title": i.title, "selftext": i.body, "created_utc": i.at.timestamp(), "edited": i.changed.timestamp() if i.changed else False, "permalink": f"/r/stocks/{i.name}/", "score": 9}} for i in some]
        return Reply({"kind": "Listing", "data": {"after": (f"t3_{at + 100}" if not archive.endless else "t3_100") if more else None, "dist": len(posts), "children": posts}})

    return route


def alpaca(archive: Archive) -> Route:
    def route(asked: Asked) -> Reply | None:
        if asked.path != "/v1beta1/news":
            return None
        assert asked.headers["apca-api-secret-key"] == KEYS["ALPACA_SECRET_KEY"]
        found = archive.within(asked.query["start"], asked.query["end"], "%Y-%m-%dT%H:%M:%SZ")
        at = int(asked.query.get("page_token", "0"))
        some, more = archive.page(found, 0 if archive.endless else at, int(asked.query["limit"]))
        news = [{"id": int(i.name[1:]), "headline": i.title, "author": "", "created_at": f"{i.at:%Y-%m-%dT%H:%M:%SZ}", "updated_at": f"{i.changed or i.at:%Y-%m-%dT%H:%M:%SZ}", "summary": "", "content": f"<p>{i.body}</p>",
                 "url": "https://paper.example", "images": [], "symbols": ["AAA"], "source": "benzinga"} for i in some]  # fmt: skip
        return Reply({"news": news, "next_page_token": ("50" if archive.endless else str(at + 50)) if more else None})

    return route


def polygon(archive: Archive) -> Route:
    def route(asked: Asked) -> Reply | None:
        if asked.path != "/v2/reference/news":
            return None
        assert asked.headers["authorization"] == f"Bearer {KEYS['POLYGON_API_KEY']}"
        at = int(asked.query.get("cursor", "0"))
        some, more = archive.page(archive.items, 0 if archive.endless else at, 100)
        results = [{"id": i.name, "publisher": {"name": "Paper"}, "title": i.title, "author": "", "published_utc": f"{i.at:%Y-%m-%dT%H:%M:%SZ}", "article_url": "https://paper.example", "tickers": ["AAA"], "description": i.body} for i in some]
        following = {"next_url": f"https://api.polygon.io/v2/reference/news?cursor={100 if archive.endless else at + 100}"} if more else {}
        return Reply({"results": results, "status": "OK", "count": len(results), "request_id": "0", **following})

    return route


def alphavantage(archive: Archive) -> Route:
    def route(asked: Asked) -> Reply | None:
        if asked.path != "/query" or asked.query.get("function") != "NEWS_SENTIMENT":
            return None
        found = archive.within(asked.query["time_from"], asked.query["time_to"], "%Y%m%dT%H%M")
        some, _ = archive.page(archive.items if archive.endless else found, 0, int(asked.query["limit"]))
        feed = [{"title": i.title, "url": i.name, "time_published": f"{i.at:%Y%m%dT%H%M%S}", "authors": [], "summary": i.body, "source": "Paper", "ticker_sentiment": [{"ticker": "AAA"}]} for i in some]
        return Reply({"items": str(len(feed)), "sentiment_score_definition": "x", "feed": feed})

    return route


ROUTES: dict[str, Callable[[Archive], Route]] = {f.__name__: f for f in (fred, gdelt, newsapi, reddit, alpaca, polygon, alphavantage)}
QUERIES = {"fred": "GDPC1", "reddit": "stocks", "gdelt": "bank", "newsapi": "bank"}
NAMES = list(ROUTES)


@dataclass
class Bench:
    """A source, the server it asks, and what it slept."""

    name: str
    archive: Archive
    replay: Replay
    slept: list[float]
    timeout_s: float = 5.0

    def ask(self, query: str | None = None) -> pd.DataFrame:
        options = {"per_minute": 1e6, "attempts": 2, "timeout_s": self.timeout_s, "sleep": self.slept.append}
        urls = [self.replay.url, self.replay.url] if self.name == "reddit" else [self.replay.url]
        query = query or QUERIES.get(self.name, "AAA")
        if self.name in MACRO_SOURCES:
            return MACRO_SOURCES[self.name](*urls, **options).macro(query, date(2023, 1, 1), LAST)
        return TEXT_SOURCES[self.name](*urls, **options).news(query, FIRST, LAST)

    def failure(self, query: str | None = None) -> SourceError:
        with pytest.raises(SourceError) as caught:
            self.ask(query)
        return caught.value


@pytest.fixture(autouse=True)
def _keys(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if request.node.name.startswith("test_the_real_service"):
        return
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(Gdelt, "most", 60)
    monkeypatch.setattr(AlphaVantageNews, "most", 60)


@pytest.fixture(params=NAMES)
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    archive = Archive()
    with Replay([ROUTES[request.param](archive)]) as replay:
        yield Bench(request.param, archive, replay, [])


def only(*names: str) -> Any:
    return pytest.mark.parametrize("bench", names, indirect=True)


# ------------------------------------------------------------------------------------------------ good replies


def test_every_source_has_a_route() -> None:
    assert sorted(NAMES) == sorted([*MACRO_SOURCES, *TEXT_SOURCES])


@only(*TEXT_SOURCES)
def test_all_items_come_once_and_in_order(bench: Bench) -> None:
    news = check_news(bench.ask(), bench.name)
    late = {"gdelt": timedelta(minutes=15), "alphavantage": timedelta(hours=5)}.get(bench.name, timedelta(0))
    assert news["title"].tolist() == [i.title for i in bench.archive.items]
    assert [t.to_pydatetime() for t in news["timestamp"]] == [i.at + late for i in bench.archive.items]
    assert set(news["source"]) == {bench.name}
    assert len(bench.replay.asked) >= 2


@only("fred")
@pytest.mark.parametrize("block", [1, 2, 2000])
def test_vintages_are_the_archive_s(bench: Bench, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeds, "VINTAGES", block)
    macro = check_macro(bench.ask(), "fred")
    days = sorted({v for _, v, _ in bench.archive.prints})
    for day in days:
        noon = pd.DatetimeIndex([f"{day} 20:00"], tz="UTC")
        known = {q: value for q, v, value in sorted(bench.archive.prints, key=lambda p: p[1]) if v <= day and value != "."}
        assert as_of(macro, noon)["GDPC1"].iloc[0] == float(known[max(known)])
        before = as_of(macro, noon - pd.Timedelta(hours=12))["GDPC1"].iloc[0] if day > days[0] else None
        assert before != float(known[max(known)]) or day in ("2023-12-01",)
    assert len(macro) == 6  # one print was no revision, one no value
    assert macro["timestamp"].dt.tz_convert("America/New_York").dt.strftime("%H:%M").unique().tolist() == ["08:30"]


def test_the_order_of_a_reply_does_not_matter(bench: Bench) -> None:
    good = bench.ask()
    bench.archive.shuffled = True
    pd.testing.assert_frame_equal(bench.ask(), good)


def test_nothing_there_is_an_empty_table(bench: Bench) -> None:
    bench.archive.items, bench.archive.prints = [], []
    good = bench.ask()
    assert good.empty
    assert str(good["timestamp"].dtype) == "datetime64[us, UTC]"


# ------------------------------------------------------------------------------------------------ faults

FAULTS: dict[str, tuple[Fault, str]] = {
    "401": (status(401), "key"), "403": (status(403), "key"), "404": (status(404), "unknown"), "429": (status(429, Retry_After="7"), "limit"), "500": (status(500), "down"), "hang": (hang, "down"),
    "cut": (cut, "down"), "empty": (empty, "reply"), "html": (html, "reply"), "broken": (body('{"a": ['), "reply"), "list": (body([1, 2]), "reply"), "other": (body({"surprise": 1}), "reply"),
    "nulls": (body(dict.fromkeys(("observations", "vintage_dates", "articles", "data", "news", "results", "feed"))), "reply"),
    "words": (body({k: ["words"] for k in ("observations", "articles", "news", "results", "feed")}), "reply"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_stays_broken_ends_in_its_kind_and_shows_no_key(bench: Bench, fault: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    bench.replay.fail_always(FAULTS[fault][0])
    bench.timeout_s = 0.15 if fault == "hang" else 5.0
    failure = bench.failure()
    assert failure.kind == FAULTS[fault][1]
    assert "→" in str(failure)
    assert failure.__cause__ is None
    shown = "".join(traceback.format_exception(failure)) + repr(failure) + caplog.text + "".join(str(r.args) for r in caplog.records)
    assert not [name for name, key in {**KEYS, "token": TOKEN}.items() if name != "REDDIT_CLIENT_ID" and (key in shown or key.replace("/", "%2F").replace("+", "%2B") in shown)]
    if fault == "429":
        assert min(bench.slept) >= 7


def test_what_passes_is_got_over(bench: Bench) -> None:
    good = bench.ask()
    for fault in (status(429, Retry_After="3"), status(503), cut, empty):
        bench.replay.fail(fault)
        pd.testing.assert_frame_equal(bench.ask(), good)


FIELDS = {"fred": ["realtime_start", "date", "value", "observations", "count"], "gdelt": ["articles", "title", "seendate"], "newsapi": ["articles", "title", "publishedAt"], "reddit": ["children", "title", "created_utc", "permalink"],
          "alpaca": ["news", "headline", "created_at"], "polygon": ["results", "title", "published_utc"], "alphavantage": ["feed", "title", "time_published"]}  # fmt: skip


@pytest.mark.parametrize(("bench", "name"), [(source, name) for source, names in FIELDS.items() for name in names], indirect=["bench"])
def test_a_field_under_another_name_is_a_changed_reply(bench: Bench, name: str) -> None:
    plain = bench.replay.routes[0]
    fault = renamed(f'"{name}"', f'"{name}_2"')
    bench.replay.routes = [lambda asked: None if (reply := plain(asked)) is None else (fault(reply) if f'"{name}"' in reply.text() else reply)]
    failure = bench.failure()
    assert failure.kind == "reply"
    assert name in str(failure)


@only("newsapi", "reddit", "alpaca", "polygon", "alphavantage", "fred")
def test_a_page_that_leads_back_ends(bench: Bench) -> None:
    if bench.name == "newsapi":
        bench.replay.routes = [lambda asked: Reply({"status": "ok", "totalResults": 10**9, "articles": []})]
        assert bench.ask().empty
        return
    bench.archive.endless = True
    assert bench.failure().kind == "reply"


@only(*TEXT_SOURCES)
def test_an_item_from_the_future_is_refused(bench: Bench) -> None:
    bench.archive.items = [Item(datetime(2999, 1, 1, tzinfo=UTC), "n1", "Tomorrow's news")]
    bench.archive.within = lambda *_: bench.archive.items  # type: ignore[method-assign]
    if bench.name == "reddit":  # filters by itself
        assert bench.ask().empty
    else:
        assert "after it was retrieved" in str(bench.failure())


@only("newsapi", "polygon", "alpaca")
def test_a_time_without_a_zone_is_refused(bench: Bench) -> None:
    plain = bench.replay.routes[0]
    bench.replay.routes = [lambda asked: None if (reply := plain(asked)) is None else Reply(reply.text().replace('00Z"', '00"'))]
    assert "names no zone" in str(bench.failure())


def mutated(value: Any, rng: random.Random) -> Any:
    """A reply of which one part, somewhere, is something else."""
    parts = list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    if not parts or rng.random() < 0.2:
        return rng.choice([None, True, -1, 10**400, 1e308, float("nan"), "", "9999-99-99", "\ud800", [], ["x"], {}, {"x": 1}])
    key, part = rng.choice(parts)
    copy = value.copy()
    copy[key] = mutated(part, rng)
    return copy


def test_a_corrupted_reply_is_a_named_error_or_a_table(bench: Bench) -> None:
    good, rng, failures = bench.ask(), random.Random(0), 0
    plain = bench.replay.routes[0]
    bench.replay.routes = [lambda asked: None if (reply := plain(asked)) is None else Reply(mutated(reply.body, rng))]
    bench.archive.items = bench.archive.items[:3]
    for _ in range(60):
        try:
            table = bench.ask()
        except DataError:
            failures += 1
            continue
        check = check_macro if bench.name in MACRO_SOURCES else check_news
        check(table, bench.name)
        assert list(table.columns) == list(good.columns)
    assert failures > 10


# ------------------------------------------------------------------------------------------------ each service's own ways


@only("fred")
def test_fred_says_what_is_wrong_with_status_400(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bench.failure("NOSUCH").kind == "unknown"
    monkeypatch.setenv("FRED_API_KEY", "another")
    assert bench.failure().kind == "key"


@only("gdelt")
def test_gdelt_answers_in_sentences(bench: Bench) -> None:
    bench.replay.fail_always(body("Please limit requests to one every 5 seconds or contact us."))
    assert bench.failure().kind == "limit"
    bench.replay.fail_always(body("The specified phrase is too short."))
    assert "too short" in str(bench.failure())


@only("newsapi")
def test_newsapi_sells_the_past(bench: Bench) -> None:
    bench.replay.fail_always(lambda reply: Reply({"status": "error", "code": "parameterInvalid", "message": "You are trying to request results too far in the past."}, 426))
    assert bench.failure().kind == "key"


@only("alphavantage")
@pytest.mark.parametrize(("words", "kind"), [
    ("our standard API rate limit is 25 requests per day", "limit"), ("the parameter apikey is invalid or missing", "key"), ("This is a premium endpoint.", "key"), ("Invalid inputs. Please refer to", "unknown")])  # fmt: skip
def test_alphavantage_answers_in_sentences(bench: Bench, words: str, kind: str) -> None:
    bench.replay.fail_always(body({"Information": f"{words}, key {KEYS['ALPHAVANTAGE_API_KEY']}"}))
    failure = bench.failure()
    assert failure.kind == kind
    assert KEYS["ALPHAVANTAGE_API_KEY"] not in str(failure)


@only("alpaca")
def test_a_changed_article_counts_from_its_change(bench: Bench) -> None:
    bench.archive.items[5].changed = datetime(2024, 3, 21, 23, tzinfo=UTC)
    news = bench.ask().set_index("id")
    assert news.loc["5", "timestamp"] == pd.Timestamp("2024-03-21 23:00", tz="UTC")
    assert news.loc["6", "body"] == "Some words."


@only("reddit")
def test_a_changed_post_keeps_its_title_and_loses_its_text(bench: Bench) -> None:
    bench.archive.items[5].changed = datetime(2024, 3, 21, 23, tzinfo=UTC)
    bench.archive.items[6].body = "[removed]"
    news = bench.ask().set_index("id")
    assert news.loc[["n5", "n6", "n7"], "body"].tolist() == ["", "", "Some words."]
    assert news.loc["n5", "timestamp"] == pd.Timestamp(bench.archive.items[5].at)
    assert bench.ask("stocks: number 12")["id"].tolist() == ["n12", *(f"n{k}" for k in range(120, 130))]


@only("reddit")
def test_a_listing_that_ends_too_early_says_so(bench: Bench) -> None:
    bench.archive.items = [Item(datetime(2024, 3, 21, tzinfo=UTC) + k * timedelta(seconds=30), f"n{k}", f"Headline number {k}") for k in range(1000)]
    with pytest.warns(UserWarning, match="the listing ends at 2024-03-21"):
        assert len(bench.ask()) == 1000
    bench.archive.items = bench.archive.items[:50]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert len(bench.ask()) == 50


@only("reddit")
def test_a_door_that_stays_shut(bench: Bench) -> None:
    bench.replay.routes = [lambda asked: Reply({"message": "Unauthorized", "error": 401, "you_sent": "ECHO"}, 401)]
    failure = bench.failure()
    assert failure.kind == "key"
    assert KEYS["REDDIT_CLIENT_SECRET"] not in str(failure)
    bench.replay.routes = [lambda asked: Reply({"token_type": "bearer"})]
    assert bench.failure().kind == "key"


def test_a_missing_key_is_named(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NEEDED[bench.name]:
        with monkeypatch.context() as m:
            m.setenv(name, "")
            failure = bench.failure()
            assert failure.kind == "key"
            assert name in str(failure)


def test_nothing_is_asked_for_nothing(bench: Bench) -> None:
    with pytest.raises(ParameterError, match="nothing to ask for"):
        bench.ask(" ")
    assert bench.replay.asked == []


# ------------------------------------------------------------------------------------------------ the real services


@pytest.mark.skipif("MLTRADING_ONLINE" not in os.environ, reason="needs MLTRADING_ONLINE=1 and a network")
@pytest.mark.parametrize("name", NAMES)
def test_the_real_service(name: str) -> None:
    if missing := [key for key in NEEDED[name] if not os.environ.get(key)]:
        pytest.skip(f"needs {', '.join(missing)}")
    if name == "fred":
        macro = check_macro(Fred().macro("GDPC1", date(2023, 1, 1), date(2023, 12, 31)), "fred")
        assert macro["reference"].nunique() == 4
        assert len(macro) > 8
        return
    today = datetime.now(UTC).date()
    query = {"gdelt": '"interest rate" sourcelang:english', "newsapi": '"interest rate" AND inflation', "reddit": "stocks"}.get(name, "AAPL")
    days = {"gdelt": (today - timedelta(days=2), today - timedelta(days=2)), "reddit": (today - timedelta(days=1), today)}.get(name, (today - timedelta(days=4), today - timedelta(days=3)))
    news = check_news(TEXT_SOURCES[name]().news(query, *days), name, pd.Timestamp.now("UTC"))
    assert len(news)
    assert news["title"].str.len().median() > 10
