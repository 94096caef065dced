r"""The clamped SwiGLU between an expert's two products, as gpt-oss has it, and its backward.

Row i is a token's slot at expert e. Z = GU[i] + b_e is gate and up, in halves or alternately:

    g = min(gate, L)    u = min(max(up, -L), L)    s = sigmoid(alpha g)
    m = a v             a = g s                    v = u + o

Backward, from D = dY W_d of the unweighted dY, as in `expert_glu`, with dM = w D:

    dw'   = <D, m>      the part of the router's gradient that is not the down bias's
    dgate = dM v s (1 + alpha g (1 - s))   where gate <= L, else 0
    dup   = dM a                           where -L <= up <= L, else 0

At the limits themselves gradients pass, as torch's clamp has it. GU is kept as the product left it:
the bias is added anew in backward. Alternating columns are loaded as they lie and split in
registers, so that reads and writes stay whole. Z, alpha g, s, a and v are rounded to the storage
dtype, as the stock module's operations are; with alpha = 1 stock's one operation, SiLU, rounds a
alone.

GU, dGU: [S, 2I]; D, m: [S, I], any row stride. With alpha = 1, L = inf and o = 0 it is SwiGLU.

OpenAI, "gpt-oss-120b & gpt-oss-20b Model Card", 2025, https://arxiv.org/abs/2508.10925
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lorafuse.kernels.expert_order import ExpertOrder
from lorafuse.kernels.glu import _wide
from lorafuse.kernels.runtime import (
    cached_launch,
    launch_device,
    next_power_of_2,
    tl,
    triton,
    use_triton,
)

__all__ = ["ClampedSwiglu", "clamped_swiglu_bwd_", "clamped_swiglu_fwd", "reference"]

_MAX_BLOCK = 1024


@dataclass(frozen=True)
class ClampedSwiglu:
    """Which of them it is.

    Attributes:
        alpha: of the sigmoid.
        limit: L; inf for no clamp.
        offset: o.
        interleaved: gate and up are the even and the odd columns, not the two halves.
    """

    alpha: float = 1.0
    limit: float = math.inf
    offset: float = 0.0
    interleaved: bool = False

    def split(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Gate and up, views of `z` [..., 2I]."""
        if self.interleaved:
            return z[..., ::2], z[..., 1::2]
        gate, up = z.chunk(2, -1)
        return gate, up


def reference(z: Tensor, f: ClampedSwiglu) -> Tensor:
    """The definition: m [..., I] of z [..., 2I], the bias in it; differentiable."""
    gate, up = f.split(z)
    g, u = gate.clamp(max=f.limit), up.clamp(-f.limit, f.limit)
    a = torch.nn.functional.silu(g) if f.alpha == 1 else g * torch.sigmoid(g * f.alpha)
    return (u + f.offset) * a


def _biased(gu: Tensor, bias: Tensor | None, rows: ExpertOrder) -> Tensor:
    """Z [S, 2I] in gu's dtype; rows of no expert get some bias."""
    if bias is None:
        return gu
    expert = rows.index.long()[rows.order.long()].clamp(max=bias.shape[0] - 1)
    return (_wide(gu) + bias[expert]).to(gu.dtype)


def _backward_reference(
    gu: Tensor,
    bias: Tensor | None,
    D: Tensor,
    weights: Tensor,
    rows: ExpertOrder,
    f: ClampedSwiglu,
    dgu: Tensor,
) -> Tensor:
    """`clamped_swiglu_bwd_` by the formulas above."""
    word, z = gu.dtype, _biased(gu, bias, rows)
    m = reference(z, f)
    gate, up = (_wide(t) for t in f.split(z))
    g, u = gate.clamp(max=f.limit), up.clamp(-f.limit, f.limit)
    s = torch.sigmoid(g * f.alpha)
    D_wide = _wide(D)
    here = rows.place < rows.ends[-1]
    dw = (D_wide * _wide(m)).sum(1)[rows.place.long()].masked_fill(~here, 0)
    dm = D_wide * _wide(weights).reshape(-1)[rows.order.long()].unsqueeze(1).to(D_wide.dtype)
    da = _wide((dm * (u + f.offset)).to(word))
    dgate, dup = f.split(dgu)
    dgate.copy_((da * s * (1 + f.alpha * g * (1 - s))).masked_fill(gate > f.limit, 0))
    dup.copy_((dm * g * s).masked_fill(up.abs() > f.limit, 0))
    D.copy_(m)
    return dw.view(-1, rows.k)


