"""The cells and blocks of models.xlstm give what the authors' package `xlstm` gives at equal weights, outputs and gradients."""

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from xlstm.blocks.mlstm.backends import parallel_stabilized_simple, recurrent_step_stabilized_simple
from xlstm.blocks.mlstm.block import mLSTMBlock, mLSTMBlockConfig
from xlstm.blocks.mlstm.layer import mLSTMLayerConfig
from xlstm.blocks.slstm.block import sLSTMBlock, sLSTMBlockConfig
from xlstm.blocks.slstm.cell import sLSTMCell, sLSTMCellConfig
from xlstm.blocks.slstm.layer import sLSTMLayerConfig
from xlstm.components.feedforward import FeedForwardConfig
from xlstm.xlstm_block_stack import xLSTMBlockStack, xLSTMBlockStackConfig

from mltrading.models.xlstm import MLSTMBlock, SLSTMBlock, XLSTMStack, mlstm_parallel, mlstm_recurrent, slstm_scan

WIDTH, HEADS, T, B = 48, 2, 12, 3
EXACT = {torch.float64: 1e-10, torch.float32: 2e-4}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def shaken(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    "All weights off their starting values, none of them zero."
    module.to(dtype)
    with torch.no_grad():
        for k, p in enumerate(module.parameters()):
            p.add_(0.2 * drawn(*p.shape, seed=k + 1).to(dtype))
    return module


def slstm_weights(theirs: nn.Module, heads: int = HEADS) -> dict[str, Tensor]:
    "The state of our block from that of theirs. Their layer calls the input gate's projection `fgate` and the other way round."
    layer, ffn = theirs.xlstm, theirs.ffn
    width = layer.group_norm.weight.numel()
    head = (heads, 4, width // heads)
    return {
        "norm.weight": 1 + theirs.xlstm_norm.weight, "wide_norm.weight": 1 + theirs.ffn_norm.weight, "scale": 1 + layer.group_norm.weight,
        "conv.weight": layer.conv1d.conv.weight[:, 0].T, "conv.bias": layer.conv1d.conv.bias,
        "cell.input": torch.stack([gate.weight for gate in (layer.fgate, layer.igate, layer.zgate, layer.ogate)], 1),
        "cell.recurrent": layer.slstm_cell._recurrent_kernel_.view(*head, width // heads),
        "cell.bias": layer.slstm_cell._bias_.view(4, heads, -1).transpose(0, 1),
        "up.weight": ffn.proj_up.weight, "down.weight": ffn.proj_down.weight,
    }


def mlstm_weights(theirs: nn.Module, heads: int = HEADS) -> dict[str, Tensor]:
    layer = theirs.xlstm
    inner = layer.learnable_skip.numel()
    gates = torch.cat([layer.mlstm_cell.igate.weight, layer.mlstm_cell.fgate.weight])
    return {
        "norm.weight": 1 + theirs.xlstm_norm.weight, "scale": 1 + layer.mlstm_cell.outnorm.weight, "skip": layer.learnable_skip,
        "up.weight": layer.proj_up.weight, "down.weight": layer.proj_down.weight,
        "conv.weight": layer.conv1d.conv.weight[:, 0].T, "conv.bias": layer.conv1d.conv.bias,
        "cell.project": torch.stack([p.weight for p in (layer.q_proj, layer.k_proj, layer.v_proj)]).view(3, heads, -1, 4, 4),
        "cell.gate": gates.T.reshape(3, heads, inner // heads, 2 * heads),
        "cell.bias": torch.cat([layer.mlstm_cell.igate.bias, layer.mlstm_cell.fgate.bias]),
    }


WEIGHTS = {"s": slstm_weights, "m": mlstm_weights}


def their_block(kind: str, dtype: torch.dtype = torch.float64, exact: bool = True) -> nn.Module:
    if kind == "s":
        layer = sLSTMLayerConfig(embedding_dim=WIDTH, num_heads=HEADS, backend="vanilla", dtype="float32")
        block: nn.Module = sLSTMBlock(sLSTMBlockConfig(slstm=layer, feedforward=FeedForwardConfig(), _num_blocks=1, _block_idx=0))
    else:
        block = mLSTMBlock(mLSTMBlockConfig(mlstm=mLSTMLayerConfig(embedding_dim=WIDTH, num_heads=HEADS, context_length=T, round_proj_up_to_multiple_of=8), _num_blocks=1, _block_idx=0))
        if exact:
            without_eps(block)
    return shaken(block, dtype)


def without_eps(block: nn.Module) -> None:
    "Their denominator has 1e-6 added to what the paper says."
    block.xlstm.mlstm_cell.backend_fn = partial(parallel_stabilized_simple, eps=0.0)


def our_block(kind: str, theirs: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    block = (SLSTMBlock if kind == "s" else MLSTMBlock)(WIDTH, HEADS).to(dtype)
    block.load_state_dict({k: v.detach().clone() for k, v in WEIGHTS[kind](theirs).items()})
    return block


def gradients(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    "Output and gradient of the input; gradients of the weights are left in the module."
    x = x.clone().requires_grad_()
    y = module(x)
    y.backward(drawn(*y.shape, seed=99, dtype=y.dtype))
    assert x.grad is not None
    return y.detach(), x.grad


def test_slstm_cell() -> None:
    cell = shaken(sLSTMCell(sLSTMCellConfig(hidden_size=WIDTH, num_heads=HEADS, backend="vanilla", dtype="float32", recurrent_weight_init="standard")), torch.float64)
    D = WIDTH // HEADS
    theirs_in, ours_in = (drawn(B, T, 4 * WIDTH, seed=5).requires_grad_() for _ in range(2))
    recurrent, bias = (v.detach().clone().requires_grad_() for v in (cell._recurrent_kernel_.view(HEADS, 4, D, D), cell._bias_.view(4, HEADS, D).transpose(0, 1)))
    theirs, _ = cell(theirs_in)                                                       # (B, N, T, D)
    pre = ours_in.view(B, T, 4, HEADS, D).permute(1, 3, 2, 4, 0) + bias.unsqueeze(-1)
    ours = slstm_scan(pre, recurrent).permute(3, 1, 0, 2)
    assert_close(ours, theirs, rtol=0, atol=1e-12)
    seen = drawn(*theirs.shape, seed=6)
    (theirs * seen).sum().backward()
    (ours * seen).sum().backward()
    assert_close(ours_in.grad, theirs_in.grad, rtol=0, atol=1e-11)
    assert_close(recurrent.grad, cell._recurrent_kernel_.grad.view(recurrent.shape), rtol=0, atol=1e-10)
    assert_close(bias.grad, cell._bias_.grad.view(4, HEADS, D).transpose(0, 1), rtol=0, atol=1e-10)


def test_mlstm_cell_in_both_forms() -> None:
    q, k, v = (drawn(B, HEADS, T, 16, seed=s) for s in range(3))
    i, f = drawn(B, HEADS, T, seed=3), drawn(B, HEADS, T, seed=4) + 3
    theirs = parallel_stabilized_simple(q, k, v, i[..., None], f[..., None], eps=0.0)
    assert_close(mlstm_parallel(q, k, v, i, f), theirs, rtol=0, atol=1e-11)
    state = {"c_state": drawn(B, HEADS, 16, 16) * 0, "n_state": drawn(B, HEADS, 16, 1) * 0, "m_state": drawn(B, HEADS, 1, 1) * 0}
    ours = mlstm_recurrent(q, k, v, i, f)
    for t in range(T):
        now = slice(t, t + 1)
        h, state_now = recurrent_step_stabilized_simple(q=q[:, :, now].clone(), k=k[:, :, now].clone(), v=v[:, :, now].clone(), igate_preact=i[..., now, None], fgate_preact=f[..., now, None], eps=0.0, **state)
        state = dict(zip(state, state_now, strict=True))
        assert_close(ours[:, :, t], h.squeeze(2), rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", ["m", "s"])
def test_block(kind: str, dtype: torch.dtype) -> None:
    theirs = their_block(kind, dtype)
    ours, x = our_block(kind, theirs, dtype), drawn(B, T, WIDTH, seed=7, dtype=dtype)
    (y, dx), (their_y, their_dx) = gradients(ours, x), gradients(theirs, x)
    assert_close(y, their_y, rtol=EXACT[dtype], atol=EXACT[dtype])
    assert_close(dx, their_dx, rtol=EXACT[dtype], atol=EXACT[dtype])
    # a gradient of our weights is what theirs maps to, and so is a gradient of theirs: the map is linear up to the ones of the norms
    shift = {"norm.weight", "wide_norm.weight", "scale"}
    for p in theirs.parameters():
        p.data = p.grad if p.grad is not None else torch.zeros_like(p)
    for name, grad in WEIGHTS[kind](theirs).items():
        size = max(1.0, grad.detach().abs().max().item())
        assert_close(ours.get_parameter(name).grad / size, (grad - float(name in shift)) / size, rtol=0, atol=EXACT[dtype])


def test_what_their_eps_changes() -> None:
    theirs = their_block("m", exact=False)
    x = drawn(B, T, WIDTH, seed=8)
    assert 0 < (our_block("m", theirs)(x) - theirs(x)).abs().max().item() < 1e-3


def test_stack() -> None:
    theirs = xLSTMBlockStack(xLSTMBlockStackConfig(
        mlstm_block=mLSTMBlockConfig(mlstm=mLSTMLayerConfig(num_heads=HEADS, round_proj_up_to_multiple_of=8)), slstm_block=sLSTMBlockConfig(slstm=sLSTMLayerConfig(num_heads=HEADS, backend="vanilla", dtype="float32")),
        context_length=T, num_blocks=3, embedding_dim=WIDTH, slstm_at=[1, 2]))
    ours = XLSTMStack(WIDTH, HEADS, "mss")
    for index, block in enumerate(theirs.blocks):  # the starting values that are not drawn agree: forget gates by depth
        if index:
            assert_close(ours.blocks[index].cell.bias, slstm_weights(block)["cell.bias"])
    without_eps(theirs.blocks[0])
    shaken(theirs, torch.float64)
    state = {f"blocks.{i}.{name}": value for i, block in enumerate(theirs.blocks) for name, value in WEIGHTS["mss"[i]](block).items()}
    ours.double().load_state_dict({k: v.detach().clone() for k, v in state.items()} | {"norm.weight": 1 + theirs.post_blocks_norm.weight.detach()})
    x = drawn(B, T, WIDTH, seed=9)
    (y, dx), (their_y, their_dx) = gradients(ours, x), gradients(theirs, x)
    assert_close(y, their_y, rtol=0, atol=1e-10)
    assert_close(dx, their_dx, rtol=1e-9, atol=1e-9)
