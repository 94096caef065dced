"""`lorafuse plan`: peak memory and relative time of a training step, predicted without a GPU.

`plan_memory` goes through the step allocation by allocation, `plan_time` counts FLOP and bytes;
here each checkpointing mode is asked of both, and what fits on which card is searched for.
GB = 1e9 bytes throughout.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from lorafuse.patches.layer_sizes import LayerSizes
from lorafuse.patches.memory_plan import EVERY_OTHER, Batch, Decision, Spill, spare_bytes
from lorafuse.patches.modes import MODES, OFFLOAD, SELECTIVE
from lorafuse.patches.spilling import Rates
from lorafuse.plugin.plan_groups import BF16, Workload, shown
from lorafuse.plugin.plan_memory import PARTS, STOCK, Memory, Step, gradient_bytes, stock_memory
from lorafuse.plugin.plan_model import LayerShape
from lorafuse.plugin.plan_time import GEMM_FLOPS, PCIE_BYTES, relative_times, step_seconds

__all__ = [
    "ALL_MODES",
    "CARDS",
    "MODES",
    "PARTS",
    "Auto",
    "Plan",
    "Prediction",
    "Workload",
    "auto_decision",
    "kept_after_forward",
    "layer_sizes",
    "longest_tokens",
    "plan",
    "predict",
    "usable_bytes",
]

ALL_MODES = (*MODES, STOCK)
CARDS = (16, 24, 48, 80, 141)  # GB
# Not the allocator's: the CUDA context, loaded kernels of cuBLAS, cuDNN and Triton.
CONTEXT_BYTES = 800_000_000
# Of the rest, what fragments between tensors may take.
FRAGMENTED = 0.03
# Rows of a batch are searched in steps of so many tokens, up to so many.
STEP_TOKENS = 64
MOST_TOKENS = 2**22
GB = 1e9


@dataclass(frozen=True)
class Prediction:
    """One mode's step.

    Attributes:
        mode: One of `ALL_MODES`.
        peak_bytes: The most that torch's allocator has given out at once, as
            `torch.cuda.max_memory_allocated` measures it.
        parts: Bytes of the peak by `PARTS`.
        moment: When the peak is.
        host_bytes: Pinned memory on the host.
        relative_time: Of a step, `off` being 1; None for stock, which is not modelled.
        spilled: Layers whose gate/up waits on the host, as it does where there is room.
        host_least_bytes: Of the host, where layers that offload compute attention again.
    """

    mode: str
    peak_bytes: int
    parts: dict[str, int]
    moment: str
    host_bytes: int
    relative_time: float | None
    spilled: int = 0
    host_least_bytes: int = 0


@dataclass(frozen=True)
class Auto:
    """What `fused_checkpointing: auto` does once the optimiser has its states.

    Attributes:
        card_GB: Nominal size of the GPU, or the budget (`fused_memory_gb`).
        is_budget: The latter.
        layers: How many layers are in which mode; in the order of the forward pass.
        spilled: Of them, those whose gate/up waits on the host.
        peak_bytes, host_bytes, relative_time: As those of `Prediction`.
        fits: Whether the peak is within what is usable.
    """

    card_GB: float
    is_budget: bool
    layers: dict[str, int]
    spilled: int
    peak_bytes: int
    host_bytes: int
    relative_time: float
    fits: bool


@dataclass(frozen=True)
class Plan:
    """Of a workload: all modes, and what fits.

    Attributes:
        workload: The step.
        predictions: One for each of `ALL_MODES`, in that order.
        roomy: `selective` and `offload` on a card and a host that have room.
        auto: By card, and for the budget where there is one.
        longest: By mode and card (GB): tokens of a row that fit with this batch; 0: none do.
        host_GB: The host's memory that `longest` respects, or None.
        notes: What else is to be said, from reading the settings.
    """

    workload: Workload
    predictions: tuple[Prediction, ...]
    roomy: tuple[Prediction, ...]
    auto: tuple[Auto, ...]
    longest: dict[str, dict[int, int]]
    host_GB: float | None = None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON: sizes in bytes, and everything that was assumed."""
        workload = self.workload
        settings = {
            name: getattr(workload, name)
            for name in (
                "tokens", "batch", "documents", "rank", "quant", "double_quant", "prepare_kbit",
                "optimizer", "adapter_bytes", "accumulates",
            )
        }  # fmt: skip
        return {
            "model": workload.model.name,
            "layers": len(workload.model.layers),
            "parameters": workload.model.parameters,
            "targets": shown(workload.targets),
            **settings,
            "modes": [asdict(one) for one in self.predictions],
            "with_room": [asdict(one) for one in self.roomy],
            "auto": [asdict(one) for one in self.auto],
            "usable_bytes": {str(card): usable_bytes(card) for card in CARDS},
            "longest_tokens": {
                mode: {str(card): tokens for card, tokens in cards.items()}
                for mode, cards in self.longest.items()
            },
            "host_GB": self.host_GB,
            "notes": list(self.notes),
        }


