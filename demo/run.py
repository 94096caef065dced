"""Trains SmolLM2-135M with the real `axolotl train`, stock and fused, and compares the two.

    python demo/run.py FOLDER

Both runs start from the same adapter and read the same text; their YAMLs, which are left in FOLDER,
differ in the lines of the plugin alone. The exit status is 1 if the loss curves are further apart
than the bounds below, if an operation was fused and never called, or if the adapter does not load
in plain PEFT.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import assets
import torch
import yaml
from rich.console import Console
from rich.table import Table

EXAMPLE = Path(__file__).parent.parent / "example_configs/smollm2-135m-lora.yaml"
PROMPT = "What is AI?"
# In fp32 the two runs differ only by the order of additions.
LOSS_BOUND_FP32 = 1e-4
GRAD_NORM_BOUND_FP32 = 1e-3
# In bf16 single steps scatter by rounding, in both directions. Their mean must not drift: it is
# held to this, or to three of its own standard errors where a short run scatters more than that,
# and to the second bound in any case.
MEAN_LOSS_BOUND_BF16 = 1e-3
WORST_MEAN_LOSS_BF16 = 2e-2

console = Console(width=None if sys.stdout.isatty() else 110)


@dataclass(frozen=True)
class Run:
    """What one training left behind."""

    seconds: float
    losses: list[float]
    grad_norms: list[float]


def write_yamls(root: Path) -> dict[str, Path]:
    """The two configurations: the example, from the common adapter, with and without the plugin."""
    common = yaml.safe_load(EXAMPLE.read_text(encoding="utf-8")) | {
        "base_model": str(root / assets.MODEL),
        "datasets": [{"path": str(root / assets.TEXT), "type": "chat_template"}],
        "lora_model_dir": str(root / assets.ADAPTER),
        "dataset_prepared_path": str(root / "prepared"),
    }
    ours = {key: value for key, value in common.items() if key == "plugins" or "fused" in key}
    # Axolotl's own kernels need a GPU, and the comparison is with the stock model.
    stock = {key: value for key, value in common.items() if key not in ours}
    stock["lora_mlp_kernel"] = False
    files = {}
    for name, config in (("stock", stock), ("fused", common)):
        config["output_dir"] = str(root / name)
        files[name] = root / f"{name}.yaml"
        files[name].write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return files


def train(name: str, config: Path, root: Path) -> Run:
    """One `axolotl train`; its output goes to a log, its progress here."""
    log = root / f"{name}.log"
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "AXOLOTL_DO_NOT_TRACK": "1",
        "WANDB_MODE": "disabled",
        "PYTHONUNBUFFERED": "1",
    }
    axolotl = str(Path(sys.executable).with_name("axolotl"))
    console.print(f"[bold]axolotl train {config} --launcher python[/bold]   (log: {log})")
    started = time.monotonic()
    with (
        log.open("w", encoding="utf-8") as file,
        subprocess.Popen(
            [axolotl, "train", str(config), "--launcher", "python"],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
        ) as process,
        console.status("starting") as status,
    ):
        while process.poll() is None:
            time.sleep(1)
            seconds = time.monotonic() - started
            status.update(f"{name}: {progress(log)}, {seconds:.0f} s")
            if not console.is_terminal and int(seconds) % 15 == 0:
                console.print(f"  {name}: {progress(log)}, {seconds:.0f} s")
    if process.returncode:
        console.print("\n".join(log.read_text(encoding="utf-8").splitlines()[-30:]), markup=False)
        raise SystemExit(f"axolotl train failed with status {process.returncode}; see {log}")
    state = max((root / name).glob("checkpoint-*/trainer_state.json"), key=os.path.getmtime)
    steps = [e for e in json.loads(state.read_text(encoding="utf-8"))["log_history"] if "loss" in e]
    return Run(
        seconds=time.monotonic() - started,
        losses=[entry["loss"] for entry in steps],
        grad_norms=[entry["grad_norm"] for entry in steps],
    )


def progress(log: Path) -> str:
    """How many steps a training's log shows."""
    done = log.read_text(encoding="utf-8", errors="replace").count("'grad_norm'")
    return f"step {done}" if done else "loading"


