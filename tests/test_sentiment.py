"""Sentiment: scorers that are functions of the text alone, fields that are their definition, features that no later item moves; and what real sentences and tweets say."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mltrading.cli import main
from mltrading.core.blocks import open_block
from mltrading.core.errors import DataError, ParameterError
from mltrading.core.params import read_yaml
from mltrading.core.runner import run_stage
from mltrading.core.storage import write_parquet
from mltrading.features.audit import audit, audit_function, refuse
from mltrading.features.machine import evaluate
from mltrading.features.registry import FeatureParams, catalogue, compute, lookup
from mltrading.features.sentiment import SCORERS, FinBert, TextBlob, Vader, scorer
from mltrading.features.talk import MILD, STALE, STRONG, score_news, scored_panel, with_news
from mltrading.market.calendar import sessions
from mltrading.market.news import NEWS, empty_news, first_seen, news_table, normal_title
from mltrading.market.panel import Panel, from_frame
from mltrading.market.simulate import made_up_fields, random_walk
from mltrading.market.snapshot import read_snapshot

DATA = os.environ.get("MLTRADING_DATA", "")
real = pytest.mark.skipif(not DATA, reason="needs MLTRADING_DATA")
MANY = settings(max_examples=60, deadline=None, derandomize=True)
BEGIN = np.datetime64("2020-01-01T00:00", "us")
SYMBOLS = ("AAA", "BBB", "CCC")
FAMILY = [f.name for f in lookup("sentiment")]


def news_of(rows: list[tuple[int, str, str, str, float]]) -> pd.DataFrame:
    """Items from hour, source, title, symbols and score; the id is the row's number."""
    table = pd.DataFrame(rows, columns=["hour", "source", "title", "symbols", "score"])
    stamp = pd.DatetimeIndex(BEGIN + table["hour"].to_numpy(np.int64).astype("timedelta64[h]")).tz_localize("UTC")
    table = table.assign(timestamp=stamp, id=[f"i{k}" for k in range(len(table))], body="", url="")
    return table[[*NEWS, "score"]].astype({**empty_news().dtypes.to_dict(), "score": float})


@st.composite
def worlds(draw: st.DrawFn) -> tuple[Panel, pd.DataFrame]:
    """Bars with gaps at uneven distances, and items with copies, several symbols, strangers, no symbol and no score; out of order."""
    hours = sorted(draw(st.lists(st.integers(0, 600), min_size=2, max_size=14, unique=True)))
    alive = np.array([draw(st.lists(st.booleans(), min_size=len(hours), max_size=len(hours))) for _ in SYMBOLS])
    alive[0, 0] = True
    item = st.tuples(st.integers(0, 620), st.sampled_from(["wire", "paper"]), st.sampled_from(["Up", "up!", "Down", "Flat", "So what", ""]),
                     st.sampled_from(["AAA", "BBB", "AAA BBB", "CCC AAA CCC", "ZZZ", "ZZZ BBB", ""]), st.sampled_from([-1.0, -0.5, -0.05, 0.0, 0.04, 0.3, 0.5, 1.0, np.nan]))
    rows = draw(st.lists(item, max_size=25))
    close = np.where(alive, 10.0 + np.arange(len(hours)), np.nan)
    return Panel(BEGIN + np.array(hours, "timedelta64[h]"), SYMBOLS, {"close": close}), news_of([*rows, (draw(st.integers(0, 620)), "wire", "Sure", "AAA", 0.1)])


def by_definition(panel: Panel, stories: pd.DataFrame, i: int, k: int) -> dict[str, float]:
    """The fields of a bar, story by story."""
    own = [t for t, a in zip(panel.times, panel.alive[i], strict=True) if a and t <= panel.times[k]]
    mine = stories[[panel.symbols[i] in s.split() for s in stories["symbols"]]]
    stamps = mine["timestamp"].to_numpy("datetime64[us]")
    reached = np.array([any(s <= t for t in own) and min(t for t in own if s <= t) - s <= STALE for s in stamps], bool)
    here = reached & np.array([all(s > t for t in own[:-1]) for s in stamps], bool)
    s, heard = mine["score"].to_numpy()[here], stamps[reached]
    none = len(s) == 0
    return {
        "sentiment": np.nan if none else s.mean(), "sentiment_count": len(s), "sentiment_square": np.nan if none else (s * s).mean(), "sentiment_up": (s >= MILD).sum(), "sentiment_down": (s <= -MILD).sum(),
        "sentiment_strong": (abs(s) >= STRONG).sum(), "sentiment_best": np.nan if none else s.max(), "sentiment_worst": np.nan if none else s.min(), "sentiment_sources": mine["source"][here].nunique(),
        "sentiment_hours": np.nan if len(heard) == 0 else (panel.times[k] - heard.max()) / np.timedelta64(1, "h"),
    }


