"""Tokens sorted by expert, once a layer, and rows brought into that order and back.

A router sends each of T tokens to k of E experts: T * k slots, slot t * k + j for the j-th expert
of token t. All that an expert computes on is made one run of rows:

    order[i]    the slot that stands in row i; stable: an expert's tokens keep their order
    place[slot] the row of a slot: the inverse of `order`
    ends[e]     where expert e's rows end, and the next one's begin

    gather   X'[i] = X[order[i] // k]
    combine  y[t] = sum over j of w[t, j] (Y[place[t k + j]] + b_e)    in fp32, in the order of j

Nothing is read back to the host, nothing is padded to a capacity, nothing is added atomically: runs
repeat bit for bit. Experts from E on (expert parallelism marks slots of other ranks so) sort to the
end, and `combine` leaves them out.
"""

from dataclasses import dataclass

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

__all__ = ["ExpertOrder", "combine", "combine_reference", "gather", "sort_by_expert"]

_MAX_BLOCK = 1024


@dataclass(frozen=True, eq=False)
class ExpertOrder:
    """Which row each slot has; see the module's docstring.

    Attributes:
        order: [S] int32.
        place: [S] int32.
        ends: [E] int32.
        index: [S] the expert of each slot, as the router gave it.
        k: experts a token.
    """

    order: Tensor
    place: Tensor
    ends: Tensor
    index: Tensor
    k: int

    @property
    def rows(self) -> int:
        """S = T k."""
        return int(self.order.shape[0])

    @property
    def tokens(self) -> Tensor:
        """The token in each row, [S] int64."""
        return self.order.long() // self.k

    def spans(self) -> list[tuple[int, int]]:
        """(first row, end) of each expert. Reads `ends` back: for the references on a CPU only."""
        ends = [int(end) for end in self.ends.tolist()]
        return list(zip([0, *ends], ends, strict=False))


def sort_by_expert(index: Tensor, experts: int) -> ExpertOrder:
    """The order of the slots of `index` [T, k], whose entries name experts from 0 on.

    Args:
        index: [T, k], integers; entries >= `experts` sort to the end.
        experts: E.
    """
    if index.dim() != 2 or index.is_floating_point():
        raise ValueError(f"index must be integers [T, k], got {index.dtype} {tuple(index.shape)}")
    # 16 bits where they do: the radix sort makes one pass for every 8.
    narrow = torch.int16 if experts < 2**15 - 1 else torch.int32
    given = index.reshape(-1)
    flat = given.clamp(max=experts).to(narrow)
    by_expert, order = torch.sort(flat, stable=True)
    place = torch.empty_like(order, dtype=torch.int32)
    place[order] = torch.arange(flat.shape[0], dtype=torch.int32, device=index.device)
    each = torch.arange(experts, dtype=narrow, device=index.device)
    ends = torch.searchsorted(by_expert, each, right=True, out_int32=True)
    return ExpertOrder(order.to(torch.int32), place, ends, given, int(index.shape[1]))


def combine_reference(
    y: Tensor, rows: ExpertOrder, weights: Tensor | None, bias: Tensor | None = None
) -> Tensor:
    """The definition of `combine`, in fp32 (fp64 for fp64): [T, N]."""
    wide = y if y.dtype == torch.float64 else y.float()
    slots = wide[rows.place.long()]
    if bias is not None:
        slots = slots + bias[rows.index.long().clamp(max=bias.shape[0] - 1)]
    here = rows.place < rows.ends[-1]
    slots = slots.masked_fill(~here.unsqueeze(1), 0).view(-1, rows.k, y.shape[1])
    if weights is not None:
        slots = slots * weights.to(slots.dtype).unsqueeze(2)
    return slots.sum(1)


