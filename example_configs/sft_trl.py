"""LoRA with TRL's SFTTrainer, fused by one line. Runs on a CPU or any GPU, with the demo's assets:

make assets && .venv/bin/python example_configs/sft_trl.py
"""

import torch
from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from lorafuse import LorafuseCallback

MODEL = ".demo/smollm2-135m"
TEXT = ".demo/dialogues.jsonl"


def main() -> None:
    trainer = SFTTrainer(
        model=MODEL,
        args=SFTConfig(
            output_dir=".demo/sft_trl",
            max_steps=24,
            per_device_train_batch_size=4,
            learning_rate=5e-4,
            max_length=256,
            logging_steps=1,
            bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
            report_to="none",
        ),
        train_dataset=load_dataset("json", data_files=TEXT, split="train"),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
    )
    trainer.add_callback(LorafuseCallback(fused_strict=True))
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
