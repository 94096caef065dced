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
from torch import Tensor, nn

from lorafuse.kernels.adam_8bit import AdamOptions, AdamTensor, adam_8bit_triton_, serves
from lorafuse.kernels.eager import never_traced

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

    @never_traced
    @torch.no_grad()
    def _before(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(value is not None for value in (*args[1:], *kwargs.values())):
            self.stock_calls["a closure computes the loss within the step"] += 1
            return
        if not optimizer.initialized:  # as bitsandbytes' own step begins
            optimizer.check_overrides()
            optimizer.to_gpu()
            optimizer.initialized = True
        self._aside = []
        launches: defaultdict[_Common, list[AdamTensor]] = defaultdict(list)
        for i, group in enumerate(optimizer.param_groups):
            hyper = _Hyperparameters(optimizer, group, i)
            for j, p in enumerate(group["params"]):
                g = p.grad
                if g is None:
                    continue
                self._aside.append((p, g))
                state = optimizer.state[p]
                if not state:
                    optimizer.init_state(group, p, i, j)
                    state = optimizer.state[p]
                given = hyper.of(j)
                one = None if given is None else _adam_tensor(p, g, state)
                if given is None or one is None:
                    optimizer.update_step(group, p, i, j)
                    continue
                state["step"] += 1
                launches[p.get_device(), p.dtype, given, state["step"]].append(one)
        for (_, _, given, step), tensors in launches.items():
            adam_8bit_triton_(tensors, AdamOptions(*given, step))
        for p, _ in self._aside:
            p.grad = None
        self.calls += 1

    @never_traced
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


_Five = tuple[float, float, float, float, float]
_Common = tuple[int, torch.dtype, _Five, int]  # what the tensors of a launch have in common


class _Hyperparameters:
    """A group's (lr, beta1, beta2, eps, weight_decay) in this step; of each tensor where
    bitsandbytes' manager overrides something for it.

    Asked for each tensor, `get_config` takes longer than all else that the step does.
    """

    def __init__(self, optimizer: Any, group: Any, i: int) -> None:
        self.optimizer, self.group, self.i = optimizer, group, i
        self.adam = (
            optimizer.optimizer_name == "adam"
            and type(optimizer).update_step is _two_state_update()
        )
        own = type(optimizer).get_config is not _base("Optimizer8bit").get_config
        self.each = own or bool(optimizer.mng.index2config or optimizer.mng.pid2config)
        self.common = self._read(0) if group["params"] else None

    def of(self, j: int) -> _Five | None:
        """Those of the group's tensor `j`; None where the kernel does not serve them."""
        return self._read(j) if self.each else self.common

    def _read(self, j: int) -> _Five | None:
        if not self.adam:
            return None
        config = self.optimizer.get_config(self.i, j, self.group)
        if (
            len(config["betas"]) != 2
            or config["max_unorm"]
            or config["skip_zeros"]
            or config.get("percentile_clipping", 100) < 100
            or not config.get("block_wise", True)
        ):
            return None
        beta1, beta2 = map(float, config["betas"])
        return (
            float(config["lr"]),
            beta1,
            beta2,
            float(config["eps"]),
            float(config["weight_decay"]),
        )


def _adam_tensor(p: Tensor, g: Tensor, state: dict[str, Any]) -> AdamTensor | None:
    """The tensor with its states as they are now; None where the kernel does not serve."""
    if "absmax1" not in state or (type(p) is not nn.Parameter and hasattr(p, "placements")):
        return None
    one = AdamTensor(
        p, g,
        state["state1"], state["state2"], state["absmax1"], state["absmax2"],
        state["qmap1"], state["qmap2"],
    )  # fmt: skip
    return one if serves(one) else None


def _base(name: str) -> Any:
    return getattr(sys.modules["bitsandbytes.optim.optimizer"], name, None)


def _two_state_update() -> Any:
    return getattr(_base("Optimizer2State"), "update_step", None)


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
