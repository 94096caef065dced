r"""AdamW with bitsandbytes' 8-bit states, all tensors in one launch.

For a block of 256 elements, with c the states' codes, q_1 and q_2 bitsandbytes' dynamic maps
(ascending, 256 entries; q_1 signed) and a their scales:

    m = b1 q_1[c1] a1 + (1 - b1) g        v = b2 q_2[c2] a2 + (1 - b2) g^2
    p = (p - lr C2 / C1  m / (sqrt(v) + C2 eps)) (1 - lr decay)       C1 = 1 - b1^t, C2^2 = 1 - b2^t
    a1 = max |m|     a2 = max v           over the block
    c1 = nearest(q_1, m / a1), but never of the other sign     c2 = nearest(q_2, v / a2)

An element whose gradient is not finite keeps its p and loses its states. Everything is fp32; p and
g are fp32, fp16 or bf16. p, g, c1, c2: [n] of each tensor; a1, a2: [ceil(n / 256)].

bitsandbytes launches one kernel a tensor and waits for it: an 8B model with LoRA on all linears has
448. Here one table of addresses serves all. It is read anew each step: gradients are new each time,
and to read the other addresses costs less than to tell whether they are still the same.

Kingma and Ba, 2014, https://arxiv.org/abs/1412.6980; Loshchilov and Hutter, 2017,
https://arxiv.org/abs/1711.05101; Dettmers et al., 2021, https://arxiv.org/abs/2110.02861
"""

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lorafuse.kernels.runtime import cached_launch, cdiv, launch_device, tl, triton, use_triton

__all__ = [
    "BLOCK",
    "AdamOptions",
    "AdamTensor",
    "adam_8bit_",
    "adam_8bit_triton_",
    "reference_",
    "serves",
]

BLOCK = 256  # elements that share a scale: bitsandbytes'
_TILE_BLOCKS = 8
_COLUMNS = 9  # of the table: eight addresses and the number of elements
_ALIGNMENT = 16  # bytes