# ------------------------------------------------------------------ fields


@MANY
@given(worlds())
def test_fields_are_their_definition(world: tuple[Panel, pd.DataFrame]) -> None:
    panel, items = world
    made, start = with_news(panel, items), items["timestamp"].min().tz_localize(None).to_datetime64()
    stories = first_seen(items[items["score"].notna()].sort_values(["timestamp", "source", "id"]))
    for i in range(len(SYMBOLS)):
        for k in range(len(panel)):
            got = {f: made[f][i, k] for f in made.fields if f != "close"}
            if not panel.alive[i, k] or panel.times[k] < start:
                assert np.isnan(list(got.values())).all()
            else:
                expected = by_definition(panel, stories, i, k)
                np.testing.assert_allclose(list(got.values()), [expected[f] for f in got], rtol=1e-12, atol=1e-15, err_msg=str(list(got)))


@MANY
@given(worlds(), worlds(), st.integers(0, 620), st.randoms(use_true_random=False))
def test_later_items_change_no_bit_and_order_does_not_matter(world: tuple[Panel, pd.DataFrame], other: tuple[Panel, pd.DataFrame], hour: int, random: Any) -> None:
    panel, items = world
    t = pd.Timestamp(BEGIN + np.timedelta64(hour, "h"), tz="UTC")
    whole, known = with_news(panel, items), items[items["timestamp"] <= t]
    later = other[1][other[1]["timestamp"] > t].assign(id=lambda x: "o" + x["id"])
    past = panel.index <= t
    for table in (known, pd.concat([known, later]), pd.concat([items, later])):
        if len(table) and (table["symbols"] != "").any():
            for f, block in with_news(panel, table).fields.items():
                np.testing.assert_array_equal(block[:, past], whole[f][:, past], err_msg=f)
    order = list(range(len(items)))
    random.shuffle(order)
    for f, block in with_news(panel, items.iloc[order]).fields.items():
        assert block.tobytes() == whole[f].tobytes(), f


def test_a_headline_after_the_close_waits_for_the_next_bar() -> None:
    times = BEGIN + np.array([21, 45, 69], "timedelta64[h]")
    panel = Panel(times, ("AAA",), {"close": np.array([[1.0, 2.0, 3.0]])})
    item = news_of([(0, "wire", "Start", "", 0.0), (0, "wire", "Profit", "AAA", 0.8)])
    for wait, column in ((0, 0), (1, 1), (24 * 3600 * 10**6, 1), (24 * 3600 * 10**6 + 1, 2)):
        stamp = pd.Timestamp(times[0] + np.timedelta64(wait, "us"), tz="UTC").as_unit("us")
        made = with_news(panel, item.assign(timestamp=[item["timestamp"].iloc[0], stamp]))
        assert np.flatnonzero(made["sentiment_count"][0]).tolist() == [column]
        assert (compute(made, ["news_count_1d"])["news_count_1d"][0, :column] == 0).all()


def test_a_repeated_text_counts_once_whoever_repeats_it() -> None:
    panel = Panel(BEGIN + np.array([21, 45, 69, 250], "timedelta64[h]"), ("AAA", "BBB"), {"close": np.ones((2, 4))})
    made = with_news(panel, news_of([(1, "wire", "Profit &amp; loss", "AAA", 0.8), (2, "paper", "PROFIT & LOSS!", "AAA BBB", 0.8), (40, "blog", "profit   & loss", "AAA", 0.8), (240, "wire", "Profit & loss", "BBB", 0.8)]))
    assert made["sentiment_count"].tolist() == [[1, 0, 0, 0], [0, 0, 0, 1]]


@MANY
@given(st.text(alphabet=st.characters(max_codepoint=127), max_size=40))
def test_plain_titles_are_evened_out_as_all_others(title: str) -> None:
    import html

    said = unicodedata.normalize("NFKC", html.unescape(title)).casefold()
    assert normal_title(title) == " ".join(re.findall(r"\w+", said))


