"""What the end-to-end tests share: the real small model and text, tiny models, and the real CLI."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "AXOLOTL_DO_NOT_TRACK": "1",
    "WANDB_MODE": "disabled",
    "TOKENIZERS_PARALLELISM": "false",
    "COLUMNS": "160",
}


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of demo/assets.py: smollm2-135m, dialogues.jsonl and start (a fresh adapter)."""
    folder = ROOT / ".demo"
    spec = importlib.util.spec_from_file_location("demo_assets", ROOT / "demo" / "assets.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(folder)
    return folder


def _save_tiny(folder: Path, assets: Path, config: Any) -> Path:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(assets / "smollm2-135m").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llama(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with SmolLM2's tokenizer."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return _save_tiny(tmp_path_factory.mktemp("models") / "tiny-llama", assets, config)


@pytest.fixture(scope="session")
def tiny_gpt2(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer GPT-2: no gated MLP, no q/k/v/o attention, transposed weights."""
    from transformers import GPT2Config

    config = GPT2Config(
        vocab_size=49152,
        n_embd=64,
        n_layer=2,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return _save_tiny(tmp_path_factory.mktemp("models") / "tiny-gpt2", assets, config)


Axolotl = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def axolotl(assets: Path, tmp_path: Path) -> Axolotl:
    """Runs the real `axolotl train` on a YAML of these settings; output_dir is tmp_path/name."""

    def run(
        name: str, *, fails: bool = False, **settings: Any
    ) -> "subprocess.CompletedProcess[str]":
        config: dict[str, Any] = {
            "adapter": "lora",
            "lora_r": 8,
            "lora_alpha": 16,
            "lora_dropout": 0.0,
            "lora_target_linear": True,
            "datasets": [{"path": str(assets / "dialogues.jsonl"), "type": "chat_template"}],
            "chat_template": "tokenizer_default",
            "dataset_prepared_path": str(tmp_path / "prepared"),
            "sequence_len": 128,
            "excess_length_strategy": "drop",
            "val_set_size": 0,
            "micro_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "optimizer": "adamw_torch",
            "learning_rate": 0.0005,
            "lr_scheduler": "constant",
            "seed": 42,
            "bf16": False,
            "fp16": False,
            "tf32": False,
            "logging_steps": 1,
            "save_steps": 1000,
            "max_steps": 4,
            "output_dir": str(tmp_path / name),
        } | settings
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        command = [str(Path(sys.executable).with_name("axolotl")), "train", str(file)]
        result = subprocess.run(
            [*command, "--launcher", "python"],
            env=os.environ | OFFLINE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
        )
        assert (result.returncode != 0) == fails, result.stdout[-4000:]
        return result

    return run