@dataclass(frozen=True)
class AdamOptions:
    """What a launch's tensors have in common.

    Attributes:
        lr, beta1, beta2, eps, weight_decay: as in `torch.optim.AdamW`.
        step: t, from 1 on.
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int

    @property
    def corrections(self) -> tuple[float, float]:
        """(lr C2 / C1, C2 eps)."""
        C1, C2 = 1 - self.beta1**self.step, math.sqrt(1 - self.beta2**self.step)
        return self.lr * C2 / C1, C2 * self.eps


class AdamTensor(NamedTuple):
    """One parameter with its gradient and states; `p`, c and a are written."""

    p: Tensor  # [n], fp32, fp16 or bf16
    g: Tensor  # [n], as p
    c1: Tensor  # [n] uint8
    c2: Tensor  # [n] uint8
    a1: Tensor  # [ceil(n / 256)] fp32
    a2: Tensor  # as a1
    q1: Tensor  # [256] fp32, ascending: the map of c1; states from a file have one each
    q2: Tensor  # as q1, of c2


@torch.no_grad()
def reference_(one: AdamTensor, options: AdamOptions) -> None:
    """The definition, for one tensor."""
    q1, q2 = one.q1, one.q2
    n = one.p.numel()
    blocks = -(-n // BLOCK)
    rate, eps = options.corrections

    def in_blocks(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x.flatten().float(), (0, blocks * BLOCK - n)).view(-1, BLOCK)

    g = in_blocks(one.g)
    finite = g.isfinite()
    m = options.beta1 * in_blocks(q1[one.c1.int()]) * one.a1[:, None] + (1 - options.beta1) * g
    v = options.beta2 * in_blocks(q2[one.c2.int()]) * one.a2[:, None] + (1 - options.beta2) * g * g
    m, v = m.where(finite, 0), v.where(finite, 0)
    p = in_blocks(one.p)
    updated = (p - rate * m / (v.sqrt() + eps)) * (1 - options.lr * options.weight_decay)
    one.p.copy_(updated.where(finite, p).flatten()[:n].view(one.p.shape))
    for x, q, c, a in ((m, q1, one.c1, one.a1), (v, q2, one.c2, one.a2)):
        a.copy_(x.abs().amax(1))
        codes = _nearest_reference(x / a[:, None].where(a[:, None] > 0, 1), q)
        codes += ((x > 0) & (q[codes] < 0)).long() - ((x < 0) & (q[codes] >= 0)).long()
        c.copy_(codes.flatten()[:n].view(c.shape))


def _nearest_reference(x: Tensor, q: Tensor) -> Tensor:
    low = (torch.searchsorted(q, x.contiguous(), right=True) - 1).clamp(0, q.numel() - 1)
    high = (low + 1).clamp_max(q.numel() - 1)
    return torch.where(x - q[low] > q[high] - x, high, low)


@triton.jit
def _nearest(x, q_ptr):
    """Index of the entry of the ascending q [256] that is nearest to x."""
    low = tl.zeros_like(x).to(tl.int32)
    for bit in tl.static_range(8):
        higher = low + (128 >> bit)
        low = tl.where(tl.load(q_ptr + higher) <= x, higher, low)
    high = tl.minimum(low + 1, 255)
    return tl.where(x - tl.load(q_ptr + low) > tl.load(q_ptr + high) - x, high, low)


@triton.jit
def _address(entry, column: tl.constexpr, like):
    return tl.multiple_of(tl.load(entry + column).to(like.dtype), 16)


@cached_launch
@triton.jit
def _adam_8bit_kernel(
    table_ptr, p_like, g_like, c_like, a_like,
    rate, eps, beta1, beta2, keep,
    COLUMNS: tl.constexpr, BLOCKS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """BLOCKS blocks of SIZE elements of tensor `program_id(1)`; the `_like`s give dtypes only."""
    entry = table_ptr + tl.program_id(1) * COLUMNS
    n = tl.load(entry + 8)
    first_block = tl.program_id(0).to(tl.int64) * BLOCKS
    if first_block * SIZE < n:
        p_ptr, g_ptr = _address(entry, 0, p_like), _address(entry, 1, g_like)
        c1_ptr, c2_ptr = _address(entry, 2, c_like), _address(entry, 3, c_like)
        a1_ptr, a2_ptr = _address(entry, 4, a_like), _address(entry, 5, a_like)
        q1_ptr, q2_ptr = _address(entry, 6, a_like), _address(entry, 7, a_like)
        o_block = first_block + tl.arange(0, BLOCKS)
        o = o_block[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
        m_block, mask = o_block * SIZE < n, o < n
        g = tl.load(g_ptr + o, mask, 0.0).to(tl.float32)
        p = tl.load(p_ptr + o, mask, 0.0).to(tl.float32)
        a1 = tl.load(a1_ptr + o_block, m_block, 0.0)[:, None]
        a2 = tl.load(a2_ptr + o_block, m_block, 0.0)[:, None]
        m = tl.load(q1_ptr + tl.load(c1_ptr + o, mask, 0).to(tl.int32)) * a1
        v = tl.load(q2_ptr + tl.load(c2_ptr + o, mask, 0).to(tl.int32)) * a2
        # also false for NaN
        finite = mask & (tl.abs(g) < float("inf"))
        m = tl.where(finite, beta1 * m + (1.0 - beta1) * g, 0.0)
        v = tl.where(finite, beta2 * v + (1.0 - beta2) * g * g, 0.0)
        updated = (p - rate * m / (tl.sqrt_rn(v) + eps)) * keep
        tl.store(p_ptr + o, updated.to(p_ptr.dtype.element_ty), finite)

        a1, a2 = tl.max(tl.abs(m), 1), tl.max(v, 1)
        tl.store(a1_ptr + o_block, a1, m_block)
        tl.store(a2_ptr + o_block, a2, m_block)
        a1, a2 = tl.where(a1 > 0, a1, 1.0)[:, None], tl.where(a2 > 0, a2, 1.0)[:, None]
        c1 = _nearest(m / a1, q1_ptr)
        q = tl.load(q1_ptr + c1)
        c1 += ((m > 0) & (q < 0)).to(tl.int32) - ((m < 0) & (q >= 0)).to(tl.int32)
        tl.store(c1_ptr + o, c1.to(tl.uint8), mask)
        tl.store(c2_ptr + o, _nearest(v / a2, q2_ptr).to(tl.uint8), mask)


def serves(one: AdamTensor) -> bool:
    """Whether the kernel can take this tensor: on a GPU, contiguous, aligned.

    Spelt out: it is asked 448 times a step, and a loop over the tensors takes four times as long.
    """
    p, g, c1, c2, a1, a2, q1, q2 = one
    at = p.get_device()
    return (
        use_triton(p)
        and g.dtype == p.dtype
        and c1.dtype == c2.dtype == torch.uint8
        and a1.dtype == a2.dtype == q1.dtype == q2.dtype == torch.float32
        and q1.numel() == q2.numel() == 256
        and g.get_device() == c1.get_device() == c2.get_device() == at
        and a1.get_device() == a2.get_device() == q1.get_device() == q2.get_device() == at
        and p.is_contiguous()
        and g.is_contiguous()
        and c1.is_contiguous()
        and c2.is_contiguous()
        and a1.is_contiguous()
        and a2.is_contiguous()
        and q1.is_contiguous()
        and q2.is_contiguous()
        and not (
            p.data_ptr() | g.data_ptr() | c1.data_ptr() | c2.data_ptr()
            | a1.data_ptr() | a2.data_ptr() | q1.data_ptr() | q2.data_ptr()
        ) % _ALIGNMENT
    )  # fmt: skip


def adam_8bit_(tensors: Sequence[AdamTensor], options: AdamOptions) -> None:
    """One step of AdamW on all `tensors`, in place, without waiting for the GPU.

    Args:
        tensors: of one device and dtype; the kernel runs where `serves` is true of all of them.
        options: of all of them.

    Raises:
        ValueError: a map does not fit.
    """
    for one in tensors:
        for q in (one.q1, one.q2):
            if q.shape != (256,) or q.dtype != torch.float32:
                raise ValueError(f"a map must be [256] fp32, got {tuple(q.shape)} of {q.dtype}")
    if all(serves(one) for one in tensors):
        adam_8bit_triton_(tensors, options)
    else:
        for one in tensors:
            reference_(one, options)


def adam_8bit_triton_(tensors: Sequence[AdamTensor], options: AdamOptions) -> None:
    """`adam_8bit_` in one launch, of tensors that `serves` is true of: it is not asked again."""
    if not tensors:
        return
    first = tensors[0].p
    sizes = [one.p.numel() for one in tensors]
    rows = array("q")
    for one, n in zip(tensors, sizes, strict=True):
        rows.extend([x.data_ptr() for x in one])
        rows.append(n)
    table = torch.frombuffer(rows, dtype=torch.int64)
    if first.is_cuda:
        # Pinned memory that is new each step: the allocator does not hand it out again before the
        # copy is done, so the last step's table may still be on its way.
        table = table.pin_memory().to(first.device, non_blocking=True)
    rate, eps = options.corrections
    with launch_device(first):
        _adam_8bit_kernel[(cdiv(max(sizes), BLOCK * _TILE_BLOCKS), len(tensors))](
            table, first, tensors[0].g, tensors[0].c1, tensors[0].a1,
            rate, eps, options.beta1, options.beta2, 1 - options.lr * options.weight_decay,
            COLUMNS=_COLUMNS, BLOCKS=_TILE_BLOCKS, SIZE=BLOCK, num_warps=8,
        )  # fmt: skip