def test_a_panel_without_news_has_no_feature_of_them() -> None:
    panel = random_walk(3, 120, seed=2)
    assert not set(FAMILY) & set(compute(panel).names)
    assert np.isnan(compute(panel, ["ret_1d", "sentiment"]).values[1:]).all()
    with pytest.raises(DataError, match="has no field `sentiment`, which `sentiment_mean_5d` needs"):
        compute(panel, ["sentiment_mean_5d"])
    with pytest.raises(ParameterError, match=r"features\.sentiment: `vader` has nothing to read"):
        scored_panel(panel, empty_news(), "vader")
    with pytest.raises(ParameterError, match="did you mean `textblob`"):
        scored_panel(panel, news_of([(1, "wire", "Profit", "S000", 0.0)]), "text_blob")


# ------------------------------------------------------------------ features


def talk(panel: Panel, count: int, seed: int) -> pd.DataFrame:
    """Items at random instants of a panel's span about one or two of its symbols."""
    rng = np.random.default_rng(seed)
    span = int((panel.times[-1] - panel.times[0]) / np.timedelta64(1, "h"))
    rows = [(int(h), str(rng.choice(["wire", "paper"])), f"Story {rng.integers(count // 2)}", " ".join(rng.choice(panel.symbols, rng.integers(1, 3), replace=False)), float(rng.choice([-0.9, -0.2, 0.0, 0.3, 0.7]))) for h in rng.integers(0, span, count)]
    items = news_of(rows)
    return items.assign(timestamp=items["timestamp"] + (panel.index[0] - pd.Timestamp(BEGIN, tz="UTC")))


def test_the_family_passes_the_audit_on_news() -> None:
    base = random_walk(5, 260, seed=11)
    panel = with_news(base, talk(base, 1500, 1))
    table = audit(panel, FAMILY, cuts=6)
    assert len(table) == len(FAMILY) >= 60
    refuse(table.drop(columns="warmup_holds"))  # which holds where there is news in every bar
    items = talk(base, 1500, 1)
    refuse(audit_function(lambda p: compute(with_news(p, items), FAMILY, short=True), base, cuts=5))
    refuse(audit(made_up_fields(base, {n for f in lookup("sentiment") for n in f.needs if ":" not in n} - {"others"}), FAMILY, cuts=3))


def test_features_stand_still_when_the_future_of_items_changes() -> None:
    base = random_walk(5, 200, seed=7)
    items = talk(base, 1200, 3)
    whole = compute(with_news(base, items), FAMILY).values
    for k in (1, 60, 133, 198):
        t = base.index[k]
        known, later = items[items["timestamp"] <= t], items[items["timestamp"] > t]
        others = {"removed": known, "changed": pd.concat([known, later.assign(score=-0.5, symbols="S001 S004", title="Another")]), "joined": pd.concat([items, later.assign(id=lambda x: "n" + x["id"], title=lambda x: "New " + x["title"])])}
        for name, table in others.items():
            got = compute(with_news(base, table), FAMILY).values
            assert np.ascontiguousarray(got[:, :, : k + 1]).tobytes() == np.ascontiguousarray(whole[:, :, : k + 1]).tobytes(), (name, k)
    shuffled = compute(with_news(base, items.sample(frac=1, random_state=1)), FAMILY).values
    assert shuffled.tobytes() == whole.tobytes()


def test_no_two_features_of_the_family_are_one() -> None:
    base = random_walk(6, 300, seed=5, ragged=False)
    values = compute(with_news(base, talk(base, 4000, 4)), FAMILY).values.reshape(len(FAMILY), -1)
    assert not np.isinf(values).any()
    assert len({v.tobytes() for v in values}) == len(FAMILY)
    low = {"-1 to 1": -1.0, "0 to 1": 0.0, "-0.5 to 0.5": -0.5, "stories": 0.0, "hours": 0.0, "bars": 0.0, "sources": 0.0}
    high = {"-1 to 1": 1.0, "0 to 1": 1.0, "-0.5 to 0.5": 0.5}
    for f, v in zip(lookup("sentiment"), values, strict=True):
        assert np.nanmin(v) >= low.get(f.unit, -np.inf) - 1e-12, f.name
        assert np.nanmax(v) <= high.get(f.unit, np.inf) + 1e-12, f.name


def test_the_catalogue_and_the_command_know_the_family(capsys: pytest.CaptureFixture[str]) -> None:
    table = catalogue().set_index("name")
    assert (table["family"] == "sentiment").sum() == len(FAMILY)
    assert {"news_count_1d", "news_count_5d", "sentiment_mean_5d", "sentiment_ema_10", "sentiment_disagree_5d", "sentiment_market_5d", "sentiment_relative_5d", "news_hours"} <= set(FAMILY)
    assert main(["features", "sentiment", "mean score"]) == 0
    assert "sentiment_mean_5d" in capsys.readouterr().out


