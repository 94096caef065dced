r"""Backward of a gated linear unit, and the adapter gradients that read the same tensors.

    m = act(gate) * up        dgate, dup as in `glu`, in place of gate and up

    dA_down = G^T m           G [T, Rd]: s dY B of the down projection
    dB_gate = dgate^T XA_gate     XA [T, R]: what the forward pass saved
    dB_up   = dup^T XA_up

gate, up, dm: [T, I]. The three products are r wide and I long: each would read a [T, I] tensor
again, and m would have to be written first. Here every tile is still in registers when its products
are taken, on the tensor cores; m is never written. At [8192, 14336] in bf16 that is 1.17 GB moved
in place of 2.1.

A program owns a block of columns and walks down a share of the rows; the shares' sums are fp32,
added up in a fixed order by a second, small kernel: runs repeat bit for bit.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lorafuse.kernels.glu import _act, _check, glu_bwd_
from lorafuse.kernels.runtime import (
    cached_launch,
    cdiv,
    interpreting,
    launch_device,
    mm_fp32,
    next_power_of_2,
    tl,
    triton,
    use_triton,
)

__all__ = ["GluAdapterGradients", "glu_bwd_adapters_", "reference"]

# Above, the sums of a block of columns no longer fit into registers.
MAX_RANK = 64
# From a sweep over tiles, warps, stages and programs at [8192, 14336] and ranks of 32: 0.474 ms,
# where reading and writing takes 0.39 (gpu/sweep_glu_adapters.py, H100, 2026-11-25).
# Tiles of 32 x 128 reach 0.468, but have no registers left for ranks of 64.
_BLOCK_T = 32
_BLOCK_I = 64
_WARPS = 4
_STAGES = 2
# Programs over all: several rounds for each of a GPU's 132 multiprocessors.
_PROGRAMS = 1024


@dataclass(frozen=True, eq=False)
class GluAdapterGradients:
    """The products in fp32 (fp64 for fp64), None where the factor was.

    Attributes:
        dA_down: [Rd, I].
        dB_gate: [I, R of gate].
        dB_up: [I, R of up].
    """

    dA_down: Tensor | None
    dB_gate: Tensor | None
    dB_up: Tensor | None


def reference(
    gate: Tensor,
    up: Tensor,
    dm: Tensor,
    activation: str,
    G: Tensor | None,
    xA_gate: Tensor | None,
    xA_up: Tensor | None,
) -> GluAdapterGradients:
    """The definition: `glu_bwd_`, then one product after the other. dm becomes m."""
    glu_bwd_(gate, up, dm, activation)
    return GluAdapterGradients(
        None if G is None else mm_fp32(G.t(), dm),
        None if xA_gate is None else mm_fp32(gate.t(), xA_gate),
        None if xA_up is None else mm_fp32(up.t(), xA_up),
    )


@triton.jit
def _pinned(tile):
    """The 16-bit tile itself, by an instruction that the compiler must not repeat.

    The stores want the tile in one layout and tl.dot in another. Left alone, Triton 3.6 computes
    all of it twice, once in each (60 instructions an element in place of 38); this makes it carry
    the 16-bit result over through shared memory.
    """
    return tl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [tile], dtype=tile.dtype, is_pure=False, pack=2
    )


@triton.jit
def _silu(g):
    """`_act` of silu by the same two approximations, without the scaling of subnormals around them.

    1 + e^-g is none, and an e^-g that is one vanishes beside 1: 30 instructions in place of 38.
    """
    s = tl.inline_asm_elementwise(
        """{
        .reg .f32 e;
        ex2.approx.ftz.f32 e, $1;
        add.ftz.f32 e, e, 0f3F800000;
        rcp.approx.ftz.f32 $0, e;
        }""",
        "=f,f", [g * -1.4426950408889634], dtype=tl.float32, is_pure=True, pack=1,
    )  # fmt: skip
    return g * s, s * (1.0 + g * (1.0 - s))


@triton.jit
def _add_product(
    sums, factor_ptr, row, tile, o_t, m_t,
    R: tl.constexpr, P: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """sums [P, BLOCK_I] + factor^T tile, for a factor [T, R] and a tile [BLOCK_T, BLOCK_I]."""
    o_r = tl.arange(0, P)[None, :]
    factor = tl.load(factor_ptr + o_t * row + o_r, m_t & (o_r < R), 0.0)
    if INTERPRETED:  # Triton's interpreter multiplies bf16 by its bits
        factor, tile = factor.to(tl.float32), tile.to(tl.float32)
    return tl.dot(tl.trans(factor), tile, sums)


@cached_launch
@triton.jit
def _glu_bwd_adapters_kernel(
    gate_ptr, up_ptr, dm_ptr, G_ptr, xAg_ptr, xAu_ptr, dA_ptr, dBg_ptr, dBu_ptr,
    T, tiles, gate_row, up_row, dm_row, G_row, xAg_row, xAu_row,
    WIDTH: tl.constexpr, RD: tl.constexpr, RG: tl.constexpr, RU: tl.constexpr,
    PD: tl.constexpr, PG: tl.constexpr, PU: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr, ACTIVATION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """BLOCK_I columns over `tiles` tiles of BLOCK_T rows; P are the ranks R, padded for tl.dot.

    The sums are [P, BLOCK_I]: with the rank as the rows of the product, a tile is tl.dot's second
    operand, which needs no transposing.
    """
    share = tl.program_id(1).to(tl.int64)
    o_i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)[None, :]
    m_i = o_i < WIDTH
    dA = tl.zeros([PD, BLOCK_I], tl.float32)
    dBg = tl.zeros([PG, BLOCK_I], tl.float32)
    dBu = tl.zeros([PU, BLOCK_I], tl.float32)
    word = gate_ptr.dtype.element_ty
    for tile in range(tiles):
        o_t = (share * tiles + tile) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
        m_t = o_t < T
        mask = m_t & m_i
        gates = gate_ptr + o_t * gate_row + o_i
        ups = up_ptr + o_t * up_row + o_i
        g = tl.load(gates, mask, 0.0).to(tl.float32)
        u = tl.load(ups, mask, 0.0).to(tl.float32)
        dm = tl.load(dm_ptr + o_t * dm_row + o_i, mask, 0.0).to(tl.float32)
        if ACTIVATION == "silu" and not INTERPRETED:
            a, slope = _silu(g)
        else:
            a, slope = _act(g, ACTIVATION)
        a = a.to(word).to(tl.float32)
        da = (dm * u).to(word).to(tl.float32)
        dgate, dup, m = (da * slope).to(word), (dm * a).to(word), (a * u).to(word)
        if not INTERPRETED:
            dgate, dup, m = _pinned(dgate), _pinned(dup), _pinned(m)
        tl.store(gates, dgate, mask)
        tl.store(ups, dup, mask)
        if RD > 0:
            dA = _add_product(dA, G_ptr, G_row, m, o_t, m_t, RD, PD, INTERPRETED)
        if RG > 0:
            dBg = _add_product(dBg, xAg_ptr, xAg_row, dgate, o_t, m_t, RG, PG, INTERPRETED)
        if RU > 0:
            dBu = _add_product(dBu, xAu_ptr, xAu_row, dup, o_t, m_t, RU, PU, INTERPRETED)
    # The rows past a rank are zeros and are stored too: with a mask of one row (rank 1), Triton 3.6
    # wrote wrong sums on an H100.
    if RD > 0:
        tl.store(dA_ptr + (share * PD + tl.arange(0, PD)[:, None]) * WIDTH + o_i, dA, m_i)
    if RG > 0:
        tl.store(dBg_ptr + (share * PG + tl.arange(0, PG)[:, None]) * WIDTH + o_i, dBg, m_i)
    if RU > 0:
        tl.store(dBu_ptr + (share * PU + tl.arange(0, PU)[:, None]) * WIDTH + o_i, dBu, m_i)


@triton.jit
def _sum_shares(
    partial_ptr, out_ptr, shares, o_i,
    WIDTH: tl.constexpr, R: tl.constexpr, P: tl.constexpr, TRANSPOSED: tl.constexpr,
    BLOCK_I: tl.constexpr,
):  # fmt: skip
    o_p = tl.arange(0, P)[:, None]
    m_i = o_i < WIDTH
    total = tl.zeros([P, BLOCK_I], tl.float32)
    for share in range(shares):
        total += tl.load(partial_ptr + (share * P + o_p) * WIDTH + o_i, m_i, 0.0)
    out = out_ptr + (o_i * R + o_p if TRANSPOSED else o_p * WIDTH + o_i)
    tl.store(out, total, m_i & (o_p < R))


@cached_launch
@triton.jit
def _sum_shares_kernel(
    dA_ptr, dBg_ptr, dBu_ptr, dA_out, dBg_out, dBu_out, shares,
    WIDTH: tl.constexpr, RD: tl.constexpr, RG: tl.constexpr, RU: tl.constexpr,
    PD: tl.constexpr, PG: tl.constexpr, PU: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """BLOCK_I columns of one of the three; the two of B are turned, into B's own layout."""
    which = tl.program_id(1)
    o_i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)[None, :]
    if RD > 0:
        if which == 0:
            _sum_shares(dA_ptr, dA_out, shares, o_i, WIDTH, RD, PD, False, BLOCK_I)
    if RG > 0:
        if which == 1:
            _sum_shares(dBg_ptr, dBg_out, shares, o_i, WIDTH, RG, PG, True, BLOCK_I)
    if RU > 0:
        if which == 2:
            _sum_shares(dBu_ptr, dBu_out, shares, o_i, WIDTH, RU, PU, True, BLOCK_I)