def predict(workload: Workload, mode: str, spilled: Sequence[bool] = ()) -> Memory:
    """Memory of one step.

    Args:
        workload: The step.
        mode: One of `ALL_MODES`.
        spilled: Of each layer, whether its gate/up waits on the host; empty: of none.

    Raises:
        ValueError: There is no such mode.
    """
    return stock_memory(workload) if mode == STOCK else Step(workload, mode, spilled).run()


def kept_after_forward(workload: Workload, mode: str = "off") -> dict[str, int]:
    """Bytes by tensor that wait for backward when the loss is known, all layers together."""
    return Step(workload, mode).run().kept


def usable_bytes(card_GB: float) -> int:
    """What a step may allocate on a card of a nominal size.

    The nominal size counts as 1e9 bytes a GB. Of it go 0.8 GB for the CUDA context and the loaded
    kernels, and 3 % for fragments between tensors (with `expandable_segments:True`, as Axolotl
    sets it).
    """
    return int((1 - FRAGMENTED) * (card_GB * GB - CONTEXT_BYTES))


def layer_sizes(workload: Workload, layer: LayerShape) -> LayerSizes:
    """The layer as `auto` sees it."""
    groups = workload.groups(layer)
    heads = layer.query_heads
    qkv, o, gate_up, down = (group.fold_forward for group in groups)
    return LayerSizes(
        hidden=layer.hidden,
        qkv=groups.qkv.N,
        attention=groups.o.K,
        gate_up=groups.gate_up.N,
        rotated=(heads + layer.key_value_heads) * layer.head_size if layer.head_norms else 0,
        folds=(qkv, o, gate_up, down),
        heads=heads,
        shares_heads=heads != layer.key_value_heads,
        norms_behind=layer.post_norms,
        scaled=layer.scaled,
        window=layer.window,
        gradients=sum(gradient_bytes(workload, groups, block) for block in ("attention", "mlp")),
    )


def batch_of(workload: Workload, host_bytes: float = float("inf")) -> Batch:
    """The step as `auto` sees it."""
    return Batch(
        [layer_sizes(workload, layer) for layer in workload.model.layers],
        workload.rows, BF16, workload.tokens, workload.model.vocabulary, workload.accumulates,
        host_bytes, workload.stream,
    )  # fmt: skip


def spill_of(host_bytes: float) -> Spill:
    """With the rates of the H100 that times are of, which decide how many layers' gate/up wait."""
    return Spill(Rates(GEMM_FLOPS, PCIE_BYTES), host_bytes)


def auto_decision(
    workload: Workload,
    card_GB: float,
    budget_GB: float | None = None,
    host_bytes: float = float("inf"),
) -> Decision:
    """What `auto` gives each layer.

    Args:
        workload: The step.
        card_GB: Nominal size of the GPU.
        budget_GB: `fused_memory_gb`.
        host_bytes: Of the host, that may be pinned.
    """
    step = Step(workload, MODES[0])
    step.begin()
    allocated, total = step.ledger.total, card_GB * GB
    free = spare_bytes(
        total - CONTEXT_BYTES - allocated, total, allocated,
        None if budget_GB is None else budget_GB * GB,
    )  # fmt: skip
    return batch_of(workload, host_bytes).plan(free, spill=spill_of(host_bytes))


def _auto(workload: Workload, size_GB: float, is_budget: bool, host_bytes: float) -> Auto:
    """`auto` on a card, or with a budget on one that has more."""
    card_GB, budget_GB = (2 * size_GB + 2, size_GB) if is_budget else (size_GB, None)
    modes, spilled = auto_decision(workload, card_GB, budget_GB, host_bytes)
    memory = Step(workload, modes, spilled).run()
    time = step_seconds(workload, modes, spilled) / step_seconds(workload, MODES[0])
    usable = int(size_GB * GB) if is_budget else usable_bytes(size_GB)
    return Auto(
        size_GB, is_budget, {mode: modes.count(mode) for mode in reversed(MODES) if mode in modes},
        sum(spilled), memory.peak_bytes, memory.host_bytes, time, memory.peak_bytes <= usable,
    )  # fmt: skip


