"""Which fused decoder layer keeps what for its backward pass, by `patches.modes`.

Before each forward pass it is decided anew, by what is free then (`patches.memory_plan`). Some of
the layers that would compute gate/up again have it wait on the host instead, as many as the
link carries beside the GPU's work and the memory has room for (`patches.spilling`): of the host's
free memory at most half, and but for `auto`, which plans, half of the GPU's stays free.

The modes change where numbers come from, not the numbers: what is computed again has the same bits,
but that the MLP goes through many tokens in tiles, whose GEMMs may round otherwise.

It stands in for the trainer's own gradient checkpointing on the layers that are fused whole, and
puts it back with `undo`. Other layers, and calls that go the stock way, keep the trainer's.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from lorafuse.kernels.lora_linear import compute_dtype
from lorafuse.patches.host_memory import OnHost, available_bytes, embedding_table
from lorafuse.patches.layer_sizes import LayerSizes
from lorafuse.patches.memory_plan import (
    EVERY_OTHER,
    MARGIN,
    VOCABULARY,
    Batch,
    Spill,
    spare_bytes,
)
from lorafuse.patches.modes import AUTO, MODES, OFF, OFFLOAD, SELECTIVE, TILE_ROWS
from lorafuse.patches.offload import Offloader
from lorafuse.patches.recomputation import Tape
from lorafuse.patches.spilling import measured_rates

__all__ = [
    "OPERATION",
    "Checkpointing",
    "CheckpointingRecord",
    "LayerCheckpointing",
    "trainers_function",
]

OPERATION = "checkpointing"
# Of the GPU and of the host's free memory, what is not taken to be merely faster.
_ROOM = 0.5
_UNPINNED = "the host has too little memory that can be pinned (ulimit -l, or a container's limit)"


class Keeping(NamedTuple):
    """How one call keeps its activations."""

    tape: Tape
    tile_rows: int


class Checkpointing:
    """The layers of one fused model.

    Args:
        mode: one of `MODES`, or `AUTO`.
        budget_bytes: `auto` plans as if the GPU had so many; None: all that it has.
        host_limit_bytes: of the host's memory, for activations; None: what is free.

    Attributes:
        modes: of each layer, as last planned.
        spilled: of each layer, whether its gate/up waits on the host.
        floor: `auto` plans no faster mode, after a step that ran out of memory.
        may_spill: gate/up may wait on the host; not after such a step that had nothing else left.
        vocabulary: V of the head, which decides how large the loss's logits are.
    """

    def __init__(
        self,
        mode: str,
        budget_bytes: float | None = None,
        host_limit_bytes: float | None = None,
    ) -> None:
        self.mode, self.budget_bytes = mode, budget_bytes
        self.host_limit_bytes = host_limit_bytes
        self.layers: list[LayerCheckpointing] = []
        self.modes: list[str] = []
        self.spilled: list[bool] = []
        self.floor = OFF
        self.may_spill = True
        self.vocabulary = VOCABULARY
        self.last_tape: Tape | None = None
        self._offloader: Offloader | None = None
        self._trained: list[nn.Module] = []  # that hold adapters
        self._on_host: list[OnHost] = []
        # With `offload`: the first so many layers compute attention again.
        self.attention_again = 0

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"last_tape": None, "_offloader": None, "_on_host": []}

    def add(
        self, module: nn.Module, sizes: LayerSizes, repeats: bool = True
    ) -> "LayerCheckpointing":
        """A layer, in the order of the forward pass; for the rest see there."""
        layer = LayerCheckpointing(self, len(self.layers), module, sizes, repeats)
        self.layers.append(layer)
        self._trained += [
            one for one in module.modules() if any(p.requires_grad for p in own_parameters(one))
        ]
        return layer

    def parameters(self) -> Iterator[nn.Parameter]:
        """The adapters as they are now: FSDP puts shards in the place of those of the beginning,
        which would stay in memory if we held them."""
        return (p for one in self._trained for p in own_parameters(one) if p.requires_grad)

    def replace_trainers(self) -> str | None:
        """Switches the trainer's own checkpointing off on our layers; says so where it was on."""
        replaced = sum(layer.replace_trainers() for layer in self.layers)
        if not replaced:
            return None
        return (
            f"gradient checkpointing of the trainer: {replaced} decoder layers keep their "
            f"activations by fused_checkpointing: {self.mode} instead"
        )

    def undo(self) -> None:
        """Puts the trainer's own back."""
        for layer in self.layers:
            if layer.trainers:
                layer.module.gradient_checkpointing = True  # type: ignore[assignment]
                layer.trainers = False
        while self._on_host:
            self._on_host.pop().undo()

    def move_embeddings(self, model: nn.Module) -> str | None:
        """With `offload`, the table of input embeddings goes to the host; what became of it."""
        weight = embedding_table(model) if self.mode == OFFLOAD else None
        if weight is None:
            return None
        table = OnHost(weight)
        if not table.moved:
            return f"{weight.nbytes / 1e9:.2f} GB of input embeddings stay: {_UNPINNED}"
        self._on_host.append(table)
        return f"{weight.nbytes / 1e9:.2f} GB of input embeddings lie on the host"

    @property
    def unpinned(self) -> bool:
        """Whether some copies go through memory that could not be pinned."""
        return self._offloader is not None and self._offloader.pool.unpinned > 0

    def offloader(self, device: torch.device) -> Offloader:
        if self._offloader is None or self._offloader.device != device:
            self._offloader = Offloader(device)
        return self._offloader

    def begin(self, h: Tensor) -> None:
        """A forward pass begins: decides the mode of each layer."""
        self.last_tape = None
        self.attention_again = 0
        count = len(self.layers)
        self.spilled = [False] * count
        if not h.is_cuda or self.mode == OFF:
            mode = self.mode
            if mode == AUTO:
                # The memory is the machine's, and not ours to plan: as the trainer has it.
                on = any(layer.trainers for layer in self.layers)
                mode = SELECTIVE if on and self.floor == OFF else self.floor
            self.modes = [mode] * count
            return
        free, batch = self.free_bytes(h.device), self.batch(h)
        if self.mode == AUTO:
            self.modes, self.spilled = batch.plan(free, self.floor)
            if self.modes != [OFF] * count and (spill := self.spill(h.device)) is not None:
                self.modes, self.spilled = batch.plan(free, self.floor, spill)
            return
        self.modes = [self.mode] * count
        host = self.host_bytes(h.device) if self.mode == OFFLOAD else None
        if host is not None:
            self.fit_host(batch, host)
        if not self.attention_again and (spill := self.spill(h.device, host)) is not None:
            free -= _ROOM * torch.cuda.get_device_properties(h.device).total_memory
            self.spilled = batch.spilled(self.modes, free, spill, EVERY_OTHER)

    def spill(self, device: torch.device, host: float | None = None) -> Spill | None:
        """What gate/up may use of the host; None: nothing.

        Args:
            device: the GPU.
            host: `host_bytes`, where this step has asked for them; None: they are asked for here.
        """
        if not self.may_spill:
            return None
        host = self.host_bytes(device) if host is None else host
        limited = self.host_limit_bytes is not None
        return Spill(measured_rates(device.index or 0), host if limited else _ROOM * host)

    def batch(self, h: Tensor) -> Batch:
        """The step that `h` [B, S, H], the first layer's input, is the beginning of."""
        rows, length, _ = h.shape
        sizes = [layer.sizes for layer in self.layers]
        accumulates = any(p.grad is not None for p in self.parameters())
        limit = float("inf") if self.host_limit_bytes is None else self.host_limit_bytes
        return Batch(
            sizes, rows * length, compute_dtype(h).itemsize, length, self.vocabulary, accumulates,
            limit, h.dtype.itemsize,
        )  # fmt: skip

    def host_bytes(self, device: torch.device) -> float:
        """Memory of the host that tensors may take, what they have of it by now included.

        Reads files of the system: once a step.
        """
        free = (1 - MARGIN) * (available_bytes() + self.offloader(device).pool.free_bytes)
        return free if self.host_limit_bytes is None else min(free, self.host_limit_bytes)

    def fit_host(self, batch: Batch, host: float) -> None:
        """Where `host` bytes are no room for all that `offload` keeps, some o is computed again."""
        taken = sum(batch.taken(self.modes))
        for layer in self.layers[:-1]:
            if taken <= host:
                break
            taken -= batch.tokens * batch.itemsize * layer.sizes.attention
            self.attention_again += 1

    def free_bytes(self, device: torch.device) -> float:
        """What a step may allocate from here on, optimiser states to come counted off."""
        free, total = torch.cuda.mem_get_info(device)
        allocated = torch.cuda.memory_allocated(device)
        free += torch.cuda.memory_reserved(device) - allocated
        # AdamW's, in fp32
        to_come = 0 if self.has_stepped else sum(8 * p.numel() for p in self.parameters())
        return spare_bytes(free, total, allocated, self.budget_bytes) - to_come

    @property
    def has_stepped(self) -> bool:
        """Whether the optimiser has its states by now: some step has come before this one."""
        return any(layer.whole_calls > 1 for layer in self.layers[:1])

    def cheaper(self) -> str | None:
        """After a step that ran out of memory: what is planned from now on; None: nothing is left.

        Only `auto` has something cheaper to go to.
        """
        if self.mode != AUTO or not self.modes:
            return None
        next_mode = 1 + min(MODES.index(mode) for mode in self.modes)
        # Layers that the host has no room for stay `selective` under a floor of `offload`.
        if next_mode < len(MODES) and MODES.index(self.floor) < next_mode:
            self.floor = MODES[next_mode]
            return self.floor
        if any(self.spilled):
            self.may_spill = False
            return f"{self.floor}, with no gate/up on the host"
        return None


