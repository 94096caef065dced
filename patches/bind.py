"""Fused forwards on module instances, and the way back.

A fused forward stands in its module's `__dict__` as `forward`; the class keeps its own. It is an
object with attributes, not a closure, so that deepcopy and pickle of the model carry a fused
forward that belongs to the copy. `Binding.undo` puts back exactly what was there.
"""

import inspect
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from lorafuse.kernels.eager import never_traced, not_traced_itself
from lorafuse.patches.signature import plain

# Where transformers passes a KV cache: from 5.24 on by the first name, before by the others.
KV_CACHES = ("cache", "past_key_values", "past_key_value")
# What transformers passes to decoder layers and attention, and the fused forwards know.
KNOWN_ARGUMENTS = frozenset(
    (
        "hidden_states",
        "attention_mask",
        "position_ids",
        "position_embeddings",
        *KV_CACHES,
        "use_cache",
        "cache_position",
        "output_attentions",
        "kwargs",
    )
)


class Unsupported(Exception):
    """A module, or one call of it, that lorafuse leaves to the stock path, with the reason why."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def check_own_forwards(module: nn.Module) -> None:
    """Raises Unsupported where an instance in `module` has a forward that is not its class's.

    A fused block would compute what the class says, and so would the proof's copy.
    """
    for part in module.modules():
        if "forward" in part.__dict__:
            raise Unsupported(f"the forward of its {type(part).__name__} was replaced already")


class FusedForward:
    """A callable that replaces one module's forward.

    Attributes:
        module: the module it stands on.
        stock: the forward that it replaced, bound; every case that is not fused goes there.
        operations: names of the operations that one call performs.
        calls: how often the fused path ran.
        stock_calls: reason -> how often a call went the stock way.
    """

    operations: ClassVar[tuple[str, ...]] = ()

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.stock: Callable[..., Any] = module.forward
        self.calls = 0
        self.stock_calls: Counter[str] = Counter()
        # The trainers read the forward's parameters to decide which columns and loss arguments to
        # pass.
        self.__signature__ = inspect.signature(self.stock)
        first = next(iter(self.__signature__.parameters.values()), None)
        plain = first is not None and first.kind is first.POSITIONAL_OR_KEYWORD
        self._proven: dict[str, Hashable] = {}
        self._positions: Any = None
        self._first = first.name if first is not None and plain else None

    @never_traced
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """One call of the module, by the fused path or the stock one."""
        raise NotImplementedError

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The call's arguments by name, as the stock forward would get them.

        Raises:
            TypeError: they do not fit its signature.
        """
        # Models pass the hidden states by position and the rest by name; `bind` is slow.
        if not args:
            return dict(kwargs)
        if len(args) == 1 and self._first is not None and self._first not in kwargs:
            return {self._first: args[0], **kwargs}
        named = dict(self.__signature__.bind(*args, **kwargs).arguments)
        named.update(named.pop("kwargs", {}))
        return named

    def prove_for(self, arguments: Mapping[str, Any], positions: Any = None) -> None:
        """Holds the arguments that only this forward's class knows to the values it is proven for.

        Args:
            arguments: by name, as the stock forward got them in the proof.
            positions: the `PositionLimit` of the proof, or None.
        """
        self._positions = positions
        own = set(self.__signature__.parameters) - KNOWN_ARGUMENTS
        self._proven = {name: self._value(name, arguments) for name in own}

    def check_proven(self, arguments: Mapping[str, Any]) -> None:
        """Raises Unsupported where a call brings another value than the proof's."""
        if self._positions is not None:
            self._positions.check(arguments.get("position_ids"))
        for name, proven in self._proven.items():
            if self._value(name, arguments) != proven and not self.ignores(name):
                raise Unsupported(f"it was called with another {name} than it is proven for")

    def ignores(self, name: str) -> bool:
        """Whether the stock forward has been seen to ignore what a call brings as `name`."""
        return False

    def _value(self, name: str, arguments: Mapping[str, Any]) -> Hashable:
        value = arguments.get(name, self.__signature__.parameters[name].default)
        if isinstance(value, Tensor):
            return Tensor  # its content is data
        return None if value is False or value is inspect.Parameter.empty else plain(value)

    def linear_groups(self) -> list[Sequence[Any]]:
        """The `LinearReader`s of its linear layers, those of one input together."""
        return []

    def fall_back(self, reason: str, *args: Any, **kwargs: Any) -> Any:
        """Runs the stock forward for this call and counts why."""
        self.stock_calls[reason] += 1
        return self.stock(*args, **kwargs)


class TracedForward(FusedForward):
    """One around modules that are not fused: torch.compile stops at it, and goes on within."""

    @not_traced_itself
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)


class Binding:
    """The fused forwards put on a model's modules, in order."""

    def __init__(self) -> None:
        self._bound: list[tuple[nn.Module, FusedForward, bool, Any]] = []

    def bind(self, module: nn.Module, forward: FusedForward) -> None:
        """Puts `forward` on the instance."""
        had = "forward" in module.__dict__
        self._bound.append((module, forward, had, module.__dict__.get("forward")))
        module.__dict__["forward"] = forward

    def check_called(self) -> None:
        """Raises Unsupported where a fused forward has sent its only call the stock way."""
        for _, forward, _, _ in self._bound:
            if not forward.calls:
                raise Unsupported(next(iter(forward.stock_calls), "its fused form is never called"))

    def forwards(self) -> list[FusedForward]:
        """The fused forwards that are bound."""
        return [forward for _, forward, _, _ in self._bound]

    def undo(self) -> None:
        """Takes every fused forward off again, newest first.

        Raises:
            RuntimeError: somebody replaced a forward on top of ours; nothing is taken off then.
        """
        foreign = [
            type(module).__name__
            for module, forward, _, _ in self._bound
            if module.__dict__.get("forward") is not forward
        ]
        if foreign:
            raise RuntimeError(
                f"the forward of {len(foreign)} module(s) ({foreign[0]}, ...) was replaced again "
                "after lorafuse had fused it; undo that replacement first, then call unfuse() again"
            )
        while self._bound:
            module, _, had, previous = self._bound.pop()
            if had:
                module.__dict__["forward"] = previous
            else:
                del module.__dict__["forward"]
