"""How `lorafuse families` tells its results: a table for the terminal, and one in Markdown."""

from collections.abc import Iterator, Mapping

import torch
from rich.table import Table

from lorafuse.plugin.environment import versions
from lorafuse.plugin.families import Families
from lorafuse.plugin.family_trial import LEVELS, LOSS, NOT_BUILT, TOLERANCE, Family

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


IMAGE_MEANING = MEANING | {
    "layer": "every decoder layer of the text tower is fused whole",
    "parts": "the operations shown are fused, in the text tower or the vision tower",
    "not built": "no stock step: the class refuses to be tiny, wants a package that is not here, "
    "or takes no image and text with labels",
}
# Of the vision tower of an image-text model.
VISION_COLUMNS = {
    "vision MLP": "lora_mlp",
    "vision q/k/v": "lora_qkv",
    "vision o": "lora_o",
    "vision norms": "rms_norm",
}
IMAGES = "## Images and text"


def tables(families: Families) -> list[Table]:
    """One row a family; a table for each of the two mappings that has any."""
    parts = [families.of(images) for images in (False, True)]
    return [_table(part) for part in parts if part.families]


def _table(families: Families) -> Table:
    found = Table(title=summary(families), title_justify="left")
    found.add_column("family", no_wrap=True)
    found.add_column("level", no_wrap=True)
    for column in _columns(families):
        found.add_column(column, justify="right", no_wrap=True)
    found.add_column("what runs as stock, and why", overflow="fold")
    for family in families.families:
        found.add_row(family.model_type, family.level, *_cells(family), _reason(family))
    return found


def summary(families: Families) -> str:
    """The counts in a line."""
    levels = families.levels
    counts = ", ".join(f"{levels[level]} {level}" for level in LEVELS if levels[level])
    what = " of images and text" if any(f.images for f in families.families) else ""
    return f"{len(families.families)} families{what}: {counts}"


def coverage(families: Families) -> str:
    """How many of those with the usual blocks have them fused."""
    covered, expected = len(families.covered), len(families.expected)
    share = f" ({100 * covered / expected:.0f} %)" if expected else ""
    return (
        f"Of the {expected} families whose blocks hold a gated MLP and q/k/v/o attention, "
        f"{covered} fuse at least MLP, q/k/v and o{share}."
    )


def markdown(families: Families, page: str = "") -> str:
    """The page FAMILIES.md.

    Args:
        families: of one mapping, or of both.
        page: as it was: the part of a mapping that was not tried stays.
    """
    before, heading, after = page.partition(f"{IMAGES}\n")
    causal, images = families.of(images=False), families.of(images=True)
    if causal.families or not before:
        before = "\n".join(_lines(causal)) + "\n\n"
    if images.families:
        heading, after = f"{IMAGES}\n", "\n".join(_image_lines(images)) + "\n"
    return f"{before.rstrip()}\n\n{heading}{after}" if heading else f"{before.rstrip()}\n"


def _lines(families: Families) -> Iterator[str]:
    yield "# Families"
    yield ""
    yield "Written by `lorafuse families --markdown FAMILIES.md`; do not edit it."
    yield ""
    refused = [f"{one.model_class} ({one.padded})" for one in families.families if one.padded]
    yield (
        f"{_when(families)} Each class of transformers' "
        "mapping for causal LMs, as a tiny model with random weights and LoRA on the linear "
        "layers that PEFT adapts (in many mixtures of experts not the dense MLPs) and on experts "
        "kept in one weight, makes the same fp32 step stock and fused, on whole rows and on padded "
        "ones with and without labels on the padding; loss and every adapter's gradient may "
        f"differ by {TOLERANCE:.0e}."
        + (f" Not on padded rows, which they refuse: {', '.join(refused)}." if refused else "")
    )
    yield from _counts(families, MEANING)
    yield (
        "`layers`: decoder layers fused whole, of those with adapters. The other columns: modules "
        "fused and called, of those that offer themselves."
    )
    yield from _rows(families)


def _image_lines(families: Families) -> Iterator[str]:
    yield ""
    yield (
        f"{_when(families)} Each class of transformers' mapping for images and text, with LoRA on "
        "the linear layers of the text tower, the vision tower and what joins them, makes a step "
        "on rows with images of several sizes beside a row of text and padding, and one on text "
        "alone where it takes that."
    )
    yield from _counts(families, IMAGE_MEANING)
    yield (
        "`layers` to `loss` are the text tower's, the columns of `vision` those of the vision "
        "tower and the projector; `text`: the step on text alone was made, too."
    )
    yield from _rows(families)


def _when(families: Families) -> str:
    found = versions()
    return (
        f"{families.when.date().isoformat()}, transformers {found['transformers']}, peft "
        f"{found['peft']}, torch {torch.__version__}, on the CPU."
    )


def _counts(families: Families, meaning: Mapping[str, str]) -> Iterator[str]:
    yield ""
    yield "| level | families | meaning |"
    yield "|---|---|---|"
    for level in LEVELS:
        yield f"| {level} | {families.levels[level]} | {meaning[level]} |"
    yield ""
    yield coverage(families)
    yield ""


def _rows(families: Families) -> Iterator[str]:
    yield ""
    header = ["family", "class", "level", *_columns(families), "what runs as stock, and why"]
    yield f"| {' | '.join(header)} |"
    yield "|---" * len(header) + "|"
    for family in families.families:
        cells = [family.model_type, family.model_class, family.level, *_cells(family)]
        reason = _reason(family).replace("|", "\\|").replace("<", "\\<")
        yield f"| {' | '.join(cells)} | {reason} |"


def _columns(families: Families) -> list[str]:
    if not any(family.images for family in families.families):
        return ["layers", *COLUMNS]
    return ["text", "layers", *COLUMNS, "vision layers", *VISION_COLUMNS]


def _cells(family: Family) -> list[str]:
    cells = [_share(family.whole_layers, family.layers)]
    cells += [_share(*family.fused.get(name, (0, 0))) for name in COLUMNS.values()]
    if not family.images:
        return cells
    tried = "" if family.level == NOT_BUILT or family.text_alone else "yes"
    vision = [_share(*family.vision.get(name, (0, 0))) for name in VISION_COLUMNS.values()]
    return [tried, *cells, _share(*family.vision_layers), *vision]


def _share(part: int, whole: int) -> str:
    return f"{part}/{whole}" if whole else ""


def _reason(family: Family) -> str:
    reason = family.reason
    return reason if len(reason) <= REASON else reason[: REASON - 1].rstrip() + "…"
