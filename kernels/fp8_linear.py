r"""The two large GEMMs of a LoRA group in FP8, with LoRA folded into K at bf16's precision.

    forward    Y  = s_t s * [X8 | XA_hi | XA_lo | XA_hi] [W8 | B_hi | B_hi | B_lo]^T     (+ bias)
    backward   dX = s_t s * [dY8 | G_hi | G_lo | G_hi] [W8^T | A^T_hi | A^T_hi | A^T_lo]^T

    X [T, K], dY [T, N], W [N, K]; XA = s X A^T and G = s dY B [T, R] come in bf16, as do B and A
    s_t: a scale for each token's row (`fp8`); s: the weights' scale (`fp8_weight`)

Only the frozen part is coarse: X, W and dY keep four significant bits, an error of 3 to 4 % of Y
and dX that is new for every token. LoRA's part keeps eight, and its gradients dA and dB come from
the unrounded X and dY, as without FP8. Nothing is kept between passes: codes are written on the fly
and freed after the GEMM.

`why_not` is the one place that says where this runs.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from lorafuse.kernels.fp8 import E4M3, Fold, fold_width, quantise_rows
from lorafuse.kernels.fp8_tops import group_tops
from lorafuse.kernels.fp8_weight import codes, codes_transposed, fold
from lorafuse.kernels.nf4 import Quantised4bit, dequantise
from lorafuse.kernels.runtime import HAS_TRITON, mm_fp32

__all__ = [
    "MIN_ROWS",
    "forward",
    "input_gradient",
    "noise_db",
    "scaled_mm",
    "unavailable",
    "why_not",
]

Weight = Tensor | Quantised4bit

# Below, writing the codes of the weight costs more than the GEMM gains.
MIN_ROWS = 256
# The r-wide codes of the weight's side stay below 2^this (`fp8.balance`). Low, so that c XA and c G
# are large beside X and dY: at B = 1e-4, and rows of W of very different size, 8 bits are left of
# LoRA's term; with 6 it were 6. Lower still, the low parts of B itself become subnormal.
_LOG2 = 2
# The tensor cores' own sums, of fewer bits than fp32. The other kind costs speed.
_FAST_SUMS = True


def unavailable(device: torch.device) -> str | None:
    """Why no FP8 GEMM runs on `device`, or None."""
    if device.type != "cuda":
        return (
            f"FP8 needs an NVIDIA GPU of compute capability 8.9 or newer; this is a {device.type}"
        )
    return _gpu_lacks(device.index if device.index is not None else torch.cuda.current_device())


@lru_cache(maxsize=64)
def _gpu_lacks(index: int) -> str | None:
    if torch.version.cuda is None:
        return "FP8 is for NVIDIA GPUs; this torch is built for another kind"
    if not HAS_TRITON:
        return "FP8 needs triton, which is not installed"
    capability = torch.cuda.get_device_capability(index)
    if capability < (8, 9):
        name = torch.cuda.get_device_name(index)
        has = ".".join(map(str, capability))
        return f"FP8 needs compute capability 8.9 or newer; {name} has {has}"
    if not hasattr(torch, "_scaled_mm"):
        return f"torch {torch.__version__} has no torch._scaled_mm with a scale for each row"
    return None


def why_not(
    device: torch.device, dtype: torch.dtype, rows: int, in_features: int, out_features: int
) -> str | None:
    """Why a linear layer does not compute in FP8, or None where it does.

    Args:
        device: of the input.
        dtype: that GEMMs run in.
        rows: T.
        in_features: K.
        out_features: N of the layer.
    """
    reason = unavailable(device)
    if reason is not None:
        return reason
    if dtype != torch.bfloat16:
        return f"FP8 stands in for bf16 GEMMs; this one computes in {str(dtype).split('.')[-1]}"
    if in_features % 16 or out_features % 16:
        return f"FP8 GEMMs need multiples of 16 features; got {in_features} and {out_features}"
    if rows < MIN_ROWS:
        return f"fewer than {MIN_ROWS} tokens: FP8 would not be faster"
    return None


def scaled_mm(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, out: Tensor) -> None:
    """out = scale_a * scale_b * (a b^T).

    Args:
        a: [T, K] e4m3, contiguous.
        b: [N, K] e4m3, contiguous.
        scale_a: [T, 1] fp32.
        scale_b: [1, N] fp32.
        out: [T, N] bf16.
    """
    if not a.is_cuda:  # the definition
        out.copy_((a.float() @ b.float().t()) * scale_a * scale_b)
        return
    target = (
        out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
    )
    torch._scaled_mm(
        a, b.t(), scale_a, scale_b,
        out_dtype=out.dtype, use_fast_accum=_FAST_SUMS, out=target,
    )  # fmt: skip
    if target is not out:
        out.copy_(target)


def _multiply(
    rows: Tensor,  # (T, J)
    U: Tensor | None,  # (T, >= R)
    tops: Tensor,
    rank: int,
    weight: Tensor,  # (N, J + F) e4m3
    scale: Tensor,  # (1, N) fp32
    out: Tensor,
) -> None:
    T, width = rows.shape[0], weight.shape[1]
    row_codes = rows.new_empty((T, width), dtype=E4M3)
    row_scale = rows.new_empty((T, 1), dtype=torch.float32)
    quantise_rows(rows, row_codes, row_scale, None if U is None else Fold(U, tops, rank, _LOG2))
    scaled_mm(row_codes, weight, row_scale, scale, out)


def forward(
    weights: Sequence[Weight],  # of [N_i, K]
    x: Tensor,  # (T, K), any row stride
    out: Tensor,  # (T, N)
    xA: Tensor | None = None,  # (T, >= R)
    B: Tensor | None = None,  # (N, >= R)
    rank: int = 0,
) -> None:
    """Writes X [W_1; W_2; ...]^T + XA B^T into `out`."""
    K, N = x.shape[1], out.shape[1]
    F = fold_width(K, rank)
    tops = group_tops(weights, B if B is None else B[:, :rank])
    W = x.new_empty((N, K + F), dtype=E4M3)
    scale = x.new_empty((1, N), dtype=torch.float32)
    codes(weights, tops, W[:, :K])
    fold(B, rank, tops, _LOG2, W[:, K:], scale)
    _multiply(x, xA, tops, rank, W, scale, out)


def input_gradient(
    weights: Sequence[Weight],  # of [N_i, K]
    dy: Tensor,  # (T, N), any row stride
    out: Tensor,  # (T, K)
    G: Tensor | None = None,  # (T, >= R)
    A: Tensor | None = None,  # (>= R, K)
    rank: int = 0,
) -> None:
    """Writes dY [W_1; W_2; ...] + G A into `out`."""
    K, N = out.shape[1], dy.shape[1]
    F = fold_width(N, rank)
    At = None if A is None else A.t()
    tops = group_tops(weights, At if At is None else At[:, :rank])
    W = dy.new_empty((K, N + F), dtype=E4M3)
    scale = dy.new_empty((1, K), dtype=torch.float32)
    codes_transposed(weights, tops, W[:, :N])
    fold(At, rank, tops, _LOG2, W[:, N:], scale)
    _multiply(dy, G, tops, rank, W, scale, out)


def noise_db(weights: Sequence[Weight], device: torch.device, rows: int = MIN_ROWS) -> Tensor:
    """Signal to noise of the FP8 products X W^T and dY W on random normal rows, in dB.

    Args:
        weights: of [N_i, K], that share their input.
        device: where they are.
        rows: T.

    Returns:
        [2] fp32 on `device`: forward and backward. 10 log10 (|exact|^2 / |FP8 - exact|^2), exact
        being the bf16 product accumulated and kept in fp32.
    """
    K = weights[0].shape[1]
    N = sum(weight.shape[0] for weight in weights)
    W = torch.empty((N, K), device=device, dtype=torch.bfloat16)
    first = 0
    for weight in weights:
        target = W[first : first + weight.shape[0]]
        if isinstance(weight, Quantised4bit):
            dequantise(weight, target)
        else:
            target.copy_(weight)
        first += weight.shape[0]
    generator = torch.Generator(device=device).manual_seed(0)
    results = []
    for product, dims in ((forward, (K, N)), (input_gradient, (N, K))):
        x = torch.randn(
            (rows, dims[0]), device=device, generator=generator, dtype=torch.float32
        ).bfloat16()
        y = x.new_empty((rows, dims[1]))
        product(weights, x, y)
        exact = mm_fp32(x, W.t() if product is forward else W)
        signal, noise = (t.square().mean().clamp_min(1e-30) for t in (exact, y.float() - exact))
        results.append(10 * torch.log10(signal / noise))
    return torch.stack(results)
