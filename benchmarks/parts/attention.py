"""A training step (forward and backward) of each recurrent and attentive encoder beside the same architecture in bare torch.nn, by turns; equal sizes and equal numbers of parameters are asserted."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from mltrading.models.lstm import RecurrentEncoder
from mltrading.models.multimodal import MultimodalEncoder
from mltrading.models.transformer import TransformerEncoder

FEATURES, STEPS, BATCH, WIDTH = 60, 60, 256, 64
STREAMS = {"news": list(range(40, 50)), "price": list(range(40)), "sentiment": list(range(50, 60))}


class BareRecurrent(nn.Module):
    """torch's recurrence, and additive attention as one would write it."""

    def __init__(self, cell: nn.Module, pooling: str) -> None:
        super().__init__()
        self.cell = cell
        self.score = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1, bias=False)) if pooling == "attention" else None

    def forward(self, x: Tensor) -> Tensor:
        states = self.cell(x)[0]
        if self.score is None:
            return states[:, -1]
        return torch.cat([(self.score(states).softmax(1) * states).sum(1), states[:, -1]], 1)


class BareTokens(nn.Module):
    """Linear layer, a learned token in front, fixed places."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.embed, self.first = nn.Linear(features, WIDTH), nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.register_buffer("code", torch.randn(STEPS, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.first.expand(len(x), -1, -1), self.embed(x) + self.code], 1)


class BareTransformer(nn.Module):
    """`nn.TransformerEncoder`; its first token."""

    def __init__(self, layers: int, feedforward: int) -> None:
        super().__init__()
        self.tokens = BareTokens(FEATURES)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, feedforward, 0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(WIDTH), enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(self.tokens(x))[:, 0]


class BareAsking(nn.Module):
    """A decoder layer with a memory for each stream, of `nn.MultiheadAttention`."""

    def __init__(self, feedforward: int) -> None:
        super().__init__()
        self.own = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.ask = nn.ModuleDict({k: nn.MultiheadAttention(WIDTH, 4, batch_first=True) for k in ("news", "sentiment")})
        self.n1, self.n2, self.n3 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.each = nn.Sequential(nn.Linear(WIDTH, feedforward), nn.ReLU(), nn.Linear(feedforward, WIDTH))

    def forward(self, x: Tensor, memories: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
        n = self.n1(x)
        x = x + self.own(n, n, n, need_weights=False)[0]
        n = self.n2(x)
        for k, (m, silent) in memories.items():
            x = x + self.ask[k](n, m, m, key_padding_mask=silent, need_weights=False)[0]
        return x + self.each(self.n3(x))


class BareMultimodal(nn.Module):
    """Streams, memories and blocks of `nn` modules; the first token."""

    def __init__(self, layers: int, feedforward: int) -> None:
        super().__init__()
        self.tokens = nn.ModuleDict({k: BareTokens(len(v)) for k, v in STREAMS.items()})
        self.norms = nn.ModuleDict({k: nn.LayerNorm(WIDTH) for k in ("news", "sentiment")})
        self.blocks, self.norm = nn.ModuleList(BareAsking(feedforward) for _ in range(layers)), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        memories = {}
        for k in ("news", "sentiment"):
            mine = x[..., STREAMS[k]]
            silent = nn.functional.pad((mine == 0).all(-1), (1, 0), value=False)
            memories[k] = self.norms[k](self.tokens[k](mine)), silent
        h = self.tokens["price"](x[..., STREAMS["price"]])
        for block in self.blocks:
            h = block(h, memories)
        return self.norm(h)[:, 0]


def pairs() -> dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]]:
    """Kind -> ours, and the same in torch.nn."""
    def lstm() -> nn.Module:
        return nn.LSTM(FEATURES, WIDTH, 2, batch_first=True)

    def gru() -> nn.Module:
        return nn.GRU(FEATURES, WIDTH, 2, batch_first=True)

    sizes = {"steps": STEPS, "width": WIDTH, "heads": 4, "layers": 2, "feedforward": 128, "dropout": 0.0, "positions": "sinusoidal"}
    return {
        "lstm": (lambda: RecurrentEncoder(nn.LSTM, FEATURES, WIDTH, 2, 0.0, "last"), lambda: BareRecurrent(lstm(), "last")),
        "lstm_attention": (lambda: RecurrentEncoder(nn.LSTM, FEATURES, WIDTH, 2, 0.0, "attention"), lambda: BareRecurrent(lstm(), "attention")),
        "gru_attention": (lambda: RecurrentEncoder(nn.GRU, FEATURES, WIDTH, 2, 0.0, "attention"), lambda: BareRecurrent(gru(), "attention")),
        "transformer": (lambda: TransformerEncoder(FEATURES, **sizes), lambda: BareTransformer(2, 128)),
        "multimodal": (lambda: MultimodalEncoder(STREAMS, "price", np.zeros((2, FEATURES), np.float32), **sizes), lambda: BareMultimodal(2, 128)),
    }


def step(net: nn.Module, x: Tensor) -> float:
    """Seconds of one forward and backward pass."""
    for p in net.parameters():
        p.grad = None
    start = time.perf_counter()
    net(x).square().mean().backward()
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def step_ratios(repeats: int = 10, threads: int = 1, device: str = "cpu") -> dict[str, tuple[float, float, float]]:
    """Kind -> (ours in ms, torch.nn in ms, torch.nn / ours) for 256 windows of 60 steps × 60 features."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    generator, found = torch.Generator().manual_seed(0), {}
    x = torch.randn(BATCH, STEPS, FEATURES, generator=generator)
    for k in ("news", "sentiment"):  # at a fifth of the steps
        x[:, :, STREAMS[k]] *= torch.rand(BATCH, STEPS, 1, generator=generator) < 0.2
    try:
        for kind, makers in pairs().items():
            ours, bare = (make().to(device) for make in makers)
            assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in bare.parameters()), kind
            times = [(step(ours, x.to(device)), step(bare, x.to(device))) for _ in range(repeats + 2)][2:]
            a, b = (1000 * min(t) for t in zip(*times, strict=True))
            found[kind] = a, b, b / a
    finally:
        torch.set_num_threads(before)
    return found
