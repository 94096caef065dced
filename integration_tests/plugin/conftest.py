"""What the plugin's tests share: tiny random models, a tiny tokenizer, and installed plugins."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

WORDS = 64


def llama_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=WORDS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def gpt2_config() -> GPT2Config:
    return GPT2Config(
        vocab_size=WORDS, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2
    )


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The switches of the person who runs the tests do not count here."""
    for name in ("LORAFUSE_PLUGINS", "LORAFUSE_TRACE"):
        monkeypatch.delenv(name, raising=False)


def adapted(config: PretrainedConfig, **lora: Any) -> PeftModel:
    """A random model with LoRA on every linear layer, and B matrices that are not zero."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config)
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model = get_peft_model(base, LoraConfig(**(options | lora)))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


@pytest.fixture
def llama() -> PeftModel:
    return adapted(llama_config())


@pytest.fixture
def make_llama() -> Callable[[], PeftModel]:
    """Makes models that only the test holds."""
    return lambda: adapted(llama_config())


@pytest.fixture
def another_llama() -> PeftModel:
    """Equal to `llama`."""
    return adapted(llama_config())


@pytest.fixture
def bare_llama() -> PreTrainedModel:
    """Without adapters."""
    return LlamaForCausalLM(llama_config())


@pytest.fixture
def gpt2() -> PeftModel:
    return adapted(gpt2_config())


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Words w3, w4, ... and the special ones."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, WORDS)}
    inner = Tokenizer(models.WordLevel(names, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


InstallPlugin = Callable[[str], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> InstallPlugin:
    """Puts a distribution `thirdparty 1.2`, whose plugin is this module, on the path."""

    def put(source: str) -> None:
        site = tmp_path / "site"
        info = site / "thirdparty-1.2.dist-info"
        info.mkdir(parents=True)
        module = f"thirdparty_{tmp_path.name.replace('-', '_')}"
        (site / f"{module}.py").write_text(source, encoding="utf-8")
        (info / "METADATA").write_text(
            "Metadata-Version: 2.1\nName: thirdparty\nVersion: 1.2\n", encoding="utf-8"
        )
        (info / "entry_points.txt").write_text(f"[lorafuse]\nextra = {module}\n", encoding="utf-8")
        monkeypatch.syspath_prepend(str(site))

    return put
