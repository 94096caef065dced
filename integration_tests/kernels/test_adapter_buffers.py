"""Stacked A and block-diagonal sB: the values of torch's own copies."""

import pytest
import torch

from lorafuse.kernels import adapter_buffers
from lorafuse.kernels.runtime import interpreting, use_triton

RANKS = [(4,), (32, 32, 32), (3, 0, 5), (0, 7), (0, 0), (1, 70), (64, 16)]
ROWS = (40, 7, 130)


def function(name, out, given):
    """The kernel wherever it runs at all, also in the interpreter; else the public function."""
    runs = use_triton(out) and any(x is not None for x in given)
    return getattr(adapter_buffers, f"{name}_triton" if runs else name)


def check(out, want):
    if interpreting() and out.dtype == torch.bfloat16:  # the interpreter does not round to nearest
        torch.testing.assert_close(out, want)
    else:
        assert torch.equal(out, want)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("K", [16, 123, 2500])
def test_stack(randn, device, dtype, ranks, K):
    As = [randn(r, K) if r else None for r in ranks]
    width = sum(ranks) + 6
    out, want = (torch.full((width + 2, K + 3), 7.0, device=device, dtype=dtype) for _ in range(2))
    function("stack", out, As)(As, out[2:, :K])
    adapter_buffers.stack_reference(As, want[2:, :K])
    check(out, want)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("masters", [torch.float32, None])
def test_block_diagonal(randn, device, dtype, ranks, masters):
    rows = ROWS[: len(ranks)]
    Bs = [
        randn(n, r, dtype=masters or dtype) if r else None for n, r in zip(rows, ranks, strict=True)
    ]
    if Bs[-1] is not None:
        Bs[-1] = Bs[-1].t().contiguous().t()
    scales = [0.5, 1.3, 2.0][: len(ranks)]
    shape = sum(rows) + 1, sum(ranks) + 9
    out, want = (torch.full(shape, 7.0, device=device, dtype=dtype) for _ in range(2))
    function("block_diagonal", out, Bs)(Bs, rows, scales, out[1:, 5:])
    adapter_buffers.block_diagonal_reference(Bs, rows, scales, want[1:, 5:])
    check(out, want)
