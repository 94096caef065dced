"""Whole runs of the real `axolotl train` and TRL's SFTTrainer at a released width, stock and fused.

    python integration_tests/gpu/trainer_times.py --tokenizer .demo/smollm2-135m --json out.json
    python integration_tests/gpu/trainer_times.py --tokenizer .demo/smollm2-135m --device cpu \\
        --model smollm2-135m --layers 2 --tokens 64 --steps 4      # that the script works

`lorafuse bench` has a loop of its own; here the trainers load a folder of random weights, quantise
them, read rows, log and clip as they do for their users. Each run is a process. Every step is
logged, and the time of a step is that from one line of the log to the next; the first `WARM_UP`
are left out. Loss, gradient norm and peak memory are what the trainer says.

The runs of one trainer start from the same adapter and see the same rows. `axolotl` is with
Axolotl's own LoRA kernels and its Liger plugin. `--systems` also takes the ones of `BY_NAME`; what
is named twice runs twice.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoTokenizer

from lorafuse.plugin.bench_job import Job
from lorafuse.plugin.bench_model import adapted, base_model, nf4_quantisation
from lorafuse.plugin.environment import gpu_name, versions
from lorafuse.plugin.geometries import find_model

WARM_UP = 3  # steps
RANK = 32
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "AXOLOTL_DO_NOT_TRACK": "1",
    "WANDB_MODE": "disabled",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
    "COLUMNS": "160",
}
KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel")
# Axolotl's LoRA kernels, with its Liger plugin.
PEER = {
    "plugins": ["axolotl.integrations.liger.LigerPlugin"],
    "liger_rope": True,
    "liger_rms_norm": True,
    "liger_glu_activation": True,
    "liger_fused_linear_cross_entropy": True,
} | dict.fromkeys(KERNELS, True)
STOCK = dict.fromkeys(KERNELS, False)
FUSED = {"plugins": ["lorafuse.LorafusePlugin"], "fused": True, "fused_strict": True}
OFF = FUSED | {"fused_checkpointing": "off"}
GRAPHS = {"fused_graphs": True}
TORCHS_WALKS = {"fused_traversal": False}
# Of Axolotl's YAML; a TRL run takes of it what is lorafuse's.
SYSTEMS: dict[str, dict[str, Any]] = {
    "stock": STOCK,
    "lorafuse selective": FUSED | {"fused_checkpointing": "selective"},
    "lorafuse off": OFF,
    "axolotl": PEER,
    "axolotl, nothing recomputed": PEER | {"gradient_checkpointing": False},
}
# Those that run only where they are named.
BY_NAME: dict[str, dict[str, Any]] = {
    "lorafuse off, torch's walks": OFF | TORCHS_WALKS,
    "lorafuse graphs": OFF | GRAPHS,
    "lorafuse graphs, torch's walks": OFF | GRAPHS | TORCHS_WALKS,
}
AXOLOTL = "axolotl.cli.main"
MODEL, ADAPTER, ROWS = "model", "adapter", "rows.jsonl"


@dataclass
class Run:
    """One run. GB = 1e9 bytes; step_ms without the first steps."""

    trainer: str
    system: str
    status: str
    seconds: float
    tokens_per_s: float | None
    step_ms: list[float]
    losses: list[float]
    gradient_norms: list[float]
    peak_allocated_GB: float | None
    called: dict[str, int]

    def describe(self) -> str:
        if self.tokens_per_s is None:
            return f"{self.trainer}, {self.system}: {self.status} after {self.seconds:.0f} s"
        peak = "–" if self.peak_allocated_GB is None else f"{self.peak_allocated_GB:.2f}"
        return (
            f"{self.trainer}, {self.system}: {statistics.median(self.step_ms):.1f} ms, "
            f"{self.tokens_per_s:,.0f} tokens/s, {peak} GB, loss {self.losses[0]:.5f} to "
            f"{self.losses[-1]:.5f}, gradient norm {self.gradient_norms[0]:.5f} to "
            f"{self.gradient_norms[-1]:.5f}, "
            f"{self.seconds:.0f} s in all; called {self.called}"
        )


def save_model(folder: Path, args: argparse.Namespace) -> None:
    """Weights, tokenizer and the adapter that all runs start from, whose B is not zero."""
    job = Job(
        "stock", args.model, args.layers, "none", RANK, args.batch, args.tokens, 1, False, 1,
        "sdpa", args.device,
    )  # fmt: skip
    model = base_model(find_model(args.model, args.layers), job)
    model.save_pretrained(folder / MODEL)
    AutoTokenizer.from_pretrained(args.tokenizer).save_pretrained(folder / MODEL)
    adapted(model, job).save_pretrained(str(folder / ADAPTER))


def save_rows(file: Path, args: argparse.Namespace) -> None:
    """Rows of random words, tokenised ahead: each fills its place in a step, with nothing padded
    and nothing cut off."""
    words = list(range(1000, len(AutoTokenizer.from_pretrained(args.tokenizer))))
    draw = random.Random(0)
    with file.open("w", encoding="utf-8") as out:
        for _ in range((args.steps + 1) * args.batch):
            ids = draw.choices(words, k=args.tokens)
            row = {"input_ids": ids, "attention_mask": [1] * args.tokens, "labels": ids}
            out.write(json.dumps(row) + "\n")


def settings_of(folder: Path, system: str, args: argparse.Namespace) -> dict[str, Any]:
    """As Axolotl's YAML has them; `train_with_trl` reads the same."""
    on_gpu = args.device == "cuda"
    return {
        "base_model": str(folder / MODEL),
        "lora_model_dir": str(folder / ADAPTER),
        "adapter": "qlora" if on_gpu else "lora",
        "load_in_4bit": on_gpu,
        "lora_r": RANK,
        "lora_alpha": RANK,
        "lora_dropout": 0.0,
        "lora_target_linear": True,
        "datasets": [{"path": str(folder / ROWS), "ds_type": "json"}],
        "dataset_prepared_path": str(folder / "prepared"),
        "special_tokens": {"pad_token": "<|endoftext|>"},
        "sequence_len": args.tokens,
        "excess_length_strategy": "truncate",
        "sample_packing": False,
        "pad_to_sequence_len": True,
        "val_set_size": 0,
        "micro_batch_size": args.batch,
        "gradient_accumulation_steps": 1,
        "max_steps": args.steps,
        "optimizer": "adamw_bnb_8bit" if on_gpu else "adamw_torch",
        "learning_rate": 2e-4,
        "lr_scheduler": "constant",
        "bf16": on_gpu,
        "fp16": False,
        "tf32": False,
        "attn_implementation": "sdpa",
        "gradient_checkpointing": True,
        "seed": 42,
        "logging_steps": 1,
        "save_steps": args.steps,
    } | (SYSTEMS | BY_NAME)[system]