def own_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Those that `module` itself holds."""
    return [p for p in module._parameters.values() if p is not None]


class LayerCheckpointing:
    """One fused decoder layer.

    Attributes:
        trainers: the trainer's own checkpointing was on, and we stand in for it.
        repeats: its attention gives the same bits when it is computed again.
        calls: mode -> how many calls with gradients ran in it.
    """

    def __init__(
        self,
        owner: Checkpointing,
        index: int,
        module: nn.Module,
        sizes: LayerSizes,
        repeats: bool = True,
    ) -> None:
        self.owner, self.index, self.module, self.sizes = owner, index, module, sizes
        self.repeats = repeats
        self.trainers = False
        self.calls: Counter[str] = Counter()

    @property
    def whole_calls(self) -> int:
        return sum(self.calls.values())

    @property
    def mode(self) -> str:
        """As last planned."""
        modes = self.owner.modes
        mode = modes[self.index] if modes else self.owner.mode
        if self.spills:
            return f"{mode}, gate/up on the host"
        return f"{mode}, attention computed again" if self.attention_again else mode

    @property
    def spills(self) -> bool:
        """Whether its gate/up waits on the host, as last planned."""
        return bool(self.owner.spilled) and self.owner.spilled[self.index]

    @property
    def attention_again(self) -> bool:
        return self.index < self.owner.attention_again and self.repeats

    def replace_trainers(self) -> bool:
        # Trainers enable it when training begins, which may be after us.
        if getattr(self.module, "gradient_checkpointing", False):
            self.module.gradient_checkpointing = False  # type: ignore[assignment]
            self.trainers = True
        return self.trainers

    def begin(self, h: Tensor, shared: Sequence[Tensor]) -> Keeping | None:
        """A call of the layer; None where all is kept."""
        self.replace_trainers()
        if not torch.is_grad_enabled():
            return None
        owner = self.owner
        if self.index == 0 or not owner.modes:
            owner.begin(h)
        mode = owner.modes[self.index]
        self.calls[mode] += 1
        copies = OFFLOAD in owner.modes or any(owner.spilled)
        offloader = owner.offloader(h.device) if copies else None
        if offloader is not None:
            offloader.next_layer()
        if mode == OFF:
            owner.last_tape = None
            return None
        # What the last layer keeps is the first thing that backward asks for.
        takes = mode == OFFLOAD and self.index + 1 < len(owner.layers)
        tape = Tape(
            offloader if takes else None, shared, owner.last_tape, self.attention_again,
            offloader if self.spills else None,
        )  # fmt: skip
        owner.last_tape = tape
        return Keeping(tape, TILE_ROWS[mode])

    def stock(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A call that goes the stock way, checkpointed if the trainer wants it so."""
        if self.index == 0:  # the first layer that is fused plans the forward pass
            self.owner.modes = []
        function = getattr(self.module, "_gradient_checkpointing_func", None)
        if not (self.trainers and self.module.training and function is not None):
            return forward(*args, **kwargs)

        def run(*inputs: Any) -> Any:
            return forward(*inputs, **kwargs)

        return function(run, *args)