def test_a_system_names_its_scorer() -> None:
    assert FeatureParams.model_validate({"names": ["sentiment", "ret_1d"], "benchmark": None, "sentiment": "vader"}).sentiment == "vader"
    assert FeatureParams.model_validate({"names": "all", "benchmark": None}).sentiment is None
    panel = random_walk(3, 120, seed=2, ragged=False)
    items = talk(panel, 300, 9)
    heard = scored_panel(panel, items.drop(columns="score").assign(title="Great profit " + items["id"]), "vader")
    block = compute(heard, ["sentiment", "ret_1d"])
    assert np.nanmin(block["sentiment_level"]) > 0.5
    assert set(FAMILY) <= set(compute(heard).names)


# ------------------------------------------------------------------ scorers


@pytest.mark.parametrize("name", ["vader", "textblob"])
def test_a_score_depends_on_nothing_but_the_text(name: str) -> None:
    rng = np.random.default_rng(0)
    words = ["profit", "loss", "great", "weak", "not", "very", "fine", "fraud", "the", "bank", "up", "down", "good", "bad", "!!!", ":(", "SUPERB"]
    texts = [" ".join(rng.choice(words, rng.integers(0, 9))) for _ in range(300)]
    whole = scorer(name).score(texts)
    order = rng.permutation(len(texts))
    again = scorer(name).score([texts[k] for k in order])
    pd.testing.assert_frame_equal(again, whole.iloc[order].reset_index(drop=True), check_exact=True)
    assert whole["score"].isna().tolist() == [not t for t in texts]
    assert whole["score"].dropna().between(-1, 1).all()
    assert scorer(name).score(["Sehr gut"])["score"].tolist() == [0.0]


@pytest.mark.parametrize("texts", ["one text", [None], [3.0], ["a", float("nan")], pd.Series(["a", None])])
@pytest.mark.parametrize("make", [Vader, TextBlob, FinBert])
def test_what_is_no_text_is_refused(make: Any, texts: Any) -> None:
    with pytest.raises(DataError, match=rf"scorer {make.name}, text"):
        make().score(texts)


@pytest.mark.parametrize(("make", "module", "extra"), [(Vader, "vaderSentiment.vaderSentiment", "text"), (TextBlob, "textblob.sentiments", "text"), (lambda: FinBert().score(["Good"]), "transformers", "finbert")])
def test_a_library_that_is_missing_is_named_with_its_extra(make: Any, module: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ParameterError, match=rf"(?s)is not installed.*pip install 'mltrading\[{extra}\]'"):
        make()


