"""`lorafuse doctor` and `--version`: what they print, and with which exit code."""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoConfig, Gemma3TextConfig, LlamaConfig, Phi3Config, PretrainedConfig
from typer.testing import CliRunner, Result

from lorafuse.plugin.cli import app
from lorafuse.plugin.config import OPERATIONS
from lorafuse.plugin.environment import PACKAGES
from lorafuse.plugin.sketch import shrink

PLUGIN = {"plugins": ["lorafuse.LorafusePlugin"]}
LORA = {"adapter": "lora", "lora_r": 8, "lora_alpha": 16, "lora_target_linear": True}


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def rows(output: str) -> dict[str, list[str]]:
    """The table's cells by operation; what a cell has on its other lines is joined to the first."""
    found: dict[str, list[str]] = {}
    for line in output.splitlines():
        if line.startswith("│"):
            name, *cells = [cell.strip() for cell in line.strip("│").split("│")]
            if name:
                current = found[name] = cells
            else:
                current[:] = [f"{a} {b}".strip() for a, b in zip(current, cells, strict=True)]
    return found


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """A large Llama's config, and nothing else."""
    folder = tmp_path / "llama"
    LlamaConfig(num_key_value_heads=8).save_pretrained(folder)
    return folder


@pytest.fixture
def write(tmp_path: Path, model_dir: Path) -> Any:
    """Writes a YAML of these settings, about `model_dir` unless they say otherwise."""

    def one(**settings: Any) -> str:
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump({"base_model": str(model_dir)} | settings), "utf-8")
        return str(file)

    return one


def test_version() -> None:
    result = invoke("--version")
    assert (result.exit_code, result.output) == (0, f"lorafuse {version('lorafuse')}\n")


def test_the_console_script_is_fast_and_loads_no_torch() -> None:
    code = "import sys, lorafuse.plugin.cli; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "False\n", result.stderr
    script = Path(sys.executable).with_name("lorafuse")
    result = subprocess.run([script, "--version"], capture_output=True, text=True)
    assert result.stdout == f"lorafuse {version('lorafuse')}\n"


def test_a_model_without_weights(model_dir: Path) -> None:
    result = invoke("doctor", str(model_dir))
    assert result.exit_code == 0, result.output
    for package in PACKAGES:
        assert package in result.output.splitlines()[0]
    assert "GPU: " in result.output.splitlines()[1]
    assert "LlamaForCausalLM, 32 layers; tried on a copy of 2 narrow layers" in result.output
    table = rows(result.output)
    assert list(table) == [*OPERATIONS, "fused_checkpointing", "fused_traversal"]
    assert table["fused_moe"] == ["yes", "0", "0", "0", "", ""]  # a dense model
    for name in set(OPERATIONS[:-1]) - {"fused_moe"}:
        asked, found, fused, called, _, why = table[name]
        assert (asked, why) == ("yes", "") and found == fused == called != "0", name
    assert table["fused_lora_mlp"][4] == "layer"
    assert list(model_dir.iterdir()) == [model_dir / "config.json"]


def test_a_yaml_says_what_is_asked_for(write: Any) -> None:
    result = invoke("doctor", write(**PLUGIN, **LORA, fused_lora_mlp=True, fused_rope=True))
    assert result.exit_code == 0, result.output
    table = rows(result.output)
    assert table["fused_lora_mlp"][:4] == ["yes", "2", "2", "2"]
    assert table["fused_lora_qkv"][0] == "no"
    assert "only together with fused_lora_qkv" in table["fused_rope"][5]
    assert "in float32" in result.output


def test_padding_is_left_out_of_the_step_that_is_tried(write: Any) -> None:
    settings = {"fused": True, "fused_padding_free": True}
    result = invoke("doctor", write(**PLUGIN, **LORA, **settings))
    assert result.exit_code == 0 and "every call fell back" not in result.output, result.output
    assert rows(result.output)["fused_padding_free"][:4] == ["yes", "1", "1", "1"]


