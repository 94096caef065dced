"""RMSNorm, plain and with Gemma's 1 + w, with an optional residual add in the same pass.

    rstd[t] = 1 / sqrt(mean_k x[t, k]^2 + eps)
    y[t, k] = x[t, k] * rstd[t] * (offset + w[k])          offset: 0 (Llama) or 1 (Gemma)

With g = dy * (offset + w) and n = x * rstd the gradients are

    dx[t, k] = rstd[t] * (g[t, k] - n[t, k] * mean_k(g[t, k] * n[t, k]))
    dw[k]    = sum_t dy[t, k] * n[t, k]

x, y, dy, dx: [T, K], or [T, G, K] for a norm of each of G heads; w: [K]; rstd: fp32, one a row.
Saved for backward: x, w, rstd; n is recomputed. All arithmetic is fp32 and each result is rounded
once, at its store. With `round_normalised`, the forward pass rounds n to x's dtype first, as stock
modules of Llama's kind do: in 16 bit the difference is a bias, which 30 layers of a real model add
up to 0.01 in the loss.

Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, https://arxiv.org/abs/1910.07467
"""

from typing import Any, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorafuse.kernels.eager import EagerFunction
from lorafuse.kernels.gradient_room import give_room, room_asked_by_the_maker, wide_gradient
from lorafuse.kernels.runtime import (
    cached_launch,
    cdiv,
    launch_device,
    next_power_of_2,
    tl,
    triton,
    use_triton,
)

__all__ = ["reference", "rms_norm", "rms_norm_bwd", "rms_norm_fwd", "weigh_"]

# Elements of one tile: 16 a thread at 4 warps, two 16-byte loads of a 16-bit row.
_TILE = 2048
# Programs that each keep one partial row of dw: about 4 for each SM of an H100, and their fp32 rows
# are 8 % of the traffic at T = 8192. A constant, so that the sums do not depend on the GPU.
_DWEIGHT_PROGRAMS = 512


@overload
def reference(
    x: Tensor,
    weight: Tensor,
    eps: float,
    offset: float = ...,
    residual: None = ...,
    round_normalised: bool = ...,
) -> Tensor: ...
@overload
def reference(
    x: Tensor,
    weight: Tensor,
    eps: float,
    offset: float,
    residual: Tensor,
    round_normalised: bool = ...,
) -> tuple[Tensor, Tensor]: ...
def reference(
    x: Tensor,
    weight: Tensor,
    eps: float,
    offset: float = 0.0,
    residual: Tensor | None = None,
    round_normalised: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The definition: y, or (y, h) with h = x + residual rounded and y the norm of h."""
    h = x if residual is None else x + residual
    h_wide = _wide(h)
    rstd = torch.rsqrt(h_wide.square().mean(-1, keepdim=True) + eps)
    n = _normalised(h, rstd, round_normalised)
    y = (n * (offset + _wide(weight))).to(x.dtype)
    return y if residual is None else (y, h)


def _wide(x: Tensor) -> Tensor:
    """`x` in the dtype of the arithmetic: fp32, or fp64 for fp64."""
    return x if x.dtype == torch.float64 else x.float()


def _normalised(h: Tensor, rstd: Tensor, rounded: bool) -> Tensor:
    """n = h * rstd in the arithmetic's dtype, its values rounded to h's where asked."""
    n = _wide(h) * rstd
    return _wide(n.to(h.dtype)) if rounded else n


def _backward_reference(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: float, residual_grad: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(dx + residual_grad, dw) by the formulas above, not yet rounded."""
    dy_wide, n = _wide(dy), _wide(x) * rstd.unsqueeze(-1)
    dw = (dy_wide * n).flatten(0, -2).sum(0)
    g = dy_wide * (offset + _wide(weight))
    dx = rstd.unsqueeze(-1) * (g - n * (g * n).mean(-1, keepdim=True))
    return (dx if residual_grad is None else dx + _wide(residual_grad)), dw


@cached_launch
@triton.jit
def _weigh_kernel(x_ptr, w_ptr, F, K, offset, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr):
    """BLOCK_K columns of BLOCK_F rows: x * (offset + w), in place."""
    o_f = (tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F))[:, None]
    o_k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    mask = (o_f < F) & (o_k < K)
    xs = x_ptr + o_f * K + o_k
    w = tl.load(w_ptr + o_k, o_k < K, 0.0).to(tl.float32) + offset
    tl.store(xs, tl.load(xs, mask, 0.0) * w, mask)


