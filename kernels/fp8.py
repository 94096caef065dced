r"""Rows in FP8: e4m3 codes with one scale a row, and r-wide columns beside them in two parts.

    X[t, k]  ≈ scale[t] * code[t, k]                    scale[t] = max |row t of [X, c U]| / 448
    [X, U]  ->  [ X | hi(cU) | lo(cU) | hi(cU) | 0 ]    codes [T, K + F]

    X [T, K]; U [T, R] the r-wide columns; F = fold_width(K, R)

e4m3 keeps four significant bits. The noise of a rounded X or W is new in every token; LoRA's own
factors must not be rounded so, for a B that moves by less than 1/16 would not move at all. So each
goes in as hi + lo, both e4m3, eight bits together, and a product of two takes three of its four
terms: hi hi + lo hi + hi lo. The other operand's columns are [hi | hi | lo] (`fp8_weight.fold`).

c[r] = 2^j balances the two operands: U takes c, the other divides by it. j follows from the other
operand's largest |element| (`balance`), which is then below 2^LOG2; U's own range needs no bound,
for it is part of the row's scale. Nothing overflows. A larger U lifts the scale above what X needs;
that costs X nothing until its elements fall below 2^-6 of a code, 15 binades under the largest.

Micikevicius et al., "FP8 Formats for Deep Learning", 2022, https://arxiv.org/abs/2209.05433
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lorafuse.kernels.runtime import (
    cached_launch,
    interpreting,
    launch_device,
    next_power_of_2,
    tl,
    triton,
    use_triton,
)

__all__ = ["Fold", "balance", "e4m3", "fold_width", "quantise_rows", "quantise_rows_reference"]

E4M3 = torch.float8_e4m3fn
MAX = 448.0
# Below, a row counts as zeros: 1 / scale stays finite.
_SMALLEST = 2.0**-100
# FP8 GEMMs want K in multiples of 128: at N = 28672, K = 4224 took 1.55 ms, 4192 took 1.71 (H100).
_ALIGN = 128
# Longer rows are read twice. 32768 elements at 16 warps are 64 a thread.
_WHOLE_ROW = 32768
_CHUNK = 8192


def fold_width(K: int, R: int) -> int:
    """F: 3 R columns, and zeros up to a K + F that the GEMM likes."""
    return -(-(K + 3 * R) // _ALIGN) * _ALIGN - K


def e4m3(v: Tensor) -> Tensor:
    """v in e4m3, ties to even; past +-448, where torch's own cast gives NaN, it is +-448."""
    return v.clamp(-MAX, MAX).to(E4M3)


def balance(top: Tensor, scale: Tensor, log2: int) -> Tensor:
    """c = 2^j: top / (c * scale) is in [2^(log2 - 1), 2^log2). |j| <= 60; -60 for a top of 0."""
    ratio = top / scale
    j = torch.where(ratio > 0, torch.frexp(ratio).exponent - log2, -60).clamp(-60, 60)
    return ((j.int() + 127) << 23).view(torch.float32)


def _over_max(top: Tensor) -> Tensor:
    # By a tensor: on a GPU, torch divides by a number by multiplying with its rounded inverse.
    return top / torch.full_like(top, MAX)


@dataclass(frozen=True, eq=False)
class Fold:
    """The r-wide columns U, and what balances them.

    Attributes:
        U: [T, >= R], any row stride; the columns past R are not read.
        tops: [1 + R] fp32: largest |element| of the weight, and of each r-wide row or column of
            the other operand.
        rank: R.
        log2: that other operand's codes stay below 2^log2.
    """

    U: Tensor
    tops: Tensor
    rank: int
    log2: int


def weight_scale(tops: Tensor) -> Tensor:
    """The weight's scale from its largest |element|, `tops[0]`."""
    return _over_max(tops[0].clamp_min(2.0**-40))


def quantise_rows_reference(x: Tensor, out: Tensor, scale: Tensor, fold: Fold | None) -> None:
    """The definition of `quantise_rows`."""
    K = x.shape[1]
    wide = x.float()
    U = wide[:, :0]
    if fold is not None:
        U = fold.U[:, : fold.rank].float()
        U = U * balance(fold.tops[1 : 1 + fold.rank], weight_scale(fold.tops), fold.log2)
    top = torch.cat((wide, U), 1).abs().amax(1, keepdim=True).clamp_min(_SMALLEST)
    scale.copy_(_over_max(top))
    inverse = 1 / scale
    hi = e4m3(U * inverse)
    lo = e4m3(U * inverse - hi.float())
    left = K + 3 * U.shape[1]
    out[:, :left].copy_(torch.cat([c.float() for c in (e4m3(wide * inverse), hi, lo, hi)], 1))
    out[:, left:].zero_()


@triton.jit
def _on_grid(v):
    """v rounded to the nearest value of e4m3, ties to even, saturated; in fp32."""
    v = tl.where(tl.abs(v) > 448.0, tl.where(v > 0, 448.0, -448.0), v)
    bits = v.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    small = (tl.abs(v) + 16384.0) - 16384.0  # to a multiple of 2^-9
    small = tl.where(v < 0, -small, small)
    return tl.where(tl.abs(v) < 0.015625, small, normal)


@triton.jit
def _to_e4m3(v, EXACT: tl.constexpr):
    """v in e4m3, ties to even, saturated."""
    if EXACT:  # Triton's interpreter loses the carry into the exponent: here it finds no carry
        v = _on_grid(v)
    return v.to(tl.float8e4nv)


