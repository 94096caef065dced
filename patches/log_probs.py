"""The log-probabilities of a causal LM whose trainer computes the loss itself: TRL's fused head.

From 1.15 on, TRL's trainers put a forward of their own on the causal LM's instance
(`add_fused_lm_head`). Called with `fused_lm_head=True`, it runs the backbone and hands the rows
that have a label to `ChunkedLogProbFunction`, for log-probabilities, entropies and the like; the
loss is then the trainer's. That forward runs here as it is, mask, auxiliary loss and sharding
included, but for this one function, which `linear_log_probs` stands in for: in the globals of one
call, nowhere else.

What the kernel does not give, TRL's own function computes, with the reason counted.
"""

import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lorafuse.kernels.cross_entropy_rows import CrossEntropyOptions
from lorafuse.kernels.linear_log_probs import linear_log_probs

__all__ = ["ARGUMENT", "LogProbs", "forward_with"]

# The argument by which TRL's trainers ask for log-probabilities.
ARGUMENT = "fused_lm_head"
_FUNCTION = "_ChunkedLogProbFunction"
_GIVEN = frozenset(("log_probs", "entropy", "mean_logits", "is_top1"))

Outputs = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class LogProbs:
    """Stands for TRL's autograd Function in one call of its forward.

    Args:
        trls: the Function.
        falls_back: told why it has to compute after all.

    Attributes:
        served: how often the kernel did.
    """

    def __init__(self, trls: Any, falls_back: Callable[[str], None]) -> None:
        self.trls, self.falls_back = trls, falls_back
        self.served = 0

    def apply(
        self,
        hidden: Tensor,  # (N, H), the rows with a label
        weight: Tensor,  # (V, H)
        bias: Tensor | None,  # (V,)
        targets: Tensor,  # (N,)
        temperature: float,
        chunk_size: int,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        outputs: Sequence[str] = (),
        *more: Any,
    ) -> Outputs:
        """(log-probabilities, entropies, log sum p^2, mean logits, hits), as TRL's gives them.

        Logits are scaled, then capped, then divided by the temperature.
        """
        reason = _why_not(weight, bias, temperature, softcap, outputs, more)
        if reason is not None:
            self.falls_back(reason)
            given = (hidden, weight, bias, targets, temperature, chunk_size)
            result: Outputs = self.trls.apply(*given, softcap, logit_scale, outputs, *more)
            return result
        self.served += 1
        options = CrossEntropyOptions(logit_scale=logit_scale / temperature, logit_softcap=softcap)
        weight, bias = weight.detach(), None if bias is None else bias.detach()
        log_probs, entropy, prediction = linear_log_probs(hidden, weight, targets, options, bias)
        return (
            log_probs,
            entropy if "entropy" in outputs else None,
            None,
            _mean_logits(hidden, weight, bias, options) if "mean_logits" in outputs else None,
            prediction == targets if "is_top1" in outputs else None,
        )


def _why_not(
    weight: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    outputs: Sequence[str],
    more: Sequence[Any],
) -> str | None:
    if more:
        return "TRL's fused head wants more than lorafuse knows of"
    if not _GIVEN.issuperset(outputs):
        wanted = ", ".join(sorted(set(outputs) - _GIVEN))
        return f"TRL's fused head wants {wanted}, which the kernel does not give"
    if torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in (weight, bias)):
        return "the head is trained: TRL's fused head gives its gradient"
    if softcap is not None and (temperature != 1.0 or "mean_logits" in outputs):
        return "TRL's fused head divides capped logits by a temperature, or wants their mean"
    return None


@torch.no_grad()
def _mean_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, options: CrossEntropyOptions
) -> Tensor:
    """[N] fp32: the mean over the words is a product with the mean of the weight's rows."""
    mean = hidden.float() @ weight.mean(0, dtype=torch.float32)
    if bias is not None:
        mean = mean + bias.float().mean()
    return mean * options.logit_scale


def forward_with(forward: Callable[..., Any], falls_back: Callable[[str], None]) -> Any:
    """(TRL's forward, bound, with `LogProbs` in it, that `LogProbs`); None where it is another."""
    function = getattr(forward, "__func__", None)
    code = getattr(function, "__code__", None)
    trls = getattr(function, "__globals__", {}).get(_FUNCTION)
    if code is None or _FUNCTION not in code.co_names or not hasattr(trls, "apply"):
        return None
    own = LogProbs(trls, falls_back)
    known: Any = function
    changed = types.FunctionType(
        code, {**known.__globals__, _FUNCTION: own}, known.__name__, known.__defaults__,
        known.__closure__,
    )  # fmt: skip
    changed.__kwdefaults__ = known.__kwdefaults__
    return types.MethodType(changed, forward.__self__), own  # type: ignore[attr-defined]
