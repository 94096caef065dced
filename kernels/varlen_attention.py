"""Causal attention within each of the documents that lie one behind the other in one sequence.

    o_i = sum_j softmax_j(scale q_i k_j) v_j        j <= i, j in the document of i

q: [T, Hq, D], k and v: [T, Hk, D], o: [T, Hq, D]; Hq / Hk query heads share a key and value head,
which is never repeated in memory. Saved for backward: q, k, v, o and the log-sum-exp [Hq, T].

A dense mask costs the whole [S, S] square of every row whatever its documents are: 1.6 + 4.6 ms
(forward + backward) a layer of 2 x 4096 tokens, 32 heads of 128, bf16, where 16 documents of 512
take 0.24 + 0.70 ms here (H100, torch 2.11, 2026-11-25). The kernels are torch's own build of
FlashAttention (Dao, 2023, https://arxiv.org/abs/2307.08691), through `torch.nn.attention.varlen`.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Documents", "reference", "serves", "varlen_attention"]

_MAX_HEAD_SIZE = 256  # FlashAttention's


@dataclass(frozen=True, eq=False)
class Documents:
    """Where documents begin in a batch of T = rows * length tokens, laid row behind row.

    Attributes:
        starts: the first token of each document, ascending, the first of them 0.
        tokens: T.
        device: of the batch.
    """

    starts: tuple[int, ...]
    tokens: int
    device: torch.device

    @cached_property
    def bounds(self) -> tuple[int, ...]:
        """The starts, and T behind them."""
        return (*self.starts, self.tokens)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max(b - a for a, b in zip(self.bounds, self.bounds[1:], strict=False))

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """The bounds as FlashAttention reads them: int32, on the device."""
        return torch.tensor(self.bounds, dtype=torch.int32, device=self.device)


def reference(q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float) -> Tensor:
    """The definition: one document after the other, differentiable."""
    outputs = []
    for a, b in zip(documents.bounds, documents.bounds[1:], strict=False):
        q_one, k_one, v_one = (x[a:b].transpose(0, 1)[None] for x in (q, k, v))
        o = F.scaled_dot_product_attention(
            q_one, k_one, v_one, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        outputs.append(o[0].transpose(0, 1))
    return torch.cat(outputs)


@cache
def _torch_varlen() -> tuple[Callable[..., Any], frozenset[str]] | None:
    """torch's function and the names of its options, which differ from 2.10 to 2.11 to 2.13."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # before torch 2.10
        return None
    names = frozenset(inspect.signature(varlen_attn).parameters)
    if "scale" not in names or not names & {"window_size", "is_causal"}:
        return None
    return varlen_attn, names


def serves(q: Tensor) -> bool:
    """Whether `varlen_attention` is the right choice for [..., D] tensors like `q`.

    On a GPU that is FlashAttention, for fp16 and bf16; on a CPU the reference, for every dtype.
    """
    if not q.is_cuda:
        return q.device.type == "cpu"
    size = q.shape[-1]
    return (
        q.dtype in (torch.float16, torch.bfloat16)
        and size % 8 == 0
        and size <= _MAX_HEAD_SIZE
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
        and _torch_varlen() is not None
    )


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float) -> Tensor:
    """Causal attention within each document; differentiable in q, k and v.

    Args:
        q: [T, Hq, D], fp16 or bf16 on a GPU; the last dimension contiguous, other strides any.
        k: [T, Hk, D], Hk a divisor of Hq.
        v: as k.
        documents: of T tokens.
        scale: factor of the scores.

    Returns:
        [T, Hq, D].

    Raises:
        ValueError: the shapes do not fit.
    """
    if q.shape[0] != documents.tokens or k.shape != v.shape or k.shape[0] != q.shape[0]:
        raise ValueError(
            f"expected q, k and v of {documents.tokens} tokens, got {tuple(q.shape)}, "
            f"{tuple(k.shape)} and {tuple(v.shape)}"
        )
    if k.shape[2] != q.shape[2] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"expected k and v of {q.shape[2]} features and a divisor of {q.shape[1]} heads, got "
            f"{tuple(k.shape)}"
        )
    found = _torch_varlen() if q.is_cuda else None
    if found is None or not serves(q):
        return reference(q, k, v, documents, scale)
    function, names = found
    options: dict[str, Any] = {"scale": scale}
    options |= {"window_size": (-1, 0)} if "window_size" in names else {"is_causal": True}
    if "enable_gqa" in names:
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    cu, longest = documents.cu_seqlens, documents.longest
    output: Tensor = function(q, k, v, cu, cu, longest, longest, **options)
    return output
