"""TRL's DPOTrainer, whose loss comes from log-probabilities: the same curve, fused or not."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer
from trl.trainer import utils as trl_utils

from lorafuse import LorafuseCallback

FUSED_HEAD = hasattr(trl_utils, "add_fused_lm_head")  # from TRL 1.15 on
WORDS, STEPS = 128, 6


def preferences() -> Dataset:
    draw = random.Random(0)

    def text(count: int) -> str:
        return " ".join(f"w{draw.randrange(4, WORDS)}" for _ in range(count))

    return Dataset.from_list(
        [
            {"prompt": text(6), "chosen": " " + text(5 + i % 3), "rejected": " " + text(6)}
            for i in range(16)
        ]
    )


def tokenizer() -> PreTrainedTokenizerFast:
    own = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w3"))
    own.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=own, pad_token="w0", bos_token="w1", eos_token="w2", unk_token="w3"
    )


def train(folder: Path, callback: LorafuseCallback | None) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=WORDS, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, bos_token_id=1,
            eos_token_id=2,
        )
    )  # fmt: skip
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(
            output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=4,
            learning_rate=5e-3, logging_steps=1, report_to=[], seed=1, bf16=False,
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=preferences(),
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip
    if callback is not None:
        trainer.add_callback(callback)
    trainer.train()
    return [log for log in trainer.state.log_history if "loss" in log]


def test_the_curve_of_dpo_is_stocks(tmp_path) -> None:
    callback = LorafuseCallback()
    stock, fused = train(tmp_path / "stock", None), train(tmp_path / "fused", callback)
    assert len(stock) == len(fused) == STEPS and stock[0]["loss"] != stock[-1]["loss"]
    for ours, theirs in zip(fused, stock, strict=True):
        for name in ("loss", "grad_norm", "rewards/margins", "logps/chosen", "entropy"):
            if name in theirs:
                assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-4), name
    operations = callback.report.operations()
    assert operations["lora_mlp"].called == operations["lora_qkv"].called == 2
    loss = operations["cross_entropy"]
    if FUSED_HEAD:  # the policy's and the reference's, once a step
        assert loss.calls == 2 * STEPS and not loss.runtime_fallbacks
    else:
        assert loss.calls == 0 and "caller wants logits" in str(loss.runtime_fallbacks[0])
