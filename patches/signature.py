"""Tells which blocks compute alike, so that one proof serves them all, and what a call changes.

Two blocks are alike where everything that their forwards can read is: classes, shapes, dtypes,
which tensors are shared, attributes (private ones, those in lists and dicts, and functions too),
small buffers by value. What is not looked into is an object of a class of its own; it counts by its
class. A block's place in the model (`INDEX_NAMES`) is left out: whether that changes what a block
computes, `verify.depends_on_index` finds out.
"""

import functools
import types
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

# Attributes that count the layers of a model.
INDEX_NAMES = frozenset(
    ("layer_idx", "layer_index", "layer_id", "layer_number", "layer_num", "block_idx")
)
# The trainer's, PEFT's and accelerate's: what they say is read in each call or changes no number.
_OTHERS = frozenset(
    ("training", "gradient_checkpointing", "forward", "_hf_hook", "_old_forward", "hook_handles")
)
_OF_EVERY_MODULE = frozenset(nn.Module().__dict__) | _OTHERS
# Elements of a buffer that are compared by value.
_SMALL = 4096
_DEPTH = 6


def signature(module: nn.Module) -> Hashable:
    """Equal for blocks that compute alike, wherever they stand in their model."""
    first: dict[int, int] = {}
    return tuple(_module(name, child, first) for name, child in module.named_modules())


def state(module: nn.Module) -> Hashable:
    """What a call of `module` may have changed: its signature, and each parameter's bits.

    (Versions would not do: PEFT takes the parameters of experts out and puts them back.)
    """
    return signature(module), tuple(_bits(parameter) for parameter in module.parameters())


def changed(before: Hashable, after: Hashable) -> str:
    """Names the first module in which two states of the same block differ."""
    modules: Any = (before[0], after[0])  # type: ignore[index]
    for one, other in zip(*modules, strict=False):
        if one != other:
            names = [
                key
                for (key, value), (_, later) in zip(one[2], other[2], strict=False)
                if value != later
            ]
            return f"{one[0] or 'the block'}{'.' + names[0] if names else ''}"
    return "a parameter"


def layer_indexes(module: nn.Module) -> tuple[int, ...]:
    """The place in the model that the block's modules say they have; () where they say nothing."""
    found = {
        value
        for child in module.modules()
        for name in INDEX_NAMES & set(child.__dict__)
        if isinstance(value := child.__dict__[name], int)
    }
    return tuple(sorted(found))


def set_layer_index(module: nn.Module, index: int) -> None:
    """Gives the modules of a copy another place in the model."""
    for child in module.modules():
        for name in INDEX_NAMES & set(child.__dict__):
            if isinstance(child.__dict__[name], int):
                child.__dict__[name] = index


_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(x: Tensor) -> int:
    """The sum of `x`'s words: another one, where a value is."""
    words = x.detach().contiguous().view(_WORDS[x.element_size()])
    return int(words.sum(dtype=torch.int64))


def _module(name: str, module: nn.Module, first: dict[int, int]) -> Hashable:
    attributes = tuple(
        (key, plain(value, _DEPTH))
        for key, value in sorted(module.__dict__.items())
        if key not in _OF_EVERY_MODULE
        and key not in INDEX_NAMES
        and not (key == "kwargs" and type(module).__module__.startswith("peft."))  # as it was made
    )
    buffers = tuple((key, plain(buffer, 1)) for key, buffer in module.named_buffers(recurse=False))
    return (name, type(module), attributes, buffers, tuple(_parameters(module, first)))


def _parameters(module: nn.Module, first: dict[int, int]) -> Iterator[Hashable]:
    """With the number of the tensor among all of the block, which tells what is shared."""
    for key, p in module._parameters.items():
        if p is not None:
            number = first.setdefault(id(p), len(first))
            yield key, tuple(p.shape), p.dtype, p.requires_grad, number


def plain(value: Any, depth: int = _DEPTH, small: int = _SMALL) -> Hashable:
    """`value` as something that compares by what it says.

    Args:
        value: of any type; an object of a class of its own counts by its class.
        depth: of containers within containers; what is deeper counts by its class.
        small: elements of a tensor up to which it is compared by value.
    """
    if value is None or isinstance(value, int | float | str | bool | bytes | torch.dtype | type):
        return type(value), value
    kind: Hashable = f"{type(value).__module__}.{type(value).__qualname__}"
    if depth == 0:
        return kind

    def inner(item: Any) -> Hashable:
        return plain(item, depth - 1, small)

    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, _content(value, small)
    if isinstance(value, nn.Module):  # held beside the children, as in a list
        return kind
    if isinstance(value, Mapping):
        items = ((k, v) for k, v in value.items() if k not in INDEX_NAMES)
        return tuple((inner(key), inner(item)) for key, item in items)
    if isinstance(value, list | tuple):
        return tuple(inner(item) for item in value)
    if isinstance(value, set | frozenset):
        return frozenset(inner(item) for item in value)
    if isinstance(value, functools.partial):
        return inner((value.func, value.args, value.keywords))
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if _full(cell)]
        return value.__code__, inner(value.__defaults__), inner(cells)
    if isinstance(value, types.MethodType):
        return value.__func__
    if isinstance(value, types.BuiltinFunctionType):
        return value.__name__
    if hasattr(value, "to_dict") and hasattr(value, "__dict__"):  # a config
        return inner(vars(value))
    return kind


def _content(tensor: Tensor, small: int) -> bytes:
    if tensor.is_meta or hasattr(tensor, "placements") or not 0 < tensor.numel() <= small:
        return b""
    return bytes(tensor.detach().reshape(-1).cpu().contiguous().view(torch.uint8).tolist())


def _full(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False