def train_with_trl(settings: Path) -> None:
    """In a process of its own: SFTTrainer by what `settings_of` has written."""
    from datasets import load_dataset
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    from lorafuse import LorafuseCallback

    config = yaml.safe_load(settings.read_text(encoding="utf-8"))
    on_gpu = config["load_in_4bit"]
    base = AutoModelForCausalLM.from_pretrained(
        config["base_model"],
        dtype=torch.bfloat16 if on_gpu else torch.float32,
        attn_implementation=config["attn_implementation"],
        quantization_config=nf4_quantisation() if on_gpu else None,
        device_map={"": 0} if on_gpu else None,
    )
    trainer = SFTTrainer(
        model=PeftModel.from_pretrained(base, config["lora_model_dir"], is_trainable=True),
        args=SFTConfig(
            output_dir=config["output_dir"],
            max_steps=config["max_steps"],
            per_device_train_batch_size=config["micro_batch_size"],
            learning_rate=config["learning_rate"],
            lr_scheduler_type="constant",
            max_length=config["sequence_len"],
            optim="adamw_8bit" if on_gpu else "adamw_torch",
            gradient_checkpointing=config["gradient_checkpointing"],
            gradient_checkpointing_kwargs={"use_reentrant": False},
            seed=config["seed"],
            logging_steps=1,
            save_strategy="no",
            bf16=on_gpu,
            report_to="none",
        ),
        train_dataset=load_dataset("json", data_files=config["datasets"][0]["path"], split="train"),
        processing_class=AutoTokenizer.from_pretrained(config["base_model"]),
    )
    if config.get("fused"):
        flags = {k: v for k, v in config.items() if k.startswith("fused_")}
        trainer.add_callback(LorafuseCallback(**flags))
    trainer.train()
    trainer.state.save_to_json(str(Path(config["output_dir"]) / "trainer_state.json"))
    if on_gpu:
        print("PEAK", torch.cuda.max_memory_allocated(), flush=True)