@cached_launch
@triton.jit
def _gather_kernel(
    x_ptr, order_ptr, out_ptr, x_row, out_row, columns,
    K: tl.constexpr, TOP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK columns of one row."""
    row = tl.program_id(0) // columns
    o_k = (tl.program_id(0) % columns) * BLOCK + tl.arange(0, BLOCK)
    token = (tl.load(order_ptr + row) // TOP).to(tl.int64)
    x = tl.load(x_ptr + token * x_row + o_k, o_k < K, 0.0).to(tl.float32)
    tl.store(out_ptr + row.to(tl.int64) * out_row + o_k, x.to(out_ptr.dtype.element_ty), o_k < K)


@cached_launch
@triton.jit
def _combine_kernel(
    y_ptr, place_ptr, ends_ptr, weights_ptr, bias_ptr, index_ptr, out_ptr, y_row, out_row, columns,
    last, N: tl.constexpr, TOP: tl.constexpr, BLOCK: tl.constexpr, WEIGHTED: tl.constexpr,
    BIASED: tl.constexpr,
):  # fmt: skip
    """BLOCK columns of one token; `last`: the index of the last expert."""
    token = tl.program_id(0) // columns
    o_n = (tl.program_id(0) % columns) * BLOCK + tl.arange(0, BLOCK)
    rows = tl.load(ends_ptr + last)
    total = tl.zeros([BLOCK], tl.float32)
    for j in range(TOP):
        row = tl.load(place_ptr + token * TOP + j)
        width = tl.where(row < rows, N, 0)
        y = tl.load(y_ptr + row.to(tl.int64) * y_row + o_n, o_n < width, 0.0).to(tl.float32)
        if BIASED:
            expert = tl.load(index_ptr + token * TOP + j).to(tl.int64)
            y += tl.load(bias_ptr + expert * N + o_n, o_n < width, 0.0).to(tl.float32)
        if WEIGHTED:
            y *= tl.load(weights_ptr + token * TOP + j).to(tl.float32)
        total += y
    place = token.to(tl.int64) * out_row + o_n
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), o_n < N)


def _rows_fit(x: Tensor, rows: int, what: str) -> None:
    if x.dim() != 2 or x.shape[0] != rows or (x.shape[1] > 1 and x.stride(1) != 1):
        raise ValueError(
            f"{what} must have {rows} contiguous rows, got {tuple(x.shape)} with strides "
            f"{x.stride()}"
        )


def gather(
    x: Tensor,  # [T, K], any row stride
    rows: ExpertOrder,
    out: Tensor,  # [S, K], any row stride and dtype
) -> None:
    """Writes each row's token into `out`."""
    _rows_fit(x, rows.rows // rows.k, "x")
    _rows_fit(out, rows.rows, "out")
    if not use_triton(x) or not use_triton(out):
        out.copy_(x[rows.tokens])
        return
    K = x.shape[1]
    block = min(_MAX_BLOCK, next_power_of_2(K))
    columns = cdiv(K, block)
    if out.numel():
        with launch_device(out):
            _gather_kernel[(rows.rows * columns,)](
                x, rows.order, out, x.stride(0), out.stride(0), columns,
                K=K, TOP=rows.k, BLOCK=block,
            )  # fmt: skip


def combine(
    y: Tensor,  # [S, N], any row stride
    rows: ExpertOrder,
    weights: Tensor | None,  # [T, k] contiguous, or None for ones
    out: Tensor,  # [T, N], any row stride and dtype
    bias: Tensor | None = None,  # [E, N] contiguous, any dtype; or None for zeros
) -> None:
    """Writes the weighted sum of each token's rows, each with its expert's bias, into `out`."""
    _rows_fit(y, rows.rows, "y")
    _rows_fit(out, rows.rows // rows.k, "out")
    if weights is not None and (
        weights.shape != (out.shape[0], rows.k) or not weights.is_contiguous()
    ):
        raise ValueError(
            f"weights must be [{out.shape[0]}, {rows.k}] and contiguous, got "
            f"{tuple(weights.shape)} with strides {weights.stride()}"
        )
    if bias is not None and (
        bias.shape != (rows.ends.shape[0], out.shape[1]) or not bias.is_contiguous()
    ):
        raise ValueError(
            f"bias must be [{rows.ends.shape[0]}, {out.shape[1]}] and contiguous, got "
            f"{tuple(bias.shape)} with strides {bias.stride()}"
        )
    if not use_triton(y) or not use_triton(out):
        out.copy_(combine_reference(y, rows, weights, bias))
        return
    N = y.shape[1]
    block = min(_MAX_BLOCK, next_power_of_2(N))
    columns = cdiv(N, block)
    if out.numel():
        with launch_device(out):
            _combine_kernel[(out.shape[0] * columns,)](
                y, rows.place, rows.ends, y if weights is None else weights,
                y if bias is None else bias, rows.index, out,
                y.stride(0), out.stride(0), columns, rows.ends.shape[0] - 1,
                N=N, TOP=rows.k, BLOCK=block, WEIGHTED=weights is not None,
                BIASED=bias is not None,
            )  # fmt: skip
