"""Rotary position embedding of queries and keys, both in one launch.

The first R of a head's D elements turn by the token's angles, pair by pair; the other D - R stay.
A pair is (i, i + R/2) in the half-split form (Llama), (2i, 2i + 1) in the interleaved one (Cohere,
GLM). For a pair (1, 2):

    y1 = x1 * cos1 - x2 * sin1            dx1 = dy1 * cos1 + dy2 * sin2
    y2 = x2 * cos2 + x1 * sin2            dx2 = dy2 * cos2 - dy1 * sin1

The right column is the transpose of the left, so it holds for any cos and sin, not only for those
of a rotation (YaRN scales them). cos and sin come in transformers' full width, each angle twice.

q: [B, S, Nq, D], k: [B, S, Nk, D], cos, sin: [B or 1, S, R]. Saved for backward: cos, sin. The
arithmetic is fp32 and each result is rounded once, at its store. With `round_products`, each
product is rounded first to the promoted dtype of its factors, as in stock code that does not
upcast: the result then has that code's very bits.

Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021, https://arxiv.org/abs/2104.09864
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorafuse.kernels.eager import EagerFunction
from lorafuse.kernels.runtime import (
    cached_launch,
    launch_device,
    next_power_of_2,
    tl,
    triton,
    use_triton,
)

__all__ = ["reference", "rope", "rope_copy", "rope_qk_"]

# Pairs of one tile: at 4 warps, two 16-byte loads a thread of each half of a 16-bit head.
_TILE_PAIRS = 2048


def reference(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    round_products: bool = False,
) -> Tensor:
    """The definition, for x [B, S, N, D] and cos, sin [B or 1, S, R]."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _map(x, out, cos, sin, interleaved, backward=False, round_products=round_products)
    return out