def run(folder: Path, trainer: str, system: str, args: argparse.Namespace) -> Run:
    config = settings_of(folder, system, args)
    out = Path(tempfile.mkdtemp(dir=folder, prefix=f"{trainer}_"))
    config["output_dir"] = str(out)
    file = out / "config.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    if trainer == "axolotl":
        how = ["-P", "-m", AXOLOTL, "train", str(file), "--launcher", "python"]
    else:
        how = [__file__, "--trl", str(file)]
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *how], env=os.environ | OFFLINE, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdout is not None
    marks, lines = [], []
    for line in process.stdout:
        lines.append(line)
        if "'grad_norm'" in line:
            marks.append(time.monotonic())
    status = process.wait()
    seconds = time.monotonic() - start
    (out / "log.txt").write_text("".join(lines), encoding="utf-8")
    if status or len(marks) != args.steps:
        said = [line.strip() for line in lines if "Error" in line]
        what = said[-1] if said else f"exit status {status}, {len(marks)} steps"
        print("".join(lines[-30:]), file=sys.stderr)
        return Run(trainer, system, what, seconds, None, [], [], [], None, {})
    step_ms = [1e3 * (b - a) for a, b in pairwise(marks[WARM_UP - 1 :])]
    state = json.loads(max(out.rglob("trainer_state.json")).read_text(encoding="utf-8"))
    logged = [entry for entry in state["log_history"] if "loss" in entry]
    peaks = [x["memory/max_allocated (GiB)"] * 2**30 / 1e9 for x in logged
             if x.get("memory/max_allocated (GiB)")]  # fmt: skip
    peaks += [int(line.split()[1]) / 1e9 for line in lines if line.startswith("PEAK ")]
    report = next(iter(out.rglob("lorafuse_report.json")), None)
    operations = {} if report is None else json.loads(report.read_text("utf-8"))["operations"]
    return Run(
        trainer, system, "ok", seconds,
        1e3 * args.batch * args.tokens / statistics.median(step_ms), step_ms,
        [x["loss"] for x in logged], [x["grad_norm"] for x in logged],
        max(peaks) if peaks else None,
        {name: one["called"] for name, one in operations.items() if one["called"]},
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", help="a folder with one of at most the model's words")
    parser.add_argument("--model", default="llama-3.1-8b", help="a geometry of `lorafuse bench`")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--trainers", nargs="+", default=["axolotl", "trl"])
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=[*SYSTEMS, *BY_NAME])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--trl", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.trl is not None:
        return train_with_trl(args.trl)
    if args.tokenizer is None:
        parser.error("--tokenizer: name a folder")
    runs: list[Run] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(folder, args)
        save_rows(folder / ROWS, args)
        if args.device == "cuda":
            torch.cuda.empty_cache()
        for trainer in args.trainers:
            for system in args.systems:
                if trainer == "trl" and system.startswith("axolotl"):
                    continue
                runs.append(run(folder, trainer, system, args))
                print(runs[-1].describe(), flush=True)
                if args.json is not None:
                    content = {
                        "date": datetime.now(UTC).isoformat(timespec="seconds"),
                        "gpu": gpu_name(), "versions": versions(), "command": sys.argv,
                        "runs": [asdict(one) for one in runs],
                    }  # fmt: skip
                    args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if any(one.status != "ok" for one in runs):
        sys.exit(1)
    return None


if __name__ == "__main__":
    main()
