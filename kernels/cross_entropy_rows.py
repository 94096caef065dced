"""Cross-entropy of each row of a logits chunk, with its gradient written over the logits.

For one row of raw logits z (V words), a label y and the options s (scale), c (soft cap), e (label
smoothing), w (z-loss weight), in fp32:

    t_v  = s z_v                       without a cap
    t_v  = c tanh(s z_v / c)           with one (Gemma 2's final_logit_softcapping, after the scale)
    lse  = log sum_v exp(t_v)
    loss = (1 - e)(lse - t_y) + e (lse - mean_v t_v) + w lse^2
    H    = lse - sum_v p_v t_v         p = softmax(t); the entropy, in nats

and with d the Kronecker delta

    dloss/dt_v = p_v (1 + 2 w lse) - (1 - e) d_vy - e / V
    dt_v/dz_v  = s                     without a cap
    dt_v/dz_v  = s (1 - (t_v / c)^2)   with one

Label smoothing is `torch.nn.functional.cross_entropy`'s; the z-loss is PaLM's (Chowdhery et al.
2022, section 5: 1e-4 log^2 Z). The prediction is the first largest logit, as in `torch.argmax`.

The gradient is that of the row's own loss: no divisor, no upstream factor. So it lies in [-1, 1]
(times s and the z-loss term) and neither underflows in fp16 nor needs to know how the loss is
normalised.

The kernel takes one program a row and two passes: an online softmax, then the gradient. A row of
128,256 bf16 words is 257 kB and 132 of them 34 MB, so on an H100 the second pass reads from the 50
MB L2.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lorafuse.kernels.runtime import (
    cached_launch,
    launch_device,
    next_power_of_2,
    tl,
    triton,
    use_triton,
)

# 32 warps of two 16-byte loads a thread: one row a multiprocessor at a time, as the L2 wants it. It
# is the best of gpu/sweep_cross_entropy_rows.py: 0.509 ms for [2048, 128256], where one read and
# one write take 0.35 (H100, 2026-11-25). Hints to the L2 about what to keep gain nothing.
_BLOCK_V = 16384
_WORDS = 16  # of a thread, at a time
_STAGES = 4
_CACHED_WORDS = 2**16  # 256 kB of fp32: a chunk of rows and its temporaries stay in a CPU's cache

__all__ = ["CrossEntropyOptions", "cross_entropy_rows_", "reference"]


@dataclass(frozen=True)
class CrossEntropyOptions:
    """What the loss of a row is, and how many rows are worked on at a time.

    Attributes:
        ignore_index: Rows with this label are left out.
        label_smoothing: e in [0, 1], as in `torch.nn.functional.cross_entropy`.
        logit_scale: Multiplies the logits, before the soft cap.
        logit_softcap: Cap c of `c tanh(z / c)`; None for no cap.
        z_loss: Weight of log^2 Z, added to each row's loss.
        chunk_bytes: Upper limit of the logits buffer; None chooses by device (see `chunk_rows`).
    """

    ignore_index: int = -100
    label_smoothing: float = 0.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    z_loss: float = 0.0
    chunk_bytes: int | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.label_smoothing <= 1.0:
            raise ValueError(f"label_smoothing must be in [0, 1], got {self.label_smoothing}")
        if self.logit_softcap is not None and not self.logit_softcap > 0.0:
            raise ValueError(
                f"logit_softcap must be positive or None for no cap, got {self.logit_softcap}"
            )
        if self.chunk_bytes is not None and self.chunk_bytes <= 0:
            raise ValueError(f"chunk_bytes must be positive or None, got {self.chunk_bytes}")

    def transform(self, z: Tensor) -> Tensor:
        """t of the formulas above, differentiable, in z's dtype."""
        t = z if self.logit_scale == 1.0 else z * self.logit_scale
        if self.logit_softcap is None:
            return t
        return self.logit_softcap * torch.tanh(t / self.logit_softcap)


