r"""A frozen weight in FP8, written anew in each pass: for the forward GEMM and, transposed, for dX.

    W[n, k] ≈ s * W8[n, k]        s = max |W| / 448, one for all weights of a group

    codes             W8           [N, K]       beside it the fold of B [N, R]
    codes transposed  W8^T         [K, N]       beside it the fold of A^T [K, R]

Hopper multiplies FP8 operands only if the contracted dimension is contiguous in both, so dX = dY W
needs W8^T in memory. Both passes use the very same codes and scale.

One s serves as well as one a row: e4m3 is a floating-point format, so a row's noise relative to the
row does not depend on its scale until its elements are subnormal, 2^-15 of the largest. It spares
dX = (dY s) W8 a factor for each column of dY, a vector twice as long in bytes as dY's row.

The fold of S [J, R] is [hi(S / cs) | hi(S / cs) | lo(S / cs) | 0] (see `fp8`).
"""

from collections.abc import Sequence

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
from lorafuse.kernels.fp8_tops import absmax, runs
from lorafuse.kernels.nf4 import Quantised4bit, _scales, pointers, same_layout
from lorafuse.kernels.nf4 import reference as dequantised
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
    "codes",
    "codes_reference",
    "codes_transposed",
    "fold",
    "fold_reference",
]

Weight = Tensor | Quantised4bit

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


def codes_reference(weight: Weight, tops: Tensor) -> Tensor:
    """The definition of `codes`: W8 [N, K]."""
    inverse = 1 / weight_scale(tops)
    if not isinstance(weight, Quantised4bit):
        return e4m3(weight.float() * inverse)
    w = Quantised4bit(
        weight.packed, weight.code, _scales(weight) * inverse, weight.blocksize, weight.shape
    )
    return e4m3(dequantised(w))


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
def _codes_tile(
    row, w_ptr, w_row, inverse, to, K: tl.constexpr, BLOCK: tl.constexpr, EXACT: tl.constexpr
):
    """BLOCK columns of one row."""
    o_k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    w = tl.load(w_ptr + row.to(tl.int64) * w_row + o_k, o_k < K, 0.0).to(tl.float32) * inverse
    tl.store(to + o_k, _to_e4m3(w, EXACT), o_k < K)


@triton.jit
def _inverse_scale(tops_ptr):
    scale = _weight_scale(tops_ptr)
    return tl.div_rn(tl.zeros_like(scale) + 1.0, scale)


