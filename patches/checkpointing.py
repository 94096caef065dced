"""Which fused decoder layer keeps what for its backward pass.

    off        all that backward needs; nothing is computed twice
    selective  the layer's input, the attention's output and its log-sum-exp; norms, q/k/v, the
               second residual and gate/up are computed again, attention and down never
    offload    as selective, but what is kept waits on the host; a frozen table of embeddings that
               is no head as well lies there too, and is read from there
    auto       for each layer the fastest of these that the GPU's free memory has room for

The modes change where numbers come from, not the numbers: what is computed again has the same bits,
but that the MLP goes through many tokens in tiles, whose GEMMs may round otherwise.

It stands in for the trainer's own gradient checkpointing on the layers that are fused whole, and
puts it back with `undo`. Other layers, and calls that go the stock way, keep the trainer's.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorafuse.patches.host_memory import OnHost, embedding_table
from lorafuse.patches.offload import Offloader
from lorafuse.patches.recomputation import Tape

__all__ = [
    "AUTO",
    "MODES",
    "OFF",
    "OFFLOAD",
    "OPERATION",
    "SELECTIVE",
    "Checkpointing",
    "CheckpointingRecord",
    "LayerCheckpointing",
    "LayerSizes",
    "plan",
]

OPERATION = "checkpointing"
OFF, SELECTIVE, OFFLOAD, AUTO = "off", "selective", "offload", "auto"
MODES = (OFF, SELECTIVE, OFFLOAD)  # from fast to small
# Tokens that the MLP takes at a time: gate/up and their like exist for so many only.
TILE_ROWS = {SELECTIVE: 8192, OFFLOAD: 8192}
# Of the free memory, what `auto` leaves: for fragments of the allocator and what it cannot know.
_MARGIN = 0.04
_LOSS_BYTES = 1.2e9  # the loss's chunk of logits, and the head's own work


@dataclass(frozen=True)
class LayerSizes:
    """Features of a layer's linear layers, which decide what its tensors weigh.

    Attributes:
        hidden: H.
        qkv: outputs of q, k and v.
        attention: inputs of o.
        gate_up: outputs of gate and up, 2 I.
        rotated: outputs of q and k that lie apart from `qkv` once normed and turned, or 0.
        room: columns for LoRA beside gate/up.
    """

    hidden: int
    qkv: int
    attention: int
    gate_up: int
    rotated: int = 0
    room: int = 64

    def kept(self, mode: str) -> int:
        """Elements a token that stay on the GPU from forward to backward."""
        if mode == OFFLOAD:
            return 4 * self.room
        kept = self.hidden + self.attention + 4 * self.room
        if mode == OFF:
            kept += self.qkv + self.rotated + self.hidden + self.gate_up + self.room
        return kept

    def working(self, tokens: int, mode: str) -> int:
        """Elements that backward through one layer needs beside what is kept."""
        rows = min(tokens, TILE_ROWS.get(mode, tokens))
        again = 0 if mode == OFF else rows * (self.gate_up + self.room)
        again += 0 if mode == OFF else tokens * (self.qkv + self.rotated)
        mlp = rows * (self.gate_up // 2 + 2 * self.hidden)
        weight = self.gate_up * (self.hidden + self.room)
        fetched = 4 * tokens * (self.hidden + self.attention) if mode == OFFLOAD else 0
        return again + max(mlp, 4 * tokens * self.qkv) + weight + 3 * tokens * self.hidden + fetched


def plan(
    layers: Sequence[LayerSizes], tokens: int, itemsize: int, free: float, floor: str = OFF
) -> list[str]:
    """The fastest mode of each layer that fits into `free` bytes.

    Args:
        layers: in the order of the forward pass.
        tokens: T.
        itemsize: bytes of an element.
        free: bytes for all that the step allocates, from the first layer on.
        floor: no layer gets a faster mode.

    Returns:
        One mode a layer; layers of one mode lie together, the fastest last: their memory is the
        first that backward frees. All `offload` where nothing fits.
    """

    def needed(modes: Sequence[str]) -> float:
        kept = sum(one.kept(mode) for one, mode in zip(layers, modes, strict=True)) * tokens
        working = max(one.working(tokens, mode) for one, mode in zip(layers, modes, strict=True))
        return itemsize * kept + max(itemsize * working, _LOSS_BYTES)

    allowed = MODES[MODES.index(floor) :]
    for fast, slow in pairwise(allowed):
        for n in range(len(layers), 0, -1):
            modes = [slow] * (len(layers) - n) + [fast] * n
            if needed(modes) <= free:
                return modes
    return [allowed[-1]] * len(layers)


class Keeping(NamedTuple):
    """How one call keeps its activations."""

    tape: Tape
    tile_rows: int


class Checkpointing:
    """The layers of one fused model.

    Args:
        mode: one of `MODES`, or `AUTO`.
        budget_bytes: `auto` plans as if the GPU had so many; None: all that it has.

    Attributes:
        modes: of each layer, as last planned.
        floor: `auto` plans no faster mode, after a step that ran out of memory.
    """

    def __init__(self, mode: str, budget_bytes: float | None = None) -> None:
        self.mode, self.budget_bytes = mode, budget_bytes
        self.layers: list[LayerCheckpointing] = []
        self.modes: list[str] = []
        self.floor = OFF
        self.last_tape: Tape | None = None
        self._offloader: Offloader | None = None
        self._parameters: list[nn.Parameter] = []
        self._on_host: list[OnHost] = []

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"last_tape": None, "_offloader": None, "_on_host": []}

    def add(self, module: nn.Module, sizes: LayerSizes) -> "LayerCheckpointing":
        """A layer, in the order of the forward pass."""
        layer = LayerCheckpointing(self, len(self.layers), module, sizes)
        self.layers.append(layer)
        self._parameters += [p for p in module.parameters() if p.requires_grad]
        return layer

    def replace_trainers(self) -> int:
        """Switches the trainer's own checkpointing off on our layers; on how many it was on."""
        return sum(layer.replace_trainers() for layer in self.layers)

    def undo(self) -> None:
        """Puts the trainer's own back."""
        for layer in self.layers:
            if layer.trainers:
                layer.module.gradient_checkpointing = True  # type: ignore[assignment]
                layer.trainers = False
        while self._on_host:
            self._on_host.pop().undo()

    def move_embeddings(self, model: nn.Module) -> int:
        """With `offload`, the table of input embeddings goes to the host; its bytes, or 0."""
        if self.mode != OFFLOAD:
            return 0
        weight = embedding_table(model)
        if weight is None:
            return 0
        self._on_host.append(OnHost(weight))
        return weight.nbytes

    def offloader(self, device: torch.device) -> Offloader:
        if self._offloader is None or self._offloader.device != device:
            self._offloader = Offloader(device)
        return self._offloader

    def begin(self, h: Tensor) -> None:
        """A forward pass begins: decides the mode of each layer."""
        self.last_tape = None
        if self.mode != AUTO:
            self.modes = [self.mode] * len(self.layers)
        elif not h.is_cuda:
            # The memory is the machine's, and not ours to plan: as the trainer has it.
            on = any(layer.trainers for layer in self.layers)
            mode = SELECTIVE if on and self.floor == OFF else self.floor
            self.modes = [mode] * len(self.layers)
        else:
            tokens, itemsize = h.shape[0] * h.shape[1], h.dtype.itemsize
            sizes = [layer.sizes for layer in self.layers]
            self.modes = plan(sizes, tokens, itemsize, self.free_bytes(h.device), self.floor)

    def free_bytes(self, device: torch.device) -> float:
        """What a step may allocate from here on, gradients and optimiser states counted off."""
        free, total = torch.cuda.mem_get_info(device)
        allocated = torch.cuda.memory_allocated(device)
        here: float = free + torch.cuda.memory_reserved(device) - allocated
        if self.budget_bytes is not None:
            here = min(here, self.budget_bytes - allocated)
        to_come = sum(p.numel() * p.element_size() for p in self._parameters if p.grad is None)
        if not self.has_stepped:
            to_come += sum(8 * p.numel() for p in self._parameters)  # AdamW's states, in fp32
        return here - to_come - _MARGIN * min(total, self.budget_bytes or total)

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
        dearest = min(MODES.index(mode) for mode in self.modes)
        if dearest + 1 == len(MODES):
            return None
        self.floor = MODES[dearest + 1]
        return self.floor


