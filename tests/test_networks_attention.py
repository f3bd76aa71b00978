"""Recurrent and attentive encoders: one answer in training and in use, in 32 and 64 bits, alone and among others; and a stream that is not there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mltrading.core.errors import ParameterError
from mltrading.models.attention import AttentionPooling, Positions
from mltrading.models.gru import GRUAttention
from mltrading.models.lstm import LSTM, LSTMAttention, RecurrentEncoder
from mltrading.models.multimodal import MultimodalEncoder, MultimodalParams, MultimodalTransformer, stream_columns
from mltrading.models.training import TrainParams
from mltrading.models.transformer import MultiHead, TransformerEncoder
from mltrading.models.windows import Windows
from mltrading.models.windows import windows as make_windows

FEATURES, STEPS = 7, 13
SIZES = {"width": 16, "heads": 4, "layers": 2, "feedforward": 24}
SILENT = np.zeros((2, FEATURES), np.float32)
STREAMS = {"news": [1, 4], "price": [0, 2, 6], "social": [3, 5]}

ENCODERS: dict[str, Callable[[float], nn.Module]] = {
    "lstm": lambda dropout: RecurrentEncoder(nn.LSTM, FEATURES, 16, 2, dropout, "last"),
    "lstm, one layer": lambda dropout: RecurrentEncoder(nn.LSTM, FEATURES, 16, 1, dropout, "last"),
    "lstm_attention": lambda dropout: RecurrentEncoder(nn.LSTM, FEATURES, 16, 2, dropout, "attention"),
    "gru_attention": lambda dropout: RecurrentEncoder(nn.GRU, FEATURES, 16, 2, dropout, "attention"),
    "transformer": lambda dropout: TransformerEncoder(FEATURES, STEPS, dropout=dropout, positions="sinusoidal", **SIZES),
    "transformer, learned": lambda dropout: TransformerEncoder(FEATURES, STEPS, dropout=dropout, positions="learned", **SIZES),
    "multimodal": lambda dropout: MultimodalEncoder(STREAMS, "price", SILENT, STEPS, dropout=dropout, positions="sinusoidal", **SIZES),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def made(name: str, dropout: float = 0.0, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ENCODERS[name](dropout)


def windows(n: int = 9, seed: int = 1) -> torch.Tensor:
    """Standardized windows with silent steps among news, and no news at all in the first two."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, STEPS, FEATURES))
    x[:, :, STREAMS["news"]] *= rng.random((n, STEPS, 1)) < 0.3
    x[:2, :, STREAMS["news"]] = 0
    return torch.from_numpy(x)


@pytest.mark.parametrize("name", ENCODERS)
def test_training_and_use_agree(name: str) -> None:
    encoder, x = made(name), windows().float()
    kept = x.clone()
    trained = encoder.train()(x).detach()
    with torch.no_grad():
        used, again = encoder.eval()(x), encoder(x)
        exact = encoder.double()(x.double())
    assert trained.shape == (len(x), encoder.width)
    assert torch.equal(used, again)
    assert (trained - used).abs().max() < 1e-6
    assert (used - exact).abs().max() < 1e-5
    assert exact.dtype == torch.float64
    assert torch.equal(x, kept)


@pytest.mark.parametrize("name", ENCODERS)
def test_a_window_alone_and_among_others(name: str) -> None:
    encoder, x = made(name).double().eval(), windows(33)
    with torch.no_grad():
        together = encoder(x)
        alone = torch.cat([encoder(x[i : i + 1]) for i in range(len(x))])
    assert (together - alone).abs().max() < 1e-13


@pytest.mark.parametrize("name", ENCODERS)
def test_every_weight_learns_and_seeds_rule(name: str) -> None:
    encoder, x = made(name), windows().float()
    encoder(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.parameters())
    state = torch.get_rng_state()
    same, other = made(name), made(name, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(encoder.parameters(), same.parameters(), strict=True))
    assert not torch.equal(encoder(x), other(x))


@pytest.mark.parametrize("name", ENCODERS)
def test_dropout_is_for_training(name: str) -> None:
    encoder, x = made(name, dropout=0.5), windows().float()
    assert not torch.equal(encoder.train()(x), encoder(x))
    assert torch.equal(encoder.eval()(x), made(name)(x))


