r"""Largest magnitudes that FP8 scales follow from: of a group's weights, and of r-wide columns.

    tops[0]     = max over i of max |W_i|          W_i [N_i, K] frozen, 16/32-bit or 4-bit
    tops[1 + r] = max over j of |S[j, r]|          S [J, R]: B, or A^T

For 4 bits, max |W| is max |absmax| * max |code|, the most that the blocks can hold: it costs a pass
over the blocks' scales, 1/128 of the weight's bytes.

The frozen weights' part is computed anew in each pass, though it hardly ever changes. Who writes a
weight through `.data`, or gathers it into the same memory (FSDP), leaves no trace that could be
asked for, and a stale top would saturate codes without a word. In the launch that S needs anyway it
costs the host next to nothing.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lorafuse.kernels.nf4 import Quantised4bit, _scales, pointers, same_layout
from lorafuse.kernels.runtime import (
    cached_launch,
    cdiv,
    kernel_dtypes,
    launch_device,
    next_power_of_2,
    tl,
    triton,
    use_triton,
)

__all__ = ["absmax", "group_tops", "group_tops_reference", "runs"]

Weight = Tensor | Quantised4bit

_TILE = 4096
_PROGRAMS = 528  # 4 for each of a GPU's 132 multiprocessors
_COLUMN_TILE = 4096


def group_tops_reference(weights: Sequence[Weight], S: Tensor | None) -> Tensor:
    """The definition of `group_tops`."""
    tops = [
        _scales(w).abs().max() * w.code.abs().max()
        if isinstance(w, Quantised4bit)
        else w.abs().max().float()
        for w in weights
    ]
    top = torch.stack(tops).amax(0, keepdim=True)
    return top if S is None else torch.cat((top, S.float().abs().amax(0)))


@triton.jit
def _atomic_top(top_ptr, top, mask):
    # fp32 of one sign are ordered as their bits are.
    tl.atomic_max(top_ptr, top.to(tl.int32, bitcast=True), mask)


@triton.jit
def _columns(
    tile, S_ptr, tops_ptr, J, S_j, S_r, R: tl.constexpr, P: tl.constexpr, BLOCK_J: tl.constexpr
):
    """BLOCK_J rows of S, all columns."""
    if R > 0:
        o_j = (tile * BLOCK_J + tl.arange(0, BLOCK_J))[:, None]
        o_r = tl.arange(0, P)
        mask = (o_j < J) & (o_r[None, :] < R)
        v = tl.load(S_ptr + o_j.to(tl.int64) * S_j + o_r[None, :] * S_r, mask, 0.0)
        _atomic_top(tops_ptr + 1 + o_r, tl.max(tl.abs(v.to(tl.float32)), 0), o_r < R)


@triton.jit
def _elements(program, w_ptr, top_ptr, elements, PROGRAMS: tl.constexpr, TILE: tl.constexpr):
    """Every PROGRAMS-th tile of a flat weight."""
    if PROGRAMS > 0:
        o = program.to(tl.int64) * TILE + tl.arange(0, TILE)
        tops = tl.zeros([TILE], tl.float32)
        for start in range(0, elements, PROGRAMS * TILE):
            w = tl.load(w_ptr + start + o, start + o < elements, 0.0)
            tops = tl.maximum(tops, tl.abs(w.to(tl.float32)))
        top = tl.max(tops, 0)
        _atomic_top(top_ptr, top, top >= 0)


@cached_launch
@triton.jit
def _tops_kernel(
    w1, w2, w3, S_ptr, tops_ptr, elements1, elements2, elements3, J, S_j, S_r,
    P1: tl.constexpr, P2: tl.constexpr, P3: tl.constexpr, TILE: tl.constexpr,
    R: tl.constexpr, P: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """P1, P2 and P3 programs for the weights, and those of S."""
    program = tl.program_id(0)
    if program < P1:
        _elements(program, w1, tops_ptr, elements1, P1, TILE)
    elif program < P1 + P2:
        _elements(program - P1, w2, tops_ptr, elements2, P2, TILE)
    elif program < P1 + P2 + P3:
        _elements(program - P1 - P2, w3, tops_ptr, elements3, P3, TILE)
    else:
        _columns(program - P1 - P2 - P3, S_ptr, tops_ptr, J, S_j, S_r, R, P, BLOCK_J)


@triton.jit
def absmax(absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, o_block, mask,
           BLOCKSIZE2: tl.constexpr, NESTED: tl.constexpr):  # fmt: skip
    """Scales of 4-bit blocks, rounded as `nf4` rounds them."""
    scale = tl.load(absmax_ptr + o_block, mask)
    if NESTED:
        scale = tl.load(code2_ptr + scale.to(tl.int32), mask)
        scale = scale * tl.load(absmax2_ptr + o_block // BLOCKSIZE2, mask) + tl.load(offset_ptr)
    return scale


@triton.jit
def _blocks(
    tile, code_ptr, absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, top_ptr, blocks,
    BLOCKSIZE2: tl.constexpr, NESTED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """TILE blocks of a 4-bit weight."""
    o = tile * TILE + tl.arange(0, TILE)
    m = o < blocks
    scale = absmax(absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, o, m, BLOCKSIZE2, NESTED)
    top = tl.max(tl.where(m, tl.abs(scale), 0.0), 0)
    code = tl.max(tl.abs(tl.load(code_ptr + tl.arange(0, 16))), 0)
    _atomic_top(top_ptr, top * code, top >= 0)


@cached_launch
@triton.jit
def _tops_4bit_kernel(
    code1, absmax1, code2_1, absmax2_1, offset1,
    code2, absmax2, code2_2, absmax2_2, offset2,
    code3, absmax3, code2_3, absmax2_3, offset3,
    S_ptr, tops_ptr, blocks1, blocks2, blocks3, end1, end2, end3, J, S_j, S_r,
    BLOCKSIZE2: tl.constexpr, NESTED: tl.constexpr, TILE: tl.constexpr,
    R: tl.constexpr, P: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """The weights' tiles up to end1, end2 and end3, then those of S."""
    tile = tl.program_id(0)
    if tile < end1:
        _blocks(
            tile, code1, absmax1, code2_1, absmax2_1, offset1, tops_ptr, blocks1,
            BLOCKSIZE2, NESTED, TILE,
        )  # fmt: skip
    elif tile < end2:
        _blocks(
            tile - end1, code2, absmax2, code2_2, absmax2_2, offset2, tops_ptr, blocks2,
            BLOCKSIZE2, NESTED, TILE,
        )  # fmt: skip
    elif tile < end3:
        _blocks(
            tile - end2, code3, absmax3, code2_3, absmax2_3, offset3, tops_ptr, blocks3,
            BLOCKSIZE2, NESTED, TILE,
        )  # fmt: skip
    else:
        _columns(tile - end3, S_ptr, tops_ptr, J, S_j, S_r, R, P, BLOCK_J)


