r"""The r-wide right columns and lower rows of the folded weights, in one launch.

    stacked A           [s_1 A_1; s_2 A_2; s_3 A_3; 0]            [F, K]
    block-diagonal B    diag(s_1 B_1, s_2 B_2, s_3 B_3), 0        [N, F]

A_i [R_i, K], B_i [N_i, R_i]; F is at least the sum of the R_i. The scales are put on one of the two
or on none, as the caller's product needs them. The masters' dtype (often fp32) is rounded once, to
the buffer's. Written out with torch's copies it is eight launches a group, and with four groups of
two passes a layer these, not their bytes, are what the GPU waits for.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lorafuse.kernels.runtime import (
    cached_launch,
    cdiv,
    launch_device,
    next_power_of_2,
    tl,
    triton,
    use_triton,
)

__all__ = ["Scaled", "reference", "write_adapters", "write_adapters_triton"]

# The matrix that the scales are put on.
Scaled = Literal["A", "B", None]

_BLOCK_K = 1024
_TILE = 2048


def reference(
    As: Sequence[Tensor | None],
    Bs: Sequence[Tensor | None],
    rows: Sequence[int],
    scales: Sequence[float],
    scaled: Scaled,
    A_out: Tensor | None,
    B_out: Tensor | None,
) -> None:
    """The definition of `write_adapters`."""
    if A_out is not None:
        row = 0
        for A, scale in zip(As, scales, strict=True):
            if A is not None:
                part = A_out[row : row + A.shape[0]]
                if scaled == "A" and scale != 1.0:
                    torch.mul(A, scale, out=part)
                else:
                    part.copy_(A)
                row += A.shape[0]
        A_out[row:].zero_()
    if B_out is not None:
        B_out.zero_()
        row = column = 0
        for B, n, scale in zip(Bs, rows, scales, strict=True):
            if B is not None:
                part = B_out[row : row + n, column : column + B.shape[1]]
                torch.mul(B, scale if scaled == "B" else 1.0, out=part)
                column += B.shape[1]
            row += n


@triton.jit
def _load_stacked(A_ptr, row, o_k, first, K, scale, R: tl.constexpr):
    o_r = row - first + tl.zeros_like(o_k)
    mask = (o_r >= 0) & (o_r < R) & (o_k < K)
    return tl.load(A_ptr + o_r.to(tl.int64) * K + o_k, mask, 0.0).to(tl.float32) * scale


@triton.jit
def _load_block(B_ptr, o_n, o_f, first_row, rows, first, scale, R: tl.constexpr):
    n, r = o_n - first_row, o_f - first
    mask = (n >= 0) & (n < rows) & (r >= 0) & (r < R)
    return tl.load(B_ptr + n * R + r, mask, 0.0).to(tl.float32) * scale


@cached_launch
@triton.jit
def _adapters_kernel(
    A1, A2, A3, B1, B2, B3, A_out, B_out, A_row, B_row, K, A_programs, A_blocks,
    N1, N2, N3, sA1, sA2, sA3, sB1, sB2, sB3,
    R1: tl.constexpr, R2: tl.constexpr, R3: tl.constexpr,
    F: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """The first programs: BLOCK_K columns of one row of A's; the others: BLOCK_N rows of B's."""
    program = tl.program_id(0)
    if program < A_programs:
        row = program // A_blocks
        o_k = program % A_blocks * BLOCK_K + tl.arange(0, BLOCK_K)
        a = tl.zeros([BLOCK_K], tl.float32)
        if R1 > 0:
            a += _load_stacked(A1, row, o_k, 0, K, sA1, R1)
        if R2 > 0:
            a += _load_stacked(A2, row, o_k, R1, K, sA2, R2)
        if R3 > 0:
            a += _load_stacked(A3, row, o_k, R1 + R2, K, sA3, R3)
        tl.store(A_out + row.to(tl.int64) * A_row + o_k, a.to(A_out.dtype.element_ty), o_k < K)
    else:
        first = (program - A_programs) * BLOCK_N
        o_n = (first + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
        o_f = tl.arange(0, BLOCK_F)[None, :]
        b = tl.zeros([BLOCK_N, BLOCK_F], tl.float32)
        if R1 > 0:
            b += _load_block(B1, o_n, o_f, 0, N1, 0, sB1, R1)
        if R2 > 0:
            b += _load_block(B2, o_n, o_f, N1, N2, R1, sB2, R2)
        if R3 > 0:
            b += _load_block(B3, o_n, o_f, N1 + N2, N3, R1 + R2, sB3, R3)
        mask = (o_n < N1 + N2 + N3) & (o_f < F)
        tl.store(B_out + o_n * B_row + o_f, b.to(B_out.dtype.element_ty), mask)


def write_adapters(
    As: Sequence[Tensor | None],  # one to three of [R_i, K]
    Bs: Sequence[Tensor | None],  # of [N_i, R_i], given where A_i is
    rows: Sequence[int],  # N_i, also of those that are None
    scales: Sequence[float],
    scaled: Scaled,
    A_out: Tensor | None,  # [>= R, K], any row stride
    B_out: Tensor | None,  # [N, F >= R], any row stride
) -> None:
    """Writes [A_1; A_2; ...; 0] into `A_out` and diag(B_1, B_2, ...), 0 into `B_out`.

    Either may be None. The scales are multiplied to what `scaled` names.
    """
    outs = [out for out in (A_out, B_out) if out is not None]
    # Not in the interpreter, where these copies would take most of a test's time.
    if outs and any(A is not None for A in As) and all(x.is_cuda and use_triton(x) for x in outs):
        write_adapters_triton(As, Bs, rows, scales, scaled, A_out, B_out)
    else:
        reference(As, Bs, rows, scales, scaled, A_out, B_out)


def write_adapters_triton(
    As: Sequence[Tensor | None],
    Bs: Sequence[Tensor | None],
    rows: Sequence[int],
    scales: Sequence[float],
    scaled: Scaled,
    A_out: Tensor | None,
    B_out: Tensor | None,
) -> None:
    """`write_adapters` in one launch; at least one A with its B, and one of the outs is given."""
    anything = B_out if A_out is None else A_out
    assert anything is not None
    missing = 3 - len(rows)
    a = [anything if A is None else A.contiguous() for A in As] + [anything] * missing
    b = [anything if B is None else B.contiguous() for B in Bs] + [anything] * missing
    ranks = [0 if A is None else A.shape[0] for A in As] + [0] * missing
    factors = [float(s) for s in scales] + [1.0] * missing
    ones = [1.0] * 3
    block_k = block_n = block_f = 1
    K = A_row = A_blocks = A_programs = F = B_row = B_programs = 0
    if A_out is not None:
        height, K = A_out.shape
        A_row = A_out.stride(0)
        block_k = min(_BLOCK_K, next_power_of_2(K))
        A_blocks = cdiv(K, block_k)
        A_programs = height * A_blocks
    if B_out is not None:
        N, F = B_out.shape
        B_row = B_out.stride(0)
        block_f = next_power_of_2(F)
        block_n = max(1, _TILE // block_f)
        B_programs = cdiv(N, block_n)
    with launch_device(anything):
        _adapters_kernel[(A_programs + B_programs,)](
            *a, *b, anything if A_out is None else A_out, anything if B_out is None else B_out,
            A_row, B_row, K, A_programs, max(1, A_blocks), *rows, *[0] * missing,
            *(factors if scaled == "A" else ones), *(factors if scaled == "B" else ones),
            R1=ranks[0], R2=ranks[1], R3=ranks[2],
            F=F, BLOCK_K=block_k, BLOCK_N=block_n, BLOCK_F=block_f,
        )  # fmt: skip