def with_room(workload: Workload, mode: str, host_bytes: float) -> Prediction:
    """A mode where memory is free: gate/up of some layers waits on the host."""
    modes = [mode] * len(workload.model.layers)
    host = host_bytes - Step(workload, mode).embeddings_on_host()
    spilled = batch_of(workload).spilled(modes, float("inf"), spill_of(host), EVERY_OTHER)
    memory = predict(workload, mode, spilled)
    time = step_seconds(workload, modes, spilled) / step_seconds(workload, MODES[0])
    return Prediction(
        mode, memory.peak_bytes, memory.parts, memory.moment, memory.host_bytes, time, sum(spilled)
    )


def longest_tokens(
    workload: Workload, mode: str, limit_bytes: int, host_bytes: float = float("inf")
) -> int:
    """The most tokens of a row, a multiple of 64, whose step fits; 0 where 64 do not.

    64 tokens more do not fit. (Memory falls a little where the logits first need a second chunk;
    a longer row may fit there too.)

    Args:
        workload: All but its tokens count.
        mode: One of `ALL_MODES`.
        limit_bytes: Of the GPU.
        host_bytes: Of the host, for what `offload` puts there at least.
    """

    def excess(steps: int) -> float:
        memory = predict(replace(workload, tokens=steps * unit), mode)
        return max(memory.peak_bytes - limit_bytes, memory.host_least_bytes - host_bytes)

    unit = STEP_TOKENS * -(-2 * workload.documents // STEP_TOKENS)
    return unit * _last_below_zero(excess, MOST_TOKENS // unit)


def _last_below_zero(f: Callable[[int], float], most: int) -> int:
    """The largest n up to `most` with f(n) <= 0, for a rising f that is almost straight; 0: none.

    Straight lines through the bracket's ends find it in a few calls, halves of it guard against
    bends.
    """
    low, f_low = 1, f(1)
    if f_low > 0:
        return 0
    high, f_high = most, f(most)
    if f_high <= 0:
        return most
    halve = False
    while high - low > 1:
        middle = (low + high) // 2
        if not halve and f_high > f_low:
            middle = low + int((high - low) * (-f_low / (f_high - f_low)))
        middle = min(max(middle, low + 1), high - 1)
        width, value = high - low, f(middle)
        if value <= 0:
            low, f_low = middle, value
            if high - low > 1 and not halve:
                beyond = f(low + 1)
                if beyond > 0:
                    return low
                low, f_low = low + 1, beyond
        else:
            high, f_high = middle, value
        halve = high - low > width // 2
    return low


def plan(
    workload: Workload,
    cards: Sequence[int] = CARDS,
    host_GB: float | None = None,
    notes: Sequence[str] = (),
    memory_GB: float | None = None,
) -> Plan:
    """All modes of a workload, and the longest rows that fit on each card.

    Args:
        workload: The step.
        cards: Nominal sizes, GB.
        host_GB: Memory of the host that `offload` may pin; None: as much as it takes.
        notes: Handed on.
        memory_GB: `fused_memory_gb`: `auto` with this budget, too.
    """
    times = relative_times(workload)
    predictions = []
    for mode in ALL_MODES:
        memory = predict(workload, mode)
        predictions.append(
            Prediction(
                mode, memory.peak_bytes, memory.parts, memory.moment, memory.host_bytes,
                times.get(mode), 0, memory.host_least_bytes,
            )
        )  # fmt: skip
    host_bytes = float("inf") if host_GB is None else host_GB * GB
    longest = {
        mode: {
            card: longest_tokens(workload, mode, usable_bytes(card), host_bytes) for card in cards
        }
        for mode in ALL_MODES
    }
    auto = [_auto(workload, card, False, host_bytes) for card in cards]
    if memory_GB is not None:
        auto.append(_auto(workload, memory_GB, True, host_bytes))
    roomy = tuple(with_room(workload, mode, host_bytes) for mode in (SELECTIVE, OFFLOAD))
    return Plan(workload, tuple(predictions), roomy, tuple(auto), longest, host_GB, tuple(notes))