def runs(weight: Weight) -> bool:
    """Whether a Triton kernel reads this weight."""
    if isinstance(weight, Quantised4bit):
        return use_triton(weight.code)
    return use_triton(weight) and weight.dtype in kernel_dtypes


def group_tops(
    weights: Sequence[Weight],  # of [N_i, K]
    S: Tensor | None,  # [J, R], any strides
) -> Tensor:
    """[1 + R] fp32: the largest |element| of all weights, and of each column of S."""
    given = [*weights] if S is None else [*weights, S]
    if not all(runs(x) for x in given):
        return group_tops_reference(weights, S)
    at = weights[0]
    device = at.code.device if isinstance(at, Quantised4bit) else at.device
    tops = torch.zeros(1 if S is None else 1 + S.shape[1], dtype=torch.float32, device=device)
    bits = tops.view(torch.int32)
    packed = [w for w in weights if isinstance(w, Quantised4bit)]
    floats = [w for w in weights if isinstance(w, Tensor)]
    # One launch where the weights are of one kind, as they are in a model.
    each = 3 if packed and same_layout(packed) else 1
    with launch_device(tops):
        for i in range(0, len(packed), each):
            _launch_4bit(packed[i : i + each], S, bits)
            S = None
        for i in range(0, len(floats), 3):
            _launch(floats[i : i + 3], S, bits)
            S = None
    return tops


def _columns_of(
    S: Tensor | None, bits: Tensor
) -> tuple[int, Tensor, tuple[int, int, int], dict[str, int]]:
    """(programs, S or any pointer, its J and strides, the kernel's constants)."""
    if S is None or S.shape[1] == 0:
        return 0, bits, (0, 0, 0), {"R": 0, "P": 1, "BLOCK_J": 1}
    J, R = S.shape
    P = next_power_of_2(R)
    block = max(1, min(128, _COLUMN_TILE // P))
    strides = S.stride(0), S.stride(1)
    return cdiv(J, block), S, (J, *strides), {"R": R, "P": P, "BLOCK_J": block}


def _launch(weights: Sequence[Tensor], S: Tensor | None, bits: Tensor) -> None:
    programs, S_ptr, rest, constants = _columns_of(S, bits)
    flat = [w.contiguous() for w in weights]
    elements = [*(w.numel() for w in flat), 0, 0][:3]
    P1, P2, P3 = (min(_PROGRAMS, cdiv(n, _TILE)) for n in elements)
    w1, w2, w3 = [*flat, flat[0], flat[0]][:3]
    _tops_kernel[(P1 + P2 + P3 + programs,)](
        w1, w2, w3, S_ptr, bits, *elements, *rest,
        P1=P1, P2=P2, P3=P3, TILE=_TILE, **constants, num_warps=8,
    )  # fmt: skip


def _launch_4bit(weights: Sequence[Quantised4bit], S: Tensor | None, bits: Tensor) -> None:
    programs, S_ptr, rest, constants = _columns_of(S, bits)
    one = weights[0]
    blocks = [*(w.absmax.numel() for w in weights), 0, 0][:3]
    end1 = cdiv(blocks[0], _TILE)
    end2 = end1 + cdiv(blocks[1], _TILE)
    end3 = end2 + cdiv(blocks[2], _TILE)
    first, second, third = (pointers(w) for w in (*weights, one, one)[:3])
    _tops_4bit_kernel[(end3 + programs,)](
        *first, *second, *third, S_ptr, bits, *blocks, end1, end2, end3, *rest,
        BLOCKSIZE2=one.blocksize2 or 1, NESTED=one.nested, TILE=_TILE, **constants,
        num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
