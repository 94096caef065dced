r"""A frozen weight in FP8, written anew in each pass: for the forward GEMM and, transposed, for dX.

    W[n, k] ≈ s * W8[n, k]        s = max |W| / 448, one for all weights of a group

    codes             W8           [N, K]       beside it the fold of sB [N, R]
    codes transposed  W8^T         [K, N]       beside it the fold of A^T [K, R]

Hopper multiplies FP8 operands only if the contracted dimension is contiguous in both, so dX = dY W
needs W8^T in memory. Both passes use the very same codes and scale.

One s serves as well as one a row: e4m3 is a floating-point format, so a row's noise relative to the
row does not depend on its scale until its elements are subnormal, 2^-15 of the largest. It spares
dX = (dY s) W8 a factor for each column of dY, a vector twice as long in bytes as dY's row.
For 4 bits, max |W| is max |absmax| * max |code|, the most that the blocks can hold: it costs a pass
over the blocks' scales.

The fold of S [J, R] is [hi(S / cs) | hi(S / cs) | lo(S / cs) | 0] (see `fp8`).
"""

import torch
from torch import Tensor

from lorafuse.kernels.fp8 import (
    E4M3,
    _exponent,
    _on_grid,
    _power_of_2,
    _to_e4m3,
    _weight_scale,
    balance,
    e4m3,
    weight_scale,
)
from lorafuse.kernels.nf4 import Quantised4bit, _scales
from lorafuse.kernels.nf4 import reference as dequantised
from lorafuse.kernels.runtime import (
    cached_launch,
    cdiv,
    interpreting,
    kernel_dtypes,
    launch_device,
    next_power_of_2,
    tl,
    triton,
    use_triton,
)

__all__ = [
    "codes",
    "codes_reference",
    "codes_transposed",
    "column_tops",
    "column_tops_reference",
    "fold",
    "fold_reference",
    "weight_top",
    "weight_top_reference",
]

Weight = Tensor | Quantised4bit

_TOP_TILE = 4096
_TOP_PROGRAMS = 528  # 4 for each of a GPU's 132 multiprocessors
# Columns of a tile of one row, 16 a thread: one 16-byte store of codes.
_TILES = (4096, 2048, 1024)
# Rows and columns of a tile of W, and warps. Rows of W8^T are written 128 bytes or more at a time;
# with 64 columns a row of 4-bit codes has one scale.
_TRANSPOSED = 128, 128, 8
_TRANSPOSED_4BIT = 256, 64, 8
_FOLD_TILE = 4096
# Of W8^T. `fp8.fold_width` gives multiples of 128; with strides that are none of 64, the kernel for
# 4 bits wrote wrong codes on an H100 (Triton 3.6).
_ROW = 64


def weight_top_reference(weight: Weight) -> Tensor:
    """The definition of `weight_top`: fp32 scalar."""
    if isinstance(weight, Quantised4bit):
        return _scales(weight).abs().max() * weight.code.abs().max()
    return weight.abs().max().float()


def codes_reference(weight: Weight, tops: Tensor) -> Tensor:
    """The definition of `codes`: W8 [N, K]."""
    inverse = 1 / weight_scale(tops)
    if not isinstance(weight, Quantised4bit):
        return e4m3(weight.float() * inverse)
    w = Quantised4bit(
        weight.packed, weight.code, _scales(weight) * inverse, weight.blocksize, weight.shape
    )
    return e4m3(dequantised(w))


def column_tops_reference(S: Tensor, tops: Tensor) -> None:
    """The definition of `column_tops`."""
    tops.copy_(S.float().abs().amax(0))


def fold_reference(
    S: Tensor | None, rank: int, tops: Tensor, log2: int, out: Tensor, scale: Tensor
) -> None:
    """The definition of `fold`."""
    s = weight_scale(tops)
    scale.fill_(s)
    out[:, 3 * rank :].zero_()
    if S is not None:
        v = S[:, :rank].float() * (1 / balance(tops[1 : 1 + rank], s, log2)) * (1 / s)
        hi = e4m3(v)
        lo = e4m3(v - hi.float())
        out[:, : 3 * rank].copy_(torch.cat((hi.float(), hi.float(), lo.float()), 1))