def compare(stock: Run, fused: Run) -> list[str]:
    """Prints the curves side by side. Returns what is wrong with them."""
    table = Table(
        title=f"the same {len(stock.losses)} steps, stock and fused", title_justify="left"
    )
    for column in ("step", "loss stock", "loss fused", "difference"):
        table.add_column(column, justify="right")
    for column in ("grad norm stock", "grad norm fused", "relative"):
        table.add_column(column, justify="right")
    pairs = list(zip(stock.losses, fused.losses, stock.grad_norms, fused.grad_norms, strict=True))
    losses = [fused_loss - loss for loss, fused_loss, _, _ in pairs]
    norms = [abs(fused_norm / norm - 1) for _, _, norm, fused_norm in pairs]
    for step, ((a, b, c, d), e, f) in enumerate(zip(pairs, losses, norms, strict=True), start=1):
        table.add_row(str(step), *(f"{x:.6f}" for x in (a, b)), f"{e:+.1e}",
                      *(f"{x:.5f}" for x in (c, d)), f"{f:.1e}")  # fmt: skip
    console.print(table)
    largest = max(map(abs, losses))
    drift = abs(sum(losses) / len(losses))
    console.print(
        f"largest difference: loss {largest:.1e}, grad norm {max(norms):.1e} relative; "
        f"mean loss drift {drift:.1e}; {stock.seconds:.0f} s stock, {fused.seconds:.0f} s fused"
    )
    if torch.cuda.is_available():
        spread = statistics.stdev(losses) / len(losses) ** 0.5
        bound = min(WORST_MEAN_LOSS_BF16, max(MEAN_LOSS_BOUND_BF16, 3 * spread))
        return [f"mean loss drift {drift:.1e} is above {bound:.1e}"] * (drift > bound)
    console.print(
        "(no GPU here: the fused path runs its torch reference, which shows that it is right, "
        "not how fast it is)"
    )
    return [f"the losses differ by {largest:.1e}, more than {LOSS_BOUND_FP32}"] * (
        largest > LOSS_BOUND_FP32
    ) + [f"the gradient norms differ by {max(norms):.1e}, more than {GRAD_NORM_BOUND_FP32}"] * (
        max(norms) > GRAD_NORM_BOUND_FP32
    )


def show_report(report: dict[str, Any]) -> list[str]:
    """Prints what was fused. Returns what was fused and never called."""
    table = Table(title="what was fused (lorafuse_report.json)", title_justify="left")
    for column in ("operation", "asked", "fused", "called", "calls", "why not"):
        table.add_column(column)
    for name, one in report["operations"].items():
        reasons = "; ".join(reason["reason"] for reason in one["fallbacks"])
        table.add_row(name, str(one["asked"]), *(str(one[k]) for k in ("fused", "called", "calls")),
                      reasons)  # fmt: skip
    console.print(table)
    for note in report["notes"]:
        console.print(f"note: {note}", markup=False)
    problems = [
        f"{name} was fused in {one['fused']} modules, and only {one['called']} were called"
        for name, one in report["operations"].items()
        if one["called"] < one["fused"]
    ]
    if not any(one["called"] for one in report["operations"].values()):
        problems.append("nothing was fused")
    return problems


def answer(root: Path) -> list[str]:
    """Loads the fused run's adapter where lorafuse cannot be imported, and asks it something."""
    script = Path(__file__).with_name("answer.py")
    outcome = subprocess.run(
        [sys.executable, str(script), str(root / assets.MODEL), str(root / "fused"), PROMPT],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    console.print(outcome.stdout, markup=False)
    if outcome.returncode:
        console.print(outcome.stderr, markup=False)
    return ["the adapter did not load in plain PEFT"] if outcome.returncode else []


def main(root: Path) -> None:
    started = time.monotonic()
    files = write_yamls(root)
    runs = {name: train(name, file, root) for name, file in files.items()}
    problems = compare(runs["stock"], runs["fused"])
    report = json.loads((root / "fused/lorafuse_report.json").read_text(encoding="utf-8"))
    problems += show_report(report)
    problems += answer(root)
    console.print(f"the demo took {time.monotonic() - started:.0f} s")
    if problems:
        raise SystemExit("the demo failed: " + "; ".join(problems))
    console.print("[green]the demo passed[/green]: same curves, everything fused was called")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
