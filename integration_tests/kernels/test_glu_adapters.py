"""The GLU's backward with the adapter gradients taken on the way, against fp64."""

import pytest
import torch

from lorafuse.kernels import glu_adapters
from lorafuse.kernels.glu import glu_bwd_
from lorafuse.kernels.glu_adapters import glu_bwd_adapters_, reference


def make(randn, dtype, T, width, ranks):
    """gate and up as halves of one buffer, dm, and the r-wide factors, strided as in `lora_mlp`."""
    gu = randn(T, 2 * width + 8, dtype=dtype)
    dm = randn(T, width, dtype=dtype)
    G = randn(T, ranks[0] + 5, dtype=dtype)[:, 5:] if ranks[0] else None
    xA = randn(T, ranks[1] + ranks[2] + 3, dtype=dtype)
    gate = xA[:, : ranks[1]] if ranks[1] else None
    up = xA[:, ranks[1] : ranks[1] + ranks[2]] if ranks[2] else None
    return gu, dm, G, gate, up


def run(function, gu, dm, width, activation, *factors):
    gu, dm = gu.clone(), dm.clone()
    out = function(gu[:, :width], gu[:, width : 2 * width], dm, activation, *factors)
    return gu, [out.dA_down, out.dB_gate, out.dB_up]


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize(
    "T, width, ranks",
    [(1, 40, (4, 3, 5)), (130, 72, (32, 16, 8)), (200, 129, (64, 1, 33)), (3000, 64, (8, 8, 8))],
)
def test_against_fp64(randn, dtype, activation, T, width, ranks):
    gu, dm, *factors = make(randn, dtype, T, width, ranks)
    wide = [x.double() for x in (gu, dm, *factors)]
    _, exact = run(reference, *wide[:2], width, activation, *wide[2:])
    stock_gu, stock = run(reference, gu, dm, width, activation, *factors)
    got_gu, got = run(glu_bwd_adapters_, gu, dm, width, activation, *factors)
    assert torch.equal(got_gu[:, 2 * width :], gu[:, 2 * width :]), "wrote past up"
    # the same formulas and roundings; the compiler may contract products and sums
    torch.testing.assert_close(got_gu, stock_gu)
    for mine, theirs, truth in zip(got, stock, exact, strict=True):
        assert mine.dtype == torch.float32 and mine.shape == truth.shape
        error, allowed = (mine - truth).norm(), 2 * (theirs - truth).norm()
        assert error <= allowed + 1e-6 * truth.norm()


@pytest.mark.parametrize("ranks", [(4, 0, 0), (0, 4, 0), (0, 0, 4), (0, 0, 0), (70, 4, 4)])
def test_any_subset_and_ranks_beyond_the_kernel(randn, ranks):
    gu, dm, *factors = make(randn, torch.bfloat16, 40, 24, ranks)
    want_gu, want = run(reference, gu, dm, 24, "silu", *factors)
    got_gu, got = run(glu_bwd_adapters_, gu, dm, 24, "silu", *factors)
    torch.testing.assert_close(got_gu, want_gu)
    for mine, theirs, factor in zip(got, want, factors, strict=True):
        assert (mine is None) == (factor is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_runs_repeat_bit_for_bit(randn):
    gu, dm, *factors = make(randn, torch.bfloat16, 500, 96, (8, 8, 8))
    first, second = (run(glu_bwd_adapters_, gu, dm, 96, "silu", *factors) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


def test_a_factor_of_other_rows_is_refused(randn):
    gu, dm = randn(6, 16), randn(6, 8)
    with pytest.raises(ValueError, match=r"expected \[6, R\]"):
        glu_bwd_adapters_(gu[:, :8], gu[:, 8:], dm, "silu", randn(5, 2), None, None)


@pytest.mark.gpu
def test_large(cuda, randn):
    """A real MLP's size: the same gradients as the separate passes, element for element."""
    T, width = 8192, 14336
    gu = torch.randn(T, 2 * width + 64, device=cuda, dtype=torch.bfloat16)
    dm = torch.randn(T, width, device=cuda, dtype=torch.bfloat16)
    G, gate, up = (torch.randn(T, 32, device=cuda, dtype=torch.bfloat16) for _ in range(3))
    twin, m = gu.clone(), dm.clone()
    glu_bwd_(twin[:, :width], twin[:, width : 2 * width], m, "silu")
    got_gu, got = run(glu_bwd_adapters_, gu, dm, width, "silu", G, gate, up)
    assert glu_adapters._serves(gu[:, :width], (G, gate, up))
    torch.testing.assert_close(got_gu, twin)
    want = G.t().double() @ m.double()
    assert (got[0] - want).norm() <= 1e-3 * want.norm()
    want = twin[:, :width].t().double() @ gate.double()
    assert (got[1] - want).norm() <= 1e-3 * want.norm()