@cached_launch
@triton.jit
def _rms_norm_fwd_kernel(
    x_ptr, w_ptr, residual_ptr, sum_ptr, y_ptr, rstd_ptr,
    T, G,  # rows in all; rows (heads) a token
    x_token, x_head, residual_token, residual_head, sum_token, sum_head, y_token, y_head,
    eps, offset,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    ROUND_NORMALISED: tl.constexpr,
):  # fmt: skip
    """BLOCK_T whole rows: h = x (+ residual); y = h / rms(h) * (offset + w)."""
    o_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_k = tl.arange(0, BLOCK_K)[None, :]
    mask = (o_t < T)[:, None] & (o_k < K)
    token, head = (o_t // G).to(tl.int64)[:, None], (o_t % G).to(tl.int64)[:, None]

    h = tl.load(x_ptr + (token * x_token + head * x_head) + o_k, mask, 0.0).to(tl.float32)
    if HAS_RESIDUAL:
        o_residual = token * residual_token + head * residual_head
        h += tl.load(residual_ptr + o_residual + o_k, mask, 0.0).to(tl.float32)
        # Round first: what is normalised is what the next layer and the backward pass see.
        h_stored = h.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + (token * sum_token + head * sum_head) + o_k, h_stored, mask)
        h = h_stored.to(tl.float32)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(h * h, 1) * (1.0 / K) + eps))
    tl.store(rstd_ptr + o_t, rstd, o_t < T)
    w = tl.load(w_ptr + o_k, o_k < K, 0.0).to(tl.float32) + offset
    n = h * rstd[:, None]
    if ROUND_NORMALISED:
        n = n.to(sum_ptr.dtype.element_ty).to(tl.float32)
    y = n * w
    tl.store(y_ptr + (token * y_token + head * y_head) + o_k, y.to(y_ptr.dtype.element_ty), mask)


