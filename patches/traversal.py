"""Walks over a model's modules that do not go up and down through a generator for each level.

A trainer walks over all modules several times a step: to switch them to training, to count their
parameters, to clip gradients and to drop them. It does so between its wait for the loss and the
next step's first kernel, when the GPU has nothing else to do. An 8B model under PEFT has 2,665
modules; torch's `named_modules` hands each of them up through a generator a level and makes it a
name, and its `train` sets what is set already.

Here these methods are replaced on instances: the walks on the model and on the one under PEFT,
whose methods trainers call, and `train` on the decoder layers, under which nearly all modules are.
The same modules and parameters come under the same names, in the same order and as lazily. No walk
remembers the last one, as modules may come and go; but transformers' `num_parameters`, for which
trainers count the same parameters in every step, counts again only what is not the same.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

__all__ = ["OPERATION", "FlatTraversal", "flatten_traversal"]

OPERATION = "traversal"
_WORTH = 16  # modules of a layer


@dataclass
class Tally:
    """Calls of a model's methods; the report holds it, and not the model.

    Attributes:
        calls: those that went this way.
        stock_calls: reason -> those that went torch's way.
    """

    calls: int = 0
    stock_calls: Counter[str] = field(default_factory=Counter)


class _Method:
    """What stands in for one method in a module's `__dict__`; deepcopy and pickle take it along.

    Attributes:
        __self__: the module.
        __func__: torch's, as of a bound method: Dynamo traces that one.
    """

    __func__: Callable[..., Any]

    def __init__(self, module: nn.Module, tally: Tally) -> None:
        self.__self__ = module
        self.tally = tally


class _NamedModules(_Method):
    """`nn.Module.named_modules`."""

    __func__ = staticmethod(nn.Module.named_modules)

    def __call__(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        self.tally.calls += 1
        return _walk(self.__self__, set() if memo is None else memo, prefix, remove_duplicate)


class _NamedParameters(_Method):
    """`nn.Module.named_parameters`."""

    __func__ = staticmethod(nn.Module.named_parameters)

    def __call__(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        self.tally.calls += 1
        return _parameters(self.__self__, prefix, recurse, remove_duplicate)


class _Parameters(_Method):
    """`nn.Module.parameters`."""

    __func__ = staticmethod(nn.Module.parameters)

    def __call__(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        self.tally.calls += 1
        return (p for _, p in _parameters(self.__self__, None, recurse, True))


class _Train(_Method):
    """`nn.Module.train`, which sets only what is not set; torch's, where a part has its own."""

    __func__ = staticmethod(nn.Module.train)

    def __call__(self, mode: bool = True) -> nn.Module:
        torchs = nn.Module.train
        parts = [part for _, part in _walk(self.__self__, set(), None, True)]
        for part in parts[1:]:
            if type(part).train is not torchs or "train" in part.__dict__:
                self.tally.stock_calls[f"{type(part).__name__} has a train of its own"] += 1
                return torchs(self.__self__, mode)
        if not isinstance(mode, bool):
            return torchs(self.__self__, mode)  # which raises
        for part in parts:
            if part.training is not mode:
                part.training = mode
        self.tally.calls += 1
        return self.__self__


