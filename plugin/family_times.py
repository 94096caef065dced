"""The README's table of steps at released widths, from what `lorafuse bench --json` has written.

Each family was run twice: with `--checkpointing --flag fused_checkpointing=selective`, and with
`--no-checkpointing --flag fused_checkpointing=off`. All files of a folder are read in the order of
their names; a later one comes before an earlier one of the same model and kind. The rows stand in
the order of `BY_NAME` (those with images last), between two marks in the README.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lorafuse.plugin.bench_table import gigabytes
from lorafuse.plugin.errors import FuseConfigError
from lorafuse.plugin.geometries import BY_NAME, layers_of

BEGIN = (
    "<!-- family times: written by `lorafuse families --readme README.md --measured "
    "integration_tests/gpu/measured/families`; do not edit -->"
)
END = "<!-- end of the family times -->"
# `fused_checkpointing` beside stock with gradient checkpointing, and without.
MODES = {True: "selective", False: "off"}
COLUMNS = (
    "family", "layers", "stock, checkpointing: ms, GB", "lorafuse, `selective`", "×",
    "stock, all kept: ms, GB", "lorafuse, `off`", "×", "Δ loss, 1st step",
    "its gradient norm, fused / stock",
    "fused", "proofs, s",
)  # fmt: skip
# In a row, the operations of the report.
OPERATIONS = {
    "lora_mlp": "MLP", "lora_qkv": "q/k/v", "lora_o": "o", "rms_norm": "norms", "rope": "RoPE",
    "moe": "experts", "cross_entropy": "loss",
}  # fmt: skip
NOTHING = "–"
# One model's results, as `Results.to_dict` has them.
Measured = dict[str, Any]
# With gradient checkpointing, and without.
Pair = dict[bool, Measured]


def read(folder: Path) -> dict[str, Pair]:
    """The results in a folder's files, by the model's name.

    Raises:
        FuseConfigError: There are none, or lorafuse ran in another mode than the table is of.
    """
    found: dict[str, Pair] = {}
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text("utf-8"))
        for one in content.get("models", [content]):
            arguments = one["arguments"]
            checkpointing = arguments["checkpointing"]
            mode = arguments["flags"].get("fused_checkpointing")
            mode = "off" if mode is False else mode  # as YAML reads a bare `off`
            if mode != MODES[checkpointing]:
                raise FuseConfigError(
                    f"{path}: {arguments['model']} was measured with fused_checkpointing={mode}; "
                    f"the table is of {MODES[checkpointing]} with checkpointing={checkpointing}"
                )
            found.setdefault(arguments["model"], {})[checkpointing] = one
    if not found:
        raise FuseConfigError(f"{folder} holds no results of `lorafuse bench --json`")
    return found


def block(folder: Path) -> str:
    """The table with what all its rows have in common, as Markdown."""
    found = read(folder)
    order = [*BY_NAME, *found]
    names = sorted(found, key=order.index)
    usual = Counter(_shape(_any(found[name])) for name in names).most_common(1)[0][0]
    lines = [_common(list(found.values()), usual), "", f"| {' | '.join(COLUMNS)} |"]
    lines.append("|---" * len(COLUMNS) + "|")
    lines += [f"| {' | '.join(_row(name, found[name], usual))} |" for name in names]
    return "\n".join(lines)


def inserted(readme: str, folder: Path) -> str:
    """The README's text with this table between its marks.

    Raises:
        FuseConfigError: The marks are not there, or the results are not.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise FuseConfigError(f"the README has no two lines {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n{block(folder)}\n{END}{after}"


def _common(pairs: Sequence[Pair], usual: tuple[int, int]) -> str:
    """Of all rows: weights, batch, GPU, versions, dates."""
    runs = [one for pair in pairs for one in pair.values()]

    def each(values: Iterator[Any]) -> str:
        return ", ".join(sorted({str(value) for value in values}))

    weights = {"nf4": "NF4 (experts in bf16)", "none": "bf16"}
    quants = each(weights[one["arguments"]["quant"]] for one in runs)
    ranks = each(one["arguments"]["rank"] for one in runs)
    packages = ", ".join(
        f"{name} {each(one['versions'][name] for one in runs)}"
        for name in ("torch", "transformers")
    )
    said = (
        f"{quants}, LoRA r={ranks}, {usual[0]} × {usual[1]:,} tokens where the "
        f"row does not say otherwise; {each(one['gpu'] or 'CPU' for one in runs)}, {packages}, "
        f"{each(one['date'][:10] for one in runs)}."
    )
    if any(_first(one).get("images") for one in runs):
        said += (
            " With images: layers of the text tower and of the vision tower, LoRA on both, and the "
            "images' tokens count as tokens."
        )
    return said


def _first(one: Measured) -> dict[str, Any]:
    """The first round that ended well, of any system; empty: there is none."""
    return next((system["rounds"][0] for system in one["systems"].values() if system["rounds"]), {})


def _any(pair: Pair) -> Measured:
    return next(iter(pair.values()))


def _shape(one: Measured) -> tuple[int, int]:
    return one["arguments"]["batch"], one["arguments"]["tokens"]


def _row(name: str, pair: Pair, usual: tuple[int, int]) -> list[str]:
    first = next(filter(None, map(_first, pair.values())), {})
    attention, images = first.get("attention", "sdpa"), first.get("images")
    geometry = BY_NAME.get(name)
    said = [geometry.family or name if geometry else Path(name).name]
    if (shape := _shape(_any(pair))) != usual:
        said.append(f"{shape[0]} × {shape[1]:,}")
    if attention != "sdpa":
        said.append(f"{attention} attention")
    if images is not None:
        said.append(images)
    layers = _any(pair)["arguments"]["layers"]
    cells = [", ".join(said), "all" if layers is None else str(layers)]
    if layers is not None and geometry:
        whole = layers_of(geometry.config())
        cells[1] = " and ".join(f"{min(layers, most)} of {most}" for most in whole)
    for checkpointing in MODES:
        systems = pair.get(checkpointing, {"systems": {}})["systems"]
        cells += [_cell(systems.get(system)) for system in ("stock", "lorafuse")]
        ratio = systems.get("lorafuse", {}).get("ratio")
        cells.append(NOTHING if ratio is None else f"{ratio:.2f}")
    return [*cells, *_parity(pair), *_what_is_fused(pair)]


def _cell(one: Measured | None) -> str:
    if one is None:
        return NOTHING
    if one["status"] != "ok":
        return str(one["status"])
    return f"{one['step_ms']:.0f}, {gigabytes(one['peak_allocated_GB'])}"


def _ours(pair: Pair) -> list[Measured]:
    """lorafuse's runs that ended well, the one that keeps all first."""
    ours = [pair[kind]["systems"].get("lorafuse") for kind in (False, True) if kind in pair]
    return [one for one in ours if one is not None and one["status"] == "ok"]


def _parity(pair: Pair) -> list[str]:
    """Of the first step, and of that run which is farther from stock."""
    compared = [one for one in _ours(pair) if "ratio" in one]
    if not compared:
        return [NOTHING, NOTHING]
    loss = max((one["first_loss_difference"] for one in compared), key=abs)
    norm = max((one["first_gradient_norm_ratio"] for one in compared), key=lambda x: abs(x - 1))
    return [f"{loss:+.1e}", f"{norm:.4f}"]


def _what_is_fused(pair: Pair) -> list[str]:
    """Modules called of those found, and the time that the proofs took."""
    reports = [one["rounds"][0]["report"] for one in _ours(pair)]
    if not reports:
        return [NOTHING, NOTHING]
    operations = reports[0]["operations"]
    fused = [
        f"{label} {operations[name]['called']}/{operations[name]['found']}"
        for name, label in OPERATIONS.items()
        if operations[name]["found"]
    ]
    seconds = max(report["verification"]["seconds"] for report in reports)
    return [", ".join(fused) or NOTHING, f"{seconds:.1f}"]
