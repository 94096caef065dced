r"""One linear map an expert, on rows that are sorted by expert; and the products of its gradients.

    grouped_linear   Y[i] = W_e X[i] + V_e U[i]     W [E, N, K], V [E, N, R], e: row i's expert
    grouped_outer    O[e] = sum over e's rows of P[i]^T Q[i]     [E, R, K], fp32

X [S, K], U [S, R], P [S, R], Q [S, K]; rows of expert e end at ends[e] (`expert_order`). V and U
are LoRA's narrow factors: the second product is added in the accumulator of the first. X (and Q)
may be read through an index of rows, so that tokens need not be copied for each of their experts.
Rows past the last end are not computed; what is in them is undefined.

`ends` stays on the device. The grid is an upper bound of the tiles, S / BLOCK_M + E; a program
finds its expert from the running sum of the experts' tiles. grouped_outer walks an expert's rows in
one program for each block of columns: fp32 sums in a fixed order, runs repeat bit for bit.

Two ways to the large product, chosen in `uses_grouped_mm` alone: CUTLASS through
`torch.nn.functional.grouped_mm` (bf16, Hopper and newer), which wants the rows gathered and knows
no second product (where LoRA is not folded into K, the kernel here adds it), or the kernel here.
"""

from typing import Literal

import torch
from torch import Tensor

from lorafuse.kernels.expert_order import ExpertOrder, gather
from lorafuse.kernels.runtime import (
    cached_launch,
    cdiv,
    interpreting,
    launch_device,
    next_power_of_2,
    tl,
    triton,
    use_triton,
)

__all__ = [
    "grouped_linear",
    "grouped_linear_reference",
    "grouped_outer",
    "grouped_outer_reference",
    "uses_grouped_mm",
]

# What computes the large products where both can. gpu/moe_step_times.py times either.
BASE: Literal["grouped_mm", "triton"] = "grouped_mm"

# BLOCK_M, BLOCK_N, BLOCK_K, warps, stages. Of wide 16-bit products, of narrow ones (N up to 64: a
# rank), and in fp32, which is there for the proofs, and goes through no tensor cores.
WIDE = (128, 256, 64, 8, 3)
NARROW = (128, 64, 64, 4, 4)
FULL = (64, 64, 32, 4, 2)
_INTERPRETED = (16, 16, 16, 4, 1)
# Tiles of rows that are taken together, before the next tile of columns: they share W in the L2.
_GROUP = 8
# Of `grouped_outer`: rows a step, columns, ranks at most.
_OUTER = (64, 128, 64)


def grouped_linear_reference(
    x: Tensor, w: Tensor, rows: ExpertOrder, u: Tensor | None = None, v: Tensor | None = None
) -> Tensor:
    """The definition, expert by expert; x [S, K]. Rows past the last end are zero."""
    y = x.new_zeros((x.shape[0], w.shape[1]))
    for e, (start, end) in enumerate(rows.spans()):
        if start < end:
            here = slice(start, end)
            y[here] = x[here] @ w[e].t()
            if u is not None and v is not None:
                y[here] += u[here] @ v[e].t()
    return y


def grouped_outer_reference(p: Tensor, q: Tensor, rows: ExpertOrder) -> Tensor:
    """The definition; q [S, K]. In fp32, or fp64 for fp64."""
    wide = torch.float64 if p.dtype == torch.float64 else torch.float32
    out = p.new_zeros((rows.ends.shape[0], p.shape[1], q.shape[1]), dtype=wide)
    for e, (start, end) in enumerate(rows.spans()):
        if start < end:
            torch.mm(p[start:end].t().to(wide), q[start:end].to(wide), out=out[e])
    return out


@triton.jit
def _expert_of(tile, ends_ptr, E, EP: tl.constexpr, BLOCK_M: tl.constexpr):
    """(expert of this tile of rows, tiles before that expert's); expert >= E for no tile at all."""
    o_e = tl.arange(0, EP)
    ends = tl.load(ends_ptr + o_e, o_e < E, 0)
    starts = tl.load(ends_ptr + o_e - 1, (o_e > 0) & (o_e < E), 0)
    tiles = (ends - starts + BLOCK_M - 1) // BLOCK_M
    upto = tl.cumsum(tiles, 0)
    expert = tl.sum((upto <= tile).to(tl.int32), 0)
    before = tl.sum(tl.where(o_e < expert, tiles, 0), 0)
    return expert, before


