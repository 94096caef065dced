"""`lorafuse plan`: what it reads, prints and writes, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import GPT2Config, LlamaConfig, MixtralConfig
from typer.testing import CliRunner, Result

from lorafuse.plugin.cli import app
from lorafuse.plugin.plan_target import read_target, read_targets
from lorafuse.plugin.planner import ALL_MODES, CARDS, PARTS

LORA: dict[str, Any] = {
    "adapter": "qlora", "load_in_4bit": True, "lora_r": 8, "lora_target_linear": True,
    "bf16": "auto", "sequence_len": 512, "micro_batch_size": 3, "optimizer": "adamw_8bit",
}  # fmt: skip


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["plan", *arguments])


def cells(output: str) -> list[list[str]]:
    """The rows of both tables."""
    return [
        [cell.strip() for cell in line.strip("│").split("│")]
        for line in output.splitlines()
        if line.startswith("│")
    ]


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "llama"
    LlamaConfig(
        hidden_size=512, intermediate_size=1024, num_hidden_layers=3, num_key_value_heads=8,
        num_attention_heads=8, max_position_embeddings=2048,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture
def write(tmp_path: Path, model_dir: Path) -> Any:
    """Writes a YAML of these settings, about `model_dir` unless they say otherwise."""

    def one(**settings: Any) -> str:
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump({"base_model": str(model_dir)} | LORA | settings), "utf-8")
        return str(file)

    return one


def test_a_geometry_by_name(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    result = invoke("llama-3.2-1b", "--tokens", "1000", "--rank", "16", "--json", str(file))
    assert result.exit_code == 0, result.output
    assert "llama-3.2-1b (16 layers, 1.24 billion parameters), NF4, LoRA r=16, 2 × 1,000 tokens, " \
        "8-bit AdamW" in " ".join(result.output.split())  # fmt: skip
    assert "A prediction, not a measurement." in result.output
    rows = cells(result.output)
    names = ["off", "selective", "offload", "≈ stock, checkpointing"]
    bodies = [row for row in rows if row[0] in names]
    assert [row[0] for row in bodies] == names * 2
    content = json.loads(file.read_text("utf-8"))
    assert (content["model"], content["layers"], content["tokens"]) == ("llama-3.2-1b", 16, 1000)
    assert [one["mode"] for one in content["modes"]] == list(ALL_MODES)
    for one, row in zip(content["modes"], bodies[:4], strict=True):
        assert list(one["parts"]) == list(PARTS)
        assert sum(one["parts"].values()) == one["peak_bytes"]
        assert row[1:8] == [f"{x / 1e9:.2f}" for x in (one["peak_bytes"], *one["parts"].values())]
    assert content["modes"][0]["relative_time"] == 1
    assert content["modes"][-1]["relative_time"] is None
    for mode, row in zip(ALL_MODES, bodies[4:], strict=True):
        longest = content["longest_tokens"][mode]
        assert list(longest) == ["16", "24", "48", "80", "141"]
        assert [cell.removeprefix("✓ ") for cell in row[1:]] == [f"{n:,}" for n in longest.values()]
        assert all(cell.startswith("✓ ") == (n >= 1000) for cell, n in
                   zip(row[1:], longest.values(), strict=True))  # fmt: skip


def test_what_auto_chooses(write: Any, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    options = ("--tokens", "8192", "--batch", "4", "--json", str(file))
    result = invoke("llama-3.1-8b", *options, "--memory", "30")
    assert result.exit_code == 0, result.output
    found = json.loads(file.read_text("utf-8"))["auto"]
    rows = cells(result.output)
    for one, name in zip(
        found, [*(f"{card} GB" for card in CARDS), "fused_memory_gb 30"], strict=True
    ):
        (row,) = [row for row in rows if row[0] == name]
        layers = ", ".join(f"{count} {mode}" for mode, count in one["layers"].items())
        waits = f"; gate/up of {one['spilled']} on the host" if one["spilled"] else ""
        assert row[1] == layers + waits
        assert row[2] == ("✓ " if one["fits"] else "") + f"{one['peak_bytes'] / 1e9:.2f}"
        assert row[4] == f"{one['relative_time']:.2f}"
    yaml_file = write(fused=True, fused_memory_gb=3)
    assert "fused_memory_gb 3 " in invoke(yaml_file).output
    assert "fused_memory_gb 2 " in invoke(yaml_file, "--memory", "2").output
    limited = " ".join(invoke(write(fused=True, fused_host_gb=3)).output.split())
    assert "with 3 GB of the host's memory to pin" in limited


def test_a_yaml_and_what_comes_before_it(write: Any, model_dir: Path) -> None:
    plain = invoke(write())
    assert plain.exit_code == 0, plain.output
    said = " ".join(plain.output.split())
    assert "(3 layers, " in said
    assert "NF4, LoRA r=8, 3 × 512 tokens, 8-bit AdamW" in said
    changed = invoke(
        write(gradient_accumulation_steps=4), "--tokens", "640", "--batch", "1", "--rank", "4",
        "--quant", "none", "--targets", "q_proj, v_proj", "--optimizer", "adamw", "--layers", "2",
        "--documents", "2", "--host", "64",
    )  # fmt: skip
    assert changed.exit_code == 0, changed.output
    said = " ".join(changed.output.split())
    assert "(2 layers, " in said
    assert "bf16, LoRA r=4 on q_proj,v_proj, 1 × 640 tokens, 2 documents a row, AdamW, " in said
    assert "gradients accumulated" in said
    assert "offload: with 64 GB of the host's memory to pin" in said
    assert "the model was made for 2,048 positions" in said


@pytest.mark.parametrize(
    ("settings", "fields"),
    [
        ({}, {"tokens": 512, "batch": 3, "rank": 8, "quant": "nf4", "targets": "all-linear"}),
        ({"load_in_4bit": False, "adapter": "lora"}, {"quant": "none"}),
        ({"bnb_config_kwargs": {"bnb_4bit_use_double_quant": False}}, {"double_quant": False}),
        ({"optimizer": "adamw_torch_fused"}, {"optimizer": "adamw"}),
        ({"optimizer": None, "sequence_len": None, "micro_batch_size": None, "lora_r": None},
         {"optimizer": "adamw", "tokens": 512, "batch": 1, "rank": 8}),
        ({"peft_autocast_adapter_dtype": False}, {"adapter_bytes": 2}),
        ({"lora_target_linear": False, "lora_target_modules": ["q_proj", "o_proj"]},
         {"targets": ("q_proj", "o_proj")}),
        ({"lora_target_linear": False, "lora_target_modules": r".*\.mlp\..*"},
         {"targets": r".*\.mlp\..*"}),
        ({"gradient_accumulation_steps": 2}, {"accumulates": True}),
        ({"fused": True, "fused_folded_weights": True}, {"folded_weights": True}),
        ({}, {"folded_weights": False}),
    ],
)  # fmt: skip
def test_what_a_yaml_says(write: Any, settings: dict[str, Any], fields: dict[str, Any]) -> None:
    workload, _ = read_target(write(**settings), {})
    assert {name: getattr(workload, name) for name in fields} == fields


@pytest.mark.parametrize(
    ("settings", "note"),
    [
        ({"tiled_mlp": True}, "only the last row holds: `tiled_mlp` replaces"),
        ({"deepspeed": "zero2.json"}, "sharding needs less"),
        ({"optimizer": "paged_adamw_8bit"}, "the paged optimiser's states are counted on the GPU"),
        ({"sample_packing": True}, "packed rows are counted as one document"),
    ],
)
def test_what_else_is_to_be_said(write: Any, settings: dict[str, Any], note: str) -> None:
    _, notes = read_target(write(**settings), {})
    assert any(note in one for one in notes)


def test_long_rows_of_a_window_are_said_to_be_rough() -> None:
    shorter, longer = (
        read_target("gemma-2-9b", {"layers": 2, "tokens": tokens})[1] for tokens in (4096, 4097)
    )
    # transformers 5.24 adds a note of its own: its Gemma 2 is eager
    assert not any("grows with the square" in note for note in shorter)
    assert "grows with the square" in longer[0]


def test_the_rest_in_fp32(tmp_path: Path, write: Any) -> None:
    file = tmp_path / "plan.json"
    result = invoke("tiny", "--prepare-kbit", "--json", str(file))
    assert result.exit_code == 0, result.output
    assert "NF4, the rest in fp32" in " ".join(result.output.split())
    assert json.loads(file.read_text("utf-8"))["prepare_kbit"] is True
    refused = invoke(write(), "--prepare-kbit")
    assert refused.exit_code == 1 and "--prepare-kbit is for a script of your own" in refused.stderr


def test_a_models_folder(model_dir: Path) -> None:
    result = invoke(str(model_dir))
    assert result.exit_code == 0, result.output
    assert "LoRA r=32, 2 × 4,096 tokens" in " ".join(result.output.split())


def test_a_quantised_checkpoint_says_how(model_dir: Path) -> None:
    file = model_dir / "config.json"
    config = json.loads(file.read_text("utf-8"))
    own = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    file.write_text(json.dumps(config | {"quantization_config": own}), "utf-8")
    workload, _ = read_target(str(model_dir), {})
    assert (workload.quant, workload.double_quant) == ("nf4", False)
    file.write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}}), "utf-8"
    )
    result = invoke(str(model_dir))
    assert result.exit_code == 1 and "are quantised with gptq, which is not" in result.stderr


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adapter": None}, "`adapter: None` is not predicted; `lorafuse plan` is for"),
        ({"load_in_8bit": True, "load_in_4bit": False}, "`load_in_8bit` is not predicted, for"),
        ({"peft_use_dora": True}, "`peft_use_dora` is not predicted, for DoRA is trained as stock"),
        ({"lora_modules_to_save": ["lm_head"]}, "`lora_modules_to_save` is not predicted"),
        ({"bf16": False}, "trains in fp32, which is not predicted; write `bf16: true`"),
        ({"sequence_len": "long"}, "`sequence_len: 'long'` is not supported; give a whole number"),
        ({"lora_r": 0}, "`lora_r: 0` is not supported; give a whole number from 1 to 1,000"),
        ({"optimizer": "muon"}, "`optimizer: muon` is not predicted; use one of adamw_8bit"),
        ({"fused_lora_mpl": True}, "did you mean `fused_lora_mlp`"),
        ({"base_model": "org/not-cached"}, "neither a folder here nor a model in the local"),
        ({"base_model": None}, "has no `base_model`"),
        ({"sequence_len": 1}, "`sequence_len: 1` is not supported; give a whole number from 2 to"),
        ({"sequence_len": 10**12}, "give a whole number from 2 to 1,000,000,000"),
        ({"micro_batch_size": "2"}, "`micro_batch_size: '2'` is not supported"),
        ({"gradient_accumulation_steps": True}, "`gradient_accumulation_steps: True` is not"),
        ({"load_in_4bit": "no"}, "`load_in_4bit: 'no'` is not supported; write true or false"),
        ({"load_in_8bit": "no"}, "`load_in_8bit: 'no'` is not supported; write true or false"),
        (
            {"lora_target_linear": False, "lora_target_modules": 5},
            "`lora_target_modules: 5` is not supported; give a list of names",
        ),
        ({"lora_target_linear": False, "lora_target_modules": [1]}, "give a list of names"),
        ({"bnb_config_kwargs": "nf4"}, "`bnb_config_kwargs: 'nf4'` is not supported; give settin"),
        ({"tensor_parallel_size": "2"}, "`tensor_parallel_size: '2'` is not supported; give a who"),
        ({"plugins": 5, "fused": True}, "`plugins: 5` is not supported; give a list"),
        ({"overrides_of_model_config": 3}, "`overrides_of_model_config: 3` is not supported"),
        ({"overrides_of_model_config": {"num_hidden_layers": "x"}}, "is not supported by LlamaC"),
        ({"fused": True, "fused_memory_gb": "22"}, "`fused_memory_gb: '22'` is not supported"),
        ({"fused": True, "fused_memory_gb": 0}, "a number above 0 and at most 10,000, as in 22.5"),
        ({"fused": True, "fused_memory_gb": float("nan")}, "`fused_memory_gb: nan` is not supp"),
        ({"fused": True, "fused_host_gb": -1}, "`fused_host_gb: -1` is not supported"),
        ({"fused": True, "fused_host_gb": float("inf")}, "`fused_host_gb: inf` is not supported"),
    ],
)
def test_settings_that_are_refused(write: Any, settings: dict[str, Any], message: str) -> None:
    result = invoke(write(**settings))
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("error: ") and message in result.stderr
    assert result.stderr.count("\n") == 1  # one paragraph


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lama-3.1-8b"], "did you mean `llama-3.1-8b`? the geometries are llama-3.1-8b, "),
        (["no/such/file.yaml"], "is neither a YAML file, nor a geometry, nor a folder"),
        (["tiny", "--tokens", "1"], "--tokens 1: give 2 or more"),
        (["tiny", "--batch", "0"], "--batch 0: give 1 or more"),
        (["tiny", "--quant", "int4"], "--quant int4 is not supported; use nf4 or none"),
        (
            ["tiny", "--quant", "none", "--prepare-kbit"],
            "--prepare-kbit is for 4-bit weights, got --quant none",
        ),
        (["tiny", "--optimizer", "sgd"], "--optimizer sgd is not supported; use adamw_8bit or"),
        (["tiny", "--layers", "9"], "--layers 9: the model has 2; give 1 to 2"),
        (["tiny", "--targets", " , "], "names nothing; give names, as in q_proj,v_proj"),
        (["tiny", "--targets", "query"], "--targets query names no linear layer of tiny"),
        (["tiny", "--targets", "(a|"], "nor a regular expression: missing ), unterminated"),
        (["tiny", "--tokens", "-4096"], "--tokens -4096: give 2 or more"),
        (["tiny", "--tokens", str(10**20)], f"--tokens {10**20}: give 1,000,000,000 or less"),
        (["tiny", "--rank", "0"], "--rank 0: give 1 or more"),
        (["tiny", "--rank", str(10**10)], f"--rank {10**10}: give 1,000,000,000 or less"),
        (["tiny", "--memory", "-1"], "--memory -1: give the GB that auto may plan for"),
        (["tiny", "--memory", "0"], "--memory 0: give the GB that auto may plan for, above 0 and"),
        (["tiny", "--memory", "nan"], "--memory nan: give the GB that auto may plan for"),
        (["tiny", "--memory", "inf"], "--memory inf: give the GB that auto may plan for"),
        (["tiny", "--memory", "24e9"], "--memory 2.4e+10: give the GB that auto may plan for"),
        (["tiny", "--host", "-1"], "--host -1: give the GB of the host's memory"),
        (["tiny", "--host", "nan"], "--host nan: give the GB of the host's memory"),
        ([""], "'' is neither a YAML file, nor a geometry, nor a folder"),
        (["tiny", "--json", "no/such/plan.json"], "--json no/such/plan.json: there is no folder"),
    ],
)
def test_arguments_that_are_refused(arguments: list[str], message: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("error: ") and message in result.stderr


def test_a_host_that_may_hold_nothing() -> None:
    result = invoke("tiny", "--host", "0")
    assert result.exit_code == 0, result.output
    assert "with 0 GB of the host's memory to pin" in " ".join(result.output.split())


@pytest.mark.parametrize("text", ["a: [1\n b: }", "a:\n\t- b", "--- a\n--- b", "- a", ""])
def test_files_that_are_no_settings(tmp_path: Path, text: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text, "utf-8")
    result = invoke(str(file))
    assert result.exit_code == 1 and f"error: {file} is not a" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_config_that_transformers_refuses(model_dir: Path) -> None:
    file = model_dir / "config.json"
    config = json.loads(file.read_text("utf-8")) | {"num_hidden_layers": "three"}
    file.write_text(json.dumps(config), "utf-8")
    result = invoke(str(model_dir))
    assert result.exit_code == 1 and result.stderr.count("\n") == 1
    assert f"the config of {model_dir} cannot be read" in result.stderr


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GPT2Config(), "GPT2Block, which is not fused as a whole"),
        (MixtralConfig(num_hidden_layers=2), "MixtralDecoderLayer, which is not fused as a whole"),
    ],
    ids=["gpt2", "mixtral"],
)
def test_models_that_are_not_predicted(tmp_path: Path, config: Any, message: str) -> None:
    config.save_pretrained(tmp_path / "model")
    result = invoke(str(tmp_path / "model"))
    assert result.exit_code == 1 and message in result.stderr
    assert "`lorafuse doctor` says what is fused" in result.stderr


@pytest.mark.parametrize(
    ("text", "targets"),
    [
        ("q_proj, v_proj", ("q_proj", "v_proj")),
        ("all-linear", "all-linear"),
        (r".*\.mlp\..*", r".*\.mlp\..*"),
    ],
)
def test_targets_are_names_or_an_expression(text: str, targets: Any) -> None:
    assert read_targets(text) == targets


def test_help_names_what_it_takes() -> None:
    code = "from lorafuse.plugin.cli import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", code, "plan", "--help"], capture_output=True, text=True
    )
    assert result.returncode == 0
    for word in ("CONFIG.yaml|NAME|MODEL_DIR", "--tokens", "--rank", "--targets", "--json"):
        assert word in result.stdout
