"""50 steps of TRL's SFTTrainer on the real SmolLM2-135M in fp32: every step as stock's."""

import json
from pathlib import Path
from typing import Any

import pytest

STEPS = 50


def train(assets: Path, folder: Path, fused: bool) -> tuple[list[dict[str, float]], Any]:
    """The logged steps, and the callback's report or None."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from lorafuse import LorafuseCallback

    torch.manual_seed(0)
    weights = assets / "smollm2-135m"
    lines = (assets / "dialogues.jsonl").read_text(encoding="utf-8").splitlines()[:200]
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32),
        args=SFTConfig(
            output_dir=str(folder),
            max_steps=STEPS,
            per_device_train_batch_size=2,
            max_length=64,
            learning_rate=5e-4,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            seed=1,
        ),
        processing_class=AutoTokenizer.from_pretrained(weights),
        train_dataset=Dataset.from_list([json.loads(line) for line in lines]),
        peft_config=LoraConfig(
            r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )
    callback = LorafuseCallback(fused_strict=True) if fused else None
    if callback is not None:
        trainer.add_callback(callback)
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry], callback


@pytest.mark.slow
def test_every_step_is_stocks(assets, tmp_path):
    stock, _ = train(assets, tmp_path / "stock", fused=False)
    fused, callback = train(assets, tmp_path / "fused", fused=True)
    assert len(stock) == len(fused) == STEPS
    for step, (a, b) in enumerate(zip(stock, fused, strict=True), 1):
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-4), step
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3), step
        assert b["mean_token_accuracy"] == pytest.approx(a["mean_token_accuracy"], abs=1e-3), step
        assert b["entropy"] == pytest.approx(a["entropy"], rel=1e-3), step
    assert stock[-1]["loss"] < stock[0]["loss"] - 0.5, "nothing was learnt, so nothing was shown"
    operations = callback.report.to_dict()["operations"]
    for name in ("lora_mlp", "lora_qkv", "lora_o", "rms_norm", "rope", "cross_entropy"):
        assert operations[name]["fused"] == operations[name]["found"] > 0, name
        assert operations[name]["calls"] > 0, name