@pytest.mark.parametrize("name", [n for n in ENCODERS if "lstm" not in n and "gru" not in n])
def test_sixteen_bits(name: str) -> None:
    encoder, x = made(name), windows().float()
    with torch.autocast("cpu", torch.bfloat16):
        z = encoder(x)
        z.float().square().sum().backward()
    assert (z.float() - encoder(x)).abs().max() < 0.1
    assert all(torch.isfinite(p.grad).all() for p in encoder.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ENCODERS)
def test_cuda(name: str) -> None:
    encoder, x = made(name).double().eval(), windows()
    with torch.no_grad():
        assert (encoder.cuda()(x.cuda()).cpu() - encoder.cpu()(x)).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["lstm_attention", "gru_attention"])
def test_weights_of_recurrences(name: str) -> None:
    encoder, x = made(name), windows().float()
    alpha = encoder.attention(x)
    assert alpha.shape == (len(x), STEPS)
    assert torch.allclose(alpha.sum(-1), torch.ones(len(x)))
    states = encoder.cell(x)[0]
    assert torch.allclose(encoder(x)[:, :16], (alpha[..., None] * states).sum(1), atol=1e-6)


def test_pooling_equal_states() -> None:
    """Equal states get equal weights, whatever the pooling has learned; a state far from the others does not."""
    pool = AttentionPooling(4, 8)
    equal = torch.randn(3, 1, 4).expand(3, 5, 4)
    assert torch.allclose(pool.weights(equal), torch.full((3, 5), 0.2))
    assert torch.allclose(pool(equal), torch.cat([equal[:, 0], equal[:, 0]], -1), atol=1e-6)


def test_places_belong_to_ages() -> None:
    """The last steps of a long window have the codes of a short one, so that the same days have the same codes."""
    x = torch.zeros(1, 60, 8)
    assert torch.equal(Positions(60, 8, "sinusoidal")(x)[:, -21:], Positions(21, 8, "sinusoidal")(x[:, -21:]))


def test_what_is_not_seen_is_not_heard() -> None:
    heads, generator = MultiHead(8, 2).double(), torch.Generator().manual_seed(0)
    asking, memory = (torch.randn(4, n, 8, dtype=torch.float64, generator=generator) for n in (3, 6))
    seen = torch.rand(4, 6, generator=generator) < 0.5
    seen[:, 0] = True
    other = torch.where(seen[..., None], memory, torch.randn(4, 6, 8, dtype=torch.float64, generator=generator))
    assert torch.equal(heads(asking, memory, seen), heads(asking, other, seen))
    few = torch.stack([heads(asking[i : i + 1], memory[i : i + 1, seen[i]])[0] for i in range(4)])
    assert (heads(asking, memory, seen) - few).abs().max() < 1e-14


def test_a_silent_stream_does_not_speak() -> None:
    """Neither embedding nor places of a stream reach a window in which it is silent; where it speaks they do."""
    encoder, x = made("multimodal").double(), windows()
    with torch.no_grad():
        before = encoder(x)
        news = encoder.memories[0].tokens
        news.embed.weight.normal_()
        news.embed.bias.normal_()
        news.positions.code.normal_()
        after = encoder(x)
    silent = (x[..., STREAMS["news"]] == 0).all(-1).all(-1)
    assert silent.sum() == 2
    assert torch.equal(before[silent], after[silent])
    assert ((before - after).abs().amax(1) > 1e-3)[~silent].all()


def test_silence_is_one_vector_for_all_prices() -> None:
    """What a silent stream adds to the asking tokens does not depend on them."""
    encoder, x = made("multimodal").double(), windows()
    x[..., STREAMS["news"]] = 0
    tokens, memories = encoder.tokens(x[..., STREAMS["price"]]), [m(x) for m in encoder.memories]
    answer = encoder.blocks[0].ask[0](encoder.blocks[0].norm(tokens), *memories[0])
    assert (answer - answer[:1, :1]).abs().max() < 1e-13
    assert torch.equal(encoder.attention(x)["news"][..., 0], torch.ones(len(x), 4, dtype=torch.float64))


NAMES = st.lists(st.sampled_from(["ret_1", "ret_5", "vol_20", "news_n", "news_tone", "soc_x", "other"]), min_size=1, max_size=7, unique=True)


