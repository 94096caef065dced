"""What torch.compile leaves alone: our code runs under it as it runs without.

Fused forwards count their calls, plan memory, record CUDA graphs and launch kernels of their own.
None of that may happen while Dynamo traces: the graph breaks in front of them, and what they do,
backward included, is eager. What lies around them is compiled.

They are no custom operators with fake implementations, which `fullgraph=True` would need. Such an
operator keeps an autograd graph of its own until backward, with what that has saved, and a compiler
that cannot see it owns the memory: Inductor writes the next result over an operator's output. AOT
autograd runs it with autocast off, and a KV cache or logits that are put off are no arguments of
operators. And a layer that is fused whole leaves nothing to a compiler but what is in front of the
layers and behind them.
"""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch

__all__ = ["EagerFunction", "never_traced", "not_traced_itself", "set_tracer", "tracing_again"]

_Function = TypeVar("_Function", bound=Callable[..., Any])
_REASON = "lorafuse launches kernels of its own here, and counts its calls"


def _sets_nothing(tracer: Any) -> None:
    """For a torch without it: what is not to be traced by itself is not traced at all."""


# Sets what Dynamo traces frames with, and returns what it did until now; None: they run as they
# are.
set_tracer: Callable[[Any], Any] = getattr(
    torch._C._dynamo.eval_frame, "set_eval_frame", _sets_nothing
)


def never_traced(function: _Function) -> _Function:
    """`function`, which Dynamo does not trace, nor what it calls; a call takes 1 us longer."""
    known = inspect.signature(torch.compiler.disable).parameters
    why: dict[str, Any] = {"reason": _REASON} if "reason" in known else {}  # newer torch
    disabled: _Function = torch.compiler.disable(function, **why)
    return disabled


def not_traced_itself(function: _Function) -> _Function:
    """`function`, which Dynamo does not trace; it goes on with what it calls."""
    skipped: _Function = torch.compiler.disable(function, recursive=False)
    return skipped


class EagerFunction(torch.autograd.Function):
    """A Function whose backward is not traced either, where a compiled step calls `backward()`.

    (Its forward is called by what is never traced.)
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.backward = staticmethod(never_traced(cls.backward))  # type: ignore[method-assign]


def tracing_again(tracer: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, with Dynamo at work in it that has been stopped.

    Args:
        tracer: what `set_tracer` has returned.
        function: what is called where nothing is traced.
    """

    def traced(*args: Any, **kwargs: Any) -> Any:
        before = set_tracer(tracer)
        try:
            return function(*args, **kwargs)
        finally:
            set_tracer(before)

    return traced