class LayerCheckpointing:
    """One fused decoder layer.

    Attributes:
        trainers: the trainer's own checkpointing was on, and we stand in for it.
        calls: mode -> how many calls with gradients ran in it.
    """

    def __init__(
        self, owner: Checkpointing, index: int, module: nn.Module, sizes: LayerSizes
    ) -> None:
        self.owner, self.index, self.module, self.sizes = owner, index, module, sizes
        self.trainers = False
        self.calls: Counter[str] = Counter()

    @property
    def whole_calls(self) -> int:
        return sum(self.calls.values())

    @property
    def mode(self) -> str:
        """As last planned."""
        modes = self.owner.modes
        return modes[self.index] if modes else self.owner.mode

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
        if mode == OFF:
            owner.last_tape = None
            return None
        offloader = None
        # What the last layer keeps is the first thing that backward asks for.
        if mode == OFFLOAD and self.index + 1 < len(owner.layers):
            offloader = owner.offloader(h.device)
            offloader.next_layer()
        tape = Tape(offloader, shared, owner.last_tape)
        owner.last_tape = tape
        return Keeping(tape, TILE_ROWS[mode])

    def stock(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A call that goes the stock way, checkpointed if the trainer wants it so."""
        function = getattr(self.module, "_gradient_checkpointing_func", None)
        if not (self.trainers and self.module.training and function is not None):
            return forward(*args, **kwargs)

        def run(*inputs: Any) -> Any:
            return forward(*inputs, **kwargs)

        return function(run, *args)


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
        return {}