def _serves(gate: Tensor, factors: tuple[Tensor | None, ...]) -> bool:
    given = [f for f in factors if f is not None]
    return (
        use_triton(gate)
        and gate.dtype in (torch.float16, torch.bfloat16)
        and bool(given)
        and all(f.shape[1] <= MAX_RANK and f.dtype == gate.dtype for f in given)
        and gate.numel() > 0
    )


def glu_bwd_adapters_(
    gate: Tensor,  # [T, I], any row stride; becomes dgate
    up: Tensor,  # [T, I]; becomes dup
    dm: Tensor,  # [T, I]; its content is undefined afterwards
    activation: str,  # one of `glu.ACTIVATIONS`
    G: Tensor | None,  # [T, Rd], any row stride
    xA_gate: Tensor | None,  # [T, Rg]
    xA_up: Tensor | None,  # [T, Ru]
) -> GluAdapterGradients:
    """In place: gate <- dgate, up <- dup; returns the products of the module's docstring.

    One kernel for 16-bit tensors and ranks up to `MAX_RANK` on a GPU; else `reference`.
    """
    factors = G, xA_gate, xA_up
    _check(activation, gate, up, dm)
    for factor in factors:
        if factor is not None and (factor.shape[0] != gate.shape[0] or factor.stride(1) != 1):
            raise ValueError(
                f"expected [{gate.shape[0]}, R] with contiguous rows, got {tuple(factor.shape)} "
                f"with strides {factor.stride()}"
            )
    if not _serves(gate, factors):
        return reference(gate, up, dm, activation, G, xA_gate, xA_up)
    T, width = gate.shape
    columns = cdiv(width, _BLOCK_I)
    rows = cdiv(T, _BLOCK_T)
    tiles = cdiv(rows, min(rows, cdiv(_PROGRAMS, columns)))
    shares = cdiv(rows, tiles)
    ranks = RD, RG, RU = tuple(0 if f is None else f.shape[1] for f in factors)
    padded = PD, PG, PU = tuple(max(16, next_power_of_2(R)) for R in ranks)
    partial = [
        gate.new_empty((shares, P, width), dtype=torch.float32) if R else gate
        for R, P in zip(ranks, padded, strict=True)
    ]
    shapes = (RD, width), (width, RG), (width, RU)
    sums = [
        gate.new_empty(shape, dtype=torch.float32) if R else None
        for R, shape in zip(ranks, shapes, strict=True)
    ]
    with launch_device(gate):
        _glu_bwd_adapters_kernel[(columns, shares)](
            gate, up, dm, *(gate if f is None else f for f in factors), *partial,
            T, tiles, gate.stride(0), up.stride(0), dm.stride(0),
            *(0 if f is None else f.stride(0) for f in factors),
            WIDTH=width, RD=RD, RG=RG, RU=RU, PD=PD, PG=PG, PU=PU,
            BLOCK_T=_BLOCK_T, BLOCK_I=_BLOCK_I, ACTIVATION=activation,
            INTERPRETED=interpreting(), num_warps=_WARPS, num_stages=_STAGES,
        )  # fmt: skip
        _sum_shares_kernel[(columns, 3)](
            *partial, *(gate if x is None else x for x in sums), shares,
            WIDTH=width, RD=RD, RG=RG, RU=RU, PD=PD, PG=PG, PU=PU, BLOCK_I=_BLOCK_I,
        )  # fmt: skip
    return GluAdapterGradients(*sums)
