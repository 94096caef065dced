"""`LorafuseCallback` on TRL's real SFTTrainer, with every operation on.

e2e/test_trl_losses.py compares TRL's losses one by one.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch._dynamo import OptimizedModule
from transformers import LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from trl import SFTConfig, SFTTrainer

from lorafuse import FuseConfig, LorafuseCallback
from lorafuse.plugin.errors import FuseConfigError
from lorafuse.plugin.run import PEAK_MEMORY_GB, TOKENS_PER_SECOND

SAME = ("loss", "grad_norm", "mean_token_accuracy", "entropy")


def build(model: LlamaForCausalLM, tokenizer: Any, folder: Path, **options: Any) -> SFTTrainer:
    """An SFTTrainer on a few random sentences, the same at every call."""
    generator = torch.Generator().manual_seed(1)
    rows = [
        {"input_ids": torch.randint(3, 60, (length,), generator=generator).tolist()}
        for length in (5, 12, 8, 3, 9, 14, 7, 6) * 2
    ]
    args = SFTConfig(
        output_dir=str(folder),
        **{
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "learning_rate": 5e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": True,
            "bf16": False,
            "disable_tqdm": True,
            "seed": 0,
        }
        | options,
    )
    torch.manual_seed(0)
    return SFTTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"),
    )


def logs(trainer: SFTTrainer) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("bf16", [False, True])
def test_a_compiled_run_follows_the_stock_one(bf16, bare_llama, tokenizer, tmp_path) -> None:
    """TRL compiles what it wraps, with its autocast around it, before we fuse."""
    on_cpu = not torch.cuda.is_available()
    weights = {name: value.clone() for name, value in bare_llama.state_dict().items()}
    runs = []
    for compiled in (False, True):
        model = LlamaForCausalLM(bare_llama.config)
        model.load_state_dict(weights)
        trainer = build(
            model, tokenizer, tmp_path, use_cpu=on_cpu, bf16=bf16, gradient_accumulation_steps=2,
            torch_compile=compiled, torch_compile_backend="aot_eager" if compiled else None,
            **({} if on_cpu else {"tf32": False}),  # torch_compile would switch it on
        )  # fmt: skip
        callback = LorafuseCallback(fused_strict=True)
        if compiled:
            trainer.add_callback(callback)
        trainer.train()
        assert isinstance(trainer.model_wrapped, OptimizedModule) == compiled
        runs.append(logs(trainer))
    for stock, fused in zip(*runs, strict=True):
        for name in SAME:
            assert fused[name] == pytest.approx(stock[name], rel=3e-2 if bf16 else 1e-3), name
        assert fused.keys() >= {TOKENS_PER_SECOND, PEAK_MEMORY_GB}
    assert callback.report is not None
    for name, one in callback.report.operations().items():
        # each of 4 steps has two batches
        assert not one.fallbacks and not one.runtime_fallbacks, name
    assert callback.report.operations()["lora_mlp"].calls == 4 * 2 * 2


@pytest.fixture
def both(bare_llama, tokenizer, tmp_path) -> tuple[SFTTrainer, SFTTrainer, LorafuseCallback]:
    """A stock run and a fused one from the same weights, each with its adapter saved."""
    weights = {name: value.clone() for name, value in bare_llama.state_dict().items()}
    stock = build(bare_llama, tokenizer, tmp_path / "stock")
    stock.train()
    stock.save_model()
    again = LlamaForCausalLM(bare_llama.config)
    again.load_state_dict(weights)
    fused = build(again, tokenizer, tmp_path / "fused")
    callback = LorafuseCallback()
    fused.add_callback(callback)
    fused.train()
    fused.save_model()
    return stock, fused, callback


def test_a_run_follows_the_stock_one(both, tmp_path) -> None:
    stock, fused, callback = both
    assert len(logs(stock)) == len(logs(fused)) == 4
    for ours, theirs in zip(logs(fused), logs(stock), strict=True):
        for name in SAME:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-4), name
        assert set(ours) - set(theirs) == {TOKENS_PER_SECOND, PEAK_MEMORY_GB}
    operations = callback.report.operations()
    for name, one in operations.items():
        assert one.called == one.fused and (one.fused or name in ("attention", "moe")), name
    report = json.loads((tmp_path / "fused" / "lorafuse_report.json").read_text("utf-8"))
    assert report["steps"] == 4 and report["operations"]["cross_entropy"]["calls"] == 4


def test_the_saved_adapter_is_pefts(both, tmp_path) -> None:
    _, fused, callback = both
    saved = {
        name: load_file(tmp_path / name / "adapter_model.safetensors")
        for name in ("stock", "fused")
    }
    assert list(saved["stock"]) == list(saved["fused"])
    for name, value in saved["stock"].items():
        torch.testing.assert_close(saved["fused"][name], value, atol=1e-3, rtol=1e-2, msg=name)
    # Plain PEFT computes with it what the fused model does, and what it does when unfused.
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(2))
    torch.manual_seed(0)
    fused.model.eval()
    base = LlamaForCausalLM(fused.model.get_base_model().config)
    plain_names = {n.replace(".base_layer", ""): v for n, v in fused.model.state_dict().items()}
    prefix = "base_model.model."
    base.load_state_dict(
        {n.removeprefix(prefix): v for n, v in plain_names.items() if "lora_" not in n}
    )
    plain = PeftModel.from_pretrained(base, tmp_path / "fused").eval()
    with torch.no_grad():
        expected = plain(input_ids=ids).logits
        torch.testing.assert_close(fused.model(input_ids=ids).logits, expected)
        callback.report.unfuse()
        assert torch.equal(fused.model(input_ids=ids).logits, expected)


def test_a_mixture_of_experts_follows_the_stock_run(tokenizer, tmp_path) -> None:
    """PEFT's "all-linear" adapts the experts; with the auxiliary loss, checkpointed as TRL does."""
    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2,
        output_router_logits=True, pad_token_id=0,
    )  # fmt: skip
    runs = []
    for name in ("stock", "fused"):
        torch.manual_seed(3)
        trainer = build(MixtralForCausalLM(config), tokenizer, tmp_path / name)
        if name == "fused":
            callback = LorafuseCallback()
            trainer.add_callback(callback)
        trainer.train()
        trainer.save_model()
        runs.append((logs(trainer), load_file(tmp_path / name / "adapter_model.safetensors")))
    (stock, saved), (fused, ours) = runs
    for mine, theirs in zip(fused, stock, strict=True):
        for name in {*SAME, "aux_loss"} & set(theirs):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-4), name
    row = callback.report.operations()["moe"]
    assert row.called == row.fused == row.found == 2 and row.calls >= 8
    assert sum("experts" in name for name in saved) == 2 * 4
    assert list(ours) == list(saved)
    for name, value in saved.items():
        torch.testing.assert_close(ours[name], value, atol=1e-3, rtol=1e-2, msg=name)


