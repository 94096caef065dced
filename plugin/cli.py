"""The command `lorafuse`.

Exit code 0: the answer is printed, and the run would start. 1: it would not (a wrong setting,
`fused_strict` with a fallback), or there is no answer (a system of `bench` failed).
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from lorafuse.plugin.geometry_table import GEOMETRIES, NAMED_FAMILIES
from lorafuse.plugin.image_geometry_table import IMAGE_GEOMETRIES, NAMED_IMAGE_FAMILIES

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Faster, smaller LoRA and QLoRA fine-tuning inside Axolotl and TRL.",
)


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"lorafuse {version('lorafuse')}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print it, and go."),
    ] = False,
) -> None:
    """What stands before any command."""


@app.command()
def doctor(
    target: Annotated[
        str,
        typer.Argument(metavar="CONFIG.yaml|MODEL_DIR", help="An Axolotl YAML, or a model."),
    ],
) -> None:
    """Say what would be fused, what not and why, on which GPU, with which versions.

    Nothing is trained or downloaded, and no weights are needed: the model's config is enough.
    A model without a YAML is looked at with LoRA on all its linear layers.
    """
    # Read by huggingface_hub when it is first imported.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from lorafuse.plugin.doctor import diagnose
    from lorafuse.plugin.environment import gpu_name, versions
    from lorafuse.plugin.errors import FuseConfigError, FuseError

    console = _console()
    installed = [f"{name} {number or '(not installed)'}" for name, number in versions().items()]
    console.print(", ".join(installed))
    console.print(f"GPU: {gpu_name() or 'none on this machine'}")
    try:
        diagnosis = diagnose(target)
        report = diagnosis.report
        console.print(f"model: {diagnosis.model}")
        console.print(report.table(), soft_wrap=False)
        for note in report.notes:
            console.print(f"note: {note}")
        if diagnosis.advice:
            console.print(diagnosis.advice)
        report.check_fused()
        report.check_called()
    except (FuseConfigError, FuseError) as error:
        _fail(error)


@app.command()
def bench(
    model: Annotated[
        str,
        typer.Option(
            metavar="NAME|DIR,...",
            help=f"Geometries with random weights ({', '.join(GEOMETRIES)}; {NAMED_FAMILIES}: one "
            f"of each; trained with images: {', '.join(IMAGE_GEOMETRIES)}; {NAMED_IMAGE_FAMILIES}: "
            "all of these), or a model's folder. Several with commas between: one after the other, "
            "without those behind a - (named-families,-falcon-7b).",
        ),
    ] = "llama-3.1-8b",
    systems: Annotated[
        str | None,
        typer.Option(
            metavar="A,B",
            help="Of stock, lorafuse, liger, axolotl. Without it: all that can run here.",
        ),
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Only the model's first layers.")] = None,
    quant: Annotated[str, typer.Option(metavar="nf4|none", help="Base weights.")] = "nf4",
    rank: Annotated[int, typer.Option(help="Of LoRA, on all linear layers.")] = 32,
    batch: Annotated[int, typer.Option(help="Rows a step.")] = 2,
    tokens: Annotated[
        int | None, typer.Option(help="Of each row. Without it: 4096, on a CPU 256.")
    ] = None,
    documents: Annotated[int, typer.Option(help="Packed into each row, of equal length.")] = 1,
    padding: Annotated[
        float, typer.Option(help="Share of the batch that is padding; it counts as tokens.")
    ] = 0.0,
    checkpointing: Annotated[bool, typer.Option(help="Gradient checkpointing.")] = True,
    prepare_kbit: Annotated[
        bool,
        typer.Option(
            "--prepare-kbit",
            help="Of PEFT, prepare_model_for_kbit_training: norms, embedding and head in fp32.",
        ),
    ] = False,
    steps: Annotated[int, typer.Option(help="Timed ones a round, after two untimed.")] = 5,
    rounds: Annotated[int, typer.Option(help="Fresh processes of each system.")] = 2,
    attention: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="transformers' attn_implementation. Without it: what it chooses for the class.",
        ),
    ] = None,
    flag: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Of lorafuse: fused_attention=off. Repeatable."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="cuda|cpu", help="Without it: cuda where there is one.")
    ] = None,
    profile: Annotated[
        int, typer.Option(metavar="N", help="The N costliest GPU kernels of one more step.")
    ] = 0,
    json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write everything, step by step.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw speed and memory.")
    ] = None,
) -> None:
    """Time whole training steps, stock against fused, on this machine.

    Each system trains the same model, adapters and tokens in processes of its own, in turn.
    A system that fails on one model leaves the others to go on.
    Nothing is downloaded. A system that is not installed, or has no kernels for the model, is
    named; one that runs out of memory is a result.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from lorafuse.plugin.bench import check_machine, choose, default_device, run
    from lorafuse.plugin.bench_job import Job, read_flags
    from lorafuse.plugin.bench_plot import check_plot
    from lorafuse.plugin.bench_plot import plot as draw
    from lorafuse.plugin.bench_processes import AHEAD, Workers
    from lorafuse.plugin.bench_results import Results, to_dict
    from lorafuse.plugin.bench_table import lines_above, lines_below, profiles, table
    from lorafuse.plugin.errors import FuseConfigError
    from lorafuse.plugin.geometries import model_names

    console = _console()
    try:
        device = device or default_device()
        jobs = [
            Job(
                system="",
                model=name,
                layers=layers,
                quant=quant,
                rank=rank,
                batch=batch,
                tokens=tokens if tokens is not None else (4096 if device == "cuda" else 256),
                documents=documents,
                checkpointing=checkpointing,
                steps=steps,
                attention=attention,
                device=device,
                flags=read_flags(flag or []),
                profile=profile,
                prepare_kbit=prepare_kbit,
                padding=padding,
            )
            for name in model_names(model)
        ]
        if rounds < 1:
            raise FuseConfigError(f"--rounds {rounds}: give 1 or more")
        chosen, skipped = choose(systems, jobs[0])
        for name, path in (("--json", json), ("--plot", plot)):
            if path is not None and not path.absolute().parent.is_dir():
                raise FuseConfigError(f"{name} {path}: there is no folder {path.parent}")
        if plot is not None:
            check_plot(plot)
            if len(jobs) > 1:
                raise FuseConfigError("--plot draws one model; --model names several")
        for job in jobs:
            check_machine(job)
    except FuseConfigError as error:
        _fail(error)
    done: list[Results] = []

    def keep(so_far: Results) -> None:
        if json is not None:
            _write_json(json, to_dict([*done, so_far]))

    with Workers(len(jobs) * len(chosen) * rounds, AHEAD[device]) as workers:
        for job in jobs:
            with _progress() as progress:
                results = run(job, chosen, rounds, skipped, workers, progress, keep)
            done.append(results)
            for line in lines_above(results) if len(done) == 1 else ():
                console.print(line)
            console.print(table(results), soft_wrap=False)
            for line in (*lines_below(results), *profiles(results)):
                console.print(line)
    if json is not None:
        _write_json(json, to_dict(done))
        console.print(f"written: {json}")
    if plot is not None:
        draw(done[0], plot)
        console.print(f"written: {plot}")
    if not all(results.complete for results in done):
        raise typer.Exit(1)


