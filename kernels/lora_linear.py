r"""LoRA projections that read one input: the engine of every fused LoRA block.

A group is one to three projections of one X: q, k and v; gate and up; o alone; down alone.

    Y_i = X W_i^T + s_i D_i(X) A_i^T B_i^T + b_i        Y = [Y_1 | ... | Y_n]

    X [T, K]    W_i [N_i, K] frozen, 16/32-bit or 4-bit    A_i [R_i, K]    B_i [N_i, R_i]
    b_i [N_i]   T tokens, K in, N = sum of N_i out, R = sum of R_i ranks; D_i is LoRA dropout

LoRA and the bias are folded into the GEMM's K dimension, so that no output is read twice:

    forward    Y  = [X, XA, 1] [W, B, b]^T              XA = [s_i D_i(X) A_i^T]
    backward   dX = [dY, G] [W; A]                      G  = [s_i dY_i B_i]
               dA_i = G_i^T D_i(X)    dB_i = dY_i^T XA_i    db_i = sum over T of dY_i

B is block-diagonal over the projections; G and [dA] are one GEMM each for the whole group. The
scales go to A in forward and to B in backward, so that no gradient has to be multiplied by them.
Folding costs a copy of what is not already in a wide buffer (dY often is: `gradient_room`);
`folding_pays` counts the bytes, and the two GEMMs stay apart where they are cheaper.

Saved for backward by the callers: XA [T, R] only. X is theirs to keep or to recompute. Dropout
masks are never stored: the generator's state is, and the same masks are drawn again.

Products of r-wide tensors that become adapter gradients are accumulated and returned in fp32.

Where every projection asks for FP8, the two large GEMMs run in it (`fp8_linear`), LoRA folded in.

LoRA: https://arxiv.org/abs/2106.09685
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorafuse.kernels import fp8_linear
from lorafuse.kernels.adapter_buffers import Scaled, write_adapters
from lorafuse.kernels.eager import EagerFunction
from lorafuse.kernels.gradient_room import ask_for_room, take_room
from lorafuse.kernels.nf4 import Quantised4bit, dequantise, dequantise_rows
from lorafuse.kernels.rms_norm import reference as rms_norm_reference
from lorafuse.kernels.rms_norm import rms_norm_fwd, weigh_
from lorafuse.kernels.runtime import mm_fp32

Weight = Tensor | Quantised4bit

# 16-bit columns at which a GEMM's operand may begin without being slower: 16 bytes.
_ALIGNED = 8


class LoraProjection(NamedTuple):
    """One linear layer with its active adapter, as the kernels see it.

    (A tuple, for it is made four times a step for each linear layer: a frozen dataclass took four
    times as long.)

    Attributes:
        weight: [N, K] frozen, fp32/fp16/bf16, or `Quantised4bit` of that shape.
        bias: [N] or None. May require a gradient; a LoRA bias is added to it beforehand.
        A: [R, K] or None where the layer carries no active adapter.
        B: [N, R], present exactly when `A` is.
        scale: s, the adapter's scaling.
        dropout: probability of LoRA dropout, 0 when not training.
        fp8: compute the base GEMMs in FP8 where `fp8_linear.why_not` has nothing against it, for
            this projection and for the others of its group; else in the compute dtype.
        room: [>= N + F, >= K + F'] in the weights' dtype, where the weights of the whole group lie
            in its upper left, one below the other; what is beside and below them is overwritten
            with LoRA in each pass, so that W need not be copied to be folded.
    """

    weight: Weight
    bias: Tensor | None = None
    A: Tensor | None = None
    B: Tensor | None = None
    scale: float = 1.0
    dropout: float = 0.0
    fp8: bool = False
    room: Tensor | None = None

    @property
    def out_features(self) -> int:
        return int(self.weight.shape[0])

    @property
    def in_features(self) -> int:
        return int(self.weight.shape[1])

    @property
    def rank(self) -> int:
        return 0 if self.A is None else int(self.A.shape[0])


@dataclass(frozen=True, eq=False)
class NormPrologue:
    """A frozen RMS norm computed in front of a group: X = h * rstd * (offset + weight).

    Attributes:
        weight: [K].
        eps: added to the mean square.
        offset: 1 for Gemma's norm, else 0.
        round_normalised: h * rstd is rounded to h's dtype first, as Llama's norm does.
    """

    weight: Tensor
    eps: float
    offset: float = 0.0
    round_normalised: bool = False

    def forward(self, h: Tensor, out: Tensor) -> Tensor:
        """Writes X [T, K] into `out`; returns rstd [T] in fp32."""
        return rms_norm_fwd(
            h, self.weight, self.eps, self.offset, out, round_normalised=self.round_normalised
        )

    def transposed_product(self, G: Tensor, h: Tensor, rstd: Tensor) -> Tensor | None:
        """G^T X [F, K] in fp32 without X: ((rstd G)^T h) * (offset + weight).

        Saves the pass that would write X anew. None where h's dtype is not G's, or is fp16, in
        which rstd G may overflow.

        Args:
            G: [T, F].
            h: [T, K].
            rstd: [T], from `forward`.
        """
        if h.dtype != G.dtype or G.dtype == torch.float16:
            return None
        scaled = torch.mul(G, rstd.unsqueeze(1), out=torch.empty_like(G))
        return weigh_(mm_fp32(scaled.t(), h), self.weight, self.offset)

    def reference(self, h: Tensor) -> Tensor:
        """X in plain torch."""
        return rms_norm_reference(
            h, self.weight, self.eps, self.offset, round_normalised=self.round_normalised
        )


def as_rows(x: Tensor) -> Tensor:
    """[..., K] as [T, K] whose rows are contiguous, as the kernels read them.

    Copied only where it has to be: the gradient of a plain sum has strides of 0.
    """
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype GEMMs run in: autocast's where it is on for `x`'s device, else `x`'s own."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.is_floating_point() and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Autocast off: inside a fused op every dtype is chosen here, not by the dispatcher."""
    if not torch.is_autocast_enabled(x.device.type):  # as in every backward pass
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def fold_alignment(device: torch.device) -> int:
    """Columns that the r-wide part is padded to; 64 keeps bf16 rows in whole 128-byte lines."""
    return 64 if device.type == "cuda" else 8


def fold_columns(columns: int, align: int) -> int:
    """Columns of a buffer's r-wide part: `columns`, padded to whole `align`s."""
    return -(-columns // align) * align


def folding_pays(
    rows: int,
    inner: int,
    outer: int,
    *,
    copies_input: bool,
    copies_weight: bool,
) -> bool:
    """Whether folding moves fewer bytes than reading and writing the [rows, outer] output again."""
    return copies_input * rows * inner + copies_weight * inner * outer < rows * outer


class _Layout(NamedTuple):
    """What follows from a group's sizes alone; see `Group`."""

    in_features: int
    out_features: int
    heights: tuple[int, ...]
    rows: tuple[slice, ...]
    ranks: tuple[slice, ...]
    rank: int
    has_bias: bool
    fold_forward: int
    fold_backward: int


@lru_cache(maxsize=1024)
def _layout(K: int, sizes: tuple[tuple[int, int, bool], ...], align: int) -> _Layout:
    """Args: in features; (out features, rank, with a bias) of each projection; `fold_alignment`."""
    rows: list[slice] = []
    ranks: list[slice] = []
    n = r = 0
    for out, rank, _ in sizes:
        rows.append(slice(n, n + out))
        ranks.append(slice(r, r + rank))
        n, r = n + out, r + rank
    has_bias = any(bias for _, _, bias in sizes)
    return _Layout(
        K, n, tuple(out for out, _, _ in sizes), tuple(rows), tuple(ranks), r, has_bias,
        fold_columns(r + has_bias, align), fold_columns(r, align),
    )  # fmt: skip


class Group:
    """Layout of a group and its products, for one forward or backward pass.

    Args:
        projections: one to three projections of the same input.
        dtype: compute dtype of the GEMMs.

    Attributes:
        heights: N_i of each projection; `out_features` is their sum.
        rows, ranks: where each projection's outputs, and its adapter's ranks, lie in the group.
        fold_forward: width of [XA, 1, 0...].
        fold_backward: width of [G, 0...].
    """

    def __init__(self, projections: Sequence[LoraProjection], dtype: torch.dtype) -> None:
        self.projections = ps = tuple(projections)
        self.dtype = dtype
        self.weights: list[Weight] = [p.weight for p in ps]
        first = self.weights[0]
        self.device = (first.packed if isinstance(first, Quantised4bit) else first).device
        sizes = tuple(
            [
                (p.weight.shape[0], 0 if p.A is None else p.A.shape[0], p.bias is not None)
                for p in ps
            ]
        )
        layout = _layout(first.shape[1], sizes, fold_alignment(self.device))
        self.in_features, self.out_features, self.heights = layout[:3]
        self.rows, self.ranks, self.rank, self.has_bias = layout[3:7]
        self.fold_forward, self.fold_backward = layout[7:]
        self.bias_column = self.rank
        self.has_lora = self.rank > 0
        self.has_dropout = any([p.dropout > 0 and p.A is not None for p in ps])
        self._room = self._usable_room()
        # False when W lies where it can be folded, or is written afresh anyway: dequantised, or
        # cast to the compute dtype.
        self.copies_weight = self._room is None and all(
            [isinstance(w, Tensor) and w.dtype == dtype for w in self.weights]
        )
        self._keeps = False
        self._kept: Tensor | None = None
        self._asks_fp8 = all([p.fp8 for p in ps])
        self._fp8: dict[int, bool] = {}  # of a number of rows; a pass asks up to four times

    def _usable_room(self) -> Tensor | None:
        room = self.projections[0].room
        if room is None or room.dtype != self.dtype:
            return None
        height = self.out_features + self.fold_backward
        width = self.in_features + self.fold_forward
        fits = room.shape[0] >= height and room.shape[1] >= width
        if not fits or any([p.room is not room for p in self.projections]):
            return None
        return room[:height, :width]

    def uses_fp8(self, rows: int) -> bool:
        """Whether the base GEMMs run in FP8, with buffers of their own for what is folded in."""
        if not self._asks_fp8:
            return False
        known = self._fp8.get(rows)
        if known is None:
            known = self._fp8[rows] = not any(
                fp8_linear.why_not(self.device, self.dtype, rows, p.in_features, p.out_features)
                for p in self.projections
            )
        return known

    def folds_forward(self, rows: int, *, copies_input: bool) -> bool:
        return (
            self.fold_forward > 0
            and not self.uses_fp8(rows)
            and folding_pays(
                rows,
                self.in_features,
                self.out_features,
                copies_input=copies_input,
                copies_weight=self.copies_weight,
            )
        )

    def folds_backward(self, rows: int, *, copies_input: bool) -> bool:
        return (
            self.fold_backward > 0
            and not self.has_dropout
            and not self.uses_fp8(rows)
            and folding_pays(
                rows,
                self.out_features,
                self.in_features,
                copies_input=copies_input,
                copies_weight=self.copies_weight,
            )
        )

    def gradient_room(self, rows: int) -> int:
        """Columns for G that backward can use where dY's buffer has them."""
        return self.fold_backward if self.folds_backward(rows, copies_input=False) else 0

    def write_weights(self, out: Tensor) -> None:
        """[W_1; W_2; ...] into `out` [N, K], a view of any row stride."""
        packed = [w for w in self.weights if isinstance(w, Quantised4bit)]
        if len(packed) == len(self.projections):
            dequantise_rows(packed, out)
            return
        for p, rows in zip(self.projections, self.rows, strict=True):
            if isinstance(p.weight, Quantised4bit):
                dequantise(p.weight, out[rows])
            else:
                out[rows].copy_(p.weight)

    def plain_weight(self, index: int) -> Tensor:
        """Projection `index`'s W in the compute dtype, without a copy where it already is."""
        weight = self.projections[index].weight
        if isinstance(weight, Quantised4bit):
            out = torch.empty(weight.shape, device=self.device, dtype=self.dtype)
            dequantise(weight, out)
            return out
        return weight.to(self.dtype)

    def keep_weights(self) -> None:
        """From here on W is written once, for every product of this group; it stays until then."""
        self._keeps = True

    def forward_weight(self, like: Tensor, A_out: Tensor | None) -> Tensor:
        """[W, B, b, 0] [N, K + fold_forward], and sA into `A_out` [>= R, K] where that is given.

        `like` is of the compute dtype.
        """
        K = self.in_features
        if self._keeps:
            if A_out is not None:
                self.write_adapters("A", A_out, None)
            return self._kept_weights(like)[: self.out_features]
        if self._room is not None:
            out = self._room[: self.out_features]
        else:
            out = like.new_empty((self.out_features, K + self.fold_forward))
            self.write_weights(out[:, :K])
        self.write_adapters("A", A_out, out[:, K:], bias=True)
        return out

    def backward_weight(self, like: Tensor, B_out: Tensor | None) -> Tensor:
        """[W; A; 0] [N + fold_backward, K], and sB into `B_out` [N, >= R] where that is given.

        `like` is of the compute dtype.
        """
        N, K = self.out_features, self.in_features
        if self._keeps:
            if B_out is not None:
                self.write_adapters("B", None, B_out)
            return self._kept_weights(like)[:, :K]
        if self._room is not None:
            out = self._room[:, :K]
        else:
            out = like.new_empty((N + self.fold_backward, K))
            self.write_weights(out[:N])
        self.write_adapters("B", out[N:], B_out)
        return out

    def _kept_weights(self, like: Tensor) -> Tensor:
        """[[W, B, b], [A, -]]: both of the above are views of it."""
        if self._kept is None:
            N, K = self.out_features, self.in_features
            out = self._room
            if out is None:
                out = like.new_empty((N + self.fold_backward, K + self.fold_forward))
                self.write_weights(out[:N, :K])
            self.write_adapters(None, out[N:, :K], out[:N, K:], bias=True)
            self._kept = out
        return self._kept

    def write_adapters(
        self, scaled: Scaled, A_out: Tensor | None, B_out: Tensor | None, *, bias: bool = False
    ) -> None:
        """Stacked A into `A_out` [>= R, K], block-diagonal B into `B_out` [N, >= R].

        The scales are on what `scaled` names. With `bias`, b goes into its column of `B_out`.
        """
        ps = self.projections
        As, Bs, scales = [p.A for p in ps], [p.B for p in ps], [p.scale for p in ps]
        write_adapters(As, Bs, self.heights, scales, scaled, A_out, B_out)
        if bias and self.has_bias and B_out is not None:
            for p, rows in zip(ps, self.rows, strict=True):
                if p.bias is not None:
                    B_out[rows, self.bias_column].copy_(p.bias)

    def dropped(self, x: Tensor, index: int) -> Tensor:
        """D_i(X), drawn from the current generator in the order of the projections, as stock's."""
        # Contiguous, for a GPU draws another mask for a strided view: backward could not redraw it.
        return F.dropout(x.contiguous(), self.projections[index].dropout, training=True)

    def masks(self, like: Tensor, rng: "RngState | None") -> Iterator[tuple[int, Tensor]]:
        """(i, D_i(1) [T, K]) of each adapted projection, drawn again from the saved state.

        D(X) = D(1) * X: the same factor serves X, and the gradient that goes back through it.
        """
        assert rng is not None, "a group with dropout saves the generator's state"
        with forked_rng(like.device):
            rng.restore(like.device)
            for i, p in enumerate(self.projections):
                if p.A is not None:
                    yield i, self.dropped(torch.ones_like(like), i)


@dataclass(frozen=True, eq=False)
class RngState:
    """The generator as it was when a dropout mask was drawn, to draw the same mask again."""

    cpu: Tensor
    cuda: Tensor | None

    @staticmethod
    def capture(device: torch.device) -> "RngState":
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return RngState(torch.get_rng_state(), cuda)

    def restore(self, device: torch.device) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, device)


def forked_rng(device: torch.device) -> AbstractContextManager[Any]:
    """Context after which the generators are as before."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def read_input(
    x: Tensor,  # (T, K)
    group: Group,
    norm: NormPrologue | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """X in the compute dtype, in the left columns of a wide buffer where folding pays.

    Returns:
        (X [T, K], the wide buffer [T, K + fold_forward] or None, rstd [T] fp32 or None).
    """
    T, K = x.shape
    copies = norm is None and x.dtype == group.dtype
    wide: Tensor | None = None
    if group.folds_forward(T, copies_input=copies):
        wide = x.new_empty((T, K + group.fold_forward), dtype=group.dtype)
        out = wide[:, :K]
    elif norm is None:
        return x.to(group.dtype), None, None
    else:
        out = x.new_empty((T, K), dtype=group.dtype)
    if norm is None:
        out.copy_(x)
        return out, wide, None
    return out, wide, norm.forward(x, out)


def group_fwd(
    group: Group,
    x: Tensor,  # (T, K), compute dtype
    wide: Tensor | None,  # (T, K + fold_forward) holding x on its left, or None
    out: Tensor,  # (T, N), any row stride; compute dtype
    residual: Tensor | None = None,  # (T, N)
    xA: Tensor | None = None,  # (T, fold_forward), as returned when Y was first computed
) -> tuple[Tensor, Tensor | None]:
    """Writes Y (plus the residual) into `out`. With `xA`, dropout is not drawn again.

    The residual is added to the rounded Y, not in the GEMM as its C operand: stock code rounds
    there, and a model with large activations amplifies the difference to one of 0.06 in the loss
    (SmolLM2-135M, NF4). LoRA's small terms, too, would be lost in a sum that is already large.

    Returns:
        (out, [XA, 1] contiguous [T, fold_forward] to save, or None without LoRA and bias).
    """
    T, K = x.shape
    fp8 = group.uses_fp8(T)
    if group.fold_forward == 0 or (fp8 and not group.has_lora):
        if fp8:
            _fp8_forward(group, x, out)
        else:
            _plain_forward(group, x, out)
        return (out if residual is None else out.add_(residual)), None
    N, F = group.out_features, group.fold_forward
    A = None if xA is not None else x.new_empty((F, K))
    if fp8 or wide is None:
        B = x.new_empty((N, F))
        group.write_adapters("A", A, B, bias=not fp8)
    else:
        B = group.forward_weight(x, A)
    if A is not None:
        target = x.new_empty((T, F)) if wide is None else wide[:, K:]
        _write_lora_input(group, x, A, target)
        saved = target if wide is None else target.contiguous()
        del A
    else:
        assert xA is not None
        saved = xA
        if wide is not None:
            wide[:, K:].copy_(xA)
    if fp8:
        _fp8_forward(group, x, out, saved, B)
    elif wide is not None:
        torch.mm(wide, B.t(), out=out)
    else:
        _plain_forward(group, x, out)
        out.addmm_(saved, B.t())
    return (out if residual is None else out.add_(residual)), saved


def _write_lora_input(group: Group, x: Tensor, A: Tensor, target: Tensor) -> None:
    """[XA, 1, 0] into `target` [T, fold_forward], of any row stride; A [fold_forward, K] is sA."""
    if group.has_dropout:
        target[:, group.rank :].zero_()
        for i, ranks in enumerate(group.ranks):
            if ranks.stop > ranks.start:
                torch.mm(group.dropped(x, i), A[ranks].t(), out=target[:, ranks])
    else:
        torch.mm(x, A.t(), out=target)
    if group.has_bias:
        target[:, group.bias_column].fill_(1.0)


def _plain_forward(group: Group, x: Tensor, out: Tensor) -> None:
    for i, rows in enumerate(group.rows):
        torch.mm(x, group.plain_weight(i).t(), out=out[:, rows])


def _fp8_forward(
    group: Group, x: Tensor, out: Tensor, xA: Tensor | None = None, B: Tensor | None = None
) -> None:
    """Base, LoRA and bias. A bias is added to the rounded output: few models have one."""
    if xA is None or B is None:
        fp8_linear.forward(group.weights, x, out)
    else:
        fp8_linear.forward(group.weights, x, out, xA, B, group.rank)
    for p, rows in zip(group.projections, group.rows, strict=True):
        if p.bias is not None:
            out[:, rows].add_(p.bias)


def adapter_gradients(
    group: Group,
    x: Tensor | None,  # (T, K), compute dtype; None where dA is given
    xA: Tensor | None,  # (T, fold_forward), what group_fwd returned
    dy: Tensor,  # (T, N), compute dtype, any row stride
    G: Tensor | None,  # (T, fold_backward), from input_gradient
    needs: Sequence[bool],
    rng: RngState | None = None,
    dA: Tensor | None = None,  # (>= R, K): G^T X, where the caller has it
    dB: Sequence[Tensor | None] | None = None,  # (N_i, R_i) each: dY_i^T XA_i, likewise
) -> list[Tensor | None]:
    """dA_i, dB_i, db_i in the order of `flat_tensors`, each in its master's dtype, or None."""
    gradients: list[Tensor | None] = [None] * len(needs)
    if dB is None and xA is not None and any(needs[1::3]):
        dB = _b_gradients(group, dy, xA, needs)
    for i, (p, rows) in enumerate(zip(group.projections, group.rows, strict=True)):
        if dB is not None and p.B is not None and needs[3 * i + 1]:
            product = dB[i]
            assert product is not None
            # in B's own layout, whatever the product's strides are
            gradients[3 * i + 1] = product.to(p.B.dtype).contiguous()
        if p.bias is not None and needs[3 * i + 2]:
            # torch's pairwise sum is more exact than the column of a GEMM that meets the ones.
            wide = torch.float64 if dy.dtype == torch.float64 else torch.float32
            gradients[3 * i + 2] = dy[:, rows].sum(0, dtype=wide).to(p.bias.dtype)
    if G is None or not any(needs[::3]):
        return gradients
    if group.has_dropout:
        assert x is not None
        for i, keep in group.masks(x, rng):
            p = group.projections[i]
            if p.A is not None and needs[3 * i]:
                gradients[3 * i] = mm_fp32(G[:, group.ranks[i]].t(), x * keep).to(p.A.dtype)
        return gradients
    if dA is None:
        assert x is not None
        dA = mm_fp32(G.t(), x)
    for i, p in enumerate(group.projections):
        if p.A is not None and needs[3 * i]:
            gradients[3 * i] = dA[group.ranks[i]].to(p.A.dtype)
    return gradients


def _b_gradients(
    group: Group, dy: Tensor, xA: Tensor, needs: Sequence[bool]
) -> list[Tensor | None]:
    """dY_i^T XA_i [N_i, R_i] of each projection that needs it, in fp32."""
    parts = list(zip(group.rows, group.ranks, strict=True))
    if any(ranks.start % _ALIGNED for _, ranks in parts):
        # One GEMM on aligned columns; its blocks off the diagonal are not used.
        full = mm_fp32(dy.t(), xA)
        return [full[rows, ranks] for rows, ranks in parts]
    return [
        mm_fp32(dy[:, rows].t(), xA[:, ranks]) if p.rank and need else None
        for p, need, (rows, ranks) in zip(group.projections, needs[1::3], parts, strict=True)
    ]


def normed_adapter_gradients(
    group: Group,
    h: Tensor,  # (T, K)
    norm: NormPrologue | None,
    rstd: Tensor | None,  # (T,), with a norm
    xA: Tensor | None,
    dy: Tensor,
    G: Tensor | None,
    needs: Sequence[bool],
    rng: RngState | None = None,
    dB: Sequence[Tensor | None] | None = None,
) -> list[Tensor | None]:
    """`adapter_gradients` for X = norm(h) or h, which is computed again only where it has to be."""
    dA, x = None, None
    if norm is None:
        x = h.to(group.dtype)
    elif G is not None and any(needs[::3]):
        if not group.has_dropout:
            assert rstd is not None
            dA = norm.transposed_product(G, h, rstd)
        if dA is None:
            x = h.new_empty(h.shape, dtype=group.dtype)
            norm.forward(h, x)
    return adapter_gradients(group, x, xA, dy, G, needs, rng, dA, dB)


def input_gradient(
    group: Group,
    dy: Tensor,  # (T, N)
    dy_wide: Tensor | None,  # (T, N + fold_backward): dY on its left, room for G on its right
    rng: RngState | None = None,
    *,
    need_dx: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """(dX [T, K] in the compute dtype, G = [s_i dY_i B_i] [T, fold_backward]).

    dX is None unless it is needed; G is None without LoRA. G is in `dy_wide`, where that is given.
    """
    K, N, F = group.in_features, group.out_features, group.fold_backward
    B = dy.new_empty((N, F)) if group.has_lora else None
    if need_dx and dy_wide is not None:
        weight = group.backward_weight(dy, B)
        G = None if B is None else torch.mm(dy, B, out=dy_wide[:, N:])
        del B
        return dy_wide @ weight, G  # dX = [dY, G] [W; A]
    G, A = None, None
    if B is not None:
        # With dropout, the masks come between G A and dX.
        A = dy.new_empty((F, K)) if need_dx and not group.has_dropout else None
        group.write_adapters("B", A, B)
        G = dy @ B
        del B
    if not need_dx:
        return None, G
    if group.uses_fp8(dy.shape[0]):
        dx = dy.new_empty((dy.shape[0], K))
        if A is not None:
            fp8_linear.input_gradient(group.weights, dy, dx, G, A, group.rank)
            return dx, G
        fp8_linear.input_gradient(group.weights, dy, dx)
    else:
        dx = dy[:, group.rows[0]] @ group.plain_weight(0)
        for i, rows in enumerate(group.rows[1:], start=1):
            dx.addmm_(dy[:, rows], group.plain_weight(i))
    if G is None:
        return dx, None
    if A is not None:
        return dx.addmm_(G, A), G
    for i, keep in group.masks(dx, rng):
        own = group.projections[i].A
        assert own is not None
        dx.addcmul_(G[:, group.ranks[i]] @ own.to(group.dtype), keep)
    return dx, G


def flat_tensors(projections: Sequence[LoraProjection]) -> list[Tensor | None]:
    """A_1, B_1, b_1, A_2, ...: what an autograd Function takes as its own arguments."""
    return [t for p in projections for t in (p.A, p.B, p.bias)]


def with_tensors(
    projections: Sequence[LoraProjection], tensors: Sequence[Tensor | None]
) -> tuple[LoraProjection, ...]:
    """The projections with `tensors`, in the order of `flat_tensors`, for their own."""
    return tuple(
        LoraProjection(
            p.weight,
            tensors[3 * i + 2],
            tensors[3 * i],
            tensors[3 * i + 1],
            p.scale,
            p.dropout,
            p.fp8,
            p.room,
        )
        for i, p in enumerate(projections)
    )


def without_tensors(projections: Sequence[LoraProjection]) -> tuple[LoraProjection, ...]:
    """The projections' constants only: what a context may keep without keeping graph tensors."""
    return tuple(
        LoraProjection(p.weight, scale=p.scale, dropout=p.dropout, fp8=p.fp8, room=p.room)
        for p in projections
    )


def check_projections(x: Tensor, projections: Sequence[LoraProjection]) -> None:
    """Raises ValueError where shapes do not fit together."""
    if not projections:
        raise ValueError("got no projections; expected one to three")
    K = x.shape[-1]
    for p in projections:
        N, k = p.weight.shape
        if k != K:
            raise ValueError(f"weight is [{N}, {k}] but the input has {K} features")
        if (p.A is None) != (p.B is None):
            raise ValueError("A and B come together: got one of them")
        if p.A is not None and p.B is not None:
            if tuple(p.A.shape) != (p.rank, K) or tuple(p.B.shape) != (N, p.rank):
                raise ValueError(
                    f"A is {tuple(p.A.shape)} and B {tuple(p.B.shape)}; "
                    f"expected [r, {K}] and [{N}, r] of one rank r"
                )
        if p.bias is not None and tuple(p.bias.shape) != (N,):
            raise ValueError(f"bias is {tuple(p.bias.shape)}; expected [{N}]")


def reference(x: Tensor, projections: Sequence[LoraProjection]) -> tuple[Tensor, ...]:
    """The definition, one output a projection, in plain torch; LoRA dropout drawn in order.

    Args:
        x: [..., K].
        projections: of [N_i, K] each.

    Returns:
        One [..., N_i] tensor a projection.
    """
    outputs = []
    for p in projections:
        weight = Group([p], x.dtype).plain_weight(0)
        y = F.linear(x, weight, None if p.bias is None else p.bias.to(x.dtype))
        if p.A is not None and p.B is not None:
            xA = F.linear(F.dropout(x, p.dropout), p.A.to(x.dtype))
            y = y + F.linear(xA, p.B.to(x.dtype)) * p.scale
        outputs.append(y)
    return tuple(outputs)


class LoraLinearFunction(EagerFunction):
    """Saves X (or h and rstd), XA and the adapters; recomputes the norm and the dropout masks."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        projections: tuple[LoraProjection, ...],
        dtype: torch.dtype,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        with without_autocast(x):
            group = Group(with_tensors(projections, tensors), dtype)
            flat = as_rows(x)
            rng = RngState.capture(x.device) if group.has_dropout else None
            source, wide, _ = read_input(flat, group, None)
            y = source.new_empty((flat.shape[0], group.out_features))
            flat_residual = None if residual is None else as_rows(residual)
            folded = flat_residual if residual is not None and residual.dtype == dtype else None
            _, xA = group_fwd(group, source, wide, y, folded)
            if flat_residual is not None and folded is None:
                y = flat_residual + y
        wanted = len(projections) == 1 and y.dtype == dtype
        ask_for_room(ctx, group.gradient_room(y.shape[0]) if wanted else 0)
        ctx.save_for_backward(x, xA, *tensors)
        ctx.projections, ctx.dtype, ctx.rng = projections, dtype, rng
        # `.data`: autograd forbids a model to change a view in place that was made in here (OLMo
        # clamps q, k and v; Llama 4 adds its experts to the shared one).
        return tuple(y[:, rows].view(*x.shape[:-1], -1).data for rows in group.rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        x, xA, *tensors = ctx.saved_tensors
        with without_autocast(x):
            group = Group(with_tensors(ctx.projections, tensors), ctx.dtype)
            flat = as_rows(x)
            need_dx = ctx.needs_input_grad[0]
            parts = [as_rows(dy) for dy in dys]
            dy_wide = take_room(ctx, dys[0]) if need_dx else None
            if dy_wide is not None:
                dy = dy_wide[:, : group.out_features]
            else:
                dy, dy_wide = gather_gradients(group, parts, need_dx=need_dx)
            dx, G = input_gradient(group, dy, dy_wide, ctx.rng, need_dx=need_dx)
            needs = ctx.needs_input_grad[4:]
            adapters = adapter_gradients(group, flat.to(ctx.dtype), xA, dy, G, needs, ctx.rng)
            if dx is not None:
                dx = dx.view(x.shape).to(x.dtype)
        dresidual = dys[0] if ctx.needs_input_grad[1] else None
        return dx, dresidual, None, None, *adapters


def gather_gradients(
    group: Group, parts: Sequence[Tensor], *, need_dx: bool
) -> tuple[Tensor, Tensor | None]:
    """dY [T, N] in the compute dtype from its parts, in a wide buffer where folding pays."""
    T, N = parts[0].shape[0], group.out_features
    single = len(parts) == 1 and parts[0].dtype == group.dtype and parts[0].stride(-1) == 1
    if need_dx and group.folds_backward(T, copies_input=single):
        wide = parts[0].new_empty((T, N + group.fold_backward), dtype=group.dtype)
        dy = wide[:, :N]
    elif single:
        return parts[0], None
    else:
        wide = None
        dy = parts[0].new_empty((T, N), dtype=group.dtype)
    for rows, part in zip(group.rows, parts, strict=True):
        dy[:, rows].copy_(part)
    return dy, wide


def lora_linear(
    x: Tensor,
    projections: Sequence[LoraProjection],
    residual: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Y_i = X W_i^T + s_i D_i(X) A_i^T B_i^T + b_i (+ residual) for projections of one input.

    Under autocast the GEMMs run in autocast's dtype, else in `x`'s. Gradients flow to `x`,
    `residual`, and to each A, B and bias that requires them; base weights are frozen and get none.

    Args:
        x: [..., K], fp32/fp16/bf16 (fp64 for tests).
        projections: one to three `LoraProjection`s of K input features.
        residual: [..., N] added to the output; with one projection only. Where its dtype is not
            the compute dtype, the sum is of torch's promoted dtype, as in stock code.

    Returns:
        One [..., N_i] tensor a projection, in the compute dtype.

    Raises:
        ValueError: shapes do not fit, or a residual came with several projections.
    """
    check_projections(x, projections)
    if residual is not None and len(projections) != 1:
        raise ValueError(f"a residual goes with one projection; got {len(projections)}")
    outputs: tuple[Tensor, ...] = LoraLinearFunction.apply(
        x,
        residual,
        without_tensors(projections),
        compute_dtype(x),
        *flat_tensors(projections),
    )
    return outputs