@triton.jit
def _weight_scale(tops_ptr):
    top = tl.maximum(tl.load(tops_ptr), 9.094947017729282e-13)  # 2^-40
    return tl.div_rn(top, tl.zeros_like(top) + 448.0)


@triton.jit
def _exponent(top, scale, LOG2: tl.constexpr):
    """j of `balance`."""
    bits = tl.div_rn(top, tl.zeros_like(top) + scale).to(tl.int32, bitcast=True)
    return tl.minimum(tl.maximum(((bits >> 23) & 255) - 126 - LOG2, -60), 60)


@triton.jit
def _power_of_2(j):
    return ((j + 127) << 23).to(tl.float32, bitcast=True)


@cached_launch
@triton.jit
def _quantise_rows_kernel(
    x_ptr, U_ptr, tops_ptr, out_ptr, scale_ptr, x_row, U_row, out_row,
    K: tl.constexpr, R: tl.constexpr, F: tl.constexpr,
    PR: tl.constexpr, PF: tl.constexpr, BLOCK: tl.constexpr,
    LOG2: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One row. Held in registers where BLOCK >= K, else read twice."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_row
    out_ptr += row * out_row
    o_k = tl.arange(0, BLOCK)
    if BLOCK >= K:
        x = tl.load(x_ptr + o_k, o_k < K, 0.0)
        top = tl.max(tl.abs(x.to(tl.float32)), 0)
    else:
        tops = tl.zeros([BLOCK], tl.float32)
        for start in range(0, K, BLOCK):
            x = tl.load(x_ptr + start + o_k, start + o_k < K, 0.0, eviction_policy="evict_last")
            tops = tl.maximum(tops, tl.abs(x.to(tl.float32)))
        top = tl.max(tops, 0)
    if R > 0:
        o_r = tl.arange(0, PR)
        m_r = o_r < R
        c = _power_of_2(
            _exponent(tl.load(tops_ptr + 1 + o_r, m_r, 0.0), _weight_scale(tops_ptr), LOG2)
        )
        U = tl.load(U_ptr + row * U_row + o_r, m_r, 0.0).to(tl.float32) * c
        top = tl.maximum(top, tl.max(tl.abs(U), 0))
    top = tl.maximum(top, 7.888609052210118e-31)  # 2^-100
    scale = tl.div_rn(top, tl.zeros_like(top) + 448.0)
    tl.store(scale_ptr + row, scale)
    inverse = tl.div_rn(tl.zeros_like(top) + 1.0, scale)
    if BLOCK >= K:
        tl.store(out_ptr + o_k, _to_e4m3(x.to(tl.float32) * inverse, EXACT), o_k < K)
    else:
        for start in range(0, K, BLOCK):
            x = tl.load(x_ptr + start + o_k, start + o_k < K, 0.0, eviction_policy="evict_first")
            code = _to_e4m3(x.to(tl.float32) * inverse, EXACT)
            tl.store(out_ptr + start + o_k, code, start + o_k < K)
    if R > 0:
        U *= inverse
        hi = _on_grid(U)
        tl.store(out_ptr + K + o_r, hi.to(tl.float8e4nv), m_r)
        tl.store(out_ptr + K + R + o_r, _to_e4m3(U - hi, EXACT), m_r)
        tl.store(out_ptr + K + 2 * R + o_r, hi.to(tl.float8e4nv), m_r)
    if F > 3 * R:
        o_f = 3 * R + tl.arange(0, PF)
        tl.store(out_ptr + K + o_f, tl.zeros([PF], tl.float32).to(tl.float8e4nv), o_f < F)


def quantise_rows(
    x: Tensor,  # [T, K], any row stride
    out: Tensor,  # [T, K + F] e4m3, any row stride
    scale: Tensor,  # [T, 1] fp32
    fold: Fold | None = None,
) -> None:
    """Writes the codes of the module's docstring into `out` and each row's scale into `scale`.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    T, K = x.shape
    R = 0 if fold is None else fold.rank
    F = out.shape[1] - K
    if out.shape[0] != T or F < 3 * R or out.dtype != E4M3 or scale.shape != (T, 1):
        raise ValueError(
            f"x is {tuple(x.shape)} with {R} columns beside it; got out {tuple(out.shape)} of "
            f"{out.dtype} and scale {tuple(scale.shape)}"
        )
    if x.stride(1) != 1 or out.stride(1) != 1 or not scale.is_contiguous():
        raise ValueError("x and out must have contiguous rows, and scale must be contiguous")
    if not use_triton(x):
        quantise_rows_reference(x, out, scale, fold)
        return
    block = next_power_of_2(K) if K <= _WHOLE_ROW else _CHUNK
    with launch_device(x):
        # fp fusion off: the low part is what the rounded product leaves, as in the reference.
        _quantise_rows_kernel[(T,)](
            x, x if fold is None else fold.U, scale if fold is None else fold.tops, out, scale,
            x.stride(0), 0 if fold is None else fold.U.stride(0), out.stride(0),
            K=K, R=R, F=F, PR=next_power_of_2(max(R, 1)), PF=next_power_of_2(max(F - 3 * R, 1)),
            BLOCK=block, LOG2=0 if fold is None else fold.log2, EXACT=interpreting(),
            num_warps=min(16, max(4, block // 1024)), enable_fp_fusion=False,
        )  # fmt: skip
