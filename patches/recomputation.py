"""What a fused decoder layer keeps for its backward pass, and what it computes again.

Everything that autograd saves while a layer runs goes through the layer's `Tape`:

    tensors of a stage      are dropped; the stage runs again when the first of them is asked for
    parameters              stay where they are
    the rest                is kept: on the GPU, or what is large on the host (`patches.offload`)
    gate/up                 are not saved, or go to the host where the rest may stay (`spilling`)

A stage is a piece of the layer's forward that is run again as it ran, without autograd, on the same
inputs: the same kernels on the same numbers give the same bits. Its tensors are told by the memory
that they lie in, so that views of them (heads turned for attention) are found too. What a stage
computed is freed when all that was saved of it has been handed out.

This works under any attention function, and inside torch's own checkpointing: it is plain
`saved_tensors_hooks`.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lorafuse.kernels.eager import never_traced
from lorafuse.kernels.lora_linear import LoraProjection, RngState, forked_rng
from lorafuse.patches.offload import HostCopy, Offloader

__all__ = ["Note", "Stage", "Tape", "ignore", "run_stage"]

# Below, a tensor is not worth a copy to the host: rstd, log-sum-exp, the r-wide XA.
SMALL_BYTES = 2**23
# Told each tensor that a stage makes and autograd may save, in the same order each time.
Note = Callable[[Tensor], None]


class _Place:
    """A layout within a storage: how a saved tensor lies in the one that it is a view of."""

    def __init__(self, tensor: Tensor) -> None:
        self.dtype = tensor.dtype
        self.size, self.stride = tensor.shape, tensor.stride()
        self.offset = tensor.storage_offset()

    def within(self, storage: torch.UntypedStorage, device: torch.device) -> Tensor:
        return torch.empty(0, dtype=self.dtype, device=device).set_(
            storage, self.offset, self.size, self.stride
        )


class Stage:
    """A piece of a layer's forward that can run again.

    Args:
        run: computes it, and notes its tensors.
        projections: whose adapters it reads; they may not change before backward.
        like: a tensor of the device that it runs on.
    """

    def __init__(
        self, run: Callable[[Note], Any], projections: Sequence[LoraProjection], like: Tensor
    ) -> None:
        self.run = run
        self.device = like.device
        kind = like.device.type
        self.autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        drops = any(p.dropout > 0 and p.A is not None for p in projections)
        self.rng = RngState.capture(like.device) if drops else None
        self.read = [t for p in projections for t in (p.A, p.B, p.bias) if t is not None]
        self.versions = [t._version for t in self.read]
        self.saved = self.handed_out = 0
        self.tensors: list[Tensor] = []

    def again(self) -> list[Tensor]:
        """Its tensors, in the order in which they were noted."""
        if self.tensors:
            return self.tensors
        if [t._version for t in self.read] != self.versions:
            raise RuntimeError(
                "an adapter was changed between forward and backward, which "
                "fused_checkpointing recomputes from; step the optimiser after backward, or set "
                "fused_checkpointing: off"
            )
        enabled, dtype = self.autocast
        fork: AbstractContextManager[Any] = nullcontext()
        if self.rng is not None:
            fork = forked_rng(self.device)
        with fork, torch.no_grad(), torch.autocast(self.device.type, dtype, enabled):
            if self.rng is not None:
                self.rng.restore(self.device)
            self.run(self.tensors.append)
        return self.tensors

    def tensor(self, index: int, place: _Place) -> Tensor:
        """A saved one."""
        found = place.within(self.again()[index].untyped_storage(), self.device)
        self.handed_out += 1
        if self.handed_out % self.saved == 0:  # a second backward begins anew
            self.tensors = []
        return found


class _Again:
    """In a graph, in place of a tensor of a stage."""

    def __init__(self, tape: "Tape", stage: Stage, index: int, tensor: Tensor) -> None:
        self.tape, self.stage, self.index, self.place = tape, stage, index, _Place(tensor)
        stage.saved += 1

    def tensor(self) -> Tensor:
        self.tape.comes()
        return self.stage.tensor(self.index, self.place)


class _OnHost:
    """In a graph, in place of a tensor that lies on the host."""

    def __init__(self, tape: "Tape", copy: HostCopy, tensor: Tensor) -> None:
        self.tape, self.copy, self.place = tape, copy, _Place(tensor)

    def tensor(self) -> Tensor:
        self.tape.comes()
        return self.place.within(self.copy.on_device(), self.copy.device)


class _Here:
    """In a graph, in place of a tensor that stays: torch's own check is for bare tensors only."""

    def __init__(self, tensor: Tensor) -> None:
        self.kept, self.version = tensor, tensor._version
        self.instead: _Again | _OnHost | None = None

    def become(self, instead: "_Again | _OnHost") -> None:
        """It does not stay after all."""
        self.instead = instead
        del self.kept

    def tensor(self) -> Tensor:
        if self.instead is not None:
            return self.instead.tensor()
        if self.kept._version != self.version:
            raise RuntimeError(
                f"a tensor of shape {tuple(self.kept.shape)} that backward needs was changed in "
                "place after a fused decoder layer had read it"
            )
        return self.kept


