"""The picture of a `lorafuse bench` run: tokens a second and peak memory of each system."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lorafuse.plugin.bench_results import Results, all_versions
from lorafuse.plugin.errors import FuseConfigError

# Told apart without colour vision too: they differ in lightness.
COLOURS = {"stock": "#9aa3ad", "lorafuse": "#1f5fbf", "liger": "#d9a441", "axolotl": "#7a4fa3"}
DOTS_PER_INCH = 200


def check_plot(path: Path) -> None:
    """Before anything is measured.

    Raises:
        FuseConfigError: The picture could not be written.
    """
    if path.suffix != ".png":
        raise FuseConfigError(f"--plot {path}: the picture is a PNG; give a name that ends so")
    if find_spec("matplotlib") is None:
        raise FuseConfigError(
            "--plot needs matplotlib, which is not installed; pip install 'lorafuse[bench]' "
            "(or pip install matplotlib)"
        )


def plot(results: Results, path: Path) -> None:
    """Writes the PNG."""
    # Not pyplot: it keeps state for the whole process and asks for a display.
    from matplotlib.figure import Figure

    summaries = results.summaries()
    on_gpu = results.gpu is not None
    figure = Figure(figsize=(11.5 if on_gpu else 5.5, 4.6), layout="constrained")
    axes = figure.subplots(1, 2 if on_gpu else 1, squeeze=False)[0]
    _bars(
        axes[0],
        "tokens per second",
        summaries,
        "tokens_per_s",
        lambda one: f"{one['tokens_per_s']:,.0f}" + _times(one),
    )
    if on_gpu:
        _bars(
            axes[1],
            "peak memory, GB: allocated (dashed: reserved)",
            summaries,
            "peak_allocated_GB",
            lambda one: f"{one['peak_allocated_GB']:.1f}\n({one['peak_reserved_GB']:.1f} reserved)",
            outline="peak_reserved_GB",
        )
    where = results.gpu or "CPU (says nothing about a GPU)"
    versions = all_versions()
    shown = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "lorafuse"))
    break_at = ", LoRA"
    described = results.job.describe().replace(break_at, f"\n{break_at[2:]}", 1 - on_gpu)
    figure.suptitle(described, fontsize=11, fontweight="bold")
    figure.supxlabel(
        f"{where}, {results.date:%Y-%m-%d}" + ("\n" if not on_gpu else "  ·  ") + shown,
        fontsize=8,
        color="#555555",
    )
    figure.savefig(path, dpi=DOTS_PER_INCH)


def _bars(
    axes: Any,
    title: str,
    summaries: dict[str, dict[str, Any]],
    key: str,
    label: Any,
    outline: str | None = None,
) -> None:
    """One bar a system; what has no number has its status in its place."""
    heights = [one.get(key) or 0.0 for one in summaries.values()]
    tops = [max(one.get(key) or 0.0, one.get(outline or key) or 0.0) for one in summaries.values()]
    top = max(tops) or 1.0
    for i, (name, one) in enumerate(summaries.items()):
        colour = COLOURS.get(name, "#444444")
        if one["status"] != "ok":
            said = one["status"].replace(" ", "\n")
            axes.text(i, 0.02 * top, said, ha="center", va="bottom", color="#555555", fontsize=9)
            continue
        axes.bar(i, heights[i], width=0.62, color=colour)
        if outline:
            axes.bar(
                i, one[outline], width=0.62, fill=False, edgecolor=colour, linestyle="--", lw=1
            )
        axes.text(i, tops[i] + 0.015 * top, label(one), ha="center", va="bottom", fontsize=9)
    axes.set_xticks(range(len(summaries)), list(summaries))
    axes.set_xlim(-0.6, len(summaries) - 0.4)
    axes.set_ylim(0, 1.18 * top)
    axes.set_title(title, fontsize=10)
    axes.yaxis.grid(True, color="#e3e6e9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="both", length=0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def _times(one: dict[str, Any]) -> str:
    return f"\n{one['ratio']:.2f}× stock" if one.get("ratio", 1.0) != 1.0 else ""
