"""A real out-of-memory in a real Trainer, survived: the run that repeats a step loses nothing.

    python integration_tests/gpu/out_of_memory.py --json oom.json
    python integration_tests/gpu/out_of_memory.py --model tiny --device cpu      (without the fault)

Three runs of transformers' Trainer from the same state, `fused_checkpointing: auto`, two
micro-batches a step. In the third one something else takes the free memory after the plan was made,
as another process would, so that the second step fails in the middle of its work and is repeated.
cuDNN's attention backward sums in another order each time: so what the third run's losses differ by
from the first's is held to three times what those of the second do.
"""

import argparse
import json
import sys
import tempfile
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from lorafuse import LorafuseCallback
from lorafuse.plugin.bench_job import Job
from lorafuse.plugin.bench_model import adapted, base_model
from lorafuse.plugin.geometries import find_model

STEPS = 4


class Tokens(Dataset[dict[str, torch.Tensor]]):
    """Random rows, the same at every run."""

    def __init__(self, rows: int, length: int, words: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.rows = torch.randint(0, words, (rows, length), generator=generator)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[i], "labels": self.rows[i]}


class Hog(TrainerCallback):
    """Takes memory in the middle of the second step, and keeps it."""

    def __init__(self, fused: LorafuseCallback, leave_gb: float) -> None:
        self.fused, self.leave = fused, int(leave_gb * 1e9)
        self.taken: list[torch.Tensor] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        checkpointing = self.fused.report.checkpointing
        if state.global_step != 1 or self.taken or not torch.cuda.is_available():
            return
        begin = checkpointing.begin

        def then_take(h: torch.Tensor) -> None:
            begin(h)
            if not self.taken:
                torch.cuda.empty_cache()
                free, _ = torch.cuda.mem_get_info()
                self.taken.append(
                    torch.empty(free - self.leave, dtype=torch.uint8, device=h.device)
                )

        checkpointing.begin = then_take


def run(args: argparse.Namespace, leave_gb: float | None) -> tuple[list[Any], Any, list[str]]:
    """Logs, the repeater's count, the modes at the end."""
    set_seed(0)
    job = Job(
        "lorafuse", args.model, args.layers, args.quant, 16, 1, args.tokens, 1, False, STEPS,
        "sdpa", args.device,
    )  # fmt: skip
    model = adapted(base_model(find_model(job.model, job.layers), job), job)
    callback = LorafuseCallback()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder, max_steps=STEPS, per_device_train_batch_size=1,
                gradient_accumulation_steps=2, bf16=True, logging_steps=1, report_to=[],
                save_strategy="no", disable_tqdm=True, use_cpu=args.device == "cpu", seed=0,
            ),
            train_dataset=Tokens(2 * STEPS, args.tokens, model.config.get_text_config().vocab_size),
            callbacks=[callback],
        )  # fmt: skip
        if leave_gb is not None:
            trainer.add_callback(Hog(callback, leave_gb))
        repeated: list[int] = []
        detach = type(callback).on_train_end

        def on_train_end(*a: Any, **k: Any) -> None:
            repeated.append(callback._repeater.repeated if callback._repeater else 0)
            detach(callback, *a, **k)

        callback.on_train_end = on_train_end  # type: ignore[method-assign]
        trainer.train()
    logs = [(e["loss"], e["grad_norm"]) for e in trainer.state.log_history if "loss" in e]
    return logs, repeated[0], list(callback.report.checkpointing.modes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="llama-3.2-1b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--quant", default="none")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--leave-gb", type=float, default=4.0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json")
    args = parser.parse_args()
    plain, none, modes = run(args, None)
    torch.cuda.empty_cache()
    again, _, _ = run(args, None)
    torch.cuda.empty_cache()
    faulty, repeated, after = run(args, args.leave_gb)
    scatter, distance = largest_difference(plain, again), largest_difference(plain, faulty)
    result = {
        "plain": plain, "again": again, "faulty": faulty, "repeated": [none, repeated],
        "modes": [modes, after], "scatter": scatter, "distance": distance,
    }  # fmt: skip
    print(json.dumps(result))
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(result | {"args": vars(args)}, file, indent=1)
    if distance > 3 * scatter or (args.device == "cuda" and not repeated):
        sys.exit("the runs differ, or no step was repeated")


def largest_difference(a: list[Any], b: list[Any]) -> float:
    """Of the losses of two runs."""
    return max(abs(x[0] - y[0]) for x, y in zip(a, b, strict=True))


if __name__ == "__main__":
    main()
