"""How `lorafuse families` tells its results: a table for the terminal, and one in Markdown."""

from collections.abc import Iterator

import torch
from rich.table import Table

from lorafuse.plugin.environment import versions
from lorafuse.plugin.families import Families
from lorafuse.plugin.family_trial import LEVELS, LOSS, TOLERANCE, Family

COLUMNS = {
    "MLP": "lora_mlp",
    "q/k/v": "lora_qkv",
    "o": "lora_o",
    "norms": "rms_norm",
    "RoPE": "rope",
    "experts": "moe",
    "loss": LOSS,
}
# Characters of a reason in a table's cell; `--json` has the whole.
REASON = 160
MEANING = {
    "layer": "every decoder layer is fused whole",
    "parts": "the operations shown are fused, each on its own or some layers whole",
    "stock": "no block is fused: it trains as stock",
    "wrong": "loss or a gradient differs from stock",
    "crashed": "the stock step works and the fused one does not",
    "not built": "no stock step: the class refuses to be tiny, to train on text alone, or LoRA",
}


def table(families: Families) -> Table:
    """One row a family."""
    found = Table(title=summary(families), title_justify="left")
    found.add_column("family", no_wrap=True)
    found.add_column("level", no_wrap=True)
    for column in ("layers", *COLUMNS):
        found.add_column(column, justify="right", no_wrap=True)
    found.add_column("what runs as stock, and why", overflow="fold")
    for family in families.families:
        found.add_row(family.model_type, family.level, *_cells(family), _reason(family))
    return found


def summary(families: Families) -> str:
    """The counts in a line."""
    levels = families.levels
    counts = ", ".join(f"{levels[level]} {level}" for level in LEVELS if levels[level])
    return f"{len(families.families)} families: {counts}"


def coverage(families: Families) -> str:
    """How many of those with the usual blocks have them fused."""
    covered, expected = len(families.covered), len(families.expected)
    share = f" ({100 * covered / expected:.0f} %)" if expected else ""
    return (
        f"Of the {expected} families whose blocks hold a gated MLP and q/k/v/o attention, "
        f"{covered} fuse at least MLP, q/k/v and o{share}."
    )


def markdown(families: Families) -> str:
    """The page FAMILIES.md."""
    return "\n".join(_lines(families)) + "\n"


def _lines(families: Families) -> Iterator[str]:
    yield "# Families"
    yield ""
    yield "Written by `lorafuse families --markdown FAMILIES.md`; do not edit it."
    yield ""
    found = versions()
    yield (
        f"{families.when.date().isoformat()}, transformers {found['transformers']}, peft "
        f"{found['peft']}, torch {torch.__version__}, on the CPU. Each class of transformers' "
        "mapping for causal LMs, as a tiny model with random weights and LoRA on the linear "
        "layers that PEFT adapts (in many mixtures of experts not the dense MLPs) and on experts "
        "kept in one weight, makes the same fp32 step stock and fused; loss and every adapter's "
        "gradient may "
        f"differ by {TOLERANCE:.0e}."
    )
    yield ""
    yield "| level | families | meaning |"
    yield "|---|---|---|"
    for level in LEVELS:
        yield f"| {level} | {families.levels[level]} | {MEANING[level]} |"
    yield ""
    yield coverage(families)
    yield ""
    yield (
        "`layers`: decoder layers fused whole, of those with adapters. The other columns: modules "
        "fused and called, of those that offer themselves."
    )
    yield ""
    header = ["family", "class", "level", "layers", *COLUMNS, "what runs as stock, and why"]
    yield f"| {' | '.join(header)} |"
    yield "|---" * len(header) + "|"
    for family in families.families:
        cells = [family.model_type, family.model_class, family.level, *_cells(family)]
        reason = _reason(family).replace("|", "\\|").replace("<", "\\<")
        yield f"| {' | '.join(cells)} | {reason} |"


def _cells(family: Family) -> list[str]:
    layers = f"{family.whole_layers}/{family.layers}" if family.layers else ""
    counts = [family.fused.get(name) for name in COLUMNS.values()]
    return [layers, *("" if count is None else f"{count[0]}/{count[1]}" for count in counts)]


def _reason(family: Family) -> str:
    reason = family.reason
    return reason if len(reason) <= REASON else reason[: REASON - 1].rstrip() + "…"
