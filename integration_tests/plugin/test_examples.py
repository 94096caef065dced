"""The example YAMLs: each passes Axolotl's own validation, and fuses what it asks for."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from axolotl.cli.config import prepare_plugins
from axolotl.integrations.config import merge_input_args
from axolotl.utils.config import validate_config
from axolotl.utils.dict import DictDefault
from transformers import Gemma2Config, LlamaConfig, PretrainedConfig, Qwen3Config

from lorafuse.plugin.config import OPERATIONS
from lorafuse.plugin.doctor import diagnose

FOLDER = Path(__file__).parents[2] / "example_configs"
FILES = sorted(FOLDER.glob("*.yaml"))
# What kind of model each is about; its real config is not here.
KINDS: dict[str, PretrainedConfig] = {
    "smollm2": LlamaConfig(num_attention_heads=9, num_key_value_heads=3, hidden_size=576),
    "llama-3.1": LlamaConfig(num_key_value_heads=8),
    "qwen3": Qwen3Config(),
    "gemma-2": Gemma2Config(),
}
# As axolotl.cli.config.gpu_capabilities finds them on one H100.
H100 = {"bf16": True, "fp8": True, "tf32": True, "n_gpu": 1, "n_node": 1,
        "compute_capability": "sm_90"}  # fmt: skip
TORCH = {"torch_version": "2.11.0"}


def test_the_promised_examples_are_there() -> None:
    assert {file.stem for file in FILES} >= {
        "smollm2-135m-lora",
        "smollm2-135m-qlora",
        "llama-3.1-8b-lora",
        "llama-3.1-8b-qlora",
        "llama-3.1-8b-qlora-long",
        "llama-3.1-8b-qlora-short",
        "qwen3-8b-qlora",
        "gemma-2-9b-qlora",
    }
    assert (FOLDER / "sft_trl.py").is_file()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_axolotl_accepts_it(file: Path) -> None:
    settings: dict[str, Any] = yaml.safe_load(file.read_text("utf-8"))
    cfg = DictDefault(settings)
    prepare_plugins(cfg)
    # Axolotl drops a key that it does not know without a word.
    schema, _ = merge_input_args()
    assert set(settings) <= set(schema.model_fields)
    validated = validate_config(cfg, capabilities=H100, env_capabilities=TORCH)
    assert validated.fused is True
    assert validated.adapter == ("qlora" if settings.get("load_in_4bit") else "lora")
    assert not any(validated[f"lora_{name}_kernel"] for name in ("mlp", "qkv", "o"))
    for name in set(settings) - {"bf16", "datasets"}:
        assert validated[name] == settings[name], name


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_everything_that_it_asks_for_is_fused(file: Path, tmp_path: Path) -> None:
    (kind,) = (config for name, config in KINDS.items() if file.stem.startswith(name))
    kind.save_pretrained(tmp_path / "model")
    settings = yaml.safe_load(file.read_text("utf-8")) | {"base_model": str(tmp_path / "model")}
    copy = tmp_path / file.name
    copy.write_text(yaml.safe_dump(settings), "utf-8")
    diagnosis = diagnose(str(copy))
    assert diagnosis.advice == ""
    operations = diagnosis.report.operations()
    # Which attention is fastest is the GPU's business, and the examples' models are dense.
    others = set(OPERATIONS) - {"fused_attention", "fused_moe"}
    for name in (flag.removeprefix("fused_") for flag in others):
        one = operations[name]
        assert one.asked and one.called == one.found > 0, (name, one.fallbacks)
        assert not one.runtime_fallbacks, name
    assert operations["lora_mlp"].levels == {"layer": 2}
