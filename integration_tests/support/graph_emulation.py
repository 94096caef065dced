"""CUDA graphs on the CPU, for tests of what is recorded and replayed.

As a graph does, a replay runs the recorded operations again on the same addresses, and no Python.
As the graphs' memory pool does, memory that nobody held any more when a graph was recorded is that
graph's to overwrite: here it is filled with NaNs when that graph is replayed. So whoever reads it
too late reads NaNs. What a stream that is recorded may not do, is an error: to wait for the GPU, to
draw from the generator, to free what a replay writes to.
"""

import ctypes
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

Result = TypeVar("Result")

_FORBIDDEN = ("_local_scalar_dense", "nonzero", "dropout", "bernoulli", "uniform", "normal_")
_WRITES_NOTHING = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")


def _key(x: Tensor) -> int:
    return int(x.untyped_storage()._cdata)


def _borrowed(x: Tensor) -> Tensor:
    """The same memory, which it does not keep."""
    storage = x.untyped_storage()
    if not storage.nbytes():
        return torch.empty_like(x)
    raw = (ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr())
    flat = torch.frombuffer(raw, dtype=torch.uint8)
    return torch.empty(0, dtype=x.dtype).set_(
        flat.untyped_storage(), x.storage_offset(), x.shape, x.stride()
    )


class _Recording(TorchDispatchMode):
    def __init__(self, pool: dict[int, torch.UntypedStorage]) -> None:
        super().__init__()
        self.pool = pool
        self.operations: list[tuple[Any, Any, Any, list[tuple[Tensor, int]]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if name in _FORBIDDEN:
            raise RuntimeError(f"{name} cannot be recorded")
        read = {_key(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        outputs = func(*args, **kwargs)
        leaves = [x for x in tree_leaves(outputs) if isinstance(x, Tensor)]
        made = [(i, x) for i, x in enumerate(leaves) if _key(x) not in read]
        for _, x in made:
            self.pool.setdefault(_key(x), x.untyped_storage())
        if name not in _WRITES_NOTHING and (made or func._schema.is_mutable):
            given, named = tree_map(
                lambda x: _borrowed(x.detach()) if isinstance(x, Tensor) else x, (args, kwargs)
            )
            self.operations.append((func, given, named, [(_borrowed(x), i) for i, x in made]))
        return outputs


class EmulatedRecorder:
    """`layer_graphs.Recorder` on the CPU."""

    def __init__(self, device: torch.device) -> None:
        assert device.type == "cpu"
        self.pool: dict[int, torch.UntypedStorage] = {}
        self.dead: set[int] = set()
        self.replayed: list[int] = []
        self.graphs = 0

    def record(self, run: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
        died = [
            key
            for key, storage in self.pool.items()
            if key not in self.dead and torch._C._storage_Use_Count(storage._cdata) == 1
        ]
        self.dead |= set(died)
        with _Recording(self.pool) as recording:
            result = run()
        number = self.graphs
        self.graphs += 1

        @torch.no_grad()
        def replay() -> None:
            self.replayed.append(number)
            for key in died:
                storage = self.pool[key]
                torch.empty(0, dtype=torch.uint8).set_(storage).fill_(0xFF)
            for func, args, kwargs, made in recording.operations:
                results = tree_leaves(func(*args, **kwargs))
                for static, index in made:
                    static.copy_([x for x in results if isinstance(x, Tensor)][index])

        return replay, result

    def alias(self, tensor: Tensor) -> Tensor:
        return _borrowed(tensor)
