"""The memory of a training step, allocation by allocation: what is held, and when it is let go.

A `Step` goes through one step as the fused layers do, forward and backward, and keeps a `Ledger` of
what is allocated; its highest sum is the prediction. Letters as in the kernels: T tokens of the
micro-batch, H hidden, I intermediate, N outputs of a group, F columns of its folded LoRA; bf16
unless said otherwise. h, h2 and their gradients are in fp32 where the workload prepares the model
so (`prepare_kbit`): blocks' outputs are cast to be added, gradients to be multiplied, and no
gradient has room for G.

What stays from forward to backward, a layer, in bytes a token (`off`):

    h, o, h2                  2 H, 2 Hq D, 2 H     layer input, attention output, second residual
    q, k, v                   2 N                  views of one buffer
    gate, up                  2 (2I + F)           with room for the gradient's folded part
    log-sum-exp, rstd         4 Hq, 2 * 4
    xA of the four groups     2 F each

`selective` keeps of these h, o, the log-sum-exp and the r-wide ones. Backward computes h2 again,
then the MLP in tiles of `TILE_ROWS` tokens, gate/up of one tile at a time; q/k/v when attention
asks for them. `offload` keeps the same, what is `SMALL_BYTES` or more on the host: a layer's is
freed when the next but two begins, and fetched when backward reaches the layer behind it. Those
that no further layer frees stay until backward fetches the first one. The table of embeddings lies
on the host as well, unless it is the head's. gate/up of a layer that is spilled goes the same way,
and is freed when the MLP's backward is done.

dh of a layer lies in a buffer with room for G of the down projection that reads it, dh2 for o's
(`kernels.gradient_room`). Norms on heads (Qwen3) keep q and k before and after; norms behind the
blocks (Gemma 2) keep the blocks' outputs, `selective` only the MLP's: down is never computed twice.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from lorafuse.kernels.linear_cross_entropy import chunk_rows
from lorafuse.patches import host_memory, recomputation
from lorafuse.patches.modes import MODES, OFF, OFFLOAD, SELECTIVE, TILE_ROWS
from lorafuse.patches.offload import WINDOW
from lorafuse.plugin.plan_groups import BF16, FP32, GroupShape, LayerGroups, Workload
from lorafuse.plugin.plan_model import LayerShape

# What the prediction is split into, in the order of the table.
WEIGHTS, ADAPTERS, OPTIMIZER = "weights", "adapters", "optimizer"
KEPT, BUFFERS, LOSS = "kept activations", "working buffers", "loss"
PARTS = (WEIGHTS, ADAPTERS, OPTIMIZER, KEPT, BUFFERS, LOSS)
STOCK = "stock"

# Logits at a time: `kernels.linear_cross_entropy`'s on a GPU.
_LOGIT_BYTES = 512 * 2**20
# cuBLAS keeps one workspace for each thread that calls it (forward, autograd's own): 32 MiB on
# Hopper, 8 MiB elsewhere.
_CUBLAS_BYTES = 2 * 32 * 2**20
# bitsandbytes' blocks.
_NF4_BLOCK, _NF4_BLOCK_2, _ADAM_BLOCK = 64, 256, 256
_ADAM_8BIT_LEAST = 4096  # elements of a tensor; smaller ones have fp32 states
_INT64 = 8
# Rows that the loss's gradient is scaled at a time, in fp32.
_SCALED_ROWS = 8192

# What forward may leave of a layer, and what each mode lets it leave. Of these, the storages of the
# MLP are one a tile.
_OF_STAGES = ("qkv", "turned", "a", "h2", "gu")
_OF_MLP = ("mlp rstd", "gA", "mA")
_KEPT = (
    "h", "o", "d", "k repeated", "v repeated", "bias", "lse", "attention rstd", "xA", "oA",
    "q rstd", "k rstd", "a rstd", "d rstd", *_OF_MLP,
)  # fmt: skip
_OF_LAYER = (*_KEPT, *_OF_STAGES)
_LASTING = {OFF: _OF_LAYER, SELECTIVE: _KEPT, OFFLOAD: _KEPT}


class Ledger:
    """What is allocated now, by name, and what was when it was most."""

    def __init__(self) -> None:
        self.live: dict[str, tuple[str, int]] = {}
        self.sums: dict[str, int] = dict.fromkeys(PARTS, 0)
        self.total = self.peak = 0
        self.peak_sums = dict(self.sums)
        self.moment = self.peak_moment = "before the step"

    def hold(self, name: str, size: int, part: str = BUFFERS) -> None:
        """Allocates. A name that is held already grows."""
        self.live[name] = part, size + self.live.get(name, (part, 0))[1]
        self.sums[part] += size
        self.total += size
        if self.total > self.peak:
            self.peak, self.peak_sums = self.total, dict(self.sums)
            self.peak_moment = self.moment

    def drop(self, *names: str) -> None:
        """Frees; a name that is not held is let pass."""
        for name in names:
            part, size = self.live.pop(name, (BUFFERS, 0))
            self.sums[part] -= size
            self.total -= size

    def brief(self, *sizes: int) -> None:
        """Allocates them all and frees them again."""
        size = sum(sizes)
        self.hold("brief", size)
        self.drop("brief")


@dataclass
class Memory:
    """What a step needs.

    Attributes:
        peak_bytes: The most that is allocated at once.
        parts: Of the peak: bytes by `PARTS`.
        moment: When that is.
        host_bytes: Pinned memory on the host.
        host_least_bytes: The same where all layers that offload compute attention again, as the
            first ones do where the host has no room for its output.
        kept: Bytes that the forward pass leaves for backward, by tensor.
    """

    peak_bytes: int
    parts: dict[str, int]
    moment: str
    host_bytes: int
    host_least_bytes: int = 0
    kept: dict[str, int] = field(default_factory=dict)


def weight_bytes(workload: Workload) -> int:
    """Frozen weights: the decoder layers' linears as quantised, all other parameters in bf16, or
    in fp32 where the model is prepared so.

    NF4: half a byte an element; for each block of 64 one byte, and for 256 of those 4 bytes (not
    double quantised: 4 bytes for each block). bitsandbytes keeps a copy of the codes a weight.
    """
    model = workload.model
    others = model.parameters - sum(linear.elements for linear in model.linears)
    if workload.quant == "none":
        groups = (group for layer in model.layers for group in workload.groups(layer))
        return BF16 * model.parameters + sum(group.room_bytes for group in groups)
    total = workload.stream * others
    for linear in model.linears:
        blocks = -(-linear.elements // _NF4_BLOCK)
        total += -(-linear.elements // 2) + 16 * FP32
        if workload.double_quant:
            # and the scales' own code of 256 words, and their offset
            total += blocks + FP32 * -(-blocks // _NF4_BLOCK_2) + (256 + 1) * FP32
        else:
            total += FP32 * blocks
    return total


def adapter_bytes(workload: Workload) -> int:
    """A [r, K] and B [N, r] of all adapted layers, without gradients."""
    return workload.adapter_bytes * workload.adapter_elements


def optimizer_bytes(workload: Workload) -> int:
    """Two states an element: fp32, or 8 bits with an fp32 scale for each block of 256."""
    if workload.optimizer == "adamw":
        # torch's states have the parameters' dtype.
        return 2 * adapter_bytes(workload)
    total = 0
    for _, size in adapter_tensors(workload):
        if size < _ADAM_8BIT_LEAST:
            total += 2 * FP32 * size
        else:
            total += 2 * (size + FP32 * -(-size // _ADAM_BLOCK))
    return total


def adapter_tensors(workload: Workload) -> list[tuple[str, int]]:
    """(qualified name of the layer and A or B, elements) of each adapter tensor."""
    found = []
    for layer in workload.model.layers:
        groups = workload.groups(layer)
        by_group = zip(groups, (layer.qkv, (layer.o,), layer.gate_up, (layer.down,)), strict=True)
        for group, linears in by_group:
            for linear, rank in zip(linears, group.ranks, strict=True):
                if rank:
                    found.append((f"{linear.name}.A", rank * linear.in_features))
                    found.append((f"{linear.name}.B", rank * linear.out_features))
    return found


class Step:
    """One training step.

    Args:
        workload: What is trained.
        modes: One of `MODES` for all layers, or one for each.
        spilled: Whether gate/up of a layer waits on the host, one for each; empty: of none.

    Raises:
        ValueError: There is no such mode, or not one for each layer.
    """

    def __init__(
        self, workload: Workload, modes: str | Sequence[str], spilled: Sequence[bool] = ()
    ) -> None:
        count = len(workload.model.layers)
        self.mode = modes if isinstance(modes, str) else None
        self.modes = [modes] * count if isinstance(modes, str) else list(modes)
        for mode in self.modes:
            if mode not in MODES:
                raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        if len(self.modes) != count:
            raise ValueError(f"expected a mode for each of {count} layers, got {len(self.modes)}")
        self.spilled = list(spilled) or [False] * count
        self.workload = workload
        self.T, self.stream = workload.rows, workload.stream
        self.ledger = Ledger()
        self.host_bytes = self.attention_bytes = 0
        self.kept: dict[str, int] = {}
        self.layers = [(layer, workload.groups(layer)) for layer in workload.model.layers]
        self.on_host: dict[int, dict[str, int]] = {}  # of each layer that `offload` has taken from
        self.leaving: list[list[str]] = [[] for _ in range(WINDOW)]  # to the host, by layer
        self.keeps: set[str] = set()  # groups whose W is written once for several products

    def run(self) -> Memory:
        """Goes through the step."""
        ledger = self.ledger
        self.begin()
        for i, (layer, groups) in enumerate(self.layers):
            ledger.moment = f"forward of layer {i + 1}"
            self.forward(i, layer, groups)
            self.keep(i)
        ledger.moment = "head and loss"
        self.head()
        for i in reversed(range(len(self.layers))):
            layer, groups = self.layers[i]
            self.backward(i, layer, groups)
        ledger.moment = "optimiser step"
        ledger.brief(0)
        return Memory(
            ledger.peak, ledger.peak_sums, ledger.peak_moment, self.host_bytes,
            self.host_bytes - self.attention_bytes, self.kept,
        )  # fmt: skip

    def begin(self) -> None:
        """What is there when the first layer is called."""
        ledger, workload = self.ledger, self.workload
        on_host = self.embeddings_on_host()
        self.host_bytes += on_host
        ledger.hold("weights", weight_bytes(workload) - on_host, WEIGHTS)
        ledger.hold("adapters", adapter_bytes(workload), ADAPTERS)
        ledger.hold("states", optimizer_bytes(workload), OPTIMIZER)
        ledger.hold("cuBLAS workspaces", _CUBLAS_BYTES)
        if workload.accumulates:
            for i, (_, groups) in enumerate(self.layers):
                self.gradients(i, groups, "attention", first=True)
                self.gradients(i, groups, "mlp", first=True)
        # Tokens and labels, the shifted labels, positions; cos and sin; a mask of the documents.
        ledger.hold("batch", 6 * _INT64 * self.T)
        head_size = self.layers[0][0].head_size
        ledger.hold("rotary tables", 2 * self.stream * workload.tokens * head_size)
        if workload.documents > 1:
            ledger.hold("attention mask", workload.batch * workload.tokens**2)
        ledger.hold("h 0", self.stream * self.T * workload.model.hidden, KEPT)

    def embeddings_on_host(self) -> int:
        """Bytes of the table that the mode `offload` moves to the host, and `auto` does not.

        See `patches.host_memory`.
        """
        size = self.stream * self.workload.model.embeddings
        return size if self.mode == OFFLOAD and size >= host_memory.LEAST_BYTES else 0

    # --- forward -------------------------------------------------------------------------------

    def hold(self, name: str, i: int, size: int) -> None:
        """A tensor that backward reads: kept from forward on, or made for this layer alone."""
        lasting = name in _LASTING[self.modes[i]] if i < len(self.modes) else True
        self.ledger.hold(f"{name} {i}", size, KEPT if lasting else BUFFERS)

    def offloads(self, i: int) -> bool:
        """Whether a layer takes tensors to the host: not the last, whose backward is next."""
        return self.modes[i] == OFFLOAD and i + 1 < len(self.modes)

    def makes_again(self, i: int) -> bool:
        """Whether backward computes gate/up again."""
        return self.modes[i] != OFF and not self.spilled[i]

    def tile(self, i: int) -> tuple[int, int]:
        """(tiles, rows of the largest) that the MLP goes through the tokens in."""
        most = TILE_ROWS.get(self.modes[i], self.T)
        count = -(-self.T // most)
        return count, -(-self.T // count)

    def forward(self, i: int, layer: LayerShape, groups: LayerGroups) -> None:
        """A layer's forward pass: from `h i` to `h i+1`.

        Also what is computed again later stays until the layer ends: its `Tape` holds it.
        """
        if OFFLOAD in self.modes or any(self.spilled):
            # The embedding's output is a local variable of the model's forward, too.
            self.ledger.drop(*(name for name in self.leaving.pop(0) if name != "h 0 leaving"))
            self.leaving.append([])
        self.qkv(i, layer, groups.qkv)
        self.attention(i, layer)
        self.o(i, layer, groups.o)
        self.mlp(i, layer, groups)

    def qkv(self, i: int, layer: LayerShape, group: GroupShape, again: bool = False) -> None:
        T, ledger = self.T, self.ledger
        if not again:
            self.hold("attention rstd", i, FP32 * T)
        self._project(i, group, "qkv", T * group.N, "xA", normed=True, again=again)
        if layer.head_norms:
            heads = {"q": layer.query_heads, "k": layer.key_value_heads}
            size = BF16 * T * sum(heads.values()) * layer.head_size
            # normed, then turned, each in a buffer of its own
            ledger.hold("normed", size)
            if not again:
                for name, count in heads.items():
                    self.hold(f"{name} rstd", i, FP32 * T * count)
            self.hold("turned", i, size)
            ledger.drop("normed")

    def attention(self, i: int, layer: LayerShape) -> None:
        T, heads = self.T, layer.query_heads
        if self.dense_mask(layer):
            # With a mask k and v are repeated for each query head, and the bias is kept in bf16.
            self.hold("k repeated", i, BF16 * T * heads * layer.head_size)
            self.hold("v repeated", i, BF16 * T * heads * layer.head_size)
            self.hold("bias", i, BF16 * T * self.workload.tokens)
        self.hold("o", i, BF16 * T * heads * layer.head_size)
        self.hold("lse", i, FP32 * T * heads)

    def dense_mask(self, layer: LayerShape) -> bool:
        """Whether a sliding window goes to torch's attention as a dense mask: not where it hides
        nothing."""
        return layer.window is not None and self.workload.tokens > layer.window

    def o(self, i: int, layer: LayerShape, group: GroupShape, again: bool = False) -> None:
        out = "a" if layer.adds_apart else "h2"
        casts = self.casts_sums(layer)
        self._project(i, group, out, self.T * group.N, "oA", normed=False, again=again, casts=casts)
        if layer.post_norms:
            if not again:
                self.hold("a rstd", i, FP32 * self.T)
            self._post_norm("h2", i, group.N)
        elif layer.scaled:
            self._scaled("a", ("h2", i), i, group.N)

    def mlp(self, i: int, layer: LayerShape, groups: LayerGroups) -> None:
        """Its output first, then tile by tile; gate/up stay in `off` alone."""
        T, ledger, first, second = self.T, self.ledger, groups.gate_up, groups.down
        count, rows = self.tile(i)
        self.keeps = {"first", "second"} if count > 1 and rows >= first.K else set()
        out = ("d", i) if layer.adds_apart else ("h", i + 1)
        casts = self.casts_sums(layer)
        self.hold(*out, (self.stream if casts else BF16) * T * second.N)
        for name, width in (("gA", first.fold_forward), ("mA", second.fold_forward)):
            self.hold(name, i, BF16 * T * width)
        self.hold("mlp rstd", i, FP32 * T)
        if self.spilled[i] and count > 1:  # of the tiles before
            ledger.hold(f"gu {i}", BF16 * (T - rows) * (first.N + first.gradient_room(rows)))
        self.gate_up(i, first, rows)
        folds = second.folds_forward(rows, copies_input=False)
        ledger.hold("m", BF16 * rows * (second.K + (second.fold_forward if folds else 0)))
        if self.makes_again(i):
            ledger.drop(f"gu {i}")
        ledger.hold("y", BF16 * rows * second.N if casts else 0)
        self.weight("second", second, second.forward_weight_bytes(folds))
        ledger.drop("y", "m", "W first", "W second")
        if layer.post_norms:
            self.hold("d rstd", i, FP32 * T)
            self._post_norm("h", i + 1, second.N)
        elif layer.scaled:
            self._scaled("d", ("h", i + 1), i, second.N)

    def gate_up(self, i: int, group: GroupShape, rows: int) -> None:
        """gate/up of a tile: beside the normed input and W."""
        ledger = self.ledger
        folds = group.folds_forward(rows, copies_input=False)
        ledger.hold("x", BF16 * rows * (group.K + (group.fold_forward if folds else 0)))
        self.hold("gu", i, BF16 * rows * (group.N + group.gradient_room(rows)))
        self.weight("first", group, group.forward_weight_bytes(folds))
        ledger.drop("x")

    def weight(self, name: str, group: GroupShape, size: int) -> None:
        """W for one product, or what is kept of it for the others."""
        if name not in self.keeps:
            self.ledger.brief(size)
        elif f"W {name}" not in self.ledger.live:
            self.ledger.hold(f"W {name}", group.kept_weight_bytes)

    def _project(
        self, i: int, group: GroupShape, out: str, elements: int, low: str, *,
        normed: bool, again: bool, casts: bool = False,
    ) -> None:  # fmt: skip
        """One group's forward: the normed or copied input, W, the output, and XA.

        Args:
            casts: The output is added to a residual of another dtype.
        """
        T, ledger = self.T, self.ledger
        folds = group.folds_forward(T, copies_input=not normed)
        if normed or folds:
            width = group.K + (group.fold_forward if folds else 0)
            ledger.hold("x", BF16 * T * width)
        if casts:
            ledger.hold("y", BF16 * elements)
        else:
            self.hold(out, i, BF16 * elements)
        size = BF16 * T * group.fold_forward
        if again:
            ledger.hold("XA", size)
        elif size:
            self.hold(low, i, size)
        ledger.brief(group.forward_weight_bytes(folds))
        if casts:
            self.hold(out, i, self.stream * elements)
        ledger.drop("x", "XA", "y")

    def _post_norm(self, out: str, i: int, features: int) -> None:
        """h2 = h + norm(a), or the next h = h2 + norm(d)."""
        elements = self.T * features
        self.ledger.hold("normed", BF16 * elements)
        self.hold(out, i, self.stream * elements)
        self.ledger.drop("normed")

    def _scaled(self, block: str, out: tuple[str, int], i: int, features: int) -> None:
        """h2 = h + s a, or the next h = h2 + s d: nothing is kept of a and d."""
        self.hold(*out, self.stream * self.T * features)
        self.ledger.drop(f"{block} {i}")

    def casts_sums(self, layer: LayerShape) -> bool:
        """Whether blocks' outputs are added to a residual stream of another dtype."""
        return self.stream != BF16 and not layer.adds_apart

    # --- between -------------------------------------------------------------------------------

    def keep(self, i: int) -> None:
        """Lets go of what the mode does not keep of a layer, or sends it to the host."""
        ledger = self.ledger
        lasting = _LASTING[self.modes[i]]
        goes = (*(_KEPT if self.offloads(i) else ()), *(("gu",) if self.spilled[i] else ()))
        kept = {*lasting, *goes}
        ledger.drop(*(f"{name} {i}" for name in _OF_LAYER if name not in kept))
        if not goes:
            return
        tiles, _ = self.tile(i)
        taken = self.on_host[i] = {}
        for name in goes:
            _, size = ledger.live.get(f"{name} {i}", (KEPT, 0))
            if size // (tiles if name in (*_OF_MLP, "gu") else 1) >= recomputation.SMALL_BYTES:
                taken[name] = size
                ledger.drop(f"{name} {i}")
                ledger.hold(f"{name} {i} leaving", size, KEPT)
        self.host_bytes += sum(taken.values())
        self.attention_bytes += taken.get("o", 0)
        self.leaving[-1] = [f"{name} {i} leaving" for name in taken]

    def head(self) -> None:
        """Final norm, head and loss, forward and backward."""
        T, ledger, workload = self.T, self.ledger, self.workload
        H, V, N = workload.model.hidden, workload.model.vocabulary, workload.labelled
        last = len(self.layers)
        ledger.hold("final rstd", FP32 * T, KEPT)
        ledger.hold("final x", self.stream * T * H)
        if not any("h 0 leaving" in names for names in self.leaving):
            ledger.drop("h 0 leaving")
        casts = self.stream != BF16
        ledger.hold("head in bf16", BF16 * V * H if casts else 0, LOSS)
        ledger.hold("dX", BF16 * N * H, LOSS)
        ledger.hold("rows", _INT64 * N, LOSS)
        chunk = min(chunk_rows(N, V, BF16, _LOGIT_BYTES), N)
        ledger.hold("logits", BF16 * chunk * -(-V // 64) * 64, LOSS)
        ledger.hold("row results", (2 * FP32 + _INT64) * N, LOSS)
        picked = (self.stream if N != T else 0) + (BF16 if casts else 0)  # and cast
        ledger.hold("rows of x", picked * chunk * H, LOSS)
        ledger.drop("rows of x", "logits", "final x", "head in bf16")
        kept: defaultdict[str, int] = defaultdict(int)
        for name, (part, size) in ledger.live.items():
            if part == KEPT or name in ("dX", "rows"):
                kept[_without_layer(name)] += size
        self.kept = dict(kept)
        ledger.moment = "backward of the loss"
        ledger.hold("scaled dX", self.stream * N * H, LOSS)
        ledger.hold("scaled part", FP32 * min(N, _SCALED_ROWS) * H, LOSS)
        ledger.drop("scaled part")
        if N != T:
            ledger.hold("d final x", self.stream * T * H)
            ledger.drop("scaled dX")
        ledger.drop("dX", "rows", "row results")
        ledger.hold(f"dh {last}", self.stream * T * (H + self.room_for_down(last - 1)))
        ledger.drop("d final x", "scaled dX", "final rstd", f"h {last}")

    # --- backward ------------------------------------------------------------------------------

    def room_for_down(self, i: int) -> int:
        """Columns beside the gradient of layer `i`'s output, for the one that reads it."""
        if i < 0 or self.layers[i][0].adds_apart or self.stream != BF16:
            return 0  # the embedding asks for none, nor does a sum, nor what casts its dY
        return self.layers[i][1].down.gradient_room(self.tile(i)[1])

    def backward(self, i: int, layer: LayerShape, groups: LayerGroups) -> None:
        """A layer's backward pass: from `dh i+1` to `dh i`."""
        ledger, again = self.ledger, self.modes[i] != OFF
        for j in (i, i - 1):  # the layer before comes back while this one is computed
            for name, size in self.on_host.get(j, {}).items():
                if f"{name} {j}" not in ledger.live:
                    ledger.drop(*(gone for names in self.leaving for gone in names))
                    ledger.hold(f"{name} {j}", size, KEPT)
        ledger.moment = f"backward of layer {i + 1}'s MLP"
        if layer.post_norms:  # through the norm; what came goes around it
            room = groups.down.gradient_room(self.tile(i)[1])
            ledger.hold("dd", BF16 * self.T * (layer.hidden + room))
            self.release(i, "d", "d rstd")
        elif layer.scaled:
            ledger.hold("dd", BF16 * self.T * layer.hidden)
        if again:
            self.o(i, layer, groups.o, again)
        self.mlp_backward(i, layer, groups)
        ledger.moment = f"backward of layer {i + 1}'s attention"
        self.o_backward(i, layer, groups.o)
        if again:
            self.qkv(i, layer, groups.qkv, again)
        self.attention_backward(i, layer)
        self.qkv_backward(i, layer, groups.qkv)
        self.gradients(i, groups, "attention")

    def release(self, i: int, *names: str) -> None:
        """A node of the graph is done; what has come from the host stays until the layer is."""
        fetched = self.on_host.get(i, {})
        self.ledger.drop(*(f"{name} {i}" for name in names if name not in fetched))

    def mlp_backward(self, i: int, layer: LayerShape, groups: LayerGroups) -> None:
        T, ledger, H, again = self.T, self.ledger, layer.hidden, self.modes[i] != OFF
        makes = self.makes_again(i)
        first, second = groups.gate_up, groups.down
        count, rows = self.tile(i)
        # Where dY has come without room for G, it may be copied to where it has.
        casts = self.casts_sums(layer)
        comes_without = layer.scaled or casts
        copies = comes_without and second.folds_backward(rows, copies_input=True)
        has_room = copies if comes_without else second.gradient_room(rows) > 0
        room_for_o = 0 if layer.adds_apart or casts else groups.o.gradient_room(T)
        self.keeps = set()
        if rows >= first.K:
            self.keeps = ({"first"} if makes else set()) | (
                {"first", "second"} if count > 1 else set()
            )
        for tile in range(min(count, 3)):  # those behind are as the third
            if makes:
                ledger.hold("again", (FP32 + BF16 * first.fold_forward) * rows)
                self.gate_up(i, first, rows)
                ledger.drop("again")
            if copies:
                ledger.hold("dd G", BF16 * rows * (H + second.fold_backward))
            elif casts:
                ledger.hold("dd G", BF16 * rows * H)
            if not has_room:
                ledger.hold("G", BF16 * rows * second.fold_backward)
            ledger.hold("dm", BF16 * rows * second.K)
            self.weight("second", second, second.backward_weight_bytes(has_room))
            self.gradients(i, groups, "mlp", more=tile > 0)
            ledger.drop("G", "dm", "dd G")
            folds = first.folds_backward(rows, copies_input=False)
            if not folds:
                ledger.hold("G", BF16 * rows * first.fold_backward)
            ledger.hold("dx", BF16 * rows * H)
            self.weight("first", first, first.backward_weight_bytes(folds))
            ledger.drop("G")
            if makes:
                ledger.drop(f"gu {i}")
            if tile == 0:
                ledger.hold("dh2", self.stream * T * (H + room_for_o))
            ledger.drop("dx")
        ledger.drop("W first", "W second", "more gradients", "dd", f"gu {i}", f"dh {i + 1}")
        self.release(i, *_OF_MLP)
        if not (again and layer.post_norms):  # there the stage keeps it until `a` is asked for
            ledger.drop(f"h2 {i}")

    def o_backward(self, i: int, layer: LayerShape, group: GroupShape) -> None:
        T, ledger = self.T, self.ledger
        room = group.gradient_room(T)
        if layer.post_norms:
            ledger.drop(f"h2 {i}")
            ledger.hold("da", BF16 * T * (group.N + room))
            self.release(i, "a", "a rstd")
        elif layer.scaled:
            ledger.hold("da", BF16 * T * group.N)
            room = group.fold_backward if group.folds_backward(T, copies_input=True) else 0
            if room:
                ledger.hold("da G", BF16 * T * (group.N + room))
        elif self.casts_sums(layer):
            room = group.gradient_room(T)
            ledger.hold("da G", BF16 * T * (group.N + room))
        if not room:
            ledger.hold("G", BF16 * T * group.fold_backward)
        ledger.hold("do", BF16 * T * group.K)
        ledger.brief(group.backward_weight_bytes(room > 0))
        ledger.drop("G", "da", "da G")
        self.release(i, "oA")

    def attention_backward(self, i: int, layer: LayerShape) -> None:
        """dq, dk and dv."""
        T, ledger, heads = self.T, self.ledger, layer.query_heads
        ledger.hold("dqkv", BF16 * T * sum(one.out_features for one in layer.qkv))
        ledger.brief(attention_workspace(T, layer))
        ledger.drop("do")
        self.release(i, "o", "lse", "k repeated", "v repeated", "bias")
        if self.modes[i] == OFF:
            ledger.drop(f"turned {i}")
        if layer.head_norms:
            size = BF16 * T * (heads + layer.key_value_heads) * layer.head_size
            ledger.brief(size)  # turned back, then through the norms: one copy at a time
            ledger.drop(f"turned {i}")
            self.release(i, "q rstd", "k rstd")
        ledger.drop(f"qkv {i}")

    def qkv_backward(self, i: int, layer: LayerShape, group: GroupShape) -> None:
        T, ledger, H = self.T, self.ledger, layer.hidden
        folds = group.folds_backward(T, copies_input=False)
        ledger.hold("dy G", BF16 * T * (group.N + group.fold_backward))
        ledger.hold("dx", BF16 * T * H)
        ledger.brief(group.backward_weight_bytes(folds))
        ledger.drop("dy G")
        ledger.hold(f"dh {i}", self.stream * T * (H + self.room_for_down(i - 1)))
        ledger.drop("dx", "dqkv", "dh2", *(f"{name} {i}" for name in _OF_LAYER))

    def gradients(
        self, i: int, groups: LayerGroups, block: str, first: bool = False, more: bool = False
    ) -> None:
        """Gradients of a block's adapters, where they are not there already.

        Those of A in one group are views of the one product [F, K] that they come from.

        Args:
            first: They are of a micro-batch before.
            more: They are another tile's, to be added; those of the tile before are still there.
        """
        if self.workload.accumulates and not (first or more):
            return
        name = "more gradients" if more else f"gradients {i} {block}"
        self.ledger.hold(name, gradient_bytes(self.workload, groups, block), ADAPTERS)


def gradient_bytes(workload: Workload, groups: LayerGroups, block: str) -> int:
    """Of the adapters of a block, `attention` or `mlp`."""
    size, total = workload.adapter_bytes, 0
    for group in (groups.qkv, groups.o) if block == "attention" else (groups.gate_up, groups.down):
        B = sum(rank * out for rank, out in zip(group.ranks, group.outs, strict=True))
        # down's comes from a kernel of its own, or from a product of just R rows
        rows = group.fold_backward if size == FP32 and group is not groups.down else group.rank
        total += size * (B + rows * group.K)
    return total


def attention_workspace(T: int, layer: LayerShape) -> int:
    """Of attention's backward: it sums dQ in fp32, and dK and dV of each query head apart."""
    heads = layer.query_heads
    width = heads * layer.head_size
    repeated = 2 * BF16 * T * width if heads != layer.key_value_heads else 0
    return FP32 * T * width + repeated + FP32 * T * heads


def _without_layer(name: str) -> str:
    """`h 3 leaving` -> `h leaving`."""
    return " ".join(word for word in name.split() if not word.isdigit())


def stock_memory(workload: Workload) -> Memory:
    """About what transformers and PEFT need without lorafuse, with gradient checkpointing.

    Kept are the layers' inputs h, 2 H bytes a token. Two moments compete. At the loss: log-softmax
    and two gradients of its size in fp32, 12 V bytes a token. In a layer's backward: its inputs
    of norms in fp32 and their outputs 12 H, q/k/v and the attention's output 2 N + 2 Hq D, the
    MLP's gate, its activation, up and their product 8 I, and in the MLP's backward as much again,
    beside a weight in bf16 and 4 H of gradients. (Without checkpointing those 12 H + 2 N + 2 Hq D +
    8 I of each layer agree with the growth from 512 to 2,048 tokens that was measured on an H100,
    Llama-3.1-8B, 2026-11-25: 184 kB a token and layer.) With a stream in fp32 h and what the norms
    read and write are twice as large, and autocast keeps a copy of the head in bf16.
    """
    workload = replace(workload, folded_weights=False)
    T, model = workload.rows, workload.model
    own = adapter_bytes(workload)
    h = workload.stream * T * model.hidden
    cast_head = BF16 * model.vocabulary * model.hidden * (workload.stream != BF16)
    fixed = {
        WEIGHTS: weight_bytes(workload),
        ADAPTERS: own * (2 if workload.accumulates else 1),
        OPTIMIZER: optimizer_bytes(workload),
        KEPT: h * (len(model.layers) + 1),
        BUFFERS: _CUBLAS_BYTES + h,
        LOSS: 0,
    }
    in_layer = 0
    for layer in model.layers:
        groups, H, inner = workload.groups(layer), layer.hidden, layer.intermediate
        state = (24 if layer.post_norms else 12) * H + 8 * inner + 2 * groups.qkv.N
        state += (workload.stream - BF16) * 4 * H
        state += layer.query_heads * (2 * layer.head_size + FP32)
        weight = BF16 * H * inner if workload.quant == "nf4" else 0
        in_layer = max(in_layer, T * (state + 8 * inner + 4 * H) + weight)
    at_buffers = fixed[BUFFERS] + in_layer
    moments = {
        "head and loss": fixed | {LOSS: 12 * T * model.vocabulary + cast_head},
        f"backward of layer {len(model.layers)}": fixed | {BUFFERS: at_buffers},
        "backward of layer 1": fixed | {BUFFERS: at_buffers, KEPT: h, ADAPTERS: 2 * own},
    }
    moment, parts = max(moments.items(), key=lambda one: sum(one[1].values()))
    return Memory(sum(parts.values()), parts, moment, 0)