@settings(max_examples=100, deadline=None)
@given(NAMES, st.permutations(["price", "news", "social"]))
def test_streams_share_the_features_out(features: list[str], order: list[str]) -> None:
    prefixes = {"price": ["ret_", "vol_"], "news": ["news_"], "social": ["soc_"]}
    groups = {name: [i for i, f in enumerate(features) if f.startswith(tuple(prefixes[name]))] for name in prefixes}
    streams = {name: prefixes[name] for name in order}
    if "other" in features or not all(groups.values()):
        with pytest.raises(ParameterError, match=r"belongs to none|no feature begins with"):
            stream_columns(features, streams)
    else:
        assert stream_columns(features, streams) == groups
        assert list(stream_columns(features, streams)) == ["news", "price", "social"]


def market(n: int = 300, steps: int = 6) -> tuple[Windows, np.ndarray, np.ndarray]:
    """Windows with holes among news, targets, and instants."""
    rng, rows = np.random.default_rng(3), n + 5 * (steps - 1)
    table = pd.DataFrame(rng.standard_normal((rows, 5)), columns=["ret_1", "vol_20", "news_tone", "news_new", "soc_tone"], dtype=np.float32)
    table.loc[rng.random(rows) > 0.3, ["news_tone", "news_new"]] = np.nan
    x = make_windows(table, np.arange(rows) % 5, steps).take(slice(rows - n, None))
    return x, rng.standard_normal(n), np.datetime64("2024-01-02", "us") + np.arange(n) // 5 * np.timedelta64(1, "D")


def multimodal(streams: dict[str, list[str]]) -> MultimodalTransformer:
    train = TrainParams(epochs=1, batch_size=64, patience=0)
    return MultimodalTransformer(MultimodalParams(steps=6, width=8, heads=2, layers=1, feedforward=8, streams=streams, main="price", train=train), seed=1, purge_bars=1)


def test_streams_in_any_order_are_one_model(tmp_path: Path) -> None:
    x, y, times = market()
    streams = {"price": ["ret_", "vol_"], "news": ["news_"], "social": ["soc_"]}
    first = multimodal(streams).fit(x, y, np.ones(len(y)), times)
    other = multimodal(dict(reversed(streams.items()))).fit(x, y, np.ones(len(y)), times)
    first.save(tmp_path / "a")
    other.save(tmp_path / "b")
    assert (tmp_path / "a/model.json").read_bytes() == (tmp_path / "b/model.json").read_bytes()
    assert (tmp_path / "a/weights.safetensors").read_bytes() == (tmp_path / "b/weights.safetensors").read_bytes()
    pd.testing.assert_frame_equal(MultimodalTransformer.load(tmp_path / "a").predict(x), other.predict(x), check_exact=True)


def test_holes_are_silence() -> None:
    """Absent news, news of zeros, and a mixture of both leave the same forecast; the tone of one step changes it."""
    x, y, times = market()
    model = multimodal({"price": ["ret_", "vol_"], "news": ["news_"], "social": ["soc_"]}).fit(x, y, np.ones(len(y)), times)

    def told(tone: float, new: float) -> np.ndarray:
        block = x.block.copy()
        block[:, 2:4] = tone, new
        return model.predict(replace(x, block=block))["score"].to_numpy()

    assert np.array_equal(told(np.nan, np.nan), told(0, 0))
    assert np.array_equal(told(np.nan, np.nan), told(np.nan, 0))
    assert (told(np.nan, np.nan) != told(1, np.nan)).all()


def test_streams_are_refused_before_training() -> None:
    x, y, times = market()
    with pytest.raises(ParameterError, match="feature `soc_tone` belongs to none of news, price"):
        multimodal({"price": ["ret_", "vol_"], "news": ["news_"]}).fit(x, y, np.ones(len(y)), times)


def test_kinds_differ_by_their_pooling() -> None:
    assert LSTM.Params(steps=5) == LSTM.Params(steps=5, pooling="last")
    assert LSTMAttention.Params(steps=5).pooling == GRUAttention.Params(steps=5).pooling == "attention"
    encoders = [kind(kind.Params(steps=5, hidden=8), seed=0).encoder(["a", "b"]) for kind in (LSTM, LSTMAttention, GRUAttention)]
    assert [e.width for e in encoders] == [8, 16, 16]