@triton.jit
def _atomic_top(top_ptr, top, mask):
    # fp32 of one sign are ordered as their bits are.
    tl.atomic_max(top_ptr, top.to(tl.int32, bitcast=True), mask)


@cached_launch
@triton.jit
def _top_kernel(w_ptr, top_ptr, elements, PROGRAMS: tl.constexpr, TILE: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    tops = tl.zeros([TILE], tl.float32)
    for start in range(0, elements, PROGRAMS * TILE):
        w = tl.load(w_ptr + start + o, start + o < elements, 0.0)
        tops = tl.maximum(tops, tl.abs(w.to(tl.float32)))
    top = tl.max(tops, 0)
    _atomic_top(top_ptr, top, top >= 0)


@triton.jit
def _absmax(absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, o_block, mask,
            BLOCKSIZE2: tl.constexpr, NESTED: tl.constexpr):  # fmt: skip
    """Scales of 4-bit blocks, rounded as `nf4` rounds them."""
    scale = tl.load(absmax_ptr + o_block, mask)
    if NESTED:
        scale = tl.load(code2_ptr + scale.to(tl.int32), mask)
        scale = scale * tl.load(absmax2_ptr + o_block // BLOCKSIZE2, mask) + tl.load(offset_ptr)
    return scale


@cached_launch
@triton.jit
def _top_4bit_kernel(
    code_ptr, absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, top_ptr, blocks,
    BLOCKSIZE2: tl.constexpr, NESTED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    o = tl.program_id(0) * TILE + tl.arange(0, TILE)
    m = o < blocks
    scale = _absmax(absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, o, m, BLOCKSIZE2, NESTED)
    top = tl.max(tl.where(m, tl.abs(scale), 0.0), 0)
    code = tl.max(tl.abs(tl.load(code_ptr + tl.arange(0, 16))), 0)
    _atomic_top(top_ptr, top * code, top >= 0)


@cached_launch
@triton.jit
def _codes_kernel(
    w_ptr, tops_ptr, out_ptr, w_row, out_row,
    K: tl.constexpr, BLOCK: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """BLOCK columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    o_k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    scale = _weight_scale(tops_ptr)
    inverse = tl.div_rn(tl.zeros_like(scale) + 1.0, scale)
    w = tl.load(w_ptr + row * w_row + o_k, o_k < K, 0.0).to(tl.float32) * inverse
    tl.store(out_ptr + row * out_row + o_k, _to_e4m3(w, EXACT), o_k < K)


@cached_launch
@triton.jit
def _codes_4bit_kernel(
    packed_ptr, code_ptr, absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, tops_ptr, out_ptr,
    out_row,
    K: tl.constexpr, BLOCKSIZE: tl.constexpr, BLOCKSIZE2: tl.constexpr, BYTES: tl.constexpr,
    NESTED: tl.constexpr, EVEN: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """BYTES packed bytes of one row: out of a flat index, Triton would store single bytes."""
    row = tl.program_id(0).to(tl.int64)
    o_byte = tl.program_id(1) * BYTES + tl.arange(0, BYTES)
    o_k = tl.program_id(1) * (2 * BYTES) + tl.arange(0, 2 * BYTES)
    m_byte, m_k = None, None
    if not EVEN:
        m_byte, m_k = o_byte < K // 2, o_k < K
    at = row * (K // 2) + o_byte
    s = _weight_scale(tops_ptr)
    scale = _absmax(
        absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, (at // (BLOCKSIZE // 2)).to(tl.int32),
        m_byte, BLOCKSIZE2, NESTED,
    )  # fmt: skip
    scale *= tl.div_rn(tl.zeros_like(s) + 1.0, s)
    byte = tl.load(packed_ptr + at, m_byte).to(tl.int32)
    high = tl.load(code_ptr + (byte >> 4), m_byte) * scale
    low = tl.load(code_ptr + (byte & 15), m_byte) * scale
    tl.store(out_ptr + row * out_row + o_k, _to_e4m3(tl.interleave(high, low), EXACT), m_k)


@triton.jit
def _code_word(code, word, i: tl.constexpr):
    """`word` with `code` as its byte i."""
    return word | (code.to(tl.uint8, bitcast=True).to(tl.uint32) << (8 * i))


@triton.jit
def _store_transposed(out_ptr, word, q_first, k_first, N, out_row,
                      K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """Words [BLOCK_N / 4, BLOCK_K] into rows of `out`, which holds four codes a word.

    Four codes travel as one, or the transposition in shared memory would move single bytes.
    """
    o_k = (k_first + tl.arange(0, BLOCK_K))[:, None]
    o_q = (q_first + tl.arange(0, BLOCK_N // 4))[None, :]
    mask = (o_k < K) & (o_q < N // 4)
    word = tl.trans(word).to(tl.int32, bitcast=True)
    tl.store(out_ptr + o_k.to(tl.int64) * out_row + o_q, word, mask)


@cached_launch
@triton.jit
def _codes_transposed_kernel(
    w_ptr, tops_ptr, out_ptr, N, w_row, out_row,
    K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """A tile of BLOCK_N rows and BLOCK_K columns of W."""
    n_first, k_first = tl.program_id(1) * BLOCK_N, tl.program_id(0) * BLOCK_K
    o_n = (n_first + 4 * tl.arange(0, BLOCK_N // 4))[:, None]
    o_k = (k_first + tl.arange(0, BLOCK_K))[None, :]
    s = _weight_scale(tops_ptr)
    inverse = tl.div_rn(tl.zeros_like(s) + 1.0, s)
    word = tl.zeros([BLOCK_N // 4, BLOCK_K], tl.uint32)
    for i in tl.static_range(4):
        mask = (o_n < N) & (o_k < K)
        w = tl.load(w_ptr + (o_n + i).to(tl.int64) * w_row + o_k, mask, 0.0).to(tl.float32)
        word = _code_word(_to_e4m3(w * inverse, EXACT), word, i)
    q_first = tl.program_id(1) * (BLOCK_N // 4)
    _store_transposed(out_ptr, word, q_first, k_first, N, out_row, K, BLOCK_N, BLOCK_K)


@cached_launch
@triton.jit
def _codes_transposed_4bit_kernel(
    packed_ptr, code_ptr, absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, tops_ptr, out_ptr,
    N, out_row,
    K: tl.constexpr, BLOCKSIZE: tl.constexpr, BLOCKSIZE2: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, NESTED: tl.constexpr, LONG: tl.constexpr,
    ONE_BLOCK: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """A tile of BLOCK_N rows and BLOCK_K columns of W."""
    n_first, k_first = tl.program_id(1) * BLOCK_N, tl.program_id(0) * BLOCK_K
    o_n = (n_first + 4 * tl.arange(0, BLOCK_N // 4))[:, None]
    o_byte = (tl.program_id(0) * (BLOCK_K // 2) + tl.arange(0, BLOCK_K // 2))[None, :]
    if LONG:  # N * K needs 64 bits
        o_n = o_n.to(tl.int64)
    s = _weight_scale(tops_ptr)
    inverse = tl.div_rn(tl.zeros_like(s) + 1.0, s)
    word = tl.zeros([BLOCK_N // 4, BLOCK_K], tl.uint32)
    for i in tl.static_range(4):
        mask = (o_n < N) & (o_byte < K // 2)
        at = (o_n + i) * (K // 2) + o_byte
        if ONE_BLOCK:  # a gather for each row of the tile; for each byte, lanes would read 8 lines
            o_block = (o_n + i) * (K // BLOCKSIZE) + k_first // BLOCKSIZE
            m_block = o_n < N
        else:
            o_block, m_block = at // (BLOCKSIZE // 2), mask
        scale = _absmax(
            absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, o_block, m_block, BLOCKSIZE2, NESTED
        )
        scale *= inverse
        byte = tl.load(packed_ptr + at, mask, 0).to(tl.int32)
        high = tl.load(code_ptr + (byte >> 4)) * scale
        low = tl.load(code_ptr + (byte & 15)) * scale
        word = _code_word(_to_e4m3(tl.interleave(high, low), EXACT), word, i)
    q_first = tl.program_id(1) * (BLOCK_N // 4)
    _store_transposed(out_ptr, word, q_first, k_first, N, out_row, K, BLOCK_N, BLOCK_K)


@cached_launch
@triton.jit
def _column_tops_kernel(
    S_ptr, tops_ptr, J, S_j, S_r,
    R: tl.constexpr, P: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    o_j = (tl.program_id(0) * BLOCK_J + tl.arange(0, BLOCK_J))[:, None]
    o_r = tl.arange(0, P)
    mask = (o_j < J) & (o_r[None, :] < R)
    v = tl.load(S_ptr + o_j.to(tl.int64) * S_j + o_r[None, :] * S_r, mask, 0.0)
    _atomic_top(tops_ptr + o_r, tl.max(tl.abs(v.to(tl.float32)), 0), o_r < R)


@cached_launch
@triton.jit
def _fold_kernel(
    S_ptr, tops_ptr, out_ptr, scale_ptr, S_j, S_r, out_row,
    R: tl.constexpr, F: tl.constexpr, P: tl.constexpr, PF: tl.constexpr,
    LOG2: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One row. A tile of rows, whose high parts were codes turned back into fp32, came out wrong
    on an H100 (Triton 3.6): LoRA's term was 1.5 times what it should be."""
    row = tl.program_id(0).to(tl.int64)
    s = _weight_scale(tops_ptr)
    tl.store(scale_ptr + row, s)
    to = out_ptr + row * out_row
    if R > 0:
        o_r = tl.arange(0, P)
        mask = o_r < R
        j = _exponent(tl.load(tops_ptr + 1 + o_r, mask, 0.0), s, LOG2)
        v = tl.load(S_ptr + row * S_j + o_r.to(tl.int64) * S_r, mask, 0.0).to(tl.float32)
        v = v * _power_of_2(-j) * tl.div_rn(tl.zeros_like(s) + 1.0, s)
        hi = _on_grid(v)
        tl.store(to + o_r, hi.to(tl.float8e4nv), mask)
        tl.store(to + R + o_r, hi.to(tl.float8e4nv), mask)
        tl.store(to + 2 * R + o_r, _to_e4m3(v - hi, EXACT), mask)
    if F > 3 * R:
        o_f = 3 * R + tl.arange(0, PF)
        tl.store(to + o_f, tl.zeros([PF], tl.float32).to(tl.float8e4nv), o_f < F)


def _runs(weight: Weight) -> bool:
    if isinstance(weight, Quantised4bit):
        return use_triton(weight.code)
    return use_triton(weight) and weight.dtype in kernel_dtypes


def _parts(w: Quantised4bit) -> tuple[Tensor, ...]:
    """Pointers of a kernel's code, absmax, code2, absmax2 and offset."""
    rest = (w.code2, w.absmax2, w.offset)
    return (w.code, w.absmax, *(w.code if part is None else part for part in rest))


def weight_top(weight: Weight, tops: Tensor) -> None:
    """Raises `tops[0]` to the weight's largest |element|; `tops` [>= 1] fp32, at least 0."""
    if not _runs(weight):
        tops[0] = torch.maximum(tops[0], weight_top_reference(weight))
        return
    bits = tops.view(torch.int32)
    with launch_device(tops):
        if isinstance(weight, Quantised4bit):
            blocks = weight.absmax.numel()
            _top_4bit_kernel[(cdiv(blocks, _TOP_TILE),)](
                *_parts(weight), bits, blocks, BLOCKSIZE2=weight.blocksize2 or 1,
                NESTED=weight.nested, TILE=_TOP_TILE, num_warps=8, enable_fp_fusion=False,
            )  # fmt: skip
        else:
            flat = weight.contiguous()
            programs = min(_TOP_PROGRAMS, cdiv(flat.numel(), _TOP_TILE))
            _top_kernel[(programs,)](
                flat, bits, flat.numel(), PROGRAMS=programs, TILE=_TOP_TILE, num_warps=8
            )


def codes(weight: Weight, tops: Tensor, out: Tensor) -> None:
    """Writes W8 into `out` [N, K], e4m3, of any row stride; the scale is that of `tops[0]`."""
    N, K = weight.shape
    if not _runs(weight):
        out.copy_(codes_reference(weight, tops))
        return
    with launch_device(out):
        if isinstance(weight, Quantised4bit):
            tile = next((n for n in _TILES if K % n == 0), min(_TILES[0], next_power_of_2(K)))
            _codes_4bit_kernel[(N, cdiv(K, tile))](
                weight.packed, *_parts(weight), tops, out, out.stride(0),
                K=K, BLOCKSIZE=weight.blocksize, BLOCKSIZE2=weight.blocksize2 or 1,
                BYTES=tile // 2, NESTED=weight.nested, EVEN=K % tile == 0,
                EXACT=interpreting(), num_warps=max(1, tile // 512), enable_fp_fusion=False,
            )  # fmt: skip
        else:
            rows = weight if weight.stride(1) == 1 else weight.contiguous()
            block = min(_TILES[0], next_power_of_2(K))
            _codes_kernel[(N, cdiv(K, block))](
                rows, tops, out, rows.stride(0), out.stride(0), K=K, BLOCK=block,
                EXACT=interpreting(), num_warps=max(1, block // 512),
            )  # fmt: skip


def codes_transposed(weight: Weight, tops: Tensor, out: Tensor) -> None:
    """Writes W8^T into `out` [K, N], e4m3, a row stride in whole `_ROW` bytes.

    Raises:
        ValueError: of another row stride.
    """
    N, K = weight.shape
    if out.stride(0) % _ROW:
        raise ValueError(f"out needs a row stride of a multiple of {_ROW}, got {out.stride(0)}")
    if not _runs(weight):
        out.copy_(codes_reference(weight, tops).t())
        return
    words = out.view(torch.int32)
    packed = isinstance(weight, Quantised4bit)
    block_n, block_k, warps = _TRANSPOSED_4BIT if packed else _TRANSPOSED
    grid = (cdiv(K, block_k), cdiv(N, block_n))
    with launch_device(out):
        if isinstance(weight, Quantised4bit):
            one_block = K % weight.blocksize == 0 and weight.blocksize % block_k == 0
            _codes_transposed_4bit_kernel[grid](
                weight.packed, *_parts(weight), tops, words, N, words.stride(0),
                K=K, BLOCKSIZE=weight.blocksize, BLOCKSIZE2=weight.blocksize2 or 1,
                BLOCK_N=block_n, BLOCK_K=block_k, NESTED=weight.nested, LONG=N * K >= 2**31,
                ONE_BLOCK=one_block, EXACT=interpreting(), num_warps=warps,
                enable_fp_fusion=False,
            )  # fmt: skip
        else:
            rows = weight if weight.stride(1) == 1 else weight.contiguous()
            _codes_transposed_kernel[grid](
                rows, tops, words, N, rows.stride(0), words.stride(0), K=K,
                BLOCK_N=block_n, BLOCK_K=block_k, EXACT=interpreting(), num_warps=warps,
            )  # fmt: skip


def column_tops(S: Tensor, tops: Tensor) -> None:
    """Raises `tops` [R] fp32, at least 0, to the largest |element| of each column of S [J, R]."""
    J, R = S.shape
    if not use_triton(S):
        column_tops_reference(S, tops)
        return
    P = next_power_of_2(R)
    block = max(1, min(128, _FOLD_TILE // P))
    with launch_device(S):
        _column_tops_kernel[(cdiv(J, block),)](
            S, tops.view(torch.int32), J, *S.stride(), R=R, P=P, BLOCK_J=block
        )


def fold(
    S: Tensor | None,  # [J, >= R], any strides; None for R = 0
    rank: int,  # R
    tops: Tensor,  # [1 + R] fp32
    log2: int,
    out: Tensor,  # [J, F] e4m3, any row stride
    scale: Tensor,  # [1, J] fp32
) -> None:
    """Writes the fold of S into `out`, and the weight's scale into every element of `scale`."""
    J, F = out.shape
    if not use_triton(scale):
        fold_reference(S, rank, tops, log2, out, scale)
        return
    P, PF = next_power_of_2(max(rank, 1)), next_power_of_2(max(F - 3 * rank, 1))
    given = tops if S is None else S
    strides = (0, 0) if S is None else S.stride()
    assert out.dtype == E4M3 and scale.is_contiguous()
    with launch_device(scale):
        _fold_kernel[(J,)](
            given, tops, out, scale, *strides, out.stride(0), R=rank, F=F, P=P, PF=PF,
            LOG2=log2, EXACT=interpreting(),
            num_warps=min(4, max(1, max(P, PF) // 32)), enable_fp_fusion=False,
        )  # fmt: skip
