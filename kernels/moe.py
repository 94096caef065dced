r"""The experts of a mixture of experts, with LoRA on either projection. The router stays stock.

Token t goes to k experts e = index[t, j] with the router's weights w[t, j]; each expert is a gated
MLP, frozen, in 4 bit or not, with or without LoRA:

    y[t] = sum over j of w[t, j] Y_e(x[t])
    Y_e(x) = D_e (act(g) * u) + b_d,e     [g | u] = U_e x + b_u,e
    U_e = W_e + s B_e A_e   [2I, H]       D_e likewise, [H, I]

The biases are frozen, and mostly none. The activation may be a clamped one, and g and u may be
alternating outputs (`clamped_swiglu`).

The T k slots are sorted by expert once (`expert_order`); all products are grouped ones over the S =
T k rows (`grouped_linear`), and the sum over a token's experts is taken in fp32 in a fixed order.
Where W is written afresh anyway (4 bit, or cast to the compute dtype), LoRA is folded into K as in
`lora_linear`, for W [E, N, K] goes straight into the left columns of the wider buffer (or, stored
transposed, [E, K, N], into its upper rows):

    forward    Y  = [X, XA] [W, sB]^T            XA = X A^T
    backward   dX = [dY, G] [W; A]               G  = s dY B

else the narrow product is added in the large one's accumulator, or to its output.

Saved: x [T, H] (not its k copies), gate/up [S, 2I], the r-wide XA and MA, the order, w. Backward,
from dy [T, H] gathered to the rows unweighted:

    D = [dy, G_d] [W_d; A_d]        dw = <D, m> + <dy, b_d>: without the experts' outputs
    dA_d = (w G_d)^T m              dB_d = s dy^T (w MA)
    dgate, dup of dM = w D          dA, dB of gate/up from G and XA as ever
    dx[t] = sum over j of dX        as in forward

The dequantised weights and the gathered rows live for one product; the allocator gives the next
layer the same memory. Nothing is read back to the host.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorafuse.kernels.clamped_swiglu import (
    ClampedSwiglu,
    clamped_swiglu_bwd_,
    clamped_swiglu_fwd,
)
from lorafuse.kernels.clamped_swiglu import reference as clamped_reference
from lorafuse.kernels.eager import EagerFunction
from lorafuse.kernels.expert_glu import expert_glu_bwd_
from lorafuse.kernels.expert_order import ExpertOrder, combine, gather, sort_by_expert
from lorafuse.kernels.glu import glu_fwd
from lorafuse.kernels.glu import reference as glu_reference
from lorafuse.kernels.grouped_linear import grouped_linear, grouped_outer, uses_grouped_mm
from lorafuse.kernels.lora_linear import (
    as_rows,
    compute_dtype,
    fold_alignment,
    fold_columns,
    without_autocast,
)
from lorafuse.kernels.nf4 import Quantised4bit, dequantise_experts
from lorafuse.kernels.nf4 import reference as dequantised
from lorafuse.kernels.runtime import mm_fp32

__all__ = ["Activation", "ExpertProjection", "moe", "reference"]

# One of `glu.ACTIVATIONS`, of outputs whose first half is the gate; or a clamped one.
Activation = str | ClampedSwiglu


@dataclass(frozen=True, eq=False)
class ExpertProjection:
    """One projection of all experts with its active adapter, as the kernels see it.

    Attributes:
        weight: [E, N, K] frozen, fp32/fp16/bf16, or `Quantised4bit` of [E * N, K].
        experts: E.
        transposed: the weight is [E, K, N], or `Quantised4bit` of [E * K, N].
        bias: [E, N] contiguous, frozen, or None.
        A: [E, R, K] or None where there is no active adapter.
        B: [E, N, R], any strides, present exactly when `A` is.
        scale: s, the adapter's scaling.
    """

    weight: Tensor | Quantised4bit
    experts: int
    A: Tensor | None = None
    B: Tensor | None = None
    scale: float = 1.0
    transposed: bool = False
    bias: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, N, K)."""
        *_, n, k = map(int, self.weight.shape)
        n = n // self.experts if self.packed else n
        return (self.experts, k, n) if self.transposed else (self.experts, n, k)

    @property
    def packed(self) -> bool:
        return isinstance(self.weight, Quantised4bit)

    @property
    def rank(self) -> int:
        return 0 if self.A is None else int(self.A.shape[1])