@cached_launch
@triton.jit
def _rms_norm_bwd_kernel(
    dy_ptr, x_ptr, w_ptr, rstd_ptr, residual_grad_ptr, dx_ptr, dw_ptr,
    T, G, tiles,  # rows in all; rows (heads) a token; tiles of BLOCK_T rows a program
    dy_token, dy_head, x_token, x_head, residual_token, residual_head, dx_token, dx_head,
    offset,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, NEED_DW: tl.constexpr,
):  # fmt: skip
    """dx of `tiles` tiles of BLOCK_T whole rows, and their share of dw as one row of dw_ptr."""
    pid = tl.program_id(0)
    o_k = tl.arange(0, BLOCK_K)[None, :]
    w = tl.load(w_ptr + o_k, o_k < K, 0.0).to(tl.float32) + offset
    dw = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
    for tile in range(tiles):
        o_t = (pid * tiles + tile) * BLOCK_T + tl.arange(0, BLOCK_T)
        mask = (o_t < T)[:, None] & (o_k < K)
        token, head = (o_t // G).to(tl.int64)[:, None], (o_t % G).to(tl.int64)[:, None]

        x = tl.load(x_ptr + (token * x_token + head * x_head) + o_k, mask, 0.0).to(tl.float32)
        dy = tl.load(dy_ptr + (token * dy_token + head * dy_head) + o_k, mask, 0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + o_t, o_t < T, 0.0)[:, None]
        n = x * rstd
        if NEED_DW:
            dw += dy * n
        g = dy * w
        dx = rstd * (g - n * (tl.sum(g * n, 1) * (1.0 / K))[:, None])
        if HAS_RESIDUAL:
            o_residual = token * residual_token + head * residual_head
            dx += tl.load(residual_grad_ptr + o_residual + o_k, mask, 0.0).to(tl.float32)
        dx = dx.to(dx_ptr.dtype.element_ty)
        tl.store(dx_ptr + (token * dx_token + head * dx_head) + o_k, dx, mask)
    if NEED_DW:
        o_dw = pid.to(tl.int64) * K + tl.arange(0, BLOCK_K)
        tl.store(dw_ptr + o_dw, tl.sum(dw, 0), tl.arange(0, BLOCK_K) < K)


def _tile(K: int) -> tuple[int, int, int]:
    """(BLOCK_K, BLOCK_T, warps): whole rows, several of them when they are short."""
    BLOCK_K = next_power_of_2(K)
    BLOCK_T = max(1, _TILE // BLOCK_K)
    elements = BLOCK_K * BLOCK_T
    # 16 elements a thread up to K = 4096, then 32: the backward pass holds four rows in registers.
    warps = 4 if elements <= 2048 else 8 if elements <= 8192 else 16 if elements <= 16384 else 32
    return BLOCK_K, BLOCK_T, warps


def _row_strides(*tensors: Tensor | None) -> tuple[int, list[int]]:
    """Heads a token G, then (token stride, head stride) of each tensor [T, K] or [T, G, K].

    Where every tensor's rows are evenly spaced, [T, G] counts as T * G tokens of one head.
    """
    if all(t is None or t.dim() == 2 or t.stride(0) == t.shape[1] * t.stride(1) for t in tensors):
        return 1, [s for t in tensors for s in (0 if t is None else t.stride(-2), 0)]
    G = next(t.shape[1] for t in tensors if t is not None)
    return G, [s for t in tensors for s in ((0, 0) if t is None else t.stride()[:2])]


def _check(name: str, tensor: Tensor, like: Tensor) -> None:
    """Refuse a tensor that the kernels would read or write out of its bounds."""
    if tensor.shape != like.shape or tensor.device != like.device:
        raise ValueError(
            f"{name} must be {tuple(like.shape)} on {like.device} as x is, "
            f"got {tuple(tensor.shape)} on {tensor.device}"
        )
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ValueError(f"{name} must have contiguous rows, got strides {tensor.stride()}")


def _check_rows(x: Tensor, weight: Tensor) -> None:
    if x.dim() not in (2, 3) or weight.shape != x.shape[-1:] or not weight.is_contiguous():
        raise ValueError(
            f"expected x [T, K] or [T, G, K] and a contiguous weight [K], "
            f"got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    _check("x", x, x)


def rms_norm_fwd(
    x: Tensor,  # [T, K] or [T, G, K]
    weight: Tensor,  # [K]
    eps: float,
    offset: float,
    out: Tensor,  # as x: y is written here; any dtype, any row strides
    residual: Tensor | None = None,  # as x
    sum_out: Tensor | None = None,  # as x: x + residual, rounded, is written here
    round_normalised: bool = False,  # round x / rms(x) to x's dtype before the weight
) -> Tensor:
    """Write RMSNorm(x), or that of x + residual, into `out`; return rstd, fp32 [T] or [T, G]."""
    _check_rows(x, weight)
    _check("out", out, x)
    if (residual is None) != (sum_out is None):
        raise ValueError("residual and sum_out go together: got only one of them")
    if residual is not None and sum_out is not None:
        _check("residual", residual, x)
        _check("sum_out", sum_out, x)
    if not use_triton(x):
        h = x
        if residual is not None and sum_out is not None:
            h = sum_out.copy_(_wide(x) + _wide(residual))
        rstd = torch.rsqrt(_wide(h).square().mean(-1) + eps)
        n = _normalised(h, rstd.unsqueeze(-1), round_normalised)
        out.copy_(n * (offset + _wide(weight)))
        return rstd

    K = x.shape[-1]
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if rstd.numel() == 0:
        return rstd
    BLOCK_K, BLOCK_T, warps = _tile(K)
    G, strides = _row_strides(x, residual, sum_out, out)
    with launch_device(x):
        _rms_norm_fwd_kernel[(cdiv(rstd.numel(), BLOCK_T),)](
            x, weight, x if residual is None else residual, x if sum_out is None else sum_out,
            out, rstd, rstd.numel(), G, *strides, eps, offset,
            K=K, BLOCK_K=BLOCK_K, BLOCK_T=BLOCK_T, HAS_RESIDUAL=residual is not None,
            ROUND_NORMALISED=round_normalised, num_warps=warps,
        )  # fmt: skip
    return rstd


def rms_norm_bwd(
    dy: Tensor,  # [T, K] or [T, G, K]
    x: Tensor,  # as dy: what was normalised (with a residual, the sum)
    weight: Tensor,  # [K]
    rstd: Tensor,  # [T] or [T, G], from rms_norm_fwd
    offset: float,
    residual_grad: Tensor | None,  # as dy: the gradient that reaches x around the norm
    need_dweight: bool,
    out: Tensor | None = None,  # as dy: dx is written here; may be residual_grad or dy itself
) -> tuple[Tensor, Tensor | None]:
    """(dx, dweight) of `rms_norm_fwd`; `residual_grad` is added to dx before its one rounding.

    dx has x's dtype, or is `out`. dweight is summed in a fixed order: runs repeat bit for bit.
    """
    _check_rows(x, weight)
    _check("dy", dy, x)
    if residual_grad is not None:
        _check("residual_grad", residual_grad, x)
    if out is not None:
        _check("out", out, x)
    if not use_triton(x):
        wide_dx, dw = _backward_reference(dy, x, weight, rstd, offset, residual_grad)
        dx = wide_dx.to(x.dtype) if out is None else out.copy_(wide_dx)
        return dx, dw.to(weight.dtype) if need_dweight else None

    T, K = rstd.numel(), x.shape[-1]
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    if T == 0:
        return dx, torch.zeros_like(weight) if need_dweight else None
    BLOCK_K, BLOCK_T, warps = _tile(K)
    G, strides = _row_strides(dy, x, residual_grad, dx)
    tiles = cdiv(cdiv(T, BLOCK_T), _DWEIGHT_PROGRAMS) if need_dweight else 1
    programs = cdiv(T, BLOCK_T * tiles)
    partial_dw = None
    if need_dweight:
        partial_dw = torch.empty((programs, K), dtype=torch.float32, device=x.device)
    with launch_device(x):
        _rms_norm_bwd_kernel[(programs,)](
            dy, x, weight, rstd, x if residual_grad is None else residual_grad, dx,
            rstd if partial_dw is None else partial_dw, T, G, tiles, *strides, offset,
            K=K, BLOCK_K=BLOCK_K, BLOCK_T=BLOCK_T,
            HAS_RESIDUAL=residual_grad is not None, NEED_DW=need_dweight, num_warps=warps,
        )  # fmt: skip
    return dx, None if partial_dw is None else partial_dw.sum(0).to(weight.dtype)


def weigh_(
    x: Tensor,  # [F, K] contiguous, fp32 (fp64)
    weight: Tensor,  # [K]
    offset: float,
) -> Tensor:
    """x * (offset + weight), in place."""
    if not use_triton(x):
        return x.mul_(_wide(weight) + offset)
    F, K = x.shape
    BLOCK_K = min(_TILE, next_power_of_2(K))
    BLOCK_F = _TILE // BLOCK_K
    with launch_device(x):
        _weigh_kernel[(cdiv(K, BLOCK_K), cdiv(F, BLOCK_F))](
            x, weight, F, K, offset, BLOCK_F=BLOCK_F, BLOCK_K=BLOCK_K
        )
    return x


def _as_rows(x: Tensor) -> Tensor:
    """`x` [..., K] as [T, K] or [T, G, K]; a copy only where no such view has contiguous rows."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    return x.flatten(0, -3) if x.dim() >= 3 else x.reshape(-1, x.shape[-1])


class RMSNormFunction(EagerFunction):
    """RMSNorm with its backward by hand; with a residual, the sum is the second output."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        residual: Tensor | None,
        eps: float,
        offset: float,
        out_dtype: torch.dtype,
        round_normalised: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        y = torch.empty(x.shape, dtype=out_dtype, device=x.device)
        weight = weight.contiguous()
        h, residual_rows, sum_rows = x, None, None
        if residual is not None:
            sum_dtype = torch.promote_types(x.dtype, residual.dtype)
            h = torch.empty(x.shape, dtype=sum_dtype, device=x.device)
            residual_rows, sum_rows = _as_rows(residual), _as_rows(h)
        rstd = rms_norm_fwd(
            _as_rows(x), weight, eps, offset, _as_rows(y), residual_rows, sum_rows, round_normalised
        )
        ctx.save_for_backward(h, weight, rstd)
        ctx.offset = offset
        ctx.dtypes = (x.dtype, x.dtype if residual is None else residual.dtype)
        ctx.room = room_asked_by_the_maker(x) if residual is None else 0
        if residual is None:
            return y
        if not (ctx.needs_input_grad[0] or ctx.needs_input_grad[2]):
            ctx.mark_non_differentiable(h)
        return y, h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dh: Tensor | None = None) -> tuple[Tensor | None, ...]:
        h, weight, rstd = ctx.saved_tensors
        need_dx, need_dweight, need_dresidual = ctx.needs_input_grad[:3]
        wide = wide_gradient(h, ctx.room)
        dsum, dweight = rms_norm_bwd(
            _as_rows(dy), _as_rows(h), weight, rstd, ctx.offset,
            None if dh is None else _as_rows(dh), need_dweight,
            None if wide is None else _as_rows(wide[:, : h.shape[-1]].view(h.shape)),
        )  # fmt: skip
        # h = x + residual, so both have h's gradient.
        dsum = dsum.view(h.shape)
        dx = give_room(dsum.to(ctx.dtypes[0]), wide) if need_dx else None
        dresidual = dsum.to(ctx.dtypes[1]) if need_dresidual else None
        return dx, dweight, dresidual, None, None, None, None


@overload
def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    offset: float = ...,
    residual: None = ...,
    out_dtype: torch.dtype | None = ...,
    round_normalised: bool = ...,
) -> Tensor: ...
@overload
def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    offset: float,
    residual: Tensor,
    out_dtype: torch.dtype | None = ...,
    round_normalised: bool = ...,
) -> tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    offset: float = 0.0,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    round_normalised: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """RMSNorm over the last dimension, differentiable in x, weight and residual.

    Args:
        x: [..., K], any strides.
        weight: [K]; its dtype may differ from x's.
        eps: added to the mean square.
        offset: added to the weight: 1 for Gemma, else 0.
        residual: as x; when given, x + residual is normalised and also returned.
        out_dtype: dtype of y; x's by default.
        round_normalised: round x / rms(x) to the sum's dtype before the product with the weight.

    Returns:
        y as x, or with a residual (y, x + residual); the sum has the wider dtype of the two.

    Raises:
        ValueError: shapes or devices do not fit together.
    """
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual must be {tuple(x.shape)} as x is, got {tuple(residual.shape)}")
    result: Tensor | tuple[Tensor, Tensor] = RMSNormFunction.apply(
        x, weight, residual, eps, offset, out_dtype or x.dtype, round_normalised
    )
    return result
