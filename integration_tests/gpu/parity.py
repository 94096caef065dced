"""Stock against fused on the real SmolLM2-135M: 50 steps of TRL's SFTTrainer, in bf16 and in NF4.

    python integration_tests/gpu/parity.py .demo/smollm2-135m .demo/dialogues.jsonl

Prints both curves' distance. The exit status is 1 if the mean loss drifts by 1e-3 or more.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

BOUND = 1e-3


def train(args: argparse.Namespace, nf4: bool, fused: bool) -> list[dict[str, float]]:
    """The logged steps of one run."""
    torch.manual_seed(0)
    on_gpu = torch.cuda.is_available()
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if on_gpu else torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        args.model,
        dtype=torch.bfloat16 if on_gpu else torch.float32,
        quantization_config=quantisation if nf4 else None,
        device_map={"": 0} if on_gpu else None,
    )
    lines = Path(args.text).read_text(encoding="utf-8").splitlines()
    config = SFTConfig(
        output_dir="/tmp/lorafuse-parity",
        max_steps=args.steps,
        per_device_train_batch_size=args.batch,
        learning_rate=2e-4,
        lr_scheduler_type="constant",
        max_length=256,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        bf16=on_gpu,
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

        callback = LorafuseCallback(fused_strict=True)
        trainer.add_callback(callback)
    trainer.train()
    if callback is not None:
        for name, one in callback.report.to_dict()["operations"].items():
            print(f"  {name}: found {one['found']} fused {one['fused']} calls {one['calls']}")
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=4)
    args = parser.parse_args()
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    failed = False
    for nf4 in (False, True):
        stock, fused = (train(args, nf4, fused) for fused in (False, True))
        losses = [b["loss"] - a["loss"] for a, b in zip(stock, fused, strict=True)]
        norms = [b["grad_norm"] / a["grad_norm"] - 1 for a, b in zip(stock, fused, strict=True)]
        drift = sum(losses) / len(losses)
        ends = f"stock {stock[-1]['loss']:.4f} fused {fused[-1]['loss']:.4f}"
        print(
            f"{name}, {'NF4' if nf4 else 'float'}, {len(losses)} steps: loss "
            f"{stock[0]['loss']:.4f} -> {ends}; "
            f"mean drift {drift:+.2e}, largest difference {max(map(abs, losses)):.1e}, gradient "
            f"norm mean {sum(norms) / len(norms):+.1e} largest {max(map(abs, norms)):.1e}"
        )
        if "mean_token_accuracy" in stock[0]:
            ours, theirs = fused[-1]["mean_token_accuracy"], stock[-1]["mean_token_accuracy"]
            print(f"  last mean_token_accuracy: stock {theirs:.4f} fused {ours:.4f}")
        failed |= abs(drift) >= BOUND
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