@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
def test_qlora_is_quantised_as_axolotl_does_it(write: Any, double: bool) -> None:
    pytest.importorskip("bitsandbytes")
    settings: dict[str, Any] = {"adapter": "qlora", "load_in_4bit": True, "bf16": "auto"}
    if not double:
        settings["bnb_config_kwargs"] = {"bnb_4bit_use_double_quant": False}
    result = invoke("doctor", write(**PLUGIN, **LORA | settings, fused=True, fused_strict=True))
    assert result.exit_code == 0, result.output
    table = rows(result.output)
    assert table["fused_lora_mlp"][:5] == ["yes", "2", "2", "2", "layer"]
    assert "in bfloat16" in result.output


def test_adapter_settings_decide(write: Any) -> None:
    dora = LORA | {"lora_target_linear": False, "lora_target_modules": ["gate_proj", "q_proj"]}
    result = invoke("doctor", write(**PLUGIN, **dora, peft_use_dora=True, fused=True))
    assert result.exit_code == 0, result.output
    table = rows(result.output)
    assert table["fused_lora_mlp"][:4] == ["yes", "2", "0", "0"]
    assert "LoRA variant" in table["fused_lora_mlp"][5].replace("\n", " ")


def test_a_saved_adapter_is_read(write: Any, tmp_path: Path) -> None:
    from peft import LoraConfig

    LoraConfig(r=4, target_modules=["up_proj"], use_dora=True).save_pretrained(tmp_path / "saved")
    settings = {"adapter": "lora", "lora_model_dir": str(tmp_path / "saved")}
    result = invoke("doctor", write(**PLUGIN, **settings, fused=True))
    assert "LoRA variant" in rows(result.output)["fused_lora_mlp"][5], result.output


def test_a_model_that_cannot_be_fused(write: Any, tmp_path: Path) -> None:
    from transformers import GPT2Config

    GPT2Config().save_pretrained(tmp_path / "gpt2")
    settings = PLUGIN | LORA | {"base_model": str(tmp_path / "gpt2"), "fused": True}
    result = invoke("doctor", write(**settings))
    assert result.exit_code == 0
    table = rows(result.output)
    assert "no gated MLP" in table["fused_lora_mlp"][5]
    assert table["fused_cross_entropy"][:4] == ["yes", "1", "1", "1"]
    # Strict: the table is still there, and then the error.
    strict = invoke("doctor", write(**settings, fused_strict=True))
    assert strict.exit_code == 1
    assert rows(strict.output) == table
    assert "error: fused_strict is set" in strict.stderr and "no gated MLP" in strict.stderr


def test_a_setting_that_owns_the_forwards(write: Any) -> None:
    result = invoke("doctor", write(**PLUGIN, **LORA, fused=True, tiled_mlp=True))
    assert result.exit_code == 0
    assert "`tiled_mlp` replaces" in rows(result.output)["fused_lora_mlp"][5]


