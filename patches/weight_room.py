"""Frozen weights that lie in a buffer with room for LoRA.

    [[W_1, B_1, b_1], [W_2, B_2, b_2], ..., [A, -]]        [N + F, K + F']

The fused GEMMs multiply with [W, B, b] and with [W; A] (`kernels.lora_linear`). A 4-bit weight is
written into such a buffer anyway. One that has the compute dtype would have to be copied in each
pass, or its LoRA be added to the output in a pass of its own. So the weights of one group move into
such a buffer once, in the first training step: their parameters become views of it, of the same
values, and only B and A are written from then on. `undo` gives each a contiguous tensor again.

Weights that somebody else manages stay where they are: shared ones, FSDP's, ZeRO-3's, views.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lorafuse.kernels.lora_linear import compute_dtype, fold_alignment, fold_columns
from lorafuse.patches.adapters import LinearReader
from lorafuse.patches.weights import FloatWeight, is_sharded

__all__ = ["WeightRoom", "fold", "make_rooms"]


class WeightRoom:
    """The buffer of one group of linear layers that read one input.

    Args:
        readers: the group's, with `FloatWeight`s that are their own.
    """

    def __init__(self, readers: Sequence[LinearReader]) -> None:
        self.readers = tuple(readers)
        self._buffer: Tensor | None = None
        # The parameters as they were first seen: FSDP puts others in their place.
        self._parameters = [self._weight(reader) for reader in readers]
        self._given_up = False

    def __getstate__(self) -> dict[str, Any]:
        # A copy's weights lie in no room, and move when the copy is trained.
        return self.__dict__ | {"_buffer": None, "_given_up": False}

    def of(self, reader: LinearReader, x: Tensor) -> Tensor | None:
        """The buffer, where `reader`'s weight lies in it; a call on `x` may be what moves it."""
        if self._buffer is None:
            if self._given_up or not reader.module.training or torch.is_inference_mode_enabled():
                return None
            self._given_up = True
            if self._may_move(compute_dtype(x)):
                self._move()
        if self._buffer is None:
            return None
        i = self.readers.index(reader)
        weight, own = self._weight(reader), self._parameters[i]
        if weight is own and own.data_ptr() == self._part(i).data_ptr():
            return self._buffer
        self._buffer = None  # merged or moved elsewhere: what is still a view keeps the memory
        return None

    def undo(self) -> None:
        """Takes the weights out again, those that still lie there."""
        if self._buffer is not None:
            for i, weight in enumerate(self._parameters):
                if weight.data_ptr() == self._part(i).data_ptr():
                    weight.data = weight.data.clone(memory_format=torch.contiguous_format)
        self._buffer, self._given_up = None, False

    @staticmethod
    def _weight(reader: LinearReader) -> nn.Parameter:
        weight: nn.Parameter = reader.base._parameters["weight"]  # type: ignore[assignment]
        return weight

    def _part(self, index: int) -> Tensor:
        """Where the weight of reader `index` lies."""
        assert self._buffer is not None
        start = sum(reader.out_features for reader in self.readers[:index])
        N, K = self._parameters[index].shape
        return self._buffer[start : start + N, :K]

    def _may_move(self, dtype: torch.dtype) -> bool:
        device = self._parameters[0].device
        return all(
            self._weight(reader) is own
            and own.dtype == dtype
            and own.device == device
            and not own.requires_grad
            and not is_sharded(own)
            and not hasattr(own, "ds_id")  # ZeRO-3's, gathered for this call
            and own.untyped_storage().nbytes() == own.nbytes
            for reader, own in zip(self.readers, self._parameters, strict=True)
        )

    def _move(self) -> None:
        like = self._parameters[0]
        heights = [weight.shape[0] for weight in self._parameters]
        columns = fold(self.readers)
        try:
            self._buffer = like.new_empty(
                (sum(heights) + columns, like.shape[1] + columns), requires_grad=False
            )
        except torch.OutOfMemoryError:
            return
        for i, weight in enumerate(self._parameters):
            part = self._part(i)
            part.copy_(weight.detach())
            weight.data = part


def fold(readers: Sequence[LinearReader]) -> int:
    """Columns that LoRA and bias take beside a group's input, as `Group.fold_forward`."""
    columns = sum(A.shape[0] for reader in readers for A, _ in reader.pairs)
    columns += any(getattr(reader.base, "bias", None) is not None for reader in readers)
    align = fold_alignment(next(readers[0].base.parameters()).device)
    return fold_columns(columns, align)


def make_rooms(model: nn.Module, groups: Iterable[Sequence[LinearReader]]) -> list[WeightRoom]:
    """Gives the groups whose weights may move a room; they move in their first training step.

    Args:
        model: in which a weight may be used twice.
        groups: the readers of each group.
    """
    uses = Counter(
        id(p) for m in model.modules() for p in m._parameters.values() if p is not None
    )
    rooms = []
    for readers in groups:
        own = all(
            type(reader.weight) is FloatWeight
            and not reader.fp8
            and uses[id(reader.base._parameters["weight"])] == 1
            for reader in readers
        )
        if own and any(reader.pairs for reader in readers):
            rooms.append(room := WeightRoom(readers))
            for reader in readers:
                reader.room = partial(room.of, reader)
    return rooms