@triton.jit
def _load_pair(at, first, width, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PAIRS: tl.constexpr):
    """Gate and up of BLOCK columns from `first` of the row at `at`, in fp32; 0 from `width` on."""
    if PAIRS:
        o_i = 2 * first + tl.arange(0, 2 * BLOCK)
        both = tl.load(at + o_i, o_i < 2 * width, 0.0).to(tl.float32)
        gate, up = tl.split(tl.reshape(both, [BLOCK, 2]))
    else:
        o_i = first + tl.arange(0, BLOCK)
        gate = tl.load(at + o_i, o_i < width, 0.0).to(tl.float32)
        up = tl.load(at + WIDTH + o_i, o_i < width, 0.0).to(tl.float32)
    return gate, up


@triton.jit
def _gate_and_up(
    gu_at, bias_at, first, biased, word: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    PAIRS: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """Gate and up with their bias, rounded to `word`; `biased`: WIDTH, or 0 for no expert."""
    gate, up = _load_pair(gu_at, first, WIDTH, WIDTH, BLOCK, PAIRS)
    if BIASED:
        gate_bias, up_bias = _load_pair(bias_at, first, biased, WIDTH, BLOCK, PAIRS)
        gate = (gate + gate_bias).to(word).to(tl.float32)
        up = (up + up_bias).to(word).to(tl.float32)
    return gate, up


@triton.jit
def _factors(gate, up, alpha, limit, offset, word: tl.constexpr, SILU: tl.constexpr):
    """(g, s, a, v), a and v rounded to `word`."""
    g = tl.where(gate > limit, limit, gate)
    u = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    if SILU:
        s = tl.sigmoid(g)
        a = g * s
    else:
        s = tl.sigmoid((g * alpha).to(word).to(tl.float32))
        a = g * s.to(word).to(tl.float32)
    return g, s, a.to(word).to(tl.float32), (u + offset).to(word).to(tl.float32)


@cached_launch
@triton.jit
def _clamped_swiglu_fwd_kernel(
    gu_ptr, bias_ptr, order_ptr, index_ptr, ends_ptr, m_ptr, gu_row, m_row, last,
    alpha, limit, offset,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, PAIRS: tl.constexpr, BIASED: tl.constexpr,
    SILU: tl.constexpr,
):  # fmt: skip
    """One row; `last`: the index of the last expert."""
    row = tl.program_id(0)
    i = row.to(tl.int64)
    word = gu_ptr.dtype.element_ty
    biased = tl.where(row < tl.load(ends_ptr + last), WIDTH, 0)
    bias_at = bias_ptr
    if BIASED:
        bias_at += tl.load(index_ptr + tl.load(order_ptr + row)).to(tl.int64) * (2 * WIDTH)
    for first in range(0, WIDTH, BLOCK):
        gate, up = _gate_and_up(
            gu_ptr + i * gu_row, bias_at, first, biased, word, WIDTH, BLOCK, PAIRS, BIASED
        )
        _, _, a, v = _factors(gate, up, alpha, limit, offset, word, SILU)
        o_i = first + tl.arange(0, BLOCK)
        tl.store(m_ptr + i * m_row + o_i, (a * v).to(word), o_i < WIDTH)


@cached_launch
@triton.jit
def _clamped_swiglu_bwd_kernel(
    gu_ptr, bias_ptr, D_ptr, weights_ptr, order_ptr, index_ptr, ends_ptr, dgu_ptr, dw_ptr,
    gu_row, D_row, dgu_row, last, alpha, limit, offset,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, PAIRS: tl.constexpr, BIASED: tl.constexpr,
    SILU: tl.constexpr,
):  # fmt: skip
    """One row; `last`: the index of the last expert."""
    row = tl.program_id(0)
    i = row.to(tl.int64)
    word = gu_ptr.dtype.element_ty
    here = row < tl.load(ends_ptr + last)
    biased = tl.where(here, WIDTH, 0)
    slot = tl.load(order_ptr + row)
    w = tl.load(weights_ptr + slot).to(tl.float32)
    bias_at = bias_ptr
    if BIASED:
        bias_at += tl.load(index_ptr + slot).to(tl.int64) * (2 * WIDTH)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, WIDTH, BLOCK):
        gate, up = _gate_and_up(
            gu_ptr + i * gu_row, bias_at, first, biased, word, WIDTH, BLOCK, PAIRS, BIASED
        )
        g, s, a, v = _factors(gate, up, alpha, limit, offset, word, SILU)
        o_i = first + tl.arange(0, BLOCK)
        mask = o_i < WIDTH
        d = tl.load(D_ptr + i * D_row + o_i, mask, 0.0).to(tl.float32)
        m = (a * v).to(word)
        total += d * m.to(tl.float32)
        tl.store(D_ptr + i * D_row + o_i, m, mask)
        d *= w
        da = (d * v).to(word).to(tl.float32)
        dgate = tl.where(gate <= limit, da * s * (1.0 + alpha * g * (1.0 - s)), 0.0).to(word)
        dup = tl.where((up <= limit) & (up >= -limit), d * a, 0.0).to(word)
        at = dgu_ptr + i * dgu_row
        if PAIRS:
            o_2 = 2 * first + tl.arange(0, 2 * BLOCK)
            tl.store(at + o_2, tl.interleave(dgate, dup), o_2 < 2 * WIDTH)
        else:
            tl.store(at + o_i, dgate, mask)
            tl.store(at + WIDTH + o_i, dup, mask)
    tl.store(dw_ptr + slot, tl.where(here, tl.sum(total, 0), 0.0))


