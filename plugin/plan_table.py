"""How `lorafuse plan` tells its prediction: two tables, and the lines around them."""

from collections.abc import Iterator

from rich.table import Table

from lorafuse.plugin.plan_groups import ALL_LINEAR, Workload, shown
from lorafuse.plugin.plan_memory import PARTS, STOCK
from lorafuse.plugin.planner import (
    CONTEXT_BYTES,
    FRAGMENTED,
    GB,
    MOST_TOKENS,
    Plan,
    Prediction,
    usable_bytes,
)

_LABELS = {STOCK: "≈ stock, checkpointing"}


def describe(workload: Workload) -> str:
    """One line for people: model and shapes."""
    weights = "bf16" if workload.quant == "none" else "NF4"
    if workload.quant == "nf4" and not workload.double_quant:
        weights += " without double quantisation"
    if workload.prepare_kbit:
        weights += ", the rest in fp32"
    on = "" if workload.targets == ALL_LINEAR else f" on {shown(workload.targets)}"
    packed = f", {workload.documents} documents a row" if workload.documents > 1 else ""
    adam = "8-bit AdamW" if workload.optimizer == "adamw_8bit" else "AdamW"
    accumulates = ", gradients accumulated" if workload.accumulates else ""
    return (
        f"{workload.model.name} ({len(workload.model.layers)} layers, "
        f"{workload.model.parameters / 1e9:.2f} billion parameters), {weights}, LoRA "
        f"r={workload.rank}{on}, {workload.batch} × {workload.tokens:,} tokens{packed}, "
        f"{adam}{accumulates}"
    )


def modes_table(plan: Plan) -> Table:
    """One row a mode: the peak, what it consists of, and the time of a step."""
    found = Table(title=describe(plan.workload), title_justify="left")
    found.add_column("fused_checkpointing", no_wrap=True)
    for column in ("peak\nGB", *(part.replace(" ", "\n") for part in PARTS), "host\nGB", "time"):
        found.add_column(column, justify="right", no_wrap=True)
    roomy = {one.mode: one for one in plan.roomy if one.spilled}
    rows = []
    for one in plan.predictions:
        rows.append((label(one.mode), one))
        if one.mode in roomy:
            rows.append((f"{one.mode}, with room", roomy[one.mode]))
    for name, one in rows:
        found.add_row(
            name,
            _gigabytes(one.peak_bytes),
            *(_gigabytes(one.parts[part]) for part in PARTS),
            _gigabytes(one.host_bytes) if one.host_bytes else "–",
            "–" if one.relative_time is None else f"{one.relative_time:.2f}",
        )
    return found


def cards_table(plan: Plan) -> Table:
    """One row a mode: the longest row of tokens that fits each card, and whether this one does."""
    batch = plan.workload.batch
    found = Table(
        title=f"longest row in tokens, {batch} a micro-batch (✓: {plan.workload.tokens:,} fit)",
        title_justify="left",
    )
    found.add_column("fused_checkpointing", no_wrap=True)
    for card in next(iter(plan.longest.values())):
        found.add_column(
            f"{card} GB\n({usable_bytes(card) / GB:.1f})", justify="right", no_wrap=True
        )
    for one in plan.predictions:
        cards = plan.longest[one.mode]
        found.add_row(label(one.mode), *(_fits(one, plan, card) for card in cards))
    return found


def auto_table(plan: Plan) -> Table:
    """One row a card: what `auto` chooses, the peak and the time of a step."""
    found = Table(title="what auto chooses (✓: it fits)", title_justify="left")
    found.add_column("auto on", no_wrap=True)
    found.add_column("layers, first to last", no_wrap=True)
    for column in ("peak\nGB", "host\nGB", "time"):
        found.add_column(column, justify="right", no_wrap=True)
    for one in plan.auto:
        size = f"{one.card_GB:g} GB"
        found.add_row(
            f"fused_memory_gb {one.card_GB:g}" if one.is_budget else size,
            ", ".join(f"{count} {mode}" for mode, count in one.layers.items())
            + (f"; gate/up of {one.spilled} on the host" if one.spilled else ""),
            f"✓ {_gigabytes(one.peak_bytes)}" if one.fits else _gigabytes(one.peak_bytes),
            _gigabytes(one.host_bytes) if one.host_bytes else "–",
            f"{one.relative_time:.2f}",
        )
    return found


def lines_below(plan: Plan) -> Iterator[str]:
    """What the numbers mean and assume."""
    yield (
        "A prediction, not a measurement. peak: what torch.cuda.max_memory_allocated would say, "
        "split as it is at that moment; GB: 1e9 bytes; time: of a step, beside `off`, from FLOP "
        "and bytes at an H100's rates; host: pinned memory that `offload` fills"
    )
    yield (
        f"of a card's nominal size {CONTEXT_BYTES / GB:.1f} GB go to the CUDA context and loaded "
        f"kernels, and {FRAGMENTED:.0%} of the rest to fragments between tensors; what is left is "
        "in brackets"
    )
    yield (
        "auto, the default, gives each layer the fastest mode that its own estimate has room for, "
        "with 4 % of the card to spare; its longest row is that of offload"
    )
    moments = {one.mode: one.moment for one in plan.predictions if one.mode != STOCK}
    yield "when the peak is: " + "; ".join(f"{mode}: {when}" for mode, when in moments.items())
    longest = plan.workload.model.longest
    if longest and any(
        tokens > longest for cards in plan.longest.values() for tokens in cards.values()
    ):
        yield f"the model was made for {longest:,} positions: longer rows may fit, but not help"
    roomy = {one.mode: one.spilled for one in plan.roomy if one.spilled}
    if roomy:
        layers = ", ".join(f"{count} under {mode}" for mode, count in roomy.items())
        yield (
            "with room: where half of the card and of the host stays free, gate/up of some layers "
            f"waits on the host instead of being computed again ({layers}; so many on an H100 with "
            "PCIe 5: as many as the link carries beside the GPU's work)"
        )
    if plan.host_GB is not None:
        yield (
            f"offload: with {plan.host_GB:g} GB of the host's memory to pin; where that is too "
            "little for all that it keeps, layers compute attention again, too"
        )
    for note in plan.notes:
        yield f"note: {note}"


def label(mode: str) -> str:
    """The mode as the table names it."""
    return _LABELS.get(mode, mode)


def _fits(one: Prediction, plan: Plan, card: int) -> str:
    tokens = plan.longest[one.mode][card]
    host_fits = plan.host_GB is None or one.host_least_bytes <= plan.host_GB * GB
    fits = one.peak_bytes <= usable_bytes(card) and host_fits
    shown = "–" if not tokens else f"{tokens:,}"
    if tokens >= MOST_TOKENS:
        shown = f"≥ {MOST_TOKENS:,}"
    return f"✓ {shown}" if fits else shown


def _gigabytes(size: int) -> str:
    return f"{size / GB:.2f}"
