"""Forward hooks on modules that a fused block would bypass.

A fused block computes several modules at once, so that the hooks of those modules would not run.
Hooks that matter send the call, or the block, to the stock path. transformers' own output-capturing
hooks stay on a model for good once installed, and do nothing unless a forward asks for what they
capture.
"""

from collections.abc import Collection
from typing import Any

from torch import nn

_CAPTURING = "transformers.utils.output_capturing"


def _collected() -> dict[str, Any] | None:
    """What transformers collects of the forward that is running; None where nobody can tell."""
    try:
        from transformers.utils.output_capturing import _active_collector
    except ImportError:
        return None
    collected: dict[str, Any] | None = _active_collector.get()  # type: ignore[no-untyped-call]
    return collected or {}


def _capture_is_active() -> bool:
    collected = _collected()
    # (Keys that begin with an underscore say what of it is wanted.)
    return collected is None or any(
        key != "hidden_states" and not key.startswith("_") for key in collected
    )


def collects_hidden_states() -> bool:
    """Whether the forward that is running hands out its layers' outputs."""
    return "hidden_states" in (_collected() or ())


def _name(hook: Any) -> str:
    return str(getattr(hook, "__name__", ""))


def has_live_hooks(module: nn.Module, harmless: Collection[str] = ()) -> bool:
    """Whether calling `module` would run a hook, now.

    Args:
        module: the module.
        harmless: names of hook functions that a fused form may leave out.
    """
    if not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        return False
    if module._backward_hooks or module._backward_pre_hooks:
        return True
    if any(_name(hook) not in harmless for hook in module._forward_pre_hooks.values()):
        return True
    for hook in module._forward_hooks.values():
        if _name(hook) in harmless:
            continue
        if getattr(hook, "__module__", "") != _CAPTURING or _capture_is_active():
            return True
    return False
