"""Stacked A and block-diagonal B: the values of torch's own copies."""

import pytest
import torch

from lorafuse.kernels import adapter_buffers
from lorafuse.kernels.runtime import interpreting, use_triton

RANKS = [(4,), (32, 32, 32), (3, 0, 5), (0, 0), (1, 70)]
ROWS = (40, 7, 130)
SCALES = (0.5, 1.3, 2.0)


def write(As, Bs, rows, scales, scaled, A_out, B_out):
    """By the kernel wherever it runs at all, also in the interpreter; else the public function."""
    out = B_out if A_out is None else A_out
    runs = use_triton(out) and any(x is not None for x in As)
    function = adapter_buffers.write_adapters_triton if runs else adapter_buffers.write_adapters
    function(As, Bs, rows, scales, scaled, A_out, B_out)


def check(out, want):
    if interpreting() and out.dtype == torch.bfloat16:  # the interpreter does not round to nearest
        torch.testing.assert_close(out, want)
    else:
        assert torch.equal(out, want)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("masters", [torch.float32, None], ids=["fp32 masters", "same dtype"])
@pytest.mark.parametrize(
    ("K", "outs", "scaled"),
    [
        (16, "AB", "A"),
        (123, "AB", "B"),
        (2500, "A", None),
        (16, "B", None),
    ],
)
def test_what_is_written(randn, device, dtype, ranks, masters, K, outs, scaled):
    rows, scales = ROWS[: len(ranks)], SCALES[: len(ranks)]
    As = [randn(r, K, dtype=masters or dtype) if r else None for r in ranks]
    Bs = [
        randn(n, r, dtype=masters or dtype) if r else None for n, r in zip(rows, ranks, strict=True)
    ]
    if Bs[-1] is not None:
        Bs[-1] = Bs[-1].t().contiguous().t()
    width = sum(ranks) + 6
    found, want = (
        {
            "A": torch.full((width + 2, K + 3), 7.0, device=device, dtype=dtype),
            "B": torch.full((sum(rows) + 1, width + 5), 7.0, device=device, dtype=dtype),
        }
        for _ in range(2)
    )
    for function, buffers in ((write, found), (adapter_buffers.reference, want)):
        A_out = buffers["A"][2:, :K] if "A" in outs else None
        B_out = buffers["B"][1:, 5:] if "B" in outs else None
        function(As, Bs, rows, scales, scaled, A_out, B_out)
    for name, buffer in found.items():
        check(buffer, want[name])


def test_the_definition_by_hand():
    A, B = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0]])
    A_out, B_out = torch.full((2, 2), 9.0), torch.full((3, 2), 9.0)
    adapter_buffers.write_adapters([None, A], [None, B], [1, 2], [5.0, 2.0], "A", A_out, B_out)
    assert A_out.tolist() == [[2.0, 4.0], [0.0, 0.0]]
    assert B_out.tolist() == [[0.0, 0.0], [3.0, 0.0], [4.0, 0.0]]
    adapter_buffers.write_adapters([None, A], [None, B], [1, 2], [5.0, 2.0], "B", A_out, B_out)
    assert A_out.tolist() == [[1.0, 2.0], [0.0, 0.0]]
    assert B_out.tolist() == [[0.0, 0.0], [6.0, 0.0], [8.0, 0.0]]