class Tape:
    """One call of one layer. A context: what autograd saves within goes through it.

    Args:
        offloader: takes what is kept to the host; None: it stays.
        shared: tensors that other layers read too, and that stay where they are.
        before: the tape of the layer before, whose tensors are fetched when ours are asked for.
        attention_again: attention is part of the stage of q, k and v, and its output is not kept.
        spills: takes gate/up to the host; None: they are computed again.
    """

    def __init__(
        self,
        offloader: Offloader | None = None,
        shared: Sequence[Tensor] = (),
        before: "Tape | None" = None,
        attention_again: bool = False,
        spills: Offloader | None = None,
    ) -> None:
        self.offloader, self.spills = offloader, spills
        self._spilling = False
        self.attention_again = attention_again
        self.before = None if before is None else weakref.ref(before)
        self.copies: dict[int, HostCopy] = {}
        self._shared = {t.untyped_storage().data_ptr() for t in shared}
        self._stages: dict[int, tuple[Stage, int]] = {}
        # Noted tensors, held while the tape is open: no other can lie at their address.
        self._held: list[Tensor] = []
        # Saved within a stage before it could note them, as attention saves its own output.
        self._pending: list[_Here] = []
        self._is_within = False
        self._hooks: Any = None
        self._has_come = False

    def __enter__(self) -> "Tape":
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)
        self._hooks = None
        self._stages, self._held = {}, []

    def stage(
        self, run: Callable[..., Any], projections: Sequence[LoraProjection], *inputs: Tensor
    ) -> Any:
        """Runs a stage: `run(note, *inputs)`.

        Args:
            run: computes the stage and notes each tensor that autograd may save of it; it is called
                with the same inputs again, without their graph.
            projections: that it reads.
            *inputs: are kept.

        Returns:
            What `run` does.
        """
        kept = [self.keep(x) for x in inputs]
        stage = Stage(lambda note: run(note, *(get() for get in kept)), projections, inputs[0])
        count = 0

        def note(tensor: Tensor) -> None:
            nonlocal count
            address = tensor.untyped_storage().data_ptr()
            self._held.append(tensor)
            self._stages[address] = stage, count
            for one in self._pending:
                if one.instead is None and one.kept.untyped_storage().data_ptr() == address:
                    one.become(_Again(self, stage, count, one.kept))
            count += 1

        self._is_within = True
        result = run(note, *inputs)
        self._is_within = False
        for one in self._pending:
            if one.instead is None and self._leaves(one.kept):
                one.become(self._on_host(one.kept))
        self._pending = []
        return result

    def keep(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Keeps a stage's input; gives it back when the stage runs again."""
        tensor = tensor.detach()
        self._held.append(tensor)
        packed = self._pack(tensor)
        return lambda: _unpack(packed)

    @contextmanager
    def spilling(self) -> Iterator[None]:
        """Within, what is large and kept goes to the host, to be asked for once."""
        self._spilling = self.spills is not None
        try:
            yield
        finally:
            self._spilling = False

    def comes(self) -> None:
        """Backward has reached this layer: the one before is next."""
        if self._has_come:
            return
        self._has_come = True
        before = None if self.before is None else self.before()
        if before is not None:
            before.prefetch()

    def prefetch(self) -> None:
        """Starts the copies back to the GPU."""
        for copy in self.copies.values():
            copy.prefetch()

    def _pack(self, tensor: Tensor) -> Any:
        if isinstance(tensor, nn.Parameter) or type(tensor) is not Tensor:
            return tensor
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address in self._stages:
            return _Again(self, *self._stages[address], tensor)
        if self._is_within and address not in self.copies:
            here = _Here(tensor)
            self._pending.append(here)
            return here
        return self._on_host(tensor) if self._leaves(tensor) else _Here(tensor)

    def _leaves(self, tensor: Tensor) -> bool:
        """Whether a kept tensor goes to the host."""
        storage, taker = tensor.untyped_storage(), self._taker
        return (
            taker is not None
            and storage.nbytes() >= SMALL_BYTES
            and storage.data_ptr() not in self._shared
            and tensor.device == taker.device  # not the seeds of FlashAttention
        )

    @property
    def _taker(self) -> Offloader | None:
        """Who takes a large tensor to the host now."""
        return self.spills if self._spilling else self.offloader

    def _on_host(self, tensor: Tensor) -> _OnHost:
        address = tensor.untyped_storage().data_ptr()
        if address not in self.copies:
            assert self._taker is not None
            self._held.append(tensor)
            self.copies[address] = self._taker.take(tensor, once=self._spilling)
        return _OnHost(self, self.copies[address], tensor)


@never_traced
def _unpack(packed: Any) -> Tensor:
    if isinstance(packed, _Again | _OnHost | _Here):
        return packed.tensor()
    tensor: Tensor = packed
    return tensor


def run_stage(
    tape: Tape | None,
    run: Callable[..., Any],
    projections: Sequence[LoraProjection],
    *inputs: Tensor,
) -> Any:
    """`tape.stage`, or plainly `run` where there is no tape."""
    if tape is None:
        return run(ignore, *inputs)
    return tape.stage(run, projections, *inputs)


def ignore(tensor: Tensor) -> None:
    """The `Note` of who keeps no tape."""
