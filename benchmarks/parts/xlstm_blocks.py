"""Throughput of xLSTM cells and blocks beside the package `xlstm`: forward and backward, one thread, by turns."""

import time
from collections.abc import Callable

import torch


def _seconds(work: dict[str, Callable[[], object]], rounds: int = 7) -> dict[str, float]:
    "Best processor seconds of each, taken in turns so that a busy machine is busy for all."
    best = dict.fromkeys(work, float("inf"))
    for _ in range(rounds + 1):  # the first round warms up
        for name, call in work.items():
            start = time.process_time()
            call()
            best[name] = min(best[name], time.process_time() - start)
    return best


def bench_xlstm(batch: int = 256, steps: int = 60, width: int = 64, heads: int = 4, rounds: int = 7) -> dict[str, float]:
    """Ratios (theirs / ours, above one: ours is faster) and windows per second."""
    from xlstm.blocks.mlstm.block import mLSTMBlock, mLSTMBlockConfig
    from xlstm.blocks.mlstm.layer import mLSTMLayerConfig
    from xlstm.blocks.slstm.block import sLSTMBlock, sLSTMBlockConfig
    from xlstm.blocks.slstm.cell import sLSTMCell, sLSTMCellConfig
    from xlstm.blocks.slstm.layer import sLSTMLayerConfig
    from xlstm.components.feedforward import FeedForwardConfig

    from mltrading.models.xlstm import MLSTMBlock, SLSTMBlock, slstm_scan

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        D = width // heads
        x = torch.randn(batch, steps, width, requires_grad=True)
        gates = torch.randn(batch, steps, 4 * width, requires_grad=True)
        their_cell = sLSTMCell(sLSTMCellConfig(hidden_size=width, num_heads=heads, backend="vanilla", dtype="float32", recurrent_weight_init="standard"))
        recurrent = their_cell._recurrent_kernel_.detach().clone().view(heads, 4, D, D).requires_grad_()
        bias = their_cell._bias_.detach().clone().view(4, heads, D).transpose(0, 1).unsqueeze(-1).requires_grad_()

        def cell() -> torch.Tensor:  # the same interface: gates (B, T, 4 x width) in, (B, T, width) out
            pre = gates.view(batch, steps, 4, heads, D).permute(1, 3, 2, 4, 0) + bias
            return slstm_scan(pre, recurrent).permute(3, 0, 1, 2).reshape(batch, steps, width)

        wide = 8 * -(-width // 6)  # the same width of the feed-forward layer on both sides
        theirs_m = mLSTMBlock(mLSTMBlockConfig(mlstm=mLSTMLayerConfig(embedding_dim=width, num_heads=heads, context_length=steps), _num_blocks=1, _block_idx=0))
        theirs_s = sLSTMBlock(sLSTMBlockConfig(slstm=sLSTMLayerConfig(embedding_dim=width, num_heads=heads, backend="vanilla", dtype="float32"),
                                               feedforward=FeedForwardConfig(proj_factor=wide / width, round_proj_up_to_multiple_of=8), _num_blocks=1, _block_idx=0))
        ours_m, ours_s = MLSTMBlock(width, heads), SLSTMBlock(width, heads)

        def train(call: Callable[[], torch.Tensor]) -> Callable[[], object]:
            return lambda: call().square().mean().backward()

        seconds = _seconds({
            "cell": train(cell), "their cell": train(lambda: their_cell(gates)[0]),
            "mlstm": train(lambda: ours_m(x)), "their mlstm": train(lambda: theirs_m(x)),
            "slstm": train(lambda: ours_s(x)), "their slstm": train(lambda: theirs_s(x)),
        }, rounds)
        return {
            "slstm_cell_vs_xlstm": seconds["their cell"] / seconds["cell"],
            "mlstm_block_vs_xlstm": seconds["their mlstm"] / seconds["mlstm"],
            "slstm_block_vs_xlstm": seconds["their slstm"] / seconds["slstm"],
            "slstm_cell_windows_per_s": batch / seconds["cell"],
            "mlstm_block_windows_per_s": batch / seconds["mlstm"],
            "slstm_block_windows_per_s": batch / seconds["slstm"],
        }
    finally:
        torch.set_num_threads(threads)
