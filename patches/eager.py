"""What torch.compile leaves alone: our code runs under it as it runs without.

Fused forwards count their calls, plan memory, record CUDA graphs and launch kernels of their own.
None of that may happen while Dynamo traces: the graph breaks in front of them, and what they do,
backward included, is eager. What lies around them is compiled.

They are no custom operators, which `fullgraph=True` would need. An operator has to keep its inner
graph until backward, and with it what that graph has saved of the operator's inputs; a compiler
that knows nothing of that writes other tensors into the same memory, or computes an input a second
time for backward. Every input would have to be copied, masks in each layer.
"""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch

__all__ = ["never_traced", "not_traced_itself", "set_tracer", "tracing_again"]

_Function = TypeVar("_Function", bound=Callable[..., Any])
_REASON = "lorafuse launches kernels of its own here, and counts its calls"

# Sets what Dynamo traces frames with, and returns what it did until now; None: they run as they
# are.
set_tracer: Callable[[Any], Any] = torch._C._dynamo.eval_frame.set_eval_frame


def never_traced(function: _Function) -> _Function:
    """`function`, which Dynamo does not trace, nor what it calls: 0.8 us a call without compile."""
    known = inspect.signature(torch.compiler.disable).parameters
    why: dict[str, Any] = {"reason": _REASON} if "reason" in known else {}  # torch >= 2.8
    disabled: _Function = torch.compiler.disable(function, **why)  # type: ignore[no-untyped-call]
    return disabled


def not_traced_itself(function: _Function) -> _Function:
    """`function`, which Dynamo does not trace; it goes on with what it calls."""
    skipped: _Function = torch.compiler.disable(function, recursive=False)  # type: ignore[no-untyped-call]
    return skipped


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