def reference(
    logits: Tensor,  # (M, V)
    labels: Tensor,  # (M,), none ignored
    options: CrossEntropyOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss [M], entropy [M], prediction [M]) in plain torch; differentiable in the loss."""
    t = options.transform(logits if logits.dtype == torch.float64 else logits.float())
    lse = torch.logsumexp(t, dim=-1)
    loss = torch.nn.functional.cross_entropy(
        t, labels, reduction="none", label_smoothing=options.label_smoothing
    )
    if options.z_loss:
        loss = loss + options.z_loss * lse.square()
    entropy = torch.special.entr(torch.softmax(t.detach(), dim=-1)).sum(-1)
    return loss, entropy, t.argmax(-1)


def _torch_rows_(
    z: Tensor,
    labels: Tensor,
    options: CrossEntropyOptions,
    loss: Tensor,
    entropy: Tensor,
    prediction: Tensor,
    gradient: bool,
) -> None:
    # A few rows at a time, so that no temporary has the size of the logits.
    step = max(1, _CACHED_WORDS // z.shape[1]) if z.device.type == "cpu" else max(1, z.shape[0])
    for start in range(0, z.shape[0], step):
        part = slice(start, start + step)
        _torch_few_rows_(
            z[part], labels[part], options, loss[part], entropy[part], prediction[part], gradient
        )


def _torch_few_rows_(
    z: Tensor,
    labels: Tensor,
    options: CrossEntropyOptions,
    loss: Tensor,
    entropy: Tensor,
    prediction: Tensor,
    gradient: bool,
) -> None:
    t = options.transform(z if z.dtype == torch.float64 else z.float())
    lse = torch.logsumexp(t, dim=-1, keepdim=True)
    labelled = (labels != options.ignore_index)[:, None]
    word = labels[:, None].where(labelled, 0)
    t_label = t.gather(1, word)
    e, w = options.label_smoothing, options.z_loss
    row_loss = lse - (1.0 - e) * t_label
    if e:
        row_loss -= e * t.mean(-1, keepdim=True)
    if w:
        row_loss += w * lse.square()
    loss.copy_(row_loss.where(labelled, 0)[:, 0])
    prediction.copy_(t.argmax(-1))
    p = torch.exp(t - lse)
    entropy.copy_(torch.special.entr(p).sum(-1).where(labelled[:, 0], 0))
    if not gradient:
        return
    # dloss/dt = p (1 + 2 w lse) - (1 - e) d_vy - e / V
    g = p.mul_(1.0 + 2.0 * w * lse) if w else p
    if e:
        g -= e / t.shape[1]
    g.scatter_add_(1, word, torch.full_like(t_label, e - 1.0))
    # dt/dz = s (1 - (t / c)^2)
    if options.logit_softcap is not None:
        g.mul_(1.0 - (t / options.logit_softcap).square_())
    if options.logit_scale != 1.0:
        g.mul_(options.logit_scale)
    z.copy_(g.where(labelled, 0))


@triton.jit
def _transform(z, scale, cap, HAS_CAP: tl.constexpr):
    t = z * scale
    if HAS_CAP:
        # tanh(x) = 2 sigmoid(2x) - 1, which does not overflow on either side
        t = cap * (2.0 / (1.0 + tl.exp(-2.0 * t / cap)) - 1.0)
    return t


@triton.jit
def _load_words(
    z_row, o, V, scale, cap,
    HAS_CAP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """t of the words `o`; -inf beyond V."""
    if MASKED:
        z = tl.load(z_row + o, o < V, 0.0).to(tl.float32)
        return tl.where(o < V, _transform(z, scale, cap, HAS_CAP), float("-inf"))
    z = tl.load(z_row + o).to(tl.float32)
    return _transform(z, scale, cap, HAS_CAP)


@triton.jit
def _sum_lanes(x, LANES: tl.constexpr):
    """Sums of neighbours [LANES]: 16-bit words that one thread has loaded, so nothing is moved."""
    return tl.sum(tl.reshape(x, [LANES, x.shape[0] // LANES]), axis=1)


@triton.jit
def _add_words(
    b_t, start, m, best_start, b_sum, b_weighted, b_total, o, V,
    GRADIENT: tl.constexpr, HAS_SMOOTHING: tl.constexpr, LANES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One tile of the online softmax: the running maximum, where it was seen first, the sums."""
    largest = tl.max(b_t, axis=0)
    m_new = tl.maximum(m, largest)
    best_start = tl.where(largest > m, start, best_start)
    b_e = tl.exp(b_t - m_new)
    shrink = tl.exp(m - m_new)
    b_sum = b_sum * shrink + _sum_lanes(b_e, LANES)
    if not GRADIENT:
        # -inf * 0 has to be 0
        b_weighted = b_weighted * shrink + _sum_lanes(b_e * tl.maximum(b_t, -1.0e38), LANES)
    if HAS_SMOOTHING:
        if MASKED:
            b_t = tl.where(o < V, b_t, 0.0)
        b_total += _sum_lanes(b_t, LANES)
    return m_new, best_start, b_sum, b_weighted, b_total