def test_nothing_heavy_is_imported_and_nothing_fetched() -> None:
    code = """
import socket, sys
def refused(*a, **k): raise RuntimeError("network")
socket.socket.connect = refused
import mltrading.features.talk, mltrading.features.sentiment as s
assert not {"textblob", "nltk", "vaderSentiment", "transformers", "torch"} & set(sys.modules), sorted(sys.modules)
assert s.scorer("vader").score(["Great profit"])["score"].iloc[0] > 0
assert s.scorer("textblob").score(["Great profit"])["score"].iloc[0] > 0
try:
    s.scorer("finbert:no/such/folder").score(["Great profit"])
except ValueError as error:
    assert "pip install" in str(error) or "no/such/folder" in str(error), error
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "NLTK_DATA": "/nowhere", "HF_HOME": "/nowhere"}, timeout=120)


class Classifier:
    """What `FinBert` asks of tokenizer and model, in a few lines: says how much of a text is `up` and `down`, and notes the shapes that it is given."""

    pad_token_id = 0

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.device = "cpu"
        self.config = type("Config", (), {"max_position_embeddings": 40})()

    def __call__(self, texts: Any = None, **given: Any) -> Any:
        import torch

        if texts is not None:
            return {"input_ids": [[{"up": 2, "down": 3}.get(w, 1) for w in t.split()][: given["max_length"]] for t in texts]}
        words, there = given["input_ids"], given["attention_mask"]
        self.shapes.append(tuple(words.shape))
        assert ((words == 0) == (there == 0)).all()
        return type("Out", (), {"logits": torch.stack([(words == 3).sum(1), (words == 2).sum(1), (words == 1).sum(1)], dim=1).float()})()


def test_finbert_reads_in_batches_of_one_shape() -> None:
    model, rng = Classifier(), np.random.default_rng(0)
    reader = FinBert(batch=4)
    reader._parts = (model, model, [1, 2, 0])  # the model's classes are negative, positive, neutral
    texts = [" ".join(rng.choice(["up", "down", "on"], rng.integers(1, 60))) for _ in range(30)]
    told = reader.score([*texts, "  "])
    assert {s[0] for s in model.shapes} == {4}
    assert {s[1] for s in model.shapes} == {16, 32, 40}
    for text, row in zip(texts, told.itertuples(), strict=False):
        counts = np.array([text.split()[:40].count(w) for w in ("up", "on", "down")], float)
        p = np.exp(counts - counts.max()) / np.exp(counts - counts.max()).sum()
        np.testing.assert_allclose([row.positive, row.neutral, row.negative, row.score], [*p, p[0] - p[2]], rtol=1e-12, atol=1e-15)
    assert told.iloc[-1].isna().all()


WORDS = ["profit", "loss", "rises", "falls", "bank", "fine", "the", "a", "on", "of"]


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Writes a BERT classifier with random weights, some words and the given classes into a folder."""
    transformers = pytest.importorskip("transformers")
    import torch

    def write(classes: tuple[str, ...]) -> str:
        folder = str(tmp_path_factory.mktemp("bert"))
        known = {w: k for k, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
        torch.manual_seed(0)
        config = transformers.BertConfig(vocab_size=len(known), hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, max_position_embeddings=40, initializer_range=0.5, id2label=dict(enumerate(classes)), label2id={c: k for k, c in enumerate(classes)})
        transformers.BertForSequenceClassification(config).save_pretrained(folder)
        transformers.BertTokenizer(vocab=known).save_pretrained(folder)
        return folder
    return write


def test_finbert_on_a_tiny_bert(tiny_bert: Any) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    rng, folder = np.random.default_rng(1), tiny_bert(("positive", "negative", "neutral"))
    texts = [" ".join(rng.choice(WORDS, rng.integers(1, 60))) for _ in range(70)]
    told = scorer(f"finbert:{folder}").score(texts)
    assert np.ptp(told["score"]) > 0.1
    np.testing.assert_allclose(told[["positive", "neutral", "negative"]].sum(axis=1), 1.0, rtol=1e-12)
    np.testing.assert_array_equal(told["score"], told["positive"] - told["negative"])
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    for k in range(0, 70, 7):  # one at a time, unpadded
        with torch.no_grad():
            p = torch.softmax(model(**tokenizer(texts[k], truncation=True, max_length=40, return_tensors="pt")).logits, dim=1)[0].numpy()
        np.testing.assert_allclose(told.loc[k, ["positive", "negative", "neutral"]].to_numpy(float), p, atol=1e-5)
    order = rng.permutation(70)
    again = FinBert(folder).score([*(texts[k] for k in order), "", "bank " * 200])
    pd.testing.assert_frame_equal(again.iloc[:70], told.iloc[order].reset_index(drop=True), check_exact=True)
    pd.testing.assert_frame_equal(FinBert(folder).score(texts[:1]), told.iloc[:1], check_exact=True)
    with pytest.raises(DataError, match="its classes are up, down, flat"):
        FinBert(tiny_bert(("up", "down", "flat"))).score(["bank"])


def test_finbert_without_weights_says_where_it_looked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    for folder in (str(tmp_path), str(tmp_path / "none"), "nobody/no-such-model"):
        with pytest.raises(ParameterError, match=f"(?s)no weights and tokenizer at `{folder}`.*finbert:FOLDER"):
            FinBert(folder).score(["Good"])


def test_scorers_have_names() -> None:
    assert set(SCORERS) == {"vader", "textblob", "finbert"}
    with pytest.raises(ParameterError, match=r"unknown scorer `bert`"):
        scorer("bert")


# ------------------------------------------------------------------ real texts


@real
def test_lists_of_words_against_labelled_sentences() -> None:
    """More balanced than always saying neutral, and right less often."""
    from sklearn.metrics import f1_score

    rows = pd.read_parquet(Path(DATA) / "text" / "financial_phrasebank.parquet").query("agreement == 'AllAgree'").drop_duplicates("text")
    found = {"neutral": (float((rows["label"] == "neutral").mean()), float(f1_score(rows["label"], ["neutral"] * len(rows), average="macro")))}
    for name in ("vader", "textblob"):
        s = scorer(name).score(rows["text"].tolist())["score"].to_numpy()
        said = np.select([s >= MILD, s <= -MILD], ["positive", "negative"], "neutral")
        found[name] = float((said == rows["label"]).mean()), float(f1_score(rows["label"], said, average="macro"))
    print(found)
    np.testing.assert_allclose([found[n] for n in ("neutral", "vader", "textblob")], [(0.613, 0.253), (0.572, 0.488), (0.537, 0.465)], atol=0.002)


@real
def test_tweets_reach_the_bars_that_could_read_them() -> None:
    bars = pd.read_parquet(Path(DATA) / "acl18" / "price_raw.parquet")
    close = sessions("XNYS", "2013-12-02", "2015-12-31")["close"]
    bars = bars[bars["timestamp"].isin(close.index)]
    panel = from_frame(bars.assign(timestamp=bars["timestamp"].map(close)).sort_values(["timestamp", "symbol"]).drop(columns="adj_close"))
    tweets = pd.read_parquet(Path(DATA) / "acl18" / "tweets.parquet")
    tweets = tweets.groupby(["created_at", "text"])["symbol"].agg(lambda s: " ".join(sorted(set(s)))).reset_index().set_axis(["timestamp", "title", "symbols"], axis=1)
    items = tweets.assign(source="twitter", id=[f"t{k}" for k in range(len(tweets))], body="", url="")[list(NEWS)].astype(empty_news().dtypes.to_dict())
    scored = score_news(items, scorer("vader"))
    before = time.perf_counter()
    made = with_news(panel, scored)
    print(f"{len(items)} tweets into {panel!r}: {time.perf_counter() - before:.2f} s")
    stories, i = first_seen(scored), panel.symbols.index("AAPL")
    own = stories[[("AAPL" in s.split()) for s in stories["symbols"]]]
    for k in range(30, len(panel), 37):
        here = own[(own["timestamp"] > panel.index[k - 1]) & (own["timestamp"] <= panel.index[k])]
        assert made["sentiment_count"][i, k] == len(here)
        np.testing.assert_allclose(made["sentiment"][i, k], here["score"].mean(), rtol=1e-12)
    whole = evaluate(made, {f.name: f.expr for f in lookup("sentiment")}).values
    k = 300
    known = scored[scored["timestamp"] <= panel.index[k]]
    later = scored[scored["timestamp"] > panel.index[k]].assign(score=0.9, symbols="AAPL")
    got = evaluate(with_news(panel, pd.concat([known, later])), {f.name: f.expr for f in lookup("sentiment")}).values
    assert np.ascontiguousarray(got[:, :, : k + 1]).tobytes() == np.ascontiguousarray(whole[:, :, : k + 1]).tobytes()


# ------------------------------------------------------------------ the pipeline


@pytest.mark.slow
def test_the_stages_read_the_news_of_a_snapshot(project: Path, embedded_data: Path) -> None:
    shutil.copytree(embedded_data, project / "data")
    market = read_snapshot(project / "data")
    days = market.store("daily").panel(["AAPL", "KO"]).index
    rng = np.random.default_rng(0)
    rows = [(f"{t.isoformat()}", f"n{k}", f"{rng.choice(['Great profit', 'Terrible loss'])} {k}", "", "", str(rng.choice(["AAPL", "KO"]))) for k, t in enumerate(days[days.year == 2012])]
    write_parquet(news_table(rows, "wire"), project / "data" / "news.parquet")
    params = read_yaml(project / "params.yaml")
    own = params["systems"]["multiasset"]["features"]
    own["names"], own["sentiment"] = ["sentiment", "ret_5d"], "vader"
    (project / "params.yaml").write_text(yaml.safe_dump(params))
    for stage in ("panel", "features"):
        run_stage(stage, "multiasset", "smoke")
    block = open_block(next(project.glob("build/**/features/rows")))
    rows_of = block.between(None, None)
    made = block.keys(rows_of).join(block.take(rows_of))
    since = made[made["timestamp"] >= rows[0][0]]
    assert set(FAMILY) <= set(made.columns)
    assert made.loc[made["timestamp"] < rows[0][0], FAMILY].isna().all(axis=None)
    assert since.groupby("symbol")["news_count_1d"].sum().loc[["AAPL", "KO"]].sum() == len(rows)
    assert since.loc[since["symbol"] == "XOM", "sentiment_level"].isna().all()
