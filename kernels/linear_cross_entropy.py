"""Cross-entropy of a linear head that never holds the logits of the batch.

    Z = X W^T + b + s (X A^T) B^T        X (M, H), W (V, H), b (V,), A (R, H), B (V, R)
    loss = sum over rows with a label of loss_row(Z_m, y_m) / divisor

with `loss_row` of `cross_entropy_rows.py`. Rows without a label never reach the head. The others go
through it in chunks, so that one buffer of [chunk, V] words is all the logits there ever are;
forward and gradient are one pass over it. Per chunk, with G the gradient that overwrites Z:

    dX = G W + s (G B) A       kept in the compute dtype, [rows with a label, H]
    dW = G^T X                 only if the head is trained: summed over chunks in fp32
    db = sum_m G_m             likewise
    dB = s G^T (X A^T)         likewise
    dA = s (G B)^T X           likewise

All GEMMs are cuBLAS's. Saved for backward: those products and nothing of size T x V. Backward
multiplies them, out of place, by (incoming gradient / divisor): G carries no divisor, so 1 /
num_items_in_batch cannot underflow in fp16, and one graph can be walked twice. Nothing is
recomputed. (Idea of one pass: Liger-Kernel's fused linear cross-entropy; of leaving ignored rows
out: apple/ml-cross-entropy.)

Synchronisation: the number of rows with a label decides the shape of the GEMMs. A caller that has
counted them before the backbone ran says so (`max_rows`), and nothing waits for the GPU. Else
finding the rows (`nonzero`) does, once a call, and the GPU then waits for the next launches: 2.7 ms
of an 8B step on an H100, against the share of the head's GEMMs that ignored rows would cost. All
else, by-products included, stays on the device.

Precision: GEMMs run in the compute dtype: autocast's where autocast is on, else X's; an fp32 head
under autocast is cast once a call. So logits are rounded to 16 bit as the stock head rounds
them; everything after that is fp32 (fp64 for fp64 input).
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorafuse.kernels import cross_entropy_rows
from lorafuse.kernels.cross_entropy_rows import CrossEntropyOptions, cross_entropy_rows_
from lorafuse.kernels.eager import EagerFunction
from lorafuse.kernels.runtime import mm_fp32

__all__ = [
    "CrossEntropyOptions",
    "LinearCrossEntropy",
    "chunk_rows",
    "linear_cross_entropy",
    "reference",
]

Reduction = Literal["mean", "sum"]

# 512 MB hold 2,048 rows of 128,256 bf16 words: enough rows for the GEMMs' full speed.
_GPU_CHUNK_BYTES = 512 * 2**20
# On a CPU the fp32 temporaries of a chunk are best kept small; GEMM speed saturates at a few
# hundred rows.
_CPU_CHUNK_BYTES = 64 * 2**20
# dW is summed in blocks of this many words, so that its fp32 temporary stays at some 256 MB.
_WEIGHT_BLOCK = 16384
_SCALED_ROWS = 8192  # of d(hidden) are scaled in fp32 at a time
# Rows of logits start at multiples of so many words, and the head's GEMMs take whole tiles of them;
# what is left of V goes by itself (`word_parts`).
_WORD_TILE = 64


@dataclass(frozen=True, eq=False)
class LinearCrossEntropy:
    """The loss and what the same pass learnt on the way. Everything is on the input's device.

    Attributes:
        loss: 0-d, fp32 (fp64 for fp64 input), differentiable. The rest is not.
        num_valid_tokens: 0-d int64, rows with a label (N).
        num_correct_tokens: 0-d int64, rows whose largest logit is the label's.
        entropy_sum: 0-d, sum of the rows' entropies in nats.
        labelled: [T] bool, which rows had a label.
        row_entropy: [T], nats; 0 where there is no label.
        row_prediction: [T] int64, the first largest logit; 0 where there is no label.
    """

    loss: Tensor
    num_valid_tokens: Tensor
    num_correct_tokens: Tensor
    entropy_sum: Tensor
    labelled: Tensor
    row_entropy: Tensor
    row_prediction: Tensor


def reference(
    hidden: Tensor,  # (T, H)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (T,)
    options: CrossEntropyOptions | None = None,
    bias: Tensor | None = None,  # (V,)
    divisor: Tensor | int | None = None,
    lora_A: Tensor | None = None,  # (R, H)
    lora_B: Tensor | None = None,  # (V, R)
    lora_scale: float = 1.0,
    reduction: Reduction = "mean",
) -> LinearCrossEntropy:
    """`linear_cross_entropy` by its definition: all logits at once, and torch's autograd."""
    options = options or CrossEntropyOptions()
    logits = torch.nn.functional.linear(hidden, weight, bias)
    if lora_A is not None and lora_B is not None:
        logits = logits + lora_scale * ((hidden @ lora_A.t()) @ lora_B.t())
    labelled = labels != options.ignore_index
    rows = labelled.nonzero()[:, 0]
    labels = labels[rows]
    loss, entropy, prediction = cross_entropy_rows.reference(logits[rows], labels, options)
    total = loss.sum()
    if divisor is not None:
        total = total / divisor
    elif reduction == "mean":
        total = total / rows.numel() if rows.numel() else total * float("nan")
    return LinearCrossEntropy(
        loss=total,
        num_valid_tokens=torch.full_like(rows[:0].sum(), rows.numel()),
        num_correct_tokens=(prediction == labels).sum(),
        entropy_sum=entropy.sum(),
        labelled=labelled,
        row_entropy=entropy.new_zeros(labelled.shape).index_copy_(0, rows, entropy),
        row_prediction=prediction.new_zeros(labelled.shape).index_copy_(0, rows, prediction),
    )


