"""Stock against fused on the real SmolLM2-135M: 50 steps of TRL's SFTTrainer, in bf16 and in NF4.

    python integration_tests/gpu/parity.py .demo/smollm2-135m .demo/dialogues.jsonl

Prints both curves' distance, and beside it that of two more stock runs:
  - eager attention instead of sdpa, nothing else: two roundings of one computation, so no
    implementation can be expected to come closer;
  - fp32 throughout, on the very weights that the 16-bit run computes with (an NF4 model is
    dequantised, not quantised anew): the oracle, which says whose rounding a drift is.
Each mean has its standard error. The exit status is 1 where the fused mean loss drifts from stock's
by 1e-3 or more and by over twice its error, unless it is nearer to the oracle than stock is: stock
rounds the base output to bf16 before it adds LoRA, and the early steps of a QLoRA run, whose LoRA
terms are below half a unit in that last place, lose most of what the adapters have learnt.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from lorafuse.plugin.bench_model import nf4_quantisation

BOUND = 1e-3


def train(
    args: argparse.Namespace,
    nf4: bool,
    fused: bool,
    attention: str = "sdpa",
    dtype: torch.dtype = torch.bfloat16,
    fp8: bool = False,
) -> list[dict[str, float]]:
    """The logged steps of one run."""
    torch.manual_seed(0)
    on_gpu = torch.cuda.is_available()
    model = AutoModelForCausalLM.from_pretrained(
        args.model,
        dtype=torch.bfloat16,
        quantization_config=nf4_quantisation() if nf4 else None,
        device_map={"": 0} if on_gpu else None,
        attn_implementation=attention,
    )
    if dtype != torch.bfloat16:
        model = (model.dequantize() if nf4 else model).to(dtype)
    lines = Path(args.text).read_text(encoding="utf-8").splitlines()
    config = SFTConfig(
        output_dir="/tmp/lorafuse-parity",
        max_steps=args.steps,
        per_device_train_batch_size=args.batch,
        learning_rate=2e-4,
        lr_scheduler_type="constant",
        max_length=args.length,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        bf16=dtype == torch.bfloat16,
        use_cpu=not on_gpu,
        gradient_checkpointing=False,
        seed=1,
    )
    trainer = SFTTrainer(
        model=model,
        args=config,
        processing_class=AutoTokenizer.from_pretrained(args.model),
        train_dataset=Dataset.from_list([json.loads(line) for line in lines]),
        peft_config=LoraConfig(
            r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )
    callback: Any = None
    if fused:
        from lorafuse import LorafuseCallback

        callback = LorafuseCallback(fused_strict=True, fused_fp8=fp8)
        trainer.add_callback(callback)
    trainer.train()
    if callback is not None:
        for name, one in callback.report.to_dict()["operations"].items():
            print(f"  {name}: found {one['found']} fused {one['fused']} calls {one['calls']}")
        print("".join(f"  note: {note}\n" for note in callback.report.notes), end="")
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def distance(run: list[dict[str, float]], stock: list[dict[str, float]]) -> tuple[float, float]:
    """(mean drift, its standard error) of a run's losses, printed with its other differences."""
    losses = [b["loss"] - a["loss"] for a, b in zip(stock, run, strict=True)]
    norms = [b["grad_norm"] / a["grad_norm"] - 1 for a, b in zip(stock, run, strict=True)]
    drift, error = mean(losses), stdev(losses) / len(losses) ** 0.5
    print(
        f"{drift:+.2e} +- {error:.1e}, first step {losses[0]:+.1e}, largest "
        f"{max(map(abs, losses)):.1e}; gradient norm mean {mean(norms):+.1e} largest "
        f"{max(map(abs, norms)):.1e}; last loss {run[-1]['loss']:.4f}, accuracy "
        f"{run[-1].get('mean_token_accuracy', float('nan')):.4f}",
        flush=True,
    )
    return drift, error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--only", choices=("bf16", "nf4"))
    parser.add_argument("--fp8", action="store_true", help="a fused run with fused_fp8, too")
    args = parser.parse_args()
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    failed = False
    for weights in ("bf16", "nf4"):
        if args.only not in (None, weights):
            continue
        nf4 = weights == "nf4"
        stock = train(args, nf4, fused=False)
        print(f"{name}, {weights}, {len(stock)} steps from loss {stock[0]['loss']:.4f}: drift of")
        eager = train(args, nf4, fused=False, attention="eager")
        print("  stock, eager attention: ", end="")
        distance(eager, stock)
        oracle = train(args, nf4, fused=False, dtype=torch.float32)
        print("  stock, fp32:            ", end="")
        of_stock, _ = distance(oracle, stock)
        fused = train(args, nf4, fused=True)
        print("  fused:                  ", end="")
        drift, error = distance(fused, stock)
        print("  fused, from stock fp32: ", end="")
        of_fused, _ = distance(fused, oracle)
        if args.fp8:
            coarse = train(args, nf4, fused=True, fp8=True)
            for what, other in (("fused", fused), ("stock", stock), ("stock fp32", oracle)):
                print(f"  FP8, from {what}: ", end="")
                distance(coarse, other)
        failed |= abs(drift) >= max(BOUND, 2 * error) and abs(of_fused) >= abs(of_stock)
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