@app.command()
def plan(
    target: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG.yaml|NAME|MODEL_DIR",
            help="An Axolotl YAML, a geometry (llama-3.1-8b, ... as of `bench`), or a model's "
            "folder, of which the config.json is enough.",
        ),
    ],
    tokens: Annotated[
        int | None, typer.Option(help="Of each row. Without it: the YAML's, or 4096.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(help="Rows of a micro-batch. Without it: the YAML's, or 2.")
    ] = None,
    documents: Annotated[int | None, typer.Option(help="Packed into each row.")] = None,
    rank: Annotated[
        int | None, typer.Option(help="Of LoRA. Without it: the YAML's, or 32.")
    ] = None,
    quant: Annotated[
        str | None, typer.Option(metavar="nf4|none", help="Base weights. None: bf16.")
    ] = None,
    prepare_kbit: Annotated[
        bool | None,
        typer.Option(
            "--prepare-kbit",
            help="Of PEFT, prepare_model_for_kbit_training: norms, embedding and head in fp32.",
        ),
    ] = None,
    targets: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="What carries LoRA: q_proj,v_proj, or all-linear."),
    ] = None,
    optimizer: Annotated[
        str | None, typer.Option(metavar="adamw_8bit|adamw", help="adamw: with fp32 states.")
    ] = None,
    accumulates: Annotated[
        bool | None,
        typer.Option(
            "--accumulates/--no-accumulates",
            help="Gradients of an earlier micro-batch are there when a step begins.",
        ),
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Only the model's first layers.")] = None,
    host: Annotated[
        float | None,
        typer.Option(
            metavar="GB",
            help="Of the host's memory, what may be pinned. Without it: the YAML's fused_host_gb.",
        ),
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option(
            metavar="GB", help="What auto may plan for. Without it: the YAML's fused_memory_gb."
        ),
    ] = None,
    json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write everything, in bytes.")
    ] = None,
) -> None:
    """Predict memory and relative time of each checkpointing mode, and what fits on which card.

    Nothing is trained or downloaded, and neither a GPU nor weights are needed.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from lorafuse.plugin.config import MOST_GB
    from lorafuse.plugin.errors import FuseConfigError
    from lorafuse.plugin.plan_table import auto_table, cards_table, lines_below, modes_table
    from lorafuse.plugin.plan_target import read_GB, read_target, read_targets
    from lorafuse.plugin.planner import plan as predict_all

    console = _console()
    try:
        if json is not None and not json.absolute().parent.is_dir():
            raise FuseConfigError(f"--json {json}: there is no folder {json.parent}")
        if host is not None and not 0 <= host <= MOST_GB:
            raise FuseConfigError(
                f"--host {host:g}: give the GB of the host's memory that may be pinned, up to "
                f"{MOST_GB:,}; 0 for none"
            )
        if memory is not None and not 0 < memory <= MOST_GB:
            raise FuseConfigError(
                f"--memory {memory:g}: give the GB that auto may plan for, above 0 and at most "
                f"{MOST_GB:,}"
            )
        options = {
            "tokens": tokens,
            "batch": batch,
            "documents": documents,
            "rank": rank,
            "quant": quant,
            "prepare_kbit": prepare_kbit,
            "targets": None if targets is None else read_targets(targets),
            "optimizer": optimizer,
            "accumulates": accumulates,
            "layers": layers,
        }
        workload, notes = read_target(target, options)
        budget = read_GB(target, "fused_memory_gb") if memory is None else memory
        pinned = read_GB(target, "fused_host_gb") if host is None else host
        found = predict_all(workload, host_GB=pinned, notes=notes, memory_GB=budget)
    except FuseConfigError as error:
        _fail(error)
    console.print(modes_table(found), soft_wrap=False)
    console.print(auto_table(found), soft_wrap=False)
    console.print(cards_table(found), soft_wrap=False)
    for line in lines_below(found):
        console.print(line)
    if json is not None:
        _write_json(json, found.to_dict())
        console.print(f"written: {json}")


@app.command()
def families(
    only: Annotated[
        str | None,
        typer.Option(metavar="NAME,...", help="Model types (llama) or classes of transformers."),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(metavar="KIND", help="Only one mapping: causal, or image-text."),
    ] = None,
    jobs: Annotated[int, typer.Option(metavar="N", help="Processes at a time.")] = 1,
    limit: Annotated[float, typer.Option(metavar="SECONDS", help="For one family.")] = 180.0,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write everything.")] = None,
    markdown: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the table as Markdown.")
    ] = None,
    readme: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write the named families' rows into this README, of the FAMILIES.md beside it; "
            "without --markdown nothing is tried anew.",
        ),
    ] = None,
    measured: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="With --readme: also the table of what `bench --json` has written there.",
        ),
    ] = None,
) -> None:
    """Try every family of transformers: a tiny model's step, stock against fused.

    Causal LMs, and models of images and text, these with images. Runs on the CPU, and downloads
    nothing. With --kind, --markdown leaves the other part of the page as it is. Exit code 1: a
    family trains wrong or crashes when it is fused.
    """
    if readme is not None and markdown is None:
        _write_readme(readme, readme.parent / "FAMILIES.md", measured)
        return
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from lorafuse.plugin.errors import FuseConfigError
    from lorafuse.plugin.families import model_types, sweep
    from lorafuse.plugin.family_table import coverage, tables
    from lorafuse.plugin.family_table import markdown as write_markdown

    console = _console()
    try:
        if jobs < 1 or limit <= 0:
            raise FuseConfigError(f"--jobs {jobs} --limit {limit:g}: give 1 or more, above 0")
        for name, path in (("--json", json), ("--markdown", markdown)):
            if path is not None and not path.absolute().parent.is_dir():
                raise FuseConfigError(f"{name} {path}: there is no folder {path.parent}")
        entries = model_types(only, kind)
    except FuseConfigError as error:
        _fail(error)
    progress = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    found = sweep(
        entries,
        jobs,
        limit,
        lambda one, done, whole: progress.print(f"{done}/{whole} {one.model_type}: {one.level}"),
    )
    for part in tables(found):
        console.print(part, soft_wrap=False)
    console.print(coverage(found))
    for one in found.bad:
        console.print(f"{one.model_type} {one.level}: {one.reason}")
    if json is not None:
        _write_json(json, found.to_dict())
        console.print(f"written: {json}")
    if markdown is not None:
        page = markdown.read_text("utf-8") if kind is not None and markdown.is_file() else ""
        markdown.write_text(write_markdown(found, page), encoding="utf-8")
        console.print(f"written: {markdown}")
        if readme is not None:
            _write_readme(readme, markdown, measured)
    if found.bad:
        raise typer.Exit(1)


def _write_readme(readme: Path, page: Path, measured: Path | None) -> None:
    """The named families' rows of `page`, and what was measured, between the README's marks."""
    from lorafuse.plugin import family_times
    from lorafuse.plugin.errors import FuseConfigError
    from lorafuse.plugin.family_readme import inserted

    try:
        for path in (readme, page):
            if not path.is_file():
                raise FuseConfigError(f"--readme: there is no file {path}")
        text = inserted(readme.read_text("utf-8"), page.read_text("utf-8"))
        if measured is not None:
            text = family_times.inserted(text, measured)
    except FuseConfigError as error:
        _fail(error)
    readme.write_text(text, encoding="utf-8")
    _console().print(f"written: {readme}")


@contextmanager
def _progress() -> Iterator[Callable[[str, str], None]]:
    """On stderr: a line that changes, or in a log one line for each process."""
    from lorafuse.plugin.bench_processes import STARTING

    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    if console.is_terminal:
        with console.status("checking the machine") as status:
            yield lambda label, stage: status.update(f"{label}: {stage}")
    else:
        yield lambda label, stage: console.print(label) if stage == STARTING else None


def _write_json(path: Path, content: dict[str, Any]) -> None:
    import json

    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _console() -> Console:
    console = Console(highlight=False, markup=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 120
    return console


def _fail(error: Exception) -> NoReturn:
    Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(f"error: {error}")
    raise typer.Exit(1) from None


def main() -> None:
    """The entry point of the console script."""
    app()