class _NumParameters(_Method):
    """transformers' `num_parameters`, which depends on what `_counted` returns alone."""

    __func__ = staticmethod(PreTrainedModel.num_parameters)

    def __init__(self, module: nn.Module, tally: Tally) -> None:
        super().__init__(module, tally)
        self._known: dict[bool, tuple[Any, int]] = {}

    def __call__(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        stock: Any = self.__func__
        if only_trainable:
            return int(stock(self.__self__, only_trainable, exclude_embeddings))
        self.tally.calls += 1
        counted = _counted(self.__self__)
        key, number = self._known.get(exclude_embeddings, (None, 0))
        if key != counted:
            number = stock(self.__self__, only_trainable, exclude_embeddings)
            self._known[exclude_embeddings] = counted, number
        return number


def _counted(root: nn.Module) -> list[Any]:
    """Everything that the number of all parameters follows from: who they are, their classes and
    sizes, and which are embeddings'."""
    found: list[Any] = []
    # Or each question to a 4-bit weight would go through its class's `__torch_function__`.
    with torch._C.DisableTorchFunctionSubclass():
        for _, module in _walk(root, set(), None, True):
            if isinstance(module, nn.Embedding):
                found.append((id(module), id(module._parameters.get("weight"))))
            for p in module._parameters.values():
                if p is not None:
                    found += (id(p), type(p), p.numel())
    return found


# What is replaced together or, where one of them is not torch's (of `COUNT`: transformers'), not at
# all: these methods call each other.
WALKS = (_NamedModules, _NamedParameters, _Parameters)
TRAIN = (_Train,)
COUNT = (_NumParameters,)
_WHAT_THEY_CALL = {"_named_members": nn.Module._named_members, "children": nn.Module.children}


def _walk(
    root: nn.Module, memo: set[nn.Module], prefix: str | None, remove_duplicate: bool
) -> Iterator[tuple[Any, nn.Module]]:
    """`root` and all below it, as torch's `named_modules`; without names where `prefix` is None."""
    if root in memo:
        return
    if remove_duplicate:
        memo.add(root)
    yield prefix, root
    # Of each module on the way down: its name, and its children that are still to come.
    stack = [(prefix, iter(root._modules.items()))]
    named, torchs = prefix is not None, nn.Module.named_modules
    while stack:
        above, children = stack[-1]
        for name, child in children:
            if child is None or child in memo:
                continue
            if named:
                name = f"{above}.{name}" if above else name
            own: Any = child.__dict__.get("named_modules", torchs)
            if type(child).named_modules is not torchs or (
                own is not torchs and not isinstance(own, _NamedModules)
            ):
                yield from child.named_modules(memo, name, remove_duplicate)
                continue
            if remove_duplicate:
                memo.add(child)
            yield name, child
            if child._modules:
                stack.append((name, iter(child._modules.items())))
                break
        else:
            stack.pop()


def _parameters(
    root: nn.Module, prefix: str | None, recurse: bool, remove_duplicate: bool
) -> Iterator[tuple[Any, nn.Parameter]]:
    """The parameters, as torch's `named_parameters`; without names where `prefix` is None."""
    modules: Any = [(prefix, root)]
    if recurse:
        modules = _walk(root, set(), prefix, remove_duplicate)
    seen: set[int] = set()
    for above, module in modules:
        for name, p in module._parameters.items():
            if p is None or id(p) in seen:
                continue
            if remove_duplicate:
                seen.add(id(p))
            yield f"{above}.{name}" if above else name, p


class FlatTraversal:
    """The methods that are replaced in one model, and their row in the report.

    Attributes:
        module: the model's class.
        tally: counts their calls.
    """

    operation, level, fused, reason = OPERATION, "", True, ""

    def __init__(self, model: nn.Module) -> None:
        self.module = type(model).__name__
        self.tally = Tally()
        self._methods: list[weakref.ref[_Method]] = []

    def __bool__(self) -> bool:
        return bool(self._methods)

    @property
    def calls(self) -> int:
        return self.tally.calls

    @property
    def stock_calls(self) -> dict[str, int]:
        return dict(self.tally.stock_calls)

    def replace(self, module: nn.Module, methods: Sequence[type[_Method]]) -> None:
        """Puts `methods` on the instance, all of them, if what they stand for are its methods."""
        stock = {one.__func__.__name__: one.__func__ for one in methods} | _WHAT_THEY_CALL
        for name, method in stock.items():
            if getattr(type(module), name, None) is not method or name in module.__dict__:
                return
        for one in methods:
            ours = one(module, self.tally)
            module.__dict__[one.__func__.__name__] = ours
            self._methods.append(weakref.ref(ours))

    def undo(self) -> None:
        """Gives the methods back; what somebody has put in their place since then stays."""
        for known in self._methods:
            method = known()
            if method is not None:
                own, name = method.__self__.__dict__, method.__func__.__name__
                if own.get(name) is method:
                    del own[name]


def flatten_traversal(model: nn.Module) -> FlatTraversal:
    """Flattens the walks over `model` and over the one under PEFT, and `train` of their layers:
    whatever lies in a list and holds many modules.

    Returns:
        The record; false where none of the methods is torch's.
    """
    peft: Any = model
    core = peft.get_base_model() if hasattr(peft, "get_base_model") else model
    layers: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and module not in inside:
            for layer in module._modules.values():
                below = set() if layer is None else set(layer.modules())
                if layer is not None and layer not in inside and len(below) >= _WORTH:
                    layers.append(layer)
                inside |= below
    traversal = FlatTraversal(model)
    for one in dict.fromkeys([model, core]):
        traversal.replace(one, WALKS)
    traversal.replace(core, COUNT)
    for layer in layers:
        traversal.replace(layer, TRAIN)
    return traversal
