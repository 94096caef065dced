r"""A gated MLP with LoRA on any projection, and optionally its RMS norm and residual.

    X = norm(h)  or h                  [T, K]
    [gate | up] = X W_gu^T + LoRA      [T, 2I]     one GEMM
    M = act(gate) * up                 [T, I]      one kernel
    Y = M W_d^T + LoRA (+ residual)    [T, K]      the residual is added to the rounded Y

Saved: h, rstd, gate/up [T, 2I], the r-wide XA and MA. Backward needs X and M only for dA, which
comes without them (but with dropout, where they are computed again). Backward, from dY [T, K]:

    dM = [dY, G_d] [W_d; A_d]          G_d = s dY B_d
    dgate, dup in place over gate and up; dA_d = G_d^T M and dB of gate and up in the same kernel
    dX = [dgate, dup, G_gu] [W_gu; A_gu]      dA of gate and up from h and rstd
    dh = d(norm)(dX) + dY              dY is the residual's gradient

gate/up are overwritten by their gradients, in the buffer that already has room for G_gu. A second
backward through the same graph (`retain_graph=True`) notices and recomputes them from h; so does
the first one with `keep_gate_up=False`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorafuse.kernels.eager import EagerFunction
from lorafuse.kernels.glu import glu_bwd_, glu_fwd
from lorafuse.kernels.glu import reference as glu_reference
from lorafuse.kernels.glu_adapters import glu_bwd_adapters_
from lorafuse.kernels.gradient_room import (
    ask_for_room,
    give_room,
    room_asked_by_the_maker,
    take_room,
    wide_gradient,
)
from lorafuse.kernels.lora_linear import (
    Group,
    LoraProjection,
    NormPrologue,
    RngState,
    adapter_gradients,
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


def reference(
    h: Tensor,
    gate_up: Sequence[LoraProjection],
    down: LoraProjection,
    activation: str,
    norm: NormPrologue | None = None,
    residual: bool = False,
) -> Tensor:
    """The definition in plain torch. h [..., K]; gate_up is (gate, up), or one of 2I outputs."""
    x = h if norm is None else norm.reference(h)
    gate, up = torch.cat(linear_reference(x, gate_up), -1).chunk(2, -1)
    (y,) = linear_reference(glu_reference(gate, up, activation), [down])
    return h + y if residual else y


@dataclass(frozen=True)
class _Spec:
    """What does not change between the row tiles of one call."""

    gate_up: tuple[LoraProjection, ...]
    down: LoraProjection
    activation: str
    norm: NormPrologue | None
    residual: bool
    dtype: torch.dtype
    keep_gate_up: bool

    def groups(self, tensors: Sequence[Tensor | None]) -> tuple[Group, Group]:
        """(gate and up, down), with the adapters and biases that autograd has handed over."""
        split = 3 * len(self.gate_up)
        return (
            Group(with_tensors(self.gate_up, tensors[:split]), self.dtype),
            Group(with_tensors((self.down,), tensors[split:]), self.dtype),
        )


class LoraMlpFunction(EagerFunction):
    """Forward and hand-derived backward; see the module's docstring for what is saved."""

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, spec: _Spec, tile_rows: int, *tensors: Tensor | None
    ) -> Tensor:
        with without_autocast(h):
            flat = as_rows(h)
            first, second = spec.groups(tensors)
            sums = torch.promote_types(h.dtype, spec.dtype) if spec.residual else spec.dtype
            y = flat.new_empty(flat.shape[0], second.out_features, dtype=sums)
            saved: list[Tensor | None] = []
            ctx.rng = []
            ctx.tiles = _tiles(flat.shape[0], tile_rows)
            if len(ctx.tiles) > 1:
                _keep_weights(_most(ctx.tiles, y), first, second)
            for rows in ctx.tiles:
                kept, rng = _forward_rows(spec, first, second, flat[rows], y[rows])
                saved += kept
                ctx.rng.append(rng)
        ask_for_room(ctx, second.gradient_room(_most(ctx.tiles, y)) if sums == spec.dtype else 0)
        ctx.room = room_asked_by_the_maker(h)
        ctx.save_for_backward(h, *saved, *tensors)
        ctx.spec = spec
        ctx.consumed = False
        # `.data`: autograd forbids a model to change a view in place that was made in here.
        return y.view(*h.shape[:-1], -1).data

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        h, *saved = ctx.saved_tensors
        n = 4 * len(ctx.tiles)
        kept, tensors = saved[:n], saved[n:]
        spec, needs, need_h = ctx.spec, ctx.needs_input_grad[3:], ctx.needs_input_grad[0]
        with without_autocast(h):
            first, second = spec.groups(tensors)
            flat, dflat = as_rows(h), as_rows(dy)
            dy_wide, dh = take_room(ctx, dy), _InputGradient(flat, ctx.room) if need_h else None
            if ctx.consumed or not spec.keep_gate_up:  # first for gate/up, and then for dX
                _keep_weights(_most(ctx.tiles, dflat), first)
            if len(ctx.tiles) > 1:
                _keep_weights(_most(ctx.tiles, dflat), first, second)
            sums: list[Tensor | None] = []
            for i, rows in enumerate(ctx.tiles):
                rstd, gu, gA, mA = kept[4 * i : 4 * i + 4]
                gradients = _backward_rows(
                    spec, first, second, flat[rows], dflat[rows],
                    None if dy_wide is None else dy_wide[rows],
                    None if dh is None else partial(dh.rows, rows), rstd,
                    None if ctx.consumed else gu, gA, mA, needs, ctx.rng[i],
                )  # fmt: skip
                sums = _add(sums, gradients)
            ctx.consumed = True
            adapters = [
                None if s is None or t is None else s.to(t.dtype)
                for s, t in zip(sums, tensors, strict=True)
            ]
        return None if dh is None else dh.whole(h.shape), None, None, *adapters


