"""How `lorafuse bench` tells its results: a table, and the lines around it."""

from collections.abc import Iterator
from typing import Any

from rich.table import Table

from lorafuse.plugin.bench_results import REFERENCE, Results, SystemResult, all_versions

# Where more of the GPU is taken than a CUDA context and a display need.
TAKEN_GB = 2.0
# A first step that needs this much more than the others decides what fits.
HIGHER_PEAK = 1.05


def table(results: Results) -> Table:
    """One row a system."""
    found = Table(title=results.job.describe(), title_justify="left")
    found.add_column("system", no_wrap=True)
    for column in (
        "tokens/s",
        "× stock",
        "step\nms",
        "1st step\ns",
        "peak\nGB",
        "reserved\nGB",
        "last\nloss",
        "Δ loss",
        "Δ grad\nnorm",
    ):
        found.add_column(column, justify="right", no_wrap=True)
    for name, one in results.summaries().items():
        if one["status"] != "ok":
            found.add_row(name, one["status"])
            continue
        half = (one["tokens_per_s_highest"] - one["tokens_per_s_lowest"]) / 2
        compared = "ratio" in one and name != REFERENCE
        found.add_row(
            name,
            f"{one['tokens_per_s']:,.0f} ± {half:,.0f}",
            f"{one['ratio']:.2f}" if "ratio" in one else "",
            f"{one['step_ms']:,.1f}",
            f"{one['first_step_s']:.1f}",
            gigabytes(one["peak_allocated_GB"]),
            gigabytes(one["peak_reserved_GB"]),
            f"{one['last_loss']:.5f}",
            f"{one['largest_loss_difference']:.1e}" if compared else "",
            f"{one['largest_relative_gradient_norm_difference']:.1e}" if compared else "",
        )
    return found


def lines_above(results: Results) -> Iterator[str]:
    """Where and with what it ran."""
    yield ", ".join(f"{k} {v or '(not installed)'}" for k, v in all_versions().items())
    yield (
        f"GPU: {results.gpu}"
        if results.gpu
        else ("CPU: lorafuse's torch references run here; these times say nothing about a GPU")
    )


def lines_below(results: Results) -> Iterator[str]:
    """What the numbers mean, and what else is to be said of each system."""
    times = f" in each of {results.rounds} fresh processes" if results.rounds > 1 else ""
    yield (
        f"tokens/s: of the median of {results.job.steps} steps{times}; ±: half the range of single "
        "steps; 1st step: with fusing and compiling; Δ: the largest of any step, to stock (the "
        "gradient norm's is relative); GB: 1e9 bytes"
    )
    for name, reason in results.skipped.items():
        yield f"{name}: not run: {reason}"
    for name, one in results.systems.items():
        summary = one.summary(results.job, results.stock)
        if one.status == "out of memory":
            yield f"{name}: out of memory while {_doing(one.stage)}"
        elif one.status != "ok":
            yield f"{name}: failed while {_doing(one.stage)}: {one.error}"
        else:
            yield from _about(name, one, summary)
    if results.stock is None:
        yield "stock was not run, so nothing is compared with it"
    taken = [
        one.machine["total_GB"] - one.machine["free_GB"]
        for one in results.systems.values()
        if one.machine
    ]
    if taken and max(taken) > TAKEN_GB:
        yield f"note: others held up to {max(taken):.1f} GB of this GPU when a system started"
    if results.gpu:
        yield f"allocator of every system: {results.allocator}"
    yield f"command: {results.command()}"


def profile_lines(name: str, profile: dict[str, Any], step_ms: float) -> Iterator[str]:
    """The GPU's time in one step, and the kernels that take most of it."""
    idle = max(0.0, step_ms - profile["busy_ms"])
    yield (
        f"{name}, one step: GPU busy {profile['busy_ms']:.1f} ms, idle {idle:.1f} ms of the "
        f"median step's {step_ms:.1f} ms ({profile['wall_ms']:.1f} ms under the profiler)"
    )
    for kernel in profile["kernels"]:
        yield f"{kernel['ms']:9.2f} ms {kernel['count']:6d} × {kernel['name'][:90]}"


def profiles(results: Results) -> Iterator[str]:
    """Of all systems that have one."""
    for name, one in results.systems.items():
        if one.status == "ok" and (profile := one.rounds[-1].get("profile")):
            yield from profile_lines(name, profile, one.summary(results.job, None)["step_ms"])


def _about(name: str, one: SystemResult, summary: dict[str, Any]) -> Iterator[str]:
    last = one.rounds[-1]
    said = [last["variant"]] if last["variant"] else []
    said.append(f"{last['attention']} attention")
    if last["images"] is not None:
        said.append(last["images"])
    if last["experts"] is not None and "report" not in last:
        said.append(f"experts by {last['experts']}")
    if "report" in last:
        proofs = last["report"]["verification"]
        said.append(f"fused {_fused(last['report'])}")
        said.append(f"{proofs['blocks']} blocks proven in {proofs['seconds']:.1f} s")
    if len(one.rounds) > 1:
        rates = ", ".join(f"{rate:,.0f}" for rate in summary["tokens_per_s_of_rounds"])
        said.append(f"tokens/s of the rounds {rates}")
    first, steady = summary["first_step_peak_allocated_GB"], summary["peak_allocated_GB"]
    if first is not None and first > HIGHER_PEAK * steady:
        said.append(f"its first step peaked at {first:.1f} GB")
    yield f"{name}: {'; '.join(said)}"


def _fused(report: dict[str, Any]) -> str:
    """Each operation with how many of its modules ran fused, of how many, and why not all."""
    said = []
    for name, one in report["operations"].items():
        if one["asked"]:
            reasons = one["fallbacks"] + one["runtime_fallbacks"]
            why = f" ({reasons[0]['reason']})" if reasons else ""
            said.append(f"{name} {one['called']}/{one['found']}{why}")
    return ", ".join(said)


def gigabytes(value: float | None) -> str:
    """A dash where nothing was measured, as on a CPU."""
    return "–" if value is None else f"{value:.1f}"


def _doing(stage: str) -> str:
    if not stage:
        return "starting"
    return stage if stage.startswith(("building", "profiling")) else f"running {stage}"
