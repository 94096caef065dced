"""The plugin in the real `axolotl train`: parity, what it says, what it refuses, what it saves."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

PLUGIN = {"plugins": ["lorafuse.LorafusePlugin"]}
STOCK = {"lora_mlp_kernel": False}  # Axolotl's own kernels need a GPU


def history(folder: Path) -> list[dict[str, Any]]:
    """The logged steps of a run's newest checkpoint."""
    states = sorted(folder.glob("checkpoint-*/trainer_state.json"), key=lambda p: p.stat().st_mtime)
    logs = json.loads(states[-1].read_text(encoding="utf-8"))["log_history"]
    return [entry for entry in logs if "loss" in entry]


def compare(stock: list[dict[str, Any]], fused: list[dict[str, Any]], steps: int) -> None:
    """Every step's loss within 1e-4 of stock's, its gradient norm within 1e-3 relative."""
    assert len(stock) == len(fused) == steps
    for a, b in zip(stock, fused, strict=True):
        assert abs(a["loss"] - b["loss"]) < 1e-4, (a["step"], a["loss"], b["loss"])
        assert abs(b["grad_norm"] / a["grad_norm"] - 1) < 1e-3, (a["step"], a, b)


def report(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "lorafuse_report.json").read_text("utf-8"))
    return loaded


@pytest.mark.slow
def test_fifty_steps_of_a_real_model_follow_the_stock_run(axolotl, assets, tmp_path) -> None:
    common = {
        "base_model": str(assets / "smollm2-135m"),
        "lora_model_dir": str(assets / "start"),
        "max_steps": 50,
        "save_steps": 50,
        "sequence_len": 64,
    }
    axolotl("stock", **common, **STOCK)
    axolotl("fused", **common, **PLUGIN, fused=True, fused_strict=True)
    compare(history(tmp_path / "stock"), history(tmp_path / "fused"), steps=50)
    operations = report(tmp_path / "fused")["operations"]
    for name in ("lora_mlp", "lora_qkv", "lora_o", "rope"):
        assert operations[name]["fused"] == operations[name]["called"] == 30, operations[name]
    assert operations["rms_norm"]["called"] == 61
    assert operations["cross_entropy"]["calls"] == 50


@pytest.fixture(scope="session")
def start(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A seeded adapter for the tiny Llama, for runs that must start alike."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    folder = tmp_path_factory.mktemp("adapters") / "start"
    get_peft_model(model, config).save_pretrained(folder)
    return folder


def test_resume_continues_the_unbroken_run(axolotl, tiny_llama, start, tmp_path) -> None:
    common = {
        "base_model": str(tiny_llama),
        "lora_model_dir": str(start),
        "save_steps": 3,
        **PLUGIN,
        "fused": True,
    }
    axolotl("whole", **common, max_steps=6)
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    axolotl("resumed", **common, max_steps=6, resume_from_checkpoint=str(checkpoint))
    compare(history(tmp_path / "whole"), history(tmp_path / "resumed"), steps=6)


def test_accumulation_packing_checkpointing_compiling_and_the_saved_adapter(
    axolotl, tiny_llama, start, tmp_path
) -> None:
    common = {
        "base_model": str(tiny_llama),
        "lora_model_dir": str(start),
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True,
        "sample_packing": True,
        "pad_to_sequence_len": True,
        "save_steps": 4,
    }
    axolotl("stock", **common, **STOCK)
    result = axolotl("fused", **common, **PLUGIN, fused=True)
    compare(history(tmp_path / "stock"), history(tmp_path / "fused"), steps=4)
    assert "lorafuse 0.1.0: will fuse" in result.stdout
    stock, fused = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("stock", "fused")
    )
    assert list(stock) == list(fused)
    for key in stock:
        assert (stock[key] - fused[key]).abs().max() < 2e-3, key
    configs = [
        json.loads((tmp_path / name / "adapter_config.json").read_text("utf-8"))
        for name in ("stock", "fused")
    ]
    for config in configs:  # a set, written in any order
        config["target_modules"] = sorted(config["target_modules"])
    assert configs[0] == configs[1]
    logged = history(tmp_path / "fused")[-1]
    assert logged["lorafuse/tokens_per_second"] > 0
    compiled = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    axolotl("compiled", **common, **compiled, **PLUGIN, fused=True, fused_strict=True)
    compare(history(tmp_path / "stock"), history(tmp_path / "compiled"), steps=4)
    operations = report(tmp_path / "compiled")["operations"]
    assert operations["lora_mlp"]["calls"] == 2 * operations["cross_entropy"]["calls"] == 16
    # chosen flags alone are fused
    some = axolotl("some", base_model=str(tiny_llama), **PLUGIN, fused_lora_mlp=True, max_steps=1)
    operations = report(tmp_path / "some")["operations"]
    assert operations["lora_mlp"]["called"] == 2
    assert not operations["lora_qkv"]["asked"] and not operations["cross_entropy"]["asked"]
    assert "fused_lora_qkv" not in some.stdout.split("when the trainer is built")[0]


def test_qlora_on_cpu_follows_the_stock_run(axolotl, tiny_llama, start, tmp_path) -> None:
    common = {
        "base_model": str(tiny_llama),
        "lora_model_dir": str(start),
        "adapter": "qlora",
        "load_in_4bit": True,
        "save_steps": 4,
    }
    axolotl("stock", **common, **STOCK)
    axolotl("fused", **common, **PLUGIN, fused=True)
    compare(history(tmp_path / "stock"), history(tmp_path / "fused"), steps=4)
    operations = report(tmp_path / "fused")["operations"]
    assert operations["lora_mlp"]["called"] == operations["lora_qkv"]["called"] == 2


def test_an_unsupported_model_trains_as_stock_and_says_why(axolotl, tiny_gpt2, tmp_path) -> None:
    settings = {
        "base_model": str(tiny_gpt2),
        "lora_target_linear": False,
        "lora_target_modules": ["c_attn", "c_proj", "c_fc"],
        "save_steps": 4,
        **PLUGIN,
        "fused": True,
        "fused_cross_entropy": False,
    }
    result = axolotl("gpt2", **settings)
    assert len(history(tmp_path / "gpt2")) == 4
    operations = report(tmp_path / "gpt2")["operations"]
    assert all(one["fused"] == 0 for one in operations.values())
    assert "no gated MLP" in result.stdout and "GPT2LMHeadModel" in result.stdout
    strict = axolotl("strict", **settings, fused_strict=True, fails=True)
    last = strict.stdout.strip().splitlines()[-12:]
    assert any("no gated MLP" in line for line in last), last
    assert not list((tmp_path / "strict").glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fused": True, "lora_mlp_kernel": True}, "contradicts the fused_* flags"),
        ({"fused_cross_entropy": True, "cut_cross_entropy": True}, "cross-entropy optimisations"),
        ({"fused_lora_mpl": True}, "fused_lora_mlp"),
        ({"fused": True, "fused_memory_gb": -4}, "GB of GPU memory"),
    ],
    ids=["both kernels", "two cross-entropies", "misspelt flag", "negative memory"],
)
def test_wrong_settings_stop_before_the_model_loads(axolotl, tmp_path, settings, message) -> None:
    # The model does not exist: an error about it would mean that ours came too late.
    result = axolotl(
        "wrong", base_model=str(tmp_path / "nowhere"), **PLUGIN, **settings, fails=True
    )
    lines = [line for line in result.stdout.strip().splitlines() if line.strip()]
    assert message in " ".join(lines[-4:]), lines[-8:]
    assert "nowhere" not in lines[-1]