class _InputGradient:
    """dh [T, K], made when the first rows are written: gate/up and dM are gone by then."""

    def __init__(self, flat: Tensor, room: int) -> None:
        self.flat, self.room = flat, room
        self.wide: Tensor | None = None
        self.dh: Tensor | None = None

    def rows(self, rows: slice) -> Tensor:
        """Those of dh that are to be written."""
        if self.dh is None:
            self.wide = wide_gradient(self.flat, self.room)
            left = None if self.wide is None else self.wide[:, : self.flat.shape[1]]
            self.dh = torch.empty_like(self.flat) if left is None else left
        return self.dh[rows]

    def whole(self, shape: torch.Size) -> Tensor:
        """As backward returns it."""
        return give_room(self.rows(slice(None)).view(shape), self.wide)


def _tiles(rows: int, tile_rows: int) -> list[slice]:
    """Slices of at most `tile_rows` rows, all of nearly one size; one slice for 0."""
    if not 0 < tile_rows < rows:
        return [slice(None)]
    count = -(-rows // tile_rows)
    size = -(-rows // count)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _most(tiles: list[slice], y: Tensor) -> int:
    """Rows of the largest tile of `y`."""
    return int(y[tiles[0]].shape[0])


def _keep_weights(rows: int, *groups: Group) -> None:
    """Writes W once for several products, where it is no larger than what it multiplies."""
    if rows >= groups[0].in_features:
        for group in groups:
            group.keep_weights()


def _add(sums: list[Tensor | None], more: list[Tensor | None]) -> list[Tensor | None]:
    """Gradients of one more tile; summed in fp32 at least."""
    if not sums:
        return more
    return [
        a if b is None else b if a is None else _wide(a).add_(b)
        for a, b in zip(sums, more, strict=True)
    ]


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _forward_rows(
    spec: _Spec, first: Group, second: Group, h: Tensor, y: Tensor
) -> tuple[list[Tensor | None], tuple[RngState | None, RngState | None]]:
    """Writes Y of the rows `h` into `y`; returns what backward needs: rstd, gate/up, XA, MA."""
    rng_first = RngState.capture(h.device) if first.has_dropout else None
    x, x_wide, rstd = read_input(h, first, spec.norm)
    gu, gA = _gate_up(first, x, x_wide)
    del x, x_wide
    rng_second = RngState.capture(h.device) if second.has_dropout else None
    m, m_wide = _activate(gu, first, second, spec.activation)
    kept = [rstd, gu if spec.keep_gate_up else None, gA]
    del gu
    same = y.dtype == spec.dtype
    out = y if same else y.new_empty(y.shape, dtype=spec.dtype)
    _, mA = group_fwd(second, m, m_wide, out, h if spec.residual and same else None)
    if not same:
        torch.add(h, out, out=y)
    return [*kept, mA], (rng_first, rng_second)


def _backward_rows(
    spec: _Spec,
    first: Group,
    second: Group,
    h: Tensor,
    dy: Tensor,
    dy_wide: Tensor | None,
    dh: Callable[[], Tensor] | None,
    rstd: Tensor | None,
    gu: Tensor | None,
    gA: Tensor | None,
    mA: Tensor | None,
    needs: Sequence[bool],
    rng: tuple[RngState | None, RngState | None],
) -> list[Tensor | None]:
    """Writes dh into `dh()`, if that is wanted; the gradients of the adapters and biases."""
    need_h = dh is not None
    rng_first, rng_second = rng
    if gu is None:
        gu = _recompute_gate_up(first, h, spec.norm, gA)
    gu = gu.data  # autograd's version check is for readers that do not know; we are told
    split = 3 * len(spec.gate_up)
    width = first.out_features
    gate, up = gu[:, : width // 2], gu[:, width // 2 : width]
    need_first = need_h or any(needs[:split])
    below, dB = _down_backward(
        first, second, gate, up, spec.activation, dy, dy_wide, gA, mA, needs, need_first, rng_second
    )
    if not need_first:
        return [None] * split + below
    dgu, dgu_wide = gu[:, :width], None
    if need_h and gu.shape[1] > width:
        dgu_wide = gu
    dx, G = input_gradient(first, dgu, dgu_wide, rng_first, need_dx=need_h)
    above = normed_adapter_gradients(
        first, h, spec.norm, rstd, gA, dgu, G, needs[:split], rng_first, dB
    )
    del gu, gate, up, dgu, dgu_wide, G
    if dh is not None and dx is not None and spec.norm is not None:
        assert rstd is not None
        through, norm = dy if spec.residual else None, spec.norm
        rms_norm_bwd(dx, h, norm.weight, rstd, norm.offset, through, need_dweight=False, out=dh())
    elif dh is not None and dx is not None:
        dh().copy_(dx + dy if spec.residual else dx)
    return [*above, *below]


def _gate_up(
    group: Group, x: Tensor, x_wide: Tensor | None, xA: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """gate/up [T, 2I + room for G, where backward will fold], and the saved XA."""
    gu = x.new_empty((x.shape[0], group.out_features + group.gradient_room(x.shape[0])))
    return gu, group_fwd(group, x, x_wide, gu[:, : group.out_features], xA=xA)[1]


def _recompute_gate_up(
    group: Group, flat: Tensor, norm: NormPrologue | None, xA: Tensor | None
) -> Tensor:
    x, x_wide, _ = read_input(flat, group, norm)
    return _gate_up(group, x, x_wide, xA)[0]


def _activate(
    gu: Tensor, first: Group, second: Group, activation: str
) -> tuple[Tensor, Tensor | None]:
    """M in the compute dtype, in the left columns of a wide buffer where folding pays."""
    T, inner = gu.shape[0], second.in_features
    wide = None
    if second.folds_forward(T, copies_input=False):
        wide = gu.new_empty((T, inner + second.fold_forward))
        m = wide[:, :inner]
    else:
        m = gu.new_empty((T, inner))
    glu_fwd(gu[:, :inner], gu[:, inner : first.out_features], activation, m)
    return m, wide


def _down_backward(
    first: Group,
    second: Group,
    gate: Tensor,
    up: Tensor,
    activation: str,
    dy: Tensor,
    dy_wide: Tensor | None,
    gA: Tensor | None,
    mA: Tensor | None,
    needs: Sequence[bool],
    need_first: bool,
    rng: RngState | None,
) -> tuple[list[Tensor | None], list[Tensor | None] | None]:
    """Gradients of the down projection, and dB/s of gate and up where they came along.

    With `need_first`, leaves dgate and dup in gate and up.
    """
    T, split = dy.shape[0], 3 * len(first.projections)
    down_needs = needs[split:]
    if dy_wide is None and need_first and second.folds_backward(T, copies_input=True):
        dy_wide = gate.new_empty((T, second.out_features + second.fold_backward))
        dy_wide[:, : second.out_features].copy_(dy)
    dy = dy.to(second.dtype) if dy_wide is None else dy_wide[:, : second.out_features]
    if not need_first:
        m = gate.new_empty((T, second.in_features))
        glu_fwd(gate, up, activation, m)
        _, G = input_gradient(second, dy, None, need_dx=False)
        return adapter_gradients(second, m, mA, dy, G, down_needs, rng), None
    dm, G = input_gradient(second, dy, dy_wide, rng)
    assert dm is not None
    if second.has_dropout:
        # dA's other factor is D(m): m appears where dm was, once gate and up are overwritten.
        glu_bwd_(gate, up, dm, activation)
        return adapter_gradients(second, dm, mA, dy, G, down_needs, rng), None
    ranks = first.ranks if len(first.ranks) == 2 else first.ranks * 2
    wanted = list(needs[1:split:3]) * (2 // len(first.ranks))
    xA_gate, xA_up = (
        gA[:, r] if gA is not None and r.stop > r.start and need else None
        for r, need in zip(ranks, wanted, strict=True)
    )
    products = glu_bwd_adapters_(
        gate, up, dm, activation,
        None if G is None or not down_needs[0] else G[:, second.ranks[0]], xA_gate, xA_up,
    )  # fmt: skip
    dB: list[Tensor | None] = [products.dB_gate, products.dB_up]
    if len(first.ranks) == 1:
        dB = [None if None in dB else torch.cat([x for x in dB if x is not None])]
    below = adapter_gradients(second, dm, mA, dy, G, down_needs, rng, dA=products.dA_down)
    return below, dB


def lora_mlp(
    h: Tensor,
    gate_up: Sequence[LoraProjection],
    down: LoraProjection,
    activation: str,
    norm: NormPrologue | None = None,
    residual: bool = False,
    keep_gate_up: bool = True,
    tile_rows: int = 0,
) -> Tensor:
    """Y = down(act(gate(X)) * up(X)) (+ h), with X = norm(h) or h, LoRA on any of the projections.

    Under autocast the GEMMs run in autocast's dtype, else in `h`'s. Gradients flow to `h` and to
    each A, B and bias that requires them; base weights and the norm's weight are frozen and get
    none.

    Args:
        h: [..., K], fp32/fp16/bf16 (fp64 for tests).
        gate_up: (gate, up) of [I, K] each, or one projection of [2I, K] whose first half is gate.
        down: of [K', I].
        activation: "silu", "gelu" (erf) or "gelu_tanh".
        norm: frozen RMS norm in front, or None.
        residual: add `h` to the output (K' = K).
        keep_gate_up: keep gate/up [T, 2I] for backward; else it is computed from `h` again.
        tile_rows: forward and backward go through the tokens in tiles of at most so many, so that
            gate/up and M exist for one tile at a time (gate/up only without `keep_gate_up`); 0: all
            at once. Outputs may differ in the last bit from those of another tile size.

    Returns:
        [..., K'] in the compute dtype, or with `residual` in the promoted dtype of that and `h`'s.

    Raises:
        ValueError: shapes do not fit together.
    """
    check_projections(h, gate_up)
    inner = sum(p.out_features for p in gate_up)
    if len(gate_up) > 2 or inner != 2 * down.in_features:
        raise ValueError(
            f"gate and up give {inner} features in {len(gate_up)} projections; expected twice the "
            f"down projection's {down.in_features}, in one or two"
        )
    check_projections(h.new_empty((0, down.in_features)), [down])
    if residual and down.out_features != h.shape[-1]:
        raise ValueError(
            f"a residual needs as many outputs as inputs; got {down.out_features} and {h.shape[-1]}"
        )
    spec = _Spec(
        without_tensors(gate_up),
        without_tensors([down])[0],
        activation,
        norm,
        residual,
        compute_dtype(h),
        keep_gate_up,
    )
    output: Tensor = LoraMlpFunction.apply(h, spec, tile_rows, *flat_tensors([*gate_up, down]))
    return output