@triton.jit
def _store_gradient(
    z_row, b_t, o, start, b_entropy, lse, label, V, softmax_factor, label_factor, smooth, cap,
    HAS_CAP: tl.constexpr, HAS_SMOOTHING: tl.constexpr, BLOCK_V: tl.constexpr,
    LANES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The gradient of one tile, over its logits; returns the entropy's sum with its words added."""
    b_log_p = b_t - lse
    b_p = tl.exp(b_log_p)
    b_entropy -= _sum_lanes(b_p * tl.maximum(b_log_p, -1.0e38), LANES)
    # s dloss/dt = s (p (1 + 2 w lse) - (1 - e) d_vy - e / V), the factors with s in them
    b_g = b_p * softmax_factor
    if HAS_SMOOTHING:
        b_g -= smooth
    if (label >= start) & (label < start + BLOCK_V):  # one tile of the row pays for it
        b_g -= tl.where(o == label, label_factor, 0.0)
    # dt/dz = s (1 - (t / c)^2)
    if HAS_CAP:
        b_u = b_t / cap
        b_g *= 1.0 - b_u * b_u
    b_g = b_g.to(z_row.dtype.element_ty)
    if MASKED:
        tl.store(z_row + o, b_g, o < V)
    else:
        tl.store(z_row + o, b_g)
    return b_entropy


@cached_launch
@triton.jit
def _cross_entropy_rows_kernel(
    z_ptr,  # (M, V), overwritten with the gradient if GRADIENT
    label_ptr,  # (M,) int64
    loss_ptr,  # (M,) fp32
    entropy_ptr,  # (M,) fp32
    prediction_ptr,  # (M,) int64
    stride_z,
    V,
    ignore_index,
    scale,
    cap,
    smoothing,
    z_loss,
    HAS_CAP: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr,  # tiles in flight
):
    row = tl.program_id(0).to(tl.int64)
    z_row = z_ptr + row * stride_z
    label = tl.load(label_ptr + row)
    o_v = tl.arange(0, BLOCK_V)
    tail = V // BLOCK_V * BLOCK_V  # all tiles before it are whole: no masks
    LANES: tl.constexpr = BLOCK_V // 8

    # The maximum is one number a row, so that a word costs one exponential; the sums stay one a
    # lane and are reduced once, at the end. A finite start keeps a block of -inf logits from giving
    # inf - inf.
    m = -1.0e38
    best_start = 0
    b_sum = tl.zeros([LANES], tl.float32)
    b_weighted = tl.zeros([LANES], tl.float32)
    b_total = tl.zeros([LANES], tl.float32)
    for start in tl.range(0, tail, BLOCK_V, num_stages=STAGES):
        b_t = _load_words(z_row, start + o_v, V, scale, cap, HAS_CAP, False)
        m, best_start, b_sum, b_weighted, b_total = _add_words(
            b_t, start, m, best_start, b_sum, b_weighted, b_total, start + o_v, V,
            GRADIENT, HAS_SMOOTHING, LANES, False,
        )  # fmt: skip
    b_t = _load_words(z_row, tail + o_v, V, scale, cap, HAS_CAP, True)
    m, best_start, b_sum, b_weighted, b_total = _add_words(
        b_t, tail, m, best_start, b_sum, b_weighted, b_total, tail + o_v, V,
        GRADIENT, HAS_SMOOTHING, LANES, True,
    )  # fmt: skip
    total = tl.sum(b_sum, axis=0)
    lse = m + tl.log(total)

    # A label outside [0, V) makes the loss NaN: seen at once, unlike an out-of-bounds read.
    is_word = (label >= 0) & (label < V)
    z_label = tl.load(z_row + label, mask=is_word, other=float("nan")).to(tl.float32)
    t_label = _transform(z_label, scale, cap, HAS_CAP)

    # The tile with the maximum is read again for its place: cheaper than an index beside each word.
    # This reduction is also the barrier behind which no thread reads a logit before another one
    # overwrites it.
    o_best = best_start + o_v
    b_t = _load_words(z_row, o_best, V, scale, cap, HAS_CAP, True)
    prediction = tl.min(tl.where(b_t == m, o_best, V), axis=0)
    tl.store(prediction_ptr + row, prediction.to(tl.int64))

    loss = lse - (1.0 - smoothing) * t_label + z_loss * lse * lse
    if HAS_SMOOTHING:
        loss -= smoothing * tl.sum(b_total, axis=0) / V
    labelled = label != ignore_index
    tl.store(loss_ptr + row, tl.where(labelled, loss, 0.0))

    if not GRADIENT:
        entropy = lse - tl.sum(b_weighted, axis=0) / total
        tl.store(entropy_ptr + row, tl.where(labelled, entropy, 0.0))
    elif labelled:
        softmax_factor = (1.0 + 2.0 * z_loss * lse) * scale
        label_factor, smooth = (1.0 - smoothing) * scale, smoothing / V * scale
        # From the end, where the row was read last and is still in the cache.
        b_entropy = tl.zeros([LANES], tl.float32)
        b_t = _load_words(z_row, tail + o_v, V, scale, cap, HAS_CAP, True)
        b_entropy = _store_gradient(
            z_row, b_t, tail + o_v, tail, b_entropy, lse, label, V,
            softmax_factor, label_factor, smooth, cap, HAS_CAP, HAS_SMOOTHING, BLOCK_V, LANES,
            True,
        )  # fmt: skip
        for back in tl.range(BLOCK_V, tail + BLOCK_V, BLOCK_V, num_stages=STAGES):
            start = tail - back
            b_t = _load_words(z_row, start + o_v, V, scale, cap, HAS_CAP, False)
            b_entropy = _store_gradient(
                z_row, b_t, start + o_v, start, b_entropy, lse, label, V,
                softmax_factor, label_factor, smooth, cap, HAS_CAP, HAS_SMOOTHING, BLOCK_V, LANES,
                False,
            )  # fmt: skip
        tl.store(entropy_ptr + row, tl.sum(b_entropy, axis=0))
    else:
        tl.store(entropy_ptr + row, 0.0)
        b_zero = tl.zeros([BLOCK_V], z_ptr.dtype.element_ty)
        for start in range(0, V, BLOCK_V):
            tl.store(z_row + start + o_v, b_zero, start + o_v < V)


def _triton_rows_(
    z: Tensor,
    labels: Tensor,
    options: CrossEntropyOptions,
    loss: Tensor,
    entropy: Tensor,
    prediction: Tensor,
    gradient: bool,
) -> None:
    M, V = z.shape
    block = min(_BLOCK_V, max(128, next_power_of_2(V)))
    with launch_device(z):
        _cross_entropy_rows_kernel[(M,)](
            z,
            labels,
            loss,
            entropy,
            prediction,
            z.stride(0),
            V,
            options.ignore_index,
            float(options.logit_scale),
            1.0 if options.logit_softcap is None else float(options.logit_softcap),
            float(options.label_smoothing),
            float(options.z_loss),
            HAS_CAP=options.logit_softcap is not None,
            HAS_SMOOTHING=options.label_smoothing > 0.0,
            GRADIENT=gradient,
            BLOCK_V=block,
            STAGES=_STAGES,
            num_warps=max(1, min(32, block // (32 * _WORDS))),
        )


def cross_entropy_rows_(
    z: Tensor,  # (M, V), last stride 1, any row stride
    labels: Tensor,  # (M,) int64 in [0, V), or options.ignore_index
    options: CrossEntropyOptions,
    loss: Tensor,  # (M,) fp32 (fp64 for fp64 logits), written
    entropy: Tensor,  # (M,) likewise
    prediction: Tensor,  # (M,) int64, written
    gradient: bool,
) -> None:
    """Writes each row's loss, entropy and prediction and, with `gradient`, dloss/dz over z.

    A row whose label is ignored has a loss, an entropy and a gradient of 0.

    Raises:
        IndexError: (CPU) A label lies outside [0, V). The Triton kernel gives such a row a NaN
            loss.
    """
    if z.shape[0] == 0:
        return
    rows = _triton_rows_ if use_triton(z) else _torch_rows_
    rows(z, labels, options, loss, entropy, prediction, gradient)
