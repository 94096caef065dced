r"""The r-wide right columns and lower rows of the folded weights, one launch each.

    stack           [A_1; A_2; A_3; 0]                    [F, K]
    block_diagonal  diag(s_1 B_1, s_2 B_2, s_3 B_3), 0    [N, F]

A_i [R_i, K], B_i [N_i, R_i]; F is at least the sum of the R_i. The masters' dtype (often fp32) is
rounded once, to the buffer's. Written out with torch's copies it is four launches a group, and with
three groups of two passes a layer these, not their bytes, are what the GPU waits for.
"""

from collections.abc import Sequence

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

__all__ = ["block_diagonal", "block_diagonal_reference", "stack", "stack_reference"]

_BLOCK_K = 1024
_TILE = 2048


def stack_reference(As: Sequence[Tensor | None], out: Tensor) -> None:
    """The definition of `stack`."""
    row = 0
    for A in As:
        if A is not None:
            out[row : row + A.shape[0]].copy_(A)
            row += A.shape[0]
    out[row:].zero_()


def block_diagonal_reference(
    Bs: Sequence[Tensor | None], rows: Sequence[int], scales: Sequence[float], out: Tensor
) -> None:
    """The definition of `block_diagonal`."""
    out.zero_()
    row = column = 0
    for B, n, scale in zip(Bs, rows, scales, strict=True):
        if B is not None:
            torch.mul(B, scale, out=out[row : row + n, column : column + B.shape[1]])
            column += B.shape[1]
        row += n


@triton.jit
def _load_stacked(A_ptr, row, o_k, first, K, R: tl.constexpr):
    o_r = row - first + tl.zeros_like(o_k)
    mask = (o_r >= 0) & (o_r < R) & (o_k < K)
    return tl.load(A_ptr + o_r.to(tl.int64) * K + o_k, mask, 0.0).to(tl.float32)


@cached_launch
@triton.jit
def _stack_kernel(
    A1, A2, A3, out, out_row, K,
    R1: tl.constexpr, R2: tl.constexpr, R3: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_K columns of one row."""
    row = tl.program_id(0)
    o_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    a = _load_stacked(A1, row, o_k, 0, K, R1)
    if R2 > 0:
        a += _load_stacked(A2, row, o_k, R1, K, R2)
    if R3 > 0:
        a += _load_stacked(A3, row, o_k, R1 + R2, K, R3)
    tl.store(out + row.to(tl.int64) * out_row + o_k, a.to(out.dtype.element_ty), o_k < K)


@triton.jit
def _load_block(B_ptr, o_n, o_f, first_row, rows, first, scale, R: tl.constexpr):
    n, r = o_n - first_row, o_f - first
    mask = (n >= 0) & (n < rows) & (r >= 0) & (r < R)
    return tl.load(B_ptr + n * R + r, mask, 0.0).to(tl.float32) * scale


@cached_launch
@triton.jit
def _block_diagonal_kernel(
    B1, B2, B3, out, out_row, N1, N2, N3, s1, s2, s3,
    R1: tl.constexpr, R2: tl.constexpr, R3: tl.constexpr,
    F: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """BLOCK_N rows, all F columns."""
    o_n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
    o_f = tl.arange(0, BLOCK_F)[None, :]
    b = tl.zeros([BLOCK_N, BLOCK_F], tl.float32)
    if R1 > 0:
        b += _load_block(B1, o_n, o_f, 0, N1, 0, s1, R1)
    if R2 > 0:
        b += _load_block(B2, o_n, o_f, N1, N2, R1, s2, R2)
    if R3 > 0:
        b += _load_block(B3, o_n, o_f, N1 + N2, N3, R1 + R2, s3, R3)
    mask = (o_n < N1 + N2 + N3) & (o_f < F)
    tl.store(out + o_n * out_row + o_f, b.to(out.dtype.element_ty), mask)


def _on_gpu(given: Sequence[Tensor | None], out: Tensor) -> bool:
    # Not in the interpreter, where these copies would take most of a test's time.
    tensors = [x for x in given if x is not None]
    return bool(tensors) and all(x.is_cuda and use_triton(x) for x in (*tensors, out))


def stack(
    As: Sequence[Tensor | None],  # one to three of [R_i, K]
    out: Tensor,  # [F, K], any row stride
) -> None:
    """Writes [A_1; A_2; ...; 0] into `out`."""
    if _on_gpu(As, out):
        stack_triton(As, out)
    else:
        stack_reference(As, out)


def stack_triton(As: Sequence[Tensor | None], out: Tensor) -> None:
    """`stack` in one launch; at least one A is given."""
    given = [A.contiguous() for A in As if A is not None]
    F, K = out.shape
    ranks = [A.shape[0] for A in given] + [0] * (3 - len(given))
    given += [given[0]] * (3 - len(given))
    block = min(_BLOCK_K, next_power_of_2(K))
    with launch_device(out):
        _stack_kernel[(F, cdiv(K, block))](
            *given, out, out.stride(0), K, R1=ranks[0], R2=ranks[1], R3=ranks[2], BLOCK_K=block,
        )  # fmt: skip


def block_diagonal(
    Bs: Sequence[Tensor | None],  # one to three of [N_i, R_i]
    rows: Sequence[int],  # N_i, also of those that are None
    scales: Sequence[float],
    out: Tensor,  # [N, F], any row stride
) -> None:
    """Writes diag(s_1 B_1, s_2 B_2, ...) into `out`, zeros beside it."""
    if _on_gpu(Bs, out):
        block_diagonal_triton(Bs, rows, scales, out)
    else:
        block_diagonal_reference(Bs, rows, scales, out)


def block_diagonal_triton(
    Bs: Sequence[Tensor | None], rows: Sequence[int], scales: Sequence[float], out: Tensor
) -> None:
    """`block_diagonal` in one launch; at least one B is given."""
    N, F = out.shape
    missing = 3 - len(Bs)
    blocks = [out if B is None else B.contiguous() for B in Bs] + [out] * missing
    ranks = [0 if B is None else B.shape[1] for B in Bs] + [0] * missing
    BLOCK_F = next_power_of_2(F)
    BLOCK_N = max(1, _TILE // BLOCK_F)
    with launch_device(out):
        _block_diagonal_kernel[(cdiv(N, BLOCK_N),)](
            *blocks, out, out.stride(0), *rows, *[0] * missing,
            *(float(s) for s in scales), *[0.0] * missing,
            R1=ranks[0], R2=ranks[1], R3=ranks[2], F=F, BLOCK_N=BLOCK_N, BLOCK_F=BLOCK_F,
        )  # fmt: skip