def reference(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    gate_up: ExpertProjection,
    down: ExpertProjection,
    activation: Activation,
) -> Tensor:
    """The definition in plain torch, expert by expert. x [T, H]; index and weights [T, k]."""
    y = x.new_zeros((x.shape[0], down.shape[1]))
    for e in range(gate_up.experts):
        tokens, j = torch.where(index == e)
        if len(tokens) == 0:
            continue
        gu = _one_expert(gate_up, e, x[tokens])
        if isinstance(activation, ClampedSwiglu):
            m = clamped_reference(gu, activation)
        else:
            gate, up = gu.chunk(2, -1)
            m = glu_reference(gate, up, activation)
        out = _one_expert(down, e, m) * weights[tokens, j].unsqueeze(1)
        y = y.index_add(0, tokens, out.to(y.dtype))
    return y


def _one_expert(p: ExpertProjection, e: int, x: Tensor) -> Tensor:
    w = p.weight
    if isinstance(w, Quantised4bit):
        w = dequantised(w).unflatten(0, (p.experts, -1))
    weight = w[e]
    y = x @ (weight if p.transposed else weight.t()).to(x.dtype)
    if p.A is not None and p.B is not None:
        y = y + (x @ p.A[e].to(x.dtype).t()) @ p.B[e].to(x.dtype).t() * p.scale
    return y if p.bias is None else y + p.bias[e].to(x.dtype)


