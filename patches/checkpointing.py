"""Which fused decoder layer keeps what for its backward pass.

    off        all that backward needs; nothing is computed twice
    selective  the layer's input, the attention's output and its log-sum-exp; norms, q/k/v, the
               second residual and gate/up are computed again, attention and down never
    offload    as selective, but what is kept waits on the host, and where that is too small some
               layers compute attention again, too; a frozen table of embeddings that
               is no head as well lies there too, and is read from there
    auto       for each layer the fastest of these that the GPU's free memory has room for

Some of the layers that would compute gate/up again have it wait on the host instead, as many as the
link carries beside the GPU's work and the memory has room for (`patches.spilling`): of the host's
free memory at most half, and but for `auto`, which plans, half of the GPU's stays free.

The modes change where numbers come from, not the numbers: what is computed again has the same bits,
but that the MLP goes through many tokens in tiles, whose GEMMs may round otherwise.

It stands in for the trainer's own gradient checkpointing on the layers that are fused whole, and
puts it back with `undo`. Other layers, and calls that go the stock way, keep the trainer's.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from lorafuse.kernels.linear_cross_entropy import chunk_rows
from lorafuse.patches.host_memory import OnHost, available_bytes, embedding_table
from lorafuse.patches.offload import WINDOW, Offloader
from lorafuse.patches.recomputation import SMALL_BYTES, Tape
from lorafuse.patches.spilling import Rates, measured_rates, shares, spilled_layers

__all__ = [
    "AUTO",
    "EVERY_OTHER",
    "MODES",
    "OFF",
    "OFFLOAD",
    "OPERATION",
    "SELECTIVE",
    "Batch",
    "Checkpointing",
    "CheckpointingRecord",
    "Decision",
    "LayerCheckpointing",
    "LayerSizes",
    "Spill",
    "spare_bytes",
]

OPERATION = "checkpointing"
OFF, SELECTIVE, OFFLOAD, AUTO = "off", "selective", "offload", "auto"
MODES = (OFF, SELECTIVE, OFFLOAD)  # from fast to small
# Tokens that the MLP takes at a time: gate/up and their like exist for so many only.
TILE_ROWS = {SELECTIVE: 8192, OFFLOAD: 8192}
# Of the free memory, what `auto` leaves: for fragments of the allocator and what it cannot know.
_MARGIN = 0.04
_LOGIT_BYTES = 2**29  # the loss's chunk of logits
_SCALED_ROWS = 8192  # of the loss's gradient, in fp32 at a time
_VOCABULARY = 2**18  # where the head's is not known
_FP32 = 4
# Of the GPU and of the host's free memory, what is not taken to be merely faster.
_ROOM = 0.5
# Of the layers, so that no two in a row send their gate/up to the host.
EVERY_OTHER = 0.5
_UNPINNED = "the host has too little memory that can be pinned (ulimit -l, or a container's limit)"


@dataclass(frozen=True)
class LayerSizes:
    """What decides how much a layer's tensors weigh. Memory is estimated from above.

    Attributes:
        hidden: H.
        qkv: N, outputs of q, k and v.
        attention: A, inputs of o.
        gate_up: 2 I, outputs of gate and up.
        rotated: outputs of q and k that lie apart from `qkv` once normed and turned, or 0.
        folds: F, columns for LoRA beside qkv, o, gate/up and down.
        heads: of queries.
        shares_heads: there are fewer heads of keys.
        norms_behind: the blocks' outputs are normed, too.
        scaled: they are scaled before they are added.
        window: of sliding attention, in tokens; None: full attention.
        gradients: bytes of the adapters' gradients, which backward leaves.
    """

    hidden: int
    qkv: int
    attention: int
    gate_up: int
    rotated: int = 0
    folds: tuple[int, int, int, int] = (64, 64, 64, 64)
    heads: int = 32
    shares_heads: bool = True
    norms_behind: bool = False
    scaled: bool = False
    window: int | None = None
    gradients: int = 0

    @cache  # noqa: B019  # a handful of sizes, asked in each forward pass
    def kept(self, mode: str, tokens: int, length: int, itemsize: int) -> int:
        """Bytes that stay on the GPU from forward to backward.

        Args:
            mode: one of `MODES`.
            tokens: T.
            length: of them, in a row.
            itemsize: bytes of an element.
        """
        kept = tokens * (itemsize * sum(self.folds[2:]) + 2 * _FP32 * (1 + self.norms_behind))
        kept += sum(self._large(tokens, length, itemsize))
        if mode == OFFLOAD:
            kept -= self.taken(tokens, length, itemsize)
        if mode == OFF:
            more = self.qkv + self.rotated + self.hidden + self.gate_up + self.folds[2]
            kept += itemsize * tokens * (more + self.hidden * self.norms_behind)
        return kept

    def _large(self, tokens: int, length: int, itemsize: int) -> list[int]:
        """Bytes of each tensor that every mode keeps, and that grows large with the tokens."""
        # h, o, with norms behind the MLP's output; XA of qkv and o
        elements = [self.hidden, self.attention, self.hidden * self.norms_behind, *self.folds[:2]]
        if self.window is not None and length >= self.window:
            # A dense mask: k and v are repeated for each query head, and the mask is kept as bias.
            elements += [self.attention, self.attention, length]
        # log-sum-exp; rstd of the norms on q's and k's heads
        both = self.rotated * self.heads // self.attention
        wide = [self.heads, self.heads, both - self.heads] if both else [self.heads]
        return [tokens * itemsize * one for one in elements] + [
            tokens * _FP32 * one for one in wide
        ]

    @cache  # noqa: B019
    def taken(self, tokens: int, length: int, itemsize: int) -> int:
        """Bytes that `offload` takes to the host."""
        return sum(one for one in self._large(tokens, length, itemsize) if one >= SMALL_BYTES)

    def gate_up_bytes(self, tokens: int, itemsize: int) -> int:
        """Of gate/up, with room for the gradient of what is folded in."""
        return tokens * itemsize * (self.gate_up + self.folds[2])

    def forward_flops(self, tokens: int, length: int) -> float:
        """Of the layer's products and its attention."""
        H, seen = self.hidden, min(length, self.window or length)
        products = H * self.qkv + self.attention * H + H * self.gate_up + H * self.gate_up // 2
        return 2.0 * tokens * (products + (length - seen / 2) * seen / length * 2 * self.attention)

    @cache  # noqa: B019
    def working(
        self, mode: str, tokens: int, itemsize: int, spilled: bool = False
    ) -> tuple[int, int]:
        """Bytes that one layer's (forward, backward) needs beside what is kept and fetched.

        Args:
            mode: one of `MODES`.
            tokens: T.
            itemsize: bytes of an element.
            spilled: gate/up goes to the host.
        """
        T, H, N, A = tokens, self.hidden, self.qkv, self.attention
        tiles = -(-T // TILE_ROWS.get(mode, T))
        rows = -(-T // tiles)
        f_qkv, f_o, f_gate_up, f_down = self.folds
        inner = self.gate_up // 2
        W_qkv, W_o = N * (H + f_qkv), H * (A + f_o)
        W_gate_up, W_down = self.gate_up * (H + f_gate_up), H * (inner + f_down)
        again = mode != OFF
        apart = self.norms_behind or self.scaled  # the residual is added behind the block
        behind = H * apart
        makes = again and not spilled
        gate_up = rows * (self.gate_up + f_gate_up) if makes else 0
        # What is written once for several products: W of gate/up, of down too with several tiles.
        keeps = rows >= H and (makes or tiles > 1)
        first = (self.gate_up + f_gate_up) * (H + f_gate_up) if keeps else 0
        second = (H + f_down) * (inner + f_down) if keeps and tiles > 1 else 0
        in_tile = first + second + max(
            rows * (H + f_gate_up) + (0 if first else W_gate_up),  # x, and the GEMM, or that of dx
            rows * (inner + f_down) + (0 if second else W_down),  # m or dm
        )  # fmt: skip
        block = T * (N + self.rotated + 2 * H + behind) if again else T * H
        forward = max(
            block + gate_up + in_tile,
            T * (H + f_qkv) + W_qkv + (T * N if again else 0),
        )
        dh, dh2 = T * (H + f_down), T * (H + f_o)
        through = T * (2 * H + f_down) * apart  # dd, and a or dh2
        h2 = T * H if again else 0
        mlp = dh + through + h2 + max(
            (dh2 if tiles > 1 else 0) + gate_up + in_tile,
            dh2 + rows * H,
            T * A + W_o,
        )  # fmt: skip
        # What `off` has let go of when attention's turn comes.
        gone = 0 if again else T * (self.gate_up + f_gate_up + H)
        workspace = T * (2 * A * self.shares_heads * itemsize + _FP32 * (A + self.heads))
        qkv = T * (N + self.rotated) if again else 0
        turned = T * self.rotated
        attention = dh2 + T * (H + f_o) * apart - gone + max(
            T * A + qkv + T * (H + f_qkv) + W_qkv,
            T * A + qkv + T * N + workspace // itemsize,
            qkv + T * N + turned,
        )  # fmt: skip
        freed = T * A + (0 if again else T * (N + self.rotated))
        projections = dh2 + T * N - gone + max(
            T * (N + f_qkv) + T * H + W_qkv, T * H + dh
        )  # fmt: skip
        if mode != OFFLOAD:
            projections -= freed
        return itemsize * forward, itemsize * max(mlp, attention, projections)

    def head(self, tokens: int, vocabulary: int, itemsize: int) -> int:
        """Bytes of the final norm and the loss, beside what is kept."""
        size = itemsize * tokens * self.hidden
        logits = itemsize * vocabulary * chunk_rows(tokens, vocabulary, itemsize, _LOGIT_BYTES)
        scaled = _FP32 * min(tokens, _SCALED_ROWS) * self.hidden
        rows = 24 * tokens
        return rows + size + max(2 * size + logits, 2 * size + scaled, 3 * size)


class Spill(NamedTuple):
    """How gate/up may wait on the host.

    Attributes:
        rates: of the GPU and the link.
        host_bytes: that the host has for it, and for what `offload` takes.
    """

    rates: Rates
    host_bytes: float


class Decision(NamedTuple):
    """One entry a layer, in the order of the forward pass.

    Attributes:
        modes: of `MODES`.
        spilled: gate/up waits on the host.
    """

    modes: list[str]
    spilled: list[bool]

    @property
    def kept_gate_up(self) -> int:
        """In how many layers it is not computed again."""
        return self.modes.count(OFF) + sum(self.spilled)


@dataclass(frozen=True)
class Batch:
    """A step that is planned for.

    Attributes:
        layers: in the order of the forward pass.
        tokens: T.
        itemsize: bytes of an element.
        length: tokens of a row; None: T.
        vocabulary: V.
        accumulates: the adapters' gradients are there already.
        host_limit_bytes: of the host's memory, for what `offload` keeps there.
    """

    layers: Sequence[LayerSizes]
    tokens: int
    itemsize: int
    length: int | None = None
    vocabulary: int = _VOCABULARY
    accumulates: bool = False
    host_limit_bytes: float = float("inf")

    @property
    def row(self) -> int:
        """Tokens of a row."""
        return self.length or self.tokens

    def taken(self, modes: Sequence[str]) -> list[int]:
        """Bytes of each layer that `offload` takes to the host: none of the last one's."""
        last = len(self.layers) - 1
        return [
            one.taken(self.tokens, self.row, self.itemsize) if mode == OFFLOAD and i < last else 0
            for i, (one, mode) in enumerate(zip(self.layers, modes, strict=True))
        ]

    def bytes(self, modes: Sequence[str], spilled: Sequence[bool] = ()) -> int:
        """What a step allocates from the first layer on.

        Args:
            modes: one a layer.
            spilled: whether gate/up of a layer goes to the host, one a layer; empty: of none.
        """
        layers, tokens, itemsize = self.layers, self.tokens, self.itemsize
        length = self.row
        last = len(layers) - 1
        gradients = 0 if self.accumulates else sum(one.gradients for one in layers)
        most = kept = before = 0
        taken = [0] * WINDOW  # by the layers so far
        backward = []
        for i, (one, mode, own) in enumerate(zip(layers, modes, self.taken(modes), strict=True)):
            spills = bool(spilled) and spilled[i]
            kept += one.kept(mode, tokens, length, itemsize)
            if i == last and mode == OFFLOAD:  # whose tensors stay
                kept += one.taken(tokens, length, itemsize)
            elif spills:
                own += one.gate_up_bytes(tokens, itemsize)
            taken.append(own)
            working = one.working(mode, tokens, itemsize, spills)
            # The embedding's output is a local variable of the model's forward, too.
            h = tokens * itemsize * one.hidden if i >= WINDOW and modes[0] == OFFLOAD else 0
            most = max(most, kept + h + sum(taken[-WINDOW:]) + working[0])
            # The layer's own are fetched, and those of the layer before.
            backward.append(kept + before + own + working[1] + gradients)
            before = own
            gradients -= 0 if self.accumulates else one.gradients
        leaving = sum(taken[-WINDOW:])  # on the GPU until backward fetches the first one back
        reach = max((i for i, own in enumerate(taken[WINDOW:]) if own), default=last)
        head = kept + layers[-1].head(tokens, self.vocabulary, itemsize)
        before_fetching = [*backward[reach + 2 :], head]
        return max(most, leaving + max(before_fetching), *backward)

    def spilled(
        self, modes: Sequence[str], free: float, spill: Spill, most: float = 1.0
    ) -> list[bool]:
        """Which layers' gate/up go to the host: as many as there is time and memory for.

        Args:
            modes: one a layer.
            free: bytes for all that the step allocates, from the first layer on.
            spill: what there is of either.
            most: of the layers; with `EVERY_OTHER` one's is not fetched while another's is there.
        """
        taken = self.taken(modes)
        # The last layer that computes again is the first to be asked for: its own would be late.
        first = max((i for i, mode in enumerate(modes) if mode != OFF), default=0)
        parts = [
            min(part, most) if i < first else 0.0
            for i, part in enumerate(
                shares(self.layers, taken, self.tokens, self.row, self.itemsize, spill.rates)
            )
        ]
        sizes = [one.gate_up_bytes(self.tokens, self.itemsize) for one in self.layers]

        def fits(chosen: list[bool]) -> bool:
            host = sum(taken) + sum(n for n, yes in zip(sizes, chosen, strict=True) if yes)
            return host <= spill.host_bytes and self.bytes(modes, chosen) <= free

        return spilled_layers(parts, fits)

    def plan(self, free: float, floor: str = OFF, spill: Spill | None = None) -> Decision:
        """The fastest mode of each layer that fits into `free` bytes.

        Args:
            free: bytes for all that the step allocates, from the first layer on.
            floor: no layer gets a faster mode.
            spill: how gate/up may wait on the host; None: it may not.

        Returns:
            Layers of one mode lie together, the fastest last: their memory is the first that
            backward frees. All `offload` where nothing fits.
        """
        count = len(self.layers)
        plain = Decision(self._modes(free, floor), [False] * count)
        if spill is None or plain.modes == [OFF] * count:
            return plain
        # With a layer's gate/up or two left free, others' can pass through.
        best = plain
        size = max(one.gate_up_bytes(self.tokens, self.itemsize) for one in self.layers)
        for room in (0, 1, 2, 3):
            modes = self._modes(free - room * size, floor)
            spilled = self.spilled(modes, free, spill)
            found = Decision(modes, spilled)
            if self.bytes(modes) <= free and found.kept_gate_up > best.kept_gate_up:
                best = found
        return best

    def _modes(self, free: float, floor: str) -> list[str]:
        allowed, count = MODES[MODES.index(floor) :], len(self.layers)
        for fast, slow in itertools.pairwise(allowed):
            # More layers in the faster mode take more: the most that fit are searched by halves.
            low, high = 0, count
            while low < high:
                n = (low + high + 1) // 2
                fits = self.bytes([slow] * (count - n) + [fast] * n) <= free
                low, high = (n, high) if fits else (low, n - 1)
            if low:
                return self._on_host([slow] * (count - low) + [fast] * low)
        return self._on_host([allowed[-1]] * count)

    def _on_host(self, modes: list[str]) -> list[str]:
        """`selective` in place of `offload` where the host may not hold more."""
        held = itertools.accumulate(self.taken(modes))
        return [
            SELECTIVE if mode == OFFLOAD and so_far > self.host_limit_bytes else mode
            for mode, so_far in zip(modes, held, strict=True)
        ]


def spare_bytes(free: float, total: float, allocated: float, budget: float | None) -> float:
    """What `auto` plans with: bytes that a step may allocate from its first layer on.

    Args:
        free: that the allocator could still give out.
        total: of the GPU.
        allocated: by now.
        budget: that the user allows; None: all.
    """
    if budget is None:
        return free - _MARGIN * total
    return min(free, budget - allocated) - _MARGIN * min(total, budget)


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
        self.vocabulary = _VOCABULARY
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
        if self.mode == OFFLOAD:
            self.fit_host(batch, h.device)
        if not self.attention_again and (spill := self.spill(h.device)) is not None:
            free -= _ROOM * torch.cuda.get_device_properties(h.device).total_memory
            self.spilled = batch.spilled(self.modes, free, spill, EVERY_OTHER)

    def spill(self, device: torch.device) -> Spill | None:
        """What gate/up may use of the host; None: nothing."""
        if torch.compiler.is_compiling():  # which could not follow what is timed
            return None
        host = self.host_bytes(device)
        limited = self.host_limit_bytes is not None
        return Spill(measured_rates(device.index or 0), host if limited else _ROOM * host)

    def batch(self, h: Tensor) -> Batch:
        """The step that `h` [B, S, H], the first layer's input, is the beginning of."""
        rows, length, _ = h.shape
        sizes = [layer.sizes for layer in self.layers]
        accumulates = any(p.grad is not None for p in self.parameters())
        limit = float("inf") if self.host_limit_bytes is None else self.host_limit_bytes
        return Batch(
            sizes, rows * length, h.dtype.itemsize, length, self.vocabulary, accumulates, limit
        )

    def host_bytes(self, device: torch.device) -> float:
        """Memory of the host that tensors may take, what they have of it by now included."""
        free = (1 - _MARGIN) * (available_bytes() + self.offloader(device).pool.free_bytes)
        return free if self.host_limit_bytes is None else min(free, self.host_limit_bytes)

    def fit_host(self, batch: Batch, device: torch.device) -> None:
        """Where the host has no room for all that `offload` keeps, some o is computed again."""
        free, taken = self.host_bytes(device), sum(batch.taken(self.modes))
        for layer in self.layers[:-1]:
            if taken <= free:
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
        dearest = min(MODES.index(mode) for mode in self.modes)
        if dearest + 1 == len(MODES):
            return None
        self.floor = MODES[dearest + 1]
        return self.floor


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
