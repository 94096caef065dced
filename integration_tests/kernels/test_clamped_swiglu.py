"""The clamped SwiGLU against autograd through plain torch: at its limits, in either layout."""

import math

import pytest
import torch

from lorafuse.kernels import runtime
from lorafuse.kernels.clamped_swiglu import (
    ClampedSwiglu,
    clamped_swiglu_bwd_,
    clamped_swiglu_fwd,
    reference,
)
from lorafuse.kernels.expert_order import sort_by_expert

GPT_OSS = ClampedSwiglu(1.702, 7.0, 1.0, interleaved=True)
ACTIVATIONS = {
    "gpt-oss": GPT_OSS,
    "in halves": ClampedSwiglu(1.702, 7.0, 1.0),
    "low limit": ClampedSwiglu(1.2, 0.5, 1.0, interleaved=True),
    "silu, clamped": ClampedSwiglu(limit=2.0),
    "silu, alternating": ClampedSwiglu(interleaved=True),
}
TOKENS, K, E = 13, 2, 4


def route(device):
    """The last expert gets no token."""
    return sort_by_expert(torch.rand(TOKENS, E - 1).topk(K, dim=1).indices.to(device), E)


def z_of(gu, bias, rows):
    """Gate and up with the bias, rounded as stock's sum is."""
    return gu if bias is None else (gu + bias[rows.index[rows.order.long()]].to(gu.dtype))


def run(gu, bias, D, weights, rows, f):
    """m, dw', m once more and dgu."""
    width = gu.shape[1] // 2
    wide = gu.new_zeros(gu.shape[0], width + 3)
    clamped_swiglu_fwd(gu, bias, rows, f, wide[:, :width])
    assert not wide[:, width:].any()
    D, dgu = D.clone(), torch.zeros_like(gu)
    dw = clamped_swiglu_bwd_(gu, bias, D, weights, rows, f, dgu)
    return wide[:, :width], dw, D, dgu


def by_autograd(gu, bias, D, weights, rows, f):
    gu = gu.detach().requires_grad_()
    m = reference(z_of(gu, bias, rows), f)
    w = weights.flatten()[rows.order.long()].unsqueeze(1)
    (dgu,) = torch.autograd.grad(m, gu, (D * w).to(m.dtype))
    dw = (D * m.detach()).sum(1)[rows.place.long()].view(-1, rows.k)
    return m.detach(), dw, m.detach(), dgu


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("width", [1, 40, 130])
@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_forward_and_backward(randn, dtype, device, name, width, biased) -> None:
    f, rows, S = ACTIVATIONS[name], route(device), TOKENS * K
    gu = (5 * randn(S, 2 * width + 3)).to(dtype)[:, 3:]
    bias = randn(E, 2 * width, dtype=dtype) if biased else None
    D, w = randn(S, width, dtype=dtype), randn(TOKENS, K, dtype=dtype)
    wide = [None if t is None else t.double() for t in (gu, bias, D, w)]
    for what, ours, stock, exact in zip(
        ("m", "dw", "m again", "dgu"),
        run(gu, bias, D, w, rows, f),
        by_autograd(gu, bias, D, w, rows, f),
        by_autograd(*wide, rows, f),
        strict=True,
    ):
        # Triton's interpreter truncates where a GPU rounds, and a step of z over the limit decides
        # about a gradient: both as often as in stock.
        truncates = dtype == torch.bfloat16 and runtime.interpreting()
        allowed = 2 * (stock - exact).norm() * (3 if truncates else 1)
        error, eps = (ours - exact).norm(), torch.finfo(dtype).eps
        assert error <= allowed + 2 * eps * exact.norm(), (what, float(error), float(allowed))