def trainers_function(module: Any) -> Callable[..., Any] | None:
    """By what the trainer checkpoints this call of a layer, where our forward has taken that over.

    transformers does it around a layer's `forward` from 5.24 on, and there stands ours; before, it
    did in `__call__`, around ours.
    """
    if not (
        isinstance(module, GradientCheckpointingLayer)
        and "__call__" not in GradientCheckpointingLayer.__dict__
        and getattr(module, "gradient_checkpointing", False)
        and module.training
        and torch.is_grad_enabled()
    ):
        return None
    function: Callable[..., Any] | None = getattr(module, "_gradient_checkpointing_func", None)
    return function


@dataclass(frozen=True, eq=False)
class CheckpointingRecord:
    """What became of checkpointing in one layer; fields as those of `apply.OperationRecord`."""

    module: str
    layer: LayerCheckpointing | None = None
    reason: str = ""
    operation: str = OPERATION

    @property
    def fused(self) -> bool:
        return self.layer is not None

    @property
    def level(self) -> str:
        """The mode."""
        return "" if self.layer is None else self.layer.mode

    @property
    def calls(self) -> int:
        return 0 if self.layer is None else self.layer.whole_calls

    @property
    def stock_calls(self) -> dict[str, int]:
        if self.layer is None or not self.layer.owner.unpinned:
            return {}
        return {f"its copies wait for the host: {_UNPINNED}": self.calls}
