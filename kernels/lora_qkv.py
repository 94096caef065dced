r"""Query, key and value projections with LoRA, and optionally their RMS norm and RoPE.

    X = norm(h) or h                       [T, K]
    [q | k | v] = X W_qkv^T + LoRA         [T, N], N = (Hq + 2 Hk) D      one GEMM
    q, k = rope(q), rope(k)                in place in that buffer

With `pass_through`, h is an output too: what goes around the block (the residual) is taken from it,
and the gradient that comes back that way is added where dh is written, not in a pass of its own.

Saved: h, rstd, the r-wide XA, cos and sin; dA comes from h and rstd. Backward gathers dq, dk and
dv from whatever layout attention left them in, turns dq and dk back and writes all three into the
left columns of [dY, G] in one pass; then dX = [dY, G] [W; A] as in `lora_linear`.

RoPE: https://arxiv.org/abs/2104.09864
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorafuse.kernels.eager import EagerFunction
from lorafuse.kernels.gradient_room import give_room, room_asked_by_the_maker, wide_gradient
from lorafuse.kernels.lora_linear import (
    Group,
    LoraProjection,
    NormPrologue,
    RngState,
    as_rows,
    check_projections,
    compute_dtype,
    flat_tensors,
    group_fwd,
    input_gradient,
    normed_adapter_gradients,
    read_input,
    with_tensors,
    without_autocast,
    without_tensors,
)
from lorafuse.kernels.lora_linear import reference as linear_reference
from lorafuse.kernels.rms_norm import rms_norm_bwd
from lorafuse.kernels.rope import reference as rope_reference
from lorafuse.kernels.rope import rope_copy, rope_qk_


@dataclass(frozen=True)
class Heads:
    """Head counts and size: the projections' N outputs are (query + 2 key_value) * size."""

    query: int
    key_value: int
    size: int

    @property
    def features(self) -> int:
        return (self.query + 2 * self.key_value) * self.size

    def split(self, qkv: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
        """Views [B, S, H, D] of the q, k and v columns of `qkv` [T, >= N]; `shape` is (B, S)."""
        B, S = shape
        row, D, start = qkv.stride(0), self.size, qkv.storage_offset()
        counts = self.query, self.key_value, self.key_value
        starts = start, start + counts[0] * D, start + (counts[0] + counts[1]) * D
        q, k, v = (
            qkv.as_strided((B, S, n, D), (S * row, row, D, 1), first)
            for n, first in zip(counts, starts, strict=True)
        )
        return q, k, v


@dataclass(frozen=True, eq=False)
class Rotary:
    """cos and sin [1 or B, S, rotary size] as transformers passes them, and how they are applied.

    Attributes:
        cos, sin: each angle twice.
        interleaved: the pairs are neighbours, not halves.
        round_products: as in `kernels.rope`.
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool = False
    round_products: bool = False

    def forward_(self, q: Tensor, k: Tensor) -> None:
        """Turns q and k [B, S, H, D] in place."""
        rope_qk_(q, k, self.cos, self.sin, self.interleaved, False, self.round_products)

    def backward(self, dq: Tensor, dk: Tensor, dv: Tensor, to: tuple[Tensor, ...]) -> None:
        """Writes dq and dk, turned back, and dv into the three of `to`."""
        to_q, to_k, to_v = to
        rope_copy(
            dq, dk, to_q, to_k, self.cos, self.sin, self.interleaved, True, self.round_products,
            (dv, to_v),
        )  # fmt: skip

    def reference(self, x: Tensor) -> Tensor:
        """x turned, in plain torch."""
        return rope_reference(x, self.cos, self.sin, self.interleaved, self.round_products)


def reference(
    h: Tensor,
    projections: Sequence[LoraProjection],
    heads: Heads,
    norm: NormPrologue | None = None,
    rotary: Rotary | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition in plain torch. h [B, S, K] -> q [B, S, Hq, D], k and v [B, S, Hk, D]."""
    x = h if norm is None else norm.reference(h)
    qkv = torch.cat(linear_reference(x, projections), -1)
    q, k, v = heads.split(qkv.flatten(0, 1), h.shape[:2])
    if rotary is not None:
        q, k = rotary.reference(q), rotary.reference(k)
    return q, k, v


class LoraQkvFunction(EagerFunction):
    """Forward and hand-derived backward; see the module's docstring for what is saved."""

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        projections: tuple[LoraProjection, ...],
        heads: Heads,
        norm: NormPrologue | None,
        rotary: Rotary | None,
        dtype: torch.dtype,
        pass_through: bool,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        with without_autocast(h):
            group = Group(with_tensors(projections, tensors), dtype)
            flat = as_rows(h)
            rng = RngState.capture(h.device) if group.has_dropout else None
            x, wide, rstd = read_input(flat, group, norm)
            qkv = x.new_empty((flat.shape[0], group.out_features))
            _, xA = group_fwd(group, x, wide, qkv)
            q, k, v = heads.split(qkv, h.shape[:2])
            if rotary is not None:
                rotary.forward_(q, k)
        ctx.room = room_asked_by_the_maker(h)
        ctx.save_for_backward(h, rstd, xA, *tensors)
        ctx.spec = projections, heads, norm, rotary, dtype, rng
        return (q, k, v, h) if pass_through else (q, k, v)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor, around: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        h, rstd, xA, *tensors = ctx.saved_tensors
        projections, heads, norm, rotary, dtype, rng = ctx.spec
        needs, need_h = ctx.needs_input_grad[7:], ctx.needs_input_grad[0]
        with without_autocast(h):
            group = Group(with_tensors(projections, tensors), dtype)
            flat = as_rows(h)
            T, N = flat.shape[0], group.out_features
            wide = None
            if need_h and group.folds_backward(T, copies_input=False):
                wide = flat.new_empty((T, N + group.fold_backward), dtype=dtype)
                dy = wide[:, :N]
            else:
                dy = flat.new_empty((T, N), dtype=dtype)
            parts = heads.split(dy, h.shape[:2])
            if rotary is not None:
                rotary.backward(dq, dk, dv, parts)
            else:
                for part, gradient in zip(parts, (dq, dk, dv), strict=True):
                    part.copy_(gradient)
            dh, G = input_gradient(group, dy, wide, rng, need_dx=need_h)
            adapters = normed_adapter_gradients(group, flat, norm, rstd, xA, dy, G, needs, rng)
            del dy, wide, G
            flat_around = None if around is None else as_rows(around)
            dh_wide = None
            if dh is not None and norm is not None:
                dh_wide = wide_gradient(flat, ctx.room)
                dh, _ = rms_norm_bwd(
                    dh, flat, norm.weight, rstd, norm.offset, flat_around, need_dweight=False,
                    out=None if dh_wide is None else dh_wide[:, : h.shape[-1]],
                )  # fmt: skip
            elif dh is not None and flat_around is not None:
                dh = dh + flat_around
        dh = None if dh is None else give_room(dh.to(h.dtype).view(h.shape), dh_wide)
        return dh, None, None, None, None, None, None, *adapters


def lora_qkv(
    h: Tensor,
    projections: Sequence[LoraProjection],
    heads: Heads,
    norm: NormPrologue | None = None,
    rotary: Rotary | None = None,
    pass_through: bool = False,
) -> tuple[Tensor, ...]:
    """q, k and v of X = norm(h) or h, with LoRA on any of the projections, turned by RoPE.

    Under autocast the GEMMs run in autocast's dtype, else in `h`'s. Gradients flow to `h` and to
    each A, B and bias that requires them; base weights and the norm's weight are frozen and get
    none.

    Args:
        h: [B, S, K], fp32/fp16/bf16 (fp64 for tests).
        projections: (q, k, v) of [H D, K] each, or one of all their rows in that order.
        heads: head counts and size.
        norm: frozen RMS norm in front, or None.
        rotary: applied to q and k, or None.
        pass_through: return h as well, for what goes around the block.

    Returns:
        q [B, S, Hq, D], k and v [B, S, Hk, D]: views of one buffer, in the compute dtype. With
        `pass_through`, h as the fourth.

    Raises:
        ValueError: shapes do not fit together.
    """
    check_projections(h, projections)
    features = sum(p.out_features for p in projections)
    if h.dim() != 3 or features != heads.features:
        raise ValueError(
            f"got an input of shape {tuple(h.shape)} and projections of {features} features; "
            f"expected [B, S, K] and {heads.features} features for {heads}"
        )
    outputs: tuple[Tensor, ...] = LoraQkvFunction.apply(
        h,
        without_tensors(projections),
        heads,
        norm,
        rotary,
        compute_dtype(h),
        pass_through,
        *flat_tensors(projections),
    )
    return outputs