def _map(
    x: Tensor,
    out: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    backward: bool,
    round_products: bool,
) -> None:
    """Write the left column of the formulas into `out`, or the right one; it may be `x` itself."""
    R = cos.shape[-1]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    first, second = (
        (slice(0, R, 2), slice(1, R, 2)) if interleaved else (slice(0, R // 2), slice(R // 2, R))
    )
    narrow = torch.promote_types(x.dtype, cos.dtype) if round_products else wide
    cos, sin = cos.to(wide).unsqueeze(2), sin.to(wide).unsqueeze(2)
    x1, x2 = x[..., first].to(wide), x[..., second].to(wide)

    def product(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).to(narrow).to(wide)

    if backward:
        y1 = product(x1, cos[..., first]) + product(x2, sin[..., second])
        y2 = product(x2, cos[..., second]) - product(x1, sin[..., first])
    else:
        y1 = product(x1, cos[..., first]) - product(x2, sin[..., first])
        y2 = product(x2, cos[..., second]) + product(x1, sin[..., second])
    out[..., first].copy_(y1)
    out[..., second].copy_(y2)
    out[..., R:].copy_(x[..., R:])


@triton.jit
def _load_pairs(
    ptr, stride, mask_rows, R: tl.constexpr, BLOCK_P: tl.constexpr, INTERLEAVED: tl.constexpr
):
    """Both members of the pairs of each row of `ptr` [n, 1], in fp32 [n, BLOCK_P]."""
    if INTERLEAVED:
        o_r = tl.arange(0, 2 * BLOCK_P)[None, :]
        x = tl.load(ptr + o_r * stride, mask_rows & (o_r < R), 0.0).to(tl.float32)
        x1, x2 = tl.split(tl.reshape(x, [x.shape[0], BLOCK_P, 2]))
    else:
        o_p = tl.arange(0, BLOCK_P)[None, :]
        mask = mask_rows & (o_p < R // 2)
        x1 = tl.load(ptr + o_p * stride, mask, 0.0).to(tl.float32)
        x2 = tl.load(ptr + (o_p + R // 2) * stride, mask, 0.0).to(tl.float32)
    return x1, x2


@triton.jit
def _rotate_heads(
    src, dst, cos1, cos2, sin1, sin2, src_n, src_d, dst_n, dst_d,
    N: tl.constexpr, D: tl.constexpr, R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_REST: tl.constexpr, INTERLEAVED: tl.constexpr, BACKWARD: tl.constexpr, COPY: tl.constexpr,
    ROUND: tl.constexpr,
):  # fmt: skip
    """The N heads of one token from `src` to `dst`, BLOCK_N at a time."""
    for n in tl.static_range(0, N, BLOCK_N):
        o_n = (n + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
        m_n = o_n < N
        x1, x2 = _load_pairs(src + o_n * src_n, src_d, m_n, R, BLOCK_P, INTERLEAVED)
        a1, a2 = x1 * cos1, x2 * cos2
        if BACKWARD:
            b1, b2 = x2 * sin2, x1 * sin1
        else:
            b1, b2 = x2 * sin1, x1 * sin2
        if ROUND:
            narrow = src.dtype.element_ty
            a1, b1 = a1.to(narrow).to(tl.float32), b1.to(narrow).to(tl.float32)
            a2, b2 = a2.to(narrow).to(tl.float32), b2.to(narrow).to(tl.float32)
        if BACKWARD:
            y1, y2 = a1 + b1, a2 - b2
        else:
            y1, y2 = a1 - b1, a2 + b2
        y1, y2 = y1.to(dst.dtype.element_ty), y2.to(dst.dtype.element_ty)
        dst_rows = dst + o_n * dst_n
        if INTERLEAVED:
            o_r = tl.arange(0, 2 * BLOCK_P)[None, :]
            tl.store(dst_rows + o_r * dst_d, tl.interleave(y1, y2), m_n & (o_r < R))
        else:
            o_p = tl.arange(0, BLOCK_P)[None, :]
            mask = m_n & (o_p < R // 2)
            tl.store(dst_rows + o_p * dst_d, y1, mask)
            tl.store(dst_rows + (o_p + R // 2) * dst_d, y2, mask)
        if COPY and R < D:
            o_rest = R + tl.arange(0, BLOCK_REST)[None, :]
            mask_rest = m_n & (o_rest < D)
            rest = tl.load(src + o_n * src_n + o_rest * src_d, mask_rest)
            tl.store(dst_rows + o_rest * dst_d, rest.to(dst.dtype.element_ty), mask_rest)


@triton.jit
def _copy_heads(
    src, dst, src_n, src_d, dst_n, dst_d,
    N: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The N heads of one token from `src` to `dst` as they are, BLOCK_N at a time."""
    o_d = tl.arange(0, BLOCK_D)[None, :]
    for n in tl.static_range(0, N, BLOCK_N):
        o_n = (n + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
        mask = (o_n < N) & (o_d < D)
        x = tl.load(src + o_n * src_n + o_d * src_d, mask)
        tl.store(dst + o_n * dst_n + o_d * dst_d, x.to(dst.dtype.element_ty), mask)


@cached_launch
@triton.jit
def _rope_kernel(
    src_q, src_k, src_v, dst_q, dst_k, dst_v, cos, sin, S,
    src_q_b, src_q_s, src_q_n, src_q_d, src_k_b, src_k_s, src_k_n, src_k_d,
    src_v_b, src_v_s, src_v_n, src_v_d,
    dst_q_b, dst_q_s, dst_q_n, dst_q_d, dst_k_b, dst_k_s, dst_k_n, dst_k_d,
    dst_v_b, dst_v_s, dst_v_n, dst_v_d,
    cos_b, cos_s, sin_b, sin_s,
    NQ: tl.constexpr, NK: tl.constexpr, NV: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
    BLOCK_NQ: tl.constexpr, BLOCK_NK: tl.constexpr, BLOCK_NV: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_REST: tl.constexpr, BLOCK_D: tl.constexpr,
    INTERLEAVED: tl.constexpr, BACKWARD: tl.constexpr, COPY: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """One token: its angles are loaded once and turn all of its heads; those of v are copied."""
    b, s = (tl.program_id(0) // S).to(tl.int64), (tl.program_id(0) % S).to(tl.int64)
    row, here = tl.zeros([1, 1], tl.int64), tl.full([1, 1], True, tl.int1)
    cos_row, sin_row = cos + (b * cos_b + s * cos_s) + row, sin + (b * sin_b + s * sin_s) + row
    cos1, cos2 = _load_pairs(cos_row, 1, here, R, BLOCK_P, INTERLEAVED)
    sin1, sin2 = _load_pairs(sin_row, 1, here, R, BLOCK_P, INTERLEAVED)
    _rotate_heads(
        src_q + (b * src_q_b + s * src_q_s), dst_q + (b * dst_q_b + s * dst_q_s),
        cos1, cos2, sin1, sin2, src_q_n, src_q_d, dst_q_n, dst_q_d,
        NQ, D, R, BLOCK_NQ, BLOCK_P, BLOCK_REST, INTERLEAVED, BACKWARD, COPY, ROUND,
    )  # fmt: skip
    _rotate_heads(
        src_k + (b * src_k_b + s * src_k_s), dst_k + (b * dst_k_b + s * dst_k_s),
        cos1, cos2, sin1, sin2, src_k_n, src_k_d, dst_k_n, dst_k_d,
        NK, D, R, BLOCK_NK, BLOCK_P, BLOCK_REST, INTERLEAVED, BACKWARD, COPY, ROUND,
    )  # fmt: skip
    if NV > 0:
        _copy_heads(
            src_v + (b * src_v_b + s * src_v_s), dst_v + (b * dst_v_b + s * dst_v_s),
            src_v_n, src_v_d, dst_v_n, dst_v_d, NV, D, BLOCK_NV, BLOCK_D,
        )  # fmt: skip


def _check(
    src_q: Tensor,
    src_k: Tensor,
    dst_q: Tensor,
    dst_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    v: tuple[Tensor, Tensor] | None,
) -> None:
    """Refuse what the kernel would read or write out of bounds."""
    B, S, _, D = src_q.shape
    fits = (
        src_k.shape[:2] == (B, S)
        and src_k.shape[3] == D
        and dst_q.shape == src_q.shape
        and dst_k.shape == src_k.shape
    )
    if not fits:
        raise ValueError(
            "expected q [B, S, Nq, D] and k [B, S, Nk, D], each to its own shape, got q "
            f"{tuple(src_q.shape)} to {tuple(dst_q.shape)}, "
            f"k {tuple(src_k.shape)} to {tuple(dst_k.shape)}"
        )
    if v is not None:
        shapes = [tuple(x.shape) for x in v]
        if shapes[0] != shapes[1] or shapes[0][:2] + shapes[0][3:] != (B, S, D):
            raise ValueError(
                f"expected v [{B}, {S}, Nv, {D}] to its own shape, got {shapes[0]} to {shapes[1]}"
            )
    R = cos.shape[-1]
    if cos.shape != sin.shape or cos.shape not in ((B, S, R), (1, S, R)) or R > D or R % 2:
        raise ValueError(
            f"expected cos and sin [{B} or 1, {S}, R] with R even and at most {D}, "
            f"got {tuple(cos.shape)} and {tuple(sin.shape)}"
        )


def rope_copy(
    src_q: Tensor,  # [B, S, Nq, D], any strides
    src_k: Tensor,  # [B, S, Nk, D], any strides
    dst_q: Tensor,  # as src_q; may be src_q itself
    dst_k: Tensor,  # as src_k; may be src_k itself
    cos: Tensor,  # [B or 1, S, R]
    sin: Tensor,  # [B or 1, S, R]
    interleaved: bool = False,
    backward: bool = False,
    round_products: bool = False,
    v: tuple[Tensor, Tensor] | None = None,  # (src_v, dst_v), [B, S, Nv, D] each, any strides
) -> None:
    """Write the rotated q and k into dst_q and dst_k; `backward` applies the transpose of the map.

    Any layout goes to any other in the same pass, such as the transposed view of a gradient
    [B, N, S, D] into slices of one wide [T, (Nq + 2 Nk) D] buffer. With `v`, v comes along,
    unturned: one launch fills that buffer.
    """
    _check(src_q, src_k, dst_q, dst_k, cos, sin, v)
    if not use_triton(src_q):
        _map(src_q, dst_q, cos, sin, interleaved, backward, round_products)
        _map(src_k, dst_k, cos, sin, interleaved, backward, round_products)
        if v is not None:
            v[1].copy_(v[0])
        return
    B, S, NQ, D = src_q.shape
    NK, R = src_k.shape[2], cos.shape[-1]
    if B * S == 0:
        return
    cos = cos if cos.stride(-1) == 1 else cos.contiguous()
    sin = sin if sin.stride(-1) == 1 else sin.contiguous()
    BLOCK_P = next_power_of_2(R // 2)
    BLOCK_NQ = min(next_power_of_2(NQ), max(1, _TILE_PAIRS // BLOCK_P))
    BLOCK_NK = min(next_power_of_2(NK), BLOCK_NQ)
    src_v, dst_v = (src_q, dst_q) if v is None else v
    NV, BLOCK_D = 0 if v is None else src_v.shape[2], next_power_of_2(D)
    BLOCK_NV = min(next_power_of_2(NV), max(1, 2 * _TILE_PAIRS // BLOCK_D))
    with launch_device(src_q):
        _rope_kernel[(B * S,)](
            src_q, src_k, src_v, dst_q, dst_k, dst_v, cos, sin, S,
            *src_q.stride(), *src_k.stride(), *src_v.stride(),
            *dst_q.stride(), *dst_k.stride(), *dst_v.stride(),
            cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(1),
            sin.stride(0) if sin.shape[0] > 1 else 0, sin.stride(1),
            NQ=NQ, NK=NK, NV=NV, D=D, R=R,
            BLOCK_NQ=BLOCK_NQ, BLOCK_NK=BLOCK_NK, BLOCK_NV=BLOCK_NV, BLOCK_P=BLOCK_P,
            BLOCK_REST=next_power_of_2(D - R), BLOCK_D=BLOCK_D,
            INTERLEAVED=interleaved, BACKWARD=backward,
            ROUND=round_products and torch.promote_types(src_q.dtype, cos.dtype) == src_q.dtype,
            COPY=(src_q.data_ptr(), src_k.data_ptr()) != (dst_q.data_ptr(), dst_k.data_ptr()),
            num_warps=min(4, max(1, BLOCK_NQ * BLOCK_P // 512)),
            # A product that is to be rounded must not become half of a fused multiply-add.
            enable_fp_fusion=not round_products,
        )  # fmt: skip


def rope_qk_(
    q: Tensor,  # [B, S, Nq, D], any strides
    k: Tensor,  # [B, S, Nk, D], any strides
    cos: Tensor,  # [B or 1, S, R]
    sin: Tensor,  # [B or 1, S, R]
    interleaved: bool = False,
    backward: bool = False,
    round_products: bool = False,
) -> None:
    """`rope_copy` in place: the elements past R are neither read nor written."""
    rope_copy(q, k, q, k, cos, sin, interleaved, backward, round_products)


class RopeFunction(EagerFunction):
    """Rotates out of place; the gradients turn back by the transposed map."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        cos: Tensor,
        sin: Tensor,
        interleaved: bool,
        round_products: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.variant = interleaved, round_products
        q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
        rope_copy(q, k, q_out, k_out, cos, sin, interleaved, False, round_products)
        return q_out, k_out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq_out: Tensor, dk_out: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        dq = torch.empty(dq_out.shape, dtype=dq_out.dtype, device=dq_out.device)
        dk = torch.empty(dk_out.shape, dtype=dk_out.dtype, device=dk_out.device)
        interleaved, round_products = ctx.variant
        rope_copy(dq_out, dk_out, dq, dk, cos, sin, interleaved, True, round_products)
        return dq, dk, None, None, None, None


def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    round_products: bool = False,
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys, out of place; differentiable in q and k.

    Args:
        q: [B, S, Nq, D], any strides.
        k: [B, S, Nk, D], any strides, in q's dtype or another.
        cos: [B or 1, S, R] with R even and at most D, each angle twice as transformers lays it out.
        sin: as cos.
        interleaved: pairs are (2i, 2i + 1) instead of (i, i + R/2).
        round_products: round each product to the promoted dtype of its factors, then their sum.

    Returns:
        q and k rotated, contiguous.

    Raises:
        ValueError: the shapes do not fit, or cos or sin require a gradient.
    """
    if cos.requires_grad or sin.requires_grad:
        raise ValueError("cos and sin require a gradient, which rope does not compute; detach them")
    q_out, k_out = RopeFunction.apply(q, k, cos, sin, interleaved, round_products)
    return q_out, k_out
