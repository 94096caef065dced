"""Dequantisation of bitsandbytes' 4-bit weights (nf4, fp4), single and double quantised.

    W[j] = code[nibble(j)] * absmax[j // blocksize]                        j: flat index in [N, K]
    absmax[b] = code2[absmax_uint8[b]] * absmax2[b // blocksize2] + offset         double quantised

nibble(2i) is the high half of byte i and nibble(2i + 1) the low half. Everything is fp32, each
operation rounded as bitsandbytes rounds it, and W is rounded once more, at its store. One pass
reads half a byte and writes one element of `out` for each of W: 2.5 bytes in bf16.

bitsandbytes 0.50.2's own CPU kernel puts scales on the wrong elements where K is not a multiple of
blocksize (its CUDA kernel and its torch fallback do not); this file follows the definition.

Dettmers et al., "QLoRA", 2023, https://arxiv.org/abs/2305.14314
Layout: bitsandbytes 0.50.2, `functional.QuantState` and `backends/default/ops.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorafuse.kernels.runtime import cached_launch, cdiv, launch_device, tl, triton, use_triton

__all__ = [
    "Quantised4bit",
    "dequantise",
    "dequantise_experts",
    "dequantise_rows",
    "reference",
    "same_layout",
]

# Packed bytes of one tile: 8 a thread at 8 warps, which make two 16-byte stores of a 16-bit `out`.
# Half of it stores without a trip through shared memory, but leaves too few bytes in flight.
_TILE_BYTES = 2048


@dataclass(frozen=True, eq=False)
class Quantised4bit:
    """A weight W [N, K] in 4 bits, as bitsandbytes keeps it.

    Raises:
        ValueError: the parts do not fit together.
    """

    packed: Tensor  # uint8 [ceil(N * K / 2)], flat, high nibble first
    code: Tensor  # fp32 [16]
    absmax: Tensor  # [ceil(N * K / blocksize)]: fp32, or uint8 when nested
    blocksize: int
    shape: tuple[int, int]  # (N, K)
    code2: Tensor | None = None  # fp32 [256]
    absmax2: Tensor | None = None  # fp32 [ceil(blocks / blocksize2)]
    offset: Tensor | None = None  # fp32 scalar
    blocksize2: int | None = None

    def __post_init__(self) -> None:
        elements = self.shape[0] * self.shape[1]
        blocks = -(-elements // self.blocksize)
        expected = {"packed": -(-elements // 2), "code": 16, "absmax": blocks}
        dtypes = {"packed": torch.uint8, "code": torch.float32, "absmax": torch.float32}
        parts = (self.code2, self.absmax2, self.offset, self.blocksize2)
        if self.nested:
            if self.blocksize2 is None or any(part is None for part in parts):
                raise ValueError(
                    "a nested weight (uint8 absmax) needs code2, absmax2, offset and blocksize2; "
                    "some of them are None"
                )
            expected |= {"code2": 256, "absmax2": -(-blocks // self.blocksize2), "offset": 1}
            dtypes |= dict.fromkeys(("code2", "absmax2", "offset"), torch.float32)
            dtypes["absmax"] = torch.uint8
        if self.blocksize < 2 or self.blocksize & (self.blocksize - 1):
            raise ValueError(f"blocksize must be a power of two, got {self.blocksize}")
        for name, length in expected.items():
            tensor: Tensor = getattr(self, name)
            if (
                tensor.numel() != length
                or tensor.dtype != dtypes[name]
                or not tensor.is_contiguous()
            ):
                raise ValueError(
                    f"{name} of a {self.shape} weight must be {length} contiguous elements of "
                    f"{dtypes[name]}, got {tuple(tensor.shape)} of {tensor.dtype}"
                )

    @property
    def nested(self) -> bool:
        """True when the block scales are quantised too (bitsandbytes' `compress_statistics`)."""
        return self.absmax.dtype == torch.uint8


def reference(w: Quantised4bit) -> Tensor:
    """The definition: W in fp32, [N, K]."""
    N, K = w.shape
    absmax = _scales(w)
    # One gather of a byte's two values costs half of two gathers of one value each.
    pairs = torch.stack((w.code.repeat_interleave(16), w.code.repeat(16)), -1)
    values = pairs[w.packed.flatten().int()].flatten()[: N * K]
    whole = N * K // w.blocksize * w.blocksize
    scaled = values[:whole].view(-1, w.blocksize) * absmax[: whole // w.blocksize, None]
    if whole == N * K:
        return scaled.view(N, K)
    return torch.cat((scaled.flatten(), values[whole:] * absmax[-1])).view(N, K)


def _scales(w: Quantised4bit) -> Tensor:
    """absmax, fp32 [blocks]."""
    absmax = w.absmax.flatten()
    if w.code2 is None or w.absmax2 is None or w.offset is None or w.blocksize2 is None:
        return absmax
    absmax2 = w.absmax2.flatten().repeat_interleave(w.blocksize2)[: absmax.numel()]
    return w.code2[absmax.int()] * absmax2 + w.offset


@triton.jit
def _dequantise_tile(
    tile, packed_ptr, code_ptr, absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, out_ptr,
    elements, out_row,
    K: tl.constexpr, BLOCKSIZE: tl.constexpr, BLOCKSIZE2: tl.constexpr, BYTES: tl.constexpr,
    NESTED: tl.constexpr, EVEN: tl.constexpr, gap=0, GROUP: tl.constexpr = 0,
):  # fmt: skip
    """BYTES packed bytes, in one dimension: a [blocks, blocksize] tile was 20 times slower on H100.

    The scale is gathered once a byte; neighbours share it, so it comes from the cache. After every
    GROUP rows of W, `gap` elements of out are left as they are.
    """
    # The tile's start is int64 and scalar; offsets within it, and the number of blocks, fit int32.
    first = tile.to(tl.int64) * (2 * BYTES)
    o_byte = tl.arange(0, BYTES)
    o_element = tl.arange(0, 2 * BYTES)
    o_block = (first // BLOCKSIZE).to(tl.int32) + o_byte * 2 // BLOCKSIZE
    m_byte, m_element = None, None
    # Masks only where the last tile is cut: elsewhere they would narrow the accesses.
    if not EVEN:
        m_byte = first + o_byte * 2 < elements
        m_element = first + o_element < elements

    scale = tl.load(absmax_ptr + o_block, m_byte)
    if NESTED:
        scale = tl.load(code2_ptr + scale.to(tl.int32), m_byte)
        scale = scale * tl.load(absmax2_ptr + o_block // BLOCKSIZE2, m_byte) + tl.load(offset_ptr)
    byte = tl.load(packed_ptr + first // 2 + o_byte, m_byte).to(tl.int32)
    high = tl.load(code_ptr + (byte >> 4), m_byte) * scale
    low = tl.load(code_ptr + (byte & 15), m_byte) * scale
    dtype = out_ptr.dtype.element_ty
    w = tl.interleave(high, low).to(dtype)

    column = (first % K).to(tl.int32) + o_element
    row = first // K + column // K
    place = row * out_row + column % K
    if GROUP > 0:
        place += row // GROUP * gap
    tl.store(out_ptr + place, w, m_element)


@cached_launch
@triton.jit
def _dequantise_kernel(
    packed_ptr, code_ptr, absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, out_ptr,
    elements, out_row, gap,  # N * K; row stride of out; what is skipped after GROUP rows
    K: tl.constexpr, BLOCKSIZE: tl.constexpr, BLOCKSIZE2: tl.constexpr, BYTES: tl.constexpr,
    NESTED: tl.constexpr, EVEN: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    _dequantise_tile(
        tl.program_id(0), packed_ptr, code_ptr, absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr,
        out_ptr, elements, out_row, K, BLOCKSIZE, BLOCKSIZE2, BYTES, NESTED, EVEN, gap, GROUP,
    )  # fmt: skip


@cached_launch
@triton.jit
def _dequantise_rows_kernel(
    packed1, code1, absmax1, code2_1, absmax2_1, offset1,
    packed2, code2, absmax2, code2_2, absmax2_2, offset2,
    packed3, code3, absmax3, code2_3, absmax2_3, offset3,
    out_ptr, elements1, elements2, elements3, start2, start3, tiles1, tiles2, out_row,
    K: tl.constexpr, BLOCKSIZE: tl.constexpr, BLOCKSIZE2: tl.constexpr, BYTES: tl.constexpr,
    NESTED: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """A tile of one of two or three weights; `start`: where its rows begin, in elements of out.

    A branch of its own for each weight: the whole program takes one of them, and each pointer is an
    argument of the kernel, whose alignment the compiler knows.
    """
    tile = tl.program_id(0)
    if tile < tiles1:
        _dequantise_tile(
            tile, packed1, code1, absmax1, code2_1, absmax2_1, offset1,
            out_ptr, elements1, out_row, K, BLOCKSIZE, BLOCKSIZE2, BYTES, NESTED, EVEN,
        )  # fmt: skip
    elif tile < tiles1 + tiles2:
        _dequantise_tile(
            tile - tiles1, packed2, code2, absmax2, code2_2, absmax2_2, offset2,
            out_ptr + start2, elements2, out_row, K, BLOCKSIZE, BLOCKSIZE2, BYTES, NESTED, EVEN,
        )  # fmt: skip
    else:
        _dequantise_tile(
            tile - tiles1 - tiles2, packed3, code3, absmax3, code2_3, absmax2_3, offset3,
            out_ptr + start3, elements3, out_row, K, BLOCKSIZE, BLOCKSIZE2, BYTES, NESTED, EVEN,
        )  # fmt: skip


def pointers(w: Quantised4bit) -> tuple[Tensor, ...]:
    """A kernel's code, absmax, code2, absmax2 and offset; where one is None, any pointer."""
    code = w.code
    if w.code2 is None or w.absmax2 is None or w.offset is None:
        return code, w.absmax, code, code, code
    return code, w.absmax, w.code2, w.absmax2, w.offset


def same_layout(weights: Sequence[Quantised4bit]) -> bool:
    """Whether one kernel serves all of them: they differ in N and in their values only."""
    first = weights[0]
    kind = first.shape[1], first.blocksize, first.blocksize2, first.absmax.dtype
    return all(
        (w.shape[1], w.blocksize, w.blocksize2, w.absmax.dtype) == kind
        and w.packed.device == first.packed.device
        for w in weights[1:]
    )


def _check(out: Tensor, w: Quantised4bit, shape: tuple[int, int]) -> None:
    if out.shape != shape or out.device != w.packed.device:
        raise ValueError(
            f"out must be {shape} on {w.packed.device} as the weight is, "
            f"got {tuple(out.shape)} on {out.device}"
        )
    if shape[1] > 1 and out.stride(1) != 1:
        raise ValueError(f"out must have contiguous rows, got strides {out.stride()}")


def dequantise(
    w: Quantised4bit,
    out: Tensor,  # [N, K], any row stride; fp32, fp16 or bf16 (fp64: on the torch path)
) -> None:
    """Write W into `out`.

    Raises:
        ValueError: `out` has another shape or device than W, or rows that are not contiguous.
    """
    N, K = w.shape
    _check(out, w, w.shape)
    if not use_triton(out):
        out.copy_(reference(w))
        return
    if N * K:
        _launch(w, out, out.stride(0), 0, 0)


def _launch(w: Quantised4bit, out: Tensor, row: int, gap: int, group: int) -> None:
    N, K = w.shape
    tile = max(2 * _TILE_BYTES, w.blocksize)
    with launch_device(out):
        # fp fusion off: bitsandbytes rounds the product before it adds the offset.
        _dequantise_kernel[(cdiv(N * K, tile),)](
            w.packed, *pointers(w), out, N * K, row, gap,
            K=K, BLOCKSIZE=w.blocksize, BLOCKSIZE2=w.blocksize2 or 1, BYTES=tile // 2,
            NESTED=w.nested, EVEN=N * K % tile == 0, GROUP=group, num_warps=8,
            enable_fp_fusion=False,
        )  # fmt: skip


def dequantise_experts(
    w: Quantised4bit,  # of [E * N, K]: E weights, one below the other
    out: Tensor,  # [E, N, K], of any strides but the last; as in `dequantise`
) -> None:
    """Writes W, expert by expert, into `out`, which may lie in a wider and taller buffer.

    Raises:
        ValueError: as `dequantise`.
    """
    E, N, K = out.shape
    if (E * N, K) != w.shape or out.device != w.packed.device or (K > 1 and out.stride(2) != 1):
        raise ValueError(
            f"out must be [E, N, K] of a {w.shape} weight on {w.packed.device}, with contiguous "
            f"rows; got {tuple(out.shape)} on {out.device} with strides {out.stride()}"
        )
    if not use_triton(out):
        out.copy_(reference(w).view(E, N, K))
    elif E * N * K:
        row = out.stride(1)
        _launch(w, out, row, out.stride(0) - N * row, N)


def dequantise_rows(
    weights: Sequence[Quantised4bit],  # of [N_i, K]
    out: Tensor,  # [N, K], N the sum of the N_i; as in `dequantise`
) -> None:
    """Writes [W_1; W_2; ...] into `out`: two or three weights of one layout in one launch.

    Raises:
        ValueError: as `dequantise`.
    """
    if len(weights) == 1:
        dequantise(weights[0], out)
        return
    K, sizes = weights[0].shape[1], [w.shape[0] for w in weights]
    _check(out, weights[0], (sum(sizes), K))
    if not (len(weights) <= 3 and K * min(sizes) and use_triton(out) and same_layout(weights)):
        first = 0
        for w, n in zip(weights, sizes, strict=True):
            dequantise(w, out[first : first + n])
            first += n
        return
    one = weights[0]
    tile = max(2 * _TILE_BYTES, one.blocksize)
    row, elements = out.stride(0), [n * K for n in sizes]
    tiles = [cdiv(n, tile) for n in elements]
    starts = sizes[0] * row, (sizes[0] + sizes[1]) * row
    # Where there is no third, any: no program takes its branch.
    given = [(w.packed, *pointers(w)) for w in (*weights, one)[:3]]
    with launch_device(out):
        _dequantise_rows_kernel[(sum(tiles),)](
            *given[0], *given[1], *given[2], out, *(*elements, 0)[:3], *starts, *tiles[:2], row,
            K=K, BLOCKSIZE=one.blocksize, BLOCKSIZE2=one.blocksize2 or 1, BYTES=tile // 2,
            NESTED=one.nested, EVEN=not any(n % tile for n in elements), num_warps=8,
            enable_fp_fusion=False,
        )  # fmt: skip