@pytest.mark.parametrize("name", ["gpt-oss", "in halves", "low limit", "silu, clamped"])
def test_gradients_pass_at_the_limits_and_not_beyond(device, dtype, name) -> None:
    """As torch's clamp has it; a bias takes some of them there."""
    f = ACTIVATIONS[name]
    L, step = f.limit, f.limit / 64  # a step that bf16 has
    values = torch.tensor([L, L + step, L - step, -L, -L - step, -L + step, 0.0])
    gate, up = torch.meshgrid(values, values, indexing="ij")
    z = torch.cat([gate, up]).view(2, -1)
    z = z.t().reshape(1, -1) if f.interleaved else z.view(1, -1)
    z = z.to(device, dtype)
    rows = sort_by_expert(torch.zeros(1, 1, dtype=torch.long, device=device), 1)
    bias = torch.full_like(z, step)
    ones = torch.ones(1, z.shape[1] // 2, dtype=dtype, device=device)
    given = z - bias, bias, ones, torch.ones(1, 1, device=device), rows, f
    assert torch.equal(given[0] + bias, z)
    dgate, dup = f.split(run(*given)[3].double())
    wanted = [t.double() for t in f.split(by_autograd(*given)[3])]
    limit = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(dgate, wanted[0], rtol=limit, atol=limit)
    torch.testing.assert_close(dup, wanted[1], rtol=limit, atol=limit)
    gate, up = (t.double() for t in f.split(z))
    assert torch.equal(dgate != 0, (gate <= L) & (up.clamp(-L, L) + f.offset != 0))
    assert torch.equal(dup != 0, (up.abs() <= L) & (gate != 0))
    assert (gate == L).any() and (up == L).any() and (up == -L).any()


@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_the_16_bit_forward_has_stocks_bits(randn, device, name) -> None:
    """Each rounding of stock's is made: what is left out adds up over a model's layers."""
    if runtime.interpreting():
        pytest.skip("the interpreter truncates")
    f, rows = ACTIVATIONS[name], route(device)
    gu, bias = (4 * randn(TOKENS * K, 256)).bfloat16(), randn(E, 256).bfloat16()
    m = gu.new_empty(TOKENS * K, 128)
    clamped_swiglu_fwd(gu, bias, rows, f, m)
    different = m != reference(z_of(gu, bias, rows), f)
    assert different.float().mean() < 0.01  # a GPU's exp is not the last bit's


def test_rows_of_no_expert_read_no_bias(randn, device) -> None:
    """Slots of other ranks sort to the end; their gradient of the weight is 0."""
    index = torch.tensor([[0, 4], [9, 1]], device=device)
    rows = sort_by_expert(index, 4)
    gu, bias, D, w = randn(4, 12), randn(4, 12), randn(4, 6), randn(2, 2)
    _, dw, _, _ = run(gu, bias, D, w, rows, GPT_OSS)
    assert torch.equal(dw == 0, index >= 4)


def test_large_and_infinite_gates(device) -> None:
    """No NaN where stock has none."""
    gate = torch.tensor([[1e30, -1e30, math.inf, -200.0, 88.0]], device=device)
    z = torch.stack([gate, gate.flip(1)], 2).flatten(1)
    rows = sort_by_expert(torch.zeros(1, 1, dtype=torch.long, device=device), 1)
    given = z, None, torch.ones_like(gate), torch.ones(1, 1, device=device), rows, GPT_OSS
    for ours, wanted in zip(run(*given), by_autograd(*given), strict=True):
        torch.testing.assert_close(ours, wanted)


def test_sizes_that_do_not_fit_are_named(randn, device) -> None:
    rows, S = route(device), TOKENS * K
    m = randn(S, 6)
    with pytest.raises(ValueError, match="expected gate and up"):
        clamped_swiglu_fwd(randn(S, 13), None, rows, GPT_OSS, m)
    with pytest.raises(ValueError, match="contiguous rows of 6 or 12"):
        clamped_swiglu_fwd(randn(S, 12), None, rows, GPT_OSS, randn(S, 7))
    with pytest.raises(ValueError, match=r"contiguous bias \[4, 12\]"):
        clamped_swiglu_fwd(randn(S, 12), randn(4, 6), rows, GPT_OSS, m)
    with pytest.raises(ValueError, match="contiguous weights"):
        clamped_swiglu_bwd_(randn(S, 12), None, m, randn(TOKENS, 3), rows, GPT_OSS, randn(S, 12))