@cached_launch
@triton.jit
def _codes_kernel(
    w1, w2, w3, tops_ptr, out_ptr, row1, row2, row3, end1, end2, out_row,
    K: tl.constexpr, BLOCK: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Rows of out up to end1 are the first weight's, up to end2 the second's."""
    row = tl.program_id(0)
    inverse = _inverse_scale(tops_ptr)
    to = out_ptr + row.to(tl.int64) * out_row
    if row < end1:
        _codes_tile(row, w1, row1, inverse, to, K, BLOCK, EXACT)
    elif row < end2:
        _codes_tile(row - end1, w2, row2, inverse, to, K, BLOCK, EXACT)
    else:
        _codes_tile(row - end2, w3, row3, inverse, to, K, BLOCK, EXACT)


@triton.jit
def _codes_4bit_tile(
    row, packed_ptr, code_ptr, absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, inverse, to,
    K: tl.constexpr, BLOCKSIZE: tl.constexpr, BLOCKSIZE2: tl.constexpr, BYTES: tl.constexpr,
    NESTED: tl.constexpr, EVEN: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """BYTES packed bytes of one row: out of a flat index, Triton would store single bytes."""
    o_byte = tl.program_id(1) * BYTES + tl.arange(0, BYTES)
    o_k = tl.program_id(1) * (2 * BYTES) + tl.arange(0, 2 * BYTES)
    m_byte, m_k = None, None
    if not EVEN:
        m_byte, m_k = o_byte < K // 2, o_k < K
    at = row.to(tl.int64) * (K // 2) + o_byte
    scale = absmax(
        absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, (at // (BLOCKSIZE // 2)).to(tl.int32),
        m_byte, BLOCKSIZE2, NESTED,
    )  # fmt: skip
    scale *= inverse
    byte = tl.load(packed_ptr + at, m_byte).to(tl.int32)
    high = tl.load(code_ptr + (byte >> 4), m_byte) * scale
    low = tl.load(code_ptr + (byte & 15), m_byte) * scale
    tl.store(to + o_k, _to_e4m3(tl.interleave(high, low), EXACT), m_k)


@cached_launch
@triton.jit
def _codes_4bit_kernel(
    packed1, code1, absmax1, code2_1, absmax2_1, offset1,
    packed2, code2, absmax2, code2_2, absmax2_2, offset2,
    packed3, code3, absmax3, code2_3, absmax2_3, offset3,
    tops_ptr, out_ptr, end1, end2, out_row,
    K: tl.constexpr, BLOCKSIZE: tl.constexpr, BLOCKSIZE2: tl.constexpr, BYTES: tl.constexpr,
    NESTED: tl.constexpr, EVEN: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """As `_codes_kernel`. Each weight has its branch, as in `nf4._dequantise_rows_kernel`."""
    row = tl.program_id(0)
    inverse = _inverse_scale(tops_ptr)
    to = out_ptr + row.to(tl.int64) * out_row
    if row < end1:
        _codes_4bit_tile(
            row, packed1, code1, absmax1, code2_1, absmax2_1, offset1, inverse, to,
            K, BLOCKSIZE, BLOCKSIZE2, BYTES, NESTED, EVEN, EXACT,
        )  # fmt: skip
    elif row < end2:
        _codes_4bit_tile(
            row - end1, packed2, code2, absmax2, code2_2, absmax2_2, offset2, inverse, to,
            K, BLOCKSIZE, BLOCKSIZE2, BYTES, NESTED, EVEN, EXACT,
        )  # fmt: skip
    else:
        _codes_4bit_tile(
            row - end2, packed3, code3, absmax3, code2_3, absmax2_3, offset3, inverse, to,
            K, BLOCKSIZE, BLOCKSIZE2, BYTES, NESTED, EVEN, EXACT,
        )  # fmt: skip


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


@triton.jit
def _transposed_tile(
    tile, w_ptr, inverse, out_ptr, N, w_row, out_row,
    K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """BLOCK_N rows and BLOCK_K columns of W."""
    n_first, k_first = tile * BLOCK_N, tl.program_id(0) * BLOCK_K
    o_n = (n_first + 4 * tl.arange(0, BLOCK_N // 4))[:, None]
    o_k = (k_first + tl.arange(0, BLOCK_K))[None, :]
    word = tl.zeros([BLOCK_N // 4, BLOCK_K], tl.uint32)
    for i in tl.static_range(4):
        mask = (o_n < N) & (o_k < K)
        w = tl.load(w_ptr + (o_n + i).to(tl.int64) * w_row + o_k, mask, 0.0).to(tl.float32)
        word = _code_word(_to_e4m3(w * inverse, EXACT), word, i)
    q_first = tile * (BLOCK_N // 4)
    _store_transposed(out_ptr, word, q_first, k_first, N, out_row, K, BLOCK_N, BLOCK_K)


@cached_launch
@triton.jit
def _codes_transposed_kernel(
    w1, w2, w3, tops_ptr, out_ptr, N1, N2, N3, row1, row2, row3, start2, start3, end1, end2,
    out_row, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Tiles of the first weight up to end1, of the second up to end2; `start`: their column of out,
    in words."""
    tile = tl.program_id(1)
    inverse = _inverse_scale(tops_ptr)
    if tile < end1:
        _transposed_tile(
            tile, w1, inverse, out_ptr, N1, row1, out_row, K, BLOCK_N, BLOCK_K, EXACT
        )  # fmt: skip
    elif tile < end2:
        _transposed_tile(
            tile - end1, w2, inverse, out_ptr + start2, N2, row2, out_row,
            K, BLOCK_N, BLOCK_K, EXACT,
        )  # fmt: skip
    else:
        _transposed_tile(
            tile - end2, w3, inverse, out_ptr + start3, N3, row3, out_row,
            K, BLOCK_N, BLOCK_K, EXACT,
        )  # fmt: skip


@triton.jit
def _transposed_4bit_tile(
    tile, packed_ptr, code_ptr, absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, inverse, out_ptr,
    N, out_row,
    K: tl.constexpr, BLOCKSIZE: tl.constexpr, BLOCKSIZE2: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, NESTED: tl.constexpr, LONG: tl.constexpr,
    ONE_BLOCK: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """BLOCK_N rows and BLOCK_K columns of W."""
    n_first, k_first = tile * BLOCK_N, tl.program_id(0) * BLOCK_K
    o_n = (n_first + 4 * tl.arange(0, BLOCK_N // 4))[:, None]
    o_byte = (tl.program_id(0) * (BLOCK_K // 2) + tl.arange(0, BLOCK_K // 2))[None, :]
    if LONG:  # N * K needs 64 bits
        o_n = o_n.to(tl.int64)
    word = tl.zeros([BLOCK_N // 4, BLOCK_K], tl.uint32)
    for i in tl.static_range(4):
        mask = (o_n < N) & (o_byte < K // 2)
        at = (o_n + i) * (K // 2) + o_byte
        if ONE_BLOCK:  # a gather for each row of the tile; for each byte, lanes would read 8 lines
            o_block = (o_n + i) * (K // BLOCKSIZE) + k_first // BLOCKSIZE
            m_block = o_n < N
        else:
            o_block, m_block = at // (BLOCKSIZE // 2), mask
        scale = absmax(
            absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, o_block, m_block, BLOCKSIZE2, NESTED
        )
        scale *= inverse
        byte = tl.load(packed_ptr + at, mask, 0).to(tl.int32)
        high = tl.load(code_ptr + (byte >> 4)) * scale
        low = tl.load(code_ptr + (byte & 15)) * scale
        word = _code_word(_to_e4m3(tl.interleave(high, low), EXACT), word, i)
    q_first = tile * (BLOCK_N // 4)
    _store_transposed(out_ptr, word, q_first, k_first, N, out_row, K, BLOCK_N, BLOCK_K)


@cached_launch
@triton.jit
def _codes_transposed_4bit_kernel(
    packed1, code1, absmax1, code2_1, absmax2_1, offset1,
    packed2, code2, absmax2, code2_2, absmax2_2, offset2,
    packed3, code3, absmax3, code2_3, absmax2_3, offset3,
    tops_ptr, out_ptr, N1, N2, N3, start2, start3, end1, end2, out_row,
    K: tl.constexpr, BLOCKSIZE: tl.constexpr, BLOCKSIZE2: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, NESTED: tl.constexpr, LONG: tl.constexpr,
    ONE_BLOCK: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """As `_codes_transposed_kernel`."""
    tile = tl.program_id(1)
    inverse = _inverse_scale(tops_ptr)
    if tile < end1:
        _transposed_4bit_tile(
            tile, packed1, code1, absmax1, code2_1, absmax2_1, offset1, inverse,
            out_ptr, N1, out_row,
            K, BLOCKSIZE, BLOCKSIZE2, BLOCK_N, BLOCK_K, NESTED, LONG, ONE_BLOCK, EXACT,
        )  # fmt: skip
    elif tile < end2:
        _transposed_4bit_tile(
            tile - end1, packed2, code2, absmax2, code2_2, absmax2_2, offset2, inverse,
            out_ptr + start2, N2, out_row,
            K, BLOCKSIZE, BLOCKSIZE2, BLOCK_N, BLOCK_K, NESTED, LONG, ONE_BLOCK, EXACT,
        )  # fmt: skip
    else:
        _transposed_4bit_tile(
            tile - end2, packed3, code3, absmax3, code2_3, absmax2_3, offset3, inverse,
            out_ptr + start3, N3, out_row,
            K, BLOCKSIZE, BLOCKSIZE2, BLOCK_N, BLOCK_K, NESTED, LONG, ONE_BLOCK, EXACT,
        )  # fmt: skip


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


def _together(weights: Sequence[Weight]) -> bool:
    """Whether one launch serves all: up to three, of floats or of one layout of 4 bits."""
    packed = [w for w in weights if isinstance(w, Quantised4bit)]
    if len(weights) > 3 or not all(runs(w) for w in weights):
        return False
    return not packed or (len(packed) == len(weights) and same_layout(packed))


def _rows(weights: Sequence[Weight]) -> list[Tensor]:
    """Float weights with contiguous rows, three of them; those that are missing are never read."""
    rows = [w if w.stride(1) == 1 else w.contiguous() for w in weights if isinstance(w, Tensor)]
    return [*rows, *rows[:1] * 2][:3]


def _packed(weights: Sequence[Weight]) -> list[Tensor]:
    """As `_rows`: each weight's packed bytes and `nf4.pointers`."""
    given = [(w.packed, *pointers(w)) for w in weights if isinstance(w, Quantised4bit)]
    return [x for tensors in [*given, *given[:1] * 2][:3] for x in tensors]


def codes(
    weights: Sequence[Weight],  # of [N_i, K]
    tops: Tensor,  # [>= 1] fp32; the scale is that of tops[0]
    out: Tensor,  # [N, K] e4m3, any row stride
) -> None:
    """Writes [W8_1; W8_2; ...] into `out`."""
    sizes, K = [w.shape[0] for w in weights], out.shape[1]
    if not _together(weights):
        for weight, part in zip(weights, out.split(sizes), strict=True):
            if runs(weight):
                codes([weight], tops, part)
            else:
                part.copy_(codes_reference(weight, tops))
        return
    one, end1 = weights[0], sizes[0]
    end2 = end1 + sum(sizes[1:2])
    with launch_device(out):
        if isinstance(one, Quantised4bit):
            tile = next((n for n in _TILES if K % n == 0), min(_TILES[0], next_power_of_2(K)))
            _codes_4bit_kernel[(sum(sizes), cdiv(K, tile))](
                *_packed(weights), tops, out, end1, end2, out.stride(0),
                K=K, BLOCKSIZE=one.blocksize, BLOCKSIZE2=one.blocksize2 or 1,
                BYTES=tile // 2, NESTED=one.nested, EVEN=K % tile == 0,
                EXACT=interpreting(), num_warps=max(1, tile // 512), enable_fp_fusion=False,
            )  # fmt: skip
        else:
            rows = _rows(weights)
            block = min(_TILES[0], next_power_of_2(K))
            _codes_kernel[(sum(sizes), cdiv(K, block))](
                *rows, tops, out, *(w.stride(0) for w in rows), end1, end2, out.stride(0),
                K=K, BLOCK=block, EXACT=interpreting(), num_warps=max(1, block // 512),
            )  # fmt: skip


def codes_transposed(
    weights: Sequence[Weight],  # of [N_i, K]
    tops: Tensor,  # as in `codes`
    out: Tensor,  # [K, N] e4m3, a row stride in whole `_ROW` bytes
) -> None:
    """Writes [W8_1^T | W8_2^T | ...] into `out`.

    Raises:
        ValueError: of another row stride.
    """
    sizes, K = [w.shape[0] for w in weights], out.shape[0]
    if out.stride(0) % _ROW:
        raise ValueError(f"out needs a row stride of a multiple of {_ROW}, got {out.stride(0)}")
    # A weight that begins within a `_ROW` gets a launch with a pointer of its own.
    if not _together(weights) or any(n % _ROW for n in sizes[:-1]):
        for weight, part in zip(weights, out.split(sizes, 1), strict=True):
            if runs(weight):
                codes_transposed([weight], tops, part)
            else:
                part.copy_(codes_reference(weight, tops).t())
        return
    words = out.view(torch.int32)
    one = weights[0]
    block_n, block_k, warps = _TRANSPOSED_4BIT if isinstance(one, Quantised4bit) else _TRANSPOSED
    N1, N2, N3 = [*sizes, 0, 0][:3]
    end1 = cdiv(N1, block_n)
    end2 = end1 + cdiv(N2, block_n)
    grid = (cdiv(K, block_k), end2 + cdiv(N3, block_n))
    starts = N1 // 4, (N1 + N2) // 4
    with launch_device(out):
        if isinstance(one, Quantised4bit):
            one_block = K % one.blocksize == 0 and one.blocksize % block_k == 0
            _codes_transposed_4bit_kernel[grid](
                *_packed(weights), tops, words, N1, N2, N3, *starts, end1, end2, words.stride(0),
                K=K, BLOCKSIZE=one.blocksize, BLOCKSIZE2=one.blocksize2 or 1,
                BLOCK_N=block_n, BLOCK_K=block_k, NESTED=one.nested,
                LONG=max(sizes) * K >= 2**31, ONE_BLOCK=one_block, EXACT=interpreting(),
                num_warps=warps, enable_fp_fusion=False,
            )  # fmt: skip
        else:
            rows = _rows(weights)
            _codes_transposed_kernel[grid](
                *rows, tops, words, N1, N2, N3, *(w.stride(0) for w in rows),
                *starts, end1, end2, words.stride(0), K=K,
                BLOCK_N=block_n, BLOCK_K=block_k, EXACT=interpreting(), num_warps=warps,
            )  # fmt: skip


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