def _check(rows: ExpertOrder, bias: Tensor | None, gu: Tensor, *others: Tensor) -> int:
    """I; refuses what the kernels would read or write out of bounds."""
    width = int(gu.shape[1]) // 2
    if gu.dim() != 2 or gu.shape[1] != 2 * width:
        raise ValueError(f"expected gate and up [S, 2I], got {tuple(gu.shape)}")
    for t in (gu, *others):
        if t.shape[0] != rows.rows or t.shape[1] not in (width, 2 * width) or t.stride(1) != 1:
            raise ValueError(
                f"expected {rows.rows} contiguous rows of {width} or {2 * width} columns, got "
                f"{tuple(t.shape)} with strides {t.stride()}"
            )
    if bias is not None:
        E = int(rows.ends.shape[0])
        if bias.shape != (E, 2 * width) or not bias.is_contiguous():
            raise ValueError(
                f"expected a contiguous bias [{E}, {2 * width}], got {tuple(bias.shape)}"
            )
    return width


def clamped_swiglu_fwd(
    gu: Tensor,  # [S, 2I], any row stride
    bias: Tensor | None,  # [E, 2I] contiguous, any dtype
    rows: ExpertOrder,
    f: ClampedSwiglu,
    out: Tensor,  # [S, I], any row stride: m is written here
) -> None:
    """Writes m into `out`.

    Raises:
        ValueError: shapes do not fit.
    """
    width = _check(rows, bias, gu, out)
    if not use_triton(gu):
        out.copy_(reference(_biased(gu, bias, rows), f))
    elif out.numel():
        with launch_device(gu):
            _clamped_swiglu_fwd_kernel[(rows.rows,)](
                gu, gu if bias is None else bias, rows.order, rows.index, rows.ends, out,
                gu.stride(0), out.stride(0), rows.ends.shape[0] - 1,
                float(f.alpha), float(f.limit), float(f.offset),
                WIDTH=width, BLOCK=min(_MAX_BLOCK, next_power_of_2(width)), PAIRS=f.interleaved,
                BIASED=bias is not None, SILU=f.alpha == 1, num_warps=4,
            )  # fmt: skip


def clamped_swiglu_bwd_(
    gu: Tensor,  # [S, 2I], any row stride
    bias: Tensor | None,  # [E, 2I] contiguous, any dtype
    D: Tensor,  # [S, I]; becomes m
    weights: Tensor,  # [T, k] contiguous
    rows: ExpertOrder,
    f: ClampedSwiglu,
    dgu: Tensor,  # [S, 2I], written
) -> Tensor:
    """Writes dgu and, in place of D, m. Returns dw' [T, k] in fp32 (fp64 for fp64).

    Raises:
        ValueError: shapes do not fit.
    """
    width = _check(rows, bias, gu, D, dgu)
    if weights.numel() != rows.rows or not weights.is_contiguous():
        raise ValueError(f"expected {rows.rows} contiguous weights, got {tuple(weights.shape)}")
    if not use_triton(gu):
        return _backward_reference(gu, bias, D, weights, rows, f, dgu)
    dw = torch.zeros(rows.rows // rows.k, rows.k, dtype=torch.float32, device=gu.device)
    if gu.numel():
        with launch_device(gu):
            _clamped_swiglu_bwd_kernel[(rows.rows,)](
                gu, gu if bias is None else bias, D, weights, rows.order, rows.index, rows.ends,
                dgu, dw, gu.stride(0), D.stride(0), dgu.stride(0), rows.ends.shape[0] - 1,
                float(f.alpha), float(f.limit), float(f.offset),
                WIDTH=width, BLOCK=min(_MAX_BLOCK, next_power_of_2(width)), PAIRS=f.interleaved,
                BIASED=bias is not None, SILU=f.alpha == 1, num_warps=4,
            )  # fmt: skip
    return dw
