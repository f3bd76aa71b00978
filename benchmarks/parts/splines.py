"""Kolmogorov-Arnold layer and autoencoder beside their plain forms: forward and backward, seconds per batch."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mltrading.models.autoencoder import Autoencoding, Variational
from mltrading.models.kan import KANLayer
from mltrading.models.network import Heads
from mltrading.models.tasks import Direction


class RecursiveKANLayer(nn.Module):
    """The same layer with the recursion of Cox and de Boor written out, as implementations for knots at any distance do it."""

    def __init__(self, layer: KANLayer) -> None:
        super().__init__()
        h = 2 * layer.reach / layer.grid
        self.register_buffer("knots", torch.arange(-3, layer.grid + 4) * h - layer.reach)
        self.base, self.spline = nn.Parameter(layer.base.detach().clone()), nn.Parameter(layer.spline.detach().clone())

    def basis(self, x: Tensor) -> Tensor:
        x, k = x.unsqueeze(-1), self.knots
        b = ((x >= k[:-1]) & (x < k[1:])).to(x.dtype)
        for p in (1, 2, 3):
            b = (x - k[: -p - 1]) / (k[p:-1] - k[: -p - 1]) * b[..., :-1] + (k[p + 1 :] - x) / (k[p + 1 :] - k[1:-p]) * b[..., 1:]
        return b

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.silu(x), self.base) + F.linear(self.basis(x).flatten(1), self.spline.flatten(1))


def _seconds(work: Callable[[], Any], repeats: int) -> float:
    work()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def kan(batch: int = 256, inputs: int = 480, outputs: int = 64, grid: int = 5, repeats: int = 15, device: str = "cpu") -> dict[str, float]:
    """Seconds per forward and backward of a layer whose inputs need a gradient (any but the first), ours and recursive; and what they differ by."""
    torch.manual_seed(0)
    ours = KANLayer(inputs, outputs, grid, 3.0).to(device)
    plain = RecursiveKANLayer(ours).to(device)
    x = torch.randn(batch, inputs, device=device)

    def step(layer: nn.Module) -> Callable[[], Tensor]:
        def work() -> Tensor:
            z = x.clone().requires_grad_()
            layer.zero_grad(set_to_none=True)
            layer(z).square().sum().backward()
            if x.is_cuda:
                torch.cuda.synchronize()
            return z.grad  # type: ignore[return-value]
        return work
    difference = float((step(ours)() - step(plain)()).abs().max() / step(plain)().abs().max())
    seconds = {name: _seconds(step(layer), repeats) for name, layer in (("ours", ours), ("recursive", plain))}
    return {**seconds, "speedup": seconds["recursive"] / seconds["ours"], "difference": difference}


class BareAutoencoder(nn.Module):
    """The same sizes in torch.nn and nothing else."""

    def __init__(self, inputs: int, hidden: tuple[int, int], latent: int) -> None:
        super().__init__()
        self.way_in = nn.Sequential(nn.Linear(inputs, hidden[0]), nn.SiLU(), nn.Linear(hidden[0], hidden[1]), nn.SiLU(), nn.Linear(hidden[1], latent))
        self.way_out = nn.Sequential(nn.Linear(latent, hidden[1]), nn.SiLU(), nn.Linear(hidden[1], hidden[0]), nn.SiLU(), nn.Linear(hidden[0], inputs))
        self.head = nn.Linear(latent, 1)

    def forward(self, x: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        z = self.way_in(x)
        each = F.binary_cross_entropy_with_logits(self.head(z)[:, 0], up, reduction="none") + (self.way_out(z) - x).square().mean(1) / 2
        return (each * weight).sum() / weight.sum()


def autoencoder(batch: int = 256, steps: int = 20, features: int = 30, repeats: int = 30, device: str = "cpu") -> dict[str, float]:
    """Seconds per forward and backward of an autoencoder with one head as `Network` trains it, of the variational one, and of the same in bare torch.nn."""
    torch.manual_seed(0)
    inputs, hidden, latent = steps * features, (64, 32), 8
    x, up, weight = torch.randn(batch, steps, features, device=device), torch.rand(batch, device=device).round(), torch.ones(batch, device=device)
    bare = BareAutoencoder(inputs, hidden, latent).to(device)
    plain = Heads(Autoencoding(inputs, hidden, latent, 1.0), [Direction()], 1).to(device)
    varied = Heads(Variational(inputs, hidden, latent, 1.0, 0.3), [Direction()], 1).to(device)
    flat = x.flatten(1)

    def step(module: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
        def work() -> None:
            module.zero_grad(set_to_none=True)
            loss().backward()
            if x.is_cuda:
                torch.cuda.synchronize()
        return work
    seconds = {
        "bare": _seconds(step(bare, lambda: bare(flat, up, weight)), repeats),
        "autoencoder": _seconds(step(plain, lambda: plain.costs(x, [[up]], weight).objective), repeats),
        "variational": _seconds(step(varied, lambda: varied.costs(x, [[up]], weight).objective), repeats),
    }
    return {**seconds, "speedup": seconds["bare"] / seconds["autoencoder"]}
