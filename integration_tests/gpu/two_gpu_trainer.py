"""transformers' Trainer on two ranks, stock and with LorafuseCallback: the same curve.

    NCCL_NVLS_ENABLE=0 torchrun --nproc-per-node 2 integration_tests/gpu/two_gpu_trainer.py
    torchrun --nproc-per-node 2 integration_tests/gpu/two_gpu_trainer.py --device cpu --fsdp

Two micro-batches a step, under the DDP that the Trainer sets up, or with `--fsdp` under the FSDP2
of accelerate; there the model is fused ahead of `train()`, for the callback comes when it is
sharded. The exit status is 1 where the fused curve is further from stock's than `LIMITS` and twice
what stock is from itself, or where a rank's report does not say that all was fused and called.

`--out-of-memory`: in the second step one rank runs out of memory. On one process lorafuse repeats
such a step; of two, the other one would wait in the middle of its gradients. So the run has to end
with that error, on both ranks, soon.
"""

import argparse
import json
import os
import sys
import tempfile
import warnings
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from data_parallel import SIZES, TOKENS, gathered, leave
from out_of_memory import Tokens
from transformers import LlamaConfig, Trainer, TrainingArguments, set_seed

from lorafuse import LorafuseCallback, fuse
from lorafuse.plugin.bench_job import Job
from lorafuse.plugin.bench_model import adapted, base_model
from lorafuse.plugin.geometries import Model

STEPS = 4
# Of the relative difference of (loss, gradient norm): bf16 on a GPU, fp32 on a CPU.
LIMITS = {"cuda": (1e-3, 1e-2), "cpu": (1e-5, 1e-4)}
HOOKED = "a hook on the head has to run"
CALLED = ("lora_mlp", "lora_qkv", "lora_o", "rms_norm", "rope", "cross_entropy", "checkpointing")


class FullCallback(LorafuseCallback):
    """Rank 1 runs out of memory in the second step, in backward."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_step_begin(args, state, control, **kwargs)
        if state.global_step == 1 and dist.get_rank() == 1:
            layer = self._reported().checkpointing.layers[0]
            begin = layer.begin

            def full(h: torch.Tensor, shared: Any) -> Any:
                h.register_hook(run_out)
                return begin(h, shared)

            layer.begin = full


def run_out(gradient: torch.Tensor) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def run(args: argparse.Namespace, callback: LorafuseCallback | None) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step."""
    set_seed(0)
    on_gpu = args.device == "cuda"
    config = LlamaConfig(**SIZES[args.device])
    job = Job(
        "lorafuse", "two_gpus", None, "none", 16, 1, TOKENS[args.device], 1, False, STEPS, "sdpa",
        args.device,
    )  # fmt: skip
    base = base_model(Model("two_gpus", config, None), job)
    model = adapted(base if on_gpu else base.float(), job)
    model.enable_input_require_grads()  # or nothing of the first layer's input has a gradient
    sharding: dict[str, Any] = {}
    if args.fsdp:
        sharding = {"fsdp": True, "fsdp_config": {"version": 2, "reshard_after_forward": True}}
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder, max_steps=STEPS, per_device_train_batch_size=1,
                gradient_accumulation_steps=2, learning_rate=1e-3, bf16=on_gpu, logging_steps=1,
                report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=not on_gpu, seed=0,
                **sharding,
            ),
            train_dataset=Tokens(4 * STEPS, job.tokens, config.vocab_size),
            callbacks=[] if callback is None else [callback],
        )  # fmt: skip
        if args.fsdp and not on_gpu:
            shard_on_cpu(trainer)
        if args.fsdp and callback is not None:
            fuse(trainer.model, callback.config)
        trainer.train()
        if args.fsdp != any(hasattr(p, "placements") for p in trainer.model.parameters()):
            raise RuntimeError("the Trainer has wrapped the model in something else than asked")
    return [(e["loss"], e["grad_norm"]) for e in trainer.state.log_history if "loss" in e]


def shard_on_cpu(trainer: Trainer) -> None:
    """Has accelerate do on a CPU, where it would take DDP, what it does on a GPU."""
    state = trainer.accelerator.state
    state.distributed_type = DistributedType.FSDP
    state.fsdp_plugin = FullyShardedDataParallelPlugin(**trainer.args.fsdp_plugin_args)
    trainer.is_fsdp_enabled = True


def distance(curve: list[Any], other: list[Any], which: int) -> float:
    """The largest relative difference of the losses (0) or the norms (1)."""
    pairs = zip(curve, other, strict=True)
    return max(abs(a[which] - b[which]) / abs(b[which]) for a, b in pairs)


def idle(rows: dict[str, Any]) -> list[str]:
    """What a rank's report does not call fused and called everywhere.

    Where accelerate shards the head as a module of its own, its weight is there in its own call
    alone: the loss is stock's then, and the report says so.
    """
    loss = rows.get("cross_entropy")
    apart = loss is not None and [r.reason for r in loss.runtime_fallbacks] == [HOOKED]
    return [
        f"{name}: {rows.get(name)}"
        for name in CALLED
        if not (apart and name == "cross_entropy")
        and (
            name not in rows
            or not rows[name].found == rows[name].fused == rows[name].called > 0
            or rows[name].runtime_fallbacks
        )
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--fsdp", action="store_true")
    parser.add_argument("--out-of-memory", action="store_true")
    parser.add_argument("--json")
    args = parser.parse_args()
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    warnings.filterwarnings("ignore", category=UserWarning)
    if args.out_of_memory:
        run(args, FullCallback())
        sys.exit("the run went on")
    callback = LorafuseCallback()
    stock, again, fused = run(args, None), run(args, None), run(args, callback)
    reports = gathered(callback.report.operations())
    problems = [f"rank {i}: {one}" for i, rows in enumerate(reports) for one in idle(rows)]
    found = {}
    for which, name in enumerate(("loss", "gradient norm")):
        found[name] = distance(fused, stock, which), distance(again, stock, which)
        if not found[name][0] <= 2 * found[name][1] + LIMITS[args.device][which]:
            problems.append(f"{name} departs by {found[name][0]:.1e}")
    if dist.get_rank() == 0:
        result = {"stock": stock, "again": again, "fused": fused, "distances": found}
        print(json.dumps(result | {"problems": problems}), flush=True)
        if args.json:
            with open(args.json, "w", encoding="utf-8") as file:
                json.dump(result | {"problems": problems, "args": vars(args)}, file, indent=1)
    leave(problems)


if __name__ == "__main__":
    main()