@triton.jit
def _add_product(
    total, a_ptr, b_ptr, rows, o_n, m_m, m_n, a_row, b_n, b_k,
    K: tl.constexpr, BLOCK_K: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """total + A[rows] B^T, over K columns of either."""
    o_k = tl.arange(0, BLOCK_K)
    a_at = a_ptr + rows[:, None] * a_row + o_k[None, :]
    b_at = b_ptr + o_n[None, :] * b_n + o_k[:, None] * b_k
    for k in range(0, K, BLOCK_K):
        if K % BLOCK_K == 0:
            a = tl.load(a_at, m_m[:, None], 0.0)
            b = tl.load(b_at, m_n[None, :], 0.0)
        else:
            a = tl.load(a_at, m_m[:, None] & (o_k[None, :] < K - k), 0.0)
            b = tl.load(b_at, m_n[None, :] & (o_k[:, None] < K - k), 0.0)
        if INTERPRETED:  # Triton's interpreter multiplies bf16 by its bits
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision="ieee")
        a_at += BLOCK_K
        b_at += BLOCK_K * b_k
    return total


@cached_launch
@triton.jit
def _grouped_linear_kernel(
    x_ptr, w_ptr, u_ptr, v_ptr, order_ptr, ends_ptr, out_ptr, E, row_tiles, columns,
    x_row, w_e, w_n, w_k, u_row, v_e, v_n, v_r, out_row,
    N: tl.constexpr, K: tl.constexpr, R: tl.constexpr, EP: tl.constexpr, TOP: tl.constexpr,
    ADD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr, GROUP: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A [BLOCK_M, BLOCK_N] tile of one expert; TOP > 0: X by token; ADD: to what is in out."""
    pid = tl.program_id(0)
    first = pid // (GROUP * columns) * GROUP
    size = tl.minimum(row_tiles - first, GROUP)
    tile = first + pid % (GROUP * columns) % size
    column = pid % (GROUP * columns) // size
    expert, before = _expert_of(tile, ends_ptr, E, EP, BLOCK_M)
    if expert < E:
        start = tl.load(ends_ptr + expert - 1, expert > 0, 0)
        o_m = start + (tile - before) * BLOCK_M + tl.arange(0, BLOCK_M)
        m_m = o_m < tl.load(ends_ptr + expert)
        o_n = (column * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
        m_n = o_n < N
        e = expert.to(tl.int64)
        if TOP > 0:
            rows = (tl.load(order_ptr + o_m, m_m, 0) // TOP).to(tl.int64)
        else:
            rows = o_m.to(tl.int64)
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if K > 0:
            total = _add_product(
                total, x_ptr, w_ptr + e * w_e, rows, o_n, m_m, m_n, x_row, w_n, w_k,
                K, BLOCK_K, INTERPRETED,
            )  # fmt: skip
        if R > 0:
            total = _add_product(
                total, u_ptr, v_ptr + e * v_e, o_m.to(tl.int64), o_n, m_m, m_n, u_row, v_n, v_r,
                R, BLOCK_R, INTERPRETED,
            )  # fmt: skip
        at = out_ptr + o_m.to(tl.int64)[:, None] * out_row + o_n[None, :]
        mask = m_m[:, None] & m_n[None, :]
        if ADD:
            total += tl.load(at, mask, 0.0).to(tl.float32)
        tl.store(at, total.to(out_ptr.dtype.element_ty), mask)


@cached_launch
@triton.jit
def _grouped_outer_kernel(
    p_ptr, q_ptr, order_ptr, ends_ptr, out_ptr, p_row, q_row,
    R: tl.constexpr, K: tl.constexpr, TOP: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """[BLOCK_R, BLOCK_K] of one expert's sum; TOP > 0: Q by token."""
    expert = tl.program_id(1)
    o_k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    o_r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_k, m_r = o_k < K, o_r < R
    start = tl.load(ends_ptr + expert - 1, expert > 0, 0)
    end = tl.load(ends_ptr + expert)
    total = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    for row in range(start, end, BLOCK_S):
        o_s = row + tl.arange(0, BLOCK_S)
        m_s = o_s < end
        if TOP > 0:
            q_rows = (tl.load(order_ptr + o_s, m_s, 0) // TOP).to(tl.int64)
        else:
            q_rows = o_s.to(tl.int64)
        p_at = p_ptr + o_s.to(tl.int64)[:, None] * p_row + o_r[None, :]
        p = tl.load(p_at, m_s[:, None] & m_r[None, :], 0.0)
        q_at = q_ptr + q_rows[:, None] * q_row + o_k[None, :]
        q = tl.load(q_at, m_s[:, None] & m_k[None, :], 0.0)
        if INTERPRETED:
            p, q = p.to(tl.float32), q.to(tl.float32)
        total = tl.dot(tl.trans(p), q, total, input_precision="ieee")
    # Also the rows past R: with a mask of one row, Triton 3.6 wrote wrong sums (`glu_adapters`).
    PR: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R * BLOCK_R
    at = out_ptr + (expert.to(tl.int64) * PR + o_r[:, None]) * K + o_k[None, :]
    tl.store(at, total, m_k[None, :])


def uses_grouped_mm(x: Tensor, n: int, k: int) -> bool:
    """Whether grouped_mm computes products of `x`'s dtype with [E, n, k] on `x`'s device.

    Its kernels are CUTLASS's from Hopper on; below, torch loops over experts on the host. It wants
    16-byte rows. Narrow products (a rank wide) are for the kernel here: it reads X once.
    """
    return (
        BASE == "grouped_mm"
        and x.is_cuda
        and x.dtype == torch.bfloat16
        and n % 8 == 0
        and k % 8 == 0
        and min(n, k) > 128
        and _has_grouped_mm(x.device)
    )


def _has_grouped_mm(device: torch.device) -> bool:
    known = _capable.get(device)
    if known is None:
        own = hasattr(torch.nn.functional, "grouped_mm") or hasattr(torch, "_grouped_mm")
        known = _capable[device] = own and torch.cuda.get_device_capability(device)[0] in (9, 10)
    return known


_capable: dict[torch.device, bool] = {}


def _grouped_mm(x: Tensor, w: Tensor, rows: ExpertOrder) -> Tensor:
    """[S, N] by CUTLASS; x [S, K], w [E, N, K]."""
    product = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
    y: Tensor = product(x, w.transpose(1, 2), offs=rows.ends)
    return y


def _aligned(x: Tensor) -> bool:
    """16-byte rows, as grouped_mm wants them, along the last or the last but one dimension."""
    *_, a, b = x.stride()
    return x.data_ptr() % 16 == 0 and ((b == 1 and a % 8 == 0) or (a == 1 and b % 8 == 0))


def _config(x: Tensor, n: int) -> tuple[int, int, int, int, int]:
    if interpreting():
        return _INTERPRETED
    if x.dtype == torch.float32:
        return FULL
    return NARROW if n <= 64 else WIDE


def _check(
    x: Tensor, w: Tensor, rows: ExpertOrder, by_token: bool, u: Tensor | None, v: Tensor | None
) -> None:
    S, E = rows.rows, rows.ends.shape[0]
    expected = S // rows.k if by_token else S
    if x.dim() != 2 or w.dim() != 3 or x.shape != (expected, w.shape[2]) or w.shape[0] != E:
        raise ValueError(
            f"expected x [{expected}, K] and w [{E}, N, K], got {tuple(x.shape)} and "
            f"{tuple(w.shape)}"
        )
    if (u is None) != (v is None):
        raise ValueError("u and v come together: got one of them")
    if u is not None and v is not None:
        R = u.shape[1]
        if u.shape[0] != S or v.shape != (E, w.shape[1], R):
            raise ValueError(
                f"expected u [{S}, R] and v [{E}, {w.shape[1]}, R], got {tuple(u.shape)} and "
                f"{tuple(v.shape)}"
            )
    for tensor in (x, u):
        if tensor is not None and tensor.shape[1] > 1 and tensor.stride(1) != 1:
            raise ValueError(f"expected contiguous rows, got strides {tensor.stride()}")


def grouped_linear(
    x: Tensor,
    w: Tensor,
    rows: ExpertOrder,
    u: Tensor | None = None,
    v: Tensor | None = None,
    *,
    by_token: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Y[i] = W_e X[i] + V_e U[i]. Computes in the tensors' common dtype, sums in fp32.

    Args:
        x: [S, K], any row stride; with `by_token` [T, K], read through the order's index.
        w: [E, N, K], any strides.
        rows: the order.
        u: [S, R], any row stride, with v; or None.
        v: [E, N, R], any strides.
        by_token: row i is x's row order[i] // k.
        out: [S, N], any row stride; or None.

    Returns:
        `out`, or a new [S, N].

    Raises:
        ValueError: shapes do not fit.
    """
    _check(x, w, rows, by_token, u, v)
    N, K = int(w.shape[1]), int(w.shape[2])
    if not use_triton(x):
        y = grouped_linear_reference(x[rows.tokens] if by_token else x, w, rows, u, v)
        return y if out is None else out.copy_(y)
    if out is None and uses_grouped_mm(x, N, K) and _aligned(w):
        if by_token:
            wide = x.new_empty((rows.rows, K))
            gather(x, rows, wide)
            x = wide
        if _aligned(x):
            y = _grouped_mm(x, w, rows)
            if u is not None and v is not None:
                _launch(None, None, rows, u, v, False, y, True)
            return y
        by_token = False
    if out is None:
        out = x.new_empty((rows.rows, N))
    if v is not None and (w.stride(2) == 1) != (v.stride(2) == 1):
        # Triton 3.6 on an H100: where one of them lies by rows and the other by columns, the sum is
        # wrong for small sizes.
        v = v.contiguous() if w.stride(2) == 1 else v.transpose(1, 2).contiguous().transpose(1, 2)
    _launch(x, w, rows, u, v, by_token, out, False)
    return out


def _launch(
    x: Tensor | None,
    w: Tensor | None,
    rows: ExpertOrder,
    u: Tensor | None,
    v: Tensor | None,
    by_token: bool,
    out: Tensor,
    add: bool,
) -> None:
    """`grouped_linear` by the kernel here; without x and w, their product is left out."""
    N, E = int(out.shape[1]), int(rows.ends.shape[0])
    K = 0 if w is None else int(w.shape[2])
    R = 0 if u is None else int(u.shape[1])
    if out.numel() == 0:
        return
    BLOCK_M, BLOCK_N, BLOCK_K, warps, stages = _config(out, N)
    BLOCK_N = min(BLOCK_N, max(16, next_power_of_2(N)))
    BLOCK_R = min(BLOCK_K, max(16, next_power_of_2(R)))
    if K and out.element_size() == 2 and not interpreting():
        # Triton 3.6 on an H100: where the two products' tiles differ in depth, the second may read
        # past its own in shared memory (ranks 17 to 32).
        BLOCK_R = BLOCK_K
    row_tiles, columns = rows.rows // BLOCK_M + E, cdiv(N, BLOCK_N)
    with launch_device(out):
        _grouped_linear_kernel[(row_tiles * columns,)](
            out if x is None else x, out if w is None else w, out if u is None else u,
            out if v is None else v, rows.order, rows.ends, out, E, row_tiles, columns,
            0 if x is None else x.stride(0), *((0, 0, 0) if w is None else w.stride()),
            0 if u is None else u.stride(0), *((0, 0, 0) if v is None else v.stride()),
            out.stride(0),
            N=N, K=K, R=R, EP=max(16, next_power_of_2(E)), TOP=rows.k if by_token else 0, ADD=add,
            BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, BLOCK_R=BLOCK_R, GROUP=_GROUP,
            INTERPRETED=interpreting(), num_warps=warps, num_stages=stages,
        )  # fmt: skip


def grouped_outer(
    p: Tensor,  # [S, R], any row stride
    q: Tensor,  # [S, K], any row stride; with by_token [T, K]
    rows: ExpertOrder,
    *,
    by_token: bool = False,
) -> Tensor:
    """O[e] = sum over e's rows of P[i]^T Q[i], [E, R, K] in fp32 (fp64 for fp64).

    Raises:
        ValueError: shapes do not fit.
    """
    S = rows.rows
    expected = S // rows.k if by_token else S
    if p.shape[0] != S or q.shape[0] != expected:
        raise ValueError(
            f"expected p [{S}, R] and q [{expected}, K], got {tuple(p.shape)} and {tuple(q.shape)}"
        )
    if not use_triton(p):
        return grouped_outer_reference(p, q[rows.tokens] if by_token else q, rows)
    E, R, K = int(rows.ends.shape[0]), int(p.shape[1]), int(q.shape[1])
    BLOCK_S, BLOCK_K, BLOCK_R = (16, 32, 16) if interpreting() else _OUTER
    if p.dtype == torch.float32 and not interpreting():
        BLOCK_S, BLOCK_K = 32, 64
    BLOCK_R = min(BLOCK_R, max(16, next_power_of_2(R)))
    blocks = cdiv(R, BLOCK_R)
    out = p.new_empty((E, blocks * BLOCK_R, K), dtype=torch.float32)
    if out.numel():
        with launch_device(out):
            _grouped_outer_kernel[(cdiv(K, BLOCK_K), E, blocks)](
                p, q, rows.order, rows.ends, out, p.stride(0), q.stride(0),
                R=R, K=K, TOP=rows.k if by_token else 0,
                BLOCK_S=BLOCK_S, BLOCK_K=BLOCK_K, BLOCK_R=BLOCK_R,
                INTERPRETED=interpreting(), num_warps=4, num_stages=3,
            )  # fmt: skip
    return out[:, :R]
