"""Gated linear units: SwiGLU and GeGLU, exact and tanh.

    m = act(g) * u            dg = dm * u * act'(g)            du = dm * act(g)

With s(z) = 1 / (1 + exp(-z)), phi the normal density and Phi(g) = (1 + erf(g / sqrt 2)) / 2:

    silu       act = g * s(g)        act' = s(g) * (1 + g * (1 - s(g)))
    gelu       act = g * Phi(g)      act' = Phi(g) + g * phi(g)
    gelu_tanh  act = g * s(2z)       act' = s(2z) + g * s(2z) * s(-2z) * 2z'
               z = sqrt(2/pi) * (g + 0.044715 g^3); the usual form is 0.5 * g * (1 + tanh z)

gate, up, m: [T, I], rows may have any stride. Saved for backward: gate and up; act(g) is
recomputed. All arithmetic is fp32; act(g) and dm * u are rounded to the storage dtype and then
multiplied, as stock modules do, so that the forward pass gives their very bits: in 16 bit a missing
rounding is a bias, which 30 layers of a real model add up to 0.02 in the loss.

Shazeer, "GLU Variants Improve Transformer", 2020, https://arxiv.org/abs/2002.05202
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorafuse.kernels.eager import EagerFunction
from lorafuse.kernels.runtime import (
    cached_launch,
    cdiv,
    launch_device,
    next_power_of_2,
    tl,
    triton,
    use_triton,
)

__all__ = ["ACTIVATIONS", "glu", "glu_bwd_", "glu_fwd", "reference"]

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")

# Elements of one tile: 16 a thread at 4 warps, two 16-byte accesses of each 16-bit tensor.
_TILE = 2048
_MAX_BLOCK_I = 1024

_SQRT_HALF = math.sqrt(0.5)
_INV_SQRT_2PI = 1 / math.sqrt(2 * math.pi)
_TWO_SQRT_2_OVER_PI = 2 * math.sqrt(2 / math.pi)
_CUBIC = 0.044715
# Beyond +-16, s(2z) is 0 or 1 to the last bit, in fp64 too. z and z' of the clamped g stay finite,
# so that s(2z) * s(-2z) * z' is 0 there and not NaN.
_TANH_BOUND = 16.0


def reference(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """The definition, for gate and up [..., I]."""
    return _activate(_wide(gate), activation).to(gate.dtype) * up


def _wide(x: Tensor) -> Tensor:
    """`x` in the dtype of the arithmetic: fp32, or fp64 for fp64."""
    return x if x.dtype == torch.float64 else x.float()


def _activate(g: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return torch.nn.functional.silu(g)
    return torch.nn.functional.gelu(g, approximate="none" if activation == "gelu" else "tanh")


def _activate_backward(g: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """(act(g), act'(g)) by the formulas above."""
    if activation == "silu":
        s = torch.sigmoid(g)
        return g * s, s * (1 + g * (1 - s))
    if activation == "gelu":
        Phi = 0.5 * (1 + torch.erf(g * _SQRT_HALF))
        return g * Phi, Phi + g * torch.exp(-0.5 * g * g) * _INV_SQRT_2PI
    c = g.clamp(-_TANH_BOUND, _TANH_BOUND)
    twice_z = _TWO_SQRT_2_OVER_PI * (c + _CUBIC * c * c * c)
    s = torch.sigmoid(twice_z)
    # s(-2z) and not 1 - s(2z), which loses its leading digits where it is multiplied by c^3
    ds = s * torch.sigmoid(-twice_z)
    return g * s, s + c * ds * _TWO_SQRT_2_OVER_PI * (1 + 3 * _CUBIC * c * c)


@triton.jit
def _act(g, ACTIVATION: tl.constexpr):
    """(act(g), act'(g)) of an fp32 tile; the compiler drops the derivative where it is not used."""
    if ACTIVATION == "silu":
        s = tl.sigmoid(g)
        slope = s * (1.0 + g * (1.0 - s))
    elif ACTIVATION == "gelu":
        s = 0.5 * (1.0 + tl.erf(g * 0.7071067811865476))  # sqrt(1/2)
        slope = s + g * tl.exp(-0.5 * g * g) * 0.3989422804014327  # 1 / sqrt(2 pi)
    else:
        c = tl.minimum(tl.maximum(g, -16.0), 16.0)  # as _TANH_BOUND
        twice_z = 1.5957691216057308 * (c + 0.044715 * c * c * c)  # 2 sqrt(2/pi)
        # s(2z) and s(2z) * s(-2z) from one exp, without the cancellation of 1 - s(2z)
        e = tl.exp(-tl.abs(twice_z))
        r = 1.0 / (1.0 + e)
        s = tl.where(twice_z >= 0, r, e * r)
        slope = s + c * (e * r * r) * 1.5957691216057308 * (1.0 + 3 * 0.044715 * c * c)
    return g * s, slope


@triton.jit
def _tile_offsets(T, columns, WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr):
    """Rows (int64), columns and mask of this program's tile; `columns` tiles make up a row."""
    pid = tl.program_id(0)
    o_t = (pid // columns) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    o_i = (pid % columns) * BLOCK_I + tl.arange(0, BLOCK_I)[None, :]
    return o_t.to(tl.int64), o_i, (o_t < T) & (o_i < WIDTH)


@cached_launch
@triton.jit
def _glu_fwd_kernel(
    gate_ptr, up_ptr, m_ptr, T, columns, gate_row, up_row, m_row,
    WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """m = act(gate) * up."""
    o_t, o_i, mask = _tile_offsets(T, columns, WIDTH, BLOCK_T, BLOCK_I)
    g = tl.load(gate_ptr + o_t * gate_row + o_i, mask, 0.0).to(tl.float32)
    u = tl.load(up_ptr + o_t * up_row + o_i, mask, 0.0).to(tl.float32)
    a, _ = _act(g, ACTIVATION)
    a = a.to(gate_ptr.dtype.element_ty).to(tl.float32)
    tl.store(m_ptr + o_t * m_row + o_i, (a * u).to(m_ptr.dtype.element_ty), mask)


@cached_launch
@triton.jit
def _glu_bwd_kernel(
    gate_ptr, up_ptr, dm_ptr, dgate_ptr, dup_ptr, m_ptr, T, columns,
    gate_row, up_row, dm_row, dgate_row, dup_row, m_row,
    WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr, ACTIVATION: tl.constexpr,
    STORE_M: tl.constexpr,
):  # fmt: skip
    """dgate = (dm * up) * act'(gate); dup = dm * act(gate); m = act(gate) * up."""
    o_t, o_i, mask = _tile_offsets(T, columns, WIDTH, BLOCK_T, BLOCK_I)
    g = tl.load(gate_ptr + o_t * gate_row + o_i, mask, 0.0).to(tl.float32)
    u = tl.load(up_ptr + o_t * up_row + o_i, mask, 0.0).to(tl.float32)
    dm = tl.load(dm_ptr + o_t * dm_row + o_i, mask, 0.0).to(tl.float32)
    a, slope = _act(g, ACTIVATION)
    a = a.to(gate_ptr.dtype.element_ty).to(tl.float32)
    da = (dm * u).to(gate_ptr.dtype.element_ty).to(tl.float32)
    dgate, dup = da * slope, dm * a
    tl.store(dgate_ptr + o_t * dgate_row + o_i, dgate.to(dgate_ptr.dtype.element_ty), mask)
    tl.store(dup_ptr + o_t * dup_row + o_i, dup.to(dup_ptr.dtype.element_ty), mask)
    if STORE_M:
        tl.store(m_ptr + o_t * m_row + o_i, (a * u).to(m_ptr.dtype.element_ty), mask)


def _check(activation: str, gate: Tensor, *others: Tensor) -> None:
    """Refuse what the kernels would compute wrongly, or read or write out of bounds."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    for tensor in (gate, *others):
        if tensor.dim() != 2 or tensor.shape != gate.shape or tensor.device != gate.device:
            raise ValueError(
                f"expected tensors [T, I] of one shape on one device, got {tuple(gate.shape)} "
                f"on {gate.device} and {tuple(tensor.shape)} on {tensor.device}"
            )
        if tensor.stride(1) != 1 and tensor.shape[1] > 1:
            raise ValueError(f"expected contiguous rows, got strides {tensor.stride()}")


def _launch(kernel: Any, tensors: tuple[Tensor, ...], activation: str, **flags: bool) -> None:
    """Run `kernel` over tiles of the [T, I] tensors."""
    T, width = tensors[0].shape
    if T * width == 0:
        return
    BLOCK_I = min(next_power_of_2(width), _MAX_BLOCK_I)
    BLOCK_T = _TILE // BLOCK_I
    columns = cdiv(width, BLOCK_I)
    with launch_device(tensors[0]):
        kernel[(cdiv(T, BLOCK_T) * columns,)](
            *tensors, T, columns, *(t.stride(0) for t in tensors),
            WIDTH=width, BLOCK_T=BLOCK_T, BLOCK_I=BLOCK_I, ACTIVATION=activation, **flags,
            num_warps=4,
        )  # fmt: skip


def glu_fwd(
    gate: Tensor,  # [T, I], any row stride
    up: Tensor,  # [T, I]
    activation: str,  # one of ACTIVATIONS
    out: Tensor,  # [T, I]: m is written here; may be gate or up itself
) -> None:
    """Write act(gate) * up into `out`."""
    _check(activation, gate, up, out)
    if use_triton(gate):
        _launch(_glu_fwd_kernel, (gate, up, out), activation)
    else:
        out.copy_(reference(gate, up, activation))


def glu_bwd_(
    gate: Tensor,  # [T, I], any row stride; becomes dgate
    up: Tensor,  # [T, I]; becomes dup
    dm: Tensor,  # [T, I]; becomes m
    activation: str,  # one of ACTIVATIONS
) -> None:
    """In place: gate <- dgate, up <- dup, dm <- m = act(gate) * up, which dA of `down` needs."""
    _glu_bwd(gate, up, dm, activation, gate, up, dm)


def _glu_bwd(
    gate: Tensor,
    up: Tensor,
    dm: Tensor,
    activation: str,
    dgate: Tensor,
    dup: Tensor,
    m: Tensor | None,
) -> None:
    """Write dgate, dup and, unless it is None, m; each may be one of the inputs."""
    outputs = (dgate, dup) if m is None else (dgate, dup, m)
    _check(activation, gate, up, dm, *outputs)
    if use_triton(gate):
        tensors = (gate, up, dm, dgate, dup, dup if m is None else m)
        _launch(_glu_bwd_kernel, tensors, activation, STORE_M=m is not None)
        return
    wide_up, wide_dm = _wide(up), _wide(dm)
    a, slope = _activate_backward(_wide(gate), activation)
    a, da = (_wide(t.to(gate.dtype)) for t in (a, wide_dm * wide_up))
    results = (da * slope, wide_dm * a, a * wide_up)
    for output, result in zip(outputs, results, strict=False):
        output.copy_(result)


class GLUFunction(EagerFunction):
    """act(gate) * up with the backward pass derived by hand."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        glu_fwd(_as_rows(gate), _as_rows(up), activation, _as_rows(out))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dm: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        dup = torch.empty(up.shape, dtype=up.dtype, device=up.device)
        rows = [_as_rows(t) for t in (gate, up, dm, dgate, dup)]
        _glu_bwd(rows[0], rows[1], rows[2], ctx.activation, rows[3], rows[4], None)
        return dgate, dup, None


def _as_rows(x: Tensor) -> Tensor:
    """`x` [..., I] as [T, I] with contiguous rows, copied only where no such view exists."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    return x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)


def glu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate) * up, out of place; differentiable in both.

    Args:
        gate: [..., I], any strides.
        up: as gate.
        activation: "silu", "gelu" (exact) or "gelu_tanh".

    Returns:
        m, contiguous, in gate's dtype.

    Raises:
        ValueError: shapes or devices differ, or the activation is unknown.
    """
    if gate.shape != up.shape:
        raise ValueError(f"gate and up differ in shape: {tuple(gate.shape)} and {tuple(up.shape)}")
    out: Tensor = GLUFunction.apply(gate, up, activation)
    return out