class _Projection:
    """The products of one projection in one forward or backward pass.

    Args:
        p: the projection, with the adapters that autograd has handed over.
        dtype: compute dtype.
        device: of the weights.
    """

    def __init__(self, p: ExpertProjection, dtype: torch.dtype, device: torch.device) -> None:
        self.p, self.dtype, self.device = p, dtype, device
        self.E, self.N, self.K = p.shape
        self.rank = p.rank
        self.writes = p.packed or p.weight.dtype != dtype  # type: ignore[union-attr]
        self.fold = 0
        if self.writes and self.rank:
            self.fold = fold_columns(self.rank, fold_alignment(device))

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def wide(self, rows: ExpertOrder, columns: int) -> tuple[Tensor, Tensor | None]:
        """([S, columns] to be filled, the buffer with room for LoRA's part, where it is folded)."""
        whole = self._empty(rows.rows, columns + self.fold)
        return whole[:, :columns], whole if self.fold else None

    def _buffer(self, n: int, k: int) -> Tensor:
        """[E, n, k] to be filled, laid out as the weight is."""
        if self.p.transposed:
            return self._empty(self.E, k, n).transpose(1, 2)
        return self._empty(self.E, n, k)

    def _weight(self, out: Tensor | None = None) -> Tensor:
        """W [E, N, K], into `out` where that is given: (a part of) a `_buffer`."""
        w, transposed = self.p.weight, self.p.transposed
        if isinstance(w, Quantised4bit):
            out = self._buffer(self.N, self.K) if out is None else out
            dequantise_experts(w, out.transpose(1, 2) if transposed else out)
            return out
        w = w.transpose(1, 2) if transposed else w
        return w.to(self.dtype) if out is None else out.copy_(w)

    def _A(self, out: Tensor | None = None) -> Tensor:
        """A [E, R, K], or in `out` [E, F, K] with zeros below."""
        A = self.p.A
        assert A is not None
        if out is None:
            return A.to(self.dtype)
        out[:, self.rank :].zero_()
        out[:, : self.rank].copy_(A)
        return out

    def _sB(self, out: Tensor | None = None) -> Tensor:
        """sB [E, N, R], or in `out` [E, N, F] with zeros beside."""
        B = self.p.B
        assert B is not None
        if out is None:
            out = self._empty(self.E, self.N, self.rank)
        out[..., self.rank :].zero_()
        torch.mul(B, self.p.scale, out=out[..., : self.rank])
        return out

    def forward(
        self, x: Tensor, wide: Tensor | None, rows: ExpertOrder, *, by_token: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """(Y [S, N], XA [S, R] to save); `wide` holds x on its left."""
        if wide is not None:
            K = self.K
            A = self._A(self._empty(self.E, self.fold, K))
            xA = grouped_linear(x, A, rows, out=wide[:, K:])
            W = self._buffer(self.N, K + self.fold)
            self._weight(W[..., :K])
            self._sB(W[..., K:])
            return grouped_linear(wide, W, rows), xA[:, : self.rank].contiguous()
        if not self.rank:
            return grouped_linear(x, self._weight(), rows, by_token=by_token), None
        xA = grouped_linear(x, self._A(), rows, by_token=by_token)
        y = grouped_linear(x, self._weight(), rows, xA, self._sB(), by_token=by_token)
        return y, xA

    def lora_gradient(self, dy: Tensor, wide: Tensor | None, rows: ExpertOrder) -> Tensor | None:
        """G = s dY B, [S, R or F]; in `wide`'s right columns where that is given."""
        if not self.rank:
            return None
        sB = self._sB(self._empty(self.E, self.N, self.fold) if self.fold else None)
        out = None if wide is None else wide[:, self.N :]
        return grouped_linear(dy, sB.transpose(1, 2), rows, out=out)

    def input_gradient(
        self, dy: Tensor, wide: Tensor | None, G: Tensor | None, rows: ExpertOrder
    ) -> Tensor:
        """dX [S, K]."""
        if wide is not None:
            W = self._buffer(self.N + self.fold, self.K)
            self._weight(W[:, : self.N])
            self._A(W[:, self.N :])
            return grouped_linear(wide, W.transpose(1, 2), rows)
        W = self._weight().transpose(1, 2)
        if G is None:
            return grouped_linear(dy, W, rows)
        return grouped_linear(dy, W, rows, G, self._A().transpose(1, 2))

    def gradients(
        self,
        needs: tuple[bool, bool],
        x: Tensor,
        xA: Tensor | None,
        dy: Tensor,
        G: Tensor | None,
        rows: ExpertOrder,
        *,
        by_token: bool = False,
    ) -> tuple[Tensor | None, Tensor | None]:
        """dA [E, R, K] and dB [E, N, R] in their masters' dtype, or None."""
        dA = dB = None
        if needs[0] and G is not None and self.p.A is not None:
            dA = grouped_outer(G[:, : self.rank], x, rows, by_token=by_token).to(self.p.A.dtype)
        if needs[1] and xA is not None and self.p.B is not None:
            product = grouped_outer(xA, dy, rows)
            dB = product.mul_(self.p.scale).transpose(1, 2).to(self.p.B.dtype)
        return dA, dB


@dataclass(frozen=True, eq=False)
class _Spec:
    """What autograd does not follow."""

    gate_up: ExpertProjection
    down: ExpertProjection
    activation: Activation
    dtype: torch.dtype

    def projections(
        self, tensors: tuple[Tensor | None, ...], device: torch.device
    ) -> tuple[_Projection, _Projection]:
        A, B, A_down, B_down = tensors
        first, second = replace(self.gate_up, A=A, B=B), replace(self.down, A=A_down, B=B_down)
        return _Projection(first, self.dtype, device), _Projection(second, self.dtype, device)

    def activate(self, gu: Tensor, rows: ExpertOrder, m: Tensor) -> None:
        """Writes m [S, I] of gate/up [S, 2I]."""
        if isinstance(self.activation, ClampedSwiglu):
            clamped_swiglu_fwd(gu, self.gate_up.bias, rows, self.activation, m)
        else:
            gate, up = gu.chunk(2, 1)
            glu_fwd(gate, up, self.activation, m)

    def activate_bwd_(
        self, gu: Tensor, D: Tensor, weight: Tensor, rows: ExpertOrder, dgu: Tensor
    ) -> Tensor:
        """Writes dgu and, in place of D, m. Returns <D, m> [T, k]."""
        if isinstance(self.activation, ClampedSwiglu):
            bias = self.gate_up.bias
            return clamped_swiglu_bwd_(gu, bias, D, weight, rows, self.activation, dgu)
        (gate, up), (dgate, dup) = gu.chunk(2, 1), dgu.chunk(2, 1)
        return expert_glu_bwd_(gate, up, D, weight, rows, self.activation, dgate, dup)


class MoeFunction(EagerFunction):
    """Forward and hand-derived backward; see the module's docstring for what is saved."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, index: Tensor, spec: _Spec, *tensors: Tensor | None
    ) -> Tensor:
        with without_autocast(x):
            rows = sort_by_expert(index, spec.gate_up.experts)
            first, second = spec.projections(tensors, x.device)
            flat = as_rows(x)
            gu, gA = _gate_up(first, flat, rows)
            m, m_wide = second.wide(rows, second.K)
            spec.activate(gu, rows, m)
            out, mA = second.forward(m, m_wide, rows)
            del m, m_wide
            y = torch.empty((flat.shape[0], second.N), dtype=x.dtype, device=x.device)
            weight = weights.contiguous()
            combine(out, rows, weight, y, spec.down.bias)
        ctx.save_for_backward(
            x, weight, rows.order, rows.place, rows.ends, rows.index, gu, gA, mA, *tensors
        )
        ctx.spec, ctx.k = spec, rows.k
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, order, place, ends, index, gu, gA, mA, *tensors = ctx.saved_tensors
        spec, needs = ctx.spec, ctx.needs_input_grad
        needs_first, needs_second = needs[4:6], needs[6:8]
        with without_autocast(x):
            rows = ExpertOrder(order, place, ends, index, ctx.k)
            first, second = spec.projections(tuple(tensors), x.device)
            flat = as_rows(x)
            dout, dout_wide = second.wide(rows, second.N)
            gather(as_rows(dy), rows, dout)
            G = second.lora_gradient(dout, dout_wide, rows)
            D = second.input_gradient(dout, dout_wide, G, rows)
            dgu, dgu_wide = first.wide(rows, first.N)
            dw = spec.activate_bwd_(gu, D, weight, rows, dgu)
            if needs[1] and spec.down.bias is not None:
                dw += _bias_products(as_rows(dy).to(spec.dtype), spec.down.bias, rows)
            # one factor of each product carries w: the narrow one
            w = weight.reshape(-1)[order.long()].unsqueeze(1)
            below = second.gradients(
                needs_second, D, None if mA is None else (mA * w).to(mA.dtype), dout,
                None if G is None else (G * w).to(G.dtype), rows,
            )  # fmt: skip
            del D, G, dout, dout_wide
            above: tuple[Tensor | None, Tensor | None] = None, None
            dx = None
            if needs[0] or any(needs_first):
                G = first.lora_gradient(dgu, dgu_wide, rows)
                source = flat.to(spec.dtype)
                above = first.gradients(needs_first, source, gA, dgu, G, rows, by_token=True)
                if needs[0]:
                    each = first.input_gradient(dgu, dgu_wide, G, rows)
                    dx = torch.empty(flat.shape, dtype=x.dtype, device=x.device)
                    combine(each, rows, None, dx)
        dweights = dw.to(weight.dtype) if needs[1] else None
        return dx, dweights, None, None, *above, *below


def _gate_up(first: _Projection, x: Tensor, rows: ExpertOrder) -> tuple[Tensor, Tensor | None]:
    """gate/up [S, 2I] and XA, of x [T, H]."""
    if first.fold or uses_grouped_mm(x.new_empty(0, dtype=first.dtype), first.N, first.K):
        source, wide = first.wide(rows, first.K)
        gather(x, rows, source)
        return first.forward(source, wide, rows)
    return first.forward(x.to(first.dtype), None, rows, by_token=True)


def _bias_products(dy: Tensor, bias: Tensor, rows: ExpertOrder) -> Tensor:
    """<dy[t], b_e> of each slot, [T, k]: with all experts' biases, which are few, in one GEMM."""
    index, experts = rows.index.view(-1, rows.k).long(), bias.shape[0]
    products = mm_fp32(dy, bias.to(dy.dtype).t()).gather(1, index.clamp(max=experts - 1))
    return products.masked_fill_(index >= experts, 0)


def _check(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    gate_up: ExpertProjection,
    down: ExpertProjection,
    activation: Activation,
) -> None:
    (E, N, K), (E_down, N_down, K_down) = gate_up.shape, down.shape
    if x.dim() != 2 or x.shape[1] != K or index.shape != weights.shape or index.dim() != 2:
        raise ValueError(
            f"expected x [T, {K}], index and weights [T, k]; got {tuple(x.shape)}, "
            f"{tuple(index.shape)} and {tuple(weights.shape)}"
        )
    if index.shape[0] != x.shape[0]:
        raise ValueError(f"{x.shape[0]} tokens, but index has {index.shape[0]}")
    if E != E_down or N != 2 * K_down or N_down != K:
        raise ValueError(
            f"gate/up is {gate_up.shape} and down {down.shape}; expected [E, 2I, H] and [E, H, I]"
        )
    for p, name in ((gate_up, "gate/up"), (down, "down")):
        if (p.A is None) != (p.B is None):
            raise ValueError(f"A and B of {name} come together: got one of them")
        if p.A is not None and p.B is not None:
            e, n, k = p.shape
            if p.A.shape != (e, p.rank, k) or p.B.shape != (e, n, p.rank):
                raise ValueError(
                    f"A of {name} is {tuple(p.A.shape)} and B {tuple(p.B.shape)}; expected "
                    f"[{e}, r, {k}] and [{e}, {n}, r]"
                )
        if p.bias is not None and (p.bias.shape != p.shape[:2] or not p.bias.is_contiguous()):
            raise ValueError(
                f"the bias of {name} is {tuple(p.bias.shape)} with strides {p.bias.stride()}; "
                f"expected a contiguous {p.shape[:2]}"
            )
    if gate_up.bias is not None and isinstance(activation, str):
        raise ValueError("a bias of gate/up is added by `ClampedSwiglu` alone")


def moe(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    gate_up: ExpertProjection,
    down: ExpertProjection,
    activation: Activation,
) -> Tensor:
    """y[t] = sum over j of weights[t, j] * (expert index[t, j])(x[t]).

    Under autocast the products run in autocast's dtype, else in `x`'s. Gradients flow to `x`, to
    the router's weights, and to each A and B that requires them; base weights are frozen.

    Args:
        x: [T, H], fp32/fp16/bf16 (fp64 for tests).
        index: [T, k] integers in [0, E). Entries from E on are left out of the sum.
        weights: [T, k], floating.
        gate_up: of [E, 2I, H]. It has a bias with a `ClampedSwiglu` only.
        down: of [E, H, I].
        activation: "silu", "gelu" (erf) or "gelu_tanh", of outputs whose first I are the gate; or
            a `ClampedSwiglu`, which says where the gate is.

    Returns:
        [T, H] in `x`'s dtype.

    Raises:
        ValueError: shapes do not fit together.
    """
    _check(x, index, weights, gate_up, down, activation)
    spec = _Spec(
        replace(gate_up, A=None, B=None),
        replace(down, A=None, B=None),
        activation,
        compute_dtype(x),
    )
    y: Tensor = MoeFunction.apply(x, weights, index, spec, gate_up.A, gate_up.B, down.A, down.B)
    return y