def test_only_what_is_named_is_fused(bare_llama, tokenizer, tmp_path) -> None:
    trainer = build(bare_llama, tokenizer, tmp_path, max_steps=1)
    callback = LorafuseCallback(fused_lora_mlp=True, fused_cross_entropy=True)
    trainer.add_callback(callback)
    trainer.train()
    fused = {name: one.called for name, one in callback.report.operations().items() if one.asked}
    assert fused == {"lora_mlp": 2, "cross_entropy": 1}


def test_a_trainer_that_copies_the_model_in_each_step_trains_as_stock(
    bare_llama, tokenizer, tmp_path
) -> None:
    """Several GPUs in one process: transformers takes DataParallel."""
    trainer = build(bare_llama, tokenizer, tmp_path)
    callback = LorafuseCallback()
    trainer.args._n_gpu = 2
    callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)
    assert not any(one.fused for one in callback.report.operations().values())
    (reason,) = callback.report.operations()["lora_mlp"].fallbacks
    assert "start one process a GPU" in reason.reason


def test_it_takes_a_configuration_or_flags() -> None:
    config = FuseConfig(fused_rope=False)
    assert LorafuseCallback(config).config is config
    assert LorafuseCallback(fused_rope=False).config == config
    assert LorafuseCallback().config == FuseConfig()
    with pytest.raises(FuseConfigError, match="not both"):
        LorafuseCallback(config, fused_rope=True)
    with pytest.raises(FuseConfigError, match="did you mean `fused_rope`"):
        LorafuseCallback(fused_roep=True)
