"""`lorafuse bench`: stock against fused on this machine, in interleaved rounds.

A round runs each system once, in a fresh process, one after the other: an 8B model whose
activations are all kept fills a GPU alone, and neither patches nor peaks of one system reach
another. Rounds go through the systems in turn forwards and backwards, so that a GPU that slows down
as it warms up favours none. Medians are over the timed steps of all rounds. Of several models each
has its own results.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from importlib.util import find_spec

import torch

from lorafuse.plugin.bench_images import row_images, takes_images
from lorafuse.plugin.bench_job import Job
from lorafuse.plugin.bench_model import parameters
from lorafuse.plugin.bench_processes import Workers, allocator_setting, run_worker
from lorafuse.plugin.bench_results import Results, SystemResult
from lorafuse.plugin.bench_systems import SYSTEMS, why_not
from lorafuse.plugin.config import FuseConfig
from lorafuse.plugin.errors import FuseConfigError
from lorafuse.plugin.geometries import find_model

# A step of this many parameters takes a CPU some minutes at 2 x 256 tokens.
MOST_ON_CPU = 500e6
# Told which process runs, and what it does now; first of all `bench_processes.STARTING`.
Progress = Callable[[str, str], None]


def default_device() -> str:
    """The GPU where there is one. This process leaves its memory to the workers."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def choose(asked: str | None, job: Job) -> tuple[list[str], dict[str, str]]:
    """The systems to run, and those that cannot run here, with the reason.

    Args:
        asked: Names with commas between; None: all that can run.
        job: Whose device and flags count.

    Raises:
        FuseConfigError: One that was asked for by name is unknown or cannot run here.
    """
    reasons = {name: why_not(name, job.device) for name in SYSTEMS}
    if asked is None:
        able = [name for name, reason in reasons.items() if reason is None]
        return able, {name: reason for name, reason in reasons.items() if reason is not None}
    names = list(dict.fromkeys(name.strip() for name in asked.split(",")))
    for name in names:
        if name not in SYSTEMS:
            raise FuseConfigError(f"--systems {name} is unknown; use some of {','.join(SYSTEMS)}")
        if (reason := reasons[name]) is not None:
            raise FuseConfigError(f"--systems {name} cannot run here: {reason}")
    if job.flags and "lorafuse" not in names:
        raise FuseConfigError("--flag has no effect, for --systems leaves lorafuse out")
    return names, {}


def check_machine(job: Job) -> int:
    """Refuses what cannot work before any process is started.

    Returns:
        The number of the model's parameters.

    Raises:
        FuseConfigError: With what to do instead.
    """
    if job.device == "cuda" and not torch.cuda.is_available():
        raise FuseConfigError("--device cuda: torch sees no CUDA GPU here; use --device cpu")
    if job.quant == "nf4" and find_spec("bitsandbytes") is None:
        raise FuseConfigError(
            "--quant nf4 needs bitsandbytes, which is not installed; "
            "pip install bitsandbytes, or use --quant none"
        )
    if job.profile and job.device != "cuda":
        raise FuseConfigError("--profile lists a GPU's kernels; there is none with --device cpu")
    FuseConfig(**job.flags)
    model = find_model(job.model, job.layers)
    if takes_images(model.config):
        if job.documents > 1:
            raise FuseConfigError(
                f"--documents {job.documents}: {job.model} is trained with images, and such rows "
                "are not packed; leave it out"
            )
        if job.padding:
            raise FuseConfigError(
                f"--padding {job.padding:g}: {job.model} is trained with images, and such rows are "
                "of one length; leave it out"
            )
        row_images(model.config, job.tokens)
    count = parameters(model)
    if job.device == "cpu" and count > MOST_ON_CPU:
        raise FuseConfigError(
            f"--model {job.model} has {count / 1e9:.2f} billion parameters, too many for a CPU "
            f"(at most {MOST_ON_CPU / 1e9:.1f}); use --model tiny or smollm2-135m here, or a "
            "machine with a CUDA GPU"
        )
    return count


def run(
    job: Job,
    systems: Sequence[str],
    rounds: int,
    skipped: dict[str, str],
    workers: Workers,
    progress: Progress = lambda label, stage: None,
    save: Callable[[Results], None] = lambda so_far: None,
) -> Results:
    """Runs each system once a round. One that ends badly is left out of the later rounds.

    Args:
        job: What all systems do.
        systems: By name; all can run here.
        rounds: At least 1.
        skipped: For the results only.
        workers: The processes.
        progress: Told what happens now.
        save: Given what is known after each process: a run that is cut short loses one system.

    Raises:
        FuseConfigError: The job cannot work on this machine.
    """
    count = check_machine(job)
    found = {name: SystemResult(name) for name in systems}
    for i in range(rounds):
        for name in list(systems) if i % 2 == 0 else list(reversed(systems)):
            if found[name].status == "ok":
                this = replace(job, system=name, profile=job.profile if i == rounds - 1 else 0)
                label = f"round {i + 1} of {rounds}, {name}"
                run_worker(workers, this, found[name], partial(progress, label))
                save(_results(job, rounds, found, skipped, count))
    return _results(job, rounds, found, skipped, count)


def _results(
    job: Job, rounds: int, found: dict[str, SystemResult], skipped: dict[str, str], count: int
) -> Results:
    """Of the systems that have run by now."""
    ran = {name: one for name, one in found.items() if one.rounds or one.status != "ok"}
    unsupported = {name: one.error for name, one in ran.items() if one.status == "unsupported"}
    ran = {name: one for name, one in ran.items() if name not in unsupported}
    return Results(
        job, rounds, ran, skipped | unsupported, count, allocator_setting(), datetime.now(UTC)
    )
