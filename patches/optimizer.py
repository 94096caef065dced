"""The 8-bit optimisers of bitsandbytes, without a wait for the GPU after each tensor.

bitsandbytes' `step` calls `torch.cuda.synchronize()` after the update of each parameter. An 8B
model with LoRA on all linears has 448 of them: the GPU idles for some 20 ms a step while the host
launches one small kernel after the other. `UnwaitingStep` updates all tensors with Adam's 8-bit
states in one launch (`kernels.adam_8bit`), on the optimiser's own states. What that kernel does not
serve is updated by the same methods of the same object, one behind the other on the current stream,
where order needs no wait.

It stands on the instance as a pair of torch's own optimiser hooks, so that schedulers, accelerate
and profilers, which wrap `step` themselves, meet the `step` that they know: before it runs, the
updates are made and the gradients set aside; it finds nothing to do; afterwards they are back.
"""

import inspect
import sys
from collections import Counter, defaultdict
from typing import Any

import torch
from torch import Tensor

from lorafuse.kernels.adam_8bit import AdamOptions, AdamTensor, adam_8bit_, serves

__all__ = ["UnwaitingStep", "fuse_optimizer"]

# What bitsandbytes' `step` is made of; another one is left alone.
_PARTS = {"check_overrides", "to_gpu", "init_state", "prefetch_state", "update_step", "sync_gpu"}


class UnwaitingStep:
    """The hooks on one optimiser, and its row in the report.

    Args:
        optimizer: a `bitsandbytes.optim.optimizer.Optimizer8bit`.
        reason: why it is left alone; "" binds the hooks.

    Attributes:
        calls: steps made without waits.
        stock_calls: reason -> steps that went the stock way.
    """

    operation = "optimizer"
    level = ""

    def __init__(self, optimizer: Any, reason: str = "") -> None:
        self.optimizer, self.reason = optimizer, reason
        self.module = type(optimizer).__name__
        self.fused = not reason
        self.calls = 0
        self.stock_calls: Counter[str] = Counter()
        self._aside: list[tuple[Tensor, Tensor]] = []
        self._handles = []
        if not reason:
            self._handles = [
                optimizer.register_step_pre_hook(self._before),
                optimizer.register_step_post_hook(self._after),
            ]

    def undo(self) -> None:
        """Takes the hooks off."""
        while self._handles:
            self._handles.pop().remove()

    @torch.no_grad()
    def _before(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(value is not None for value in (*args[1:], *kwargs.values())):
            self.stock_calls["a closure computes the loss within the step"] += 1
            return
        if not optimizer.initialized:  # as bitsandbytes' own step begins
            optimizer.check_overrides()
            optimizer.to_gpu()
            optimizer.initialized = True
        launches: defaultdict[Any, list[AdamTensor]] = defaultdict(list)
        for i, group in enumerate(optimizer.param_groups):
            for j, p in enumerate(group["params"]):
                if p.grad is None:
                    continue
                if not optimizer.state[p]:
                    optimizer.init_state(group, p, i, j)
                found = _adam_tensor(optimizer, group, p, i, j)
                if found is None:
                    optimizer.update_step(group, p, i, j)
                else:
                    launches[found[0]].append(found[1])
                self._aside.append((p, p.grad))
        for (_, _, q1, q2, options), tensors in launches.items():
            adam_8bit_(tensors, q1, q2, options)
        for p, _ in self._aside:
            p.grad = None
        self.calls += 1

    def _after(self, *_: Any) -> None:
        for p, gradient in self._aside:
            p.grad = gradient
        self._aside = []


def fuse_optimizer(optimizer: Any) -> UnwaitingStep | None:
    """Takes the waits out of `optimizer`'s step.

    Args:
        optimizer: any; accelerate's wrapper, with the real one in `.optimizer`, is looked through.

    Returns:
        The hooks, with the reason where a bitsandbytes optimiser is left as it is; None where the
        optimiser is another one or has the hooks already.
    """
    seen = set()
    while not isinstance(optimizer, torch.optim.Optimizer) or type(optimizer).__name__.startswith(
        "Accelerated"
    ):
        seen.add(id(optimizer))
        optimizer = getattr(optimizer, "optimizer", None)
        if optimizer is None or id(optimizer) in seen:
            return None
    module = sys.modules.get("bitsandbytes.optim.optimizer")
    base = getattr(module, "Optimizer8bit", None)
    if base is None or not isinstance(optimizer, base):
        return None
    hooks = getattr(optimizer, "_optimizer_step_pre_hooks", {}).values()
    if any(isinstance(getattr(hook, "__self__", None), UnwaitingStep) for hook in hooks):
        return None
    return UnwaitingStep(optimizer, _why_not(optimizer, base))


def _adam_tensor(
    optimizer: Any, group: Any, p: Tensor, i: int, j: int
) -> tuple[Any, AdamTensor] | None:
    """(what a launch's tensors have in common, the tensor), its step counted; None where the kernel
    does not serve."""
    state, config = optimizer.state[p], optimizer.get_config(i, j, group)
    plain = (
        optimizer.optimizer_name == "adam"
        and type(optimizer).update_step is _two_state_update()
        and len(config["betas"]) == 2
        and not config["max_unorm"]
        and not config["skip_zeros"]
        and config.get("percentile_clipping", 100) >= 100
        and config.get("block_wise", True)
    )
    if not plain or "absmax1" not in state or hasattr(p, "placements"):
        return None
    assert p.grad is not None
    tensor = AdamTensor(
        p.detach(), p.grad, state["state1"], state["state2"], state["absmax1"], state["absmax2"]
    )
    if not serves(tensor):
        return None
    state["step"] += 1
    beta1, beta2 = config["betas"]
    options = AdamOptions(
        config["lr"], beta1, beta2, config["eps"], config["weight_decay"], state["step"]
    )
    return (p.device, p.dtype, state["qmap1"], state["qmap2"], options), tensor


def _two_state_update() -> Any:
    module = sys.modules["bitsandbytes.optim.optimizer"]
    return getattr(getattr(module, "Optimizer2State", None), "update_step", None)


def _why_not(optimizer: Any, base: type) -> str:
    if getattr(optimizer, "is_paged", False):
        return "its paged state needs the waits"
    step = inspect.unwrap(type(optimizer).step)
    if step is not inspect.unwrap(base.step):  # type: ignore[attr-defined]
        return "it has a step of its own"
    code = getattr(step, "__code__", None)
    if code is None or not _PARTS.issubset(code.co_names):
        return "this version of bitsandbytes has a step that is not known"
    return ""