def chunk_rows(n_rows: int, vocabulary: int, itemsize: int, limit_bytes: int) -> int:
    """Rows of logits to hold at a time: what `limit_bytes` hold, shared out evenly over the chunks.

    Evenly, because a last chunk of a few rows would run the head's GEMM at a fraction of its speed.
    Multiples of 128 rows fill the GEMM's tiles.
    """
    most = max(1, limit_bytes // (vocabulary * itemsize))
    if n_rows <= most:
        return max(1, n_rows)
    if most >= 128:
        most -= most % 128
    even = -(-n_rows // -(-n_rows // most))
    return min(most, -(-even // 128) * 128)


@dataclass(frozen=True)
class _Setting:
    options: CrossEntropyOptions
    lora_scale: float
    reduction: Reduction
    dtype: torch.dtype  # of the GEMMs
    gradients: bool
    max_rows: int | None


def logits_bytes(device: torch.device, options: CrossEntropyOptions) -> int:
    """Upper limit of the logits that are held at a time."""
    standard = _GPU_CHUNK_BYTES if device.type == "cuda" else _CPU_CHUNK_BYTES
    return options.chunk_bytes or standard


def logits_buffer(like: Tensor, rows: int, vocabulary: int, dtype: torch.dtype) -> Tensor:
    """[rows, V] whose rows start at whole tiles of words: aligned for 16-byte loads and for
    cuBLAS, whatever V is."""
    width = -(-vocabulary // _WORD_TILE) * _WORD_TILE
    return like.new_empty(rows, width, dtype=dtype)[:, :vocabulary]


def write_logits(
    X: Tensor,  # (M, H)
    W: Tensor,  # (V, H)
    b: Tensor | None,  # (V,)
    Z: Tensor,  # (M, V)
) -> None:
    """Z = X W^T + b."""
    if b is None:
        for words in word_parts(W.shape[0]):
            torch.mm(X, W[words].t(), out=Z[:, words])
    elif Z.is_contiguous():
        torch.addmm(b, X, W.t(), out=Z)
    else:  # into rows that are apart, torch would round before it adds b
        Z.copy_(torch.nn.functional.linear(X, W, b))


def write_input_gradient(
    G: Tensor,  # (M, V)
    W: Tensor,  # (V, H)
    dX: Tensor,  # (M, H)
) -> None:
    """dX = G W."""
    first, *rest = word_parts(W.shape[0])
    torch.mm(G[:, first], W[first], out=dX)
    for words in rest:
        dX.addmm_(G[:, words], W[words])


def word_parts(vocabulary: int) -> list[slice]:
    """The words that the head's GEMMs take together.

    All, where their number is a multiple of 8. Else (a vocabulary with a few words added; Granite's
    49,155) the whole tiles, and the few that are left: an odd length of the sum G W, or of a row
    of Z, would cost the tensor cores' fast kernels.
    """
    whole = vocabulary - vocabulary % _WORD_TILE
    if vocabulary % 8 == 0 or whole == 0:
        return [slice(0, vocabulary)]
    return [slice(0, whole), slice(whole, vocabulary)]


def _add_weight_gradient_(dW: Tensor, G: Tensor, X: Tensor) -> None:
    # dW += G^T X
    for start in range(0, dW.shape[0], _WEIGHT_BLOCK):
        block = slice(start, start + _WEIGHT_BLOCK)
        dW[block] += mm_fp32(G[:, block].t(), X)


def scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """x * factor, 0-d or one a row, with one rounding.

    torch would first round a 0-d fp32 factor to x's 16 bit.
    """
    if x.dtype == factor.dtype:
        return (x * factor).to(dtype)
    out = torch.empty_like(x, dtype=dtype)
    for start in range(0, x.shape[0], _SCALED_ROWS):
        part = slice(start, start + _SCALED_ROWS)
        out[part] = x[part].to(factor.dtype).mul_(factor[part] if factor.dim() else factor)
    return out


class LinearCrossEntropyFunction(EagerFunction):
    """forward -> (loss, valid, correct, entropy sum, labelled, row entropy, row prediction)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_A: Tensor | None,
        lora_B: Tensor | None,
        labels: Tensor,
        divisor: Tensor | None,
        setting: _Setting,
    ) -> tuple[Tensor, ...]:
        # Autocast would cast the fp32 products of the weight gradients down again.
        with torch.autocast(hidden.device.type, enabled=False):
            return _forward(ctx, hidden, weight, bias, lora_A, lora_B, labels, divisor, setting)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        rows, valid, divisor, *products = ctx.saved_tensors
        # A batch without labels has a zero gradient, also where its mean is 0 / 0.
        factor = (dloss / divisor).where(valid > 0, 0)
        gradients: list[Tensor | None] = [
            None if product is None else scaled(product, factor, dtype)
            for product, dtype in zip(products, ctx.gradient_dtypes, strict=True)
        ]
        dX = gradients[0]
        if dX is not None and dX.shape[0] != ctx.n_hidden_rows:
            # Added, for the rows that fill up to `max_rows` are 0 and repeat a row.
            gradients[0] = dX.new_zeros(ctx.n_hidden_rows, dX.shape[1]).index_add_(0, rows, dX)
        return (*gradients, None, None, None)


def _forward(
    ctx: Any,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    labels: Tensor,
    divisor: Tensor | None,
    setting: _Setting,
) -> tuple[Tensor, ...]:
    need_X, need_W, need_b, need_A, need_B = (
        setting.gradients and need for need in ctx.needs_input_grad[:5]
    )
    gradient = need_X or need_W or need_b or need_A or need_B
    options, dtype, s = setting.options, setting.dtype, setting.lora_scale
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    V, H = weight.shape

    labelled = labels != options.ignore_index
    T = hidden.shape[0]
    if setting.max_rows is None:
        rows = labelled.nonzero()[:, 0]  # waits for the GPU
        N = rows.numel()
        valid = torch.full((), N, dtype=torch.int64, device=hidden.device)
    else:
        N, valid = min(setting.max_rows, T), labelled.sum()
        rows = _first_rows(labelled, N)
    all_rows = N == T
    if not all_rows:
        labels = labels[rows]
        if setting.max_rows is not None:
            place = torch.arange(N, device=hidden.device)
            labels = labels.where(place < valid, options.ignore_index)

    W = weight.to(dtype)
    b = None if bias is None else bias.to(dtype)
    A = None if lora_A is None else lora_A.to(dtype)
    B = None if lora_B is None else lora_B.to(dtype)

    def zeros(like: Tensor) -> Tensor:
        return torch.zeros_like(like, dtype=accumulate, memory_format=torch.contiguous_format)

    dX = hidden.new_empty(N, H, dtype=dtype) if need_X else None
    dW = zeros(weight) if need_W else None
    db = zeros(bias) if need_b and bias is not None else None
    dA = zeros(lora_A) if need_A and lora_A is not None else None
    dB = zeros(lora_B) if need_B and lora_B is not None else None

    chunk = chunk_rows(N, V, dtype.itemsize, logits_bytes(hidden.device, options))
    buffer = logits_buffer(hidden, min(chunk, N), V, dtype)
    loss = hidden.new_empty(N, dtype=accumulate)
    entropy = torch.empty_like(loss)
    prediction = torch.empty_like(labels)

    for start in range(0, N, chunk):
        part = slice(start, min(start + chunk, N))
        X = (hidden[part] if all_rows else hidden.index_select(0, rows[part])).to(dtype)
        Z = buffer[: X.shape[0]]
        write_logits(X, W, b, Z)
        if A is not None and B is not None:
            XA = X @ A.t()
            Z.addmm_(XA, B.t(), alpha=s)
        cross_entropy_rows_(
            Z, labels[part], options, loss[part], entropy[part], prediction[part], gradient
        )
        if not gradient:
            continue
        G = Z
        if dX is not None:
            write_input_gradient(G, W, dX[part])
        if A is not None and B is not None:
            GB = G @ B
            if dX is not None:
                dX[part].addmm_(GB, A, alpha=s)
            if dA is not None:
                dA.add_(mm_fp32(GB.t(), X), alpha=s)
            if dB is not None:
                dB.add_(mm_fp32(G.t(), XA), alpha=s)
        if dW is not None:
            _add_weight_gradient_(dW, G, X)
        if db is not None:
            db += G.sum(0, dtype=accumulate)

    # More rows than the caller has promised: seen at once, unlike rows left out.
    total = loss.sum().where(valid <= N, float("nan"))
    if divisor is None:
        divisor = valid if setting.reduction == "mean" else torch.ones_like(total)
    if gradient:
        ctx.save_for_backward(rows, valid, divisor, dX, dW, db, dA, dB)
        ctx.n_hidden_rows = hidden.shape[0]
        # `dtype` stands in where there is no product to scale
        ctx.gradient_dtypes = [
            dtype if x is None else x.dtype for x in (hidden, weight, bias, lora_A, lora_B)
        ]
    correct = ((prediction == labels) & (labels != options.ignore_index)).sum()
    prediction = prediction.where(labels != options.ignore_index, 0)
    entropy_sum = entropy.sum()
    if not all_rows:
        entropy = entropy.new_zeros(T).index_add_(0, rows, entropy)
        prediction = prediction.new_zeros(T).index_add_(0, rows, prediction)
    by_products = (valid, correct, entropy_sum, labelled, entropy, prediction)
    ctx.mark_non_differentiable(*by_products)
    return (total / divisor, *by_products)


def _first_rows(chosen: Tensor, count: int) -> Tensor:
    """[count] int64: the first rows where `chosen` [T] holds, then 0; without asking the GPU."""
    rows = torch.arange(chosen.shape[0], device=chosen.device)
    place = chosen.cumsum(0).sub_(1).where(chosen, count).clamp_(max=count)
    return rows.new_zeros(count + 1).scatter_(0, place, rows)[:count]


def _check(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    dtype: torch.dtype,
) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            "hidden must be [T, H] and weight [V, H], got "
            f"{list(hidden.shape)} and {list(weight.shape)}"
        )
    T, H = hidden.shape
    V = weight.shape[0]
    if labels.shape != (T,) or labels.dtype != torch.int64:
        raise ValueError(
            f"labels must be [{T}] int64 as hidden has {T} rows, got {list(labels.shape)} "
            f"{labels.dtype}"
        )
    if not dtype.is_floating_point or not weight.dtype.is_floating_point:
        raise ValueError(
            f"hidden and weight must be floating point, got {hidden.dtype} and {weight.dtype}: "
            "dequantise a quantised head first"
        )
    if dtype == hidden.dtype != weight.dtype:
        raise ValueError(
            f"hidden is {hidden.dtype} and weight {weight.dtype}: give both one dtype, or run "
            "under torch.autocast"
        )
    if bias is not None and bias.shape != (V,):
        raise ValueError(f"bias must be [{V}], got {list(bias.shape)}")
    if (lora_A is None) != (lora_B is None):
        raise ValueError("lora_A and lora_B come together: got only one of them")
    if lora_A is not None and lora_B is not None:
        R = lora_A.shape[0]
        if lora_A.shape != (R, H) or lora_B.shape != (V, R):
            raise ValueError(
                f"lora_A must be [R, {H}] and lora_B [{V}, R], got {list(lora_A.shape)} and "
                f"{list(lora_B.shape)}"
            )


def linear_cross_entropy(
    hidden: Tensor,  # (T, H)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (T,) int64
    options: CrossEntropyOptions | None = None,
    bias: Tensor | None = None,  # (V,)
    divisor: Tensor | int | float | None = None,
    lora_A: Tensor | None = None,  # (R, H)
    lora_B: Tensor | None = None,  # (V, R)
    lora_scale: float = 1.0,
    reduction: Reduction = "mean",
    max_rows: int | None = None,
) -> LinearCrossEntropy:
    """Cross-entropy of `hidden @ weight.T`, of which no more than a chunk exists at a time.

    Rows and labels are taken as they lie: the caller has shifted the labels by one. Gradients reach
    hidden and whichever of weight, bias, lora_A and lora_B require one, and are computed in the
    forward pass.

    Args:
        hidden: [T, H], any strides; fp32, fp16, bf16 (fp64 for gradcheck).
        weight: [V, H], the head; any V. The dtype of hidden, or any under autocast.
        labels: [T] int64; `options.ignore_index` for rows without a label.
        options: What the loss of a row is; defaults to plain cross-entropy.
        bias: [V], the head's bias.
        divisor: The sum over rows is divided by this (`num_items_in_batch`), whatever `reduction`
            says.
        lora_A: [R, H], of an adapted head.
        lora_B: [V, R], of an adapted head.
        lora_scale: Factor of the adapter's update.
        reduction: Without a divisor: "mean" over the rows with a label, or "sum".
        max_rows: At most so many rows have a label, as the caller knows: so many go through the
            head, and the GPU is not asked. If there are more, the loss is NaN.

    Returns:
        The loss and its by-products. Where no row has a label, loss and gradients are what torch
        gives: NaN for the mean and 0 for a sum or with a divisor; gradients 0 in each case.

    Raises:
        ValueError: Shapes or dtypes do not fit together.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
    device = hidden.device
    dtype = hidden.dtype
    if torch.is_autocast_enabled(device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device.type)
    _check(hidden, weight, labels, bias, lora_A, lora_B, dtype)
    if divisor is not None and not isinstance(divisor, Tensor):
        divisor = torch.full((), divisor, dtype=torch.float32, device=device)
    setting = _Setting(
        options=options or CrossEntropyOptions(),
        lora_scale=lora_scale,
        reduction=reduction,
        dtype=dtype,
        gradients=torch.is_grad_enabled(),
        max_rows=max_rows,
    )
    return LinearCrossEntropy(
        *LinearCrossEntropyFunction.apply(
            hidden,
            weight,
            bias,
            lora_A,
            lora_B,
            labels.to(device),
            None if divisor is None else divisor.detach().to(device),
            setting,
        )
    )
