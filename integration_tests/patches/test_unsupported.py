"""Models that lorafuse does not know train as stock, with a reason for every operation."""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM

from lorafuse.patches.apply import OPERATIONS, apply

ALL = dict.fromkeys(OPERATIONS, True)
BLOCKS = ("lora_mlp", "lora_qkv", "lora_o", "rms_norm", "rope")


def test_gpt2(make_peft, step, close) -> None:
    config = GPT2Config(
        n_embd=64, n_layer=2, n_head=4, vocab_size=128, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    model = make_peft(config)
    stock = step(model)
    fused = apply(model, ALL)
    close(step(model), stock)
    records = {r.operation: r for r in fused.records}
    for name in BLOCKS:
        assert not records[name].fused and "GPT2LMHeadModel" in records[name].reason


def test_a_model_of_ones_own() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x).relu())

    model = get_peft_model(Own(), LoraConfig(r=2, target_modules=["first", "second"]))
    x = torch.randn(3, 8)
    stock = model(x)
    fused = apply(model, ALL)
    assert torch.equal(model(x), stock)
    assert {r.operation for r in fused.records} >= {*BLOCKS, "cross_entropy"}
    assert all(not r.fused and r.reason for r in fused.records)


def test_a_model_without_adapters(tokens) -> None:
    config = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(tokens.device)
    fused = apply(model, ALL)
    assert {r.reason for r in fused.records} == {"the model has no LoRA adapters"}
    assert {r.operation for r in fused.records} == set(OPERATIONS)


def test_weights_that_are_not_here_yet(make_peft) -> None:
    model = make_peft("llama").to("meta")
    fused = apply(model, ALL)
    assert not any(r.fused for r in fused.records)
    assert any("meta device" in r.reason for r in fused.records)