@pytest.mark.parametrize(
    ("settings", "missing"),
    [
        ({}, "add `plugins: [lorafuse.LorafusePlugin]` and `fused: true`"),
        (PLUGIN, "add `fused: true`"),
    ],
    ids=["neither", "no flag"],
)
def test_a_yaml_that_asks_for_nothing_is_told_what_it_would_get(
    write: Any, settings: dict[str, Any], missing: str
) -> None:
    result = invoke("doctor", write(**LORA, **settings))
    assert result.exit_code == 0, result.output
    assert f"this YAML trains as stock; {missing}" in result.output
    assert rows(result.output)["fused_lora_mlp"][0] == "yes"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (LORA | {"fused": True}, "`fused` has no effect, for `plugins` does not list lorafuse"),
        (PLUGIN | {"fused_lora_mpl": True}, "did you mean `fused_lora_mlp`"),
        (PLUGIN | {"fused": True, "lora_qkv_kernel": True}, "contradicts the fused_* flags"),
        (PLUGIN | {"unsloth_rope": True}, "write `fused_rope` for `unsloth_rope`"),
        (PLUGIN | {"fused": True, "base_model": "org/not-cached"}, "neither a folder here nor a"),
        (PLUGIN | {"fused": True, "model_type": "NoSuch"}, "is not a class of transformers"),
        (PLUGIN | {"fused": True, "adapter": "prefix"}, "use lora or qlora"),
        (
            PLUGIN | LORA | {"fused": True, "lora_target_linear": False,
                             "lora_target_modules": ["nope"]},
            "PEFT refuses the adapter's settings",
        ),
        ({"base_model": None}, "has no `base_model`"),
    ],
)  # fmt: skip
def test_wrong_settings(write: Any, settings: dict[str, Any], message: str) -> None:
    result = invoke("doctor", write(**settings))
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("error: ") and message in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"base_model: [unclosed\n", "is not a YAML file"),
        (b"\xff\xfe\x00\x01", "is not a YAML file"),
        (b"- just\n- a list\n", "it holds a list, not settings"),
        (b"", "it holds a NoneType, not settings"),
        (b"lora_r: 8\n", "has no `base_model`"),
    ],
    ids=["broken", "binary", "list", "empty", "no model"],
)
def test_files_that_are_no_axolotl_yaml(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "some.yaml"
    file.write_bytes(content)
    result = invoke("doctor", str(file))
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ") and message in result.stderr


def test_targets_that_are_no_model(tmp_path: Path) -> None:
    result = invoke("doctor", str(tmp_path))
    assert result.exit_code == 1 and "it has no config.json" in result.stderr
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "it holds an adapter" in invoke("doctor", str(tmp_path)).stderr
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "made_up"}))
    result = invoke("doctor", str(tmp_path))
    assert result.exit_code == 1 and "cannot be read" in result.stderr
    for missing in (str(tmp_path / "missing.yaml"), "someone/never-downloaded"):
        result = invoke("doctor", missing)
        assert result.exit_code == 1
        assert f"{missing} is neither a folder here nor a model in the local" in result.stderr


def test_a_quantised_checkpoint_without_a_stand_in(model_dir: Path) -> None:
    config = AutoConfig.from_pretrained(model_dir)
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    config.save_pretrained(model_dir)
    result = invoke("doctor", str(model_dir))
    assert result.exit_code == 1 and "quantised with gptq" in result.stderr


@pytest.mark.parametrize(
    ("config", "heads", "shared"),
    [
        (LlamaConfig(num_attention_heads=32, num_key_value_heads=8), 4, 2),
        (LlamaConfig(num_attention_heads=32, num_key_value_heads=32), 2, 2),
        (LlamaConfig(num_attention_heads=8, num_key_value_heads=1), 2, 1),
        (Phi3Config(), 2, 2),
        (Gemma3TextConfig(num_attention_heads=8, num_key_value_heads=4), 4, 2),
    ],
    ids=["shared heads", "own heads", "one head", "phi3", "gemma3"],
)
def test_shrinking_keeps_the_structure(config: PretrainedConfig, heads: int, shared: int) -> None:
    before = config.to_dict()
    small = shrink(config)
    assert config.to_dict() == before
    assert (small.num_attention_heads, small.num_key_value_heads) == (heads, shared)
    assert small.num_hidden_layers == 2
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    square = config.hidden_size == config.num_attention_heads * size
    assert (small.hidden_size == heads * size) == square
    kinds = getattr(config, "layer_types", None)
    if kinds:
        assert set(small.layer_types) == set(kinds) and len(small.layer_types) == 2


def test_layers_that_only_a_list_tells_apart_are_all_kept() -> None:
    config = LlamaConfig(num_hidden_layers=6)
    config.widths = [1, 1, 2, 2, 3, 1]
    assert shrink(config).widths == [1, 2, 3]
    assert shrink(config).num_hidden_layers == 3


def test_fp8_is_a_matter_of_the_gpu(write) -> None:
    settings = PLUGIN | LORA | {"fused": True, "fused_fp8": True, "fused_strict": True}
    result = invoke("doctor", write(**settings))
    assert result.exit_code == 0, result.output
    assert "note: fused_fp8: " in result.output and "tried here without it" in result.output
    assert "fused_fp8" not in rows(result.output)
