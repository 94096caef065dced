"""Log-probability of one word a row under a linear head that never holds the logits of the batch.

    t_m = transform(X W^T + b)_m        transform: scale and soft cap of `cross_entropy_rows`
    log_prob_m = t_m[y_m] - log sum_v exp(t_mv)        entropy_m = -sum_v p_mv log p_mv

For losses that weigh each token on its own (DPO, GRPO, and how TRL computes SFT's). A row's
log-probability depends on that row of X alone. So its gradient is computed in the forward pass, in
the buffer of the logits, as `linear_cross_entropy` does, and backward multiplies each row by what
comes in: two GEMMs with the head in forward, none in backward. That takes a frozen head.

The entropy is differentiable, too: its gradient, which few losses ask for, computes the logits
anew, in plain torch. The prediction is not.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorafuse.kernels import cross_entropy_rows
from lorafuse.kernels.cross_entropy_rows import CrossEntropyOptions, cross_entropy_rows_
from lorafuse.kernels.eager import EagerFunction
from lorafuse.kernels.linear_cross_entropy import (
    chunk_rows,
    logits_buffer,
    logits_bytes,
    scaled,
    write_input_gradient,
    write_logits,
)

__all__ = ["linear_log_probs", "reference"]


@dataclass(frozen=True)
class _Setting:
    options: CrossEntropyOptions
    dtype: torch.dtype  # of the GEMMs
    gradients: bool


def reference(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (N,)
    options: CrossEntropyOptions | None = None,
    bias: Tensor | None = None,  # (V,)
) -> tuple[Tensor, Tensor, Tensor]:
    """`linear_log_probs` by its definition: all logits at once, and torch's autograd."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    options = options or CrossEntropyOptions()
    loss, _, prediction = cross_entropy_rows.reference(logits, labels, options)
    return -loss, _entropy(logits, options), prediction


def _entropy(logits: Tensor, options: CrossEntropyOptions) -> Tensor:
    t = options.transform(logits if logits.dtype == torch.float64 else logits.float())
    log_p = torch.log_softmax(t, dim=-1)
    return -(log_p.exp() * log_p).sum(-1)


class LinearLogProbsFunction(EagerFunction):
    """Saves dX of each row's own loss, and for the entropy's gradient references to the inputs."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        setting: _Setting,
    ) -> tuple[Tensor, Tensor, Tensor]:
        options, dtype = setting.options, setting.dtype
        (N, H), V = hidden.shape, weight.shape[0]
        wanted = setting.gradients and ctx.needs_input_grad[0]
        with torch.autocast(hidden.device.type, enabled=False):
            W, b = weight.to(dtype), None if bias is None else bias.to(dtype)
            accumulate = torch.float64 if dtype == torch.float64 else torch.float32
            loss = hidden.new_empty(N, dtype=accumulate)
            entropy, prediction = torch.empty_like(loss), torch.empty_like(labels)
            dX = hidden.new_empty(N, H, dtype=dtype) if wanted else None
            chunk = chunk_rows(N, V, dtype.itemsize, logits_bytes(hidden.device, options))
            buffer = logits_buffer(hidden, min(chunk, N), V, dtype)
            for start in range(0, N, chunk):
                part = slice(start, min(start + chunk, N))
                X = hidden[part].to(dtype)
                Z = buffer[: X.shape[0]]
                write_logits(X, W, b, Z)
                cross_entropy_rows_(
                    Z, labels[part], options, loss[part], entropy[part], prediction[part], wanted
                )
                if dX is not None:
                    write_input_gradient(Z, W, dX[part])
        ctx.save_for_backward(hidden, weight, bias, dX)
        ctx.setting = setting
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(prediction)
        return loss.neg_(), entropy, prediction

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_log_probs: Tensor | None, d_entropy: Tensor | None, _: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, dX = ctx.saved_tensors
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        with torch.autocast(hidden.device.type, enabled=False):
            if d_log_probs is None:
                out = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
            else:  # dX is the gradient of minus the log-probability
                out = scaled(dX, -d_log_probs[:, None], hidden.dtype)
            if d_entropy is not None:
                _add_entropy_gradient_(out, hidden, weight, bias, d_entropy, ctx.setting)
        return out, None, None, None, None


def _add_entropy_gradient_(
    out: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    d_entropy: Tensor,
    setting: _Setting,
) -> None:
    options, dtype = setting.options, setting.dtype
    W, b = weight.to(dtype), None if bias is None else bias.to(dtype)
    # fp32 logits, their softmax and their gradient
    limit = logits_bytes(hidden.device, options) // 8
    chunk = chunk_rows(hidden.shape[0], weight.shape[0], dtype.itemsize, max(1, limit))
    for start in range(0, hidden.shape[0], chunk):
        part = slice(start, start + chunk)
        with torch.enable_grad():
            z = torch.nn.functional.linear(hidden[part].to(dtype), W, b).detach().requires_grad_()
            (dz,) = torch.autograd.grad(_entropy(z, options), z, d_entropy[part])
        out[part] += (dz.to(dtype) @ W).to(out.dtype)


def linear_log_probs(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (N,) int64
    options: CrossEntropyOptions | None = None,
    bias: Tensor | None = None,  # (V,)
) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's log-probability of its label, its entropy and its likeliest word.

    Under autocast the GEMMs run in autocast's dtype, else in `hidden`'s.

    Args:
        hidden: [N, H], any strides; fp32, fp16, bf16 (fp64 for gradcheck). Only it gets a gradient.
        weight: [V, H], the head; frozen. The dtype of hidden, or any under autocast.
        labels: [N] int64, all of them words: rows without a label are left out by the caller.
        options: scale and soft cap; defaults to none.
        bias: [V], frozen, or None.

    Returns:
        (log-probability [N], entropy [N] in nats, both fp32 (fp64 for fp64 input) and
        differentiable; the first largest logit [N] int64).

    Raises:
        ValueError: the head is trained, `options` ask for more than scale and soft cap, or shapes
            do not fit together.
    """
    options = options or CrossEntropyOptions()
    if torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in (weight, bias)):
        raise ValueError("the head is trained; linear_log_probs gives the gradient of hidden alone")
    if options.label_smoothing or options.z_loss:
        raise ValueError("label smoothing and z-loss are no part of a log-probability")
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            "hidden must be [N, H] and weight [V, H], got "
            f"{list(hidden.shape)} and {list(weight.shape)}"
        )
    if labels.shape != hidden.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"labels must be [{hidden.shape[0]}] int64, got {list(labels.shape)} {labels.dtype}"
        )
    kind, dtype = hidden.device.type, hidden.dtype
    if torch.is_autocast_enabled(kind) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
    setting = _Setting(options, dtype, torch.is_grad_enabled())
    outputs: tuple[Tensor, Tensor, Tensor] = LinearLogProbsFunction.apply(
        hidden, weight, bias, labels, setting
    )
    return outputs
