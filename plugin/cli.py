"""The command `lorafuse`.

Exit code 0: the answer is printed, and the run would start. 1: it would not (a wrong setting,
`fused_strict` with a fallback), or there is no answer.
"""

import os
from typing import Annotated

import typer
from rich.console import Console

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
    """With this, typer keeps `doctor` a command of its own although it is the only one."""


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

    console = Console(highlight=False, markup=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 120
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
        Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(f"error: {error}")
        raise typer.Exit(1) from None


def main() -> None:
    """The entry point of the console script."""
    app()
