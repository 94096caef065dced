"""Backward of the gated linear unit between an expert's two products, with the router's gradient.

Row i is token t's j-th expert; its output Y[i] = W_d m[i] enters the token's sum with the weight w.

    m = act(gate) * up          D = dY W_d, of the unweighted dY of the token
    dw     = <dY, Y[i]> = <dY, W_d m> = <D, m>          so Y need not be kept, nor computed again
    dgate, dup as in `glu`, of dM = w D

gate, up, D, dgate, dup, m: [S, I]; D becomes m, which dA of the down projection needs. dgate and
dup go to a buffer of their own, whose right columns hold LoRA's part of the next product. A program
has a row and adds up dw in fp32 in a fixed order.
"""

import torch
from torch import Tensor

from lorafuse.kernels.expert_order import ExpertOrder
from lorafuse.kernels.glu import _act, _activate_backward, _check, _wide
from lorafuse.kernels.runtime import (
    cached_launch,
    launch_device,
    next_power_of_2,
    tl,
    triton,
    use_triton,
)

__all__ = ["expert_glu_bwd_", "reference"]

_MAX_BLOCK = 1024


def reference(
    gate: Tensor,
    up: Tensor,
    D: Tensor,
    weights: Tensor,
    rows: ExpertOrder,
    activation: str,
    dgate: Tensor,
    dup: Tensor,
) -> Tensor:
    """The definition; dw [T, k] in fp32 (fp64 for fp64). D becomes m."""
    wide_D, wide_up = _wide(D), _wide(up)
    a, slope = _activate_backward(_wide(gate), activation)
    a = _wide(a.to(gate.dtype))
    m = (a * wide_up).to(gate.dtype)
    here = rows.place < rows.ends[-1]
    dw = (wide_D * _wide(m)).sum(1)[rows.place.long()].masked_fill(~here, 0)
    dm = wide_D * _wide(weights).reshape(-1)[rows.order.long()].unsqueeze(1).to(wide_D.dtype)
    dgate.copy_(_wide((dm * wide_up).to(gate.dtype)) * slope)
    dup.copy_(dm * a)
    D.copy_(m)
    return dw.view(-1, rows.k)


@cached_launch
@triton.jit
def _expert_glu_bwd_kernel(
    gate_ptr, up_ptr, D_ptr, weights_ptr, order_ptr, ends_ptr, dgate_ptr, dup_ptr, dw_ptr,
    gate_row, up_row, D_row, dgate_row, dup_row, last,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """One row; `last`: the index of the last expert."""
    row = tl.program_id(0)
    slot = tl.load(order_ptr + row)
    i = row.to(tl.int64)
    w = tl.load(weights_ptr + slot).to(tl.float32)
    word = gate_ptr.dtype.element_ty
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, WIDTH, BLOCK):
        o_i = first + tl.arange(0, BLOCK)
        mask = o_i < WIDTH
        g = tl.load(gate_ptr + i * gate_row + o_i, mask, 0.0).to(tl.float32)
        u = tl.load(up_ptr + i * up_row + o_i, mask, 0.0).to(tl.float32)
        d = tl.load(D_ptr + i * D_row + o_i, mask, 0.0).to(tl.float32)
        a, slope = _act(g, ACTIVATION)
        a = a.to(word).to(tl.float32)
        m = (a * u).to(word)
        total += d * m.to(tl.float32)
        d *= w
        da = (d * u).to(word).to(tl.float32)
        tl.store(dgate_ptr + i * dgate_row + o_i, (da * slope).to(word), mask)
        tl.store(dup_ptr + i * dup_row + o_i, (d * a).to(word), mask)
        tl.store(D_ptr + i * D_row + o_i, m, mask)
    dw = tl.where(row < tl.load(ends_ptr + last), tl.sum(total, 0), 0.0)
    tl.store(dw_ptr + slot, dw)


def expert_glu_bwd_(
    gate: Tensor,  # [S, I], any row stride
    up: Tensor,  # [S, I]
    D: Tensor,  # [S, I]; becomes m
    weights: Tensor,  # [T, k] contiguous
    rows: ExpertOrder,
    activation: str,  # one of `glu.ACTIVATIONS`
    dgate: Tensor,  # [S, I], written
    dup: Tensor,  # [S, I], written
) -> Tensor:
    """Writes dgate, dup and, in place of D, m. Returns dw [T, k] in fp32 (fp64 for fp64)."""
    _check(activation, gate, up, D, dgate, dup)
    if gate.shape[0] != rows.rows or weights.numel() != rows.rows or not weights.is_contiguous():
        raise ValueError(
            f"expected {rows.rows} rows and contiguous weights, got {gate.shape[0]} and "
            f"{tuple(weights.shape)}"
        )
    if not use_triton(gate):
        return reference(gate, up, D, weights, rows, activation, dgate, dup)
    dw = torch.zeros(rows.rows // rows.k, rows.k, dtype=torch.float32, device=gate.device)
    width = gate.shape[1]
    if gate.numel():
        with launch_device(gate):
            _expert_glu_bwd_kernel[(rows.rows,)](
                gate, up, D, weights, rows.order, rows.ends, dgate, dup, dw,
                gate.stride(0), up.stride(0), D.stride(0), dgate.stride(0), dup.stride(0),
                rows.ends.shape[0] - 1,
                WIDTH=width, BLOCK=min(_MAX_BLOCK, next_power_of_2(width)), ACTIVATION=activation,
                num_warps=4,
            )  # fmt: skip
    return dw
