"""Frozen weights that lie in a buffer with room for LoRA.

    [[W_1, B_1, b_1], [W_2, B_2, b_2], ..., [A, -]]        [N + F, K + F]

The fused GEMMs multiply with [W, B, b] and with [W; A] (`kernels.lora_linear`). A 4-bit weight is
written into such a buffer anyway. One that has the compute dtype is copied in each pass, or its
LoRA added to the output in a pass of its own. Here the weights of one group move into such a buffer
once, in the first training step, and only B and A are written from then on. Their parameters become
views of it: of the same values, with rows further apart, each with a storage of its own, for what
saves a model takes tensors of one storage for one tensor. `undo` gives each its own memory again.

It is asked for by name, for who reads a weight by its address alone would read LoRA between the
rows. Weights that somebody else manages stay where they are: shared ones, FSDP's, ZeRO-3's, views.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack

from lorafuse.kernels.lora_linear import compute_dtype, fold_alignment, fold_columns
from lorafuse.patches.adapters import LinearReader
from lorafuse.patches.weights import FloatWeight, is_sharded

__all__ = ["OPERATION", "WeightRoom", "WeightRoomRecord", "fold", "make_rooms"]

OPERATION = "folded_weights"
_NO_GROUP = (
    "no module of lora_mlp, lora_qkv or lora_o is fused, and this is for their base weights only"
)
_EVALUATES = "it evaluates, and weights move in training"


class WeightRoom:
    """The buffer of one group of linear layers that read one input.

    Args:
        readers: the group's, with `FloatWeight`s that are their own.

    Attributes:
        calls: of each layer, how often its weight lay in the buffer.
        reasons: of each layer, why it did not -> how often.
    """

    def __init__(self, readers: Sequence[LinearReader]) -> None:
        self.readers = tuple(readers)
        self.calls = [0 for _ in readers]
        self.reasons: list[Counter[str]] = [Counter() for _ in readers]
        self._buffer: Tensor | None = None
        self._addresses: list[int] = []  # of the weights in it
        # The parameters as they were first seen: FSDP puts others in their place.
        self._parameters = [own_weight(reader) for reader in readers]
        self._reason: str | None = None  # why they do not move

    def __getstate__(self) -> dict[str, Any]:
        # A copy's weights lie in no room, and move when the copy is trained.
        return self.__dict__ | {"_buffer": None, "_reason": None}

    def of(self, index: int, x: Tensor) -> Tensor | None:
        """The buffer, where the weight of reader `index` lies in it; a call on `x` may move it."""
        reason = self._why_not(index, x)
        if reason is not None:
            self.reasons[index][reason] += 1
            return None
        self.calls[index] += 1
        return self._buffer

    def undo(self) -> None:
        """Takes the weights out again, those that still lie there."""
        for i, weight in enumerate(self._parameters):
            if self._lies_here(i):
                weight.data = weight.data.clone(memory_format=torch.contiguous_format)
        self._buffer, self._reason = None, None

    def _why_not(self, index: int, x: Tensor) -> str | None:
        if self._buffer is None and self._reason is None:
            if not self.readers[index].module.training or torch.is_inference_mode_enabled():
                return _EVALUATES
            self._reason = self._why_not_move(compute_dtype(x)) or self._move()
        own = self._parameters[index]
        if self._reason is None and not (
            own_weight(self.readers[index]) is own and self._lies_here(index)
        ):
            self._reason = "a weight of its group was replaced (merged, or moved)"
            if not any(map(self._lies_here, range(len(self.readers)))):
                self._buffer = None
        return self._reason

    def _lies_here(self, index: int) -> bool:
        if self._buffer is None:
            return False
        return self._parameters[index].data_ptr() == self._addresses[index]

    def _why_not_move(self, dtype: torch.dtype) -> str | None:
        device = self._parameters[0].device
        for reader, own in zip(self.readers, self._parameters, strict=True):
            if own.dtype != dtype:
                return f"its weight is {own.dtype}, and {dtype} is computed in"
            if own_weight(reader) is not own or is_sharded(own) or hasattr(own, "ds_id"):
                return "FSDP or ZeRO manages its weight"
            if own.requires_grad or own.device != device:
                return "its group's weights are trained, or on several devices"
            if own.untyped_storage().nbytes() != own.nbytes:
                return "its weight is a view of other memory"
        return None

    def _move(self) -> str | None:
        heights = [weight.shape[0] for weight in self._parameters]
        K, columns = self._parameters[0].shape[1], fold(self.readers)
        shape = sum(heights) + columns, K + columns
        try:
            self._buffer = self._parameters[0].new_empty(shape, requires_grad=False)
        except torch.OutOfMemoryError:
            return "there was no memory for a buffer to move it into"
        parts = [rows[:, :K] for rows in torch.split(self._buffer[: sum(heights)], heights)]
        self._addresses = [part.data_ptr() for part in parts]
        for weight, part in zip(self._parameters, parts, strict=True):
            part.copy_(weight.detach())
            weight.data = from_dlpack(part)
        return None


@dataclass(frozen=True, eq=False)
class WeightRoomRecord:
    """What became of it in one linear layer; the fields are those of `apply.OperationRecord`."""

    module: str
    reason: str = ""
    room: WeightRoom | None = None
    index: int = 0
    operation: str = OPERATION
    level: str = ""

    @property
    def fused(self) -> bool:
        return self.room is not None

    @property
    def calls(self) -> int:
        return 0 if self.room is None else self.room.calls[self.index]

    @property
    def stock_calls(self) -> dict[str, int]:
        return {} if self.room is None else dict(self.room.reasons[self.index])


def own_weight(reader: LinearReader) -> nn.Parameter:
    """The base layer's parameter as it is now."""
    weight = reader.base._parameters["weight"]
    assert weight is not None
    return weight


def fold(readers: Sequence[LinearReader]) -> int:
    """Columns that LoRA and bias take beside a group's input, as `Group.fold_forward`."""
    columns = sum(A.shape[0] for reader in readers for A, _ in reader.pairs)
    columns += any(getattr(reader.base, "bias", None) is not None for reader in readers)
    align = fold_alignment(next(readers[0].base.parameters()).device)
    return fold_columns(columns, align)


def make_rooms(
    model: nn.Module, groups: Iterable[Sequence[LinearReader]], names: Mapping[int, str]
) -> list[WeightRoomRecord]:
    """Gives each group whose weights may move a room; they move in their first training step.

    Args:
        model: in which a weight may be used twice.
        groups: the readers of each group.
        names: id of a module -> its qualified name.

    Returns:
        One record a layer; one without a module where there is none.
    """
    uses = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    records = []
    for readers in groups:
        reason = next((r for r in (_why_no_room(one, uses) for one in readers) if r), "")
        if not reason and not any(reader.pairs for reader in readers):
            reason = "no layer of its group has an adapter"
        room = None if reason else WeightRoom(readers)
        for i, reader in enumerate(readers):
            reader.room = None if room is None else partial(room.of, i)
            name = names.get(id(reader.module), "")
            records.append(WeightRoomRecord(name, reason, room, i))
    return records or [WeightRoomRecord("", _NO_GROUP)]


def _why_no_room(reader: LinearReader, uses: Mapping[int, int]) -> str | None:
    if type(reader.weight) is not FloatWeight:
        return "its weight is quantised, and written into such a buffer in each pass anyway"
    if reader.fp8:
        return "it computes in FP8, for which the weight is written anew in each pass"
    if uses[id(own_weight(reader))] != 1:
        return "its weight is used by another module as well"
    return None
